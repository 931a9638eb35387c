"""What a block puts into a mapping that it was given, and whether anybody looks it up."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import MutableMapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swquant.model.flow import trace


class Sharing(nn.Module):
    """A block that keeps its keys for others, or takes those of others, by ``how``."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.k_proj = how, nn.Linear(8, 8)

    def forward(self, hidden: Tensor, shared: MutableMapping[str, Any]) -> Tensor:
        if self.how == "store":
            shared["keys"] = self.k_proj(hidden)
        if self.how == "subscript":
            return hidden + shared["keys"]
        if self.how == "get":
            return hidden + self.k_proj(shared.get("keys", hidden))
        if self.how == "loop":
            return hidden + sum(value for value in shared.values())
        return hidden + self.k_proj(hidden)


@pytest.mark.parametrize("kind", [dict, OrderedDict])
@pytest.mark.parametrize("positional", [False, True])
@pytest.mark.parametrize(
    ("how", "writes", "reads"),
    [
        ("neither", False, False),
        ("store", True, False),
        ("subscript", False, True),
        ("get", False, True),
        ("loop", False, True),
    ],
)
def test_what_is_put_into_a_mapping_and_what_is_looked_up(
    how: str, writes: bool, reads: bool, kind: type, positional: bool
) -> None:
    shared, hidden = kind(), torch.zeros(1, 4, 8)
    args, kwargs = ((hidden, shared), {}) if positional else ((hidden,), {"shared": shared})
    flow = trace(Sharing(how), args, kwargs)
    assert (flow.writes, flow.reads) == (writes, reads)
    assert not shared
