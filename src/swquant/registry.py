"""The folder is the registry: a plug-in is a file of a plug-in package, found by its name.

A module is a plug-in when it defines, at top level, exactly one public class, function or constant with the module's
own name, compared in lower case without underscores: ``losses/sliced_wasserstein.py`` defines ``SlicedWasserstein``,
``methods/omniquant.py`` the function ``omniquant``, ``families/llama.py`` the constant ``LLAMA``. Every other module of
the package (``base.py``, helpers) is not listed. Other distributions add plug-ins by entry points whose group is the
package's name, e.g. ``[project.entry-points."swquant.losses"]`` with ``huber = "their_package.huber:Huber"``; a file of
the package wins over an entry point of the same name.

Listing reads sources and imports none of them, so it stays fast beside libraries that load slowly.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.metadata
import importlib.util
import pkgutil
import symtable
from typing import Any

from swquant.errors import SwquantError, did_you_mean


def names(package: str) -> tuple[str, ...]:
    """Return the sorted names of the plug-ins of ``package``, e.g. ``names("swquant.losses")``."""
    return tuple(describe(package))


def describe(package: str) -> dict[str, str]:
    """Return each plug-in of ``package`` with the first line of its module's docstring, sorted by name."""
    found = {name: _summary(entry.module) for name, entry in _entry_points(package).items()}
    for name in _modules(package):
        if _eponyms(package, name):
            found[name] = _summary(f"{package}.{name}")
    return dict(sorted(found.items()))


def load(package: str, name: str) -> Any:
    """Import the plug-in ``name`` of ``package`` and return the object that bears its name.

    Args:
        package: the dotted name of the plug-in package, e.g. ``"swquant.losses"``.
        name: the file's name without its suffix, or the name of an entry point.

    Raises:
        SwquantError: there is no such plug-in (with the nearest name), the module defines more than one object of
            its name, or another distribution's plug-in cannot be imported.
    """
    if name in _modules(package):
        eponyms = _eponyms(package, name)
        if len(eponyms) > 1:
            raise SwquantError(
                f"{package}.{name} defines {' and '.join(eponyms)}: keep one object of the module's name"
            )
        if eponyms:
            return vars(importlib.import_module(f"{package}.{name}"))[eponyms[0]]
    entry = _entry_points(package).get(name)
    if entry is None:
        kind = package.rpartition(".")[2]
        raise SwquantError(f"no {name!r} among the {kind}{did_you_mean(name, names(package))}")
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        raise SwquantError(f"the plug-in {name!r} ({entry.value}) cannot be imported: {error}") from error


def _modules(package: str) -> tuple[str, ...]:
    """Names of the public modules in the folder of ``package``, plug-ins or not; the package is not imported."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    found = [module.name for module in pkgutil.iter_modules(folders or [])]
    return tuple(name for name in found if not name.startswith("_"))


def _entry_points(package: str) -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=package)}


def _loader(module: str) -> importlib.abc.InspectLoader | None:
    """What knows the source of ``module``; ``None`` if it is missing or has no Python source."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    loader = spec.loader if spec is not None else None
    return loader if isinstance(loader, importlib.abc.InspectLoader) else None


def _summary(module: str) -> str:
    loader = _loader(module)
    code = loader.get_code(module) if loader is not None else None
    if code is None or "__doc__" not in code.co_names:
        return ""
    return str(code.co_consts[0]).strip().partition("\n")[0]


def _eponyms(package: str, name: str) -> list[str]:
    """Public names that a module defines at top level and that equal ``name`` but for case and underscores.

    From the symbol table: ``ast.parse`` fails now and then where two threads parse at once (CPython 3.11).
    """
    module, plain = f"{package}.{name}", _plain(name)
    loader = _loader(module)
    source = loader.get_source(module) if loader is not None else None
    symbols = symtable.symtable(source or "", module, "exec").get_symbols()
    defined = (symbol.get_name() for symbol in symbols if symbol.is_assigned() and not symbol.is_imported())
    return [target for target in defined if not target.startswith("_") and _plain(target) == plain]


def _plain(name: str) -> str:
    return name.replace("_", "").lower()
