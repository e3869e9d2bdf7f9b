"""What methods that choose among cached keys and values share: rows without padding, budgets, and the choice."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from mmtoken.compressors.base import CacheEntry, Compressor, Context
from mmtoken.errors import InputError, MMTokenError
from mmtoken.kernels.attention_rows import attention_rows
from mmtoken.tokens import kept_count

Scope = Literal["visual", "all"]
"""Which entries a budget is about: those of visual tokens, per item (text stays), or all entries of a prompt."""


@dataclass(frozen=True)
class PromptCache:
    """Keys and values of one prompt in one decoder layer, without padding.

    Attributes:
        keys, values: float[G, n, d].
        queries, unrotated: float[H, q, d], of the last q entries.
        length: position id of the next token.
        scaling: factor on the dot products.
        rotary: (cosine, sine) float[p, d] of positions int[p].
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    unrotated: Tensor
    length: int
    scaling: float
    rotary: Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Share:
    """Entries that share a budget: int[m], ascending, of which `keep` stay."""

    entries: Tensor
    keep: int


class Press(Compressor):
    """Scores the entries of a layer's cache once, after its prefill, and evicts those with the lowest scores per head.

    The prefill is that of the plain model, whatever is evicted. Heads keep the same number of entries, but not the same
    ones. Ties go to the higher score, then the lower position.

    Attributes:
        scope: "visual" counts and evicts visual tokens only, per item; "all" whole prompts, text included.
        variant: "repo" has the official conventions: scope "all", and int(n * keep) entries.
    """

    scope: Scope
    variant: Literal["paper", "repo"]

    query_agnostic: ClassVar[bool] = False
    causal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions != "keep":
            raise MMTokenError(
                f"positions={self.positions!r} cannot be: cached keys are rotated to their positions; use 'keep'."
            )
        if self.scope not in get_args(Scope):
            raise MMTokenError(f"scope={self.scope!r} is unknown; use 'visual' or 'all'.")
        if self.variant not in ("paper", "repo"):
            raise MMTokenError(f"variant={self.variant!r} is unknown; use 'paper' or 'repo'.")

    @abstractmethod
    def score(self, prompt: PromptCache) -> Tensor:
        """float32[G, n]: how much each entry is worth to each head."""

    def choose(self, prompt: PromptCache, shares: list[Share]) -> Tensor:
        """bool[G, n]: which entries stay; those of no share do."""
        return keep_best(self.score(prompt), shares)

    def cache(self, entry: CacheEntry, layer: int, ctx: Context) -> Tensor:
        stay = entry.valid[:, None].expand(entry.keys.shape[:3]).clone()
        first = 0
        for row, real in enumerate(entry.valid):
            index = real.nonzero()[:, 0]
            item = entry.item[row, index]
            items = int(item.max()) + 1 if len(item) else 0
            numbers = range(first, first + items)
            first += items
            if not items:
                continue
            shares = self._shares(item, [ctx.original_counts[i] for i in numbers], [ctx.steps[i] for i in numbers])
            stay[row][:, index] = self.choose(prompt_cache(entry, row, index), shares)
        return stay

    def _shares(self, item: Tensor, counts: list[int], steps: list[int]) -> list[Share]:
        """Budgets of one prompt.

        Args:
            item: int[n] number of each entry's item, -1 for text.
            counts: tokens of each item that entered the decoder.
            steps: temporal steps of each item.
        """
        if self.scope == "all" or self.variant == "repo":
            total = len(item)
            wanted = kept_count(self.keep, total)
            if self.variant == "repo" and isinstance(self.keep, float):
                wanted = max(1, int(total * self.keep))
            return [Share(torch.arange(total, device=item.device), wanted)]
        return [
            Share((item == number).nonzero()[:, 0], kept_count(self.keep, count, step))
            for number, (count, step) in enumerate(zip(counts, steps, strict=True))
        ]


def prompt_cache(entry: CacheEntry, row: int, index: Tensor) -> PromptCache:
    """The entries `index` int[n] of one row; all that are not padding."""
    fed = index[index >= entry.keys.shape[2] - entry.queries.shape[2]] - (entry.keys.shape[2] - entry.queries.shape[2])

    def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
        cosine, sine = entry.rotary(positions[None])
        return cosine[0].float(), sine[0].float()

    return PromptCache(
        keys=entry.keys[row, :, index].float(),
        values=entry.values[row, :, index].float(),
        queries=entry.queries[row, :, fed],
        unrotated=entry.unrotated[row, :, fed],
        length=int(entry.length[row]),
        scaling=entry.scaling,
        rotary=rotary,
    )


def keep_best(scores: Tensor, shares: list[Share]) -> Tensor:
    """bool[G, n]: of every share the entries with the highest scores float[G, n] per head; all entries of no share.

    Raises:
        InputError: a score is NaN.
    """
    if bool(scores.isnan().any()):
        raise InputError(
            "scores of cached entries contain NaN; every entry needs numbers. Check the pixels and the weights for NaN "
            "or infinities (in float16, try bfloat16)."
        )
    stay = torch.ones_like(scores, dtype=torch.bool)
    for share in shares:
        order = scores[:, share.entries].argsort(dim=-1, descending=True, stable=True)
        stay.scatter_(1, share.entries[order[:, share.keep :]], False)
    return stay


def last_rows(queries: Tensor, keys: Tensor, count: int, scaling: float) -> Tensor:
    """float32[H, count, n]: attention of the last `count` queries float[H, q, d] to keys float[G, n, d], causal."""
    offset = keys.shape[1] - count
    return attention_rows(queries[None, :, -count:], keys[None], scale=scaling, causal_offset=offset)[0]


def over_groups(values: Tensor, groups: int) -> Tensor:
    """float[G, ...]: the mean over the query heads that share a key/value head, of float[H, ...]."""
    means: Tensor = values.unflatten(0, (groups, -1)).mean(1)
    return means
