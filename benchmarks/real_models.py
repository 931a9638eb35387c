"""Trained models, quantized by the command line, in other people's runtimes: is perplexity there what we say it is?

    python benchmarks/wheel_model.py smollm2 MODELS/smollm2 --text valid.txt test.txt    # and the other three
    python benchmarks/real_models.py MODELS [--models smollm2 ...] [--windows 16] [--out FILE]

Each model of ``wheel_model.py`` is quantized at 2 and 4 bits in groups of 64, which divides all of their widths, by
``gptq`` on 16 samples of 256 tokens; SmolLM2 and Gemma 3 also at 2 bits by the fast preset, with its own number of
samples. The run's own report says the perplexity of the first windows of 256 tokens of the evaluation text. The same
windows then go through plain transformers, which loads compressed-tensors and plain weights, in float32, and through
llama.cpp (``node_llama_cpp.py``) with the GGUF file. A difference above 0.5 % is marked. A format that is refused is
left out and its sentence kept; so is a model that is refused.

Every run and every measurement is a process of its own, on one thread. Finished cases stay in the results' file and are
not repeated; those that were refused or failed are. A run that was stopped goes on from its last block: its folder in
``--work`` stays until its case is finished.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "real_models.json"
MODELS = ("smollm2", "gemma3-270m", "qwen2.5-0.5b", "qwen2.5-coder-1.5b")
SAMPLES, LENGTH = 16, 256
TOLERANCE = 0.005
"""Of a perplexity, relative to the report's."""

RUNTIMES = {"compressed_tensors": "transformers", "dequantized": "transformers", "gguf": "llama.cpp"}
"""What loads each format."""


@dataclass(frozen=True)
class Case:
    """A model and how it is quantized: ``gptq``, or ``fast`` for the preset."""

    model: str
    bits: int
    recipe: str

    @property
    def name(self) -> str:
        """Its key in the results."""
        return f"{self.model} W{self.bits} {self.recipe}"

    def flags(self) -> list[str]:
        """Of the command line."""
        grid = ["--bits", str(self.bits), "--group-size", "64"]
        data = ["--preset", "fast"] if self.recipe == "fast" else ["--method", self.recipe, "--samples", str(SAMPLES)]
        return [*grid, *data, "--seq-len", str(LENGTH)]


def cases_of(models: Sequence[str]) -> list[Case]:
    plain = [Case(model, bits, "gptq") for model in models for bits in (2, 4)]
    return plain + [Case(model, 2, "fast") for model in models if model in ("smollm2", "gemma3-270m")]


def main() -> None:
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(sys.argv[2], *map(Path, sys.argv[3:7]), int(sys.argv[7]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with a folder of wheel_model.py for each model")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--recipes", nargs="+", choices=("gptq", "fast"), default=("gptq", "fast"))
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--runtime", type=Path, default=Path(tempfile.gettempdir()) / "swquant-node-llama-cpp")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "swquant-real-models")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    results: dict[str, Any] = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    for case in cases_of(args.models):
        known = results.get(case.name, {})
        # entries of before the tokens were those of tokenizer.json tell nothing of how text was read
        done = known.get("windows") == args.windows and "reading" in known and not known["problems"]
        if case.recipe in args.recipes and not done:
            scratch = args.work.resolve() / case.name.replace(" ", "-")
            scratch.mkdir(parents=True, exist_ok=True)
            folder = args.folder.resolve() / case.model
            results[case.name] = run(case, folder, args.windows, args.runtime.resolve(), scratch)
            args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            shutil.rmtree(scratch)
    show(results)


def run(case: Case, folder: Path, windows: int, runtime: Path, scratch: Path) -> dict[str, Any]:
    """Quantize, leaving out the formats that are refused, and measure what was written in each runtime."""
    started, out, problems = time.monotonic(), scratch / "out", {}
    formats = list(RUNTIMES)
    refusal = quantize(case, folder, out, formats, windows)
    while refusal is not None and len(formats) > 1:  # before any work; perhaps of the last format only
        problems[formats.pop(-1 if len(formats) == len(RUNTIMES) else 0)] = refusal
        refusal = quantize(case, folder, out, formats, windows)
    if refusal is not None:
        return {"windows": windows, "seconds": time.monotonic() - started, "problems": {"swquant": refusal}}
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    found: dict[str, float] = {}
    for written in report["outputs"]:
        answer = measured(written["format"], out / written["directory"], folder, runtime, windows)
        if isinstance(answer, str):
            problems[written["format"]] = answer
        else:
            found[written["format"]] = answer
    quality = {name: report["quality"][name] for name in ("perplexity_reference", "perplexity", "kl")}
    told = {"reading": report["reading"], "runtimes": found, "problems": problems}
    return {"windows": windows, "seconds": report["seconds"], **quality, **told}


def quantize(case: Case, folder: Path, out: Path, formats: Sequence[str], windows: int) -> str | None:
    """Run the command line; the sentence of its refusal, or nothing."""
    command = [sys.executable, "-m", "swquant", "quantize", str(folder / "model"), "--out", str(out)]
    command += ["--format", ",".join(formats), "--device", "cpu", "--calibration", str(folder / "calibration.txt")]
    command += ["--evaluation", str(folder / "evaluation.txt"), "--evaluation-samples", str(windows)]
    return sentence_of([*command, *case.flags()])


def sentence_of(command: Sequence[str]) -> str | None:
    """Run a command; what it says at last if it fails."""
    done = subprocess.run(command, env=one_thread(), capture_output=True, text=True)
    return None if done.returncode == 0 else last_words(done.stderr)


def measured(form: str, place: Path, folder: Path, runtime: Path, windows: int) -> float | str:
    """The perplexity that a format's runtime finds, or why it finds none."""
    command = [sys.executable, __file__, "measure", form, str(place), str(folder / "model")]
    command += [str(folder / "evaluation.txt"), str(runtime), str(windows)]
    done = subprocess.run(command, env=one_thread(), capture_output=True, text=True)
    return last_words(done.stderr) if done.returncode else float(done.stdout.strip().splitlines()[-1])


def last_words(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    starts = [index for index, line in enumerate(lines) if line.startswith("swquant:")]
    return (
        " ".join(lines[starts[-1] :] if starts else lines[-1:]).removeprefix("swquant: ")[:600]
        or "it died without a word"
    )


def one_thread() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "COLUMNS": "999",
    }


def measure(form: str, place: Path, source: Path, text: Path, runtime: Path, count: int) -> float:
    """The perplexity of the evaluation's windows, on the original's tokens."""
    import torch

    from swquant.calibration import eval_windows
    from swquant.corpus import read_text, tokenize
    from swquant.tokenizer import open_reading

    reading = open_reading(source)
    windows = eval_windows(tokenize(reading.tokenizer, read_text(str(text))), LENGTH, count, reading.begin)
    if RUNTIMES[form] == "llama.cpp":
        import node_llama_cpp

        (file,) = place.glob("*.gguf")
        folder = node_llama_cpp.install(runtime)
        return float(node_llama_cpp.log_probabilities(folder, file, windows).mean().neg().exp())
    from transformers import AutoModelForCausalLM

    import wheel_model

    model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, local_files_only=True).eval()
    with torch.no_grad():
        return float(torch.stack([wheel_model.scores(model, window) for window in windows]).mean().neg().exp())


def show(results: Mapping[str, Mapping[str, Any]]) -> None:
    forms = [f"{form}, {runtime}" for form, runtime in RUNTIMES.items()]
    print("| | original | ours | " + " | ".join(forms) + " | s |\n|---|" + "---:|" * (3 + len(forms)))
    for name, result in results.items():
        cells = [cell(form, result) for form in RUNTIMES]
        ours = [f"{result[key]:.3f}" if key in result else "" for key in ("perplexity_reference", "perplexity")]
        print(f"| {' | '.join([name, *ours, *cells, format(result['seconds'], '.0f')])} |")
    problems = {name: result.get("problems", {}) for name, result in results.items()}
    notes = [f"- {name}, {what}: {why}" for name, found in problems.items() for what, why in found.items()]
    print("\n" + "\n".join(notes) if notes else "")


def cell(form: str, result: Mapping[str, Any]) -> str:
    """A runtime's perplexity and its distance from ours, bold where that is too far."""
    if form not in result.get("runtimes", {}):
        return "none"
    found, ours = result["runtimes"][form], result["perplexity"]
    distance = found / ours - 1
    text = f"{found:.3f} ({distance:+.2%})"
    return text if abs(distance) <= TOLERANCE else f"**{text}**"


if __name__ == "__main__":
    main()
