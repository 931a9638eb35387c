"""Parts of a benchmark, each in a process of its own with a limit of time: one that fails costs itself alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

ROW = "row: "
"""What a part's lines begin with among other things that may be printed."""

Row = dict[str, Any]
Rows = Iterator[tuple[str, Callable[[], Row]]]


def tell(rows: Rows) -> None:
    """Do a part and print each of its rows."""
    for title, work in rows:
        began = time.perf_counter()
        try:
            row = work()
        except Exception:
            row = {"failed": traceback.format_exc()}
        took = round(time.perf_counter() - began, 2)
        print(ROW + json.dumps({"name": title, **row, "took_s": took}), flush=True)


def heard(name: str, command: list[str], limit: float) -> Iterator[Row]:
    """A part's rows one by one, from a process of its own that :func:`tell` s them, and how that ended.

    Args:
        name: Of the part, for what is printed.
        command: The process; it and those that it starts are killed after so many seconds.
        limit: The seconds.
    """
    if limit < 1:
        yield {"failed": "no time was left for it"}
        return
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
        timer = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(ROW):
                row = json.loads(line.removeprefix(ROW))
                print(name, json.dumps(row), flush=True)
                yield {"rows": [row]}
        code = process.wait()
        timer.cancel()
        seconds = round(time.monotonic() - began, 1)
        errors.seek(0)
        said = errors.read()
    if code:
        late = seconds >= limit
        why = f"it took more than {limit:.0f} s" if late else f"the process ended with {code}"
        print(name, why, said[-500:], flush=True)
        yield {"seconds": seconds, "failed": why, "said": said[-4000:]}
    else:
        yield {"seconds": seconds, **({"said": said[-1000:]} if said else {})}
