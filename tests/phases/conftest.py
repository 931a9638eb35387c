"""A LLaMA-like block with grouped queries, written out in float64, and the problem that it poses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from block_facts import facts_of
from swquant.families.llama import LLAMA
from swquant.phases.base import Problem
from swquant.seeds import generator

WIDTH, INNER, HEADS, KEY_HEADS, SAMPLES, TOKENS = 64, 96, 4, 2, 6, 24


@dataclass(frozen=True)
class TinyBlock:
    """Parameters and inputs ``[samples, tokens, width]`` whose channels differ in size and are correlated.

    ``reference`` is what the original model would put into the block.
    """

    params: dict[str, Tensor]
    inputs: Tensor
    reference: Tensor

    @staticmethod
    def run(params: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The output, and the input of each linear as ``[tokens, features]``."""
        seen: dict[str, Tensor] = {}

        def linear(name: str, values: Tensor) -> Tensor:
            seen[name] = values.flatten(0, 1)
            return F.linear(values, params[f"{name}.weight"])

        def heads(values: Tensor) -> Tensor:
            return values.view(*values.shape[:2], -1, WIDTH // HEADS).transpose(1, 2)

        h = F.rms_norm(x, (WIDTH,), params["input_layernorm.weight"])
        q, k, v = (heads(linear(f"self_attn.{name}_proj", h)) for name in "qkv")
        k, v = (value.repeat_interleave(HEADS // KEY_HEADS, dim=1) for value in (k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + linear("self_attn.o_proj", attended)
        h = F.rms_norm(x, (WIDTH,), params["post_attention_layernorm.weight"])
        product = F.silu(linear("mlp.gate_proj", h)) * linear("mlp.up_proj", h)
        return x + linear("mlp.down_proj", product), seen

    def problem(self) -> Problem:
        def watch(params: Mapping[str, Tensor], linears: list[str], visit: Callable[[str, Tensor], None]) -> None:
            for batch in self.inputs.split(4):
                seen = self.run(params, batch)[1]
                for name in linears:
                    visit(name, seen[name])

        def watch_both(
            params: Mapping[str, Tensor],
            originals: Mapping[str, Tensor],
            linears: list[str],
            visit: Callable[[str, Tensor, Tensor], None],
            settled: list[str],
        ) -> None:
            for batch, original in zip(self.inputs.split(4), self.reference.split(4), strict=True):
                seen, before = self.run(params, batch)[1], self.run(originals, original)[1]
                for name in linears:
                    visit(name, seen[name], before[name])

        target = self.run(self.params, self.inputs)[0]
        return Problem(
            forward=lambda params, x, samples: self.run(params, x)[0],
            facts=facts_of(LLAMA, HEADS, KEY_HEADS),
            inputs=self.inputs,
            target=target,
            augmented=None,
            loss=None,
            watch=watch,
            train=list(range(SAMPLES - 1)),
            validation=[SAMPLES - 1],
            rng=partial(generator, 0),
            device=torch.device("cpu"),
            step=lambda done, total: None,
            watch_both=watch_both,
        )


@pytest.fixture
def tiny_block() -> Callable[..., TinyBlock]:
    """A function from a seed, and the width of the MLP, to a block."""

    def make(seed: int, inner: int = INNER) -> TinyBlock:
        rng = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.double)  # noqa: E731
        narrow = WIDTH // HEADS * KEY_HEADS
        rows = {"q": WIDTH, "k": narrow, "v": narrow, "o": WIDTH}
        shapes = {f"self_attn.{name}_proj": (count, WIDTH) for name, count in rows.items()}
        shapes |= {"mlp.gate_proj": (inner, WIDTH), "mlp.up_proj": (inner, WIDTH), "mlp.down_proj": (WIDTH, inner)}
        params = {f"{name}.weight": draw(*shape) / math.sqrt(shape[1]) for name, shape in shapes.items()}
        params["input_layernorm.weight"] = draw(WIDTH).exp()
        params["post_attention_layernorm.weight"] = draw(WIDTH).exp()
        mix = torch.eye(WIDTH, dtype=torch.double) + 0.3 * draw(WIDTH, WIDTH)
        inputs = draw(SAMPLES, TOKENS, WIDTH) @ mix
        return TinyBlock(params, inputs, inputs + 0.2 * draw(SAMPLES, TOKENS, WIDTH))

    return make
