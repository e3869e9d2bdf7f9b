"""Knorm: keys of small length attract attention, so evict entries with the longest keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mmtoken.compressors.base import Parity, Positions
from mmtoken.compressors.presses import Press, PromptCache, Scope


@dataclass(frozen=True)
class Knorm(Press):
    """Score of a cached entry: minus the L2 norm of its key; the rotary embedding does not change it.

    Acts once per layer, after the prefill. Nothing is protected. Differs from the paper and the official code in the
    default scope, visual tokens only.

    Attributes:
        scope: "visual" evicts visual tokens, each item with its own budget; "all" entries of the whole prompt.
        variant: "repo" has the official conventions: scope "all", and int(n * keep) entries.
    """

    keep: int | float = 0.5
    positions: Positions = "keep"
    scope: Scope = "visual"
    variant: Literal["paper", "repo"] = "paper"

    title: ClassVar[str] = "Knorm"
    paper: ClassVar[str] = (
        "Devoto et al., A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, EMNLP 2024, "
        "arXiv 2406.11430"
    )
    year: ClassVar[int] = 2024
    parity: ClassVar[Parity] = "official code"
    query_agnostic: ClassVar[bool] = True
    causal: ClassVar[bool] = True

    def score(self, prompt: PromptCache) -> Tensor:
        return knorm_scores(prompt.keys)


def knorm_scores(keys: Tensor) -> Tensor:
    """float32[G, n]: minus the norm of keys float[G, n, d]."""
    lengths: Tensor = keys.float().norm(dim=-1)
    return -lengths
