"""Which of transformers' text decoders swquant quantizes rightly: a tiny random model of every class, by measurement.

    python benchmarks/families.py --out benchmarks/results/families.json --markdown docs/families.md

For each causal-LM class, and each image-text class with text alone, a process of its own builds the tiny model of
``tests/tiny_models.py``, checks that transformers reads back what it writes, quantizes it with each of ``METHODS``,
loads plain weights and compressed-tensors with plain transformers and compares their logits with swquant's own. Classes
that stand in the results already are skipped (``--again`` measures them anew). ``NOT_DECODERS`` says what is left out,
and why.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import CompressedTensorsConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from families_left_out import NOT_DECODERS
from swquant import Recipe, SwquantError, quantize
from swquant.checkpoint.opening import open_source
from swquant.model.calls import Calls, Front, Tail, capture, probe
from swquant.model.opening import open_model
from swquant.quant.deferred import in_float
from tiny_models import KINDS, VOCABULARY, prose, tiny_model, write
from tiny_settings import VARIANTS

METHODS: Mapping[str, Mapping[str, Any]] = {
    "rtn": {"method": "rtn"},
    "gptq + block_ap": {"method": "gptq + block_ap", "epochs": 1},
}
GRID = {"bits": 4, "group_size": 32, "symmetric": True, "samples": 4, "seq_len": 32, "evaluation_samples": 0}
PLAIN, PACKED = "dequantized", "compressed_tensors"
TOLERANCE = 2e-3
"""Of logits, as a share of their deviation: what remains of float32 in another order of sums."""
NOISE = 1e-2
"""What 4-bit weights change at the least, as such a share; a model that changes less was not quantized."""
UNREADABLE = "not loaded"
"""What transformers cannot hold in compressed-tensors."""
UNPACKED = "dequantized"
"""What it loads with ``dequantize=True`` alone, because its code takes a layer's weight by itself."""
MARKS = ("<!-- families: begin -->", "<!-- families: end -->")


@dataclass(frozen=True)
class Entry:
    """A class of transformers: ``kind`` of ``KINDS``, model type, the class's name, and one of ``VARIANTS`` or none."""

    kind: str
    model_type: str
    name: str
    variant: str = ""

    @property
    def key(self) -> str:
        """The name of its result."""
        return f"{self.kind}:{self.shown}"

    @property
    def shown(self) -> str:
        """The model type, with the variant after a plus sign."""
        return f"{self.model_type}+{self.variant}" if self.variant else self.model_type

    def start(self) -> dict[str, Any]:
        """What its results begin with."""
        return {"kind": self.kind, "model_type": self.shown, "class": self.name}


def entries() -> list[Entry]:
    """Entries of both mappings that are text decoders; those of the same class and configuration count once."""
    found: dict[tuple[str, str], Entry] = {}
    for kind, (_, names) in KINDS.items():
        for model_type, name in names.items():
            entry = Entry(kind, model_type, name)
            if entry.key not in NOT_DECODERS:
                found.setdefault((name, CONFIG_MAPPING[model_type].__name__), entry)
    variants = [
        replace(entry, variant=name)
        for entry in found.values()
        if entry.kind == "causal"
        for name in VARIANTS.get(entry.model_type, {})
    ]
    return [*found.values(), *variants]


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits.float()


@torch.no_grad()
def our_logits(outputs: Mapping[str, Path], ids: Tensor) -> Tensor:
    """The quantized model's logits as our engine computes them: block by block, called as the model calls them."""
    model = open_model(open_source(outputs[PLAIN]))
    probe(model.skeleton)
    front = Front.load(model.skeleton, model.checkpoint, torch.device("cpu"))
    calls = Calls.prepare(front, model.checkpoint, ids)
    hidden = torch.stack(list(capture(front, model.checkpoint, ids)))
    samples = torch.arange(len(ids))
    for index, block in enumerate(model.skeleton.blocks):
        params = {name: model.checkpoint.read(f"{block.prefix}.{name}") for name in block.names()}
        hidden = block.forward(in_float(params), hidden, calls.of(index, samples))
    tail = Tail.load(front, model.checkpoint)
    return torch.stack([tail.logits(states) for states in hidden])


def their_logits(entry: Entry, folder: Path, ids: Tensor, **more: Any) -> Tensor:
    """The logits of plain transformers for what stands in ``folder``."""
    maker = KINDS[entry.kind][0]
    model = maker.from_pretrained(folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, **more)
    return logits_of(model.eval(), ids)


def difference(first: Tensor, second: Tensor) -> float:
    """The largest difference of two logits as a share of the first's standard deviation; infinite where not finite."""
    apart = (first - second).abs().max() / first.std()
    return apart.item() if torch.isfinite(apart) else float("inf")


def outcome_of(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``work`` returns, or how it ended: refused in a sentence, or with a traceback."""
    try:
        return work()
    except SwquantError as error:
        return {"outcome": "refused", "sentence": str(error)}
    except Exception as error:  # what is measured is whether there is any
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        return {"outcome": "traceback", "sentence": f"{type(error).__name__}: {str(error)[:300]} ({place})"}


def build(entry: Entry, folder: Path, ids: Tensor) -> dict[str, Any]:
    """Write the tiny model; it must give finite logits, and the same ones when it is read back."""
    settings = VARIANTS[entry.model_type][entry.variant] if entry.variant else {}
    model = tiny_model(entry.model_type, entry.kind, **settings)
    logits = logits_of(model, ids)
    if not torch.isfinite(logits).all():
        return {"outcome": "wrong", "sentence": "logits of the tiny model are not finite"}
    size = sum(value.numel() for value in model.parameters())
    write(folder, model)
    apart = difference(logits, their_logits(entry, folder, ids))
    text = model.config.get_text_config()
    facts = {"parameters": size, "layers": getattr(text, "num_hidden_layers", None), "difference": apart}
    if apart > TOLERANCE:
        return {"outcome": "wrong", "sentence": "transformers reads back another model than it wrote"} | facts
    return {"outcome": "works"} | facts


def written(source: Path, place: Path, method: str) -> tuple[dict[str, Path], str | None]:
    """Quantize ``source`` into both formats, or into plain weights alone where compressed-tensors is refused.

    Returns:
        The directory of each format, and the sentence that refused compressed-tensors.
    """
    text = place / "text.txt"
    text.write_text("".join(prose(60, seed) for seed in range(20)))
    base: dict[str, Any] = GRID | METHODS[method] | {"calibration": str(text), "device": "cpu"}
    try:
        quantize(Recipe(**base, format=f"{PACKED},{PLAIN}"), source, place / "both")
        return {name: place / "both" / name for name in (PACKED, PLAIN)}, None
    except SwquantError as error:
        refusal = str(error)
    # Where this is refused too, its sentence is the model's.
    quantize(Recipe(**base, format=PLAIN), source, place / "plain")
    return {PLAIN: place / "plain"}, refusal


def shares_of_blocks(source: Path, output: Path) -> list[int]:
    """How many matrices of a decoder's numbered blocks differ between two plain checkpoints, and how many there are."""
    before, after = _tensors(source), _tensors(output)
    names = [
        name
        for name, value in before.items()
        if value.dim() > 1 and re.search(r"\.\d+\.", name) and not re.search(r"vis|vit|audio|image|qformer", name)
    ]
    changed = [name for name in names if name not in after or not torch.equal(before[name], after[name])]
    return [len(changed), len(names)]


def _tensors(folder: Path) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            out |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return out


def judged(ours: Tensor, theirs: Tensor, source: Tensor) -> dict[str, Any]:
    apart, moved = difference(ours, theirs), difference(source, theirs)
    facts = {"difference": apart, "moved": moved}
    if apart > TOLERANCE:
        return {"outcome": "wrong", "sentence": f"logits differ by {apart:.2g} of their deviation"} | facts
    if moved < NOISE:
        return {"outcome": "wrong", "sentence": f"logits moved by {moved:.2g} of their deviation only"} | facts
    return {"outcome": "works"} | facts


def measure(entry: Entry, source: Path, place: Path, method: str, ids: Tensor) -> dict[str, Any]:
    """Quantize one model by one method and compare: ``outcome`` is that of plain weights."""
    place.mkdir()
    outputs, refusal = written(source, place, method)
    ours, before = our_logits(outputs, ids), their_logits(entry, source, ids)
    result = outcome_of(lambda: judged(ours, their_logits(entry, outputs[PLAIN], ids), before))
    result["matrices"] = shares_of_blocks(source, outputs[PLAIN])
    if refusal is not None:
        return result | {PACKED: {"outcome": "refused", "sentence": refusal}}
    packed = outcome_of(lambda: judged(ours, their_logits(entry, outputs[PACKED], ids), before))
    if packed["outcome"] == "traceback":  # raised by transformers, which alone works in there
        whole = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
        packed["outcome"] = UNREADABLE
        unpacked = outcome_of(lambda: judged(ours, their_logits(entry, outputs[PACKED], ids, **whole), before))
        if unpacked["outcome"] == "works":
            packed |= unpacked | {"outcome": UNPACKED}
    return result | {PACKED: packed}


def run(entry: Entry, methods: Iterable[str]) -> dict[str, Any]:
    """Everything about one class."""
    place = Path(tempfile.mkdtemp(prefix="families-"))
    ids = torch.randint(2, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    try:
        record = entry.start()
        record["build"] = outcome_of(lambda: build(entry, place / "model", ids))
        if record["build"]["outcome"] == "traceback":
            # Transformers' own, for instance where a class needs a package that is not installed.
            record["build"]["outcome"] = "not built"
        if record["build"]["outcome"] == "works":
            for index, method in enumerate(methods):
                work = place / f"work-{index}"
                record[method] = outcome_of(lambda: measure(entry, place / "model", work, method, ids))  # noqa: B023
                shutil.rmtree(work, ignore_errors=True)
        return json.loads(json.dumps(record).replace(str(place), "..."))
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _child(entry: Entry, methods: tuple[str, ...], memory: float, pipe: Any) -> None:
    limit = int(memory * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    pipe.send(run(entry, methods))
    pipe.close()


def apart(entry: Entry, methods: tuple[str, ...], memory: float, timeout: float) -> dict[str, Any]:
    """:func:`run` in a forked process, which may take so many GiB and seconds."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    worker = context.Process(target=_child, args=(entry, methods, memory, sending))
    worker.start()
    sending.close()
    try:
        return receiving.recv() if receiving.poll(timeout) else _ended(entry, f"took more than {timeout:.0f} seconds")
    except EOFError:
        worker.join()
        return _ended(entry, f"the process ended with code {worker.exitcode}")
    finally:
        if worker.is_alive() and not receiving.closed:
            worker.kill()
        worker.join()
        receiving.close()


def _ended(entry: Entry, sentence: str) -> dict[str, Any]:
    failed = {"outcome": "traceback", "sentence": sentence}
    return entry.start() | {"build": failed}


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of all results, after a sentence that counts them."""
    lines = [summary(results), "", f"| class | model type | {' | '.join(METHODS)} | compressed-tensors |"]
    lines.append("|---|---|---|---|---|")
    notes: list[str] = []

    def cell(part: Mapping[str, Any] | None) -> str:
        if part is None:
            return ""
        if part["outcome"] == "works":
            return "works"
        if part["sentence"] not in notes:
            notes.append(part["sentence"])
        return f"{part['outcome']} [{notes.index(part['sentence']) + 1}]"

    for record in sorted(results.values(), key=lambda record: (record["class"].lower(), record["model_type"])):
        name = f"| `{record['class']}` | `{record['model_type']}` |"
        if record["build"]["outcome"] != "works":
            lines.append(f"{name} {cell(record['build'])} | | |")
            continue
        plain = [cell(record.get(method)) for method in METHODS]
        packed = [record[method][PACKED] for method in METHODS if PACKED in record.get(method, {})]
        # One word for both methods: the worse of them.
        packed.sort(key=lambda part: part["outcome"] == "works")
        lines.append(f"{name} {' | '.join(plain)} | {cell(packed[0] if packed else None)} |")
    lines += ["", *(f"{index + 1}. {' '.join(note.replace('|', '/').split())}" for index, note in enumerate(notes))]
    lines += ["", "Left out, since they are no decoders of text:", ""]
    reasons: dict[str, list[str]] = {}
    for key, reason in NOT_DECODERS.items():
        reasons.setdefault(reason, []).append(f"`{key.split(':')[1]}`")
    return "\n".join([*lines, *(f"- {reason}: {', '.join(dict.fromkeys(names))}" for reason, names in reasons.items())])


def summary(results: Mapping[str, Mapping[str, Any]]) -> str:
    """How many classes were built and, of these, how each method ended."""
    built = [record for record in results.values() if record["build"]["outcome"] == "works"]
    text = [f"transformers {transformers.__version__}: {len(built)} of {len(results)} classes were built."]
    for method in METHODS:
        done = [record[method] for record in built if method in record]
        packed = [part[PACKED] for part in done if PACKED in part]
        for name, parts in ((f"`{method}`", done), (f"`{method}` in compressed-tensors", packed)):
            counts = sorted(Counter(part["outcome"] for part in parts).items())
            text.append(f"{name}: {', '.join(f'{count} {outcome}' for outcome, count in counts) or 'not measured'}.")
    return " ".join(text)


def show(results: Mapping[str, Mapping[str, Any]], page: Path) -> None:
    """Write the table between the marks in ``page``."""
    text = page.read_text()
    start, end = text.index(MARKS[0]) + len(MARKS[0]), text.index(MARKS[1])
    page.write_text(f"{text[:start]}\n\n{markdown(results)}\n\n{text[end:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types, classes or kind:model_type; all by default")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--markdown", type=Path, help="a page with marks, between which the table is written")
    parser.add_argument("--again", action="store_true", help="measure what stands in the results already")
    parser.add_argument("--build-only", action="store_true", help="quantize nothing")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for a class")
    parser.add_argument("--memory", type=float, default=10, help="GiB of address space for a class")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    methods = () if options.build_only else tuple(METHODS)
    results: dict[str, dict[str, Any]] = json.loads(options.out.read_text()) if options.out.is_file() else {}
    for entry in entries():
        done = results.get(entry.key)
        chosen = not options.names or {entry.key, entry.shown, entry.name} & set(options.names)
        finished = done is not None and (done["build"]["outcome"] != "works" or all(name in done for name in methods))
        if not chosen or (finished and not options.again):
            continue
        results[entry.key] = apart(entry, methods, options.memory, options.timeout)
        parts = {name: results[entry.key].get(name, {}) for name in ("build", *methods)}
        print(entry.key, *(f"{name}: {part.get('outcome')}" for name, part in parts.items()), flush=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(summary(results))
    if options.markdown:
        show(results, options.markdown)


if __name__ == "__main__":
    main()
