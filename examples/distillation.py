"""Distillation of hidden states in transformers' Trainer: a student with every other block, with and without ours."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transformers import Trainer, TrainingArguments

from shared import arguments, load, perplexity, windows
from swquant.losses import SlicedWassersteinLoss


class HiddenStatesTrainer(Trainer):
    """A Trainer whose student imitates the teacher's hidden states after every second block."""

    def __init__(self, teacher: Any, loss: Callable[[Tensor, Tensor], Tensor], **others: Any) -> None:
        super().__init__(**others)
        self.teacher, self.compare = teacher, loss

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """The mean over the student's blocks."""
        with torch.no_grad():
            targets = self.teacher(**inputs, output_hidden_states=True).hidden_states[2::2]
        outputs = model(**inputs, output_hidden_states=True)
        pairs = zip(outputs.hidden_states[1:], targets, strict=True)
        value = torch.stack([self.compare(ours, theirs) for ours, theirs in pairs]).mean()
        return (value, outputs) if return_outputs else value


def halved(teacher: Any) -> Any:
    """The model without blocks 0, 2, 4, ...: block i of the student starts from block 2i + 1 of the teacher."""
    student = copy.deepcopy(teacher)
    student.model.layers = nn.ModuleList(list(student.model.layers)[1::2])
    student.config.num_hidden_layers = len(student.model.layers)
    for index, block in enumerate(student.model.layers):
        block.self_attn.layer_idx = index
    return student


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each way: its name and the student's perplexity."""
    options = arguments(__doc__ or "", steps=200).parse_args(argv)
    teacher, held_out = load(options).eval(), windows(options, options.evaluation, 32)
    rows = [{"input_ids": row} for row in windows(options, options.calibration, options.samples)]
    print(f"teacher: {perplexity(teacher, held_out):.2f}\nhalved: {perplexity(halved(teacher), held_out):.2f}")
    align = SlicedWassersteinLoss(torch.Generator().manual_seed(options.seed), slices=64)

    def aligned(ours: Tensor, theirs: Tensor) -> Tensor:
        return 0.9 * mse_loss(ours, theirs) + 0.1 * align(ours, theirs)

    for name, loss in (("mse", mse_loss), ("0.9*mse + 0.1*sliced_wasserstein", aligned)):
        student = halved(teacher)
        with tempfile.TemporaryDirectory() as folder:
            settings = TrainingArguments(
                folder, max_steps=options.steps, per_device_train_batch_size=4, learning_rate=5e-4, seed=options.seed,
                save_strategy="no", report_to="none", logging_strategy="no", disable_tqdm=True, use_cpu=True,
            )  # fmt: skip
            HiddenStatesTrainer(teacher, loss, model=student, args=settings, train_dataset=rows).train()
        print(f"{name}: {perplexity(student.eval(), held_out):.2f}", flush=True)


if __name__ == "__main__":
    main()
