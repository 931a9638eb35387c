"""MLX: Apple's machines, by mlx-lm."""

from __future__ import annotations

from typing import ClassVar

from swquant.quant.spec import QuantSpec


class Mlx:
    """mlx-lm."""

    name: ClassVar[str] = "mlx"
    formats: ClassVar[tuple[str, ...]] = ("mlx",)
    fuses: ClassVar[bool] = False

    def refusal(self, form: str, spec: QuantSpec) -> None:
        """It loads what the format holds."""

    def notes(self, form: str, spec: QuantSpec) -> tuple[str, ...]:
        """Nothing that the format does not say."""
        return ()

    def command(self, form: str, spec: QuantSpec, path: str) -> str:
        """``mlx_lm.server``."""
        return f"mlx_lm.server --model {path}"
