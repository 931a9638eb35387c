"""Every matrix of a block as an ``nn.Linear`` of its own: fused experts and transposed ``Conv1D`` layers taken apart.

transformers keeps the experts of a layer in one parameter ``[experts, out, in]`` (or ``[experts, in, out]``), and
GPT-2's layers transposed. Methods, hooks and formats work on linears; so the skeleton gets linears in their place that
compute the same. Only the skeleton changes: names and shapes on disk are :mod:`swquant.checkpoint.names`' business.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from swquant.quant.valueless import valueless


@dataclass(frozen=True)
class FusedExperts:
    """What transformers' interface for experts (``use_experts_implementation``) says of a module.

    Attributes:
        count: Experts.
        inputs: Names of the fused parameters that read the hidden states: ``gate_up_proj``, or ``up_proj`` without a
            gate.
        transposed: Parameters are ``[experts, in, out]``.
        concatenated: A fused gate-and-up projection is ``[gate; up]``; otherwise their rows alternate.
        bias: There are biases ``[experts, out]``, named as the parameters with ``_bias`` appended.
    """

    count: int
    inputs: str
    transposed: bool
    concatenated: bool
    bias: bool


def fused_experts(module: nn.Module) -> FusedExperts | None:
    """What is known of ``module`` if it holds fused experts behind transformers' interface; ``None`` otherwise.

    Llama 4's have another interface, :class:`RoutedExperts`.
    """
    facts: Any = module
    if type(module).__name__ == "Llama4TextExperts":
        return FusedExperts(facts.num_experts, "gate_up_proj", True, True, False)
    if not all(name in vars(module) for name in ("has_gate", "is_transposed", "is_concatenated", "has_bias")):
        return None
    name = "gate_up_proj" if facts.has_gate else "up_proj"
    own = dict(module.named_parameters(recurse=False))
    if name not in own or "down_proj" not in own or own[name].dim() != 3:
        return None
    return FusedExperts(own[name].shape[0], name, facts.is_transposed, facts.is_concatenated, facts.has_bias)


class Expert(nn.Module):
    """The linears of one expert: ``down_proj``, and ``gate_proj`` and ``up_proj``, ``gate_up_proj``, or ``up_proj``."""

    def __init__(self, fused: nn.Module, facts: FusedExperts, split: bool) -> None:
        super().__init__()
        own = dict(fused.named_parameters(recurse=False))
        into, outof = (_sizes(own[name], facts) for name in (facts.inputs, "down_proj"))
        names = ("gate_proj", "up_proj") if split else (facts.inputs,)
        for name in names:
            self.add_module(name, _linear((into[0] // len(names), into[1]), facts.bias))
        self.add_module("down_proj", _linear(outof, facts.bias))
        self.inputs = names

    def rows(self, x: Tensor) -> Tensor:
        """What the fused projection makes of ``x``."""
        parts = [self.get_submodule(name)(x) for name in self.inputs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def down(self, x: Tensor) -> Tensor:
        """The down projection."""
        return self.get_submodule("down_proj")(x)


class UnfusedExperts(nn.Module):
    """Experts one by one, each a module of linears named by its number; computes what the fused module computes.

    Args:
        fused: transformers' module; its activation, gate and norm are used, its parameters are not.
        split: The gate and the up projection are linears of their own, as their weights are on disk.
    """

    def __init__(self, fused: nn.Module, facts: FusedExperts, split: bool) -> None:
        super().__init__()
        object.__setattr__(self, "fused", fused)  # hidden from torch: its parameters do not exist
        self.gated = facts.inputs == "gate_up_proj"
        for index in range(facts.count):
            self.add_module(str(index), Expert(fused, facts, split))
        norm = dict(fused.named_children()).get("post_expert_norm")
        if norm is not None:
            self.add_module("post_expert_norm", norm)

    def __getattr__(self, name: str) -> Any:
        """What the model asks of its experts, such as a dtype, is the fused module's; its values do not exist."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["fused"], name)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Each token through the experts chosen for it, weighted.

        Args:
            hidden_states: ``[tokens, dim]``.
            top_k_index: Experts chosen for each token, ``[tokens, k]``; a number beyond the experts is none.
            top_k_weights: Their weights, ``[tokens, k]``.
        """
        fused: Any = self.__dict__["fused"]
        out = torch.zeros_like(hidden_states)
        for index, expert in self._hit(top_k_index):
            tokens, place = self._tokens(top_k_index, index)
            middle = expert.rows(hidden_states[tokens])
            found = expert.down(fused._apply_gate(middle) if self.gated else fused.act_fn(middle))
            norm = self._modules.get("post_expert_norm")
            found = found if norm is None else norm(found)
            out = out.index_add(0, tokens, (found * top_k_weights[tokens, place, None]).to(out.dtype))
        return out

    def _hit(self, chosen: Tensor) -> Iterator[tuple[int, Expert]]:
        """Experts that a token was sent to; all of them where tensors have no values."""
        hit = None if _valueless(chosen) else set(chosen.unique().tolist())
        for name, module in self.named_children():
            if isinstance(module, Expert) and (hit is None or int(name) in hit):
                yield int(name), module

    def _tokens(self, chosen: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Tokens sent to an expert, and at which of their ``k`` places; an equal share where tensors have no values."""
        if _valueless(chosen):
            share = torch.zeros(max(1, chosen.numel() // len(self._modules)), dtype=torch.long, device=chosen.device)
            return share, share
        tokens, place = torch.where(chosen == index)
        return tokens, place


def _valueless(tensor: Tensor) -> bool:
    return tensor.is_meta or valueless(tensor)


class RoutedExperts(nn.Module):
    """Llama 4's experts one by one: every expert gets a copy of all tokens, scaled by how much it is to see of each.

    Args:
        fused: transformers' module; its activation is used, its parameters are not.
    """

    def __init__(self, fused: nn.Module, facts: FusedExperts, split: bool) -> None:
        super().__init__()
        object.__setattr__(self, "fused", fused)
        for index in range(facts.count):
            self.add_module(str(index), Expert(fused, facts, split))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[experts * tokens, dim]``, all tokens of one expert after those of the other."""
        fused: Any = self.__dict__["fused"]
        parts = hidden_states.chunk(len(self._modules))
        out: list[Tensor] = []
        for part, expert in zip(parts, self.children(), strict=True):
            assert isinstance(expert, Expert)
            gate, up = expert.rows(part).chunk(2, -1)
            out.append(expert.down(up * fused.act_fn(gate)))
        return torch.cat(out)


def unfused(fused: nn.Module, facts: FusedExperts, split: bool) -> nn.Module:
    """The experts of ``fused`` one by one."""
    kind = RoutedExperts if type(fused).__name__ == "Llama4TextExperts" else UnfusedExperts
    return kind(fused, facts, split)


def linear_of(conv: Conv1D) -> nn.Linear:
    """A linear that computes what transformers' ``Conv1D`` does, whose weight is ``[in, out]``."""
    rows, columns = conv.weight.shape
    return _linear((columns, rows), True)


def _linear(shape: tuple[int, int], bias: bool) -> nn.Linear:
    return nn.Linear(shape[1], shape[0], bias=bias, device="meta").requires_grad_(False)


def _sizes(fused: Tensor, facts: FusedExperts) -> tuple[int, int]:
    """``(out, in)`` of one expert's matrix."""
    rows, columns = fused.shape[1:]
    return (columns, rows) if facts.transposed else (rows, columns)
