"""Which versions of another package an integration was written for."""

from __future__ import annotations

import importlib.metadata

from packaging.specifiers import SpecifierSet

from swquant.errors import SwquantError


def require_version(package: str, first: str, after: str) -> None:
    """Refuse a package that is missing or of a version that nobody has tried.

    Args:
        package: Its name on the index, and that of our extra.
        first: The first version that was tried.
        after: The first version after those.

    Raises:
        SwquantError: With what to install.
    """
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise SwquantError(f"{package} is not installed: pip install 'swquant[{package}]'") from error
    if not SpecifierSet(f">={first},<{after}").contains(found, prereleases=True):
        raise SwquantError(
            f"{package} {found} is installed, and swquant knows it from {first} to before {after}: "
            f"pip install '{package}>={first},<{after}'"
        )
