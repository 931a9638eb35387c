from __future__ import annotations

import torch

from swquant.formats.dequantized import Dequantized
from swquant.quant.spec import QuantSpec


def test_the_notes_tell_whether_weights_are_rounded() -> None:
    exact = " ".join(Dequantized().check(QuantSpec(2, 64, True), torch.bfloat16))
    assert "bfloat16 holds the quantized weights exactly" in exact
    rounded = " ".join(Dequantized().check(QuantSpec(2, 64, False), torch.bfloat16))
    assert "by at most 0.0039 of itself" in rounded


def test_readers_need_no_configuration() -> None:
    assert Dequantized().config(QuantSpec(2, 64, True), ["lm_head"]) is None
