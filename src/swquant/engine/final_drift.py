"""Every block of the model that was trained as a whole: its outputs beside the original's, along the depth."""

from __future__ import annotations

import torch

from swquant.engine.block import Job, load_block, split_validation
from swquant.engine.bound import BoundBlock
from swquant.engine.drift import final_codes, measured_samples, shift_of
from swquant.engine.run_state import RunState
from swquant.engine.trained_model import TrainedModel
from swquant.model.calls import Calls, capture
from swquant.quant.deferred import in_float
from swquant.report import FinalBlock


@torch.no_grad()
def final_blocks(job: Job, run_state: RunState, model: TrainedModel, calls: Calls) -> list[FinalBlock]:
    """Run the original and the trained model block by block, on the samples on which each block was measured.

    Args:
        job: The run.
        run_state: Its samples.
        model: What was trained.
        calls: What each block is called with.
    """
    tokens = run_state.tokens()["tokens"]
    samples, length = tokens.shape
    shown = measured_samples(split_validation(job.samples)[1], range(job.samples, samples), length)
    known = torch.tensor(shown)
    reference, quantized = (
        torch.stack(list(capture(calls.front, job.checkpoint, tokens[shown], stored=stored)))
        for stored in (False, True)
    )
    found: list[FinalBlock] = []
    for index in range(len(job.skeleton.blocks)):
        bound = BoundBlock(index, job.skeleton.block(index), calls, job.layout, job.device, job.ranks)
        reference = bound.forward(in_float(load_block(job, index)), reference, known)
        quantized = model.run(index, quantized, known)
        codes = {
            name.removesuffix(".weight"): final_codes(values, job.layout.grids(index)[name].bits)
            for name, values in model.codes(index).items()
        }
        found.append(FinalBlock(shift_of(reference.cpu(), quantized.cpu()), codes))
    return found
