"""The demo model in onnxruntime and onnxruntime-genai: probabilities, perplexity, greedy text."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from outlines import outline_of
from swquant.checkpoint.quantized import QuantizedModel
from swquant.checkpoint.reader import read_config
from swquant.formats.onnx import Onnx
from swquant.formats.onnx_writer import write_decoder
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import QuantSpec
from swquant.recipe import Recipe
from swquant.run import quantize

ort: Any = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytestmark = pytest.mark.slow

ASSETS = Path(str(resources.files("swquant") / "demo_assets"))
WINDOWS, LENGTH, LEVELS = 16, 256, (0, 4)
W4 = QuantSpec(4, 64, True)
SPECS = [QuantSpec(2, 64, True), QuantSpec(2, 64, False), W4, QuantSpec(4, None, False)]
MIXED = {"*.down_proj": QuantSpec(4, 32, False), "*.v_proj": QuantSpec(4, 64, True), "*.layers.5.*": None}
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """From a grid, and whether others are mixed in, to the output of a run on the demo model, one for each."""
    done: dict[tuple[QuantSpec, bool], Path] = {}

    def once(spec: QuantSpec, mixed: bool = False) -> Path:
        if (spec, mixed) not in done:
            recipe = Recipe(
                bits=spec.bits,
                group_size=spec.group_size,
                symmetric=spec.symmetric,
                method="rtn",
                calibration=str(ASSETS / "calibration.txt"),
                samples=2,
                evaluation_samples=1,
                format="onnx",
                device="cpu",
                allow_split=mixed,
            )
            done[spec, mixed] = tmp_path_factory.mktemp("run") / "out"
            quantize(recipe, ASSETS / "model", done[spec, mixed], grids=MIXED if mixed else None)
        return done[spec, mixed]

    return once


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "model")
    text = (ASSETS / "evaluation.txt").read_text(encoding="utf-8")
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"][: WINDOWS * LENGTH]).view(WINDOWS, LENGTH)


def back(directory: Path) -> QuantizedModel:
    model = Onnx().read(directory, read_config(directory))
    assert model is not None
    return model


def at_level(directory: Path, level: int, place: Path) -> Path:
    """The output, written again with another accuracy level."""
    write_decoder(place, back(directory), Onnx().encode, level)
    return place


def reference(directory: Path) -> Any:
    """transformers' model with the dequantized weights in float32."""
    state: dict[str, torch.Tensor] = {}
    for part in back(directory).parts():
        for name, value in part.items():
            state[name] = value.dequantize() if isinstance(value, QTensor) else value.float()  # type: ignore[union-attr]
    module: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.float32).eval()
    assert set(module.load_state_dict(state, strict=False).missing_keys) <= {"lm_head.weight"}
    module.tie_weights()
    return module


class Session:
    """onnxruntime on one thread, and the cache of the text so far."""

    def __init__(self, directory: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        place = str(directory / "model.onnx")
        self._session = ort.InferenceSession(place, options, providers=["CPUExecutionProvider"])
        self._past = [value for value in self._session.get_inputs() if value.name.startswith("past")]
        self.clear()

    def clear(self) -> None:
        self._cache = [np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32) for value in self._past]

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of ``tokens [1, n]`` after the text so far."""
        mask = np.ones((1, self._cache[0].shape[2] + tokens.shape[1]), np.int64)
        feeds = {value.name: cached for value, cached in zip(self._past, self._cache, strict=True)}
        found = self._session.run(None, {"input_ids": tokens.numpy(), "attention_mask": mask, **feeds})
        self._cache = found[1:]
        return torch.from_numpy(found[0])


def perplexity(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return float(losses.exp())


def divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    ours, theirs = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("spec", "mixed"),
    [*((spec, False) for spec in SPECS), (SPECS[0], True)],
    ids=lambda value: value if isinstance(value, bool) else f"{value.label}-{'sym' if value.symmetric else 'asym'}",
)
def test_probabilities_are_those_of_the_dequantized_model(
    spec: QuantSpec, mixed: bool, level: int, run: Run, tokens: torch.Tensor, tmp_path: Path
) -> None:
    directory = run(spec, mixed)
    if mixed:
        model = back(directory)
        assert {
            grid
            for part in model.parts()
            for value in part.values()
            if isinstance(value, QTensor)
            for grid in [value.spec]
        } == {spec, *(grid for grid in MIXED.values() if grid)}
    with torch.no_grad():
        expected = reference(directory)(tokens).logits
    session = Session(directory if level == 4 else at_level(directory, level, tmp_path / "exact"))
    whole, halves = [], []
    for window in tokens.split(1):
        session.clear()
        whole.append(session(window))
        session.clear()
        halves.append(torch.cat([session(window[:, :100]), session(window[:, 100:101]), session(window[:, 101:])], 1))
    for found in (torch.cat(whole), torch.cat(halves)):
        ratio = perplexity(found, tokens) / perplexity(expected, tokens)
        same = float((found.argmax(-1) == expected.argmax(-1)).float().mean())
        apart = float((found - expected).abs().max())
        print(f"{spec.label} level {level}: ratio {ratio:.6f} KL {divergence(expected, found):.2e} top-1 {same:.4f}")
        if level == 0:
            assert apart < 2e-4
            assert abs(ratio - 1) < 1e-5
        else:
            assert apart > 1e-3  # so that the test sees which level it has
            assert abs(ratio - 1) < 5e-3
            assert divergence(expected, found) < 2e-3
            assert same > 0.96


def test_greedy_text_with_the_cache_is_that_of_transformers(run: Run, tokens: torch.Tensor, tmp_path: Path) -> None:
    directory = run(W4)
    session, count = Session(at_level(directory, 0, tmp_path / "exact")), 100
    prompt = tokens[:1, :20]
    expected = _greedy(reference(directory), prompt, count)
    found, step = prompt.tolist()[0], prompt
    for _ in range(count):
        step = session(step)[:, -1:].argmax(-1)
        found.append(int(step))
    assert found == expected


def test_genai_loads_the_output_and_writes_the_same_text(run: Run, tokens: torch.Tensor, tmp_path: Path) -> None:
    genai: Any = pytest.importorskip("onnxruntime_genai")
    directory = run(W4)
    exact, count = at_level(directory, 0, tmp_path / "exact"), 100
    prompt = tokens[:1, :20]
    for place in (directory, exact):
        known: dict[str, Any] = {"path": str(place)}
        exec(compile(Onnx().loading(outline_of(place, {}, W4, torch.float32, {}, ())), "snippet", "exec"), known)
        parameters = genai.GeneratorParams(known["model"])
        parameters.set_search_options(max_length=prompt.shape[1] + count)
        generator = genai.Generator(known["model"], parameters)
        generator.append_tokens(prompt.numpy().astype(np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        text = [int(token) for token in generator.get_sequence(0)]
        assert len(text) > prompt.shape[1]
        if place == exact:
            assert text == _greedy(reference(directory), prompt, count)[: len(text)]
    words = "for each name in the list"
    expected = AutoTokenizer.from_pretrained(ASSETS / "model")(words)["input_ids"]
    assert known["tokenizer"].encode(words).tolist() == expected
    assert known["tokenizer"].decode(np.array(expected[1:], dtype=np.int32)) == words


def _greedy(model: Any, prompt: torch.Tensor, count: int) -> list[int]:
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 1}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[0].tolist()
