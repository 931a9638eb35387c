from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swquant.quant.bits import pack, packed_words, unpack


def bit_stream(codes: list[int], bits: int) -> list[int]:
    """The dense stream as one Python integer, cut in 32-bit words: an independent definition of the layout."""
    whole = sum(code << (index * bits) for index, code in enumerate(codes))
    return [(whole >> (32 * word)) & 0xFFFFFFFF for word in range(packed_words(len(codes), bits))]


@settings(deadline=None)
@given(st.sampled_from([2, 3, 4, 8]), st.integers(0, 200), st.integers(0, 2**32 - 1))
def test_pack_is_the_dense_stream_and_unpack_undoes_it(bits: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, count).tolist()
    tensor = torch.tensor(codes, dtype=torch.uint8)
    words = pack(tensor, bits)
    assert words.dtype == torch.int32
    assert [word & 0xFFFFFFFF for word in words.tolist()] == bit_stream(codes, bits)
    assert torch.equal(unpack(words, bits, count), tensor)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_leading_dimensions_are_kept(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, 70), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    words = pack(codes, bits)
    assert words.shape == (3, 5, packed_words(70, bits))
    assert torch.equal(words[1, 2], pack(codes[1, 2], bits))
    assert torch.equal(unpack(words, bits, 70), codes)


def test_three_bit_codes_take_three_words_for_thirty_two() -> None:
    assert packed_words(32, 3) == 3
    assert packed_words(33, 3) == 4


@pytest.mark.parametrize("bits", [2, 4, 8, 3])
def test_one_word_of_a_wider_tensor(bits: int) -> None:
    codes = torch.randint(1 << bits, (5, 32 // bits), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    words = pack(codes, bits)
    wide = torch.stack((words, words + 1), -1)[..., 0]
    assert wide.stride(-1) != 1
    assert torch.equal(unpack(wide, bits, codes.shape[1]), codes)
