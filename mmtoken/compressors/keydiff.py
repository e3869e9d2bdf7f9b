"""KeyDiff: evict entries whose keys point where all keys point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmtoken.compressors.base import Parity, Positions, check_whole
from mmtoken.compressors.presses import Press, PromptCache, Scope, Share, keep_best


@dataclass(frozen=True)
class KeyDiff(Press):
    """Score of a cached entry: minus the cosine between its key and the mean direction of all keys of its head.

    Keys are taken after the rotary embedding; nothing is protected. Acts once per layer, after the prefill.
    `block_size` chooses as the paper does, over a prompt that comes in blocks: after each block the budget is restored,
    with the mean direction of what is still there. (The paper also runs the prefill on what is left; here it has seen
    the whole prompt.) Differs from the paper and the official code in the default scope, visual tokens only.

    Attributes:
        block_size: entries per block; None: one choice over the whole prompt.
        scope: "visual" evicts visual tokens, each item with its own budget; "all" entries of the whole prompt.
        variant: "repo" has the official conventions: scope "all", and int(n * keep) entries.
    """

    keep: int | float = 0.5
    positions: Positions = "keep"
    block_size: int | None = None
    scope: Scope = "visual"
    variant: Literal["paper", "repo"] = "paper"

    title: ClassVar[str] = "KeyDiff"
    paper: ClassVar[str] = (
        "Park et al., KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in "
        "Resource-Constrained Environments, NeurIPS 2025, arXiv 2504.15364"
    )
    year: ClassVar[int] = 2025
    parity: ClassVar[Parity] = "official code"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size is not None:
            check_whole("block_size", self.block_size, lowest=1)

    def score(self, prompt: PromptCache) -> Tensor:
        return keydiff_scores(prompt.keys)

    def choose(self, prompt: PromptCache, shares: list[Share]) -> Tensor:
        if self.block_size is None:
            return super().choose(prompt, shares)
        return choose_in_blocks(prompt.keys, shares, self.block_size)


def keydiff_scores(keys: Tensor, alive: Tensor | None = None) -> Tensor:
    """float32[G, n]: minus the cosine of each key float[G, n, d] to the mean of the unit keys.

    Args:
        keys: rotated.
        alive: bool[G, n], which keys make the mean; None: all.
    """
    unit = normalize(keys.float(), dim=-1)
    weight = torch.ones_like(unit[..., 0]) if alive is None else alive.to(unit.dtype)
    anchor = (unit * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
    return -(unit @ normalize(anchor, dim=-1)[..., None])[..., 0]


def choose_in_blocks(keys: Tensor, shares: list[Share], block: int) -> Tensor:
    """bool[G, n]: which entries are left when the budgets are restored after every `block` of keys float[G, n, d]."""
    groups, length = keys.shape[:2]
    alive = torch.ones(groups, length, dtype=torch.bool, device=keys.device)
    for end in range(block, length + block, block):
        end = min(end, length)
        scores = keydiff_scores(keys[:, :end], alive[:, :end])
        # What is gone already loses against everything that is there.
        scores = scores.masked_fill(~alive[:, :end], -torch.inf)
        seen = [Share(share.entries[share.entries < end], share.keep) for share in shares]
        alive[:, :end] &= keep_best(scores, seen)
    return alive
