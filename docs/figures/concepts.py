"""Draws the figures of docs/concepts.md from two runs on the demo model: python docs/figures/concepts.py

Rounding to nearest, and GPTQ, Block-AP and the training of all scales end to end; 2 bits, groups of 64. The numbers
that the page names are printed and stand in figures.json. A quarter of an hour on two cores.
"""

from __future__ import annotations

import json
import tempfile
from importlib import resources
from pathlib import Path

from markupsafe import Markup

from swquant import Recipe, Report, quantize
from swquant.html.charts import Line, distribution, line_chart

HERE = Path(__file__).parent
ASSETS = Path(str(resources.files("swquant") / "demo_assets"))
TRAINED = "gptq + block_ap(epochs=3) + end_to_end(epochs=3)"
STYLE = """
svg { font-family: sans-serif; background: #fff }
text { fill: #5b6774; font-size: 11px } .label { fill: #16202b } .grid { stroke: #dfe3e8 } .area { fill: #c9d1da }
.line path, path.line { fill: none; stroke-width: 1.8 }
.rounded path, path.rounded { stroke: #b4590b; stroke-dasharray: 4 3 } .rounded circle { fill: #b4590b }
.trained path, path.trained { stroke: #1f5fbf } .trained circle { fill: #1f5fbf }
.whole path { stroke: #2b7a4b } .whole circle { fill: #2b7a4b }
"""


def run(method: str, folder: Path) -> Report:
    recipe = Recipe.from_mapping(
        {
            "method": method,
            "bits": 2,
            "group_size": 64,
            "calibration": str(ASSETS / "calibration.txt"),
            "samples": 32,
            "seq_len": 256,
            "evaluation": str(ASSETS / "evaluation.txt"),
            "evaluation_samples": 16,
            "device": "cpu",
        },
        "the recipe of the figures",
    )
    return quantize(recipe, ASSETS / "model", folder / method.partition(" ")[0])


def write(name: str, chart: Markup) -> None:
    text = str(chart).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" width="680" ', 1)
    head, end, rest = text.partition(">")
    (HERE / f"{name}.svg").write_text(f"{head}{end}<style>{STYLE}</style>{rest}\n", encoding="utf-8")


def along_depth(name: str, curves: dict[str, list[float]]) -> None:
    lines = [Line(style, list(enumerate(map(float, values))), style) for style, values in curves.items()]
    write(name, line_chart(lines, "block", "relative error of hidden states"))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rounded, trained = (run(method, Path(folder)) for method in ("rtn", TRAINED))
    after = [block.measured for block in trained.block_reports]
    blocks = [block.shift.relative_error for block in trained.final_blocks]
    one_by_one = [one.after.relative_error for one in after if one is not None]
    first = [block.measured.after.relative_error for block in rounded.block_reports if block.measured is not None]
    along_depth("drift", {"rounded": first, "trained": one_by_one})
    along_depth("end-to-end", {"trained": one_by_one, "whole": blocks})
    last = after[-1]
    assert last is not None
    seen = last.slices[0]
    rows = [("rounded", "rounded", seen.before), ("trained", "trained", seen.after)]
    write("distribution", distribution(seen.original, rows, (seen.low, seen.high), last.tokens))
    assert rounded.quality is not None
    assert trained.quality is not None
    assert trained.finish is not None
    numbers = {
        "rounded": {"kl": rounded.quality.kl, "perplexity": rounded.quality.perplexity, "error": first},
        "trained": {"kl": trained.quality.kl, "perplexity": trained.quality.perplexity, "error": one_by_one},
        "end_to_end": {"before": trained.finish["before"], "after": trained.finish["after"], "error": blocks},
        "distance": {"rounded": seen.distance_before, "trained": seen.distance_after},
        "original": trained.quality.perplexity_reference,
    }
    text = json.dumps(numbers, indent=1)
    (HERE / "figures.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
