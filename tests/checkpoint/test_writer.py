"""Written checkpoints: read back whole, split at the limit, published in one step or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import weakref
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from swquant.checkpoint.reader import open_checkpoint
from swquant.checkpoint.writer import Written, publish, write_checkpoint
from swquant.errors import SwquantError
from swquant.places import require_disk, require_unused

INDEX = "model.safetensors.index.json"
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "name": "ü"}
LIMIT = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.uint8, torch.bool)

Parts = list[dict[str, Tensor]]


@st.composite
def parts_of_a_model(draw: st.DrawFn) -> Parts:
    """Parts of a few tensors each, some larger than :data:`LIMIT` bytes and some smaller; one may be empty."""
    names = draw(st.lists(st.text("ab.0", min_size=1, max_size=4), min_size=1, max_size=8, unique=True))
    cuts = draw(st.lists(st.booleans(), min_size=len(names), max_size=len(names)))
    parts: Parts = [{}]
    for name, cut in zip(names, cuts, strict=True):
        shape = draw(st.lists(st.integers(1, 4), max_size=3))
        tensor = (torch.rand(shape) * 9).to(draw(st.sampled_from(DTYPES)))
        parts[-1][name] = tensor
        if cut:
            parts.append({})
    parts[0]["weight"] = torch.rand(2)
    return parts


def size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def everything(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


class TestRoundTrip:
    @given(parts=parts_of_a_model())
    @settings(deadline=None)
    def test_what_is_written_is_read_back(self, tmp_path_factory: pytest.TempPathFactory, parts: Parts) -> None:
        directory = tmp_path_factory.mktemp("written") / "model"
        with mock.patch("swquant.checkpoint.writer.SHARD_BYTES", LIMIT):
            written = write_checkpoint(directory, iter(parts), config=CONFIG)
        whole = {name: tensor for part in parts for name, tensor in part.items()}
        checkpoint = open_checkpoint(directory)
        assert checkpoint.config == CONFIG
        assert checkpoint.tensor_bytes == written.tensor_bytes == size(whole)
        assert list(checkpoint.tensors) == sorted(whole)
        for name, tensor in whole.items():
            read = checkpoint.read(name)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)

    @given(parts=parts_of_a_model())
    @settings(deadline=None)
    def test_shards_hold_whole_parts_in_order_up_to_the_limit(
        self, tmp_path_factory: pytest.TempPathFactory, parts: Parts
    ) -> None:
        directory = tmp_path_factory.mktemp("written") / "model"
        with mock.patch("swquant.checkpoint.writer.SHARD_BYTES", LIMIT):
            written = write_checkpoint(directory, parts, config=CONFIG)
        shards = [load_file(directory / file) for file in written.shards]
        place = {name: number for number, shard in enumerate(shards) for name in shard}
        numbers = [{place[name] for name in part} for part in parts if part]
        assert all(len(number) == 1 for number in numbers)
        order = [number for (number,) in numbers]
        assert order == sorted(order)
        for number, shard in enumerate(shards):
            inside = [part for part in parts if part and place[next(iter(part))] == number]
            assert size(shard) <= LIMIT or len(inside) == 1
        for (earlier, here), (later, there) in pairwise(zip((part for part in parts if part), order, strict=True)):
            assert there == here or size(shards[here]) + size(later) > LIMIT, (earlier, later)

    @given(parts=parts_of_a_model())
    @settings(deadline=None)
    def test_the_index_names_each_tensors_shard_and_the_total(
        self, tmp_path_factory: pytest.TempPathFactory, parts: Parts
    ) -> None:
        directory = tmp_path_factory.mktemp("written") / "model"
        with mock.patch("swquant.checkpoint.writer.SHARD_BYTES", LIMIT):
            written = write_checkpoint(directory, parts, config=CONFIG)
        count = len(written.shards)
        if count == 1:
            assert {path.name for path in directory.iterdir()} == {"model.safetensors", "config.json"}
            return
        expected = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        assert list(written.shards) == expected
        assert {path.name for path in directory.iterdir()} == {*expected, INDEX, "config.json"}
        index = json.loads((directory / INDEX).read_text())
        assert index["metadata"] == {"total_size": written.tensor_bytes}
        assert index["weight_map"] == {name: file for file in expected for name in load_file(directory / file)}
        assert list(index["weight_map"]) == sorted(index["weight_map"])

    @given(parts=parts_of_a_model())
    @settings(deadline=None, max_examples=20)
    def test_equal_arguments_give_equal_bytes(self, tmp_path_factory: pytest.TempPathFactory, parts: Parts) -> None:
        places = [tmp_path_factory.mktemp("written") / name for name in ("one", "other")]
        with mock.patch("swquant.checkpoint.writer.SHARD_BYTES", LIMIT):
            one, other = (write_checkpoint(place, parts, config=CONFIG) for place in places)
        assert one == other
        assert everything(places[0]) == everything(places[1])

    def test_readers_are_told_that_tensors_are_torchs(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "model", [{"w": torch.ones(2)}], config=CONFIG)
        with safe_open(tmp_path / "model" / "model.safetensors", "pt") as shard:
            assert shard.metadata() == {"format": "pt"}

    def test_views_of_shared_memory(self, tmp_path: Path) -> None:
        base = torch.arange(12.0).reshape(3, 4).requires_grad_()
        part = {"whole": base, "transposed": base.T, "row": base[1], "column": base[:, 2]}
        written = write_checkpoint(tmp_path / "model", [part], config=CONFIG)
        read = load_file(tmp_path / "model" / "model.safetensors")
        assert all(torch.equal(read[name], tensor) for name, tensor in part.items())
        assert written == Written(("model.safetensors",), (12 + 12 + 4 + 3) * 4)

    def test_parts_are_dropped_when_their_shard_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("swquant.checkpoint.writer.SHARD_BYTES", LIMIT)
        made: list[weakref.ref[Tensor]] = []

        def parts() -> Iterator[dict[str, Tensor]]:
            for number in range(10):
                assert sum(tensor() is not None for tensor in made) <= 1
                part = {f"w{number}": torch.full((12,), float(number))}
                made.append(weakref.ref(part[f"w{number}"]))
                yield part
                del part

        write_checkpoint(tmp_path / "model", parts(), config=CONFIG)
        assert len(made) == 10
        assert not [tensor for tensor in made if tensor() is not None]

    def test_a_name_that_comes_twice(self, tmp_path: Path) -> None:
        parts = [{"a": torch.ones(1)}, {"b": torch.ones(1), "a": torch.ones(1)}]
        with pytest.raises(ValueError, match="the tensor 'a' came twice"):
            write_checkpoint(tmp_path / "model", parts, config=CONFIG)

    @pytest.mark.parametrize("parts", [[], [{}, {}]])
    def test_nothing_to_write(self, tmp_path: Path, parts: Parts) -> None:
        with pytest.raises(ValueError, match="at least one tensor"):
            write_checkpoint(tmp_path / "model", parts, config=CONFIG)

    def test_a_disk_that_fails_is_an_oserror(self, tmp_path: Path) -> None:
        def parts() -> Iterator[dict[str, Tensor]]:
            shutil.rmtree(tmp_path / "model")
            yield {"w": torch.ones(1)}

        with pytest.raises(OSError, match=r"shard-00000\.safetensors cannot be written"):
            write_checkpoint(tmp_path / "model", parts(), config=CONFIG)


class TestBesideTheWeights:
    def test_sidecars_are_copied_through_links_and_replaced_by_what_is_written(self, tmp_path: Path) -> None:
        source = tmp_path / "source"
        source.mkdir()
        (tmp_path / "blob").write_bytes(b"\x00tokens\xff")
        (source / "tokenizer.model").symlink_to(tmp_path / "blob")
        for name in ("LICENSE", "config.json", "report.json"):
            (source / name).write_text("theirs")
        files = {"report.json": "ours ü", "raw": b"\x00\xff"}
        directory = tmp_path / "model"
        write_checkpoint(
            directory, [{"w": torch.ones(1)}], config=CONFIG, sidecars=sorted(source.iterdir()), extra_files=files
        )
        assert not (directory / "tokenizer.model").is_symlink()
        assert everything(directory) == {
            "LICENSE": b"theirs",
            "config.json": (json.dumps(CONFIG, indent=2) + "\n").encode(),
            "model.safetensors": (directory / "model.safetensors").read_bytes(),
            "raw": b"\x00\xff",
            "report.json": "ours ü".encode(),
            "tokenizer.model": b"\x00tokens\xff",
        }

    def test_every_file_is_flushed_and_the_directory_last(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flushed: list[str] = []
        fsync = os.fsync

        def watched(descriptor: int) -> None:
            flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
            fsync(descriptor)

        if not Path("/proc/self/fd").exists():
            pytest.skip("only Linux tells a descriptor's file")
        monkeypatch.setattr("swquant.checkpoint.writer.SHARD_BYTES", 4)
        monkeypatch.setattr(os, "fsync", watched)
        (tmp_path / "LICENSE").write_text("x")
        parts = [{"a": torch.ones(1)}, {"b": torch.ones(1)}]
        write_checkpoint(
            tmp_path / "model", parts, config=CONFIG, sidecars=[tmp_path / "LICENSE"], extra_files={"x": "y"}
        )
        shards = ["shard-00000.safetensors", "shard-00001.safetensors"]
        assert flushed == ["LICENSE", *shards, INDEX, "x", "config.json", "model"]


def in_use(place: Path, why: str) -> None:
    with pytest.raises(SwquantError) as caught:
        require_unused(place)
    assert str(caught.value) == f"the output directory {place} is in use: {why}; choose another --out, or empty it"


class TestUnused:
    def test_free_places(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "link").symlink_to("empty")
        for name in ("empty", "link", "new", "deep/new"):
            require_unused(tmp_path / name)

    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("")
        in_use(tmp_path / "out", "it is a file")

    def test_a_place_below_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        in_use(tmp_path / "file" / "deep" / "out", f"{tmp_path / 'file'} is a file")

    def test_a_broken_link(self, tmp_path: Path) -> None:
        (tmp_path / "out").symlink_to("nowhere")
        in_use(tmp_path / "out", "it is a broken link")

    def test_a_directory_names_what_it_holds(self, tmp_path: Path) -> None:
        for name in ("b", "a", ".hidden"):
            (tmp_path / name).write_text("")
            in_use(tmp_path, f"it holds {name!r}")

    def test_writing_refuses_it(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("precious")
        with pytest.raises(SwquantError, match=r"it holds 'thesis\.tex'"):
            write_checkpoint(tmp_path, [{"w": torch.ones(1)}], config=CONFIG)
        assert everything(tmp_path) == {"thesis.tex": b"precious"}


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    staging = tmp_path / "work" / "output"
    staging.mkdir(parents=True)
    (staging / "config.json").write_text("{}")
    return staging


class TestPublish:
    @pytest.mark.parametrize("out", ["new", "deep/er/new", "empty"])
    def test_it_appears_whole_and_leaves_the_staging_place(self, staging: Path, tmp_path: Path, out: str) -> None:
        (tmp_path / "empty").mkdir()
        publish(staging, tmp_path / out)
        assert everything(tmp_path / out) == {"config.json": b"{}"}
        assert not staging.exists()

    def test_through_a_link_to_an_empty_directory(self, staging: Path, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "link").symlink_to("empty")
        publish(staging, tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert everything(tmp_path / "empty") == {"config.json": b"{}"}

    def test_what_is_there_stays(self, staging: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("precious")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "thesis.tex").write_text("precious")
        for name, why in {"file": "it is a file", "full": r"it holds 'thesis\.tex'"}.items():
            with pytest.raises(SwquantError, match=why):
                publish(staging, tmp_path / name)
        assert (tmp_path / "file").read_text() == "precious"
        assert everything(tmp_path / "full") == {"thesis.tex": b"precious"}
        assert everything(staging) == {"config.json": b"{}"}

    def test_a_place_that_fills_after_it_was_found_free(
        self, staging: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"

        def fill(place: Path) -> None:
            require_unused(place)
            place.mkdir()
            (place / "thesis.tex").write_text("precious")

        monkeypatch.setattr("swquant.checkpoint.writer.require_unused", fill)
        with pytest.raises(SwquantError, match="is in use: it was filled in the meantime"):
            publish(staging, out)
        assert everything(out) == {"thesis.tex": b"precious"}
        assert staging.exists()

    def test_another_file_system(self, staging: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> None:
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(Path, "rename", refuse)
        with pytest.raises(SwquantError, match="are on different file systems; choose an --out beside it"):
            publish(staging, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_other_failures_pass_through(self, staging: Path, tmp_path: Path) -> None:
        shutil.rmtree(staging)
        with pytest.raises(FileNotFoundError):
            publish(staging, tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestDisk:
    def test_the_limit_is_exact(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2_500_000_000))
        require_disk(tmp_path, 2_500_000_000)
        with pytest.raises(SwquantError, match=r"needs 2\.50 GB of disk and 2\.50 GB are available"):
            require_disk(tmp_path, 2_500_000_001)
        with pytest.raises(SwquantError, match=r"^.*out needs 7\.13 GB of disk and 2\.50 GB are available; free some"):
            require_disk(tmp_path / "out", 7_130_000_000)

    @pytest.mark.parametrize("relative", [False, True])
    def test_the_nearest_place_that_exists_is_asked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool
    ) -> None:
        asked: list[Path] = []
        monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=1))
        monkeypatch.chdir(tmp_path)
        (tmp_path / "there").mkdir()
        require_disk(Path("there/not/yet") if relative else tmp_path / "there" / "not" / "yet", 1)
        assert asked == [tmp_path / "there"]
