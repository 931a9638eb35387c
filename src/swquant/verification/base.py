"""What an independent reader is: other people's code that opens what a format has written."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Protocol

from torch import Tensor

from swquant.quant.spec import QuantSpec


class Reader(Protocol):
    """A package that reads one of our formats; its file in this folder has the format's name.

    Its package may be missing; ``importlib`` tells, and nothing is then called.
    """

    package: ClassVar[str | None]
    """The distribution whose code reads weights, e.g. ``compressed-tensors``; ``None`` where none does it alone."""

    runtime: ClassVar[tuple[str, ...]]
    """The distributions that :meth:`logits` needs."""

    def weight(self, directory: Path, module: str, spec: QuantSpec) -> Tensor | None:
        """A quantized weight as the package reads it from the files, ``float32 [out, in]``.

        ``None`` where the installed release does not know such weights.
        """
        ...

    def tolerance(self, spec: QuantSpec) -> float:
        """How far such a weight may be from ours; 0 is bit for bit.

        In units of the grid's largest step, or where minima make weights larger than ``2**bits`` of these, of the
        largest weight over ``2**bits``.
        """
        ...

    def logits(self, directory: Path, tokens: Tensor) -> Tensor:
        """Next-token logits ``float32 [samples, tokens, vocabulary]`` as the runtime computes them."""
        ...
