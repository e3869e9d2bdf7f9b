"""TransPrune: a token that layers turn and lengthen much carries meaning; drop those that pass through unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmtoken.compressors.base import Compressor, Context, Need, Parity, Positions, check_layers
from mmtoken.compressors.stages import (
    as_tuple,
    check_ascending,
    check_shares,
    check_stages,
    checked_cuts,
    scaled_cuts,
    scaled_layer,
)
from mmtoken.errors import MMTokenError, UnsupportedError
from mmtoken.tokens import VisualTokens, kept_count

PAPER_DEPTH = 32
"""Layers of the paper's decoder; where no layers are given, its layers are scaled to the decoder at hand."""

PAPER_CUTS = (7, 9, 12)
PAPER_FIRST = 6
"""The first layer (0-based) whose transitions count."""

EPSILON = 1e-8


@dataclass(frozen=True)
class TransPrune(Compressor):
    """Several cuts inside the decoder, by how much layers changed a token and how much the instruction looks at it.

    Transition value of a token in a module (attention, MLP) of a layer, with x what enters it after the norm and y
    what it puts out before the residual: softmax over the image's tokens of 1 - |cos(x, y)|, times |y| / |x|. It is
    summed over both modules and over the layers in `accumulate` that ran before the cut. Instruction-guided attention:
    what the text after the image pays to the token in the layer about to run, mean over heads and rows. Score:
    alpha * transitions + (1 - alpha) * attention. `keep` is what is left after the last cut; each of the stages before
    drops half of what the next one drops, so keep=0.125 in three stages is the paper's 0.875, 0.625, 0.125.

    Without `layers` the paper's (cuts before layers 7, 9 and 12 of 32, transitions from layer 6 on) are scaled to the
    depth of the decoder.

    Differs from the official code in the default: the cosine's absolute value counts, the softmax runs over the image
    (not the whole prompt) and both terms are combined as they are (the code divides each by its sum); counts are
    rounded by `kept_count`, tokens keep their positions (positions="renumber" compacts them as the code does), and
    each image has its own budget.

    Attributes:
        layers: layers (0-based) before which tokens are dropped; None: the paper's, scaled.
        accumulate: layers (0-based) whose transitions are summed; None: the paper's, scaled, up to the last cut.
        shares: fraction of the original tokens left after each cut, the last one equal to `keep`; None: as above.
        alpha: weight of the transitions, in [0, 1].
        cosine: "absolute" or "signed"; None: as the variant has it, absolute in the paper and signed in the code.
        variant: "repo" follows the official code in all of these.
    """

    keep: int | float = 0.125
    positions: Positions = "keep"
    layers: tuple[int, ...] | None = None
    accumulate: tuple[int, ...] | None = None
    shares: tuple[float, ...] | None = None
    alpha: float = 0.5
    cosine: Literal["absolute", "signed"] | None = None
    variant: Literal["paper", "repo"] = "paper"

    title: ClassVar[str] = "TransPrune"
    paper: ClassVar[str] = (
        "Li et al., TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model, CVPR 2026, "
        "arXiv 2507.20630"
    )
    year: ClassVar[int] = 2026
    parity: ClassVar[Parity] = "official code"
    needs: ClassVar[frozenset[Need]] = frozenset({"next_attention", "transitions"})
    query_agnostic: ClassVar[bool] = False
    causal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("paper", "repo"):
            raise MMTokenError(f"variant={self.variant!r} is unknown; use 'paper' or 'repo'.")
        if self.cosine not in ("absolute", "signed", None):
            raise MMTokenError(f"cosine={self.cosine!r} is unknown; use 'absolute', 'signed' or None.")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 <= self.alpha <= 1:
            raise MMTokenError(f"alpha={self.alpha!r} is no weight; give a number from 0 to 1.")
        if self.variant == "repo" and self.alpha != 0.5:
            raise MMTokenError(f"alpha={self.alpha!r} has no place in variant='repo', which weighs equally; give 0.5.")
        for field in ("layers", "accumulate", "shares"):
            object.__setattr__(self, field, as_tuple(field, getattr(self, field)))
        if self.layers is not None:
            check_ascending("layers", self.layers, lowest=1)
        if self.accumulate is not None:
            check_ascending("accumulate", self.accumulate, lowest=0)
        if self.shares is not None:
            check_shares(self.shares, self.keep, self.layers)

    def cut_layers(self, depth: int) -> tuple[int, ...]:
        layers = scaled_cuts(PAPER_CUTS, PAPER_DEPTH, depth) if self.layers is None else self.layers
        layers = checked_cuts(layers, depth)
        if self.shares is not None:
            check_stages("shares", self.shares, layers)
        return layers

    def watched_layers(self, depth: int) -> tuple[int, ...]:
        cuts = self.cut_layers(depth)
        if self.accumulate is None:
            return tuple(range(min(scaled_layer(PAPER_FIRST, PAPER_DEPTH, depth), cuts[0] - 1), cuts[-1]))
        check_layers("accumulate", self.accumulate, depth, lowest=0)
        if self.accumulate[0] >= cuts[0] or self.accumulate[-1] >= cuts[-1]:
            raise UnsupportedError(
                f"accumulate={self.accumulate} does not fit cuts before layers {cuts}; give at least one layer before "
                "the first cut, and none from the last one on."
            )
        return self.accumulate

    def llm_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        cuts = self.cut_layers(ctx.depth)
        stage = cuts.index(layer)
        change = self.accumulated(tokens, cuts[stage - 1] if stage else 0, layer, ctx)
        scores = self.combine(change, ctx.next_attention(tokens, rows="after"), tokens.eligible)
        counts = [
            self.count(total, stage, len(cuts), steps)
            for total, steps in zip(ctx.original_counts, tokens.steps, strict=True)
        ]
        return tokens.top(scores, counts)

    def accumulated(self, tokens: VisualTokens, start: int, stop: int, ctx: Context) -> Tensor:
        """float32[B, N]: the sum of transition values so far; layers from `start` to `stop` - 1 are new."""
        new = torch.zeros_like(tokens.size)
        for number in self.watched_layers(ctx.depth):
            if start <= number < stop:
                new = new + self.transition_values(tokens, number, ctx)
        old = ctx.memory.get("transitions")
        # By original position: who is left, and in which order, changes from cut to cut.
        if old is None:
            width = int(tokens.source.max()) + 1 if tokens.source.numel() else 0
            old = new.new_zeros(len(tokens), width)
        total = old.scatter_add(1, tokens.source, new.masked_fill(~tokens.valid, 0.0))
        ctx.memory["transitions"] = total
        return total.gather(1, tokens.source)

    def transition_values(self, tokens: VisualTokens, layer: int, ctx: Context) -> Tensor:
        """float32[B, N]: the transition values of a layer, attention and MLP together."""
        absolute = self.variant == "paper" if self.cosine is None else self.cosine == "absolute"
        total = torch.zeros_like(tokens.size)
        for seen in (ctx.transition(tokens, layer, "attention"), ctx.transition(tokens, layer, "mlp")):
            if self.variant == "repo":
                values = transition_value(seen.magnitude, seen.cosine, seen.valid, absolute=absolute)
                total = total + values.gather(1, seen.index)
            else:
                magnitude, cosine = seen.magnitude.gather(1, seen.index), seen.cosine.gather(1, seen.index)
                total = total + transition_value(magnitude, cosine, tokens.eligible, absolute=absolute)
        return total

    def combine(self, change: Tensor, attention: Tensor, eligible: Tensor) -> Tensor:
        """float32[B, N]: the score of tokens with these transition values and this attention, both float[B, N]."""
        attention = attention.float()
        if self.variant == "paper":
            return self.alpha * change + (1 - self.alpha) * attention
        return _share(change, eligible) + _share(attention, eligible)

    def count(self, total: int, stage: int, stages: int, steps: int) -> int:
        """Tokens of an item left after a stage."""
        if self.shares is not None:
            share = self.shares[stage]
            return int(total * share) if self.variant == "repo" else kept_count(share, total)
        final = kept_count(self.keep, total, steps)
        if stage == stages - 1 or total == 0:
            return final
        fraction = self.keep if isinstance(self.keep, float) else final / total
        share = 1 - (1 - fraction) * (2 ** (stage + 1) - 1) / (2**stages - 1)
        return max(final, int(total * share) if self.variant == "repo" else kept_count(share, total))


def transition_value(magnitude: Tensor, cosine: Tensor, support: Tensor, *, absolute: bool) -> Tensor:
    """How much a module changed tokens: w * m with w = softmax(1 - cosine).

    Args:
        magnitude: float[B, n], m = |y| / |x|.
        cosine: float[B, n], cos(x, y).
        support: bool[B, n], the tokens that the softmax runs over.
        absolute: whether turning a token around counts as leaving it (1 - |cosine|).

    Returns:
        float32[B, n]; 0 outside of the support.
    """
    cosine = cosine.float()
    change = 1 - (cosine.abs() if absolute else cosine)
    weight = change.masked_fill(~support, -torch.inf).softmax(-1)
    return torch.where(support, weight * magnitude.float(), 0.0)


def _share(values: Tensor, eligible: Tensor) -> Tensor:
    total = torch.where(eligible, values, 0.0).sum(-1, keepdim=True)
    return values / (total + EPSILON)
