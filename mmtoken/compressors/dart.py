"""DART: keep what duplicates least of a few pivot tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmtoken.compressors.base import Compressor, Context, Need, Positions, check_layers, check_whole
from mmtoken.errors import MMTokenError
from mmtoken.tokens import VisualTokens, refuse_nan, top_mask


@dataclass(frozen=True)
class DART(Compressor):
    """One cut inside the decoder: pivots by the strength of their keys, then the tokens least like each pivot.

    Strength is the L1 norm of a token's rotated keys in layer `layer - 1`, over all key heads. The strongest visual
    tokens and the strongest text tokens after the image are pivots, visual ones first, strong ones first. Each in turn
    takes the tokens whose features (what enters layer `layer`, under the decoder's last norm) have the smallest cosine
    with its own; a token is taken once. Visual pivots and what was taken stay.

    Differs from the public code: pivots go in order of strength (the code's order is that of a Python set), and the
    budget is met exactly, shared evenly among the pivots. budget_rule="official" takes floor(K / pivots) tokens for
    each pivot and keeps the visual pivots on top, so K is missed by a few tokens either way. Each image has a budget of
    its own.

    Attributes:
        layer: K, the first layer (0-based) that sees the kept tokens only; at least 1.
        visual_pivots: pivots among the visual tokens of an item.
        text_pivots: pivots among the text tokens after it.
        budget_rule: "exact" or "official".
    """

    keep: int | float = 0.222
    positions: Positions = "keep"
    layer: int = 2
    visual_pivots: int = 4
    text_pivots: int = 4
    budget_rule: Literal["exact", "official"] = "exact"

    title: ClassVar[str] = "DART"
    paper: ClassVar[str] = (
        "Wen et al., Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More, "
        "EMNLP 2025, arXiv 2502.11494"
    )
    year: ClassVar[int] = 2025
    needs: ClassVar[frozenset[Need]] = frozenset({"decoder_states", "text"})
    query_agnostic: ClassVar[bool] = False
    causal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("layer", self.layer, lowest=1)
        check_whole("visual_pivots", self.visual_pivots, lowest=1)
        check_whole("text_pivots", self.text_pivots, lowest=0)
        if self.budget_rule not in ("exact", "official"):
            raise MMTokenError(f"budget_rule={self.budget_rule!r} is unknown; use 'exact' or 'official'.")

    def cut_layers(self, depth: int) -> tuple[int, ...]:
        check_layers("layer", (self.layer,), depth, lowest=1)
        return (self.layer,)

    def score_layers(self, depth: int) -> tuple[int, ...]:
        return (self.layer - 1,)

    def llm_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        text = ctx.text(tokens)
        strength = key_strength(ctx.decoder_states(tokens, layer - 1).key)
        text_strength = key_strength(ctx.text_states(tokens, layer - 1).key)
        features, text_features = ctx.final_norm(tokens.features), ctx.final_norm(text.features)
        askers = text.valid & text.after
        for values, who in ((strength, tokens.eligible), (text_strength, askers)):
            refuse_nan(values, who, "keys")
        for values, who in ((features, tokens.eligible), (text_features, askers)):
            refuse_nan(values.detach() * 0, who, "features")  # infinity times 0 is NaN as well
        stays = torch.zeros_like(tokens.eligible)
        for row, budget in enumerate(self._budgets(tokens)):
            mine = tokens.eligible[row].nonzero()[:, 0]
            asking = askers[row].nonzero()[:, 0]
            kept = select_unlike(
                features[row, mine],
                strength[row, mine],
                text_features[row, asking],
                text_strength[row, asking],
                budget,
                self.visual_pivots,
                self.text_pivots,
                exact=self.budget_rule == "exact",
            )
            stays[row, mine[kept]] = True
        return tokens.where(stays | tokens.protected)

    def _budgets(self, tokens: VisualTokens) -> list[int]:
        if self.budget_rule == "official" and isinstance(self.keep, float):
            return [math.floor(self.keep * total) for total in tokens.counts()]
        return tokens.budget(self.keep)


def key_strength(keys: Tensor) -> Tensor:
    """float32[B, N]: L1 norm over the heads and channels of keys float[B, G, N, d]."""
    return keys.detach().float().abs().sum((1, 3))


def select_unlike(
    features: Tensor,
    strength: Tensor,
    text_features: Tensor,
    text_strength: Tensor,
    budget: int,
    visual_pivots: int,
    text_pivots: int,
    *,
    exact: bool = True,
) -> Tensor:
    """Pivots of an item and the tokens least like each of them.

    Args:
        features, strength: float[N, D] and float[N] of the visual tokens.
        text_features, text_strength: float[T, D] and float[T] of the text tokens that may be pivots.
        budget: K.
        visual_pivots, text_pivots: how many of each, fewer where there are fewer tokens (or a smaller budget).
        exact: keep K tokens, instead of the visual pivots and floor(K / pivots) tokens for each pivot.

    Returns:
        int[kept], ascending; ties go to the lower index.
    """
    total = len(features)
    if budget >= total:
        return torch.arange(total, device=features.device)
    visual = strongest(strength, min(visual_pivots, budget) if exact else visual_pivots)
    text = strongest(text_strength, text_pivots)
    units = normalize(features.detach().float(), dim=-1)
    pivots = torch.cat([units[visual], normalize(text_features[text].detach().float(), dim=-1)])
    stays = torch.zeros(total, dtype=torch.bool, device=features.device)
    stays[visual] = True
    left = (budget if exact else total) - len(visual)
    share = math.ceil(left / len(pivots)) if exact else budget // (visual_pivots + text_pivots)
    for pivot in pivots:
        count = min(share, left)
        taken = top_mask(-(units @ pivot)[None], [count], ~stays[None])[0]
        stays |= taken
        left -= count
    return stays.nonzero()[:, 0]


def strongest(strength: Tensor, count: int) -> Tensor:
    """int[min(count, N)]: the tokens with the largest strength float[N], strongest first; ties to the lower index."""
    return strength.argsort(descending=True, stable=True)[:count]
