"""VLA-Pruner: keep what the instruction looks at and what the robot's last actions looked at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmtoken.compressors.base import (
    Compressor,
    Context,
    Cost,
    Need,
    Parity,
    Positions,
    Recording,
    check_layers,
    check_whole,
)
from mmtoken.compressors.divprune import maxmin_order
from mmtoken.compressors.stages import as_tuple, check_ascending, scaled_layer
from mmtoken.errors import MMTokenError
from mmtoken.tokens import VisualTokens, pick_rows, refuse_nan, top_mask

REPO_LAYER, REPO_DEPTH = 15, 32


@dataclass(frozen=True)
class VLAPruner(Compressor):
    """One cut inside the decoder of a policy, by semantic and by action attention; calls of one episode share a state.

    Semantic score: attention that the prompt's tokens pay in layer `layer - 1`, mean over heads and rows. Action
    score: what the action tokens of the last `window` calls paid, smoothed over time with the most recent call counting
    most (weights gamma, gamma^2, ...). The best K tokens by each score are candidates; greedy max-min diversity over
    their input embeddings takes K of them. Any model whose last `action_tokens` generated tokens are actions will do.

    Until `window` calls are recorded nothing is pruned; `Session.reset()` starts an episode. A token that was dropped
    has no action attention in that call.

    Differs from the official code in the default: the decay favours recent calls (the code's favours old ones), action
    attention is averaged over the later half of the layers (the code: layer 15 of 32), the smoothed score stays in
    float32 (the code divides it by its sum and rounds it to bfloat16), and counts are rounded by `kept_count` (the
    code: round(N * (1 - (1 - keep)))). In both, a picked token cannot be picked again.

    Attributes:
        layer: the first layer (0-based) that sees the kept tokens only; at least 1.
        rows: whose attention is semantic: "prefill", all tokens of the prompt; "last", the last one; "text", the text
            tokens after the image but the first and the last of them (all of them where there are no others).
        window: calls that are smoothed over.
        gamma: decay from call to call; above 1 old calls count most (1.25 with variant "paper" is the order of the
            official code's 0.8, and nothing else of it).
        action_tokens: how many of the last generated tokens are actions.
        recorded: layers (0-based) whose action attention is averaged; None: as above.
        branches: "both"; for ablations "semantic" or "action", whose candidates are then all there are. The warm-up
            stays as it is.
        diversity: False, for ablations: of the candidates those that stand highest in either order are kept.
        variant: "repo" follows the official code.
    """

    keep: int | float = 0.5
    positions: Positions = "keep"
    layer: int = 3
    rows: Literal["prefill", "last", "text"] = "prefill"
    window: int = 3
    gamma: float = 0.8
    action_tokens: int = 7
    recorded: tuple[int, ...] | None = None
    branches: Literal["both", "semantic", "action"] = "both"
    diversity: bool = True
    variant: Literal["paper", "repo"] = "paper"

    title: ClassVar[str] = "VLA-Pruner"
    paper: ClassVar[str] = (
        "Liu et al., VLA-Pruner: Temporal-Aware Dual-Level Visual Token Pruning for Efficient Vision-Language-Action "
        "Inference, 2025, arXiv 2511.16449"
    )
    year: ClassVar[int] = 2025
    parity: ClassVar[Parity] = "official code"
    cost: ClassVar[Cost] = "pairs"
    needs: ClassVar[frozenset[Need]] = frozenset({"history", "text_attention"})
    query_agnostic: ClassVar[bool] = False
    causal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("paper", "repo"):
            raise MMTokenError(f"variant={self.variant!r} is unknown; use 'paper' or 'repo'.")
        if self.rows not in ("prefill", "last", "text"):
            raise MMTokenError(f"rows={self.rows!r} is unknown; use 'prefill', 'last' or 'text'.")
        if self.branches not in ("both", "semantic", "action"):
            raise MMTokenError(f"branches={self.branches!r} is unknown; use 'both', 'semantic' or 'action'.")
        if not isinstance(self.diversity, bool):
            raise MMTokenError(f"diversity={self.diversity!r} is neither True nor False; give one of them.")
        check_whole("layer", self.layer, lowest=1)
        check_whole("window", self.window, lowest=1)
        check_whole("action_tokens", self.action_tokens, lowest=1)
        if isinstance(self.gamma, bool) or not isinstance(self.gamma, int | float) or not 0 < self.gamma < math.inf:
            raise MMTokenError(f"gamma={self.gamma!r} is no decay; give a number above 0, for a decay up to 1.")
        object.__setattr__(self, "recorded", as_tuple("recorded", self.recorded))
        if self.recorded is not None:
            check_ascending("recorded", self.recorded, lowest=0)

    def cut_layers(self, depth: int) -> tuple[int, ...]:
        check_layers("layer", (self.layer,), depth, lowest=1)
        return (self.layer,)

    def score_layers(self, depth: int) -> tuple[int, ...]:
        return (self.layer - 1,)

    def recording(self, depth: int) -> Recording:
        layers = self.recorded
        if layers is None and self.variant == "repo":
            layers = (min(scaled_layer(REPO_LAYER, REPO_DEPTH, depth), depth - 1),)
        elif layers is None:
            layers = tuple(range(depth // 2, depth))
        check_layers("recorded", layers, depth, lowest=0)
        return Recording(layers=layers, tokens=self.action_tokens, calls=self.window)

    def llm_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        action = self.action(tokens, ctx)
        if action is None:
            return tokens
        semantic = self.semantic(tokens, layer - 1, ctx)
        scores = [semantic] * (self.branches != "action") + [action] * (self.branches != "semantic")
        counts = self.counts(tokens)
        candidates = torch.stack([top_mask(score, counts, tokens.eligible) for score in scores]).any(0)
        if self.diversity:
            stays = self.spread(tokens, candidates, counts, ctx)
        else:
            stays = top_mask(standing(scores, tokens.eligible), counts, candidates)
        return tokens.where(stays | tokens.protected)

    def spread(self, tokens: VisualTokens, candidates: Tensor, counts: list[int], ctx: Context) -> Tensor:
        """bool[B, N]: the `counts[b]` candidates bool[B, N] of each item that are most diverse in their embeddings."""
        embeddings = ctx.embeddings(tokens)
        refuse_nan(embeddings.detach() * 0, tokens.eligible, "embeddings")  # infinity times 0 is NaN as well
        stays = torch.zeros_like(tokens.eligible)
        for row, count in enumerate(counts):
            stays[row, diverse(embeddings[row], candidates[row], count)] = True
        return stays

    def action(self, tokens: VisualTokens, ctx: Context) -> Tensor | None:
        """float32[B, N]: smoothed action attention of the last calls; None until there are enough of them."""
        history = ctx.history(tokens)
        if len(history) < self.window:
            return None
        return smooth(history[-self.window :], self.gamma, tokens.eligible, variant=self.variant)

    def semantic(self, tokens: VisualTokens, layer: int, ctx: Context) -> Tensor:
        """float[B, N]: the attention that `rows` pay in a layer."""
        if self.rows != "text":
            return ctx.text_attention(tokens, layer, "all" if self.rows == "prefill" else "last")
        text = ctx.text(tokens)
        return ctx.text_attention(tokens, layer, inner_rows(text.valid & text.after))

    def counts(self, tokens: VisualTokens) -> list[int]:
        """K of every item."""
        if self.variant == "repo" and isinstance(self.keep, float):
            return [min(total, max(1, round(total * (1 - (1 - self.keep))))) for total in tokens.counts()]
        return tokens.budget(self.keep)


def smooth(history: Tensor, gamma: float, eligible: Tensor, *, variant: Literal["paper", "repo"] = "paper") -> Tensor:
    """An estimate of the next action attention from that of earlier calls.

    Args:
        history: float[w, B, N], oldest call first.
        gamma: decay.
        eligible: bool[B, N].
        variant: "paper" weighs the newest call gamma, the one before gamma^2, ..., divided by the sum of weights;
            "repo" weighs the oldest 1, the next gamma, ..., divides the result by its sum over the eligible tokens of
            each item and rounds it to bfloat16.

    Returns:
        float32[B, N].
    """
    powers = torch.arange(len(history), device=history.device, dtype=torch.float32)
    weights = gamma ** (powers if variant == "repo" else len(history) - powers)
    total = (weights[:, None, None] * history.float()).sum(0)
    if variant == "paper":
        return total / weights.sum()
    mass = torch.where(eligible, total, 0.0).sum(-1, keepdim=True)
    return (total / mass.clamp(min=torch.finfo(torch.float32).tiny)).bfloat16().float()


def standing(scores: Sequence[Tensor], eligible: Tensor) -> Tensor:
    """float[B, N]: minus the best rank (0 is the highest score) that a token has in any of the scores float[B, N]."""
    masked = [score.detach().masked_fill(~eligible, -torch.inf) for score in scores]
    ranks = [score.argsort(dim=-1, descending=True, stable=True).argsort(-1) for score in masked]
    return -torch.stack(ranks).amin(0).float()


def diverse(embeddings: Tensor, candidates: Tensor, count: int) -> Tensor:
    """int[count]: the candidates that greedy max-min diversity picks, in this order.

    Args:
        embeddings: float[N, D].
        candidates: bool[N], at least `count` of them.
        count: K.
    """
    where = candidates.nonzero()[:, 0]
    everyone = torch.ones(1, len(where), dtype=torch.bool, device=where.device)
    return where[maxmin_order(pick_rows(embeddings[None], where[None]), [count], everyone)[0]]


def inner_rows(after: Tensor) -> Tensor:
    """bool[B, T]: of the marked tokens all but the first and the last; all where there are no others."""
    rank, count = after.long().cumsum(-1), after.sum(-1, keepdim=True)
    inner = after & (rank > 1) & (rank < count)
    return torch.where(inner.any(-1, keepdim=True), inner, after)
