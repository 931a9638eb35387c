"""Strategies that damage a sound file: bytes anywhere, values of JSON, and the JSON before tensors."""

from __future__ import annotations

import json
import struct
from copy import deepcopy
from typing import Any

from hypothesis import strategies as st

EVIL = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        7,
        1 << 16,
        1 << 31,
        1 << 40,
        1 << 63,
        10**30,
        -(10**12),
        0.0,
        0.5,
        -1.5,
        1e308,
    ),
    *(float("nan"), float("inf"), "", "x", "../../etc/passwd", "/etc/passwd", "a\0b", "\x1b[2J", "\ud800", "é" * 5000),
    *("__import__('os').system('false')", "{{ ''.__class__.__mro__ }}", [], [[]], [None], {}, {"a": 1}, ["x", 3]),
    *({"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": "evil.Tokenizer"},),
)
KEYS = (
    "auto_map",
    "trust_remote_code",
    "_name_or_path",
    "torch_dtype",
    "rope_scaling",
    "rope_parameters",
    "layer_types",
)


@st.composite
def damaged_bytes(draw: st.DrawFn, seed: bytes) -> bytes:
    """Some bytes set, taken out, doubled; the end perhaps cut off."""
    content = bytearray(seed)
    for _ in range(draw(st.integers(1, 4))):
        if not content:
            break
        start = draw(st.integers(0, len(content) - 1))
        length = draw(st.integers(1, 8))
        match draw(st.sampled_from(["set", "take", "double", "cut", "ones"])):
            case "set":
                content[start : start + 1] = draw(st.binary(min_size=1, max_size=1))
            case "take":
                del content[start : start + length]
            case "double":
                content[start:start] = content[start : start + length]
            case "ones":
                content[start : start + length] = b"\xff" * length
            case _:
                if draw(st.booleans()):
                    del content[start:]
    return bytes(content)


@st.composite
def damaged_value(draw: st.DrawFn, seed: Any) -> Any:
    """A JSON value in which some values are replaced, taken out or added."""
    value = json.loads(json.dumps(seed))
    for _ in range(draw(st.integers(1, 2))):
        places = list(_places(value))
        holder, key = draw(st.sampled_from(places)) if places else (None, None)
        match draw(st.sampled_from(["replace", "replace", "remove", "add"])):
            case "replace" if holder is not None:
                holder[key] = deepcopy(draw(st.sampled_from(EVIL)))
            case "remove" if holder is not None:
                del holder[key]
            case "add" if isinstance(value, dict):
                value[draw(st.sampled_from(KEYS))] = deepcopy(draw(st.sampled_from(EVIL)))
            case _:
                value = deepcopy(draw(st.sampled_from(EVIL)))
    return value


def _places(value: Any) -> Any:
    """Each holder and key in a value, at most forty of each holder's."""
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        for key in keys[:40]:
            yield value, key
            yield from _places(value[key])


def damaged_json(seed: bytes) -> st.SearchStrategy[bytes]:
    """JSON of another content, or bytes that are damaged."""
    sound = json.loads(seed)
    other = damaged_value(sound).map(lambda value: json.dumps(value).encode())
    return st.one_of(other, other, damaged_bytes(seed))


def damaged_safetensors(seed: bytes) -> st.SearchStrategy[bytes]:
    """A header of another content, or damaged bytes in the header or anywhere."""
    length = struct.unpack("<Q", seed[:8])[0]
    header, body = json.loads(seed[8 : 8 + length]), seed[8 + length :]

    def joined(value: Any) -> bytes:
        text = json.dumps(value).encode()
        return struct.pack("<Q", len(text)) + text + body

    front = damaged_bytes(seed[: 8 + length]).map(lambda some: some + body)
    return st.one_of(damaged_value(header).map(joined), front, damaged_bytes(seed))


def damaged_front(seed: bytes, size: int = 4096) -> st.SearchStrategy[bytes]:
    """Damage near the beginning, where headers are."""
    return damaged_bytes(seed[:size]).map(lambda some: some + seed[size:])
