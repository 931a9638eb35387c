"""transformers: every grid, from compressed-tensors files."""

from __future__ import annotations

from typing import ClassVar

from swquant.quant.spec import QuantSpec


class Transformers:
    """transformers, whose compressed-tensors integration loads 2, 3, 4 and 8 bits of both kinds.

    GPTQ files need gptqmodel and optimum beside it, AutoRound's auto-round.
    """

    name: ClassVar[str] = "transformers"
    formats: ClassVar[tuple[str, ...]] = ("compressed_tensors", "gptq", "auto_round", "dequantized")
    fuses: ClassVar[bool] = False

    def refusal(self, form: str, spec: QuantSpec) -> None:
        """It loads what these formats hold."""

    def notes(self, form: str, spec: QuantSpec) -> tuple[str, ...]:
        """What else has to be installed."""
        needed = {"gptq": "gptqmodel and optimum", "auto_round": "auto-round"}.get(form)
        return (f"transformers needs {needed} to load this output",) if needed else ()

    def command(self, form: str, spec: QuantSpec, path: str) -> str:
        """``transformers serve``."""
        return f"transformers serve {path}"
