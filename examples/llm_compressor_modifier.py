"""llm-compressor at 2 bits: its own GPTQ by two observers, then our modifier, with and without the paper's term.

Written for llm-compressor 0.14 (`pip install "swquant[llmcompressor]"`). `--save DIR` keeps what the last way wrote.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from shared import arguments, load, perplexity, windows
from swquant import SwquantError

try:
    from swquant.integrations.llm_compressor import SwquantModifier
except SwquantError as error:
    sys.exit(str(error))

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier

GRID = {"num_bits": 2, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}


def asked(grid: dict[str, Any]) -> dict[str, Any]:
    """What every modifier is told: all linears of the blocks on one grid."""
    return {"ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": grid}}}


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each way: its name and its perplexity."""
    parser = arguments(__doc__ or "", steps=0)
    parser.add_argument("--method", default="gptq + block_ap(epochs=2)", help="of our modifier")
    parser.add_argument("--save", help="a folder for the last model")
    options = parser.parse_args(argv)
    held_out, rows = windows(options, options.evaluation, 32), windows(options, options.calibration, options.samples)
    samples = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": rows.clamp(1, 1).tolist()})
    print(f"original: {perplexity(load(options), held_out):.2f}")
    theirs, searched = asked(GRID), asked({**GRID, "observer": "memoryless_mse"})
    ours = {**theirs, "method": options.method, "seed": options.seed}
    for name, recipe in (
        ("GPTQModifier", GPTQModifier(**theirs)),
        ("GPTQModifier, memoryless_mse", GPTQModifier(**searched)),
        ("mse", SwquantModifier(**ours, loss="mse")),
        ("0.9*mse + 0.1*sliced_wasserstein", SwquantModifier(**ours, loss="0.9*mse + 0.1*sliced_wasserstein")),
    ):
        model = load(options)
        oneshot(
            model=model,
            dataset=samples,
            recipe=recipe,
            num_calibration_samples=options.samples,
            max_seq_length=options.length,
            shuffle_calibration_samples=False,
            log_dir=None,
        )
        print(f"{name}: {perplexity(model, held_out):.2f}", flush=True)
    if options.save:
        model.save_pretrained(options.save)


if __name__ == "__main__":
    main()
