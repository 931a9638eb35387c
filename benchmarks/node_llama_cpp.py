"""A prebuilt llama.cpp without a compiler: the npm package node-llama-cpp, asked from Python."""

from __future__ import annotations

import ctypes
import json
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VERSION = "3.22.1"
"""Of node-llama-cpp; it contains llama.cpp's release 0.5.0 of September 2026."""

_SCRIPT = Path(__file__).with_suffix(".mjs")
_INSTALL_SECONDS, _ANSWER_SECONDS = 600, 600
_BF16 = 30


class UnavailableError(Exception):
    """There is no llama.cpp for this machine, or none that can be downloaded; the reason is its text."""


def install(folder: Path) -> Path:
    """Install the package into ``folder``, unless it is there.

    Raises:
        UnavailableError: npm is missing or fails, or there is no prebuilt library for this machine.
    """
    npm, machine = shutil.which("npm"), _machine()
    if npm is None or shutil.which("node") is None:
        raise UnavailableError("node and npm are not installed")
    done = folder / f"installed-{VERSION}"
    if done.is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text('{"name": "swquant-llama-cpp", "private": true, "type": "module"}\n')
    packages = [f"node-llama-cpp@{VERSION}", f"@node-llama-cpp/{machine}@{VERSION}"]
    options = ["--no-audit", "--no-fund", "--ignore-scripts", "--omit=optional"]
    try:
        subprocess.run(
            [npm, "install", *options, *packages],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
            timeout=_INSTALL_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"npm took more than {_INSTALL_SECONDS} seconds") from error
    except subprocess.CalledProcessError as error:
        raise UnavailableError(f"npm cannot install node-llama-cpp: {error.stderr.strip()[-300:]}") from error
    done.touch()
    return folder


def ask(folder: Path, model: Path, **job: Any) -> dict[str, Any]:
    """Load ``model`` and answer.

    Args:
        folder: What :func:`install` returned.
        model: A GGUF file.
        job: ``texts``, to be cut into ``tokens``, special ones recognised, none added; ``windows`` of tokens, each to
            become the ``logProbabilities`` of its tokens behind the first; ``speed``, a ``prompt`` and how many
            ``tokens`` to generate how many ``repeats`` times for ``tokensPerSecond``; ``threads``.

    Raises:
        RuntimeError: llama.cpp cannot load the file, or fails.
    """
    script = folder / _SCRIPT.name
    shutil.copyfile(_SCRIPT, script)
    request = json.dumps({"threads": 1, **job, "model": str(model)})
    done = subprocess.run(
        ["node", script.name], cwd=folder, input=request, capture_output=True, text=True, timeout=_ANSWER_SECONDS
    )
    if done.returncode or not done.stdout.strip():
        raise RuntimeError(f"llama.cpp fails on {model}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def dequantize(folder: Path, name: str, blocks: Tensor, columns: int) -> Tensor:
    """What llama.cpp's own ``dequantize_row_*`` makes of blocks.

    Args:
        folder: What :func:`install` returned.
        name: The type as its functions spell it, e.g. ``q2_0``.
        blocks: ``uint8 [out, bytes]``.
        columns: Weights of a row.

    Returns:
        ``float32 [out, columns]``.
    """
    rows = blocks.contiguous()
    values = torch.empty(len(rows), columns)
    function = getattr(_library(folder, "libggml-base."), f"dequantize_row_{name}")
    function.restype, function.argtypes = None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    function(rows.data_ptr(), values.data_ptr(), values.numel())
    return values


def quantize(folder: Path, model: Path, out: Path, file_type: int, *, alike: bool) -> None:
    """Quantize a GGUF file by llama.cpp's own quantizer.

    Args:
        folder: What :func:`install` returned.
        model: The file.
        out: The new one.
        file_type: Number of a mixture of types, e.g. 10 for ``Q2_K``.
        alike: Give its main type to all linear layers and leave the embeddings as they are, instead of the mixture.

    Raises:
        RuntimeError: It fails.
    """
    _library(folder, "libggml-base.")
    _library(folder, "libggml.")
    library = _library(folder, "libllama.")
    silent = _LOG(lambda level, text, data: None)
    library.llama_log_set(silent, None)
    library.llama_model_quantize_default_params.restype = _Parameters
    parameters = library.llama_model_quantize_default_params()
    parameters.threads, parameters.file_type = 1, file_type
    if alike:
        parameters.pure, parameters.output_type, parameters.embedding_type = True, _BF16, _BF16
    library.llama_model_quantize.restype = ctypes.c_uint32
    library.llama_model_quantize.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Parameters))
    if library.llama_model_quantize(bytes(model), bytes(out), ctypes.byref(parameters)):
        raise RuntimeError(f"llama.cpp cannot quantize {model}")


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class _Parameters(ctypes.Structure):
    """``llama_model_quantize_params`` of this release."""

    _fields_ = (
        ("threads", ctypes.c_int32),
        ("file_type", ctypes.c_int32),
        ("output_type", ctypes.c_int32),
        ("embedding_type", ctypes.c_int32),
        ("requantize", ctypes.c_bool),
        ("quantize_output", ctypes.c_bool),
        ("only_copy", ctypes.c_bool),
        ("pure", ctypes.c_bool),
        ("keep_split", ctypes.c_bool),
        ("dry_run", ctypes.c_bool),
        ("importance", ctypes.c_void_p),
        ("metadata", ctypes.c_void_p),
        ("types", ctypes.c_void_p),
        ("pruned", ctypes.c_void_p),
        ("buffer_bytes", ctypes.c_size_t),
    )


def _library(folder: Path, name: str) -> ctypes.CDLL:
    (path,) = (folder / "node_modules" / "@node-llama-cpp" / _machine() / "bins" / _machine()).glob(f"{name}*")
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _machine() -> str:
    """The name of the package with the library for this machine."""
    names = {
        ("Linux", "x86_64"): "linux-x64",
        ("Linux", "aarch64"): "linux-arm64",
        ("Darwin", "arm64"): "mac-arm64-metal",
    }
    key = (platform.system(), platform.machine())
    if key not in names:
        raise UnavailableError(f"no prebuilt llama.cpp is known for {' '.join(key)}")
    return names[key]
