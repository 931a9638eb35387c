"""Every block of the model that was trained as a whole: its outputs beside the original's, along the depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from swquant.engine.block import Job, split_held
from swquant.engine.capture import capture
from swquant.engine.drift import final_codes, measured_samples, shift_of
from swquant.engine.journal import Journal
from swquant.engine.trained_model import TrainedModel
from swquant.quant.deferred import in_float
from swquant.report import FinalBlock


@torch.no_grad()
def final_blocks(
    job: Job, journal: Journal, model: TrainedModel, arguments: Sequence[Mapping[str, Any]]
) -> list[FinalBlock]:
    """Run the original and the trained model block by block, on the samples on which each block was measured.

    Args:
        job: The run.
        journal: Its samples.
        model: What was trained.
        arguments: The blocks' keyword arguments beside the hidden states, on the job's device.
    """
    tokens = journal.tokens()["tokens"]
    samples, length = tokens.shape
    shown = measured_samples(split_held(job.samples)[1], range(job.samples, samples), length)
    shape = (len(shown), length, job.skeleton.hidden_size)
    reference, quantized = torch.empty(shape), torch.empty(shape)
    capture(job.skeleton, job.checkpoint, tokens[shown], reference.__setitem__, quantized.__setitem__)
    reference, quantized = reference.to(job.device), quantized.to(job.device)
    found: list[FinalBlock] = []
    for index in range(len(job.skeleton.blocks)):
        block = job.skeleton.block(index)
        params = {name: value.to(job.device) for name, value in block.load(job.checkpoint).items()}
        reference = block.forward(in_float(params), reference, arguments[index])
        del params
        quantized = model.run(index, quantized)
        codes = {
            name.removesuffix(".weight"): final_codes(values, job.spec.bits)
            for name, values in model.codes(index).items()
        }
        found.append(FinalBlock(shift_of(reference.cpu(), quantized.cpu()), codes))
    return found
