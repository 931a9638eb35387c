"""The run state: what a run has finished, so that it can be killed at any moment and go on from there."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from swquant.engine.durable import checksum_of, flush, replace_file, save_tensors
from swquant.engine.hidden_states import open_hidden
from swquant.errors import DamagedRunError, SwquantError
from swquant.quant.bits import pack, unpack
from swquant.quant.draft import Committed
from swquant.quant.qtensor import QTensor, as_parts
from swquant.quant.spec import QuantSpec

MANIFEST, LOCK = "manifest.json", "lock"
TOKENS = "tokens.safetensors"
HIDDEN_STATES = ("reference", "quantized")
TRAINED = "trained"
"""The hidden states that take the place of the quantized model's when the whole model has been trained."""
FINAL = "final.safetensors"
BEGAN = "began"
"""Of what is noted: seconds at which the first block began, where a timer tells them."""
_OURS = re.compile(
    r"(?:manifest|tokens|final|block-\d+|training-\d+)\.(?:safetensors|part)"
    rf"|kept-\d+\.state|augmented\.stream|(?:{'|'.join((*HIDDEN_STATES, TRAINED))})-\d+\.stream|output"
)


@dataclass
class RunState:
    """A run's working directory.

    ``manifest.json`` alone says what counts, with a checksum of each file and of itself. A block's tensors and the
    hidden states after it are written beside the old ones and flushed; replacing the manifest commits them in one step;
    then the old hidden states go. Whatever a killed run leaves that the manifest does not name is overwritten or
    ignored.

    Attributes:
        root: The working directory.
        key: Everything that the result depends on: recipe, source, versions.
        shape: Of the hidden states, ``(samples, tokens, dim)``; ``None`` until the first are in.
        reports: A report per finished block.
        files: The checksum of each file that counts, by name.
        notes: What else the start has noted.
        training: Where the training after the last block stands; ``None`` before its first epoch.
        final: What came out of it; ``None`` until then.
        timer: Tells the seconds that the run has been at work, which then stand beside each block and epoch.
    """

    root: Path
    key: Mapping[str, Any]
    shape: tuple[int, int, int] | None = None
    reports: list[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])
    files: dict[str, int] = field(default_factory=dict[str, int])
    notes: dict[str, Any] = field(default_factory=dict[str, Any])
    training: Mapping[str, Any] | None = None
    final: Mapping[str, Any] | None = None
    timer: Callable[[], float] | None = field(default=None, repr=False)
    _final_is_intact: bool = field(default=False, init=False, repr=False)
    _early: dict[str, Future[int]] = field(default_factory=dict[str, "Future[int]"], init=False, repr=False)

    @property
    def done(self) -> int:
        """Blocks finished."""
        return len(self.reports)

    @property
    def spent(self) -> float:
        """Seconds that the run had been at work when what it finished last was committed; 0 where none are told."""
        ends = [self.notes.get(BEGAN), *(report.get("ended") for report in self.reports[-1:])]
        ends += [part.get("ended") for part in (self.training, self.final) if part is not None]
        return max((float(end) for end in ends if end is not None), default=0.0)

    def _ended(self) -> dict[str, float]:
        return {} if self.timer is None else {"ended": round(self.timer(), 3)}

    def hidden_path(self, name: str, block: int) -> Path:
        """File of the hidden states of the model ``name`` before block number ``block``."""
        return self.root / f"{name}-{block:05d}.stream"

    def kept_path(self, rank: int) -> Path:
        """Where a rank has the copy of a state that it trains, for the moment in which that has a name."""
        return self.root / f"kept-{rank}.state"

    def block_path(self, index: int) -> Path:
        """File of a finished block."""
        return self.root / f"block-{index:05d}.safetensors"

    def begin(self, tokens: Mapping[str, Tensor], shape: tuple[int, int, int], notes: Mapping[str, Any]) -> None:
        """Commit the start: the samples' tokens and the hidden states before block 0, which the caller has written."""
        self._keep(self.root / TOKENS, tokens)
        for name in HIDDEN_STATES:
            self._keep_hidden(self.hidden_path(name, 0))
        self.shape = shape
        self.notes = dict(notes) | ({} if self.timer is None else {BEGAN: self.timer()})
        self._commit()

    def commit(self) -> None:
        """Commit what has been noted."""
        self._commit()

    def tokens(self) -> dict[str, Tensor]:
        """The samples' tokens by name."""
        return load_file(self.root / TOKENS)

    def verify(self) -> None:
        """Look at every file that counts before a run goes on; a damaged state of the last training is let go of.

        Raises:
            SwquantError: Another file is missing or damaged.
        """
        spare = None if self.training is None else self.training["file"]
        for name in self.files:
            if name != spare:
                self._verify(name)
        if spare is not None and self._fault(spare) is not None:
            self.training = None
            self._commit(spare)

    def open_hidden_states(self) -> tuple[Tensor, Tensor]:
        """The original's and the quantized model's hidden states before the next block.

        After a training of the whole model, only the evaluation samples of the latter are the trained model's.
        """
        assert self.shape is not None
        names = HIDDEN_STATES if self.final is None else (HIDDEN_STATES[0], TRAINED)
        try:
            reference, quantized = (open_hidden(self.hidden_path(name, self.done), self.shape) for name in names)
        except OSError as error:
            raise self._damaged(str(error)) from error
        return reference, quantized

    def keep_early(self, name: str) -> None:
        """Begin to flush the hidden states of the model ``name`` after the next block, in a thread, and to sum them up.

        They are complete and stay as they are; :meth:`finish_block` waits for what is left, so that it commits nothing
        that is not on the disk.
        """
        path, thread = self.hidden_path(name, self.done + 1), ThreadPoolExecutor(1, "keep-early")
        self._early[path.name] = thread.submit(_flushed, path)
        thread.shutdown(wait=False)

    def finish_block(self, committed: Committed, report: Mapping[str, Any]) -> None:
        """Commit a block; the cached hidden states after it have been written by the caller."""
        index = self.done
        self._keep(self.block_path(index), _to_tensors(committed))
        for name in HIDDEN_STATES:
            self._keep_hidden(self.hidden_path(name, index + 1))
        self.reports.append({**report, **self._ended()})
        self._commit(*(self.hidden_path(name, index).name for name in HIDDEN_STATES))

    def block(self, index: int, grids: Mapping[str, QuantSpec]) -> Committed:
        """A finished block, as the training of the whole model left it where there was one.

        Args:
            index: Which block.
            grids: Of its quantized weights, by name.
        """
        tensors = self._checked(self.block_path(index).name)
        if self.final is not None:
            tensors |= self._final_tensors(index)
        return _from_tensors(tensors, grids)

    def _final_tensors(self, index: int) -> dict[str, Tensor]:
        """What the training of the whole model put in the place of a block's tensors; no other block's are read."""
        prefix, path = f"{index}/", self.root / FINAL
        if not self._final_is_intact:
            self._verify(FINAL)
            self._final_is_intact = True
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}

    def read_block(self, index: int, grids: Mapping[str, QuantSpec], device: torch.device) -> Committed:
        """A finished block on ``device`` as it was before any training of the whole model, its file not checked."""
        tensors = load_file(self.block_path(index))
        return _from_tensors({name: value.to(device) for name, value in tensors.items()}, grids)

    def save_training(self, epoch: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Commit the state of the training after the last block after another epoch."""
        before, path = self.training, self.root / f"training-{epoch:05d}.safetensors"
        self._keep(path, tensors)
        self.training = {**facts, **self._ended(), "epoch": epoch, "file": path.name}
        self._commit(*([] if before is None else [before["file"]]))

    def training_state(self) -> dict[str, Tensor]:
        """The tensors that were last saved."""
        assert self.training is not None
        return self._checked(self.training["file"])

    def finish_training(self, tensors: Mapping[str, Tensor], report: Mapping[str, Any]) -> None:
        """Commit the trained model; the caller has written the cached hidden states :data:`TRAINED`.

        Args:
            tensors: What takes the place of a block's tensors, by the block's number, a slash and its name there.
            report: What the training did.
        """
        before = self.training
        self._keep(self.root / FINAL, tensors)
        self._keep_hidden(self.hidden_path(TRAINED, self.done))
        self.final, self.training = {"report": report, **self._ended()}, None
        self._commit(self.hidden_path(HIDDEN_STATES[1], self.done).name, *([] if before is None else [before["file"]]))

    def clear(self) -> None:
        """Remove the working directory: the manifest after all it tells of, and the lock last.

        What is killed here is known for ours and cleared again, and nobody else begins while it lasts.
        """
        for path in self.root.glob("*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name not in (MANIFEST, LOCK):
                path.unlink(missing_ok=True)
        (self.root / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(self.root, ignore_errors=True)

    def _checked(self, name: str) -> dict[str, Tensor]:
        """The tensors in a file that has the checksum that was noted for it."""
        self._verify(name)
        return load_file(self.root / name)

    def _verify(self, name: str) -> None:
        fault = self._fault(name)
        if fault is not None:
            raise self._damaged(fault)

    def _fault(self, name: str) -> str | None:
        """What is wrong with a file that counts."""
        try:
            intact = checksum_of(self.root / name) == self.files[name]
        except OSError as error:
            return str(error)
        return None if intact else f"the checksum of {name} is not the one that was noted"

    def _keep(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.files[path.name] = save_tensors(path, tensors)

    def _keep_hidden(self, path: Path) -> None:
        early = self._early.pop(path.name, None)
        self.files[path.name] = _flushed(path) if early is None else early.result()

    def _commit(self, *dropped: str) -> None:
        """Write the manifest without the files ``dropped``, and remove these."""
        for name in dropped:
            self.files.pop(name, None)
        state = {
            "key": self.key,
            "shape": self.shape,
            "reports": self.reports,
            "files": self.files,
            "notes": self.notes,
            "training": self.training,
            "final": self.final,
        }
        replace_file(self.root / MANIFEST, _sealed(state).encode())
        for name in dropped:
            (self.root / name).unlink(missing_ok=True)

    def _damaged(self, what: str) -> SwquantError:
        return DamagedRunError(f"the working directory {self.root} is damaged: {what}; delete it to start over")


def open_run_state(root: Path, key: Mapping[str, Any]) -> RunState:
    """The run state at ``root``: where the run with this ``key`` stopped, or a new one.

    Raises:
        SwquantError: If ``root`` belongs to a run with another key, or holds something that is no run state.
    """
    manifest = root / MANIFEST
    key = json.loads(json.dumps(key))
    if not manifest.exists():
        return RunState(root, key)
    try:
        state = _unsealed(manifest.read_bytes())
        theirs, shape = state["key"], tuple(state["shape"])
        run_state = RunState(
            root,
            key,
            (shape[0], shape[1], shape[2]),
            state["reports"],
            state["files"],
            state["notes"],
            state["training"],
            state["final"],
        )
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise SwquantError(f"{manifest} is damaged ({error}); delete {root} to start over") from error
    if theirs != key:
        changed = sorted(name for name in {*theirs, *key} if theirs.get(name) != key.get(name))
        raise SwquantError(
            f"{root} holds an unfinished run that differs in {', '.join(changed)}; repeat that command to finish it, "
            "delete the directory to drop it, or choose another --out"
        )
    return run_state


def begun_with(root: Path) -> Mapping[str, Any]:
    """The key of the run at ``root``; empty where none has begun, or its manifest cannot be read."""
    return _read(root, "key")


def noted(root: Path) -> Mapping[str, Any]:
    """What the start of the run at ``root`` has noted; empty likewise."""
    return _read(root, "notes")


def _read(root: Path, part: str) -> Mapping[str, Any]:
    try:
        return dict(_unsealed((root / MANIFEST).read_bytes())[part])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def lock_directory(root: Path) -> AbstractContextManager[object]:
    """Make ``root`` and hold it for this process, until the context that is returned is left.

    Raises:
        SwquantError: If another process holds it, or it is not ours.
    """
    root.mkdir(parents=True, exist_ok=True)
    foreign = [path.name for path in root.iterdir() if path.name != LOCK]
    if foreign and not (root / MANIFEST).exists() and not all(_is_ours(name) for name in foreign):
        raise SwquantError(
            f"{root} is needed as a working directory but holds {foreign[0]!r}; move it or choose another --out"
        )
    try:
        return FileLock(root / LOCK).acquire(timeout=0)
    except Timeout as error:
        raise SwquantError(f"another process is writing to {root}; wait for it, or choose another --out") from error


def _flushed(path: Path) -> int:
    """The checksum of a file that is on the disk on return."""
    flush(path)
    return checksum_of(path)


def _is_ours(name: str) -> bool:
    return _OURS.fullmatch(name) is not None


def _to_tensors(committed: Committed) -> dict[str, Tensor]:
    out = {f"{name}:plain": value for name, value in committed.params.items()}
    for name, quantized in committed.quantized.items():
        out[f"{name}:codes"] = pack(quantized.codes, quantized.spec.bits)
        out[f"{name}:shape"] = torch.tensor(quantized.codes.shape)
        out |= {f"{name}:{part}": value for part, value in stored_parts(quantized).items()}
    return {name: value.detach().cpu().contiguous() for name, value in out.items()}


def stored_parts(quantized: QTensor) -> dict[str, Tensor]:
    """A quantized weight's parts in the dtypes in which a run state holds them, without loss."""
    parts = quantized.spec.kind.parts(quantized.spec)
    return {name: quantized.parts[name].to(part.dtype) for name, part in parts.items()}


def _from_tensors(tensors: Mapping[str, Tensor], grids: Mapping[str, QuantSpec]) -> Committed:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, part = key.rpartition(":")
        parts.setdefault(name, {})[part] = value
    quantized = {name: _quantized(part, grids[name]) for name, part in parts.items() if "codes" in part}
    return Committed(quantized, {name: part["plain"] for name, part in parts.items() if "plain" in part})


def _quantized(part: Mapping[str, Tensor], spec: QuantSpec) -> QTensor:
    return QTensor(unpack(part["codes"], spec.bits, int(part["shape"][1])), as_parts(part, spec), spec)


def _sealed(state: Mapping[str, Any]) -> str:
    """``state`` as JSON with a checksum of its text."""
    return json.dumps({**state, "checksum": zlib.crc32(json.dumps(state).encode())})


def _unsealed(content: bytes) -> dict[str, Any]:
    """Undo :func:`_sealed`; raises ``ValueError``, ``KeyError`` or ``TypeError`` on anything else."""
    state = json.loads(content)
    if not isinstance(state, dict):
        raise ValueError("it does not hold a JSON object")
    noted = state.pop("checksum")
    if zlib.crc32(json.dumps(state).encode()) != noted:
        raise ValueError("its checksum is not the one that was noted")
    return state
