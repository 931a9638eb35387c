"""Pipelines: reading, and combinations that cannot be."""

from __future__ import annotations

import pytest

from swquant import SwquantError, registry
from swquant.learnables.equivalent_transform import EquivalentTransform
from swquant.methods import Setting, build_pipeline, parse_methods
from swquant.phases.train import Train
from swquant.quant.spec import QuantSpec

SETTING = Setting(QuantSpec(2, 64, True), False, 1.0)


def test_what_is_listed_as_a_method_is_one() -> None:
    for name in registry.names("swquant.methods"):
        assert [step.name for step in parse_methods(name)] == [name]
        build_pipeline(parse_methods(name), SETTING)


def test_the_canonical_form_reads_back_to_itself() -> None:
    text = " + ".join(map(str, parse_methods("  rtn+omniquant( epochs=4 ,alpha=1 )")))
    assert text == "rtn + omniquant(alpha=1, epochs=4)"
    assert " + ".join(map(str, parse_methods(text))) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cannot be read"),
        ("omniquant - rtn", "cannot be read"),
        ("omniquant(4)", "cannot be read"),
        ("omniquant(**{})", "cannot be read"),
        ("omniquant(epochs=print())", "cannot be read"),
        ("omniquant()()", "cannot be read"),
        ("omniquant(epochs=1, epochs=2)", "cannot be read"),
        ("omniquant(" * 500, "cannot be read"),
        ("omniqant", "did you mean 'omniquant'"),
        ("rtn + omniquant(epoch=4)", "did you mean 'epochs'"),
    ],
)
def test_what_is_no_pipeline_is_refused_in_a_sentence(text: str, said: str) -> None:
    with pytest.raises(SwquantError, match=said) as caught:
        parse_methods(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *("omniquant(batch_size=0)", "omniquant(epochs=-1)", "omniquant(alpha=1.5)", "omniquant(clipping_rate=-1.0)"),
        *("omniquant(transform_rate=0.0)", "tesseraq(learning_rate=-1.0)", "tesseraq(gain_rate=0.0)"),
        *("signround(learning_rate=-1.0)", "signround(range_rate=0.0)", "end_to_end(learning_rate=1e999)"),
        *("norm_tweaking(learning_rate=0.0)", "block_ap(weight_rate=1e999)", "gptq(damping=1e999)"),
    ],
)
def test_options_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(SwquantError, match="input should be"):
        parse_methods(text)


def test_an_option_goes_to_the_only_method_that_has_it() -> None:
    assert str(parse_methods("omniquant(alpha=1)", {"epochs": 3})[0]) == "omniquant(alpha=1, epochs=3)"
    steps = parse_methods("gptq + block_ap", {"damping": 0.1, "norms": False})
    assert " + ".join(map(str, steps)) == "gptq(damping=0.1) + block_ap(norms=False)"
    with pytest.raises(SwquantError, match=r"batch_size could be an option of block_ap or end_to_end: .*block_ap\("):
        parse_methods("gptq + block_ap + end_to_end", {"batch_size": 3})
    with pytest.raises(SwquantError, match=r"no method of 'rtn [+] gptq' has an option 'epoch'"):
        parse_methods("rtn + gptq", {"epoch": 3})


def test_a_start_comes_along_only_where_no_method_stands_before() -> None:
    def names(text: str) -> list[str]:
        return [part.name for part in build_pipeline(parse_methods(text), SETTING).parts]

    assert names("tesseraq") == ["awq scales", "awq clips", "tesseraq"]
    assert names("rotate + norm_tweaking") == ["rotate", "gptq", "norm_tweaking"]
    assert names("rtn + tesseraq") == ["tesseraq"]
    assert names("rtn + tesseraq(start=awq)") == ["awq scales", "awq clips", "tesseraq"]
    assert names("norm_tweaking(start=none)") == ["norm_tweaking"]


def test_epochs_go_to_every_method_that_trains_by_them() -> None:
    steps = parse_methods("gptq + block_ap(epochs=9) + end_to_end", epochs=3)
    assert " + ".join(map(str, steps)) == "gptq + block_ap(epochs=3) + end_to_end(epochs=3)"
    with pytest.raises(SwquantError, match="no method of 'gptq' trains by epochs"):
        parse_methods("gptq", epochs=3)


ILLEGAL = [
    ("gptq + awq", "awq scales would discard the grid and the weights that gptq has found"),
    ("tesseraq(start=none) + block_ap", "block_ap would discard the rounding that tesseraq has found"),
    ("signround + tesseraq", "would discard the rounding|both learn the rounding"),
    ("block_ap + norm_tweaking", "block_ap and norm_tweaking both learn the norms"),
    ("omniquant + signround", "omniquant and signround both learn the clips"),
    ("gptq + omniquant", "omniquant would discard the grid and the weights that gptq has found"),
    ("gptq + rotate", "rotate works before the first block and gptq block by block: put rotate first"),
    ("end_to_end + gptq", "gptq works block by block and end_to_end after the last block: put gptq first"),
    ("efficientqat + end_to_end", "end_to_end is listed twice"),
]


@pytest.mark.parametrize(("text", "said"), ILLEGAL)
def test_combinations_that_cannot_be_are_refused_with_the_reason(text: str, said: str) -> None:
    with pytest.raises(SwquantError, match=said):
        build_pipeline(parse_methods(text), SETTING)


@pytest.mark.parametrize("text", ["gptq + signround", "block_ap + signround", "gptq + awq", "block_ap + gptq"])
def test_another_order_is_advised_only_where_it_can_be(text: str) -> None:
    with pytest.raises(SwquantError, match="remove one") as caught:
        build_pipeline(parse_methods(text), SETTING)
    assert ("put " in str(caught.value)) is ("signround" not in text)
    if "signround" not in text:
        build_pipeline(parse_methods(" + ".join(reversed(text.split(" + ")))), SETTING)


LEGAL = [
    "awq + gptq",
    "awq + omniquant",
    "awq + tesseraq",
    "omniquant + tesseraq",
    "gptq + block_ap + tesseraq",
    "awq(clip=False) + gptq + block_ap + tesseraq + end_to_end",
    "rotate + awq + signround + norm_tweaking + end_to_end",
    "rotate + efficientqat",
]


@pytest.mark.parametrize("text", LEGAL)
def test_combinations_that_can_be(text: str) -> None:
    pipeline = build_pipeline(parse_methods(text), SETTING)
    names = [part.name for part in pipeline.parts]
    assert len(set(names)) == len(names)
    assert pipeline.rotate is text.startswith("rotate")
    assert (pipeline.finish is not None) is ("end_to_end" in text or "efficientqat" in text)


def test_round_to_nearest_has_no_parts() -> None:
    assert build_pipeline(parse_methods("rtn"), SETTING).parts == ()


@pytest.mark.parametrize("norm_biases", [False, True])
def test_defaults_depend_on_the_norms(norm_biases: bool) -> None:
    (phase,) = build_pipeline(parse_methods("omniquant"), Setting(SETTING.spec, norm_biases, 0.5)).phases
    assert isinstance(phase, Train)
    assert any(isinstance(part, EquivalentTransform) for part in phase.learnables) is norm_biases
    assert phase.epochs == 20
    assert phase.augmented


def test_a_method_cannot_stand_twice() -> None:
    with pytest.raises(SwquantError, match="omniquant is listed twice"):
        build_pipeline(parse_methods("omniquant + omniquant"), SETTING)


@pytest.mark.parametrize("expression", ["awq + 1if", "awq(x='\\d')", "rtn" + " + rtn" * 400])
def test_what_cannot_be_read_is_one_sentence_and_no_warning(expression: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SwquantError) as caught:
        parse_methods(expression)
    assert len(str(caught.value)) < 600
    assert capfd.readouterr() == ("", "")
