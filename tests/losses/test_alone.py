"""The losses beside torch and what torch requires, and nothing else: not even NumPy."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import swquant
from swquant import sliced_wasserstein_loss

SOURCE = Path(swquant.__file__).parents[1]
MOST_SECONDS = 0.5
CODE = """
import time, warnings, torch
start = time.process_time()
from swquant.losses import SlicedWassersteinLoss, parse_loss, sliced_wasserstein_loss
took = time.process_time() - start
torch.manual_seed(0)
torch.set_num_threads(1)
pred, target = torch.randn(2, 3, 20, 8)
pred.requires_grad_()
loss = parse_loss("0.9*mse + 0.1*sliced_wasserstein(power=2)")
sliced_wasserstein_loss(pred, target, generator=torch.Generator().manual_seed(1)).backward()
torch.save((took, str(loss), pred.detach(), target, pred.grad), PLACE)
try:
    import numpy
except ModuleNotFoundError:
    print("no numpy")
"""


def required(name: str, seen: dict[str, importlib.metadata.Distribution]) -> None:
    """Add a package and all that it requires, extras left out, to ``seen``."""
    if name.lower() in seen:
        return
    try:
        seen[name.lower()] = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:  # of another platform
        return
    for line in seen[name.lower()].requires or ():
        if "extra ==" not in line:
            required(re.match(r"[\w.-]+", line)[0], seen)


@pytest.fixture(scope="module")
def torch_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to import from that has torch and its requirements."""
    place, found = tmp_path_factory.mktemp("alone"), {}
    required("torch", found)
    for distribution in found.values():
        for file in distribution.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (place / top).exists():
                (place / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    assert (place / "torch").exists()
    return place


def run(place: Path, code: str) -> str:
    """Run ``code`` where nothing but our source, ``place`` and the standard library can be imported."""
    settings = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (SOURCE, place))), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-S", "-W", "ignore", "-c", code]
    finished = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_losses_need_torch_and_nothing_else_and_are_there_at_once(torch_alone: Path, tmp_path: Path) -> None:
    said = run(torch_alone, f"import swquant\nPLACE = {str(tmp_path / 'values.pt')!r}\n{CODE}")
    assert said == "no numpy\n"
    took, expression, pred, target, grad = torch.load(tmp_path / "values.pt")
    assert took < MOST_SECONDS
    assert expression == "0.9*mse + 0.1*sliced_wasserstein(power=2)"
    sliced_wasserstein_loss(pred.requires_grad_(), target, generator=torch.Generator().manual_seed(1)).backward()
    torch.testing.assert_close(grad, pred.grad)


def test_what_needs_more_cannot_be_imported_there(torch_alone: Path) -> None:
    with pytest.raises(AssertionError, match="ModuleNotFoundError"):
        run(torch_alone, "from swquant import quantize")
