"""Packages that load our outputs, in environments of their own, made once in pytest's cache."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import swquant
from swquant import Recipe, quantize
from swquant.calibration import eval_windows
from swquant.corpus import read_text, tokenize
from swquant.evaluation.perplexity import window_nll
from swquant.formats import read_quantized
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import QuantSpec
from swquant.tokenizer import open_reading

MakeModel = Callable[..., Path]
WINDOWS, LENGTH = 8, 32


@dataclass(frozen=True)
class Case:
    """An output, what swquant says of it, and the model that its codes stand for.

    Attributes:
        path: The output.
        spec: Its grid.
        loading: The lines of Python that the report gives.
        perplexity: The report's.
        tokens: The windows that the report measured on, ``int64 [windows, tokens]``.
        logits: Of the model whose weights are ``QTensor.dequantize()``, in float32.
        weights: Those weights by module.
    """

    path: Path
    spec: QuantSpec
    loading: str
    perplexity: float
    tokens: Tensor
    logits: Tensor
    weights: Mapping[str, Tensor]

    def measured(self, logits: Tensor) -> float:
        """Perplexity on the same windows."""
        return float(window_nll(logits, self.tokens).double().mean().exp())

    def divergence(self, logits: Tensor) -> float:
        """``KL(ours || theirs)`` in nats per token."""
        ours, theirs = (values.double().log_softmax(-1) for values in (self.logits, logits))
        return float((ours.exp() * (ours - theirs)).sum(-1).mean())


@pytest.fixture(scope="session")
def environment(request: pytest.FixtureRequest) -> Callable[[str, Sequence[str]], Path]:
    """From a name and requirements to the Python of an environment that has them; skips where pip cannot make it.

    The test environment's packages are seen through a path file, so that torch is not installed again unless it is
    among the requirements.
    """

    failed: dict[str, str] = {}  # pip is not asked again by each test

    def make(name: str, requirements: Sequence[str]) -> Path:
        kept = () if any(name.startswith("torch>") for name in requirements) else (f"torch=={torch.__version__}",)
        shared = [place for place in sys.path if place.endswith(("site-packages", "dist-packages"))]
        shared.append(str(Path(swquant.__file__).parents[1]))  # its own .pth is not followed there
        key = hashlib.sha256(repr((requirements, shared, sys.version)).encode()).hexdigest()[:12]
        home = Path(request.config.cache.mkdir(f"{name}-{key}"))
        python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        if key in failed:
            pytest.skip(failed[key])
        if not (home / "ready").exists():
            run(sys.executable, "-m", "venv", "--clear", home)
            own = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip()
            (Path(own) / "shared.pth").write_text("\n".join(shared) + "\n")
            installed = call(python, "-m", "pip", "install", "--no-build-isolation", *requirements, *kept)
            if installed.returncode:
                last = (installed.stderr.strip() or installed.stdout.strip()).splitlines()[-1:]
                failed[key] = f"pip cannot install {' '.join(requirements)}: {' '.join(last)}"
                pytest.skip(failed[key])
            (home / "ready").touch()
        return python

    return make


def call(*command: str | Path) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    settings = {**inherited, "MAX_JOBS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(list(map(str, command)), env=settings, capture_output=True, text=True, check=False)


def run(*command: str | Path) -> str:
    finished = call(*command)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    return finished.stdout


@pytest.fixture(scope="session")
def run_script() -> Callable[..., None]:
    """Run a script beside this file in an environment: its Python, the script's name, arguments."""

    def function(python: Path, script: str, *arguments: str | Path) -> None:
        run(python, Path(__file__).with_name(script), *arguments)

    return function


@pytest.fixture(scope="session")
def quantized(make_model: MakeModel, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """A function from a format, a grid, a family, a dtype, more of the recipe and settings to an output.

    Models are of width 128.
    """
    models: dict[str, Path] = {}
    held_out = tmp_path_factory.mktemp("held-out") / "text.txt"
    held_out.write_text(text.read_text()[-4000:])

    def make(
        form: str,
        spec: QuantSpec,
        family: str,
        dtype: torch.dtype,
        also: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Case:
        key = repr((family, dtype, settings))
        if key not in models:
            opt = {"ffn_dim": 256, "word_embed_proj_dim": 128}
            shape = opt if family == "opt" else {"intermediate_size": 256, "head_dim": 32}
            models[key] = make_model(family, 2, dtype, hidden_size=128, **shape, **settings)
        source, out = models[key], tmp_path_factory.mktemp(form) / "out"
        recipe = Recipe(
            bits=spec.bits,
            group_size=spec.group_size,
            symmetric=spec.symmetric,
            method="rtn",
            calibration=str(text),
            samples=2,
            seq_len=LENGTH,
            evaluation=str(held_out),
            evaluation_samples=WINDOWS,
            format=form,
            device="cpu",
        )
        report = quantize(replace(recipe, **(also or {})), source, out)
        assert report.quality is not None
        reading = open_reading(out)
        tokens = eval_windows(tokenize(reading.tokenizer, read_text(str(held_out))), LENGTH, WINDOWS, reading.begin)
        weights, logits = from_codes(out, source, tokens)
        return Case(out, spec, report.outputs[0].loading, report.quality.perplexity, tokens, logits, weights)

    return make


@torch.no_grad()
def from_codes(out: Path, source: Path, tokens: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Dequantized weights by module, and the logits of the model that has them, in float32."""
    _, quantized = read_quantized(out)
    weights: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, value in itertools.chain.from_iterable(part.items() for part in quantized.parts()):
        if isinstance(value, Tensor):
            state[name] = value.float()
        else:
            assert isinstance(value, QTensor)
            state[name] = weights[name.removesuffix(".weight")] = value.dequantize()
    config = AutoConfig.from_pretrained(source)
    with tempfile.TemporaryDirectory() as folder:  # not load_state_dict: transformers puts experts together as it loads
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        save_file(state, Path(folder) / "model.safetensors", {"format": "pt"})
        model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not loading["unexpected_keys"]
    assert set(loading["missing_keys"]) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    return weights, model.eval()(input_ids=tokens).logits


@pytest.fixture(scope="session")
def computed(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Path, str, Sequence[Case]], list[dict[str, Tensor]]]:
    """What a script beside this file computes in an environment from each case: logits, and weights by module."""

    def compute(python: Path, script: str, cases: Sequence[Case]) -> list[dict[str, Tensor]]:
        place = tmp_path_factory.mktemp("computed")
        for index, case in enumerate(cases):
            save_file({"tokens": case.tokens.contiguous()}, place / f"{index}.in.safetensors")
            (place / f"{index}.py").write_text(f"path = {str(case.path)!r}\n{case.loading}\n")
        run(python, Path(__file__).with_name(script), place, str(len(cases)))
        return [load_file(place / f"{index}.out.safetensors") for index in range(len(cases))]

    return compute
