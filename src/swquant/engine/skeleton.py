"""The model's code without its weights: blocks that run on parameters handed to them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM

from swquant.checkpoint.rotation import Plain, Source
from swquant.errors import SwquantError, reason_of
from swquant.families import Family, family_for
from swquant.phases.portion import ran_out
from swquant.quant.deferred import in_float
from swquant.quant.spec import QuantSpec


@dataclass(frozen=True)
class Block:
    """One decoder block: code, and the names of its parameters on disk."""

    prefix: str
    module: nn.Module

    def load(self, checkpoint: Source) -> dict[str, Tensor]:
        """Read the block's parameters by their names inside the block."""
        return {name: checkpoint.read(f"{self.prefix}.{name}") for name, _ in self.module.named_parameters()}

    def stored_dtypes(self, checkpoint: Source) -> dict[str, torch.dtype]:
        """The dtype of each parameter in an output that does not quantize it."""
        return {name: checkpoint.tensors[f"{self.prefix}.{name}"].dtype for name, _ in self.module.named_parameters()}

    def forward(self, params: Mapping[str, Tensor], hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """The block's output for ``hidden [samples, tokens, dim]``; a pure function of its arguments."""
        out = functional_call(self.module, dict(params), (hidden,), dict(kwargs))
        return out[0] if isinstance(out, tuple) else out


@dataclass(frozen=True)
class Skeleton:
    """A model's modules, their parameters on the ``meta`` device.

    Attributes:
        family: What is known about the architecture.
        model: The whole model, :class:`Recorder` in the place of its blocks.
        blocks: The blocks.
        hidden_size: Channels of the streams.
        heads: Query heads.
        key_value_heads: Key and value heads.
    """

    family: Family
    model: Any
    blocks: tuple[Block, ...]
    hidden_size: int
    heads: int
    key_value_heads: int

    def block(self, index: int) -> Block:
        """One block."""
        return self.blocks[index]

    @property
    def tied(self) -> bool:
        """Whether the head is the token embedding."""
        return bool(self.model.config.tie_word_embeddings)

    @property
    def head_weight(self) -> str:
        """Name on disk of the output projection's weight."""
        return f"{self.family.embedding if self.tied else self.family.head}.weight"


class Recorder(nn.Module):
    """Stands in for a block: notes what it is called with and passes the hidden states on."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "replaced", block)
        self.hidden: Tensor | None = None
        self.kwargs: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        """What the model asks its blocks for, such as ``attention_type``, is the block's own."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["replaced"], name)

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        """Note and pass on."""
        self.hidden, self.kwargs = hidden, kwargs
        return hidden


def with_full_names(checkpoint: Plain) -> Plain:
    """``checkpoint`` as the model with its head names it; a base model's save lacks ``model.`` and names another class.

    Raises:
        SwquantError: If the architecture is unknown.
    """
    family = family_for(checkpoint.config)
    full = checkpoint.prefixed("model.", f"{family.embedding}.weight", f"{family.head}.")
    if checkpoint.config["architectures"][0] in family.architectures:
        return full
    return replace(full, config={**checkpoint.config, "architectures": [family.architectures[0]]})


def build_skeleton(checkpoint: Source) -> Skeleton:
    """The skeleton for ``checkpoint``; no weight is read.

    Raises:
        SwquantError: If the architecture is unknown, or a parameter is missing on disk or has another shape there.
    """
    family = family_for(checkpoint.config)
    try:
        config = AutoConfig.from_pretrained(checkpoint.directory, local_files_only=True, trust_remote_code=False)
        layers = config.num_hidden_layers
        if not 0 < layers <= len(checkpoint.tensors):
            raise ValueError(f"num_hidden_layers is {layers}, and the files hold {len(checkpoint.tensors)} tensors")
        config.tie_word_embeddings = bool(checkpoint.config.get("tie_word_embeddings", config.tie_word_embeddings))
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
            )
    except Exception as error:  # transformers raises whatever the file makes it run into
        reason = reason_of(error)
        raise SwquantError(f"{checkpoint.directory / 'config.json'} does not describe a model: {reason}") from error
    model.eval().requires_grad_(False)
    _check_parameters(model, checkpoint, tied=bool(config.tie_word_embeddings), head=family.head)
    _check_tail(model, family, checkpoint)
    modules = list(model.get_submodule(family.blocks))
    model.set_submodule(family.blocks, nn.ModuleList(Recorder(module) for module in modules))
    rebuild_buffers(model, config)
    blocks = tuple(Block(f"{family.blocks}.{index}", module) for index, module in enumerate(modules))
    heads = config.num_attention_heads
    return Skeleton(
        family, model, blocks, config.hidden_size, heads, getattr(config, "num_key_value_heads", None) or heads
    )


def check_widths(skeleton: Skeleton, spec: QuantSpec) -> None:
    """Refuse a spec whose groups do not divide the width of a linear.

    Raises:
        SwquantError: Naming the linear and its width.
    """
    for linear in skeleton.family.linears:
        weight = skeleton.blocks[0].module.get_submodule(linear).weight
        assert isinstance(weight, Tensor)
        spec.require_divides(linear, weight.shape[1])


@torch.no_grad()
def try_block(skeleton: Skeleton, checkpoint: Source, hidden: Tensor, kwargs: Mapping[str, Any]) -> None:
    """Run the first block once, because some settings are found to be wrong by running alone.

    Args:
        skeleton: The model's code.
        checkpoint: Its weights.
        hidden: ``[1, tokens, dim]`` in front of the block.
        kwargs: What it is called with.

    Raises:
        SwquantError: It does not run.
    """
    block = skeleton.blocks[0]
    params = in_float(block.load(checkpoint))
    try:
        block.forward(params, hidden, kwargs)
    except Exception as error:  # torch and transformers raise whatever the settings make them run into
        if ran_out(error):
            raise
        reason = reason_of(error)
        raise SwquantError(
            f"{checkpoint.directory / 'config.json'} does not describe a model that runs: {reason}"
        ) from error


def _check_tail(model: nn.Module, family: Family, checkpoint: Source) -> None:
    for name in family.tail:
        parent, _, child = name.rpartition(".")
        if not isinstance(dict(model.get_submodule(parent).named_children()).get(child), nn.Module):
            raise SwquantError(
                f"{checkpoint.directory / 'config.json'} describes a model without {name}, which is not supported"
            )


def _check_parameters(model: nn.Module, checkpoint: Source, *, tied: bool, head: str) -> None:
    for name, parameter in model.named_parameters():
        if tied and name == f"{head}.weight":
            continue
        if not checkpoint.has(name):
            raise SwquantError(f"{checkpoint.directory} has no tensor {name!r}, which its config.json calls for")
        found = checkpoint.tensors[name].shape
        if tuple(parameter.shape) != found:
            raise SwquantError(
                f"{name} in {checkpoint.directory} has the shape {list(found)}, "
                f"config.json calls for {list(parameter.shape)}"
            )


def empty_model(values: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """transformers' model for the content of a ``config.json``, on ``meta`` but for the buffers that it tells.

    Raises:
        Exception: Whatever the content makes transformers run into.
    """
    given = copy.deepcopy({key: value for key, value in values.items() if key != "model_type"})
    config = AutoConfig.for_model(values["model_type"], **given)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    rebuild_buffers(model, config)
    return model


@torch.no_grad()
def whole_model(source: Plain) -> Any:
    """transformers' model with every weight of ``source`` in float32.

    Raises:
        SwquantError: It does not describe a model, or a tensor is missing.
    """
    full = with_full_names(source)
    try:
        model = empty_model(full.config, torch.float32)
    except Exception as error:  # transformers raises whatever the file makes it run into
        reason = reason_of(error)
        raise SwquantError(f"{source.directory / 'config.json'} does not describe a model: {reason}") from error
    names = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    read = {name: full.read(name) for name in full.tensors if name in names}
    state = {name: value.float() if value.is_floating_point() else value for name, value in read.items()}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    for name, value in model.named_parameters():
        if value.is_meta:
            raise SwquantError(f"{source.directory} has no tensor {name!r}, which its config.json calls for")
    return model


def rebuild_buffers(model: nn.Module, config: Any) -> None:
    """Make modules that hold buffers anew outside ``meta``: rotary embeddings compute theirs from the config."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            model.set_submodule(name, type(module)(config))
