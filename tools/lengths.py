"""Holds src/ to functions of sixty lines and files of four hundred: python tools/lengths.py

Docstrings, comments and empty lines do not count: what is counted is what has to be understood at once. A function
within another counts in both.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FUNCTION, FILE = 60, 400
QUIET = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def counted(text: str) -> frozenset[int]:
    """The numbers of the lines that hold code."""
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in QUIET
        for line in range(token.start[0], token.end[0] + 1)
    }
    return frozenset(lines - {line for node in ast.walk(ast.parse(text)) for line in _docstrings(node)})


def _docstrings(node: ast.AST) -> Iterator[int]:
    """Lines of strings that stand as statements of their own: docstrings, and those below constants."""
    for one in getattr(node, "body", []) if isinstance(node, DOCUMENTED) else []:
        if isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant) and isinstance(one.value.value, str):
            yield from range(one.lineno, (one.end_lineno or one.lineno) + 1)


def too_long(text: str, name: str) -> Iterator[str]:
    """A sentence for the file and for each function over its limit."""
    code = counted(text)
    if len(code) > FILE:
        yield f"{name}: {len(code)} lines of code, at most {FILE}; split it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            lines = sum(first <= line <= (node.end_lineno or first) for line in code)
            if lines > FUNCTION:
                yield f"{name}:{node.lineno}: {node.name} has {lines} lines of code, at most {FUNCTION}; split it"


def main() -> None:
    files = sorted((ROOT / "src").rglob("*.py"))
    found = [said for file in files for said in too_long(file.read_text(encoding="utf-8"), str(file.relative_to(ROOT)))]
    print("\n".join(found) or f"{len(files)} files, none too long")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
