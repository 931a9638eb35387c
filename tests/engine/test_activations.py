"""What is kept of a block's passes: the same codes to the bit with any room, and fewer products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swquant import Recipe, quantize
from swquant.engine import hidden_states
from swquant.engine.activations import Activations, Replay, Room, same_values
from swquant.estimate.budget import Budget
from swquant.quant import deferred

NONE, LITTLE, MUCH = 0, 30_000, 1 << 30
SETTINGS = {"qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}}


def products_and_files(
    room: int, model: Path, out: Path, text: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, dict[str, bytes]]:
    """Rows that were multiplied by a quantized model's weights, and what was written."""
    rows = 0
    multiply = deferred._linear  # pyright: ignore[reportPrivateUsage]

    def counted(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        nonlocal rows
        rows += x.shape[:-1].numel()
        return multiply(x, weight, bias)

    monkeypatch.setattr(deferred, "_linear", counted)
    monkeypatch.setattr(Budget, "spare", lambda *_: room)
    values = {"method": method, "bits": 2, "group_size": 32, "samples": 5, "seq_len": 24, "evaluation_samples": 2}
    quantize(Recipe.from_mapping({**values, "calibration": str(text), "device": "cpu"}), model, out)
    monkeypatch.setattr(deferred, "_linear", multiply)
    return rows, {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("family", "method", "saves"),
    [
        ("llama", "gptq", True),
        pytest.param("llama", "gptq(act_order=True)", True, marks=pytest.mark.slow),
        ("llama", "awq + gptq + block_ap(epochs=1)", True),
        pytest.param("gpt_neox", "gptq", True, marks=pytest.mark.slow),
        ("qwen3_moe", "gptq", True),
        ("llama", "gptq(target=0)", False),
    ],
)
def test_codes_do_not_depend_on_the_room(
    family: str, method: str, saves: bool, make_model: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(family, 2, torch.bfloat16, **SETTINGS.get(family, {}))
    monkeypatch.setattr(hidden_states, "FORWARD_BYTES", 2 * 24 * 64 * 4)
    found = [
        products_and_files(room, model, tmp_path / str(room), text, method, monkeypatch)
        for room in (NONE, LITTLE, MUCH)
    ]
    (most, codes), (some, little), (least, much) = found
    assert codes == little == much
    assert least < some < most if saves else least == some == most


def test_experts_alone_have_nothing_to_keep(make_model: Any, text: Path, tmp_path: Path) -> None:
    model = make_model("qwen3_moe", 2, torch.bfloat16, **SETTINGS["qwen3_moe"])
    values = {"method": "gptq", "bits": 2, "group_size": 32, "samples": 2, "seq_len": 24, "evaluation_samples": 0}
    recipe = Recipe.from_mapping({**values, "calibration": str(text), "device": "cpu"})
    report = quantize(recipe, model, tmp_path / "out", grids={"*.self_attn.*": None})
    assert len(report.blocks) == 2


def test_a_value_is_a_copy_and_counts_while_it_is_kept() -> None:
    room = Room(40)
    kept = Activations(room)
    value = torch.ones(6)
    kept.put("one", slice(0, 2), value)
    value.zero_()
    assert torch.equal(kept.get("one", slice(0, 2)), torch.ones(6))  # pyright: ignore[reportArgumentType]
    kept.put("two", slice(0, 2), torch.ones(6))  # 24 of 16 bytes that are left
    assert kept.get("two", slice(0, 2)) is None
    assert kept.get("one", slice(0, 1)) is None
    assert kept.pop(["one", "two"], slice(0, 2)) is None
    assert room.left == 16
    assert kept.pop(["one"], slice(0, 2)) is not None
    assert room.left == 40


def test_a_replayed_output_can_be_written_into() -> None:
    block = nn.Sequential(nn.Linear(3, 3, bias=False))
    with torch.no_grad(), Replay(Activations(Room(1000)), block, ["0"]) as replay:
        for batch in (slice(0, 1), slice(1, 2)):
            replay.batch = batch
            x = torch.full((1, 3), float(batch.stop))
            first = block(x).mul_(2)
            assert torch.equal(block(x).mul_(2), first)
    assert "forward" not in vars(block[0])


def test_values_are_told_apart_by_their_dtype_too() -> None:
    one = {"weight": torch.ones(2), "bias": torch.zeros(2)}
    assert same_values(one, {"weight": torch.ones(2), "bias": torch.ones(2)}, ["weight"])
    assert not same_values(one, {"weight": torch.full((2,), 1.5)}, ["weight"])
    assert not same_values(one, {"weight": torch.ones(2, dtype=torch.bfloat16)}, ["weight"])
