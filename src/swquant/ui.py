"""What a person sees: progress while a run works, and a summary of its report."""

from __future__ import annotations

import shlex
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from swquant.advice import advise, ruined
from swquant.checkpoint.sidecars import is_of_tokenizer
from swquant.engine.observer import Observer
from swquant.engine.pace import Pace
from swquant.evaluation import Evaluation, Gain, Measured
from swquant.html.facts import notes_of, opened
from swquant.inspection import Inspection
from swquant.output import PAGE
from swquant.quant.spec import in_words
from swquant.report import Output, Report
from swquant.terminal import command_line, facts, next_command, outcome, plain_console, say
from swquant.units import size, span


@contextmanager
def observer(label: str = "") -> Generator[Observer]:
    """An observer for this terminal: a progress bar, or plain lines where the output is no terminal."""
    console = plain_console(stderr=True)
    if not console.is_terminal:
        yield Lines(console, label)
        return
    pace = Pace()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
        TimeLeft(pace),
    )
    with Progress(*columns, console=console, expand=True) as progress:
        yield Bar(progress, label, pace)


class TimeLeft(ProgressColumn):
    """How long a run still takes, by its own pace."""

    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self._pace = pace

    def render(self, task: Task) -> Text:
        """The time, once it can be told."""
        left = self._pace.left()
        return Text("" if left is None else f"{span(left)} left")


@dataclass
class Lines:
    """Progress in lines: each stage, and each block with its losses and the time left."""

    console: Console
    label: str = ""
    pace: Pace = field(default_factory=Pace)

    def stage(self, what: str) -> None:
        """Print the stage."""
        told = self._left() if self.pace.left() else ""
        self.console.print(f"{self.label}{what}{told}", soft_wrap=True)

    def begin(self, blocks: int, done: int, tail: float = 0.0) -> None:
        """Start the clock; say what an interrupted run left."""
        self.pace.begin(blocks, done, tail)
        if done:
            self.console.print(f"{self.label}{done} of {blocks} blocks were finished before; going on")

    def step(self, done: int, total: int) -> None:
        """Steps are too many for lines; the clock hears of them."""
        self.pace.step(done, total)

    def block(self, index: int, report: Mapping[str, Any]) -> None:
        """Print the block's line."""
        self.pace.block(index, report)
        self.console.print(f"{self.label}{_block_line(index, self.pace.blocks, report)}{self._left()}", soft_wrap=True)

    def done(self, report: Report) -> None:
        """The summary is printed after it."""

    def _left(self) -> str:
        left = self.pace.left()
        return "" if left is None else f", about {span(left)} left"


@dataclass
class Bar:
    """Progress as a bar over all blocks' steps, with a line above it for each finished block."""

    progress: Progress
    label: str = ""
    pace: Pace = field(default_factory=Pace)
    task: TaskID | None = None

    def stage(self, what: str) -> None:
        """Print the stage above the bar."""
        self.progress.console.print(f"{self.label}{what}")

    def begin(self, blocks: int, done: int, tail: float = 0.0) -> None:
        """Show the bar."""
        self.pace.begin(blocks, done, tail)
        self.task = self.progress.add_task(self._description(), total=blocks, completed=done)

    def step(self, done: int, total: int) -> None:
        """Move the bar by a part of a block."""
        self.pace.step(done, total)
        if self.task is not None:
            self.progress.update(
                self.task,
                total=max(self.pace.blocks, self.pace.done + 1),
                completed=self.pace.done + done / total,
                description=f"{self._description()}, step {done}/{total}",
            )

    def block(self, index: int, report: Mapping[str, Any]) -> None:
        """Print the block's line above the bar."""
        self.pace.block(index, report)
        self.progress.console.print(f"{self.label}{_block_line(index, self.pace.blocks, report)}")
        if self.task is not None:
            self.progress.update(self.task, completed=self.pace.done, description=self._description())

    def done(self, report: Report) -> None:
        """The summary is printed after it."""

    def _description(self) -> str:
        block, blocks = self.pace.done + 1, self.pace.blocks
        return f"{self.label}block {block}/{blocks}" if block <= blocks else f"{self.label}all blocks"


def print_report(report: Report, out: Path, recipe: str | None = None) -> None:
    """Print what a person wants to know of a finished run; ``recipe`` is the name or the file of the recipe."""
    console = plain_console()
    outcome(console, _outcome(report), good=ruined(report) is None)
    console.print()
    facts(console, _facts(report, out, recipe))
    if advice := advise(report):
        say(console, f"\nTo try next: {advice[0]}")
    say(console, f"\nCharts, and what else to try: {out / PAGE}")
    print_loading(report.outputs, out)
    if served := _served(report.outputs, out):
        next_command(console, "serve it", served)
        return
    first = out / report.outputs[0].directory
    if not any(is_of_tokenizer(path.name) for path in first.iterdir()):
        say(console, "\nThe model came without a tokenizer: to read text, its files have to be put beside the weights.")
        next_command(console, "look at what was written", command_line("swquant", "inspect", first))
        return
    measure = command_line("swquant", "eval", first, "--reference", report.source, "--text", "wikitext2")
    next_command(console, "measure it on another text (WikiText-2 from the hub, or a file of yours)", measure)


def _outcome(report: Report) -> str:
    output, quality = report.outputs[0], report.quality
    sizes = f"{size(report.bytes_source)} -> {size(output.bytes)}"
    lost = ""
    if quality is not None:
        lost = f", perplexity {quality.perplexity_reference:.2f} -> {quality.perplexity:.2f}"
    return f"Quantized {PurePath(report.source).name} to {report.bits_per_weight:.2f} bits per weight: {sizes}{lost}"


def print_converted(outputs: Sequence[Output], model: str, out: Path) -> None:
    """Print what ``swquant convert`` wrote."""
    console = plain_console()
    for output in outputs:
        outcome(
            console, f"Wrote {out / output.directory} ({output.format}), {size(output.bytes)}: the codes of {model}"
        )
        say(console, f"Read back: {opened(output)}")
    print_loading(outputs, out)
    if served := _served(outputs, out):
        next_command(console, "serve it", served)
    else:
        next_command(console, "see what it holds", command_line("swquant", "inspect", out / outputs[0].directory))


def print_loading(outputs: Sequence[Output], out: Path) -> None:
    """Print how each output in ``out`` is loaded."""
    console = plain_console()
    for output in outputs:
        place = out / output.directory
        say(console, f"\nTo load {place} ({output.format}):")
        console.print(f"\npath = {str(place)!r}\n{output.loading}", soft_wrap=True)


def _served(outputs: Sequence[Output], out: Path) -> str | None:
    """The command that serves the first output that has one."""
    commands = ((output.command, out / output.directory) for output in outputs)
    found = next(((command, place) for command, place in commands if command is not None), None)
    return None if found is None else found[0].replace("PATH", shlex.quote(str(found[1])))


def print_inspection(found: Inspection) -> None:
    """Print what a quantized model holds."""
    console = plain_console()
    quantized, plain = found.parameters
    symmetry = "symmetric" if found.symmetric else "asymmetric"
    outcome(console, f"{found.directory}: {found.format}, {found.model_type}, {found.grid} {symmetry}")
    say(
        console,
        f"{quantized:,} quantized weights and {plain:,} other values in {size(found.file_bytes)}, "
        f"{found.entropy:.3f} bits of entropy per code",
    )
    console.print()
    table = Table(box=None, pad_edge=False)
    for title in ("weights", "count", "shape", "entropy", "saturated", "least scale", "greatest"):
        table.add_column(title, justify="left" if title == "weights" else "right")
    for kind in found.kinds:
        shape, ends = f"{kind.shape[0]} x {kind.shape[1]}", f"{100 * kind.ends:.1f} %"
        scales = (f"{value:.3g}" for value in kind.scale)
        table.add_row(kind.name, str(kind.count), shape, f"{kind.entropy:.3f}", ends, *scales)
    console.print(table)
    measure = command_line("swquant", "eval", found.directory, "--text", "bundled")
    next_command(console, "measure it (--reference ORIGINAL adds KL)", measure)


def print_measured(found: Measured, reference: str | None) -> None:
    """Print what was measured of one model, and against ``reference`` if there was one."""
    console = plain_console()
    outcome(console, _measured_outcome(found))
    console.print()
    rows = [("model", found.model)]
    rows += _text_facts(found.text) if found.text is not None else ()
    for task in found.tasks:
        others = "".join(f", {name} {value:.4f}" for name, value in task.metrics.items() if name != task.metric)
        rows.append((task.task, f"{task.metric} {task.value:.4f}{others} ({task.items} items)"))
    facts(console, rows)
    if found.text is not None:
        say(console, "\nBy position in the window:")
        console.print(_positions(found.text))
    if found.tasks:
        versions = ", ".join(f"{task.task} {task.version}" for task in found.tasks)
        say(console, f"lm-eval {found.tasks[0].harness}; {versions}")
    for note in found.notes:
        say(console, f"note: {note}")
    if reference is not None:
        convert = command_line("swquant", "convert", found.model, "--for", "llama.cpp", "--out", "DIRECTORY")
        next_command(console, "write it for another runtime", convert)
    elif found.text is not None:
        again = command_line("swquant", "eval", found.model, "--text", found.text.text, "--reference", "ORIGINAL")
        next_command(console, "compare it with its original", again)


def _measured_outcome(found: Measured) -> str:
    name, text = PurePath(found.model).name, found.text
    if text is None:
        return f"{name}: " + ", ".join(f"{task.task} {task.metric} {task.value:.4f}" for task in found.tasks)
    before = "" if text.reference_perplexity is None else f"{text.reference_perplexity:.2f} -> "
    kl = "" if text.kl is None else f", KL {text.kl:.3f} nats per token"
    return f"{name}: perplexity {before}{text.perplexity:.2f}{kl}"


def print_gain(gain: Gain) -> None:
    """Print what some models recover of what others lost."""
    console = plain_console()
    outcome(console, _gain_outcome(gain))
    console.print()
    table = Table(box=None, pad_edge=False)
    for title in ("", "without", "with", "original", "recovered", "interval"):
        table.add_column(title, justify="left" if not title else "right")
    for name, found in gain.recovered.items():
        means = [f"{value:.4f}" for value in (found.without, found.with_, found.full)]
        share = "nothing was lost" if found.value is None else f"{found.value:.1%}"
        ends = "unbounded" if found.low is None or found.high is None else f"{found.low:.1%} to {found.high:.1%}"
        table.add_row(name, *means, share, ends)
    console.print(table)
    some = next(iter(gain.recovered.values()))
    over = "windows, items and seeds" if max(some.seeds) > 1 else "windows and items; with one seed, not over seeds"
    say(console, f"{some.level:.0%} intervals over {over}")
    for note in dict.fromkeys(note for model in (*gain.models, *gain.baselines) for note in model.notes):
        say(console, f"note: {note}")


def _gain_outcome(gain: Gain) -> str:
    name, found = next(iter(gain.recovered.items()))
    return f"{name}: " + (
        "nothing was lost" if found.value is None else f"{found.value:.1%} of what was lost is recovered"
    )


def _text_facts(result: Evaluation) -> Iterator[tuple[str, str]]:
    yield "text", f"{result.text}, {result.windows} windows of {result.context} tokens"
    if result.reference_perplexity is not None:
        yield "perplexity of the original", f"{result.reference_perplexity:.4f}"
    yield "perplexity", f"{result.perplexity:.4f}"
    if result.kl is not None and result.reverse_kl is not None:
        yield "KL to the original", f"{result.kl:.4f} nats per token; reverse {result.reverse_kl:.4f}"
    if result.top1 is not None and result.top5 is not None:
        same = f"{100 * result.top1:.1f} % of tokens; {100 * result.top5:.1f} % of the first five"
        yield "top-1 agreement", same


def _positions(result: Evaluation) -> Table:
    compared = result.kl is not None
    table = Table(box=None, pad_edge=False)
    for title in ("position", "nats", *(("original", "KL") if compared else ())):
        table.add_column(title, justify="right")
    for bucket in result.positions:
        place = f"{bucket.first}-{bucket.last}" if bucket.last > bucket.first else str(bucket.first)
        values = (bucket.nll, bucket.reference_nll, bucket.kl)
        table.add_row(place, *(f"{value:.4f}" for value in values if value is not None))
    return table


def _facts(report: Report, out: Path, recipe: str | None) -> Iterator[tuple[str, str]]:
    yield "output", str(out)
    for output in report.outputs:
        saved = report.bytes_source / max(1, output.bytes)
        sizes = f"{size(report.bytes_source)} -> {size(output.bytes)} ({saved:.2f} times smaller)"
        whole = report.whole_bits(output)
        over = "" if whole is None else f", {whole:.2f} bits per weight over all of it"
        yield "size", f"{sizes}, {output.format}{over}"
        yield "read back", opened(output)
    yield "bits per quantized weight", f"{report.bits_per_weight:.3f}, scales and zero points included"
    if len(report.grids) > 1:
        yield "matrices", in_words(report.grids)
    if report.quality:
        quality = report.quality
        yield "perplexity", f"{quality.perplexity_reference:.3f} -> {quality.perplexity:.3f} ({quality.tokens} tokens)"
        yield "KL to the original", f"{quality.kl:.4f} nats per token"
        yield "top-1 agreement", f"{100 * quality.top1:.1f} % of tokens"
    worst = max(range(len(report.blocks)), key=lambda index: report.blocks[index]["drift"])
    when = " before the end-to-end training" if report.finish else ""
    last = f"{report.blocks[-1]['drift']:.4f} after the last block, most after block {worst + 1}"
    yield f"relative error of hidden states{when}", last
    if report.finish is not None:
        finish = report.finish
        kept = f"epoch {finish['kept_epoch']} of {len(finish['curve'])}, {span(finish['seconds'])}"
        yield "end to end, validation KL", f"{finish['before']:.4g} -> {finish['after']:.4g} ({kept})"
    yield "time of blocks and training", span(report.seconds)
    for told in () if report.time is None else report.time.told:
        yield "time", told
    named = f"{recipe}: " if recipe else ""
    yield "recipe", f"{named}{report.recipe['method']}; all of it in swquant.yaml ({report.recipe_hash})"
    for text in (*notes_of(report), *report.events):
        yield "note", text


def _block_line(index: int, blocks: int, report: Mapping[str, Any]) -> str:
    losses = "".join(f", loss {phase['before']:.4g} -> {phase['after']:.4g}" for phase in report["phases"])
    events = sum(len(phase["events"]) for phase in report["phases"])
    trouble = f", {events} recoveries, told in the report" if events else ""
    return (
        f"block {index + 1}/{blocks}{losses}, relative error {report['drift']:.4f}, {report['seconds']:.1f} s{trouble}"
    )
