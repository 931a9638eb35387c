"""Where output goes: whether the place is free, and what its disk holds.

Nothing heavy is imported here, so that a command can refuse a place before it imports torch.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from swquant.errors import SwquantError

REPORT = "report.json"
"""What a finished output holds."""


def destination(out: Path) -> Path:
    """Where ``out`` leads, links followed: what is staged beside it is on the file system that it is published to."""
    return Path(os.path.realpath(out))


def require_unused(out: Path) -> None:
    """Refuse a place that is neither free nor an empty directory that another can take the place of.

    Raises:
        SwquantError: Naming what is there.
    """
    if not out.exists():
        if out.is_symlink():
            raise in_use(out, "it is a broken link")
        above = _nearest(out)
        if not above.is_dir():
            raise in_use(out, f"{above} is a file")
        return
    if not out.is_dir():
        raise in_use(out, "it is a file")
    if os.path.ismount(out):
        raise in_use(out, "it is a mount point, which no other directory can replace")
    if out.samefile(Path.cwd()):
        raise in_use(out, "it is the directory that you are in")
    first = min((path.name for path in out.iterdir()), default=None)
    if first is not None:
        raise in_use(out, f"it holds {first!r}")


def free_disk(path: Path) -> int:
    """Bytes that may still be written where ``path`` is or would be."""
    return shutil.disk_usage(_nearest(path)).free


def require_disk(path: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        path: Where it is to be written; need not exist yet.
        needed: Bytes.

    Raises:
        SwquantError: With the space needed and the space available.
    """
    free = free_disk(path)
    if free < needed:
        raise SwquantError(
            f"{path} needs {needed / 1e9:.2f} GB of disk and {free / 1e9:.2f} GB are available; "
            "free some space or choose another --out"
        )


def _nearest(path: Path) -> Path:
    """``path`` itself if it exists, or the nearest place above it that does."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def in_use(out: Path, why: str) -> SwquantError:
    """The refusal of a place, with what is there."""
    return SwquantError(f"the output directory {out} is in use: {why}; choose another --out, or empty it")
