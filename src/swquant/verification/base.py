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

    package: ClassVar[str]
    """The distribution whose code reads weights, e.g. ``compressed-tensors``."""

    runtime: ClassVar[tuple[str, ...]]
    """The distributions that :meth:`logits` needs; empty where it is not written."""

    def weight(self, directory: Path, module: str, spec: QuantSpec) -> Tensor:
        """A quantized weight as the package reads it from the files, ``float32 [out, in]``."""
        ...

    def tolerance(self, spec: QuantSpec) -> float:
        """How far such a weight may be from ours, over the largest step of the grid; 0 is bit for bit."""
        ...

    def logits(self, directory: Path, tokens: Tensor) -> Tensor:
        """Next-token logits ``float32 [samples, tokens, vocabulary]`` as the runtime computes them."""
        ...
