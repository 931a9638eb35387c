"""What `plan` says of LLaMA-2-70B where 24 GiB are there for a block at work: its state and its batch, by method.

    python benchmarks/plan_70b.py

The model is the configuration and headers of bfloat16 weights alone, holes in sparse files; no weight is read. 2 bits
in groups of 128, 128 samples of 2048 tokens, on a CPU, whose interpreter takes half a GB of the budget. A batch is cut
into micro-batches only where the whole of it does not fit.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from swquant.demo import ASSETS
from swquant.estimate import estimate
from swquant.estimate.budget import Budget
from swquant.plan import versions
from swquant.recipe import Recipe

GIB = 1 << 30
RESULTS = Path(__file__).parent / "results" / "plan_70b.json"
METHODS = (
    *("rtn", "awq", "gptq", "omniquant", "tesseraq", "block_ap", "signround", "norm_tweaking", "end_to_end"),
    "gptq + block_ap + end_to_end",
)
MODEL = LlamaConfig(
    vocab_size=32000,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    max_position_embeddings=4096,
    architectures=["LlamaForCausalLM"],
)


def write_headers(folder: Path) -> None:
    """A shard for each tensor, its content a hole."""
    with torch.device("meta"):
        model = LlamaForCausalLM(MODEL)
    where: dict[str, str] = {}
    for index, (name, value) in enumerate(model.named_parameters()):
        file = f"model-{index:05d}.safetensors"
        bytes_ = 2 * math.prod(value.shape)
        entry = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [0, bytes_]}
        header = json.dumps({name: entry}).encode()
        header += b" " * (-len(header) % 8)
        with (folder / file).open("wb") as shard:
            shard.write(len(header).to_bytes(8, "little") + header)
            shard.truncate(8 + len(header) + bytes_)
        where[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps(MODEL.to_dict()))


def main() -> None:
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as place:
        source = Path(place)
        write_headers(source)
        for method in METHODS:
            recipe = Recipe(
                method=method,
                group_size=128,
                samples=128,
                seq_len=2048,
                evaluation_samples=0,
                device="cpu",
                calibration=str(ASSETS / "calibration.txt"),
            )
            found = estimate(recipe, source, source / "out", Budget(device=24 * GIB, host=64 * GIB), measure=False)
            memory = [problem for problem in found.problems if "memory" in problem]
            rows.append(
                {
                    "method": method,
                    "device_gb": round(found.device / 1e9, 1),
                    "samples_at_once": found.micro_batch,
                    "fits": not memory,
                    "problems": memory,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    result = {"budget_gb": round(24 * GIB / 1e9, 1), "rows": rows, "versions": versions()}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
