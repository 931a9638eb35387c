"""Mutation testing: faults put into quant/, phases/, losses/ and formats/, one at a time, which tests have to find.

    python tools/mutants.py --sample 300 --seed 0 --out mutants.jsonl
    python tools/mutants.py --show mutants.jsonl

A mutant is one change of one node: an operator for another, a number by one, a comparison's edge, a condition denied, a
bool turned. Each is run against its own package's tests, in a copy of src/, so that the work tree is never touched.
A line of --out is a mutant and what came of it, so a run that was stopped goes on; the sample is the same for a seed
as long as the files are.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("quant", "phases", "losses", "formats")
OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


@dataclass(frozen=True)
class Mutant:
    """A change: the ``place``-th node of ``file`` that can be changed, and how it reads."""

    file: str
    place: int
    line: int
    before: str
    after: str


def nodes(tree: ast.Module) -> Iterator[tuple[ast.AST, str, object]]:
    """Each node that can be changed, its field, and the field's new value; unions of types stay as they are."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in OPERATORS:
            if not isinstance(node, ast.BinOp) or not _is_type(node):
                yield node, "op", OPERATORS[type(node.op)]()
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
            yield node, "ops", [OPERATORS[type(node.ops[0])](), *node.ops[1:]]
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
            yield node, "value", (not node.value) if isinstance(node.value, bool) else node.value + 1
        elif isinstance(node, ast.If | ast.IfExp):
            yield node, "test", ast.UnaryOp(ast.Not(), node.test)


def _is_type(node: ast.BinOp) -> bool:
    """Whether it is a union such as ``int | None``."""
    return isinstance(node.op, ast.BitOr) and any(
        (isinstance(side, ast.Constant) and side.value is None)
        or (isinstance(side, ast.Name) and side.id[:1].isupper())
        for side in (node.left, node.right)
    )


def mutants(file: Path) -> Iterator[Mutant]:
    """All mutants of a file."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for place, (node, name, value) in enumerate(nodes(tree)):
        before, kept = ast.unparse(node), getattr(node, name)
        setattr(node, name, value)
        after = ast.unparse(node)
        setattr(node, name, kept)
        yield Mutant(str(file.relative_to(ROOT / "src")), place, getattr(node, "lineno", 0), before[:120], after[:120])


def mutated(text: str, place: int) -> str:
    """The text of a file with its ``place``-th node changed."""
    tree = ast.parse(text)
    for index, (node, name, value) in enumerate(nodes(tree)):
        if index == place:
            setattr(node, name, value)
            break
    return ast.unparse(ast.fix_missing_locations(tree))


def outcome(mutant: Mutant, source: Path, seconds: int) -> str:
    """``killed``, ``survived`` or ``killed by time``."""
    file = source / mutant.file
    kept = file.read_text(encoding="utf-8")
    tests = ROOT / "tests" / Path(mutant.file).parts[1]
    own = tests / f"test_{Path(mutant.file).stem}.py"
    file.write_text(mutated(kept, mutant.place), encoding="utf-8")
    try:
        for some in ([own] if own.exists() else []), [tests]:
            if some and _fails(some, source, seconds):
                return "killed"
    except subprocess.TimeoutExpired:
        return "killed by time"
    finally:
        file.write_text(kept, encoding="utf-8")
    return "survived"


def _fails(tests: list[Path], source: Path, seconds: int) -> bool:
    chosen = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly", "-m", "not slow and not gpu"]
    settings = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *chosen, *map(str, tests)],
        cwd=ROOT,
        env=settings,
        capture_output=True,
        timeout=seconds,
        check=False,
    )
    if ended.returncode not in (0, 1):  # neither passed nor failed: pytest itself could not run them
        raise RuntimeError((ended.stdout + ended.stderr).decode(errors="replace")[-2000:])
    return ended.returncode == 1


def require_sound(source: Path, packages: set[str], seconds: int) -> None:
    """Refuse to begin where tests fail without any mutant, which would count as killing it."""
    for name in sorted(packages):
        if _fails([ROOT / "tests" / name], source, seconds):
            sys.exit(f"tests/{name} fails as it is; mend that first")


def show(file: Path) -> None:
    """How many were killed, and which were not."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    print(dict(Counter(row["outcome"] for row in rows)))
    for row in rows:
        if row["outcome"] == "survived":
            print(f"{row['file']}:{row['line']}: {row['before']}  ->  {row['after']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=900, help="for the tests of one mutant")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", type=Path, metavar="FILE")
    given = parser.parse_args()
    if given.show is not None:
        show(given.show)
        return
    if given.out is None:
        parser.error("give --out FILE, or --show FILE")
    files = [file for name in PACKAGES for file in sorted((ROOT / "src" / "swquant" / name).glob("*.py"))]
    every = [mutant for file in files for mutant in mutants(file)]
    chosen = random.Random(given.seed).sample(every, min(given.sample, len(every)))
    done = set()
    if given.out.exists():
        rows = (json.loads(line) for line in given.out.read_text(encoding="utf-8").splitlines())
        done = {(row["file"], row["place"], row["before"]) for row in rows}
    with tempfile.TemporaryDirectory(prefix="swquant-mutants-") as place:
        source = Path(place) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        left = [one for one in chosen if (one.file, one.place, one.before) not in done]
        require_sound(source, {Path(one.file).parts[1] for one in left}, given.seconds)
        for mutant in left:
            row = {**asdict(mutant), "outcome": outcome(mutant, source, given.seconds)}
            with given.out.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
            print(row, flush=True)


if __name__ == "__main__":
    main()
