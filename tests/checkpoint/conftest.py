from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG = {"model_type": "llama", "hidden_size": 4}
Make = Callable[..., Path]


@pytest.fixture
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(16, 4, generator=generator).bfloat16(),
        "model.norm.weight": torch.randn(4, generator=generator),
        "model.positions": torch.arange(6),
        "model.scale": torch.tensor(2.0),
    }


@pytest.fixture
def lay_out(tmp_path: Path) -> Make:
    """Lay out a model directory from its shards: one is ``model.safetensors``, several get an index."""

    def make(*shards: Mapping[str, Tensor], config: object = CONFIG, name: str = "model") -> Path:
        directory = tmp_path / name
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(config))
        if len(shards) == 1:
            save_file(dict(shards[0]), directory / "model.safetensors")
            return directory
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            save_file(dict(shard), directory / file)
            weight_map.update(dict.fromkeys(shard, file))
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return directory

    return make
