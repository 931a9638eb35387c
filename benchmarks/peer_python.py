"""Interpreters that have another quantizer: given by a path, or made by pip when they are asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from swquant import SwquantError

REQUIRED: Mapping[str, tuple[str, ...]] = {
    "auto-round": ("auto-round==0.16.1", "transformers==5.23.0", "torch==2.13.0"),
    "gptqmodel": ("gptqmodel==7.6.0", "transformers==5.23.0", "torch==2.13.0"),
    "llm-compressor": ("llmcompressor==0.14.0.1", "torch==2.13.0"),
}
"""What each peer is installed by; from torch 2.14 on its ``clamp`` takes the gradient from codes at the grid's ends."""

MODULES: Mapping[str, str] = {"auto-round": "auto_round", "gptqmodel": "gptqmodel", "llm-compressor": "llmcompressor"}


def install_line(peer: str) -> str:
    """How an interpreter that has ``peer`` is made."""
    return f"python3 -m venv DIR && DIR/bin/pip install {' '.join(REQUIRED[peer])}"


def interpreter(name: str) -> str:
    """A path that holds from any directory, links unresolved; a bare name is looked up as the shell does."""
    return str(Path(name).absolute()) if os.sep in name else name


def require_peer(python: str | None, peer: str = "auto-round") -> str:
    """Check that ``python`` is an interpreter that has the peer, and return it.

    Raises:
        SwquantError: If it is none, or has not.
    """
    if python is None:
        raise SwquantError(f"nothing to run {peer} by: give an interpreter that has it, made by: {install_line(peer)}")
    search = f"import importlib.util as u, sys; sys.exit(u.find_spec({MODULES[peer]!r}) is None)"
    try:
        found = subprocess.run([python, "-c", search], capture_output=True, check=False).returncode == 0
    except OSError as error:
        raise SwquantError(
            f"{python} is no Python interpreter ({error.strerror}); make one by: {install_line(peer)}"
        ) from error
    if not found:
        raise SwquantError(f"{python} has no {peer}; make an interpreter that has it by: {install_line(peer)}")
    return python


def made(peer: str, folder: Path) -> str:
    """The interpreter of an environment in ``folder`` that has the peer; it is made where it is not there.

    Raises:
        SwquantError: pip does not install it.
    """
    place = folder / peer
    python = str(place / "bin" / "python")
    if not Path(python).exists():
        commands = ([sys.executable, "-m", "venv", str(place)], [python, "-m", "pip", "install", *REQUIRED[peer]])
        for command in commands:
            if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
                raise SwquantError(f"{peer} is not installed: {' '.join(command)} failed; its messages are above")
    return require_peer(python, peer)
