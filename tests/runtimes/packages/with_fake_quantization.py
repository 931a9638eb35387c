"""A package's own fake quantization of tensors. Arguments: ``auto_round`` or ``gptqmodel``, a folder of inputs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def auto_round(given: Mapping[str, Tensor], bits: int, width: int, symmetric: bool) -> dict[str, Tensor]:
    """Values, and the gradients of ``(values * coefficients).sum()``."""
    from auto_round.data_type.int import quant_tensor_asym, quant_tensor_sym

    function = quant_tensor_sym if symmetric else quant_tensor_asym
    learned = {name: given[name].clone().requires_grad_() for name in ("v", "min_scale", "max_scale")}
    values, scale, _ = function(given["weight"], bits, width, scale_dtype=torch.bfloat16, **learned)
    (values * given["coefficients"]).sum().backward()
    return {"values": values.detach(), "scale": scale.detach().float()} | {
        name: value.grad for name, value in learned.items() if value.grad is not None
    }


def gptqmodel(given: Mapping[str, Tensor], bits: int, width: int, symmetric: bool) -> dict[str, Tensor]:
    """Values on the given grid, and the grid that it finds itself for each group."""
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.quantization.quantizer import Quantizer, quantize

    rows = given["weight"].view(-1, width)
    values = quantize(rows, given["scale"], given["zero"], torch.tensor(2**bits - 1), False)
    found = Quantizer(QuantizeConfig(bits=bits, group_size=width, sym=symmetric))
    found.configure(perchannel=True)
    found.find_params(rows.clone(), weight=True)
    return {"values": values.view_as(given["weight"]), "found_scale": found.scale, "found_zero": found.zero}


if __name__ == "__main__":
    package = {"auto_round": auto_round, "gptqmodel": gptqmodel}[sys.argv[1]]
    for place in Path(sys.argv[2]).glob("*.in.safetensors"):
        with safe_open(place, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            grid = json.loads(file.metadata()["grid"])
        found = {name: value.contiguous() for name, value in package(tensors, *grid).items()}
        save_file(found, str(place).replace(".in.", ".out."))
