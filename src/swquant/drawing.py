"""Samples that a model writes itself: what drawing them needs, how long it takes, and the drawing."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from swquant.checkpoint.source import Source
from swquant.device import multiplies
from swquant.errors import OutOfMemoryError, SwquantError, reason_of
from swquant.model.layout import Layout
from swquant.model.skeleton import Skeleton
from swquant.model.whole import model_of
from swquant.phases.micro_batch import ran_out
from swquant.seeds import generator
from swquant.units import size

MOST_AT_ONCE = 64
"""Samples that are drawn together where memory allows for more."""

LOGITS_BYTES = 13
"""For each entry of a sample's logits beside themselves: probabilities, their sums, and what is compared with them."""

NO_KEYS = frozenset({"linear_attention", "conv", "mlp", "moe"})
"""Blocks without keys and values, as transformers' configurations name their kinds."""

HEAD_DIMS = ("head_dim", "global_head_dim", "qk_head_dim", "v_head_dim")
PASSES_OVER_CACHE = 3
"""At a token: what it holds is read once for attention, and read and written where it grows."""

CALLS = 1.5e-3
"""Seconds of a block's calls beside its products, at a token; measured with LLaMA on a CPU, 1 to 16 samples at once."""

TIMED = 3

_TRIED = 6
"""Tokens on which a model's cache is tried: more than a short convolution reaches over."""
_ROUNDING = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""By how much of the greatest logit answers with and without a cache may differ."""


@dataclass(frozen=True)
class Drawing:
    """How samples are drawn.

    Attributes:
        dtype: Of the weights and of the computation.
        at_once: Samples that are drawn together; a power of 2, so that a little more or less free memory changes
            nothing.
        weights: Bytes of the weights, and of one more of them on its way.
        sample: Bytes of a sample: its cache of keys and values when it is whole, and its logits.
        room: Bytes that there are for it.
        device: Where.
    """

    dtype: torch.dtype
    at_once: int
    weights: int
    sample: int
    room: int
    device: torch.device

    @property
    def needed(self) -> int:
        """Bytes in all."""
        return self.weights + self.at_once * self.sample

    @property
    def problem(self) -> str | None:
        """Why samples cannot be drawn, if so, and what to do."""
        if self.needed <= self.room:
            return None
        other = "--device cpu" if self.device.type != "cpu" else "a --device with more"
        return (
            f"drawing samples from the model holds all of it in {named(self.dtype)} with a cache, {size(self.needed)} "
            f"on {self.device}, and {size(max(self.room, 0))} are there: give --calibration bundled, a text file or a "
            f"dataset, or {other}"
        )


def named(dtype: torch.dtype) -> str:
    """A dtype as people write it."""
    return str(dtype).removeprefix("torch.")


def drawing_of(source: Source, skeleton: Skeleton, device: torch.device, room: int, shape: tuple[int, int]) -> Drawing:
    """How samples would be drawn, from shapes alone.

    An accelerator computes in the checkpoint's own dtype. A CPU does if it multiplies that, or if float32, which it
    multiplies faster by far, does not fit.

    Args:
        source: The model, as it is on disk.
        skeleton: Its code.
        device: Where to draw.
        room: Bytes that there are for it.
        shape: Samples, and tokens of each.
    """
    own = source.dtype
    if device.type != "cpu" or multiplies(device, own):
        return _drawing(source, skeleton, device, room, shape, own)
    wide = _drawing(source, skeleton, device, room, shape, torch.float32)
    return wide if wide.problem is None else _drawing(source, skeleton, device, room, shape, own)


def _drawing(
    source: Source,
    skeleton: Skeleton,
    device: torch.device,
    room: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Drawing:
    samples, tokens = shape
    sizes = [math.prod(stored.shape) for stored in source.tensors.values()]
    weights = (sum(sizes) + max(sizes)) * dtype.itemsize
    config = skeleton.text_config
    key_values = _cache_width(config) * (len(skeleton.blocks) + 1) + _cache_width(config, repeated=True)
    sample = tokens * key_values * dtype.itemsize + _head(skeleton)[0] * (dtype.itemsize + LOGITS_BYTES)
    most = 1 << (min(samples, MOST_AT_ONCE) - 1).bit_length()
    while most > 1 and weights + most * sample > room:
        most //= 2
    return Drawing(dtype, most, weights, sample, room, device)


def cache_bytes(skeleton: Skeleton, tokens: int) -> int:
    """Bytes of keys and values of so many tokens in 16 bits, as runtimes keep them, at most.

    Where the configuration names the kind of each block, those without attention have none, and those with a sliding
    window keep no more tokens than it is wide.
    """
    config = skeleton.text_config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(skeleton.blocks)
    window = getattr(config, "sliding_window", None) or tokens
    kept = sum(min(tokens, window) if "sliding" in kind else tokens for kind in kinds if kind not in NO_KEYS)
    return 2 * kept * _cache_width(config)


def _cache_width(config: Any, *, repeated: bool = False) -> int:
    """Values that a block's cache has for a token, at most: heads of keys and of values.

    Args:
        config: Of the model's text part.
        repeated: For each head of the queries, as attention has them for a moment.
    """
    heads = getattr(config, "num_attention_heads", 1)
    heads = heads if isinstance(heads, int) else max(heads)
    wide = [getattr(config, name, None) for name in HEAD_DIMS]
    width = max([value for value in wide if isinstance(value, int)], default=config.hidden_size // heads)
    few = getattr(config, "num_key_value_heads", None)
    return 2 * width * (heads if repeated or not isinstance(few, int) else few)


def _head(skeleton: Skeleton) -> tuple[int, int]:
    """Entries of the vocabulary, and channels."""
    rows, columns = skeleton.model.get_submodule(skeleton.head).weight.shape
    return rows, columns


@torch.no_grad()
def seconds_of(drawing: Drawing, skeleton: Skeleton, layout: Layout, shape: tuple[int, int]) -> float:
    """Of the drawing: a token through the linears of each kind of block, timed, and its way through the cache.

    Args:
        drawing: How.
        skeleton: The model's code.
        layout: Tells the kinds of blocks.
        shape: Samples, and tokens of each.
    """
    samples, tokens = shape
    matrices: Counter[tuple[int, int]] = Counter()
    for index, count in layout.kinds().items():
        for value in skeleton.block(index).module.state_dict().values():
            if value.dim() == 2:
                matrices[value.shape[0], value.shape[1]] += count
    matrices[_head(skeleton)] += 1
    token = sum(count * _product(drawing, rows, columns) for (rows, columns), count in matrices.items())
    # Keys and values are tensors of their own, half full in the mean; a copy reads and writes.
    width = drawing.at_once * (_cache_width(skeleton.text_config) // 2) * (tokens // 2)
    keys = torch.ones(width, dtype=drawing.dtype, device=drawing.device)
    token += len(skeleton.blocks) * (CALLS + PASSES_OVER_CACHE * _least(keys.clone, drawing.device))
    return token * (tokens - 1) * -(-samples // drawing.at_once)


def _product(drawing: Drawing, rows: int, columns: int) -> float:
    """Seconds of one linear on one token of each sample."""
    weight = torch.ones(rows, columns, dtype=drawing.dtype, device=drawing.device)
    inputs = torch.ones(drawing.at_once, columns, dtype=drawing.dtype, device=drawing.device)
    return _least(lambda: functional.linear(inputs, weight), drawing.device)


def _least(work: Callable[[], Any], device: torch.device) -> float:
    """The least of a few times; the first, in which libraries load, is among them."""
    spent: list[float] = []
    for _ in range(TIMED):
        began = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        spent.append(time.perf_counter() - began)
    return min(spent)


@torch.no_grad()
def draw_from_model(
    source: Source,
    drawing: Drawing,
    samples: int,
    seq_len: int,
    seed: int,
    note: Callable[[str], None],
) -> Tensor:
    """Samples that the model writes itself, at temperature 1 from its full distribution (LLM-QAT, arXiv 2305.17888).

    Each begins with the token that the model begins texts with, or a random one if it has none, and does not stop at
    the token that ends texts. Each has random numbers of its own, so how many are drawn at once changes a token only
    where rounding of the logits does. Where memory runs out all the same, half as many are drawn at once.

    Args:
        source: The model as it is on disk. This step holds all of it in memory.
        drawing: How.
        samples: How many.
        seq_len: Tokens of each.
        seed: Of the draws.
        note: Is told how far it is.

    Returns:
        ``int64 [samples, seq_len]``.

    Raises:
        SwquantError: The model's predictions are not finite in that dtype.
        OutOfMemoryError: Memory does not suffice for one sample.
    """
    model = model_of(source, drawing.dtype, drawing.device)
    cache = _cache(model, drawing)
    note(f"drawn in {named(drawing.dtype)}, {min(samples, drawing.at_once)} at once")
    drawn: list[Tensor] = []
    at_once, done = drawing.at_once, 0
    while done < samples:
        rows = range(done, min(done + at_once, samples))
        try:
            drawn.append(_draw(model, cache, rows, seq_len, seed, drawing.device).cpu())
        except Exception as error:
            if not ran_out(error):
                raise
            reason = reason_of(error)
            if len(rows) == 1:
                raise OutOfMemoryError(
                    f"memory ran out in drawing one sample from the model ({reason}): give --calibration bundled, a "
                    "text file or a dataset"
                ) from error
            at_once = len(rows) // 2
            note(f"memory ran out with {len(rows)} samples at once; goes on with {at_once}")
            continue
        done = rows.stop
        note(f"{done} of {samples} samples drawn")
    return torch.cat(drawn)


def _draw(model: Any, cache: str | None, rows: range, seq_len: int, seed: int, device: torch.device) -> Tensor:
    """Samples number ``rows``; a token is the first up to which the probabilities exceed the sample's next number."""
    config = model.config.get_text_config(decoder=True)
    draws = torch.stack([torch.rand(seq_len, generator=generator(seed, "self", row)) for row in rows])
    first = config.bos_token_id
    text = torch.empty(len(rows), seq_len, dtype=torch.long, device=device)
    text[:, 0] = first if isinstance(first, int) else (draws[:, 0] * config.vocab_size).long().to(device)
    draws, finite, past = draws.to(device), torch.ones((), dtype=torch.bool, device=device), None
    for at in range(1, seq_len):
        out = _answer(model, text[:, at - 1 : at] if cache else text[:, :at], cache, past)
        past = out[cache] if cache else None
        sums = out.logits[:, -1].softmax(-1, dtype=torch.float32).cumsum_(-1)
        finite &= sums[:, -1].isfinite().all()
        behind = sums <= draws[:, at, None] * sums[:, -1:]
        text[:, at] = behind.sum(-1).clamp_(max=sums.shape[1] - 1)
    if not finite:
        raise SwquantError(
            f"the model's predictions are NaN or infinite in {named(model.dtype)}: give --calibration bundled, a text "
            "file or a dataset"
        )
    return text


def _answer(model: Any, tokens: Tensor, cache: str | None = None, past: Any = None) -> Any:
    """The model's output for ``tokens`` after what ``past`` holds; logits of the last one, where it can."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    given = {cache: past} if cache and past is not None else {}
    return model(input_ids=tokens, use_cache=cache is not None, **given, **last)


def _cache(model: Any, drawing: Drawing) -> str | None:
    """The name by which a model hands out and takes back what it keeps of a text, if it then answers as to the whole.

    State-space models have another name than attention. A few keep nothing, or come to another answer with what they
    keep: these read the whole text anew for each token.
    """
    from transformers.generation.utils import ALL_CACHE_NAMES  # seconds, and models have imported it by now

    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    tokens = torch.arange(1, 1 + _TRIED, device=drawing.device)[None] % vocabulary
    whole: Tensor = _answer(model, tokens).logits[:, -1]
    if not whole.isfinite().all():
        return None  # there is nothing to compare, and drawing refuses it
    for name in ALL_CACHE_NAMES:
        past: Any = None
        logits = torch.full_like(whole, torch.nan)
        try:
            for token in tokens.split(1, 1):
                out = _answer(model, token, name, past)
                past, logits = out[name], out.logits[:, -1]
        except Exception as error:  # a name that the model does not know, or a cache that it cannot go on with
            if ran_out(error):
                raise
            continue
        off = float(whole.abs().max()) * _ROUNDING[drawing.dtype]
        if past is not None and torch.allclose(logits, whole, rtol=0, atol=off):
            return name
    return None


def told(drawing: Drawing) -> Mapping[str, Any]:
    """What an estimate says of it."""
    return {"bytes": drawing.needed, "dtype": named(drawing.dtype), "at_once": drawing.at_once}
