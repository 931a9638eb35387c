from __future__ import annotations

import pytest

from swquant.errors import SwquantError
from swquant.quant.spec import QuantSpec
from swquant.recipe import Recipe


def test_codes_and_groups() -> None:
    spec = QuantSpec(3, 64, True)
    assert (spec.max_code, spec.mid_code, spec.groups(256), spec.group_width(256)) == (7, 4, 4, 64)
    assert QuantSpec(3, None, False).groups(100) == 1
    assert (spec.label, QuantSpec(4, None, True).label) == ("w3g64", "w4")


@pytest.mark.parametrize("bits", [0, 1, 5, 16])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(SwquantError, match=f"bits is {bits}, expected one of 2, 3, 4, 8"):
        QuantSpec(bits, 64, True)


def test_group_size_out_of_range() -> None:
    with pytest.raises(SwquantError, match="group size is 48, expected 32, 64, 128"):
        QuantSpec(2, 48, True)


def test_a_width_that_the_group_size_does_not_divide_is_named_with_what_fits() -> None:
    with pytest.raises(SwquantError, match=r"mlp\.up_proj has 96 inputs.*64 does not divide.*fit: 32, channel"):
        QuantSpec(2, 64, True).require_divides("mlp.up_proj", 96)
    QuantSpec(2, None, True).require_divides("mlp.up_proj", 97)


def test_a_recipe_in_python_takes_the_word_that_files_have() -> None:
    assert Recipe(group_size="channel").spec == QuantSpec(2, None, True)  # pyright: ignore[reportArgumentType]
