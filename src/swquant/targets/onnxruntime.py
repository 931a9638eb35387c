"""onnxruntime: whole decoders with MatMulNBits."""

from __future__ import annotations

from typing import ClassVar

from swquant.quant.spec import QuantSpec


class Onnxruntime:
    """onnxruntime and onnxruntime-genai."""

    name: ClassVar[str] = "onnxruntime"
    formats: ClassVar[tuple[str, ...]] = ("onnx",)
    fuses: ClassVar[bool] = False

    def refusal(self, form: str, spec: QuantSpec) -> None:
        """It loads what the format holds."""

    def notes(self, form: str, spec: QuantSpec) -> tuple[str, ...]:
        """Nothing that the format does not say."""
        return ()

    def command(self, form: str, spec: QuantSpec, path: str) -> None:
        """It brings no server."""
