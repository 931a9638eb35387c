"""What methods know of a block that a test has written out itself: the pairs are declared, not found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from swquant.families.base import Family, NormLinears
from swquant.learnables.base import BlockFacts, ChannelRange


def facts_of(
    family: Family,
    heads: int = 1,
    key_value_heads: int = 1,
    ranges: Callable[[Sequence[str]], Mapping[str, ChannelRange]] = lambda linears: {},
) -> BlockFacts:
    """The facts of a block that has the linears and the equivalences of ``family``.

    Linears after one norm read one tensor, every other one reads its own.
    """
    together = {
        name: pair.linears for pair in family.equivalences if isinstance(pair, NormLinears) for name in pair.linears
    }
    inputs = dict.fromkeys(together.get(name, (name,)) for name in family.linears)
    return BlockFacts(tuple(inputs), lambda: family.equivalences, heads, key_value_heads, ranges)
