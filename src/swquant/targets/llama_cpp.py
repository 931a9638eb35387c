"""llama.cpp: GGUF files, on processors, CUDA, Metal and Vulkan."""

from __future__ import annotations

from typing import ClassVar

from swquant.quant.spec import QuantSpec


class LlamaCpp:
    """llama.cpp, and what is built on it: Ollama, LM Studio, llamafile."""

    name: ClassVar[str] = "llama.cpp"
    formats: ClassVar[tuple[str, ...]] = ("gguf",)
    fuses: ClassVar[bool] = False

    def refusal(self, form: str, spec: QuantSpec) -> None:
        """It loads what GGUF holds; the format knows its block types."""

    def notes(self, form: str, spec: QuantSpec) -> tuple[str, ...]:
        """Nothing that the format does not say."""
        return ()

    def command(self, form: str, spec: QuantSpec, path: str) -> str:
        """``llama-server``."""
        return f"llama-server -m {path}/model.gguf"
