"""The rows of a sweep as one tidy table: a row for each trial, a column for each key, setting and number."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def columns(rows: Sequence[Row]) -> list[str]:
    """Every row's keys in the order of the longest row, others after them."""
    longest = max(rows, key=len, default={})
    return list(dict.fromkeys([*longest, *(name for row in rows for name in row)]))


def csv_text(rows: Sequence[Row]) -> str:
    """A line for each row; what a row lacks is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def write_parquet(rows: Sequence[Row], path: Path) -> bool:
    """Write the table, if pyarrow is installed; returns whether it is."""
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    arrow: Any = pyarrow
    kinds = {bool: arrow.bool_(), int: arrow.int64(), float: arrow.float64(), str: arrow.string()}
    arrays = {
        name: arrow.array([_as(row.get(name), kind) for row in rows], kinds[kind])
        for name in columns(rows)
        for kind in [_kind([row.get(name) for row in rows])]
    }
    draft = path.with_name(f"{path.name}.part")
    parquet.write_table(arrow.table(arrays), draft)
    draft.replace(path)
    return True


def _kind(values: Sequence[Any]) -> type:
    """The one type of a column: text where it is mixed or empty."""
    found = {type(value) for value in values if value is not None}
    if found == {int, float}:
        return float
    return found.pop() if len(found) == 1 and found <= {bool, int, float, str} else str


def _as(value: Any, kind: type) -> Any:
    return None if value is None else kind(value)
