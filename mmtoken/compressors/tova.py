"""TOVA: keep what the last token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mmtoken.compressors.base import Parity, Positions
from mmtoken.compressors.presses import Press, PromptCache, Scope, last_rows


@dataclass(frozen=True)
class TOVA(Press):
    """Score of a cached entry: attention that the prompt's last token pays to it, averaged over all heads.

    Every key/value head of a layer so keeps the same entries; the last token stays. Acts once per layer, after the
    prefill. Differs from the paper, which evicts at every decoding step; from paper and official code in the default
    scope, visual tokens only.

    Attributes:
        scope: "visual" evicts visual tokens, each item with its own budget; "all" entries of the whole prompt.
        variant: "repo" has the official conventions: scope "all", and int(n * keep) entries.
    """

    keep: int | float = 0.5
    positions: Positions = "keep"
    scope: Scope = "visual"
    variant: Literal["paper", "repo"] = "paper"

    title: ClassVar[str] = "TOVA"
    paper: ClassVar[str] = "Oren et al., Transformers are Multi-State RNNs, EMNLP 2024, arXiv 2401.06104"
    year: ClassVar[int] = 2024
    parity: ClassVar[Parity] = "official code"

    def score(self, prompt: PromptCache) -> Tensor:
        return tova_scores(prompt.queries, prompt.keys, prompt.scaling)


def tova_scores(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """float32[G, n]: head mean of the last query's attention; the last entry holds the maximum of the others + 1.

    Args:
        queries: float[H, q, d], rotated.
        keys: float[G, n, d], rotated.
        scaling: factor on the dot products.
    """
    return average_row(last_rows(queries, keys, 1, scaling)[:, 0], len(keys))


def average_row(row: Tensor, groups: int) -> Tensor:
    """The same from the last token's attention float[H, n]."""
    scores = row.mean(0)
    scores[-1] = scores[:-1].max() + 1 if len(scores) > 1 else 1.0
    return scores.expand(groups, -1)
