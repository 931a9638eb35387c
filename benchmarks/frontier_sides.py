"""What each side of ``frontier.py`` runs, in a process of its own: a job's file in, a directory and an answer out.

All sides get the same tokens, one thread, float32 and a CPU. The clock and the processor's time, that of all threads
and of processes of their own, begin when libraries are imported and end when the result is written, so reading the
checkpoint is in them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swquant import SwquantError
from swquant.checkpoint.reader import open_checkpoint

COMMON = """
import json, os, sys, time
from importlib.metadata import version
import torch
from safetensors.torch import load_file
torch.set_num_threads(1)
job = json.load(open(sys.argv[1]))
tokens, grid, settings = load_file(job["tokens"])["tokens"], job["grid"], dict(job["settings"])
def begin():
    global began
    began = time.monotonic(), sum(os.times()[:4])
def end(package):
    took = [round(now - then, 1) for now, then in zip((time.monotonic(), sum(os.times()[:4])), began)]
    told = {"version": version(package), "torch": torch.__version__, "threads": torch.get_num_threads()}
    json.dump({"seconds": took[0], "cpu_seconds": took[1], **told}, open(job["answer"], "w"))
def loaded():
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, local_files_only=True)
"""

SWQUANT = """
import swquant.run as run
from swquant import Recipe
preset = settings.pop("preset", None)
shared = {"bits": grid["bits"], "group_size": grid["group_size"] or "channel", "symmetric": grid["symmetric"]}
if preset is not None:
    recipe = Recipe.recommended({**shared, "preset": preset})[1].override({**shared, "preset": preset})
else:
    recipe = Recipe.from_mapping({**shared, "loss": "huber(delta=1)" if "block_ap" in settings["method"] else None})
count, length = tokens.shape
given = {"samples": count, "seq_len": length, "seed": job["seed"], "calibration": job["calibration"]}
recipe = recipe.override({**settings, **given, "evaluation_samples": 0, "device": "cpu", "precision": "float32"})
plain = run.sample_windows
def same(*arguments):
    found = plain(*arguments)
    assert torch.equal(found, tokens), "the sides do not calibrate on the same tokens"
    return found
run.sample_windows = same
begin()
run.quantize(recipe, job["model"], job["out"])
end("swquant")
"""

AUTO_ROUND = """
from auto_round import AutoRound
from transformers import AutoTokenizer
rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens.split(1)]
fixed = {"device_map": "cpu", "amp": False, "enable_torch_compile": False, "low_cpu_mem_usage": False}
begin()
model, _ = AutoRound(loaded(), tokenizer=AutoTokenizer.from_pretrained(job["model"], local_files_only=True),
                     dataset=rows, bits=grid["bits"], group_size=grid["group_size"] or -1, sym=grid["symmetric"],
                     nsamples=len(rows), seqlen=tokens.shape[1], seed=job["seed"], **fixed, **settings).quantize()
kinds = {str(parameter.dtype) for parameter in model.parameters()}
assert kinds == {"torch.float32"}, kinds
model.save_pretrained(job["out"])
end("auto-round")
"""

GPTQMODEL = """
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import FOEMConfig, GPTAQConfig
for name, kind in (("gptaq", GPTAQConfig), ("foem", FOEMConfig)):
    if name in settings:
        settings[name] = kind(**settings[name])
if grid["group_size"] is None:
    settings.setdefault("act_group_aware", False)  # it orders columns within groups
asked = QuantizeConfig(bits=grid["bits"], group_size=grid["group_size"] or -1, sym=grid["symmetric"],
                       format="gptq_v2", offload_to_disk=False, **settings)
rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
begin()
model = GPTQModel.load(job["model"], asked, device="cpu", dtype=torch.float32)
model.quantize(rows, batch_size=1)
model.save(job["out"])
end("gptqmodel")
"""

LLM_COMPRESSOR = """
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
rows = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
weights = {"num_bits": grid["bits"], "type": "int", "symmetric": grid["symmetric"], **settings.pop("weights", {})}
size = grid["group_size"]
weights |= {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
plan = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
if settings.pop("modifier") == "AutoRound":
    from llmcompressor.modifiers.autoround import AutoRoundModifier
    modifier = AutoRoundModifier(**plan, enable_torch_compile=False, **settings)
else:
    modifier = GPTQModifier(**plan, **settings)
begin()
model = loaded()
oneshot(model=model, dataset=rows, recipe=modifier, max_seq_length=tokens.shape[1],
        num_calibration_samples=len(rows), shuffle_calibration_samples=False)
model.save_pretrained(job["out"], save_compressed=True)
end("llmcompressor")
"""

CODE: Mapping[str, str] = {
    "swquant": SWQUANT,
    "auto-round": AUTO_ROUND,
    "gptqmodel": GPTQMODEL,
    "llm-compressor": LLM_COMPRESSOR,
}
SINGLE = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "GPTQMODEL_CPU_WORKERS": "2",
}


def run_side(side: str, python: str, job: Mapping[str, Any], folder: Path) -> tuple[Path, dict[str, Any]]:
    """Quantize; returns the directory of the result and what the side says of itself.

    Args:
        side: A key of :data:`CODE`.
        python: The interpreter that has it.
        job: ``model`` and ``tokens``, files; ``calibration``, the text that the tokens are of; ``grid``: ``bits``,
            ``group_size`` or ``None`` for channels, ``symmetric``; ``settings`` of the side; ``seed``.
        folder: An empty directory.

    Raises:
        SwquantError: The side failed; the last lines of its messages.
    """
    path, answer, out, log = (folder / name for name in ("job.json", "answer.json", "out", "log.txt"))
    path.write_text(json.dumps({**job, "answer": str(answer), "out": str(out)}), encoding="utf-8")
    environment = {**os.environ, **SINGLE}
    if side != "swquant":
        environment.pop("PYTHONPATH", None)
    with log.open("wb") as messages:
        done = subprocess.run(
            [python, "-c", COMMON + CODE[side], str(path)],
            cwd=folder,
            env=environment,
            stdout=messages,
            stderr=messages,
            check=False,
        )
    if done.returncode or not answer.is_file():
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        raise SwquantError(f"{side} ended with exit code {done.returncode}: {' '.join(last)[-500:]}")
    for file in open_checkpoint(Path(job["model"])).sidecars():
        shutil.copy(file, out)
    return out, json.loads(answer.read_text(encoding="utf-8"))
