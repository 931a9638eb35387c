"""vLLM: 4 and 8 bits on its usual kernels, 2 and 3 bits on Humming's."""

from __future__ import annotations

from typing import ClassVar

from swquant.quant.spec import QuantSpec

_HUMMING_NOTE = "vLLM computes with such weights by its Humming kernels: CUDA, compute capability 7.5 or newer"


class Vllm:
    """vLLM.

    compressed-tensors: symmetric at 2 and 3 bits (vLLM #46389), both kinds at 4, symmetric at 8. GPTQ: symmetric at 4
    and 8 bits as it is; all else with ``--quantization humming``, which takes zero points as version 2 stores them.
    AutoRound: symmetric, 4 bits, and 2 and 3 through Humming (vLLM #52890).
    """

    name: ClassVar[str] = "vllm"
    formats: ClassVar[tuple[str, ...]] = ("compressed_tensors", "gptq", "auto_round")
    fuses: ClassVar[bool] = True

    def refusal(self, form: str, spec: QuantSpec) -> str | None:
        """See the class."""
        if form == "compressed_tensors" and not spec.symmetric and spec.bits != 4:
            return f"its compressed-tensors reader takes asymmetric weights at 4 bits alone, not {spec.bits}"
        if form == "auto_round" and spec.bits == 8:
            return "its AutoRound reader takes 2, 3 and 4 bits"
        if form == "auto_round" and not spec.symmetric:
            return "its AutoRound reader is not known to take the packing of asymmetric files"
        return None

    def notes(self, form: str, spec: QuantSpec) -> tuple[str, ...]:
        """What hardware 2 and 3 bits need."""
        return (_HUMMING_NOTE,) if spec.bits in (2, 3) or _by_humming(form, spec) else ()

    def command(self, form: str, spec: QuantSpec, path: str) -> str:
        """``vllm serve``."""
        return f"vllm serve {path}" + (" --quantization humming" if _by_humming(form, spec) else "")


def _by_humming(form: str, spec: QuantSpec) -> bool:
    return form == "gptq" and not (spec.symmetric and spec.bits in (4, 8))
