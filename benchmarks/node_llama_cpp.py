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
            become the ``logProbabilities`` of its tokens after the first; ``speed``, a ``prompt`` and how many
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
    library.llama_log_set(_SILENT, None)
    library.llama_model_quantize_default_params.restype = _Parameters
    parameters = library.llama_model_quantize_default_params()
    parameters.threads, parameters.file_type = 1, file_type
    if alike:
        parameters.pure, parameters.output_type, parameters.embedding_type = True, _BF16, _BF16
    library.llama_model_quantize.restype = ctypes.c_uint32
    library.llama_model_quantize.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Parameters))
    if library.llama_model_quantize(bytes(model), bytes(out), ctypes.byref(parameters)):
        raise RuntimeError(f"llama.cpp cannot quantize {model}")


def log_probabilities(folder: Path, model: Path, windows: Tensor) -> Tensor:
    """The log probabilities of the tokens after each window's first, by the library itself, on one thread.

    The same as ``ask(windows=...)``, a window in one batch; JavaScript takes a second a token for vocabularies of
    a quarter million.

    Args:
        folder: What :func:`install` returned.
        model: A GGUF file.
        windows: ``int64 [windows, length]``.

    Returns:
        ``float64 [windows, length - 1]``.

    Raises:
        RuntimeError: llama.cpp cannot load the file, or fails.
    """
    library, length = _computing_library(folder), windows.shape[1]
    loaded = library.llama_model_load_from_file(bytes(model), library.llama_model_default_params())
    if not loaded:
        raise RuntimeError(f"llama.cpp cannot load {model}")
    settings = library.llama_context_default_params()
    if tuple(settings.words[:3]) != (512, 2048, 512):  # the release's defaults: contexts, batches, parts of a batch
        raise RuntimeError("this llama.cpp orders the parameters of a context in another way")
    settings.words[0] = settings.words[1] = settings.words[2] = length
    context = library.llama_init_from_model(loaded, settings)
    if not context:
        raise RuntimeError(f"llama.cpp makes no context of {length} tokens for {model}")
    library.llama_set_n_threads(context, 1, 1)
    size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(loaded))
    found = torch.stack([_log_probabilities(library, context, window, size) for window in windows])
    library.llama_free(context)
    library.llama_model_free(loaded)
    return found


def _log_probabilities(library: ctypes.CDLL, context: int, window: Tensor, size: int) -> Tensor:
    length = len(window)
    library.llama_memory_clear(library.llama_get_memory(context), True)
    batch = library.llama_batch_init(length, 0, 1)
    batch.count = length
    for index, token in enumerate(window.tolist()):
        batch.tokens[index], batch.positions[index] = token, index
        batch.sequence_counts[index], batch.sequences[index][0], batch.wanted[index] = 1, 0, 1
    failed = library.llama_decode(context, batch)
    library.llama_batch_free(batch)
    if failed:
        raise RuntimeError(f"llama.cpp fails on a window with the code {failed}")
    pointer = library.llama_get_logits(context)
    logits = torch.frombuffer((ctypes.c_float * (length * size)).from_address(pointer), dtype=torch.float32)
    scores = logits.view(length, size)[:-1].double()
    return (scores.gather(1, window[1:, None]) - scores.logsumexp(1, keepdim=True)).squeeze(1)


class _Settings(ctypes.Structure):
    """``llama_model_params`` or ``llama_context_params``: larger than both, so that its end need not be known."""

    _fields_ = (("words", ctypes.c_uint32 * 256),)


class _Batch(ctypes.Structure):
    """``llama_batch``."""

    _fields_ = (
        ("count", ctypes.c_int32),
        ("tokens", ctypes.POINTER(ctypes.c_int32)),
        ("embeddings", ctypes.POINTER(ctypes.c_float)),
        ("positions", ctypes.POINTER(ctypes.c_int32)),
        ("sequence_counts", ctypes.POINTER(ctypes.c_int32)),
        ("sequences", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("wanted", ctypes.POINTER(ctypes.c_int8)),
    )


def _computing_library(folder: Path) -> ctypes.CDLL:
    """llama.cpp's library with a processor's backend and the types of its functions."""
    _library(folder, "libggml-base.")
    backends = _library(folder, "libggml.")
    backends.ggml_backend_load_all_from_path.argtypes = (ctypes.c_char_p,)
    backends.ggml_backend_load_all_from_path(bytes(_bins(folder)))
    library = _library(folder, "libllama.")
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    library.llama_log_set(_SILENT, None)
    types: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "llama_model_default_params": (_Settings, ()),
        "llama_context_default_params": (_Settings, ()),
        "llama_model_load_from_file": (pointer, (ctypes.c_char_p, _Settings)),
        "llama_init_from_model": (pointer, (pointer, _Settings)),
        "llama_set_n_threads": (None, (pointer, number, number)),
        "llama_model_get_vocab": (pointer, (pointer,)),
        "llama_vocab_n_tokens": (number, (pointer,)),
        "llama_get_memory": (pointer, (pointer,)),
        "llama_memory_clear": (None, (pointer, ctypes.c_bool)),
        "llama_batch_init": (_Batch, (number, number, number)),
        "llama_batch_free": (None, (_Batch,)),
        "llama_decode": (number, (pointer, _Batch)),
        "llama_get_logits": (pointer, (pointer,)),
        "llama_free": (None, (pointer,)),
        "llama_model_free": (None, (pointer,)),
    }
    for name, (result, arguments) in types.items():
        function = library[name]
        function.restype, function.argtypes = result, arguments
        setattr(library, name, function)
    return library


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_SILENT = _LOG(lambda level, text, data: None)
"""Lives as long as the library, which keeps it."""


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
    (path,) = _bins(folder).glob(f"{name}*")
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _bins(folder: Path) -> Path:
    return folder / "node_modules" / "@node-llama-cpp" / _machine() / "bins" / _machine()


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
