"""The run state's lock and its manifest."""

from __future__ import annotations

from pathlib import Path

import pytest

from swquant import SwquantError
from swquant.engine.block import AUGMENTED
from swquant.engine.run_state import (
    FINAL,
    HIDDEN_STATES,
    MANIFEST,
    TOKENS,
    TRAINED,
    RunState,
    lock_directory,
    open_run_state,
)


def test_a_lock_is_free_behind_its_context(tmp_path: Path) -> None:
    held = lock_directory(tmp_path / "work")
    with held, pytest.raises(SwquantError, match="another process is writing to"):
        lock_directory(tmp_path / "work")
    with lock_directory(tmp_path / "work"):
        assert (tmp_path / "work" / "lock").exists()


def test_a_directory_of_somebody_elses_is_not_ours(tmp_path: Path) -> None:
    for name in ("model.safetensors", "talk.stream", "download.part", "block-one.safetensors", "final.safetensors.bak"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("precious")
        with pytest.raises(SwquantError, match=f"holds '{name}'; move it or choose another --out"):
            lock_directory(tmp_path / name)
        assert [path.name for path in (tmp_path / name).iterdir()] == [name]


def test_what_a_start_leaves_that_was_killed_is_ours(tmp_path: Path) -> None:
    run_state = RunState(tmp_path, {})
    paths = [run_state.block_path(3), tmp_path / TOKENS, tmp_path / FINAL, tmp_path / AUGMENTED]
    names = [*HIDDEN_STATES, TRAINED]
    left = [
        *paths,
        *(run_state.hidden_path(name, 7) for name in names),
        *(path.with_suffix(".part") for path in paths[:3]),
    ]
    for path in (*left, (tmp_path / MANIFEST).with_suffix(".part")):
        path.write_bytes(b"")
    with lock_directory(tmp_path):
        assert (tmp_path / "lock").exists()


@pytest.mark.parametrize("content", [b"5", b"null", b'"text"', b"[]", b"", b"{"])
def test_a_manifest_that_is_none_is_said_to_be_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(SwquantError, match=r"manifest.json is damaged .*; delete .* to start over"):
        open_run_state(tmp_path, {})
