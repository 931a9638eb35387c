"""SGLang: 4 bits, and 8 from GPTQ files."""

from __future__ import annotations

from typing import ClassVar

from swquant.quant.spec import QuantSpec


class Sglang:
    """SGLang.

    compressed-tensors at 4 bits, GPTQ symmetric at 4 and 8 bits. Its GPTQ reader admits 2 and 3 bits too, but none
    of its kernels is known to compute them, so they are refused here.
    """

    name: ClassVar[str] = "sglang"
    formats: ClassVar[tuple[str, ...]] = ("compressed_tensors", "gptq")
    fuses: ClassVar[bool] = True

    def refusal(self, form: str, spec: QuantSpec) -> str | None:
        """See the class."""
        if spec.bits in (2, 3):
            return f"no kernel of it is known to compute {spec.bits}-bit weights"
        if form == "compressed_tensors" and spec.bits == 8:
            return "its compressed-tensors reader takes 4-bit weights"
        if form == "gptq" and not spec.symmetric:
            return "its GPTQ kernels take symmetric weights"
        return None

    def notes(self, form: str, spec: QuantSpec) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def command(self, form: str, spec: QuantSpec, path: str) -> str:
        """``sglang.launch_server``."""
        return f"python -m sglang.launch_server --model-path {path}"
