from __future__ import annotations

from pathlib import Path

import torch

from outlines import outline_of
from swquant.formats.dequantized import Dequantized
from swquant.quant.spec import QuantSpec


def check(spec: QuantSpec, dtype: torch.dtype) -> tuple[str, ...]:
    return Dequantized().check(outline_of(Path(), {}, spec, dtype, {}, ()))


def test_the_notes_tell_whether_weights_are_rounded() -> None:
    exact = " ".join(check(QuantSpec(2, 64, True), torch.bfloat16))
    assert "bfloat16 holds the quantized weights exactly" in exact
    rounded = " ".join(check(QuantSpec(2, 64, False), torch.bfloat16))
    assert "by at most 0.0039 of itself" in rounded
