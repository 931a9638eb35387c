"""LoRA by peft on packed layers."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from swquant.errors import SwquantError
from swquant.integrations.versions import require_version
from swquant.runtime.linear import PackedLinear

SUPPORTED = ("0.21.2", "0.22")
"""peft's versions, from the first to before the second."""


def packed_lora(model: Any, config: Any) -> Any:
    """Have peft put adapters beside a model's packed layers.

    ::

        model = swquant.load(path)
        model = get_peft_model(model, packed_lora(model, LoraConfig(target_modules=["q_proj", "v_proj"])))

    Only the adapters train. ``save_pretrained`` writes them alone, and they are read again with
    ``PeftModel.from_pretrained(model, folder, config=packed_lora(model, LoraConfig.from_pretrained(folder)))``.
    ``merge_and_unload`` puts in the place of each packed layer with an adapter an ``nn.Linear`` of its dequantized
    weight plus the adapter's, and the model's configuration then says so, so that ``save_pretrained`` writes what can
    be read; ``unmerge_adapter`` brings the packed layer back.

    Args:
        model: What :func:`swquant.load` gave.
        config: A ``LoraConfig``, of plain LoRA, whose ``target_modules`` name the layers; it is changed and returned.

    Raises:
        SwquantError: peft is missing or of a version that nobody has tried, or the configuration asks for what needs a
            plain weight.
    """
    require_version("peft", *SUPPORTED)
    if config.target_modules == "all-linear":
        raise SwquantError(
            "target_modules='all-linear' finds no packed layer, which is no nn.Linear: name them, such as "
            "['q_proj', 'v_proj']"
        )
    if not isinstance(config.init_lora_weights, bool) and config.init_lora_weights != "gaussian":
        raise SwquantError(
            f"init_lora_weights={config.init_lora_weights!r} needs a plain weight, and a packed layer has codes; "
            "choose True or 'gaussian'"
        )
    config._register_custom_module({PackedLinear: _layer(model)})
    return config


def dequantized(layer: PackedLinear) -> nn.Linear:
    """The layer as a plain one: the same function, but for the rounding of weights to the dtype of its scales."""
    dtype, device = layer.weight_scale.dtype, layer.weight_scale.device
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta", dtype=dtype)
    plain.weight = nn.Parameter(layer.quantized().dequantize().to(device, dtype), requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.clone(), requires_grad=False)
    return plain


def _unpack_in_config(model: Any, name: str) -> None:
    """Say in the model's configuration that one module more is plain."""
    if any(isinstance(module, PackedLinear) for other, module in model.named_modules() if other != name):
        model.config.quantization_config["ignore"].append(name)
    else:
        del model.config.quantization_config


def _layer(model: Any) -> type[nn.Module]:
    """peft's linear layer on a packed one of ``model``; peft is imported where it is asked for."""
    from peft.tuners.lora.layer import Linear  # pyright: ignore[reportMissingImports]

    class PackedLora(Linear):  # pyright: ignore[reportUntypedBaseClass]
        """What peft calls ``lora.Linear``, with a packed base layer while nothing is merged."""

        def __init__(self, base_layer: nn.Module, adapter_name: str, **options: Any) -> None:
            with warnings.catch_warnings():  # of a layer whose type it does not know
                warnings.filterwarnings("ignore", message="Unsupported layer type")
                super().__init__(base_layer, adapter_name, **options)
            self._packed: list[Any] = [base_layer]  # in a list, so that it is no second child

        @property
        def lora_variants(self) -> dict[tuple[str, ...], None]:
            """Plain LoRA alone: all others look at the weight."""
            return {(): None}

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """See peft; the base layer becomes a plain one."""
            if isinstance(self.base_layer, PackedLinear):
                self.base_layer = dequantized(self.base_layer)
            super().merge(safe_merge, adapter_names)

        def unmerge(self) -> None:
            """See peft; the base layer is the packed one again, with no rounding in between."""
            super().unmerge()
            plain: Any = self.base_layer
            self.base_layer = self._packed[0].to(plain.weight.device)

        def unload_and_optionally_merge_module(self, merge: bool, **options: Any) -> nn.Module:
            """What peft puts in the place of this layer when adapters go."""
            if merge:
                self.merge(**options)
            if not isinstance(self.base_layer, PackedLinear):
                _unpack_in_config(model, next(name for name, module in model.named_modules() if module is self))
            return self.base_layer

        def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
            scale = base_layer.weight_scale if isinstance(base_layer, PackedLinear) else base_layer.weight
            return scale.device, scale.dtype

    return PackedLora
