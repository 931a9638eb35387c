"""The run state's lock and its manifest."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch

from swquant import SwquantError
from swquant.engine import run_state as module
from swquant.engine.block import AUGMENTED
from swquant.engine.hidden_states import create_hidden
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
from swquant.quant.draft import Committed


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


@pytest.mark.parametrize("early", [(), HIDDEN_STATES[:1], HIDDEN_STATES])
def test_a_block_is_committed_after_its_hidden_states_are_on_the_disk(
    tmp_path: Path, early: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a thread has begun to flush is waited for, and the checksums are those of the files."""
    order: list[str] = []
    flush, replace = module.flush, module.replace_file
    monkeypatch.setattr(module, "flush", lambda path: (flush(path), order.append(path.name)))
    monkeypatch.setattr(module, "replace_file", lambda path, content: (order.append(path.name), replace(path, content)))
    run_state, shape = RunState(tmp_path, {}), (2, 3, 4)
    for block in (0, 1):
        for index, name in enumerate(HIDDEN_STATES):
            create_hidden(run_state.hidden_path(name, block), shape).fill_(block + index)
        if block == 0:
            run_state.begin({"tokens": torch.zeros(2, 3)}, shape, {})
    order.clear()
    for name in early:
        run_state.keep_early(name)
    run_state.finish_block(Committed({}, {}), {})
    files = {run_state.hidden_path(name, 1).name: value for name, value in zip(HIDDEN_STATES, (1.0, 2.0), strict=True)}
    assert sorted(order[:-1]) == sorted(files)
    assert order[-1] == MANIFEST
    for name, value in files.items():
        part = zlib.crc32(torch.full(shape, value).numpy().tobytes())
        assert run_state.files[name] == zlib.crc32(part.to_bytes(4, "little"))
    open_run_state(tmp_path, {}).verify()


def test_hidden_states_that_cannot_be_flushed_early_are_not_committed(tmp_path: Path) -> None:
    run_state = RunState(tmp_path, {}, (1, 1, 1))
    run_state.keep_early(HIDDEN_STATES[0])
    with pytest.raises(OSError, match="reference-00001"):
        run_state.finish_block(Committed({}, {}), {})
    assert not (tmp_path / MANIFEST).exists()
