"""Other quantizers beside ours: the same model, calibration tokens, bits, groups and evaluation windows.

    python benchmarks/peers.py MODEL_DIR --calibration TEXT --evaluation TEXT --peer-python PATH --out results.json

The peer is auto-round (SignRound). It runs in an interpreter of its own, on the CPU in float32, without autocast or
torch.compile, with its default learning rates, blocks alone quantized. ``--steps 0`` is its round-to-nearest, which on
symmetric grids searches scales weighted by the calibration's activations unless the peer's options say
``{"disable_opt_rtn": true}``. Its weights come back dequantized in float32. ``--ours METHOD`` adds a row of swquant's,
read back from the file that it writes. All are measured by ``swquant.evaluation``. ``cpu_seconds`` is what the process
used, ``seconds`` the clock's, which other work on the machine stretches.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from swquant import Recipe, SwquantError, __version__, evaluate, quantize
from swquant.calibration import sample_windows
from swquant.checkpoint.reader import open_checkpoint
from swquant.corpus import read_text, tokenize
from swquant.model.calls import probe
from swquant.model.layout import lay_out
from swquant.model.opening import open_model
from swquant.quant.grid import group
from swquant.quant.spec import QuantSpec
from swquant.tokenizer import open_reading

PEER = "auto-round"
INSTALL = "python3 -m venv DIR && DIR/bin/pip install auto-round==0.16.1 torch==2.13.0 transformers==5.23.0"

CHILD = """
import json, sys, time
from importlib.metadata import version

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

job = json.load(open(sys.argv[1]))
tokens = load_file(job["tokens"])["tokens"]
model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, local_files_only=True)
tokenizer = AutoTokenizer.from_pretrained(job["model"], local_files_only=True)
began, used = time.monotonic(), time.process_time()
model, _ = AutoRound(
    model,
    tokenizer=tokenizer,
    dataset=[{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens.split(1)],
    device_map="cpu",
    amp=False,
    enable_torch_compile=False,
    low_cpu_mem_usage=False,
    **job["settings"],
).quantize()
answer = {
    "version": version("auto-round"),
    "torch": torch.__version__,
    "threads": torch.get_num_threads(),
    "seconds": round(time.monotonic() - began, 1),
    "cpu_seconds": round(time.process_time() - used, 1),
}
dtypes = {str(parameter.dtype) for parameter in model.parameters()}
assert dtypes == {"torch.float32"}, dtypes
model.save_pretrained(job["out"])
json.dump(answer, open(job["answer"], "w"))
"""


def require_peer(python: str | None) -> None:
    """Check that ``python`` is an interpreter that has the peer.

    Raises:
        SwquantError: If it is none, or has not.
    """
    if python is None:
        raise SwquantError(f"nothing to run: give --ours METHOD, or --peer-python, made with: {INSTALL}")
    command = [python, "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('auto_round') is None)"]
    try:
        found = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError as error:
        raise SwquantError(f"{python} is no Python interpreter ({error.strerror}); make one with: {INSTALL}") from error
    if not found:
        raise SwquantError(f"{python} has no {PEER}; make an interpreter that has it with: {INSTALL}")


def calibration_rows(args: argparse.Namespace) -> Tensor:
    """The tokens that ``swquant.quantize`` takes from the same text, ``int64 [samples, seq_len]``."""
    reading = open_reading(args.model)
    tokens = tokenize(reading.tokenizer, read_text(args.calibration))
    return sample_windows(tokens, args.samples, args.seq_len, args.seed, reading.begin)


def run_peer(args: argparse.Namespace, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Quantize with the peer; returns the directory of the dequantized model and what the peer says of itself."""
    tokens, job, answer, out = (folder / name for name in ("tokens.safetensors", "job.json", "answer.json", "peer"))
    save_file({"tokens": calibration_rows(args).contiguous()}, tokens)
    settings = {
        "bits": args.bits,
        "group_size": args.group_size,
        "sym": args.symmetric,
        "iters": args.steps,
        "nsamples": args.samples,
        "seqlen": args.seq_len,
        "batch_size": args.batch_size,
        "seed": args.seed,
        **args.peer_options,
    }
    paths = {"tokens": tokens, "model": args.model.resolve(), "answer": answer, "out": out}
    job.write_text(json.dumps({name: str(path) for name, path in paths.items()} | {"settings": settings}))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [args.peer_python, "-c", CHILD, str(job)],
        cwd=folder,
        env=environment,
        stdout=sys.stderr,
        check=False,
    )
    if done.returncode:
        raise SwquantError(f"{PEER} ended with exit code {done.returncode}; its own messages are above")
    original = open_checkpoint(args.model)
    for path in original.sidecars():
        shutil.copy(path, out)
    check_weights(args, out)
    own = {"steps": args.steps, "batch_size": args.batch_size, "options": args.peer_options}
    return out, own | json.loads(answer.read_text())


def check_weights(args: argparse.Namespace, out: Path) -> None:
    """Check that every linear of the blocks lies on a grid of the asked width, and all else is as it was."""
    original, result = open_checkpoint(args.model), open_checkpoint(out)
    model = open_model(original)
    probe(model.skeleton)
    spec = QuantSpec(args.bits, args.group_size, args.symmetric)
    linears = model.skeleton.names.keys_of(site.weight for site in lay_out(model.skeleton, spec).sites)
    if not linears <= original.tensors.keys():
        raise SwquantError(f"{args.model} lacks linears of its blocks")
    for name in original.tensors:
        weight = result.read(name).float() if result.has(name) else None
        if name in linears:
            good = weight is not None and most_levels(weight, spec) <= 2**args.bits
        else:
            good = weight is None or torch.equal(weight, original.read(name).float())
        if not good:
            raise SwquantError(f"{PEER} returned {name} off the {args.bits}-bit grid, or changed what it should not")


def most_levels(weight: Tensor, spec: QuantSpec) -> int:
    """The greatest number of different values in a group."""
    values = group(weight, spec).sort(dim=-1).values
    return int((values.diff(dim=-1) != 0).sum(-1).max()) + 1


def run_ours(args: argparse.Namespace, method: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Quantize with swquant; the answer has the form of the peer's."""
    options = dict(args.ours_options) if method != "rtn" else {}
    recipe = Recipe(
        bits=args.bits,
        group_size=args.group_size,
        symmetric=args.symmetric,
        method=method,
        loss=options.pop("loss", "mse"),
        epochs=options.pop("epochs", None),
        options=options,
        calibration=args.calibration,
        samples=args.samples,
        seq_len=args.seq_len,
        evaluation_samples=0,
        seed=args.seed,
        device="cpu",
    )
    out, began, used = folder / method, time.monotonic(), time.process_time()
    quantize(recipe, args.model, out)
    return out, {
        "steps": None,
        "batch_size": None,
        "options": args.ours_options if method != "rtn" else {},
        "version": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time() - used, 1),
    }


def measured(args: argparse.Namespace, peer: str, out: Path, answer: dict[str, Any]) -> dict[str, Any]:
    """One row: what was run, and how far the result is from the text and from the original."""
    found = evaluate(
        out, args.evaluation, reference=args.model, context=args.seq_len, windows=args.windows, device="cpu"
    )
    return {
        "peer": peer,
        "version": answer["version"],
        "torch": answer["torch"],
        "model": args.model.resolve().name,
        "bits": args.bits,
        "group": args.group_size,
        "symmetric": args.symmetric,
        "samples": args.samples,
        "seq_len": args.seq_len,
        "steps": answer["steps"],
        "batch_size": answer["batch_size"],
        "options": answer["options"],
        "dtype": "float32",
        "seed": args.seed,
        "windows": found.windows,
        "perplexity_original": found.reference_perplexity,
        "perplexity": found.perplexity,
        "kl": found.kl,
        "top1": found.top1,
        "threads": answer["threads"],
        "seconds": answer["seconds"],
        "cpu_seconds": answer["cpu_seconds"],
    }


def run(args: argparse.Namespace) -> None:
    methods: list[str | None] = [*args.ours]
    if args.peer_python is not None or not methods:
        require_peer(args.peer_python)
        methods.insert(0, None)
    rows = json.loads(args.out.read_text()) if args.append and args.out.exists() else []
    with tempfile.TemporaryDirectory(prefix="swquant-peers-") as folder:
        for method in methods:
            peer = PEER if method is None else f"swquant {method}"
            done = run_peer(args, Path(folder)) if method is None else run_ours(args, method, Path(folder))
            rows.append(measured(args, peer, *done))
            print(json.dumps(rows[-1]), flush=True)
            args.out.write_text(json.dumps(rows, indent=1) + "\n")


def interpreter(name: str) -> str:
    """A path that holds from any directory, links unresolved; a bare name is looked up as the shell does."""
    return str(Path(name).absolute()) if os.sep in name else name


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=64)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--symmetric", dest="symmetric", action="store_true", default=True)
    kind.add_argument("--asymmetric", dest="symmetric", action="store_false")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--windows", type=int, default=64, help="evaluation windows of --seq-len tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--peer-python", type=interpreter, help=f"an interpreter that has {PEER}; without it --ours alone"
    )
    parser.add_argument("--peer-options", type=json.loads, default={}, help="JSON, further arguments of AutoRound")
    parser.add_argument("--ours", nargs="*", default=[], metavar="METHOD", help="methods of swquant to run as well")
    parser.add_argument("--ours-options", type=json.loads, default={}, help="JSON: loss, epochs, a method's options")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--append", action="store_true", help="add to the rows in --out")
    return parser.parse_args()


def main() -> int:
    try:
        run(parsed())
    except SwquantError as error:
        print(f"peers: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
