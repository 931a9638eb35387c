"""Copies of a state on a mapped file that has no name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from swquant import Recipe, quantize
from swquant.engine import kept
from swquant.engine.durable import allocate
from swquant.engine.kept import MAPPED_FROM, is_mapped, kept_copy
from swquant.phases.rounds import restore


def state(elements: int) -> list[dict[str, torch.Tensor]]:
    rng = torch.Generator().manual_seed(0)
    rows = elements // 8
    return [
        {"a": torch.randn(rows, 7, generator=rng), "step": torch.tensor(3.0)},
        {},
        {"b": torch.randn(rows, generator=rng, dtype=torch.float64).requires_grad_(), "c": torch.arange(5) % 3 == 0},
    ]


@pytest.mark.parametrize("elements", [64, MAPPED_FROM // 4 + 1024])
def test_a_copy_is_equal_and_lives_on_its_own(tmp_path: Path, elements: int) -> None:
    thetas = state(elements)
    assert is_mapped(thetas) == (elements > 64)
    copied = kept_copy(tmp_path / "kept-0.state", thetas)
    assert list(tmp_path.iterdir()) == []
    with torch.no_grad():
        thetas[0]["a"] += 1
    expected = state(elements)
    for known, theta in zip(expected, copied, strict=True):
        assert known.keys() == theta.keys()
        for name, value in theta.items():
            assert torch.equal(value, known[name])
            assert value.dtype == known[name].dtype
            assert not value.requires_grad
    restore(thetas, copied)
    assert torch.equal(thetas[0]["a"], expected[0]["a"])
    restore(copied, state(elements)[:1] + thetas[1:])


def test_a_disk_that_is_full_is_an_error_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        kept_copy(tmp_path / "kept-0.state", state(MAPPED_FROM // 4 + 1024))
    assert list(tmp_path.iterdir()) == []


def test_a_run_ends_in_the_same_bits_wherever_its_best_state_lay(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(
        bits=2,
        group_size=32,
        method="block_ap(epochs=2) + end_to_end(epochs=2, batch_size=2, weights=True)",
        calibration=str(text),
        samples=8,
        seq_len=32,
        evaluation_samples=0,
        device="cpu",
    )
    quantize(recipe, llama, tmp_path / "memory")
    named: list[str] = []

    def noting(path: Path, size: int) -> None:
        named.append(path.name)
        allocate(path, size)

    monkeypatch.setattr(kept, "MAPPED_FROM", 0)
    monkeypatch.setattr(kept, "allocate", noting)
    quantize(recipe, llama, tmp_path / "disk")
    assert named == 3 * ["kept-0.state"], "for each of two blocks, and for the whole model"
    memory, disk = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("memory", "disk"))
    assert memory == disk
