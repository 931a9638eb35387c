"""A package that is missing, too old or too new is one sentence."""

from __future__ import annotations

import importlib.metadata
import re

import pytest

from swquant import SwquantError
from swquant.integrations.peft import packed_lora
from swquant.integrations.versions import require_version


def test_a_missing_package_is_named_with_its_extra() -> None:
    with pytest.raises(SwquantError, match=r"no-such-thing is not installed: pip install 'swquant\[no-such-thing\]'"):
        require_version("no-such-thing", "1", "2")


@pytest.mark.parametrize(
    ("found", "fits"),
    [
        *(("0.21.1", False), ("0.21.2", True), ("0.21.10", True), ("0.22.0", False), ("0.21.2+local", True)),
        *(("0.21.2.dev3", False), ("0.21.3rc1", True), ("0.22.0rc1", False)),
    ],
)
def test_versions_are_compared_as_numbers(found: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda package: found)
    if fits:
        require_version("peft", "0.21.2", "0.22")
        return
    with pytest.raises(
        SwquantError, match=rf"peft {re.escape(found)} is installed, .* pip install 'peft>=0.21.2,<0.22'"
    ):
        require_version("peft", "0.21.2", "0.22")
    with pytest.raises(SwquantError, match=f"peft {re.escape(found)}"):
        packed_lora(None, None)
