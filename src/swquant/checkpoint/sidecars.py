"""The files that stand beside a model's weights: tokenizer, chat templates, licence; which are copied, which never."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from swquant.errors import SwquantError

TEMPLATES = "additional_chat_templates"
"""Folder of the chat templates that have names."""
_OF_TOKENIZER = (
    "tokenizer*.json",
    "tokenizer*.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "vocab*.json",
    "vocab*.txt",
    "merges*.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
SIDECARS = (
    *_OF_TOKENIZER,
    "generation_config.json",
    "chat_template*.jinja",
    "chat_template*.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
NOTICES = ("license*", "licence*", "notice*", "use_policy*")
_NEVER_COPIED = (".py", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".gguf", ".onnx")


def is_sidecar(name: str) -> bool:
    """Whether a file of this name is copied beside the weights."""
    lower = name.lower()
    if lower.endswith(_NEVER_COPIED):
        return False
    return any(fnmatchcase(lower, pattern) for pattern in (*SIDECARS, *NOTICES))


def is_of_tokenizer(name: str) -> bool:
    """Whether a file of this name decides which tokens a text has."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in _OF_TOKENIZER)


def require_own(path: Path, directory: Path) -> None:
    """Refuse a link that leaves the model, which in a hub cache includes the folder of blobs beside its snapshots.

    Raises:
        SwquantError: Naming the link: a copy of what it leads to might publish something private.
    """
    home = directory.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append((home.parents[1] / "blobs").resolve())
    target = path.resolve()
    if not any(target.is_relative_to(root) for root in allowed):
        raise SwquantError(f"{path} is a link to {target}, outside the model; replace it by the file itself")
