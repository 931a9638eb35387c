"""A run in TensorBoard's files."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swquant.errors import SwquantError
from swquant.observers.scalars import Scalars


@contextmanager
def tensorboard(directory: Path) -> Generator[Scalars]:
    """Curves as event files in ``directory``.

    Raises:
        SwquantError: TensorBoard is not installed, or ``directory`` cannot be written.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise SwquantError("--tensorboard needs TensorBoard: pip install 'swquant[tensorboard]'") from error
    try:
        writer: Any = SummaryWriter(str(directory))
    except OSError as error:
        raise SwquantError(
            f"{directory} cannot be written ({error.strerror}); give --tensorboard another directory"
        ) from error

    def note(name: str, value: float, place: int) -> None:
        writer.add_scalar(name, value, place)
        writer.flush()

    try:
        yield Scalars(note)
    finally:
        writer.close()
