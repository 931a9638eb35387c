"""compressed-tensors, by the package of that name and by transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor

from swquant.evaluation.models import load_by_transformers
from swquant.quant.spec import QuantSpec

_SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


class CompressedTensors:
    """The package's own decompressor, and transformers' models."""

    package: ClassVar[str | None] = "compressed-tensors"
    runtime: ClassVar[tuple[str, ...]] = ("transformers", "compressed-tensors")

    def weight(self, directory: Path, module: str, spec: QuantSpec) -> Tensor:
        """``PackedQuantizationCompressor.decompress`` with the scheme that ``config.json`` tells."""
        from compressed_tensors.compressors import PackedQuantizationCompressor
        from compressed_tensors.quantization import QuantizationConfig

        settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        groups: Any = QuantizationConfig.model_validate(settings).config_groups
        scheme = next((group for group in groups.values() if _targets(group.targets, module)), groups["group_0"])
        state = {suffix: _read(directory, f"{module}.{suffix}") for suffix in _SUFFIXES}
        present = {suffix: tensor for suffix, tensor in state.items() if tensor is not None}
        present["weight_scale"] = present["weight_scale"].float()
        return PackedQuantizationCompressor.decompress(present, scheme)["weight"].float()

    def tolerance(self, spec: QuantSpec) -> float:
        """Bit for bit."""
        return 0.0

    def logits(self, directory: Path, tokens: Tensor) -> Tensor:
        """transformers' forward pass in float32, weights dequantized on loading."""
        with torch.no_grad():
            return load_by_transformers(directory, torch.device("cpu"))(input_ids=tokens).logits


def _targets(targets: list[str], module: str) -> bool:
    """Whether one of a group's targets is this module by name."""
    patterns = [target.removeprefix("re:") for target in targets if target.startswith("re:")]
    return any(re.match(pattern, module) for pattern in patterns)


def _read(directory: Path, name: str) -> Tensor | None:
    index = directory / "model.safetensors.index.json"
    file = "model.safetensors"
    if index.is_file():
        file = json.loads(index.read_text(encoding="utf-8"))["weight_map"].get(name)
    if file is None:
        return None
    with safe_open(directory / file, "pt") as shard:
        return shard.get_tensor(name) if name in shard.keys() else None  # noqa: SIM118
