"""Who takes part in a benchmark: the dense model, the controls, and the chosen compressors at every budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from mmtoken.compressors.base import Compressor
from mmtoken.compressors.registry import resolve
from mmtoken.engine.session import check
from mmtoken.errors import UnsupportedError
from mmtoken.tokens import check_keep

CONTROLS = ("random", "uniform_grid", "downscale")
METHODS = ("visionzip", "divprune", "tome", "fastv", "pyramiddrop")
KEEPS: tuple[int | float, ...] = (0.5, 0.25, 0.125)

DENSE = "dense"


@dataclass(frozen=True)
class Entrant:
    """One variant of the model: a compressor at a budget, or none.

    Attributes:
        compressor: None for the dense model.
        keep: as asked for; 1.0 for the dense model.
        label: title instead of the compressor's, where a line-up holds it in several roles.
    """

    compressor: Compressor | None = None
    keep: int | float = 1.0
    label: str | None = None

    @property
    def method(self) -> str:
        """Class name of the compressor."""
        return DENSE if self.compressor is None else type(self.compressor).__name__

    @property
    def title(self) -> str:
        if self.label is not None:
            return self.label
        return "Dense" if self.compressor is None else self.compressor.title

    @property
    def control(self) -> bool:
        return self.compressor is None or self.compressor.control

    @property
    def key(self) -> str:
        """Unique within a line-up."""
        return DENSE if self.compressor is None else f"{self.label or self.method} keep={self.keep:.4g}"


def line_up(
    compressors: Sequence[str] = METHODS,
    keeps: Sequence[int | float] = KEEPS,
    controls: Sequence[str] = CONTROLS,
) -> list[Entrant]:
    """The dense model first, then controls and compressors at every budget, without repeats.

    Raises:
        MMTokenError: an unknown name or an impossible budget.
    """
    entrants = {DENSE: Entrant()}
    budgets = [check_keep(keep, "keeps") for keep in keeps]
    for name in dict.fromkeys((*controls, *compressors)):
        for keep in budgets:
            entrant = Entrant(resolve(name, keep=keep), keep)
            entrants.setdefault(entrant.key, entrant)
    return list(entrants.values())


def supported(model: PreTrainedModel, entrants: Sequence[Entrant]) -> tuple[list[Entrant], dict[str, str]]:
    """Those that `model` can host, and why it cannot host the others (key -> reason)."""
    able: list[Entrant] = []
    refused: dict[str, str] = {}
    for entrant in entrants:
        try:
            if entrant.compressor is not None:
                check(model, entrant.compressor)
        except UnsupportedError as error:
            refused[entrant.key] = str(error)
        else:
            able.append(entrant)
    return able, refused
