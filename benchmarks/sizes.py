"""Size of each format's files against bfloat16 and against the entropy of the codes.

    python benchmarks/sizes.py --out benchmarks/results/sizes.json

The demo model, one run for each grid, every format that holds it written from the same codes. "Linears" are the files'
bytes less those of what is not quantized, in bits per quantized weight; the bound is the entropy of the codes with
scales and zero points as they are, what a lossless coder of single codes could reach.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib import resources
from pathlib import Path

from swquant import Recipe, quantize, registry
from swquant.inspection import FORMATS_SUFFIXES, inspect
from swquant.quant.spec import QuantSpec

ASSETS = Path(str(resources.files("swquant") / "demo_assets"))
GRIDS = (QuantSpec(2, 64, True), QuantSpec(2, 64, False), QuantSpec(3, 128, False), QuantSpec(4, 128, True))
METHOD = "gptq"


def measure(spec: QuantSpec, place: Path) -> list[dict[str, object]]:
    loaded = {name: registry.load("swquant.formats", name)() for name in registry.names("swquant.formats")}
    names = [name for name, form in loaded.items() if form.refusal(spec) is None]
    recipe = Recipe(
        bits=spec.bits,
        group_size=spec.group_size,
        symmetric=spec.symmetric,
        method=METHOD,
        calibration=str(ASSETS / "calibration.txt"),
        samples=16,
        seq_len=256,
        evaluation_samples=0,
        format=",".join(names),
        device="cpu",
    )
    report = quantize(recipe, ASSETS / "model", place)
    found = inspect(place / "compressed_tensors")
    weights, plain = found.parameters
    overhead = report.bits_per_weight - spec.bits
    grid = f"W{spec.bits} g{spec.group_size} {'symmetric' if spec.symmetric else 'asymmetric'}"
    rows: list[dict[str, object]] = []
    for name in names:
        files = sum(path.stat().st_size for path in (place / name).iterdir() if path.suffix in FORMATS_SUFFIXES)
        rows.append(
            {
                "grid": grid,
                "format": name,
                "bytes": files,
                "bytes_bfloat16": report.bytes_source,
                "bits_per_weight_of_linears": round(8 * (files - 2 * plain) / weights, 3),
                "entropy_of_codes": round(found.entropy, 4),
                "bound": round(found.entropy + overhead, 3),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    rows: list[dict[str, object]] = []
    for spec in GRIDS:
        with tempfile.TemporaryDirectory() as place:
            rows += measure(spec, Path(place) / "out")
    for row in rows:
        print(row)
    out.write_text(json.dumps({"model": "demo", "method": METHOD, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
