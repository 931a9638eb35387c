"""Every command that the documentation names is one that the command line takes."""

from __future__ import annotations

import re

import click
import pytest

from docs.pages import DOCS, PAGES, blocks, commands
from swquant.cli import app
from swquant.flags import SOURCE_OPTIONS, recipe_of
from swquant.recipe import Recipe
from swquant.validation import read_yaml

FOREIGN = {
    *("--no-build-isolation", "--quantization", "--nproc-per-node", "--layers", "--peer-python", "--tensor-type"),
    *("--data-free", "--large", "--worker", "--balance", "--loss-schedule", "--loss-depth", "--editable"),
    *("--nnodes", "--node-rank", "--rdzv-endpoint", "--over", "--blocks", "--no-deps", "--model", "--enable"),
}
"""Options of other programs, of our benchmarks, and those that left swquant."""

WITH_COMMANDS = [page for page in PAGES if [*commands(page)]]


def test_pages_with_commands_are_found() -> None:
    assert {"tutorial.md", "plan.md", "recipes.md", "sweep.md", "how-to/resume.md"} <= set(WITH_COMMANDS)
    assert ["demo"] in [*commands("tutorial.md")]


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_commands_are_read_without_a_complaint(page: str) -> None:
    for name, *arguments in commands(page):
        command = app.commands[name]
        with command.make_context(name, arguments) as context:
            given = dict(context.params)
        if name not in ("quantize", "plan"):
            continue
        used = {one.name for one in app.commands["plan"].params} - {"source", "out", "no_time", "as_json", "measure"}
        flags = {key: value for key, value in given.items() if key in used}
        for key in (*SOURCE_OPTIONS, "device_memory", "host_memory"):
            flags.pop(key)
        options = flags.pop("options")
        _, recipe = recipe_of(flags.pop("recipe_name"), options, flags)
        assert recipe.method


@pytest.mark.parametrize("page", PAGES)
def test_options_that_pages_name_exist(page: str) -> None:
    known = {
        flag for command in app.commands.values() for one in command.params for flag in (*one.opts, *one.secondary_opts)
    }
    known |= {"--help", "--version"} | FOREIGN
    spans = re.findall(r"`[^`\n]*`", PAGES[page])
    named = {flag for span in spans for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", span)}
    assert named <= known


def test_recipes_in_pages_are_recipes() -> None:
    (found,) = (content for _, content in blocks("mixed.md", "yaml"))
    assert Recipe.from_text(found, "mixed.md").grids
    for _, content in blocks("sweep.md", "yaml"):
        assert "model" in read_yaml(content, "sweep.md")


@pytest.mark.parametrize("page", PAGES)
def test_links_within_pages_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", PAGES[page]):
        assert (DOCS / page).parent.joinpath(target).exists(), target


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"<([\w/-]+)>$", "".join(content for _, content in _trees()), flags=re.MULTILINE)
    assert sorted(listed) == sorted(page.removesuffix(".md") for page in PAGES if page != "index.md")


def _trees() -> list[tuple[str, str]]:
    return re.findall(r"^```\{(toctree)\}\n(.*?)^```", PAGES["index.md"], flags=re.MULTILINE | re.DOTALL)


def test_the_commands_page_shows_every_command() -> None:
    shown = re.findall(r"^<!-- help: (\w*) ?--help(?:-all)? -->$", PAGES["reference/commands.md"], flags=re.MULTILINE)
    assert sorted(shown) == sorted(["", *app.commands])
    assert isinstance(app, click.Group)
