"""The start of both streams: what reaches the first block, and what each block is called with beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from swquant.checkpoint.rotation import Source
from swquant.engine.skeleton import Recorder, Skeleton


@torch.no_grad()
def capture(
    skeleton: Skeleton,
    checkpoint: Source,
    tokens: Tensor,
    write: Callable[[int, Tensor], None] | None = None,
    write_stored: Callable[[int, Tensor], None] | None = None,
) -> list[dict[str, Any]]:
    """Run the model without its blocks, sample by sample.

    Only those rows of the embedding are read whose tokens occur. Every block's arguments (masks, rotary embeddings)
    are those of a single sample of full length and hold for a batch of any size.

    Args:
        skeleton: The model's code.
        checkpoint: Its weights.
        tokens: ``int64 [samples, tokens]``.
        write: Called with each sample's index and its hidden states ``[tokens, dim]`` in front of block 0.
        write_stored: Likewise, with the hidden states that the embedding gives in the dtype in which it is stored.

    Returns:
        Keyword arguments for each block.
    """
    used, compact = tokens.unique(return_inverse=True)
    model = skeleton.model
    recorders: Any = model.get_submodule(skeleton.family.blocks)
    name = f"{skeleton.family.embedding}.weight"
    rows = checkpoint.rows(name, used)
    model.set_submodule(skeleton.family.embedding, nn.Embedding.from_pretrained(rows.float(), freeze=True))
    body = model.get_submodule("model")
    skipped = {name, f"{skeleton.family.head}.weight"}
    params = {
        name.removeprefix("model."): checkpoint.read(name).float()
        for name, value in model.named_parameters()
        if value.is_meta and name not in skipped
    }
    kept = {name.removeprefix("model."): rows.to(checkpoint.tensors[name].dtype).float()}

    def hidden(index: int, changed: Mapping[str, Tensor]) -> Tensor:
        arguments = {"input_ids": compact[index : index + 1], "use_cache": False}
        torch.func.functional_call(body, {**params, **changed}, kwargs=arguments, strict=False)
        first: Recorder = recorders[0]
        assert first.hidden is not None
        return first.hidden[0]

    for index in range(tokens.shape[0]):
        exact = hidden(index, {})
        if write is not None:
            write(index, exact)
        if write_stored is not None:
            write_stored(index, hidden(index, kept))
    return [dict(recorder.kwargs) for recorder in recorders]


def to_device(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor in it, through tuples, lists and mappings, on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(item, device) for item in value)
    return value
