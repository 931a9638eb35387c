"""Methods: named compositions of parts. A file here is a method of that name."""

from swquant.methods.base import Method, Part, Setting
from swquant.methods.composition import Pipeline, build_pipeline, parse_methods

__all__ = ["Method", "Part", "Pipeline", "Setting", "build_pipeline", "parse_methods"]
