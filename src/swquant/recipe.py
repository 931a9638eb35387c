"""Recipes: everything a quantization run depends on besides the model, as one frozen value."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from swquant.errors import SwquantError, did_you_mean
from swquant.quant.spec import GRID_KEYS, UNIFORM, QuantSpec, fixed_by
from swquant.units import parse_size, parse_span, size, span
from swquant.validation import build, read_yaml

CHANNEL = "channel"
SHOWN = 8
"""So many patterns are shown, more of them counted."""

LATER_KEYS = ("grid", "grids", "allow_split", "embedding_bits", "head_bits", "precision", "size", "target_bits", "time")
"""Keys younger than the first recipes, whose hashes stay."""

AUTO, SELF, BUNDLED = "auto", "self", "bundled"
"""Of calibration: one of the other two, chosen when a run starts; samples from the model; the text of swquant's own."""
SETTLED = ("precision", "device", "calibration")
"""Keys whose ``auto`` is decided when a run starts, and stays."""

USUAL = "omniquant"
"""The method of a recipe that names none, and no time."""

PresetName = Literal["fast", "default", "best"]


@dataclass(frozen=True)
class Preset:
    """How much data and training a run uses: calibration samples, and a factor on a method's published epochs."""

    samples: int
    effort: float


PRESETS: Mapping[PresetName, Preset] = {
    "fast": Preset(samples=32, effort=0.25),
    "default": Preset(samples=128, effort=1.0),
    "best": Preset(samples=512, effort=1.0),
}


@dataclass(frozen=True)
class Recipe:
    """What to do to a model.

    Attributes:
        bits: Width of a weight's code: 2, 3, 4 or 8.
        group_size: Weights that share a scale: 32, 64, 128; ``None`` (``channel`` in files) is one per output channel.
        symmetric: Fixed zero point and free sign of the scale, or a zero point per group.
        grid: A kind of grid (``swquant list grids``): ``uniform``, or a double-quantized one of llama.cpp: ``q2_k``,
            ``q3_k``, ``q4_k``. Of the three fields above those that follow from it, and are left at their defaults,
            are set.
        method: Name of a method (``swquant list methods``), or several with ``+`` between them and their options in
            parentheses: ``gptq + block_ap(epochs=4) + tesseraq``; ``auto`` is ``omniquant``, and with ``time`` what
            that buys.
        options: Options of the method, where there is only one.
        loss: Loss expression, e.g. ``0.9*mse + 0.1*sliced_wasserstein(slices=256)``; ``None`` is each method's own.
        calibration: A text or jsonl file; a datasets name; a mixture of them, ``mix`` or some kinds of it,
            ``mix:chat+code``; ``bundled``, the text that comes with swquant; ``self`` for samples drawn from the model;
            or ``auto``: ``self`` where the model fits for it and it takes no longer than half an hour, else
            ``bundled``.
        samples: Calibration samples; ``None`` is the preset's number.
        seq_len: Tokens of a sample; ``None`` is 2048, or the model's limit if that is less.
        epochs: Passes over the samples of every method that trains by epochs; ``None`` is each method's own number.
        evaluation: Where the windows come from on which the report's numbers are measured, in the same forms as
            ``calibration``; ``None`` holds them out of the calibration source.
        evaluation_samples: How many such windows, of ``seq_len`` tokens each; 0 measures nothing.
        preset: ``fast``, ``default`` or ``best``.
        seed: Of everything that is random.
        precision: Of the blocks' matrix products in training: ``float32``, ``bfloat16``, or ``auto``, which is bfloat16
            where the device has it in hardware. Losses, what is learned, cached hidden states and all else stay in
            float32; beside bfloat16, CUDA multiplies these in TF32.
        device: ``cpu``, an accelerator's name such as ``mps``, or ``auto``.
        format: Format of the output, see ``swquant list formats``; several with commas between them, which are then
            written into a directory each from the same codes; ``None`` is what the runtime reads best, or
            compressed-tensors.
        runtime: What is to serve the output, see ``swquant list targets``; what it cannot load is refused.
        grids: Other grids than the recipe's, or ``None`` (``null``) to keep a matrix as it is, by shell patterns of
            names in memory, such as ``*.v_proj``; the last that matches counts. In files a grid is a mapping of
            ``bits``, ``group_size``, ``symmetric`` and ``grid``, which are the recipe's where they are left out.
        allow_split: ``grids`` may differ among matrices that some runtimes fuse: queries, keys and values; gate and up;
            a layer's experts.
        embedding_bits: Of the token embedding, 4 or 8, rounded to the nearest in groups of 32; ``None`` keeps it as it
            is. Where the head is the embedding, the two stay one.
        head_bits: Of the head, likewise.
        size: Bytes that the output's weights may take on the disk, everything in their files counted; the grids of what
            ``grids`` says nothing of are chosen when a run starts. In files also a text such as ``2.6GB``.
        target_bits: The same as bits for each of the model's weights, embedding and head too.
        time: Seconds that a run may take; method, samples and epochs are then chosen when it starts. In files also a
            text such as ``30m``.

    Raises:
        SwquantError: From :meth:`from_mapping` and :meth:`load`, if a value has the wrong type or is out of range.
    """

    bits: int = 2
    group_size: int | None = 64
    symmetric: bool = True
    grid: str = UNIFORM
    method: str = AUTO
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    loss: str | None = None
    calibration: str = AUTO
    samples: Annotated[int, Field(ge=1)] | None = None
    seq_len: Annotated[int, Field(ge=2)] | None = None
    epochs: Annotated[int, Field(ge=0)] | None = None
    evaluation: str | None = None
    evaluation_samples: Annotated[int, Field(ge=0)] = 16
    preset: PresetName = "default"
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = AUTO
    device: str = AUTO
    format: str | None = None
    runtime: str | None = None
    grids: Mapping[str, QuantSpec | None] = field(default_factory=dict[str, "QuantSpec | None"])
    allow_split: bool = False
    embedding_bits: Literal[4, 8] | None = None
    head_bits: Literal[4, 8] | None = None
    size: Annotated[int, Field(ge=1)] | None = None
    target_bits: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    time: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    def __post_init__(self) -> None:
        if self.time is None and self.method == AUTO:
            object.__setattr__(self, "method", USUAL)
        elif self.time is not None:
            self._require_open()
        if self.group_size == CHANNEL:  # pyright: ignore[reportUnnecessaryComparison]  as files have it
            object.__setattr__(self, "group_size", None)
        for key, value in fixed_by(self.grid).items():
            if vars(self)[key] == _DEFAULTS[key]:
                object.__setattr__(self, key, value)
        if self.size is not None and self.target_bits is not None:
            raise SwquantError("both size and target_bits are given, which say the same: give one")

    def _require_open(self) -> None:
        """Refuse a time beside what it is to choose."""
        given = {"method": self.method != AUTO, "options": bool(self.options), "epochs": self.epochs is not None}
        for key, there in {**given, "preset": self.preset != "default"}.items():
            if there:
                raise SwquantError(
                    f"time chooses the method and how long it trains, and {key} {vars(self)[key]!r} is given: leave "
                    "one of the two out"
                )

    @staticmethod
    def load(name: str | Path) -> Recipe:
        """The named recipe, or the one in a YAML file.

        Raises:
            SwquantError: If there is neither, or the file is not a recipe.
        """
        path = Path(name)
        if path.suffix not in {".yaml", ".yml"}:
            known = _named()
            if str(name) not in known:
                raise SwquantError(f"there is no recipe {str(name)!r}{did_you_mean(str(name), known)}")
            return known[str(name)]
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SwquantError(f"the recipe {path} cannot be read: {error}") from error
        return Recipe.from_text(text, str(path))

    @staticmethod
    def from_text(text: str, what: str) -> Recipe:
        """The recipe that a YAML text holds; ``what`` names it in errors."""
        values = read_yaml(text, what)
        if not isinstance(values, dict):
            raise SwquantError(f"{what} holds no mapping of recipe keys to values")
        return Recipe.from_mapping(values, what)

    @staticmethod
    def from_mapping(values: Mapping[str, Any], what: str = "the recipe") -> Recipe:
        """The recipe with these values over the defaults; ``group_size`` may be ``channel``."""
        values = _from_file(values)
        grids = values.pop("grids", {})
        recipe = build(Recipe, values, what)
        for key, value in fixed_by(recipe.grid).items():
            if values.get(key, value) != value:
                replace(recipe.spec, **{key: values[key]})  # which says what the grid has
        if isinstance(grids, Mapping):
            grids = {name: _other_grid(given, recipe.spec, f"{what}: grids: {name}") for name, given in grids.items()}
        return build(Recipe, {**vars(recipe), "grids": grids}, what)

    @staticmethod
    def recommended(values: Mapping[str, Any]) -> tuple[str, Recipe]:
        """The named recipe for what a user has asked for, its name first.

        Args:
            values: Keys of a recipe; ``bits``, ``group_size``, ``symmetric``, ``grid`` and ``preset`` choose. Where
                there is no recipe for a group size or a grid, that of the usual one for these bits is taken;
                :meth:`override` it then.

        Raises:
            SwquantError: If there is no recipe for these bits.
        """
        asked = Recipe.from_mapping(values)
        if asked.spec.bits not in _GROUPS:
            raise SwquantError(f"there is no recipe for {asked.bits} bits: choose a method, such as --method rtn")
        groups = _GROUPS[asked.bits]
        fits = "group_size" in values and asked.group_size in groups
        recipe = _usual(asked.bits, asked.group_size if fits else groups[0], asked.symmetric, asked.preset)
        return _name(recipe), recipe

    def override(self, values: Mapping[str, Any]) -> Recipe:
        """This recipe with ``values`` in place of its own.

        Options are merged one by one, and so are grids, where a pattern that is given comes after those of this recipe;
        another method starts without this one's options, epochs and loss. A time takes the place of the method, its
        options and epochs, and of the preset.
        """
        base = self.to_mapping()
        if values.get("time") is not None:
            base |= {"method": AUTO, "options": {}, "epochs": None, "preset": "default"}
        if values.get("grid", self.grid) != self.grid:
            base = {key: value for key, value in base.items() if key not in GRID_KEYS}
        if values.get("method", self.method) != self.method:
            base |= {"options": {}, "epochs": None, "loss": None}
        merged = {**base, **values}
        if "options" in values and values.get("method", self.method) == self.method:
            merged["options"] = {**self.options, **values["options"]}
        if isinstance(values.get("grids"), Mapping):
            own = {name: grid for name, grid in base.get("grids", {}).items() if name not in values["grids"]}
            merged["grids"] = {**own, **values["grids"]}
        return Recipe.from_mapping(merged)

    def settled(self, chosen: Mapping[str, Any]) -> Recipe:
        """This recipe with ``chosen`` for those of :data:`SETTLED` that it leaves open."""
        taken = {key: chosen[key] for key in SETTLED if vars(self)[key] == AUTO and key in chosen}
        if taken.get("calibration") not in (SELF, BUNDLED):  # a text that was asked for, which auto never takes
            taken.pop("calibration", None)
        return replace(self, **taken)

    @property
    def spec(self) -> QuantSpec:
        """The grid.

        Raises:
            SwquantError: If bits or group size are out of range.
        """
        return QuantSpec(self.bits, self.group_size, self.symmetric, self.grid)

    @property
    def is_sized(self) -> bool:
        """Whether grids are chosen for a size."""
        return self.size is not None or self.target_bits is not None

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of the output's formats; empty where the recipe leaves them open.

        Raises:
            SwquantError: One comes twice.
        """
        names = () if self.format is None else tuple(name.strip().replace("-", "_") for name in self.format.split(","))
        for name in names:
            if names.count(name) > 1:
                raise SwquantError(f"the format {name!r} comes twice in {self.format!r}; name it once")
        return names

    def to_mapping(self) -> dict[str, Any]:
        """Keys to plain values, the form of the YAML file; without :data:`LATER_KEYS` at their defaults."""
        values = {key: value for key, value in asdict(self).items() if key not in LATER_KEYS or value != _DEFAULTS[key]}
        if "grids" in values:
            values["grids"] = {name: grid and _to_file(grid) for name, grid in values["grids"].items()}
        return _to_file(values)

    def to_yaml(self) -> str:
        """The recipe as a YAML file."""
        return yaml.safe_dump(self.to_mapping(), sort_keys=False)

    @property
    def summary(self) -> str:
        """The recipe in a line."""
        loss = f"loss {self.loss}, " if self.loss else ""
        for name, bits in (("head", self.head_bits), ("embedding", self.embedding_bits)):
            loss = loss if bits is None else f"{name} at {bits} bits, {loss}"
        method = self.method if self.time is None else f"what {span(self.time)} buy"
        loss = f"other grids for {shown_patterns(list(self.grids))}, {loss}" if self.grids else loss
        if self.grid != UNIFORM:
            return f"grid {self.spec.label}, {method}, {loss}preset {self.preset}"
        groups = "per channel" if self.group_size is None else f"groups of {self.group_size}"
        if self.is_sized:
            asked = f"{self.target_bits:g} bits per weight" if self.size is None else size(self.size)
            return f"grids that fit {asked}, {method}, {loss}preset {self.preset}"
        symmetry = "symmetric" if self.symmetric else "asymmetric"
        return f"{self.bits} bits, {groups}, {symmetry}, {method}, {loss}preset {self.preset}"

    def digest(self) -> str:
        """Hash of the canonical form, the same for equal recipes."""
        return hashlib.sha256(json.dumps(self.to_mapping(), sort_keys=True).encode()).hexdigest()[:16]


_DEFAULTS = vars(Recipe())


def shown_patterns(words: Sequence[str]) -> str:
    """What stands in ``grids``, of more than a few the number."""
    return ", ".join(words) if len(words) <= SHOWN else f"{len(words)} patterns"


def shown_text(source: str) -> str:
    """A text of a recipe by its name, without the author's directories."""
    known = {SELF: "text that the original wrote itself", BUNDLED: "the text that comes with swquant"}
    return known.get(source, Path(source).name)


def bits_of(recipe: Mapping[str, Any]) -> str:
    """Of a recipe as files have it, in words: its bits, and those that patterns give to some matrices."""
    others = (grid["bits"] for grid in recipe.get("grids", {}).values() if grid is not None)
    several = sorted({recipe["bits"], *others})
    return f"{' and '.join(filter(None, (', '.join(map(str, several[:-1])), str(several[-1]))))} bits"


def _from_file(values: Mapping[str, Any]) -> dict[str, Any]:
    for key, parse in (("size", parse_size), ("time", parse_span)):
        if isinstance(values.get(key), str):
            values = {**values, key: parse(values[key])}
    return {key: None if key == "group_size" and value == CHANNEL else value for key, value in values.items()}


def _to_file(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: CHANNEL if key == "group_size" and value is None else value for key, value in values.items()}


def _other_grid(given: Any, spec: QuantSpec, what: str) -> QuantSpec | None:
    """The grid that a recipe's ``grids`` gives to some matrices, over the recipe's own."""
    if given is None or isinstance(given, QuantSpec):
        return given
    if not isinstance(given, Mapping):
        raise SwquantError(f"{what} is {given!r}, expected null or a mapping of {', '.join(GRID_KEYS)} and grid")
    own = _from_file(given)
    kind = fixed_by(str(own.get("grid", spec.grid)))
    return build(QuantSpec, {**asdict(spec), **kind, **own}, what)


_GROUPS: Mapping[int, tuple[int | None, ...]] = {2: (64, 128), 3: (128, None), 4: (128,)}
"""Bits to the group sizes that have named recipes, the usual one first."""

_SINGLE: Mapping[str, tuple[str, str | None, tuple[int, ...], tuple[PresetName, ...]]] = {
    "omniquant": ("omniquant", "mse", (2,), tuple(PRESETS)),
    "omniquant-sw": ("omniquant", "0.9*mse + 0.1*sliced_wasserstein", tuple(_GROUPS), tuple(PRESETS)),
    "tesseraq": ("tesseraq", None, (2,), ("default",)),
    "tesseraq-sw": ("tesseraq", "0.9*l2 + 0.1*sliced_wasserstein", (2,), ("default",)),
    "efficientqat": ("efficientqat", None, (2,), ("default",)),
    "signround": ("signround", None, (2,), ("default",)),
}
"""How names of recipes of a single method begin, to the method, its loss, and the bits and presets that there are."""


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes that come with swquant."""
    return tuple(sorted(_named()))


@cache
def _named() -> Mapping[str, Recipe]:
    """All recipes with a name: products of grids and presets, and the files of the papers' own settings."""
    usual = [
        _usual(bits, group_size, symmetric, preset)
        for bits, groups in _GROUPS.items()
        for group_size, symmetric, preset in product(groups, (True, False), PRESETS)
    ]
    named = {_name(recipe): recipe for recipe in usual}
    for start, (method, loss, widths, presets) in _SINGLE.items():
        for bits, preset in product(widths, presets):
            for group_size in _GROUPS[bits]:
                recipe = Recipe(bits, group_size, method=method, loss=loss, preset=preset)
                named[_name(recipe, start)] = recipe
    for entry in (resources.files("swquant") / "recipes").iterdir():
        name = entry.name.removesuffix(".yaml")
        named[name] = Recipe.from_text(entry.read_text(encoding="utf-8"), name)
    return named


def _usual(bits: int, group_size: int | None, symmetric: bool, preset: PresetName) -> Recipe:
    """What ``--bits`` alone picks: GPTQ's start, then Block-AP, then, unless it is to be fast, scales end to end."""
    method = "gptq + block_ap" if preset == "fast" else "gptq + block_ap + end_to_end"
    return Recipe(bits, group_size, symmetric, method=method, loss=usual_loss(bits), preset=preset)


def usual_loss(bits: int) -> str | None:
    """The loss that blocks are trained with where nobody says; ``None`` is the method's own."""
    return "huber(delta=1)" if bits < 4 else None


def _name(recipe: Recipe, start: str = "") -> str:
    """``start``, the grid, ``asym`` and the preset with dashes between, without what is the default."""
    preset = "" if recipe.preset == "default" else recipe.preset
    words = (start, recipe.spec.label, "" if recipe.symmetric else "asym", preset)
    return "-".join(word for word in words if word)
