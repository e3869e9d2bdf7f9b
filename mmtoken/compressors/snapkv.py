"""SnapKV: what the end of the prompt looks at is what the answer will look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from mmtoken.compressors.base import Parity, Positions, check_whole
from mmtoken.compressors.presses import Press, PromptCache, Scope, last_rows, over_groups
from mmtoken.errors import MMTokenError

Pooling = Literal["mean", "max"]


@dataclass(frozen=True)
class SnapKV(Press):
    """Score of a cached entry: attention that the last `window` tokens pay to it, smoothed over its neighbours.

    The softmax runs over all keys and is causal inside the window; rows are averaged, then pooled along the sequence
    (with zeros beyond its ends), then averaged over the query heads that share a key. The window itself stays; if the
    budget is smaller than the window, its latest tokens do. In a prompt no longer than the window, the window is all
    but its first token.

    Acts once per layer, after the prefill. Differs from the paper and the official code in the default scope, visual
    tokens only; from the paper, which ranks entries per query head, in heads that share keys.

    Attributes:
        window: how many of the prompt's last tokens are asked.
        kernel: width of the pooling, odd.
        pooling: "mean" or "max".
        scope: "visual" evicts visual tokens, each item with its own budget; "all" entries of the whole prompt.
        variant: "repo" has the official conventions: scope "all", and int(n * keep) entries.
    """

    keep: int | float = 0.5
    positions: Positions = "keep"
    window: int = 64
    kernel: int = 5
    pooling: Pooling = "mean"
    scope: Scope = "visual"
    variant: Literal["paper", "repo"] = "paper"

    title: ClassVar[str] = "SnapKV"
    paper: ClassVar[str] = (
        "Li et al., SnapKV: LLM Knows What You are Looking for Before Generation, NeurIPS 2024, arXiv 2404.14469"
    )
    year: ClassVar[int] = 2024
    parity: ClassVar[Parity] = "official code"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("window", self.window, lowest=1)
        check_whole("kernel", self.kernel, lowest=1)
        if self.kernel % 2 == 0:
            raise MMTokenError(f"kernel={self.kernel} is even; give an odd width, so that it has a middle.")
        if self.pooling not in ("mean", "max"):
            raise MMTokenError(f"pooling={self.pooling!r} is unknown; use 'mean' or 'max'.")

    def score(self, prompt: PromptCache) -> Tensor:
        window = max(1, min(self.window, prompt.keys.shape[1] - 1, prompt.queries.shape[1]))
        scores = snapkv_scores(prompt.queries, prompt.keys, window, self.kernel, prompt.scaling, self.pooling)
        # All of the window is worth the same; where not all of it may stay, the latest does.
        scores[:, -window:] += torch.arange(window, device=scores.device)
        return scores


def snapkv_scores(
    queries: Tensor, keys: Tensor, window: int, kernel: int, scaling: float, pooling: Pooling = "mean"
) -> Tensor:
    """float32[G, n]: pooled attention of the last `window` tokens; the window's own columns hold the maximum + 1.

    Args:
        queries: float[H, q, d], rotated, of the last q tokens; q >= window.
        keys: float[G, n, d], rotated; n >= window.
        window: rows that are averaged.
        kernel: odd width of the pooling.
        scaling: factor on the dot products.
        pooling: how neighbours are pooled.
    """
    received = last_rows(queries, keys, window, scaling)
    return pool_rows(received, window, kernel, len(keys), pooling)


def pool_rows(rows: Tensor, window: int, kernel: int, groups: int, pooling: Pooling = "mean") -> Tensor:
    """The same from the window's attention float[H, window, n]."""
    old = rows[:, :, : rows.shape[2] - window].mean(1)
    if old.shape[1]:
        pool = avg_pool1d if pooling == "mean" else max_pool1d
        old = pool(old[:, None], kernel, stride=1, padding=kernel // 2)[:, 0]
    scores = over_groups(old, groups)
    top = scores.max() + 1 if scores.numel() else scores.new_ones(())
    return torch.cat([scores, top.expand(groups, window)], 1)
