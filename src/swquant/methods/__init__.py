"""Methods: named compositions of phases. A file here is a method of that name."""

from swquant.methods.base import Method, build_method

__all__ = ["Method", "build_method"]
