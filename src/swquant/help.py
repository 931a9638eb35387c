"""What ``--help`` prints: options in groups that fit a screen, the rest by ``--help-all``."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

import click
from click.shell_completion import CompletionItem

SECTIONS: dict[str, tuple[str, ...]] = {
    "What": ("out", "bits", "size", "group_size", "symmetric", "keep", "runtime", "formats"),
    "How well": (
        *(
            "preset",
            "time",
            "recipe_name",
            "method",
            "loss",
            "calibration",
            "samples",
            "seq_len",
            "epochs",
            "evaluation",
        ),
    ),
    "Where": ("device", "device_memory", "host_memory", "push_to_hub"),
}
"""Options of a run by what they decide; all others are advanced."""

EVERYTHING = "swquant.everything"
"""Under this name a context remembers that ``--help-all`` was given."""


class Command(click.Command):
    """A command whose help is grouped, and which refuses an option given twice, one of which would be lost."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See :class:`click.Command`."""
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        given = Counter(one for one in order if isinstance(one, click.Option) and not one.multiple)
        for option, times in given.items():
            if times > 1:
                raise click.UsageError(f"{option.opts[0]} is given {times} times; give it once", ctx)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Options of a run by :data:`SECTIONS`; those of other commands are few, and stand in one list."""
        options = {str(one.name): one for one in self.get_params(ctx) if isinstance(one, click.Option)}
        if "recipe_name" not in options:
            super().format_options(ctx, formatter)
            return
        named = {title: [options.pop(name) for name in names if name in options] for title, names in SECTIONS.items()}
        shown = self.get_help_option(ctx)
        helps = [options.pop("help_all"), *([] if shown is None else [shown])]
        rest = [one for one in options.values() if one is not shown]
        advanced = {"Advanced": rest} if ctx.meta.get(EVERYTHING) else {}
        for title, held in (named | advanced | {"Help": helps}).items():
            with formatter.section(heading(title)):
                formatter.write_dl([row for one in held if (row := one.get_help_record(ctx)) is not None])


class Group(click.Group):
    """Commands of :class:`Command`, listed in the order in which they were written: that of use."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        """See :class:`click.Group`."""
        return list(self.commands)


def heading(title: str) -> str:
    """A heading, bold where that can be shown."""
    plain = "NO_COLOR" in os.environ or not os.isatty(1)
    return title if plain else click.style(title, bold=True)


def help_all(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``--help-all``."""

    def show(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
        if asked:
            ctx.meta[EVERYTHING] = True
            click.echo(ctx.get_help())
            ctx.exit()

    return click.option(
        "--help-all",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=show,
        help="Show the advanced options too.",
    )(command)


def known(kind: str) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """Completes the names that ``swquant list KIND`` lists."""

    def complete(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
        from swquant import registry
        from swquant.recipe import recipe_names

        names = recipe_names() if kind == "recipes" else registry.names(f"swquant.{kind}")
        return [CompletionItem(name) for name in names if name.startswith(begun)]

    return complete
