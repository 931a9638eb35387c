"""Options that commands share, and what they mean: a recipe, a budget, a source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from swquant.errors import SwquantError
from swquant.help import help_all, known

if TYPE_CHECKING:
    from swquant.checkpoint.opening import SourceOptions
    from swquant.estimate.budget import Budget
    from swquant.recipe import Recipe


SOURCE_OPTIONS = ("revision", "subfolder", "dequantize_source", "trust_remote_code")
"""What :func:`source_options` give."""

RECIPE_OPTIONS = (
    click.option(
        "--recipe",
        "recipe_name",
        metavar="NAME",
        shell_complete=known("recipes"),
        help="A named recipe (swquant list recipes) or a YAML file; flags override it.",
    ),
    click.option("--preset", type=click.Choice(["fast", "default", "best"]), help="Data and training.  [default]"),
    click.option(
        "--bits",
        multiple=True,
        metavar="N | PATTERN=N",
        help="Per weight: 2, 3, 4 or 8; again as '*.v_proj=4' for matrices whose names match.  [2]",
    ),
    click.option(
        "--group-size",
        multiple=True,
        metavar="N | PATTERN=N",
        help="Weights that share a scale: 32, 64, 128, or 'channel'.  [64; 128 from 3 bits on]",
    ),
    click.option("--symmetric/--asymmetric", default=None, help="Fixed zero point, or one per group.  [symmetric]"),
    click.option(
        "--grid",
        multiple=True,
        metavar="NAME | PATTERN=NAME",
        help="uniform, or llama.cpp's q2_k, q3_k, q4_k in place of the three above.  [uniform]",
    ),
    click.option("--keep", multiple=True, metavar="PATTERN", help="Leave unquantized: '*.down_proj'; repeatable."),
    click.option(
        "--allow-split",
        is_flag=True,
        default=None,
        help="Let patterns give different grids to what vLLM and SGLang fuse: q, k, v; gate, up; a layer's experts.",
    ),
    click.option(
        "--embedding-bits", type=int, help="Bits of the token embedding, 8 or 4, in GGUF and MLX.  [as it is]"
    ),
    click.option("--head-bits", type=int, help="Bits of the head, likewise; a tied one is the embedding.  [as it is]"),
    click.option(
        "--size",
        metavar="SIZE",
        help="Instead of bits, of the file: 2.6GB; each matrix gets the grid that pays most.",
    ),
    click.option(
        "--target-bits", type=float, metavar="BITS", help="The same as bits for each weight, embedding and head too."
    ),
    click.option(
        "--time",
        metavar="TIME",
        help="Or how long it may take: 30m, 2h.",
    ),
    click.option(
        "--method",
        shell_complete=known("methods"),
        help="One of swquant list methods, or several: 'awq + tesseraq'.  [by recipe]",
    ),
    click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="An option of a method; repeatable."),
    click.option(
        "--loss", shell_complete=known("losses"), help="Training loss, or a sum: '0.9*mse + 0.1*sliced_wasserstein'."
    ),
    click.option(
        "--calibration",
        help="A .txt or .jsonl file, datasets name, bundled, mix, or self (drawn from the model).  "
        "[self where that is quick, else bundled]",
    ),
    click.option("--samples", type=int, help="Calibration samples.  [128, by preset]"),
    click.option("--seq-len", type=int, help="Tokens of each.  [2048, or the model's limit]"),
    click.option("--epochs", type=int, help="Passes over the samples.  [by method, preset]"),
    click.option("--evaluation", help="Text to measure on.  [held out of --calibration]"),
    click.option("--evaluation-samples", type=int, help="Windows of --seq-len tokens to measure on; 0 for none.  [16]"),
    click.option("--seed", type=int, help="Seed of everything random.  [0]"),
    click.option("--precision", help="Of matrix products in training: float32, bfloat16 or auto.  [auto]"),
    click.option("--device", help="cpu, an accelerator's name, or auto.  [auto]"),
    click.option(
        "--for",
        "runtime",
        metavar="RUNTIME",
        shell_complete=known("targets"),
        help="Serve by vllm, sglang, llama.cpp, mlx, onnxruntime, transformers; picks the format.",
    ),
    click.option(
        "--format",
        "formats",
        multiple=True,
        metavar="NAME",
        shell_complete=known("formats"),
        help="Or name it; again, or 'gguf,mlx', for several.  [compressed_tensors]",
    ),
)
"""What decides a recipe."""


NEUTRAL = (
    "runtime",
    "formats",
    "calibration",
    "evaluation",
    "evaluation_samples",
    "seq_len",
    "seed",
    "precision",
    "device",
)
"""Those that leave open what is made of a model."""


def decides(recipe_name: str | None, options: tuple[str, ...], flags: Mapping[str, Any]) -> bool:
    """Whether any option says what is to be made of a model."""
    given = (value for name, value in flags.items() if name not in (*NEUTRAL, *SOURCE_OPTIONS))
    return recipe_name is not None or any(value not in (None, ()) for value in (options, *given))


def recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command :data:`RECIPE_OPTIONS`."""
    for option in reversed(RECIPE_OPTIONS):
        command = option(command)
    return help_all(command)


def memory_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the budget of a run."""
    host = click.option("--host-memory", metavar="SIZE", help="The same for the process.")
    device = "Most memory to take there, e.g. 20GiB."
    return click.option("--device-memory", metavar="SIZE", help=device)(host(command))


trust_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run the Python code that comes with the model: read it first. It is handed on with the output.",
)


def source_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command what says which files its original is."""
    options = (
        click.option("--revision", help="Branch, tag or commit of the original on the hub; also owner/name@revision."),
        click.option("--subfolder", help="Folder of the original's directory or repository that it lies in."),
        click.option(
            "--dequantize-source",
            is_flag=True,
            help="Take an original that compressed-tensors or GPTQ quantized; fp8 and mxfp4 are always taken.",
        ),
        trust_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


def files_of(flags: dict[str, Any]) -> SourceOptions:
    """What :func:`source_options` give, taken out of ``flags``."""
    from swquant.checkpoint.opening import SourceOptions

    return SourceOptions(*(flags.pop(name) for name in SOURCE_OPTIONS))


def budget_of(device: str | None, host: str | None) -> Budget:
    """What the two options allow."""
    from swquant.estimate.budget import Budget
    from swquant.units import parse_size

    return Budget(*(None if text is None else parse_size(text) for text in (device, host)))


def recipe_of(name: str | None, options: tuple[str, ...], flags: dict[str, Any]) -> tuple[str | None, Recipe]:
    """The recipe that the options ask for, and its name or file if it has one."""
    from swquant.recipe import Recipe

    flags["format"] = ",".join(flags.pop("formats")) or None
    values = {name: value for name, value in _by_pattern(flags).items() if value is not None}
    if "size" in values or "target_bits" in values:
        for key in ("bits", "group_size", "grid"):
            if key in values:
                flag = f"--{key.replace('_', '-')}"
                raise SwquantError(
                    f"--size and --target-bits choose each matrix's grid: give {flag} with a pattern only"
                )
    if "time" in values:
        _require_open(name, {**values, "option": options or None})
    if options:
        values["options"] = dict(_option(text) for text in options)
    if name:
        recipe = Recipe.load(name)
    elif "method" in values:
        recipe = Recipe()
    else:
        name, recipe = Recipe.recommended(values)
    return None if "time" in values else name, recipe.override(values)


def _require_open(name: str | None, values: Mapping[str, Any]) -> None:
    """Refuse a time beside what it chooses; a recipe has a method, and its file has a place for the time."""
    if name is not None:
        raise SwquantError(
            f"--time chooses the method, and --recipe {name} has one: leave one out, or write a time in the place of "
            "method, preset and epochs into a recipe's file"
        )
    for key in ("method", "preset", "epochs", "option"):
        if values.get(key) is not None:
            raise SwquantError(f"--time chooses method, samples and epochs: leave --{key} out")


def _by_pattern(flags: dict[str, Any]) -> dict[str, Any]:
    """``flags`` with ``--bits``, ``--group-size`` and ``--grid`` as keys of a recipe, patterns among its ``grids``.

    Patterns stand in the order of these three flags and then ``--keep``; the last that matches a matrix counts.
    """
    values, grids = dict(flags), dict[str, dict[str, Any] | None]()
    for key in ("bits", "group_size", "grid"):
        flag, plain = f"--{key.replace('_', '-')}", dict[str, Any]()
        for text in values.pop(key):
            pattern, equals, value = text.rpartition("=")
            asked = grids.setdefault(pattern, {}) if equals else plain
            assert asked is not None
            if key in asked:
                raise SwquantError(f"{flag} is given twice{f' for {pattern}' if equals else ''}; give it once")
            asked[key] = value if key == "grid" else _number(flag, value)
        values |= plain
    grids |= dict.fromkeys(values.pop("keep"))
    return values | ({"grids": grids} if grids else {})


def _number(flag: str, text: str) -> int | str:
    """An integer, or for groups a word, which the recipe checks."""
    try:
        return int(text)
    except ValueError:
        if flag == "--bits":
            raise SwquantError(f"--bits is {text!r}, expected a number or PATTERN=NUMBER, e.g. '*.v_proj=4'") from None
        return text


def _option(text: str) -> tuple[str, Any]:
    from swquant.validation import read_yaml

    key, equals, value = text.partition("=")
    if not equals:
        raise SwquantError(f"--option {text!r} has no '=', expected KEY=VALUE, e.g. --option epochs=10")
    return key, read_yaml(value, f"the value in --option {text!r}")
