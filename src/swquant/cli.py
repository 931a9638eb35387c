"""The command line: the only reader of arguments."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from swquant import __version__
from swquant.errors import LeaderStoppedError, OutOfMemoryError, RankLostError, SwquantError, did_you_mean, reason_of
from swquant.flags import (
    SOURCE_OPTIONS,
    budget_of,
    decides,
    files_of,
    memory_options,
    recipe_of,
    recipe_options,
    source_options,
    trust_option,
)
from swquant.help import Group, known
from swquant.observers.stopping import handled, interrupt
from swquant.places import REPORT, require_unused

if TYPE_CHECKING:
    from swquant.estimate.budget import Budget

KINDS = ("methods", "losses", "families", "formats", "grids", "targets", "recipes")
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which users say how OpenMP's threads wait."""
RESUMED = ("quantize", "sweep")
"""Commands that go on where they were stopped."""
USER_ERROR = 2
FAILURE = 1
INTERRUPTED = 130


def _kinds(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
    return [CompletionItem(kind) for kind in KINDS if kind.startswith(begun)]


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="swquant")
def app() -> None:
    """Quantize language models to 2, 3 or 4 bits per weight, for vLLM, llama.cpp, MLX and others.

    Begin with:  swquant demo   (a few minutes, no download)
    """


@app.command()
@click.option("--out", type=click.Path(path_type=Path), help="Keep the quantized models here.  [dropped]")
def demo(out: Path | None) -> None:
    """Quantize a small model that comes along, four ways."""
    from swquant.demo import run_demo

    run_demo(out)


@app.command()
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new directory for the output.")
@source_options
@recipe_options
@memory_options
@click.option("--log-json", metavar="FILE", help="Append progress to FILE as JSON lines; - is standard error.")
@click.option(
    "--tensorboard", "tensorboard_directory", metavar="DIR", type=click.Path(path_type=Path), help="Curves in DIR."
)
@click.option("--wandb", "wandb_project", metavar="PROJECT", help="Curves in a project of W&B.")
@click.option("--push-to-hub", metavar="OWNER/NAME", help="Send the finished output and its card to the hub.")
@click.option("--private", is_flag=True, help="Make the hub repository private, if it is made here.")
def quantize(
    source: str,
    out: Path,
    recipe_name: str | None,
    options: tuple[str, ...],
    device_memory: str | None,
    host_memory: str | None,
    push_to_hub: str | None,
    private: bool,
    **flags: Any,
) -> None:
    """Quantize SOURCE, a model directory or a hub name.

    \b
    Example:    swquant quantize Qwen/Qwen3-0.6B --bits 4 --preset fast --out q4
    Many GPUs:  torchrun --nproc-per-node 4 -m swquant quantize ...
    Killed, it resumes by the same command.
    """
    if not (out / REPORT).is_file():  # else it may be this run's own, finished
        require_unused(out)
    asked = {name: flags.pop(name) for name in ("log_json", "tensorboard_directory", "wandb_project")}
    files = {name: flags.pop(name) for name in SOURCE_OPTIONS}
    recipe_name, recipe = recipe_of(recipe_name, options, flags)

    # What takes seconds to import comes after what can be refused without it.
    from swquant.checkpoint.hub import push, require_push
    from swquant.distributed.group import joined
    from swquant.observers.stopping import following
    from swquant.observers.watch import watching as everyone
    from swquant.run import quantize_together
    from swquant.ui import print_report

    if push_to_hub is not None:
        require_push(push_to_hub)
    budget = budget_of(device_memory, host_memory)
    with (
        joined(os.environ, recipe.device) as ranks,
        everyone(out.name, **asked) if ranks.rank == 0 else following() as watching,
    ):
        report = quantize_together(recipe, source, out, ranks, watching, budget, files_of(files))
    if report is None:
        return
    print_report(report, out, recipe_name)
    if push_to_hub is not None:
        click.echo(f"\nPushed to {push(out, push_to_hub, private=private)}")


@app.command()
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), default=Path(), help="Where the quantized model would go.")
@source_options
@recipe_options
@memory_options
@click.option("--no-time", is_flag=True, help="Leave out the time, for which a block of random weights is run here.")
@click.option("--measure", is_flag=True, help="In the table of sizes, the KL that grids cost; runs the model.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def plan(
    source: str,
    out: Path,
    recipe_name: str | None,
    options: tuple[str, ...],
    device_memory: str | None,
    host_memory: str | None,
    no_time: bool,
    measure: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Say what can be made of SOURCE, or what quantizing it takes.

    SOURCE alone gives a table of sizes, and what a time buys. With options of quantize: time, memory, disk; the exit
    code is 1 if something does not fit. No weight is read, but with --measure and --size, which run the model on a few
    samples.
    """
    if not decides(recipe_name, options, flags):
        _overview(source, budget_of(device_memory, host_memory), flags, not no_time, measure, as_json)
        return
    if measure:
        raise SwquantError("--measure is of the table of sizes, which plan prints of a model alone: leave one out")
    from swquant.estimate import estimate
    from swquant.estimate.shown import print_estimate

    files = files_of(flags)
    recipe_name, recipe = recipe_of(recipe_name, options, flags)
    budget = budget_of(device_memory, host_memory)
    if recipe.is_sized or recipe.time is not None:
        from swquant.choosing import choose
        from swquant.engine.deadline import Timer

        recipe = choose(recipe, source, files, budget.room, partial(click.echo, err=True), Timer(), {}).recipe
    found = estimate(recipe, source, out, budget, measure=not no_time, source_options=files)
    click.echo(found.to_json()) if as_json else print_estimate(found, recipe_name, _to_quantize())
    if found.problems:
        sys.exit(FAILURE)


def _overview(source: str, budget: Budget, flags: dict[str, Any], times: bool, measure: bool, as_json: bool) -> None:
    """What can be made of a model."""
    from swquant.overview import overview, print_overview

    files = files_of(flags)
    _, recipe = recipe_of(None, (), flags)
    found = overview(recipe, source, files, budget, partial(click.echo, err=True), times=times, costs=measure)
    click.echo(found.to_json()) if as_json else print_overview(found, _to_quantize())


@app.command()
@click.argument("model")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where it goes; a new directory.")
@click.option(
    "--for",
    "runtime",
    shell_complete=known("targets"),
    help="What is to serve the output (swquant list targets); picks the format.",
)
@click.option(
    "--format",
    "formats",
    multiple=True,
    shell_complete=known("formats"),
    help="Output format, or several (swquant list formats).",
)
@trust_option
def convert(model: str, out: Path, runtime: str | None, formats: tuple[str, ...], trust_remote_code: bool) -> None:
    """Write a quantized MODEL in another format, same codes."""
    from swquant.convert import convert as run
    from swquant.ui import print_converted

    written = run(model, out, format=",".join(formats) or None, runtime=runtime, trust_remote_code=trust_remote_code)
    print_converted(written, model, out)


@app.command()
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def inspect(model: str, as_json: bool) -> None:
    """Show what is inside a quantized MODEL of any format."""
    from swquant.inspection import inspect as run
    from swquant.ui import print_inspection

    result = run(model)
    if as_json:
        click.echo(result.to_json())
    else:
        print_inspection(result)


@app.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--html", "page", type=click.Path(path_type=Path), help="Write a page with charts to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def compare(runs: tuple[Path, ...], page: Path | None, as_json: bool) -> None:
    """Set the outputs of finished RUNS side by side."""
    from swquant.compare import compare as read

    found = read(runs)
    if page is not None:
        found.write_html(page)
    if as_json:
        click.echo(found.to_json())
        return
    found.print(runs, page)


@app.command("eval")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--text", help="wikitext2, c4, c4-new, ptb, ptb-new, a text file, or a datasets name.")
@click.option("--tasks", multiple=True, help="Tasks of lm-eval and task files: piqa,hellaswag,./mine.yaml.")
@click.option("--reference", help="The original model: adds KL to it and agreement with it.")
@source_options
@click.option("--baseline", "baselines", multiple=True, help="Quantized otherwise: prints what MODEL recovers.")
@click.option("--context", type=int, help="Tokens per window.  [2048, or the model's limit]")
@click.option("--windows", type=int, help="Measure on the first windows only.  [all]")
@click.option("--items", type=int, help="Ask the first items of each task only.  [all]")
@click.option("--device", default="auto", show_default=True, help="cpu, an accelerator's name, or auto.")
@click.option("--packed", is_flag=True, help="Compute on packed codes, as swquant.load does; needs less memory.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def evaluate(
    models: tuple[str, ...],
    tasks: tuple[str, ...],
    reference: str | None,
    baselines: tuple[str, ...],
    as_json: bool,
    **flags: Any,
) -> None:
    """Measure MODEL: perplexity, KL to its original, tasks.

    With --baseline and --reference: how much MODEL recovers of what the baseline lost. Several models and several
    baselines are then one recipe each with several seeds, in the same order.
    """
    from swquant.checkpoint.opening import SourceOptions
    from swquant.evaluation import What, measure, measure_gain
    from swquant.ui import print_gain, print_measured

    trusted = flags["trust_remote_code"]
    files = files_of(flags)
    if reference is None and files != SourceOptions(trust_remote_code=trusted):
        raise SwquantError(
            "--revision, --subfolder and --dequantize-source are of the original: give --reference, or leave them out"
        )
    what = What(tasks=tuple(filter(None, ",".join(tasks).split(","))), trust_remote_code=trusted, **flags)
    if baselines:
        if reference is None:
            raise SwquantError("--baseline needs --reference, the model that both were made of")
        gain = measure_gain(models, baselines, reference, what, files)
        click.echo(gain.to_json()) if as_json else print_gain(gain)
        return
    model, *others = models
    if others:
        raise SwquantError(f"{len(models)} models and no --baseline: give one model, or --baseline and --reference")
    measured = measure(model, what, reference=reference, source_options=files)
    if as_json:
        click.echo(measured.to_json())
        return
    print_measured(measured, reference)


@app.command()
@click.argument("grid", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where trials and the table go.")
@click.option("--workers", type=int, help="Trials at a time in processes of this machine.  [1]")
@click.option("--threads", type=int, help="CPU threads of a trial.  [cores over workers]")
@click.option(
    "--executor",
    type=click.Choice(["auto", "local", "ray"]),
    default="auto",
    help="Where trials run.  [ray if it is installed and --workers is not given]",
)
@click.option("--gpus", type=float, help="GPUs of a trial on Ray.  [1 if the cluster has any]")
@click.option("--retries", type=int, default=1, show_default=True, help="New starts of a trial whose process died.")
@click.option("--keep", is_flag=True, help="Keep the quantized models.  [dropped]")
@click.option("--dry-run", is_flag=True, help="Only list what would be run.")
def sweep(
    grid: Path,
    out: Path,
    workers: int | None,
    threads: int | None,
    executor: str,
    gpus: float | None,
    retries: int,
    keep: bool,
    dry_run: bool,
) -> None:
    """Quantize by every combination of a YAML file, GRID.

    It lists models and values of a recipe's keys. The same command goes on where a killed one stopped; finished
    trials are never run again.
    """
    from swquant.sweep import plan_sweep, planned_lines, run_sweep
    from swquant.sweep.executors import choose_executor

    if dry_run:
        click.echo("\n".join(planned_lines(plan_sweep(grid, out))))
        return
    chosen, each = choose_executor(executor, workers, threads, gpus, retries)
    rows = run_sweep(grid, out, chosen, each, keep=keep, say=lambda line: click.echo(line, err=True))
    failed = sum(row["status"] != "done" for row in rows)
    click.echo(f"{len(rows)} trials, {failed} failed: {out / 'results.csv'}, {out / 'results.html'}")


@app.command("list")
@click.argument("kind", metavar="KIND", shell_complete=_kinds)
def list_(kind: str) -> None:
    """List what can be chosen: methods, formats, recipes, ...

    KIND is one of methods, losses, families, formats, grids, targets, recipes.
    """
    from swquant import registry, targets
    from swquant.recipe import Recipe, recipe_names
    from swquant.terminal import print_list

    if kind not in KINDS:
        raise SwquantError(f"nothing to list under {kind!r}{did_you_mean(kind, KINDS)}")
    if kind == "recipes":
        lines = {name: Recipe.load(name).summary for name in recipe_names()}
    elif kind == "targets":
        lines = targets.describe()
    else:
        lines = registry.describe(f"swquant.{kind}")
    print_list(lines)


@app.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of bash, zsh or fish.

    \b
    bash:  eval "$(swquant completion bash)"              in ~/.bashrc
    zsh:   eval "$(swquant completion zsh)"               in ~/.zshrc
    fish:  swquant completion fish > ~/.config/fish/completions/swquant.fish
    """
    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(app, {}, "swquant", "_SWQUANT_COMPLETE").source())


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a user's mistake prints one sentence and exits with code 2."""
    if not any(name in os.environ for name in WAITING):
        # Threads that spin while they wait take the time of those that they wait for, where other work runs too.
        # OpenMP reads it when torch is imported, which has to be later than this.
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    try:
        with handled(interrupt):
            app.main(arguments, prog_name="swquant", standalone_mode=False, obj=_given(arguments))
    except LeaderStoppedError:
        sys.exit(FAILURE)
    except (RankLostError, OutOfMemoryError) as error:
        _fail(str(error), FAILURE)
    except SwquantError as error:
        _fail(str(error), USER_ERROR)
    except click.exceptions.NoArgsIsHelpError as error:  # nothing given: the help itself, its lines as they are
        click.echo(error.format_message())
        sys.exit(USER_ERROR)
    except click.ClickException as error:
        _fail(" ".join(error.format_message().split()), USER_ERROR)
    except (KeyboardInterrupt, click.Abort):
        _fail(f"stopped{_after(arguments, '; the same command goes on from the last finished block')}", INTERRUPTED)
    except OSError as error:
        kept = _after(arguments, "; what is finished is kept, and the same command goes on from there")
        _fail(f"{error}{kept}", FAILURE)
    except (MemoryError, RuntimeError) as error:
        from swquant.phases.micro_batch import ran_out

        if not ran_out(error):
            raise
        reason = reason_of(error)
        _fail(
            f"memory ran out ({reason}); what is finished is kept: choose a smaller --seq-len, "
            "a device with more memory, or see what swquant plan says",
            FAILURE,
        )


def _after(arguments: list[str] | None, sentence: str) -> str:
    """The sentence, if the command is one that goes on where it was stopped."""
    given = _given(arguments)
    return sentence if given[:1] and given[0] in RESUMED else ""


def _given(arguments: list[str] | None) -> list[str]:
    return sys.argv[1:] if arguments is None else arguments


def _to_quantize() -> str:
    """The command that does what ``plan`` was asked about."""
    from swquant.terminal import command_line

    given: list[str] = click.get_current_context().find_root().obj or sys.argv[1:]
    kept = [word for word in given[1:] if word not in ("--no-time", "--json", "--measure")]
    out = [] if any(word.partition("=")[0] == "--out" for word in kept) else ["--out", "DIRECTORY"]
    return command_line("swquant", "quantize", *kept, *out)


def _fail(sentence: str, code: int) -> None:
    from swquant.terminal import plain_console, say

    say(plain_console(stderr=True), f"swquant: {sentence}", "red")
    sys.exit(code)
