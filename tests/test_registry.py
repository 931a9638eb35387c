"""The folder is the registry."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from swquant import SwquantError, registry
from swquant.methods import parse_methods

KINDS = ("methods", "losses", "families", "formats")


@pytest.mark.parametrize("kind", KINDS)
def test_every_plugin_loads_under_its_name(kind: str) -> None:
    names = registry.names(f"swquant.{kind}")
    assert names
    assert "base" not in names
    for name in names:
        found = registry.load(f"swquant.{kind}", name)
        bare = getattr(found, "__name__", None) or found.name
        assert bare.replace("_", "").lower() == name.replace("_", "")


@pytest.mark.parametrize("kind", KINDS)
def test_a_near_miss_is_named(kind: str) -> None:
    name = registry.names(f"swquant.{kind}")[0]
    with pytest.raises(SwquantError, match=f"did you mean '{name}'"):
        registry.load(f"swquant.{kind}", f"{name}x")


def test_case_alone_is_a_near_miss() -> None:
    with pytest.raises(SwquantError, match="did you mean 'gguf'"):
        registry.load("swquant.formats", "GGUF")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epoch": 3}, "did you mean 'epochs'"),
        ({"epochs": "3"}, "epochs is '3'"),
        ({"epochs": True}, "epochs is True"),
        ({"alpha": None}, "alpha is None"),
    ],
)
def test_a_methods_options_are_checked(options: dict[str, object], said: str) -> None:
    with pytest.raises(SwquantError, match=said):
        parse_methods("omniquant", options)


def test_an_int_serves_where_a_float_is_expected() -> None:
    assert parse_methods("omniquant", {"alpha": 1})[0].method.alpha == 1


def test_threads_list_at_once() -> None:
    """CPython 3.11's parser fails where two threads parse at once (ranks that are threads do)."""
    packages = [f"swquant.{kind}" for kind in ("formats", "losses", "methods", "targets")] * 8
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(registry.names, packages))
    assert found == [registry.names(package) for package in packages]
