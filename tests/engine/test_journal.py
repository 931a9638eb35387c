"""The journal's lock and its manifest."""

from __future__ import annotations

from pathlib import Path

import pytest

from swquant import SwquantError
from swquant.engine.journal import MANIFEST, lock_directory, open_journal


def test_a_lock_is_free_behind_its_context(tmp_path: Path) -> None:
    held = lock_directory(tmp_path / "work")
    with held, pytest.raises(SwquantError, match="another process is writing to"):
        lock_directory(tmp_path / "work")
    with lock_directory(tmp_path / "work"):
        assert (tmp_path / "work" / "lock").exists()


@pytest.mark.parametrize("content", [b"5", b"null", b'"text"', b"[]", b"", b"{"])
def test_a_manifest_that_is_none_is_said_to_be_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(SwquantError, match=r"manifest.json is damaged .*; delete .* to start over"):
        open_journal(tmp_path, {})
