"""Which Pythons, torches and transformers a wheel and an sdist install with: python tools/matrix.py --out matrix.md

The ranges are those of pyproject.toml. Installed and tried (a model quantized, read back and loaded) are: every Python
found here, by the newest torch and transformers in range; the oldest of both on the oldest Python found; the sdist
once. Every other combination is resolved by pip without installing, and the table says so. The table grows row by
row, so a run that was stopped leaves what it found, and --skip-done goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TRIED = """
import tempfile
from importlib import resources
from pathlib import Path
import swquant, torch, transformers
assets = resources.files("swquant") / "demo_assets"
with tempfile.TemporaryDirectory() as place:
    recipe = swquant.Recipe(method="rtn", calibration=str(assets / "calibration.txt"), samples=2, seq_len=64,
                            evaluation_samples=2, device="cpu")
    report = swquant.quantize(recipe, str(assets / "model"), Path(place) / "out")
    assert report.outputs[0].verification["weights"] == 42
    swquant.load(Path(place) / "out", device="cpu")(torch.tensor([[1, 2, 3]]))
print(torch.__version__, transformers.__version__)
"""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    python: str
    end: str
    package: str


def lower_ends() -> list[str]:
    """The least torch and transformers that are claimed, as pip takes them."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    least = dict(re.findall(r'"(torch|transformers)>=([\d.]+)', text))
    return [f"{name}=={version}.*" for name, version in least.items()]


def interpreters() -> dict[str, str]:
    """The interpreters of this machine, by version."""
    found: dict[str, str] = {}
    for version in PYTHONS:
        managed = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
        place = str(managed[-1]) if managed else shutil.which(f"python{version}")
        if place is not None and _runs(place):
            found[version] = place
    return found


def cases(found: dict[str, str]) -> Iterator[tuple[Case, bool]]:
    """Each case, and whether it is installed."""
    oldest = next(iter(found))
    for version in PYTHONS:
        yield Case(version, "newest", "wheel"), version in found
        yield Case(version, "oldest", "wheel"), version == oldest
    yield Case(list(found)[-1], "newest", "sdist"), True


def build(place: Path) -> dict[str, Path]:
    """The wheel and the sdist."""
    run(sys.executable, "-m", "build", "--outdir", place, ROOT)
    return {"wheel": next(place.glob("*.whl")), "sdist": next(place.glob("*.tar.gz"))}


def resolved(python: str, case: Case, package: Path) -> str:
    """What pip would install."""
    wanted = [str(package), *(lower_ends() if case.end == "oldest" else ())]
    report = package.parent / "resolved.json"
    only = ["--python-version", case.python, "--only-binary", ":all:", "--target", str(package.parent / "nowhere")]
    asked = ["install", "--dry-run", "--ignore-installed", "--quiet", "--report", report]
    run(python, "-m", "pip", *asked, *only, *wanted)
    chosen = {one["metadata"]["name"]: one["metadata"]["version"] for one in json.loads(report.read_text())["install"]}
    return f"{chosen['torch']} {chosen['transformers']}"


def installed(python: str, case: Case, package: Path, index: list[str]) -> str:
    """What was installed, once it has quantized a model."""
    with tempfile.TemporaryDirectory(prefix="swquant-matrix-") as place:
        environment = Path(place) / "environment"
        run(python, "-m", "venv", environment)
        own = environment / "bin" / "python"
        wanted = [str(package), *(lower_ends() if case.end == "oldest" else ())]
        run(own, "-m", "pip", "install", "--quiet", *index, *wanted)
        return run(own, "-W", "ignore", "-c", TRIED, cwd=place).strip().splitlines()[-1]


def run(*command: object, cwd: str | None = None) -> str:
    """The command's output; what it says where it fails is the error."""
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(list(map(str, command)), env=settings, cwd=cwd, capture_output=True, text=True, check=False)
    if ended.returncode:
        said = [line for line in ended.stderr.strip().splitlines() if not line.startswith("[notice]")]
        raise RuntimeError(said[-1] if said else f"exit code {ended.returncode}")
    return ended.stdout


def table(rows: list[dict[str, str]]) -> str:
    """The rows in Markdown."""
    head = "| Python | end of the ranges | package | torch | transformers | |\n|---|---|---|---|---|---|\n"
    keys = ("python", "end", "package", "torch", "transformers", "how")
    return head + "".join("| " + " | ".join(row[key] for key in keys) + " |\n" for row in rows)


def _runs(place: str) -> bool:
    return subprocess.run([place, "--version"], capture_output=True, check=False).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the table, in Markdown; beside it the same as JSON")
    parser.add_argument("--skip-done", action="store_true", help="go on with the table that is there")
    parser.add_argument("--resolve-only", action="store_true", help="install nothing")
    parser.add_argument("--index", action="append", default=[], help="another index of pip's for torch")
    given = parser.parse_args()
    rows_file = given.out.with_suffix(".json")
    rows = json.loads(rows_file.read_text()) if given.skip_done and rows_file.exists() else []
    found, index = interpreters(), [part for one in given.index for part in ("--extra-index-url", one)]
    with tempfile.TemporaryDirectory(prefix="swquant-built-") as place:
        built = build(Path(place))
        for case, real in cases(found):
            if any(Case(*(row[key] for key in ("python", "end", "package"))) == case for row in rows):
                continue
            python, real = found.get(case.python, sys.executable), real and not given.resolve_only
            try:
                made = (
                    installed(python, case, built[case.package], index)
                    if real
                    else resolved(python, case, built[case.package])
                )
                torch, transformers = made.split()
                how = "installed, quantizes" if real else "resolved only"
            except RuntimeError as error:
                torch, transformers, how = "", "", f"fails: {str(error)[:200]}"
            rows.append({**asdict(case), "torch": torch, "transformers": transformers, "how": how})
            print(rows[-1], flush=True)
            rows_file.write_text(json.dumps(rows, indent=1) + "\n")
            given.out.write_text(table(rows))
    sys.exit(any(row["how"].startswith("fails") for row in rows))


if __name__ == "__main__":
    main()
