"""``from_pretrained`` of transformers that leaves quantized models packed."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from swquant.device import numbered
from swquant.errors import SwquantError
from swquant.formats import find_quantized
from swquant.runtime.loading import load

_IGNORED = frozenset(
    {
        *("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token", "code_revision"),
        *("low_cpu_mem_usage", "use_safetensors", "weights_only", "disable_mmap", "adapter_kwargs", "tqdm_class"),
        *("_from_auto", "_from_pipeline", "_commit_hash"),
    }
)
"""Arguments that say where a file comes from or how it is read, and nothing of the model."""

_CONFIGS = frozenset({"CompressedTensorsConfig", "GPTQConfig", "AutoRoundConfig", "dict"})
"""What scripts give as ``quantization_config`` for such directories; their choices are of other loaders' kernels."""

_OF_THE_FILES = frozenset({"quantization_config", "quantization", "dtype", "transformers_version", "_name_or_path"})
"""Keys of a configuration that do not change the model's function."""


@contextmanager
def packed_transformers(kernel: str = "auto") -> Generator[None, None, None]:
    """Have ``from_pretrained`` load directories that swquant reads as :func:`swquant.load` does, packed.

    Within the context ``AutoModelForCausalLM.from_pretrained(directory)``, and any model class's own, gives for a
    directory in compressed-tensors, GPTQ, AutoRound, MLX or another of our formats the model whose quantized linears
    are :class:`~swquant.runtime.linear.PackedLinear`. Everything else is loaded as before: hub names, too. Leaving it,
    by an error as well, puts back what was there. Like any patch it is seen by all threads.

    transformers refuses a second quantizer under a name that it knows, and its own would unpack MLX's and GPTQ's
    layouts by other kernels' rules; so it is the loading that is replaced, and no quantizer.

    Of the arguments of ``from_pretrained``, ``dtype``, ``device_map`` for one device, ``trust_remote_code``,
    ``attn_implementation``, ``subfolder``, ``generation_config`` and ``config`` are followed; those that choose a
    source are of no effect on a directory, and all others are refused.

    Args:
        kernel: See :func:`swquant.load`.

    Raises:
        SwquantError: By ``from_pretrained``: the model is damaged, or an argument cannot be followed.
    """
    base: Any = PreTrainedModel
    original = vars(base)["from_pretrained"]

    def from_pretrained(cls: type, source: Any = None, *args: Any, **options: Any) -> Any:
        directory = _directory(source, options)
        if directory is None or find_quantized(directory, trusted=bool(options.get("trust_remote_code"))) is None:
            return original.__func__(cls, source, *args, **options)
        if args:
            raise SwquantError(f"{cls.__name__} is given {len(args)} arguments beside {directory}; give them by name")
        return _load(cls, directory, kernel, options)

    base.from_pretrained = classmethod(from_pretrained)
    try:
        yield
    finally:
        base.from_pretrained = original


def _directory(source: Any, options: Mapping[str, Any]) -> Path | None:
    """The folder that is to be loaded; ``None`` for hub names, GGUF files and states."""
    if not isinstance(source, str | Path) or options.get("gguf_file") or options.get("state_dict") is not None:
        return None
    place = Path(source) / (options.get("subfolder") or "")
    return place if (place / "config.json").is_file() else None


def _load(cls: type, directory: Path, kernel: str, options: Mapping[str, Any]) -> Any:
    given = {key: value for key, value in options.items() if key not in _IGNORED and not _unset(value)}
    given.pop("subfolder", None)
    dtype = _dtype(given.pop("dtype", None) or given.pop("torch_dtype", None))
    given.pop("torch_dtype", None)
    device = _device(given.pop("device_map", None))
    trusted = bool(given.pop("trust_remote_code", False))
    config, attention = given.pop("config", None), given.pop("attn_implementation", None)
    generation = given.pop("generation_config", None)
    quantization = type(given.pop("quantization_config", {})).__name__
    if quantization not in _CONFIGS:
        raise SwquantError(f"{directory} is quantized already; leave quantization_config={quantization} out")
    if given:
        raise SwquantError(
            f"{', '.join(sorted(given))} of from_pretrained cannot be followed for the packed model in {directory}; "
            "leave it out, or load outside of packed_transformers()"
        )
    model = load(directory, device=device, dtype=dtype, kernel=kernel, trust_remote_code=trusted)
    if not isinstance(model, cls):
        raise SwquantError(f"{directory} holds a {type(model).__name__}, which is no {cls.__name__}; take that class")
    if config is not None:
        attention = attention or getattr(config, "_attn_implementation", None)
        _require_same(config, model.config, directory)
    if attention is not None:
        model.set_attn_implementation(attention)
    if generation is not None:
        model.generation_config = generation
    return model


def _unset(value: Any) -> bool:
    """Whether an argument says nothing; the device 0 does."""
    return value is None or value is False or (isinstance(value, str) and not value)


def _dtype(value: Any) -> torch.dtype | None:
    """The dtype of that name; ``None`` for the stored one."""
    if value is None or value == "auto" or isinstance(value, torch.dtype):
        return None if value == "auto" else value
    found = getattr(torch, str(value).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise SwquantError(f"there is no dtype {value!r}; give one of torch's, such as torch.bfloat16")
    return found


def _device(value: Any) -> str:
    """The one device that a ``device_map`` names; without any, transformers loads to the CPU."""
    if isinstance(value, Mapping) and set(value) == {""}:
        value = value[""]
    if value is None:
        return "cpu"
    if type(value) is int:
        return numbered(value)
    if not isinstance(value, str | torch.device):
        raise SwquantError(f"a packed model lies on one device, got device_map={value!r:.200}; give 'auto' or a device")
    return str(value)


def _require_same(given: Any, found: Any, directory: Path) -> None:
    """Refuse a configuration that is not the directory's, which would be another model."""
    ours, theirs = found.to_dict(), given.to_dict()
    changed = [key for key in theirs if key not in _OF_THE_FILES and theirs[key] != ours.get(key)]
    if changed:
        raise SwquantError(
            f"the config that is given differs in {', '.join(sorted(changed))} from that in {directory}, with which "
            "the model was quantized; leave it out"
        )
