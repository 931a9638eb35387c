from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from swquant.checkpoint.reader import open_checkpoint
from swquant.errors import SwquantError

Make = Callable[..., Path]
INDEX = "model.safetensors.index.json"


def refused(source: str | Path, *parts: str) -> None:
    """Opening fails with one sentence on one line that holds all ``parts``."""
    with pytest.raises(SwquantError) as caught:
        open_checkpoint(source)
    said = str(caught.value)
    assert said.isprintable()
    assert all(part in said for part in parts), said


def write_raw(path: Path, header: object, body: bytes = b"", length: int | None = None) -> None:
    """A safetensors file from its parts, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def edit_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


class TestWhole:
    def test_one_file(self, lay_out: Make, weights: dict[str, Tensor]) -> None:
        directory = lay_out(weights)
        checkpoint = open_checkpoint(str(directory))
        assert checkpoint.directory == directory
        assert checkpoint.config == {"model_type": "llama", "hidden_size": 4}
        assert list(checkpoint.tensors) == sorted(weights)
        for name, tensor in weights.items():
            stored = checkpoint.tensors[name]
            assert stored.file == directory / "model.safetensors"
            assert (stored.dtype, stored.shape, stored.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
            read = checkpoint.read(name)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)

    def test_shards_and_a_tensor_that_the_index_does_not_list(self, lay_out: Make, weights: dict[str, Tensor]) -> None:
        names = sorted(weights)
        shards = [{name: weights[name] for name in half} for half in (names[2:], names[:2])]
        directory = lay_out(*shards)
        listed = {names[0]: "model-00002-of-00002.safetensors", names[3]: "model-00001-of-00002.safetensors"}
        edit_index(directory, listed)
        checkpoint = open_checkpoint(directory)
        assert list(checkpoint.tensors) == names
        assert all(torch.equal(checkpoint.read(name), weights[name]) for name in names)
        assert {stored.file.name for stored in checkpoint.tensors.values()} == set(listed.values())

    def test_the_single_file_goes_before_an_index(self, lay_out: Make, weights: dict[str, Tensor]) -> None:
        directory = lay_out(weights)
        edit_index(directory, {"model.norm.weight": "elsewhere.safetensors"})
        assert set(open_checkpoint(directory).tensors) == set(weights)

    def test_sizes_and_dtype_count_bytes_of_floating_tensors(self, lay_out: Make) -> None:
        shard = {
            "a": torch.ones(40, dtype=torch.bfloat16),
            "b": torch.ones(21),
            "c": torch.ones(1000, dtype=torch.int64),
        }
        checkpoint = open_checkpoint(lay_out(shard))
        assert checkpoint.tensor_bytes == 80 + 84 + 8000
        assert checkpoint.dtype == torch.float32

    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16])
    def test_integer_buffers(self, lay_out: Make, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
        weights["buffer"] = torch.tensor([0, 1, 1]).to(dtype)
        checkpoint = open_checkpoint(lay_out(weights))
        assert checkpoint.tensors["buffer"].dtype == dtype
        assert torch.equal(checkpoint.read("buffer"), weights["buffer"])

    def test_read_survives_the_file_and_leaves_it_alone(self, lay_out: Make, weights: dict[str, Tensor]) -> None:
        directory = lay_out(weights)
        checkpoint = open_checkpoint(directory)
        before = (directory / "model.safetensors").read_bytes()
        tensor = checkpoint.read("model.norm.weight")
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        tensor.zero_()
        assert (directory / "model.safetensors").read_bytes() == before
        assert torch.equal(checkpoint.read("model.norm.weight"), weights["model.norm.weight"])

    def test_has_and_a_missing_tensor(self, lay_out: Make, weights: dict[str, Tensor]) -> None:
        checkpoint = open_checkpoint(lay_out(weights))
        assert checkpoint.has("model.norm.weight")
        assert not checkpoint.has("lm_head.weight")
        for act in (checkpoint.read, lambda name: checkpoint.rows(name, torch.tensor([0]))):
            with pytest.raises(SwquantError, match=r"has no tensor 'lm_head\.weight'"):
                act("lm_head.weight")

    def test_home_directory(
        self, lay_out: Make, weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        directory = lay_out(weights)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("USERPROFILE", str(tmp_path))
        assert open_checkpoint("~/model").directory == directory


class TestValues:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_one_bad_value_is_refused_where_it_is_read(self, lay_out: Make, value: float, dtype: torch.dtype) -> None:
        matrix = torch.ones(5, 3, dtype=dtype)
        matrix[3, 1] = value
        directory = lay_out({"w": matrix})
        checkpoint = open_checkpoint(directory)
        said = f"'w' in {re.escape(str(directory / 'model.safetensors'))} holds NaN or infinite values"
        with pytest.raises(SwquantError, match=said):
            checkpoint.read("w")
        with pytest.raises(SwquantError, match=said):
            checkpoint.rows("w", torch.tensor([0, 3]))
        assert torch.equal(checkpoint.rows("w", torch.tensor([0, 4])), torch.ones(2, 3, dtype=dtype))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @given(place=st.integers(0, 10**6), size=st.integers(1, 300))
    @settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_one_bad_value_anywhere_is_found(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, dtype: torch.dtype, place: int, size: int
    ) -> None:
        monkeypatch.setattr("swquant.checkpoint.reader._CHUNK", 64)
        path = tmp_path / "model.safetensors"
        (tmp_path / "config.json").write_text("{}")
        vector = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
        sound = {"a": torch.ones(3, 2), "ids": torch.arange(4), "scalar": torch.tensor(1.0), "w": vector}
        save_file(sound, path)
        open_checkpoint(tmp_path).require_finite()
        vector[place % size] = value
        save_file(sound, path)
        with pytest.raises(SwquantError, match=f"^'w' in {re.escape(str(path))} holds NaN or infinite values; "):
            open_checkpoint(tmp_path).require_finite()

    @pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells memory of files from other")
    def test_the_files_are_mapped_and_not_held(self, lay_out: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        def held() -> int:
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))

        checkpoint = open_checkpoint(lay_out({"w": torch.zeros(64 << 20, dtype=torch.bfloat16)}))
        aminmax, seen = torch.aminmax, [held()]

        def watched(chunk: Tensor) -> object:
            seen.append(held())
            return aminmax(chunk)

        monkeypatch.setattr(torch, "aminmax", watched)
        checkpoint.require_finite()
        assert len(seen) == 1 + 16
        assert max(seen) - seen[0] < 32 << 20

    def test_a_bad_value_behind_the_first_chunk(self, lay_out: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("swquant.checkpoint.reader._CHUNK", 4)
        matrix = torch.ones(5, 3)
        matrix[4, 2] = float("nan")
        with pytest.raises(SwquantError, match="NaN"):
            open_checkpoint(lay_out({"w": matrix})).read("w")

    @given(st.lists(st.integers(0, 15), max_size=40))
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_rows_are_those_of_the_whole(self, tmp_path_factory: pytest.TempPathFactory, indices: list[int]) -> None:
        directory = tmp_path_factory.getbasetemp() / "rows"
        matrix = torch.arange(64).reshape(16, 4).bfloat16()
        if not directory.exists():
            directory.mkdir()
            (directory / "config.json").write_text("{}")
            save_file({"before": torch.ones(3), "w": matrix}, directory / "model.safetensors")
        rows = open_checkpoint(directory).rows("w", torch.tensor(indices, dtype=torch.int64))
        assert rows.dtype == matrix.dtype
        assert torch.equal(rows, matrix[indices])

    def test_rows_merge_neighbours(
        self, lay_out: Make, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        checkpoint = open_checkpoint(lay_out(weights))
        asked: list[slice] = []

        class Shard:
            def __enter__(self) -> Shard:
                return self

            def __exit__(self, *_: object) -> None: ...

            def get_slice(self, name: str) -> Shard:
                assert name == "model.embed_tokens.weight"
                return self

            def __getitem__(self, rows: slice) -> Tensor:
                asked.append(rows)
                return weights["model.embed_tokens.weight"][rows]

        monkeypatch.setattr("swquant.checkpoint.shards.safe_open", lambda *_, **__: Shard())
        checkpoint.rows("model.embed_tokens.weight", torch.tensor([9, 3, 4, 0, 10, 5, 3]))
        assert asked == [slice(0, 1), slice(3, 6), slice(9, 11)]

    @pytest.mark.parametrize("row", [-1, 16])
    def test_a_row_that_is_not_there(self, lay_out: Make, weights: dict[str, Tensor], row: int) -> None:
        checkpoint = open_checkpoint(lay_out(weights))
        with pytest.raises(SwquantError, match=rf"^row {row} of 'model.embed_tokens.weight' .* rows 0 to 15; "):
            checkpoint.rows("model.embed_tokens.weight", torch.tensor([2, row, 40]))

    @pytest.mark.parametrize(("name", "shape"), [("model.norm.weight", (2,)), ("model.embed_tokens.weight", (2, 2))])
    def test_rows_are_of_a_matrix(
        self, lay_out: Make, weights: dict[str, Tensor], name: str, shape: tuple[int, ...]
    ) -> None:
        with pytest.raises(ValueError, match="wants a matrix and a vector"):
            open_checkpoint(lay_out(weights)).rows(name, torch.zeros(shape, dtype=torch.int64))

    def test_a_file_changed_after_opening(self, lay_out: Make, weights: dict[str, Tensor]) -> None:
        directory = lay_out(weights)
        checkpoint = open_checkpoint(directory)
        os.truncate(directory / "model.safetensors", 100)
        with pytest.raises(SwquantError, match="has changed since it was opened"):
            checkpoint.read("model.norm.weight")
        (directory / "model.safetensors").unlink()
        with pytest.raises(SwquantError, match="cannot be read"):
            checkpoint.rows("model.embed_tokens.weight", torch.tensor([1]))


class TestFingerprint:
    def test_a_copy_has_the_same(self, lay_out: Make, weights: dict[str, Tensor], tmp_path: Path) -> None:
        directory = lay_out(weights)
        copy = tmp_path / "elsewhere"
        shutil.copytree(directory, copy)
        os.utime(copy / "model.safetensors", (1, 1))
        (copy / "README.md").write_text("hello")
        fingerprint = open_checkpoint(directory).fingerprint()
        assert re.fullmatch("[0-9a-f]{64}", fingerprint)
        assert open_checkpoint(copy).fingerprint() == fingerprint

    @pytest.mark.parametrize("shard", [1, 2])
    def test_one_bit_of_a_weight_changes_it(self, lay_out: Make, weights: dict[str, Tensor], shard: int) -> None:
        names = sorted(weights)
        directory = lay_out({name: weights[name] for name in names[:2]}, {name: weights[name] for name in names[2:]})
        before = open_checkpoint(directory).fingerprint()
        path = directory / f"model-0000{shard}-of-00002.safetensors"
        times = path.stat()
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert open_checkpoint(directory).fingerprint() != before

    def test_config_and_shard_names_change_it(self, lay_out: Make, weights: dict[str, Tensor]) -> None:
        directory = lay_out(weights)
        fingerprints = [open_checkpoint(directory).fingerprint()]
        (directory / "config.json").write_text('{"model_type": "llama", "hidden_size": 5}')
        fingerprints.append(open_checkpoint(directory).fingerprint())
        (directory / "model.safetensors").rename(directory / "other.safetensors")
        edit_index(directory, dict.fromkeys(weights, "other.safetensors"))
        fingerprints.append(open_checkpoint(directory).fingerprint())
        assert len(set(fingerprints)) == 3

    @pytest.mark.parametrize("subfolder", [None, "original"])
    def test_names_of_blobs_in_a_hub_cache_are_taken_for_hashes(
        self, lay_out: Make, weights: dict[str, Tensor], tmp_path: Path, subfolder: str | None
    ) -> None:
        """As huggingface_hub lays it out; the small file's name is git's, and tells nothing of the content alone."""
        plain = lay_out(weights)
        repo, snapshot = tmp_path / "models--owner--name", Path("snapshots", "abc", subfolder or "")
        (repo / "blobs").mkdir(parents=True)
        (repo / snapshot).mkdir(parents=True)
        for path in plain.iterdir():
            content = path.read_bytes()
            kind = hashlib.sha256 if path.suffix == ".safetensors" else hashlib.sha1
            blob = repo / "blobs" / kind(content).hexdigest()
            blob.write_bytes(content)
            (repo / snapshot / path.name).symlink_to(os.path.relpath(blob, repo / snapshot))
        shard, config = ((repo / snapshot / name).resolve() for name in ("model.safetensors", "config.json"))
        fingerprint = open_checkpoint(plain).fingerprint()
        assert open_checkpoint(repo / snapshot).fingerprint() == fingerprint
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        assert open_checkpoint(repo / snapshot).fingerprint() == fingerprint, "the shard was read"
        other = shard.with_name(hashlib.sha256(content).hexdigest())
        shard.rename(other)
        (repo / snapshot / "model.safetensors").unlink()
        (repo / snapshot / "model.safetensors").symlink_to(other)
        changed = open_checkpoint(repo / snapshot).fingerprint()
        assert changed != fingerprint
        config.write_text(config.read_text() + " ")
        assert open_checkpoint(repo / snapshot).fingerprint() != changed

    @pytest.mark.parametrize("place", ["files", "blobs"])
    def test_a_name_that_looks_like_a_hash_is_none_elsewhere(
        self, lay_out: Make, weights: dict[str, Tensor], tmp_path: Path, place: str
    ) -> None:
        directory = lay_out(weights)
        fingerprint = open_checkpoint(directory).fingerprint()
        (tmp_path / place).mkdir()
        (directory / "model.safetensors").rename(tmp_path / place / ("0" * 64))
        (directory / "model.safetensors").symlink_to(tmp_path / place / ("0" * 64))
        assert open_checkpoint(directory).fingerprint() == fingerprint


class TestSidecars:
    WANTED = (
        "LICENSE",
        "LICENSE.txt",
        "NOTICE",
        "USE_POLICY.md",
        "added_tokens.json",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "spiece.model",
        "tekken.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    )
    OTHERS = (
        "LICENSE.py",
        "README.md",
        "license.bin",
        "modeling_llama.py",
        "notice.safetensors",
        "optimizer.pt",
        "pytorch_model.bin",
        "tokenization_llama.py",
        "tokenizer.bin",
        "tokenizer.pkl",
        "tokenizer.py",
        "vocab.pth",
    )

    def test_what_is_copied(self, lay_out: Make, weights: dict[str, Tensor]) -> None:
        directory = lay_out(weights)
        for name in (*self.WANTED, *self.OTHERS):
            (directory / name).write_text("x")
        (directory / "tokenizer.jsondir.json").mkdir()
        sidecars = open_checkpoint(directory).sidecars()
        assert [path.name for path in sidecars] == sorted(self.WANTED)
        assert {path.parent for path in sidecars} == {directory}

    def test_links_in_a_hub_cache(self, lay_out: Make, weights: dict[str, Tensor], tmp_path: Path) -> None:
        repo = tmp_path / "models--owner--name"
        (repo / "blobs").mkdir(parents=True)
        (repo / "snapshots").mkdir()
        snapshot = lay_out(weights, name="models--owner--name/snapshots/abc")
        for file in list(snapshot.iterdir()):
            file.rename(repo / "blobs" / file.name)
            file.symlink_to(Path("../../blobs") / file.name)
        (repo / "blobs" / "0123").write_text("{}")
        (snapshot / "tokenizer.json").symlink_to("../../blobs/0123")
        checkpoint = open_checkpoint(snapshot)
        assert checkpoint.sidecars() == (snapshot / "tokenizer.json",)
        assert torch.equal(checkpoint.read("model.norm.weight"), weights["model.norm.weight"])

    def test_a_link_to_a_private_file_is_refused(
        self, lay_out: Make, weights: dict[str, Tensor], tmp_path: Path
    ) -> None:
        (tmp_path / "private").write_text("secret")
        directory = lay_out(weights)
        (directory / "LICENSE").symlink_to("../private")
        with pytest.raises(SwquantError, match=r"LICENSE is a link to .*private, outside the model"):
            open_checkpoint(directory).sidecars()

    def test_a_link_within_the_directory(self, lay_out: Make, weights: dict[str, Tensor]) -> None:
        directory = lay_out(weights)
        (directory / "README.md").write_text("x")
        (directory / "LICENSE").symlink_to("README.md")
        assert open_checkpoint(directory).sidecars() == (directory / "LICENSE",)


class TestRefusals:
    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_text("")
        refused(tmp_path / "x", f"{tmp_path / 'x'} is a file, expected a model directory")

    def test_a_gguf(self, tmp_path: Path) -> None:
        (tmp_path / "x.gguf").write_text("")
        said = "quantizing begins with the original's safetensors"
        refused(tmp_path / "x.gguf", f"is a file, expected a model directory or a hub name; {said}")
        refused(tmp_path, f"has no config.json; {said}")

    def test_an_adapter(self, tmp_path: Path) -> None:
        (tmp_path / "adapter_config.json").write_text("{}")
        refused(tmp_path, "has no config.json; it is an adapter: merge it")

    @pytest.mark.parametrize("source", ["./nothing", "/no/such", "~/nothing-here", "a/b/c", "nothing/", "../x", "~"])
    def test_no_such_directory(self, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
        monkeypatch.setenv("USERPROFILE", str(tmp_path / "nobody"))
        refused(source, f"no such directory: {source!r}")

    def test_a_path_object_is_never_a_hub_name(self) -> None:
        refused(Path("owner/name"), "no such directory: 'owner")

    def test_no_config(self, lay_out: Make, weights: dict[str, Tensor]) -> None:
        directory = lay_out(weights)
        (directory / "config.json").unlink()
        refused(directory, f"{directory} has no config.json")

    @pytest.mark.parametrize(
        "content",
        [b"", b"{", b"\xff\xfe\x00", b'{"a": 1} x', b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"],
        ids=["empty", "cut", "not text", "more", "deep", "huge number"],
    )
    def test_config_is_not_json(self, lay_out: Make, weights: dict[str, Tensor], content: bytes) -> None:
        directory = lay_out(weights)
        (directory / "config.json").write_bytes(content)
        refused(directory, f"{directory / 'config.json'} is not valid JSON")

    @pytest.mark.parametrize("content", [[], "x", 1, None])
    def test_config_is_no_object(self, lay_out: Make, weights: dict[str, Tensor], content: object) -> None:
        directory = lay_out(weights, config=content)
        refused(directory, f"{directory / 'config.json'} does not hold a JSON object")

    def test_config_is_too_large(
        self, lay_out: Make, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("swquant.checkpoint.shards._JSON_LIMIT", 10)
        refused(lay_out(weights), "does not hold a JSON object")

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
    def test_only_pickles(self, lay_out: Make, weights: dict[str, Tensor], name: str) -> None:
        directory = lay_out(weights)
        (directory / "model.safetensors").rename(directory / name)
        refused(directory, "only pickled weights", repr(name), "save_pretrained(path, safe_serialization=True)")

    def test_no_weights(self, lay_out: Make, weights: dict[str, Tensor]) -> None:
        directory = lay_out(weights)
        (directory / "model.safetensors").unlink()
        refused(directory, "holds no weights", "model.safetensors", INDEX)

    def test_weights_without_their_index(self, lay_out: Make, weights: dict[str, Tensor]) -> None:
        directory = lay_out(weights)
        (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
        refused(directory, "holds 'model-00001-of-00002.safetensors', expected", INDEX)

    @pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
    def test_index_without_a_map(self, lay_out: Make, weights: dict[str, Tensor], weight_map: object) -> None:
        directory = lay_out(weights, {})
        edit_index(directory, weight_map)
        refused(directory, f"{directory / INDEX} has no weight_map")

    def test_index_is_not_json(self, lay_out: Make, weights: dict[str, Tensor]) -> None:
        directory = lay_out(weights, {})
        (directory / INDEX).write_text("{")
        refused(directory, f"{directory / INDEX} is not valid JSON")

    def test_missing_shard(self, lay_out: Make) -> None:
        directory = lay_out({"a": torch.ones(2)}, {"b": torch.ones(2)})
        (directory / "model-00002-of-00002.safetensors").unlink()
        refused(directory, "names 'model-00002-of-00002.safetensors', which is missing")

    @pytest.mark.parametrize(
        "file",
        [
            "../x.safetensors",
            "/etc/x.safetensors",
            "..\\x.safetensors",
            "C:x.safetensors",
            "sub/x.safetensors",
            "x.bin",
            "..",
            "",
            "x\0.safetensors",
            3,
            None,
        ],
    )
    def test_index_that_leaves_the_directory(self, lay_out: Make, tmp_path: Path, file: object) -> None:
        directory = lay_out({"a": torch.ones(2)}, {"b": torch.ones(2)})
        save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
        edit_index(directory, {"a": file})
        refused(directory, f"puts 'a' into {str(file)!r}, expected the name of a safetensors file beside it")

    @pytest.mark.parametrize("file", ["\ud800.safetensors", "n" * 5000 + ".safetensors", "\x1b[2J.safetensors"])
    def test_index_with_a_name_that_no_file_has(self, lay_out: Make, file: str) -> None:
        directory = lay_out({"a": torch.ones(2)}, {"b": torch.ones(2)})
        edit_index(directory, {"a": file})
        with pytest.raises(SwquantError) as caught:
            open_checkpoint(directory)
        assert "\x1b" not in str(caught.value)
        assert "\ud800" not in str(caught.value)

    @pytest.mark.parametrize(("lost", "read"), [("a.scale", False), ("rotary_emb.inv_freq", True)])
    def test_tensor_that_its_shard_lacks(self, lay_out: Make, lost: str, read: bool) -> None:
        """Whether anything depends on it is known of the model; codes of which a part is lost are no codes."""
        directory = lay_out({"a.codes": torch.ones(2)}, {"b": torch.ones(2)})
        shard = "model-00002-of-00002.safetensors"
        edit_index(directory, {"a.codes": "model-00001-of-00002.safetensors", lost: shard})
        assert open_checkpoint(directory).missing == {lost: directory / shard}
        if read:
            assert open_checkpoint(directory, quantized=True).missing == {lost: directory / shard}
            return
        with pytest.raises(
            SwquantError, match=rf"{shard} lacks '{lost}', which .* promises: they are not of one model"
        ):
            open_checkpoint(directory, quantized=True)

    def test_tensor_in_two_shards(self, lay_out: Make) -> None:
        directory = lay_out({"a": torch.ones(2), "b": torch.ones(2)}, {"b": torch.ones(2)})
        refused(directory, "model-00001-of-00002.safetensors and model-00002-of-00002.safetensors hold 'b'")

    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize(
        ("quantization", "said"),
        [({"quant_method": "gptq"}, "'gptq'"), ({}, "'an unnamed method'"), ("x", "'an unnamed method'")],
    )
    def test_already_quantized(
        self, lay_out: Make, weights: dict[str, Tensor], nested: bool, quantization: object, said: str
    ) -> None:
        config: dict[str, object] = {"quantization_config": quantization}
        directory = lay_out(weights, config={"text_config": config} if nested else config)
        refused(directory, f"{directory} is already quantized, by {said}")

    @pytest.mark.parametrize("again", [False, None, True])
    def test_already_quantized_by_mlx(self, lay_out: Make, weights: dict[str, Tensor], again: bool | None) -> None:
        """Which names its settings and not itself; newer files repeat them where transformers looks."""
        settings: dict[str, object] = {"group_size": 64, "bits": 4}
        config: dict[str, object] = {"quantization": settings}
        if again is not False:
            config["quantization_config"] = settings if again else None
        directory = lay_out(weights, config=config)
        refused(directory, f"{directory} is already quantized, by 'mlx'")

    def test_a_null_quantization_config_is_none(self, lay_out: Make, weights: dict[str, Tensor]) -> None:
        config = {"quantization_config": None, "text_config": None}
        assert open_checkpoint(lay_out(weights, config=config)).config == config

    @pytest.mark.parametrize(
        ("dtype", "said"),
        [(torch.float64, "F64"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.complex64, "C64")],
    )
    def test_other_dtypes(self, lay_out: Make, dtype: torch.dtype, said: str) -> None:
        directory = lay_out({"w": torch.ones(2).to(dtype)})
        refused(directory, f"'w' in {directory / 'model.safetensors'} is {said}, expected F32, F16 or BF16")

    def test_empty_tensor(self, lay_out: Make) -> None:
        directory = lay_out({"w": torch.ones(0, 4), "v": torch.ones(1)})
        refused(directory, "'w' in", "is empty, of shape [0, 4]")

    @pytest.mark.parametrize("shard", [{}, {"ids": torch.arange(3)}])
    def test_no_floating_tensor(self, lay_out: Make, shard: dict[str, Tensor]) -> None:
        refused(lay_out(shard), "holds no floating-point tensor")

    @pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
    @pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
    def test_unreadable_file(self, lay_out: Make, weights: dict[str, Tensor], file: str) -> None:
        directory = lay_out(weights)
        (directory / file).chmod(0)
        refused(directory, str(directory / file), "cannot be read")

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes in directories")
    @pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
    def test_a_pipe_does_not_hang(self, lay_out: Make, weights: dict[str, Tensor], file: str) -> None:
        directory = lay_out(weights)
        (directory / file).unlink()
        os.mkfifo(directory / file)
        refused(directory, str(directory))


HEADER_FAULTS: dict[str, tuple[object, bytes, int | None]] = {
    "header longer than the file": ({"w": entry("F32", [1], 0, 4)}, bytes(4), 10_000),
    "header of 2**63 bytes": ({"w": entry("F32", [1], 0, 4)}, bytes(4), 1 << 63),
    "not JSON": (b"nonsense", b"", None),
    "not an object": ([1, 2], b"", None),
    "deep": (b'{"w":' + b"[" * 100_000, b"", None),
    "overlapping": ({"v": entry("F32", [2], 0, 8), "w": entry("F32", [2], 4, 12)}, bytes(12), None),
    "beyond the file": ({"w": entry("F32", [4], 0, 16)}, bytes(8), None),
    "shape and bytes differ": ({"w": entry("F32", [3], 0, 8)}, bytes(8), None),
    "backwards": ({"w": entry("F32", [2], 8, 0)}, bytes(8), None),
    "negative": ({"w": entry("F32", [-2], 0, 8)}, bytes(8), None),
    "shape overflows": ({"w": entry("F32", [2**40, 2**40], 0, 4)}, bytes(4), None),
    "unknown dtype": ({"w": entry("Q9", [1], 0, 4)}, bytes(4), None),
    "bytes that no tensor owns": ({"w": entry("F32", [1], 0, 4)}, bytes(64), None),
    "a name with escape codes": ({"\x1b[2J\n": entry("F32", [3], 0, 8)}, bytes(8), None),
}


class TestHostileShards:
    @pytest.mark.parametrize("fault", HEADER_FAULTS)
    def test_each_fault_is_named(self, lay_out: Make, weights: dict[str, Tensor], fault: str) -> None:
        directory = lay_out(weights)
        header, body, length = HEADER_FAULTS[fault]
        write_raw(directory / "model.safetensors", header, body, length)
        refused(directory, f"{directory / 'model.safetensors'} is damaged or not a safetensors file (")

    def test_a_sound_raw_file_is_read(self, lay_out: Make, weights: dict[str, Tensor]) -> None:
        directory = lay_out(weights)
        write_raw(directory / "model.safetensors", {"w": entry("F32", [1], 0, 4)}, struct.pack("<f", 1.5))
        assert open_checkpoint(directory).read("w").tolist() == [1.5]

    def test_a_pickle_under_a_safe_name(self, lay_out: Make, weights: dict[str, Tensor]) -> None:
        directory = lay_out(weights)
        torch.save(weights, directory / "model.safetensors")
        refused(directory, "is damaged or not a safetensors file")

    def test_a_file_that_the_address_space_has_no_room_for(self, lay_out: Make) -> None:
        size = 2**36
        directory = lay_out({})
        write_raw(directory / "model.safetensors", {"w": entry("F32", [size // 4], 0, size)})
        os.truncate(directory / "model.safetensors", (directory / "model.safetensors").stat().st_size + size)
        child = (
            "import resource, sys, swquant.checkpoint.reader as reader\n"
            "resource.setrlimit(resource.RLIMIT_AS, (2**35, 2**35))\n"
            "reader.open_checkpoint(sys.argv[1]).read('w')"
        )
        done = subprocess.run(
            [sys.executable, "-c", child, str(directory)], capture_output=True, text=True, check=False
        )
        assert "SwquantError" in done.stderr
        assert "cannot be mapped into memory" in done.stderr

    def test_hostile_tensor_name_in_a_sentence(self, lay_out: Make) -> None:
        refused(lay_out({"\x1b[2J" + "n" * 5000: torch.ones(0)}), "'\\x1b[2Jnnn", "nnn...'", "is empty")

    @given(data=st.data())
    @settings(max_examples=400, deadline=2000)
    def test_damage_never_gets_through_as_another_error(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        directory = tmp_path_factory.getbasetemp() / "damaged"
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text("{}")
        path = directory / "model.safetensors"
        save_file({"a": torch.ones(3, 2), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.arange(2)}, path)
        content = bytearray(path.read_bytes())
        header = 8 + struct.unpack("<Q", content[:8])[0]
        places = st.integers(0, header - 1)
        for place, byte in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=4)):
            content[place] = byte
        size = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
        path.write_bytes(content[:size])
        try:
            checkpoint = open_checkpoint(directory)
            for name, stored in checkpoint.tensors.items():
                assert checkpoint.read(name).nbytes == stored.nbytes
                if len(stored.shape) == 2:
                    checkpoint.rows(name, torch.tensor([0]))
        except SwquantError as error:
            assert str(error).isprintable()  # noqa: PT017


class TestParts:
    """``part`` and ``columns`` are slices of what is read whole."""

    @pytest.mark.parametrize("shape", [(6,), (6, 4), (5, 3, 4)])
    def test_a_part_is_a_slice(self, lay_out: Make, shape: tuple[int, ...]) -> None:
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        checkpoint = open_checkpoint(lay_out({"w": tensor}))
        for start, stop in ((0, shape[0]), (2, 4), (3, 3), (0, 1)):
            part = checkpoint.part("w", start, stop)
            assert torch.equal(part, tensor[start:stop])
            assert part.untyped_storage().nbytes() == part.nbytes
        for wrong in ((-1, 2), (3, 2), (0, shape[0] + 1)):
            with pytest.raises(ValueError, match="no range"):
                checkpoint.part("w", *wrong)

    def test_columns(self, lay_out: Make) -> None:
        tensor = torch.arange(24, dtype=torch.int32).view(4, 6)
        checkpoint = open_checkpoint(lay_out({"w": tensor, "n": torch.ones(3)}))
        assert torch.equal(checkpoint.columns("w", 1, 5), tensor[:, 1:5])
        for name, stop in (("w", 7), ("n", 1)):
            with pytest.raises(ValueError, match="no range"):
                checkpoint.columns(name, 0, stop)

    def test_a_scalar_has_no_part_and_a_missing_tensor_is_named(self, lay_out: Make) -> None:
        checkpoint = open_checkpoint(lay_out({"s": torch.tensor(1.0)}))
        with pytest.raises(ValueError, match="no range"):
            checkpoint.part("s", 0, 0)
        with pytest.raises(SwquantError, match="has no tensor 'x'"):
            checkpoint.part("x", 0, 1)

    def test_only_bad_values_inside_are_found(self, lay_out: Make) -> None:
        matrix = torch.ones(5, 3)
        matrix[3, 1] = torch.nan
        checkpoint = open_checkpoint(lay_out({"w": matrix}))
        assert torch.equal(checkpoint.part("w", 0, 3), torch.ones(3, 3))
        with pytest.raises(SwquantError, match="holds NaN or infinite values"):
            checkpoint.part("w", 3, 4)

    def test_a_changed_file_is_refused(self, lay_out: Make) -> None:
        directory = lay_out({"w": torch.ones(5, 3)})
        checkpoint = open_checkpoint(directory)
        save_file({"w": torch.zeros(6, 3)}, directory / "model.safetensors")
        with pytest.raises(SwquantError, match="has changed since it was opened"):
            checkpoint.part("w", 0, 1)


def test_eight_bit_floats_are_read_where_quantized_files_are(lay_out: Make) -> None:
    codes = torch.arange(120, dtype=torch.uint8)
    shard = {"a": codes.view(torch.float8_e4m3fn), "b": codes.clone().view(torch.float8_e5m2), "c": torch.ones(2)}
    directory = lay_out(shard)
    checkpoint = open_checkpoint(directory, quantized=True)
    assert torch.equal(checkpoint.read("a").view(torch.uint8), codes)
    assert torch.equal(checkpoint.part("b", 3, 9).view(torch.uint8), codes[3:9])
    assert checkpoint.tensor_bytes == 248
    refused(directory, "F8_E4M3, expected F32, F16 or BF16")
