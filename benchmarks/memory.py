"""Peak memory of a run on random LLaMAs of width 1024 with few and with many blocks.

    python benchmarks/memory.py

Each run is a process of its own; its peak resident memory is compared with that of an interpreter that has imported
what a run imports, and with that of the same run on a model of width 64, which has touched the same code, libraries and
threads. glibc keeps most of what is freed; a run with a budget (`--host-memory`, here more than there is) tells it to
give large pieces back, so it holds what is in use. Samples are random tokens, for drawing them from the model would
hold all of it. The bound is two blocks in float32 and the cached hidden states. Seconds are the processor's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from swquant.checkpoint.writer import write_checkpoint

WIDTH, INNER, SAMPLES, TOKENS = 1024, 2816, 4, 512
RESULTS = Path(__file__).parent / "results" / "memory.json"
CHILD = """
import resource, sys, torch
import swquant.run as run
from swquant.estimate.budget import Budget
from swquant.recipe import Recipe

torch.set_num_threads(1)
if len(sys.argv) > 1:
    source, out, samples, tokens, host = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
    text = torch.randint(2, 256, (samples, tokens), generator=torch.Generator().manual_seed(0))
    run.draw_from_model = lambda *_: text
    recipe = Recipe(calibration="self", samples=samples, seq_len=tokens, epochs=1, evaluation_samples=0, device="cpu",
                    precision="float32")
    run.quantize(recipe, source, out, budget=Budget(host=host) if host else None)
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_maxrss * 1024, used.ru_utime + used.ru_stime)
"""
HOST = 1 << 40


def peak(*arguments: str) -> tuple[int, float]:
    """Bytes and seconds of a process."""
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], check=True, capture_output=True, text=True)
    held, seconds = done.stdout.split()[-2:]
    return int(held), float(seconds)


def make(
    folder: Path,
    blocks: int,
    tokens: int = TOKENS,
    width: int = WIDTH,
    *,
    inner: int | None = None,
    vocabulary: int = 256,
) -> Path:
    """Write block by block, so that this process needs little memory too."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner or INNER * width // WIDTH // 64 * 64,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        max_position_embeddings=tokens,
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    rng = torch.Generator().manual_seed(0)
    parts = (
        {name: (torch.randn(value.shape, generator=rng) * 0.02).bfloat16()} for name, value in model.named_parameters()
    )
    write_checkpoint(folder, parts, config=config.to_dict())
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[6, 24])
    block = 4 * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)
    streams = 5 * SAMPLES * TOKENS * WIDTH * 4
    base, _ = peak()
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small"
        make(small / "model", 1, width=64)
        small_runs = {
            host: peak(str(small / "model"), str(small / f"out-{host}"), str(SAMPLES), str(TOKENS), str(host))[0]
            for host in (0, HOST)
        }
        for blocks in parser.parse_args().blocks:
            make(Path(folder) / str(blocks), blocks)
            for host, small_run in small_runs.items():
                place = Path(folder) / f"out-{blocks}-{host}"
                found, seconds = peak(str(Path(folder) / str(blocks)), str(place), str(SAMPLES), str(TOKENS), str(host))
                over = [round((found - less - streams) / block, 2) for less in (base, small_run)]
                row = {"blocks": blocks, "budget": host > 0, "mb": round(found / 1e6), "seconds": round(seconds)}
                rows.append({**row, "in_blocks_over_interpreter": over[0], "in_blocks_over_small_run": over[1]})
                print(json.dumps(rows[-1]), flush=True)
    result = {
        "interpreter_mb": round(base / 1e6),
        "small_run_mb": [round(held / 1e6) for held in small_runs.values()],
        "block_mb": round(block / 1e6),
        "streams_mb": round(streams / 1e6),
        "runs": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
