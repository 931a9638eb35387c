"""What errors of other code become in sentences of ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swquant import Recipe, SwquantError, quantize
from swquant.errors import reason_of


@given(st.text(max_size=400), st.integers(1, 300))
def test_a_reason_is_a_line_of_printable_characters(text: str, longest: int) -> None:
    reason = reason_of(ValueError(text), longest)
    assert reason.isprintable()
    assert 0 < len(reason) <= max(longest, len("ValueError"))


def test_a_reason_says_what_the_error_says() -> None:
    assert reason_of(ValueError("one\n  two\0")) == "one two?"
    assert reason_of(MemoryError()) == "MemoryError"


def test_control_characters_of_a_config_reach_no_terminal(
    make_model: Callable[..., Path], tmp_path: Path, text: Path
) -> None:
    model = make_model(fresh=True)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "dtype": "a\0\x1bb"}))
    with pytest.raises(SwquantError, match="does not describe a model: ") as caught:
        quantize(Recipe(method="rtn", calibration=str(text), device="cpu"), model, tmp_path / "out")
    assert str(caught.value).isprintable()
