"""A task file's accuracy on ``swquant.load`` of each directory, by lm-eval's ``HFLM`` alone, as JSON."""

from __future__ import annotations

import json
import sys

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

import swquant
from swquant.runtime import PackedLinear

task, *directories = sys.argv[1:]
found = {}
for directory in directories:
    model = swquant.load(directory, device="cpu", dtype=torch.float32)
    answers = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(directory), batch_size=4),
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    packed = sum(isinstance(module, PackedLinear) for module in model.modules())
    (result,) = answers["results"].values()
    found[directory] = {"accuracy": result["acc,none"], "packed": packed}
print(json.dumps(found))
