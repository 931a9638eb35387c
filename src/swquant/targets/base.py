"""What a runtime is to us: the formats that it reads, what of them it cannot load, and the command that serves one."""

from __future__ import annotations

from typing import ClassVar, Protocol

from swquant.quant.spec import QuantSpec


class Target(Protocol):
    """A runtime; implementations hold no state and take no arguments.

    What they tell is read from each runtime's documentation and code; ``docs/runtimes.md`` says which of it has been
    run.
    """

    name: ClassVar[str]
    """As its users write it, e.g. ``llama.cpp``."""

    formats: ClassVar[tuple[str, ...]]
    """The formats that it reads, best first."""

    fuses: ClassVar[bool]
    """Whether it computes q, k, v, gate and up, and a layer's experts, by one kernel each."""

    def refusal(self, form: str, spec: QuantSpec) -> str | None:
        """Why it cannot load weights on such a grid from ``form``, one of :attr:`formats`; ``None`` if it can."""
        ...

    def notes(self, form: str, spec: QuantSpec) -> tuple[str, ...]:
        """Sentences on what such an output needs to be served."""
        ...

    def command(self, form: str, spec: QuantSpec, path: str) -> str | None:
        """The shell command that serves the output in the directory ``path``, quoted for the shell already.

        ``None`` if it brings no server; the format's loading code then shows how it is used.
        """
        ...
