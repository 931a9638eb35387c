"""Which runtime loads what, and what a user is told who asks for something else."""

from __future__ import annotations

import itertools

import pytest

from swquant import registry
from swquant.errors import SwquantError
from swquant.plan import choose_formats
from swquant.quant.spec import BITS, GROUP_SIZES, QuantSpec
from swquant.targets import choose_format, load_target, require_loads, why_not

TARGETS = registry.names("swquant.targets")
SPECS = [QuantSpec(*values) for values in itertools.product(BITS, (None, *GROUP_SIZES), (True, False))]


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_runtime_loads_what_is_chosen_for_it_and_the_refusal_names_something_that_works(
    name: str, spec: QuantSpec
) -> None:
    target = load_target(name)
    assert set(target.formats) <= set(registry.names("swquant.formats"))
    try:
        form = choose_format(target, spec)
    except SwquantError as error:
        flags = str(error).split("the nearest that works is ")[1].split()
        if flags[0] == "--grid":
            nearest = QuantSpec.named(flags[1])
        else:
            group = None if flags[3] == "channel" else int(flags[3])
            nearest = QuantSpec(int(flags[1]), group, flags[4] == "--symmetric")
        assert choose_format(target, nearest) in target.formats
    else:
        require_loads(target, form, (spec,))
        assert why_not(target, form, spec) is None
        command = target.command(form, spec, "PATH")
        assert "PATH" in command if command is not None else name == "onnxruntime"


@pytest.mark.parametrize(
    ("target", "bits", "group", "symmetric", "form"),
    [
        ("vllm", 2, 64, True, "compressed_tensors"),
        ("vllm", 2, 64, False, "gptq"),
        ("vllm", 4, 128, False, "compressed_tensors"),
        ("sglang", 4, 128, True, "compressed_tensors"),
        ("sglang", 8, 128, True, "gptq"),
        ("transformers", 3, None, False, "compressed_tensors"),
        ("llama.cpp", 2, 64, True, "gguf"),
        ("mlx", 3, 64, False, "mlx"),
        ("onnxruntime", 2, 64, False, "onnx"),
    ],
)
def test_the_format_of_each_runtime(target: str, bits: int, group: int | None, symmetric: bool, form: str) -> None:
    assert choose_format(load_target(target), QuantSpec(bits, group, symmetric)) == form


def test_two_bits_that_vllm_computes_by_humming_say_so_in_the_command() -> None:
    vllm, asymmetric = load_target("vllm"), QuantSpec(2, 64, False)
    assert vllm.command("gptq", asymmetric, "PATH") == "vllm serve PATH --quantization humming"
    assert vllm.command("gptq", QuantSpec(4, 128, True), "PATH") == "vllm serve PATH"
    assert "compute capability 7.5" in vllm.notes("gptq", asymmetric)[0]


def test_what_a_runtime_refuses_comes_with_the_nearest_that_works() -> None:
    with pytest.raises(
        SwquantError, match=r"sglang cannot load .*--bits 2.*nearest that works is --bits 4 --group-size 64"
    ):
        choose_format(load_target("sglang"), QuantSpec(2, 64, True))
    with pytest.raises(SwquantError, match=r"onnxruntime cannot load .*--bits 3.*is --bits 4 --group-size 64 --symm"):
        choose_format(load_target("onnxruntime"), QuantSpec(3, 64, True))
    with pytest.raises(SwquantError, match=r"llama.cpp cannot load .*--bits 3.*nearest that works is --grid q3_k$"):
        choose_format(load_target("llama.cpp"), QuantSpec(3, 64, True))


def test_a_format_that_the_runtime_does_not_read_is_refused() -> None:
    with pytest.raises(SwquantError, match="vllm does not read the format gguf, expected compressed_tensors, gptq"):
        choose_formats(("gguf",), load_target("vllm"), (QuantSpec(2, 64, True),))
    with pytest.raises(SwquantError, match=r"cannot load w2g64 as compressed_tensors.*--format gptq works"):
        choose_formats(("compressed_tensors",), load_target("vllm"), (QuantSpec(2, 64, False),))
    both = ("gguf", "compressed_tensors")
    assert choose_formats(both, load_target("vllm"), (QuantSpec(2, 64, True),)) == both


def test_every_grid_of_a_model_must_be_one_that_the_runtime_loads() -> None:
    two, fine, odd = QuantSpec(2, 64, True), QuantSpec(4, 64, True), QuantSpec(4, 64, False)
    assert choose_formats((), load_target("vllm"), (fine, odd)) == ("compressed_tensors",)
    assert choose_formats((), load_target("transformers"), (two, fine)) == ("compressed_tensors",)
    with pytest.raises(SwquantError, match=r"sglang cannot load .*--bits 2"):
        choose_formats((), load_target("sglang"), (fine, two))
    for names in ((), ("compressed_tensors",)):
        with pytest.raises(SwquantError, match=r"several grids \(w4g64, w4g64 asymmetric\) of which one"):
            choose_formats(names, load_target("transformers"), (fine, odd))
    assert choose_formats(("dequantized",), load_target("transformers"), (fine, odd)) == ("dequantized",)


def test_an_unknown_runtime_has_a_nearest_name() -> None:
    with pytest.raises(SwquantError, match="vllm"):
        load_target("vlm")
