"""Templates filled with what others wrote: every value is escaped, none can become markup or code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

TEMPLATES = "templates"

_FLAG = re.compile(r"(?<![\w-])(--[a-z][a-z-]*)")


def render(template: str, values: Mapping[str, Any]) -> str:
    """The page that ``template`` makes of ``values``; only :class:`markupsafe.Markup` is taken as markup."""
    return _environment().get_template(template).render(**values, style=_style())


def with_code(text: str) -> Markup:
    """``text`` with its flags, such as ``--bits``, set as code, which is not broken at their hyphens."""
    return Markup(_FLAG.sub(r"<code>\1</code>", str(escape(text))))


@cache
def _environment() -> Environment:
    loader = PackageLoader("swquant.html", TEMPLATES)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["with_code"] = with_code
    return environment


@cache
def _style() -> Markup:
    return Markup((resources.files("swquant.html") / TEMPLATES / "style.css").read_text(encoding="utf-8"))
