"""llm-compressor with our methods and losses: a modifier for its recipes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swquant.checkpoint.shards import Stored
from swquant.distributed.ranks import Alone
from swquant.engine.block import Job, load_block, quantize_block
from swquant.engine.bound import BoundBlock
from swquant.engine.hidden_states import create_hidden
from swquant.engine.observer import Silent
from swquant.engine.run_state import HIDDEN_STATES, RunState, open_run_state
from swquant.errors import SwquantError
from swquant.integrations.versions import require_version
from swquant.losses import parse_loss
from swquant.methods import Pipeline, Setting, build_pipeline, parse_methods
from swquant.model.calls import Calls, Front, capture, probe
from swquant.model.layout import Layout, lay_out
from swquant.model.skeleton import Skeleton, build_skeleton
from swquant.quant.draft import Committed
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import QuantSpec
from swquant.recipe import PRESETS, PresetName, usual_loss

SUPPORTED = ("0.14", "0.15")
"""llm-compressor's versions, from the first to before the second, for which this was written."""

require_version("llmcompressor", *SUPPORTED)

from compressed_tensors.offload.dist_utils import is_distributed  # noqa: E402
from compressed_tensors.quantization import enable_quantization, quantize  # noqa: E402
from compressed_tensors.utils import match_named_modules, update_offload_parameter  # noqa: E402
from llmcompressor.modeling.offset_norm import (  # pyright: ignore[reportMissingImports]  # noqa: E402
    CalibrationOffsetNorm,
)
from llmcompressor.modifiers import Modifier, ModifierFactory  # pyright: ignore[reportMissingImports]  # noqa: E402
from llmcompressor.modifiers.quantization.calibration import (  # pyright: ignore[reportMissingImports]  # noqa: E402
    apply_calibration_status,
    freeze_module_quantization,
)
from llmcompressor.modifiers.quantization.quantization import (  # pyright: ignore[reportMissingImports]  # noqa: E402
    QuantizationMixin,
)
from llmcompressor.utils.dev import get_main_device  # pyright: ignore[reportMissingImports]  # noqa: E402
from loguru import logger  # noqa: E402
from pydantic import PrivateAttr  # noqa: E402

PLACE = Path("the model in memory")
"""What messages call it."""

AGREES = 1e-2
"""Squared error of our block's output over theirs, relative: 16-bit products are two orders below."""


class SwquantModifier(Modifier, QuantizationMixin):  # pyright: ignore[reportUntypedBaseClass]
    """Weights of the decoder's blocks quantized by our methods, within llm-compressor's pipeline.

    ::

        from llmcompressor import oneshot
        from swquant.integrations.llm_compressor import SwquantModifier

        recipe = SwquantModifier(config_groups={...}, ignore=["lm_head"], loss="0.9*mse + 0.1*sliced_wasserstein")
        oneshot(model=model, dataset=dataset, recipe=recipe, output_dir="model-w2")

    Grids, targets and what is ignored are said as in llm-compressor's own modifiers. Whenever its sequential pipeline
    is done with a block, the block is trained as a run of swquant does: on the quantized model's hidden states so far,
    towards the original's, in float32. Weights then hold the values of their codes, beside ``weight_scale`` and
    ``weight_zero_point``, and llm-compressor writes them. Without the sequential pipeline all blocks come at the end.

    Importing this module makes the modifier known to recipes in YAML.

    Attributes:
        method: A pipeline of ours, see :func:`swquant.methods.parse_methods`; rotations, and training of the whole
            model after its blocks, are no part of a block and refused.
        loss: Training loss of blocks; ``None`` is the usual one of the bits, ``"own"`` each method's.
        preset: Whose share of the published training methods do, where ``epochs`` leave it open.
        epochs: Of every method that trains by epochs.
        seed: Of everything random.
    """

    requires_calibration_data: bool = True

    method: str = "gptq + block_ap"
    loss: str | None = None
    preset: PresetName = "default"
    epochs: int | None = None
    seed: int = 0

    _quantizing: _Quantizing | None = PrivateAttr(default=None)

    def on_initialize(self, state: Any, **kwargs: Any) -> bool:
        """Attach the schemes, and refuse what cannot be done before any work is.

        Raises:
            SwquantError: A scheme has no grid of ours, a module to quantize lies outside of the blocks, samples differ
                in length, or the model or the method is not for this; mixtures of experts are not.
        """
        if is_distributed():
            raise SwquantError("SwquantModifier works in one process: start llm-compressor without torchrun")
        loaded = Loaded.of(state.model)
        expert = next((name for name in loaded.tensors if ".experts." in name), None)
        if expert is not None:
            raise SwquantError(
                f"the model is a mixture of experts ({expert}), whose blocks put out something else in "
                "llm-compressor's pipeline than in transformers': SwquantModifier cannot train it; use swquant quantize"
            )
        QuantizationMixin.initialize_quantization(self, state.model)
        modules = dict(match_named_modules(state.model, self.resolved_targets, self.ignore))
        grids = {name: spec_of(name, module.quantization_scheme) for name, module in modules.items()}
        self._quantizing = _Quantizing.of(self, loaded, grids, _tokens_of(state.data.calib))
        return True

    def on_calibration_start(self, state: Any, event: Any, **kwargs: Any) -> None:
        """Begin the hidden states before the first block, and look at what blocks make of the first batch."""
        quantizing = _require(self._quantizing)
        for name in quantizing.modules:
            apply_calibration_status(state.model.get_submodule(name))
        quantizing.begin()
        for index, block in enumerate(quantizing.skeleton.blocks):
            hook = quantizing.seeing(index)
            self.register_hook(state.model.get_submodule(block.prefix), hook, "forward", with_kwargs=True)

    def on_sequential_epoch_end(self, state: Any, event: Any, modules: list[nn.Module], **kwargs: Any) -> None:
        """Quantize the blocks among ``modules``."""
        _require(self._quantizing).up_to(modules)

    def on_calibration_end(self, state: Any, event: Any, **kwargs: Any) -> None:
        """Quantize what blocks are left, and leave everything as llm-compressor expects it."""
        quantizing = _require(self._quantizing)
        quantizing.up_to(None)
        self.remove_hooks()
        for name in quantizing.modules:
            freeze_module_quantization(state.model.get_submodule(name))
        state.model.apply(enable_quantization)
        quantizing.place.cleanup()


ModifierFactory.register("SwquantModifier", SwquantModifier)


def spec_of(name: str, scheme: Any) -> QuantSpec:
    """The grid of a scheme of compressed-tensors.

    Raises:
        SwquantError: It has none of ours.
    """
    weights = scheme.weights
    if scheme.input_activations is not None or scheme.output_activations is not None:
        raise SwquantError(f"the scheme of {name} quantizes activations, SwquantModifier quantizes weights alone")
    if weights is None or weights.type != "int" or weights.strategy not in ("group", "channel"):
        found = None if weights is None else f"{weights.type}, by {weights.strategy}"
        raise SwquantError(f"the weights of {name} are {found}, expected int, by group or channel")
    return QuantSpec(weights.num_bits, weights.group_size if weights.strategy == "group" else None, weights.symmetric)


@dataclass(frozen=True)
class Loaded:
    """A model that transformers has loaded, as blocks are read: live, so what other modifiers change is seen.

    Attributes:
        model: The model.
        tensors: Its parameters and saved buffers by name, as they were before anything was attached to it.
    """

    model: Any
    tensors: Mapping[str, Stored]

    @staticmethod
    def of(model: Any) -> Loaded:
        """All of its tensors."""
        found = model.state_dict()
        return Loaded(
            model,
            {name: Stored(PLACE, name, value.dtype, tuple(value.shape), value.nbytes) for name, value in found.items()},
        )

    def skeleton(self) -> Skeleton:
        """The model's code, run block by block."""
        config = {**self.model.config.to_dict(), "architectures": [type(self.model).__name__]}
        return build_skeleton(config, {name: stored.shape for name, stored in self.tensors.items()}, PLACE)

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU; of a norm that llm-compressor has taken the ``1 + w`` of, ``w``."""
        module, last = self._at(name)
        value = getattr(module, last).detach().cpu()
        return (value.float() - 1).to(value.dtype) if isinstance(module, CalibrationOffsetNorm) else value

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """``read(name)[indices]``."""
        return self.read(name)[indices.cpu()]

    def write(self, name: str, value: Tensor) -> None:
        """Put a value where :meth:`read` has it from."""
        module, last = self._at(name)
        value = value.float() + 1 if isinstance(module, CalibrationOffsetNorm) else value
        update_offload_parameter(module, last, value.to(getattr(module, last).dtype))

    def _at(self, name: str) -> tuple[nn.Module, str]:
        parent, _, last = name.rpartition(".")
        return self.model.get_submodule(parent), last


@dataclass
class _Quantizing:
    """A run of ours over a model in memory.

    Attributes:
        loaded: The model.
        job: What stays the same from block to block.
        tokens: The samples, ``int64 [samples, tokens]``.
        hidden_size: Channels of the hidden states.
        modules: What is quantized, by name.
        place: Where hidden states and finished blocks are kept meanwhile.
        seen: What blocks were given and put out in llm-compressor's first batch, by index.
    """

    loaded: Loaded
    job: Job
    tokens: Tensor
    hidden_size: int
    modules: tuple[str, ...]
    place: tempfile.TemporaryDirectory[str]
    seen: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict[int, tuple[Tensor, Tensor]])
    calls: Calls | None = None

    @staticmethod
    def of(asked: SwquantModifier, loaded: Loaded, grids: Mapping[str, QuantSpec], tokens: Tensor) -> _Quantizing:
        """Check it all."""
        skeleton = loaded.skeleton()
        hidden_size = probe(skeleton)
        outside = [name for name in grids if not name.startswith(f"{skeleton.path}.")]
        if outside or not grids:
            what = f"{outside[0]} lies outside of the blocks" if outside else "no module is to be quantized"
            raise SwquantError(f"{what}, and SwquantModifier quantizes the linears of blocks: see targets and ignore")
        specs = list(dict.fromkeys(grids.values()))
        layout = lay_out(skeleton, specs[0], {"*": None, **grids}, allow_split=True)
        pipeline = _pipeline(asked, specs, skeleton.norm_biases)
        loss = asked.loss or usual_loss(min(spec.bits for spec in specs))
        device = torch.device(get_main_device())
        phases = pipeline.phases
        job = Job(
            loaded,
            skeleton,
            layout,
            phases,
            None if loss in (None, "own") else parse_loss(loss),
            len(tokens),
            asked.seed,
            device,
        )
        place = tempfile.TemporaryDirectory(prefix="swquant-")
        return _Quantizing(loaded, job, tokens, hidden_size, tuple(grids), place)

    @property
    def skeleton(self) -> Skeleton:
        """The model's code."""
        return self.job.skeleton

    @property
    def layout(self) -> Layout:
        """What is quantized."""
        return self.job.layout

    @property
    def run_state(self) -> RunState:
        """Where it stands."""
        return open_run_state(Path(self.place.name), {})

    @torch.no_grad()
    def begin(self) -> None:
        """Both models' hidden states before the first block."""
        front = Front.load(self.skeleton, self.loaded, self.job.device)
        run_state, (samples, length) = self.run_state, self.tokens.shape
        shape = (samples, length, self.hidden_size)
        caches = [create_hidden(run_state.hidden_path(name, 0), shape) for name in HIDDEN_STATES]
        for index, hidden in enumerate(capture(front, self.loaded, self.tokens)):
            for cache in caches:
                cache[index] = hidden
        run_state.begin({"tokens": self.tokens}, shape, {})
        self.calls = Calls.prepare(front, self.loaded, self.tokens)

    def seeing(self, index: int) -> Any:
        """A hook that notes a block's first batch."""

        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            if index not in self.seen:
                given = args[0] if args else kwargs["hidden_states"]
                put = out[0] if isinstance(out, tuple) else out
                self.seen[index] = given.detach().clone(), put.detach().clone()

        return see

    def up_to(self, modules: list[nn.Module] | None) -> None:
        """Quantize the next blocks as long as they are among ``modules``; ``None`` is all that are left."""
        blocks = self.skeleton.blocks
        for index in range(self.run_state.done, len(blocks)):
            module = self.loaded.model.get_submodule(blocks[index].prefix)
            if modules is not None and all(module is not one for one in modules):
                return
            self._block(index)

    def _block(self, index: int) -> None:
        calls, block = self.calls, self.skeleton.block(index)
        assert calls is not None
        self._require_same(index, calls)
        with torch.enable_grad():
            quantize_block(self.job, self.run_state, calls, Silent())
        run_state = self.run_state
        committed = run_state.block(index, self.layout.grids(index))
        for name, value in _changed(committed, load_block(self.job, index)):
            self.loaded.write(f"{block.prefix}.{name}", value)
        for name, quantized in committed.quantized.items():
            self._write(f"{block.prefix}.{name}".removesuffix(".weight"), quantized)
        logger.info("{}: relative error of hidden states {:.4f}", block.prefix, run_state.reports[index]["drift"])

    def _require_same(self, index: int, calls: Calls) -> None:
        """Refuse a block that computes something else here than in llm-compressor's pipeline."""
        if index not in self.seen:
            return
        given, theirs = (value.float() for value in self.seen.pop(index))
        bound = BoundBlock(index, self.skeleton.block(index), calls, self.layout, self.job.device, Alone())
        ours = torch.empty(given.shape)
        bound.advance(load_block(self.job, index), given.cpu(), ours)
        error = (ours - theirs.cpu()).square().sum() / theirs.square().sum().cpu()
        if not error < AGREES:
            raise SwquantError(
                f"{self.skeleton.block(index).prefix} puts out something else in llm-compressor's model than in "
                f"transformers' (relative error {error:.3g}): SwquantModifier cannot train it; use swquant quantize"
            )

    def _write(self, name: str, quantized: QTensor) -> None:
        """A module's values, scales and zero points.

        Raises:
            SwquantError: llm-compressor would make other codes of them.
        """
        module = self.loaded.model.get_submodule(name)
        zero = quantized.zero.to(torch.int32) - quantized.spec.mid_code
        for part, value in (
            ("weight", quantized.dequantize()),
            ("weight_scale", quantized.scale),
            ("weight_zero_point", zero),
        ):
            update_offload_parameter(module, part, value.to(getattr(module, part).dtype))
        args = module.quantization_scheme.weights
        codes = quantize(module.weight, module.weight_scale, module.weight_zero_point, args)
        if not torch.equal(codes.cpu().int() + quantized.spec.mid_code, quantized.codes.int()):
            raise SwquantError(
                f"the codes of {name} cannot be had back from weights and scales in "
                f"{module.weight.dtype}: load the model in float32"
            )


def _changed(committed: Committed, before: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What is not quantized and has been trained all the same, such as norms."""
    for name, value in committed.params.items():
        if not torch.equal(value.cpu(), before[name].cpu()):
            yield name, value


def _pipeline(asked: SwquantModifier, specs: list[QuantSpec], norm_biases: bool) -> Pipeline:
    """The method, which works block by block.

    Raises:
        SwquantError: It does not.
    """
    setting = Setting(specs[0], norm_biases, effort=PRESETS[asked.preset].effort, others=tuple(specs[1:]))
    pipeline = build_pipeline(parse_methods(asked.method, None, asked.epochs), setting)
    if pipeline.rotate or pipeline.finish is not None:
        raise SwquantError(
            f"the method {asked.method!r} works on the whole model, and SwquantModifier on a block at a time: leave "
            "rotate and end_to_end out, or use swquant quantize"
        )
    return pipeline


def _tokens_of(batches: Any) -> Tensor:
    """The samples, ``int64 [samples, tokens]``.

    Raises:
        SwquantError: There are none, they differ in length, or some tokens are padding.
    """
    if batches is None:
        raise SwquantError("SwquantModifier needs calibration data: give oneshot a dataset")
    found = [(batch["input_ids"], batch.get("attention_mask")) for batch in batches]
    whole = "pack them: concatenate_data=True, pad_to_max_length=False"
    if len({ids.shape[1] for ids, _ in found}) > 1:
        lengths = sorted({ids.shape[1] for ids, _ in found})
        raise SwquantError(f"samples have from {lengths[0]} to {lengths[-1]} tokens, expected one length; {whole}")
    if any(mask is not None and not bool(mask.all()) for _, mask in found):
        raise SwquantError(f"samples are padded, expected tokens of a text throughout; {whole}")
    return torch.cat([ids for ids, _ in found]).long().cpu()


def _require(quantizing: _Quantizing | None) -> _Quantizing:
    if quantizing is None:
        raise SwquantError("SwquantModifier has not been initialized: give it to llm-compressor in a recipe")
    return quantizing
