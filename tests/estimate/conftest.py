"""Checkpoints that are all header: their weights are holes in a sparse file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

Hollow = Callable[[LlamaConfig], Path]


@pytest.fixture(scope="session")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> Hollow:
    """A function from a configuration to a model directory whose bfloat16 weights take no room."""

    def make(config: LlamaConfig) -> Path:
        folder = tmp_path_factory.mktemp("hollow")
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        where: dict[str, str] = {}
        for index, part in enumerate(_shards({name: list(value.shape) for name, value in model.named_parameters()})):
            _write(folder / f"model-{index:05d}.safetensors", part)
            where |= dict.fromkeys(part, f"model-{index:05d}.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        (folder / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}))
        return folder

    return make


def _shards(shapes: dict[str, list[int]]) -> list[dict[str, list[int]]]:
    """Shapes in groups of some 4 GB, for no more than a file of these is mapped at a time."""
    groups: list[dict[str, list[int]]] = [{}]
    for name, shape in shapes.items():
        if sum(2 * math.prod(one) for one in groups[-1].values()) > 4e9:
            groups.append({})
        groups[-1][name] = shape
    return groups


def _write(path: Path, shapes: dict[str, list[int]]) -> None:
    header, end = dict[str, object](), 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)
