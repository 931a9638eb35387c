"""Train the demo model: a small LLaMA on docstrings, from nothing but this Python installation.

    python tools/train_demo_model.py --out src/swquant/demo_assets

Writes ``model/`` (a Hugging Face checkpoint in bfloat16), ``calibration.txt``, ``evaluation.txt`` and
``training.json``. Equal arguments on the same installation and machine give the same model; the defaults took
under an hour on two cores. Hidden matrices are trained by Muon, everything else by AdamW, at a constant rate
that decays to zero over the last third.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import demo_corpus

BOS, EOS = "<s>", "</s>"
DECAY_SHARE = 1 / 3
WARMUP_STEPS = 100
SNAPSHOT_STEPS = 250
ADAM_RATE, MUON_RATE, WEIGHT_DECAY = 2e-3, 4e-3, 0.1
EVALUATION_WINDOWS = 64


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--constraints", type=Path, default=Path(__file__).parents[1] / "constraints.txt")
    parser.add_argument("--architecture", choices=("llama", "qwen2"), default="llama")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=2560)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=640)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def train_tokenizer(documents: tuple[str, ...], vocab: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(documents, trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS)


def encode(tokenizer: PreTrainedTokenizerFast, documents: tuple[str, ...], seed: int) -> torch.Tensor:
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    encoded = tokenizer.backend_tokenizer.encode_batch([documents[index] for index in order])
    end = tokenizer.eos_token_id
    return torch.tensor([token for text in encoded for token in [*text.ids, end]], dtype=torch.int32)


def build_model(args: argparse.Namespace) -> Any:
    settings = {
        "vocab_size": args.vocab,
        "hidden_size": args.hidden,
        "intermediate_size": args.intermediate,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "max_position_embeddings": args.context,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if args.architecture == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**settings))
    return LlamaForCausalLM(LlamaConfig(**settings))


def optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    hidden = [p for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]
    tables = [p for name, p in model.named_parameters() if p.dim() == 2 and ".layers." not in name]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": tables, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(hidden, lr=MUON_RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=ADAM_RATE, betas=(0.9, 0.95)),
    ]


def rate(step: int, steps: int) -> float:
    """Factor on the learning rate: linear warm-up, constant, linear decay."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (DECAY_SHARE * steps))


def batches(tokens: torch.Tensor, batch: int, context: int, seed: int) -> Any:
    """Windows in random order, shifted anew in every pass."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        start = int(torch.randint(context, (), generator=generator))
        windows = tokens[start : start + (len(tokens) - start) // context * context].view(-1, context)
        for rows in torch.randperm(len(windows), generator=generator).split(batch):
            if len(rows) == batch:
                yield windows[rows].long()


@torch.no_grad()
def evaluate(model: Any, tokenizer: PreTrainedTokenizerFast, text: str, context: int) -> float:
    tokens = torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)
    windows = tokens[: len(tokens) // context * context].view(-1, context)[:EVALUATION_WINDOWS]
    model.eval()
    losses = [model(input_ids=rows, labels=rows).loss.item() for rows in windows.split(16)]
    model.train()
    return sum(losses) / len(losses)


def export(model: Any, tokenizer: PreTrainedTokenizerFast, out: Path, record: dict[str, object]) -> None:
    weights = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    config = type(model.config).from_dict({**model.config.to_dict(), "dtype": "bfloat16"})
    copy = type(model)(config).to(torch.bfloat16)
    copy.load_state_dict(weights)
    copy.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    print("Reading docstrings ...", flush=True)
    corpus = demo_corpus.build(args.constraints)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "calibration.txt").write_text(corpus.calibration)
    (args.out / "evaluation.txt").write_text(corpus.evaluation)
    print(f"Training a tokenizer on {len(corpus.documents)} documents ...", flush=True)
    tokenizer = train_tokenizer(corpus.documents, args.vocab)
    tokens = encode(tokenizer, corpus.documents, args.seed)
    model = build_model(args)
    forward = torch.compile(model) if args.compile else model
    chosen = optimizers(model)
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in chosen]
    stream = batches(tokens, args.batch, args.context, args.seed)
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "constraints")}
    record: dict[str, object] = {
        "arguments": settings,
        "sources": corpus.sources,
        "documents": len(corpus.documents),
        "tokens": len(tokens),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    print(f"Training {record['parameters']:,} parameters on {len(tokens):,} tokens ...", flush=True)
    began, smooth = time.perf_counter(), math.nan
    for step in range(args.steps):
        for optimizer, rates in zip(chosen, base, strict=True):
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr * rate(step, args.steps)
        rows = next(stream)
        loss = forward(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"step {step} loss {smooth:.3f} {time.perf_counter() - began:.0f} s", flush=True)
        if (step + 1) % SNAPSHOT_STEPS == 0 or step + 1 == args.steps:
            held_out = evaluate(model, tokenizer, corpus.evaluation, args.context)
            print(f"step {step + 1} held-out loss {held_out:.3f}", flush=True)
            record |= {"steps": step + 1, "training_loss": round(smooth, 3), "held_out_loss": round(held_out, 3)}
            export(model, tokenizer, args.out, record)


if __name__ == "__main__":
    main()
