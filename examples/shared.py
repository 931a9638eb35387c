"""What the examples share: arguments, windows of a text, perplexity."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import swquant

DEMO = Path(swquant.__file__).parent / "demo_assets"


def arguments(description: str, steps: int) -> argparse.ArgumentParser:
    """Where the model and its texts are, by default those that swquant brings along, and how long to train."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default=str(DEMO / "model"))
    parser.add_argument("--calibration", type=Path, default=DEMO / "calibration.txt")
    parser.add_argument("--evaluation", type=Path, default=DEMO / "evaluation.txt")
    parser.add_argument("--samples", type=int, default=64, help="windows to train on")
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    parser.add_argument("--steps", type=int, default=steps, help="steps of training")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def load(options: argparse.Namespace) -> Any:
    """The model, in float32."""
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)


def windows(options: argparse.Namespace, text: Path, count: int) -> Tensor:
    """The first ``count`` windows of a text, ``int64 [count, length]``."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, return_tensors="pt").input_ids[0]
    return tokens[: count * options.length].view(-1, options.length)


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor) -> float:
    """``exp`` of the mean negative log-likelihood of each token but the first of a window."""
    losses = [model(input_ids=rows, labels=rows).loss for rows in tokens.split(8)]
    return float(torch.stack(losses).mean().exp())
