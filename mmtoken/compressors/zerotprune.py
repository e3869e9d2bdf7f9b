"""Zero-TPrune: rank tokens by a page rank over the tower's attention, prune the tail and near-duplicates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmtoken.compressors.base import Compressor, Context, Cost, Need, Positions, TowerCut, TowerStates, check_whole
from mmtoken.compressors.stages import as_tuple, check_ascending, scaled_cuts
from mmtoken.errors import MMTokenError, UnsupportedError
from mmtoken.kernels.pagerank import pagerank
from mmtoken.kernels.similarity_stats import similarity_stats
from mmtoken.tokens import VisualTokens, kept_count, refuse_nan, top_mask

Feature = Literal["key", "query", "value", "features"]
Metric = Literal["cosine", "dot", "euclidean"]
Split = Literal["unimportant", "important", "alternate"]

PAPER_DEPTH = 12
PAPER_LAYERS = (1, 3, 6, 9, 11)

CHUNK = 256
"""Rows of similarities that are in memory at once."""


@dataclass(frozen=True)
class ZeroTPrune(Compressor):
    """Cuts in some tower blocks: importance from the block's attention graph, then similarity, without training.

    Importance (weighted page rank): tokens vote for what they attend to, with the weight that they have themselves,
    s <- A^T s in every head, from equal weights, for some rounds or until it stands still. Heads whose scores vary too
    little or too much over the tokens are left out (all count if none is left), the others come together as root mean
    square. Similarity: the less important half of the tokens is compared with the more important one, and those of it
    that resemble one of the other half most leave.

    In the order "I'-S-I", one cheap round ranks, `similar` near-duplicates leave, and a full page rank over what is
    left cuts to this block's count: large uniform areas cannot vote each other up. "I-S" cuts by importance first.
    Tokens leave between the attention and the MLP of a block.

    The final code of the authors was not found; reconstructed here are the counts (the same share leaves at every cut),
    that the paper's layers count from 0, the number of near-duplicates, and the scale of the variance: published bounds
    fit scores with mean 1 (for scores that sum to 1 no head could ever reach them), so these are what is compared with
    them (`rescale`).

    A token of several patches (2x2 mergers, pixel shuffle) has the sum of their scores and their features side by side.

    Attributes:
        layers: tower blocks (0-based) in which tokens leave; None: 1, 3, 6, 9 and 11 of 12, scaled.
        similar: near-duplicates that leave at each cut, as part of its count.
        rounds: most rounds in the first three blocks, in the middle and in the last three.
        tolerance: rounds end when scores change by less than this on average; scores sum to 1.
        variance: lowest and highest variance over the tokens of a head that counts.
        rescale: whether the variance is that of scores with mean 1; False: of scores that sum to 1.
        boost: whether CLS starts with sqrt(N) times the weight of a patch.
        feature: what is compared: keys of all heads, queries, values, or the features that the attention leaves.
        metric: how: "cosine", "dot" product, or (the opposite of the) "euclidean" distance.
        split: which half leaves: "unimportant", "important", or every second one in order of importance ("alternate").
        order: "I'-S-I" or "I-S".
    """

    keep: int | float = 0.5
    positions: Positions = "keep"
    layers: tuple[int, ...] | None = None
    similar: int = 5
    rounds: tuple[int, int, int] = (30, 5, 1)
    tolerance: float = 1e-6
    variance: tuple[float, float] = (0.01, 0.7)
    rescale: bool = True
    boost: bool = False
    feature: Feature = "key"
    metric: Metric = "cosine"
    split: Split = "unimportant"
    order: Literal["I'-S-I", "I-S"] = "I'-S-I"

    title: ClassVar[str] = "Zero-TPrune"
    paper: ClassVar[str] = (
        "Wang et al., Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in Pre-Trained "
        "Transformers, CVPR 2024, arXiv 2305.17328"
    )
    year: ClassVar[int] = 2024
    cost: ClassVar[Cost] = "pairs"
    needs: ClassVar[frozenset[Need]] = frozenset({"tower_states", "tower_keys"})
    tower_cut: ClassVar[TowerCut] = "mlp"

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("layers", "rounds", "variance"):
            object.__setattr__(self, field, as_tuple(field, getattr(self, field)))
        if self.layers is not None:
            check_ascending("layers", self.layers, lowest=0)
        check_whole("similar", self.similar, lowest=0)
        if self.rounds is None or len(self.rounds) != 3:
            raise MMTokenError(f"rounds={self.rounds!r}: give three numbers, of first, middle and last blocks.")
        for number in self.rounds:
            check_whole("rounds", number, lowest=1)
        if not _number(self.tolerance) or not self.tolerance >= 0:
            raise MMTokenError(f"tolerance={self.tolerance!r} cannot be; give a number of at least 0.")
        bounds = self.variance
        if bounds is None or len(bounds) != 2 or not all(map(_number, bounds)) or not 0 <= bounds[0] <= bounds[1]:
            raise MMTokenError(f"variance={bounds!r} cannot be; give the lowest and the highest, neither below 0.")
        for field in ("rescale", "boost"):
            if not isinstance(getattr(self, field), bool):
                raise MMTokenError(f"{field}={getattr(self, field)!r} is neither True nor False.")
        choices = {
            "feature": ("key", "query", "value", "features"),
            "metric": ("cosine", "dot", "euclidean"),
            "split": ("unimportant", "important", "alternate"),
            "order": ("I'-S-I", "I-S"),
        }
        for field, known in choices.items():
            if getattr(self, field) not in known:
                raise MMTokenError(f"{field}={getattr(self, field)!r} is unknown; use one of {', '.join(known)}.")

    def cuts(self, depth: int) -> tuple[int, ...]:
        """Blocks in which tokens leave, in a tower that is read after `depth` blocks."""
        return scaled_cuts(PAPER_LAYERS, PAPER_DEPTH, depth) if self.layers is None else self.layers

    def tower_layers(self, depth: int, blocks: int) -> tuple[int, ...]:
        if self.layers is not None and self.layers[-1] >= depth:
            raise UnsupportedError(
                f"layers={self.layers} but this tower is read after {depth} blocks; choose from 0 to {depth - 1}."
            )
        if not self.cuts(depth):
            raise UnsupportedError("This tower is read after its first block; name the block yourself (layers).")
        return ()

    def vision_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        cuts = self.cuts(ctx.depth)
        if layer not in cuts:
            return tokens
        stage = cuts.index(layer)
        now = tokens.counts()
        targets = [
            min(n, self.target(total, stage, len(cuts))) for n, total in zip(now, ctx.original_counts, strict=True)
        ]
        states = ctx.tower_states(tokens)
        features = self._features(tokens, states, ctx)
        refuse_nan(features, tokens.eligible, "what Zero-TPrune compares")
        rounds = self._rounds(layer, ctx.depth)
        left = tokens.eligible
        duplicates = [min(self.similar, n - target, n // 2) for n, target in zip(now, targets, strict=True)]
        if self.order == "I-S":
            scores = self.importance(states, left, rounds)
            left = top_mask(scores, [t + r for t, r in zip(targets, duplicates, strict=True)], left)
            # Half of fewer tokens may be fewer than were to leave: importance takes the rest.
            left = self._thin(features, scores, left, duplicates)
        else:
            left = self._thin(features, self.importance(states, left, 1), left, duplicates)
            scores = self.importance(states, left, rounds)
        ctx.scores = scores
        return tokens.where(top_mask(scores, targets, left) | tokens.protected)

    def target(self, total: int, stage: int, stages: int) -> int:
        """Tokens of `total` that are left after cut `stage` of `stages`; the same share leaves at every cut."""
        final = kept_count(self.keep, total)
        if not total or stage == stages - 1:
            return final
        share = float((final / total) ** ((stage + 1) / stages))
        return max(final, math.floor(total * share + 0.5))

    def _rounds(self, block: int, depth: int) -> int:
        """Most rounds in a block; of towers with few blocks none are early or middle."""
        if block >= depth - 3:
            return self.rounds[2]
        return self.rounds[0] if block < 3 else self.rounds[1]

    def _features(self, tokens: VisualTokens, states: TowerStates, ctx: Context) -> Tensor:
        """float[B, N, C]: what the similarity compares."""
        if self.feature == "features":
            return tokens.features.detach().float()
        if self.feature == "key":
            return ctx.tower_keys(tokens, joint=True).float()
        values = states.query if self.feature == "query" else states.value
        return values.permute(0, 2, 3, 1, 4).flatten(2).float()

    def importance(self, states: TowerStates, left: Tensor, rounds: int) -> Tensor:
        """float32[B, N]: page rank of the tokens bool[B, N], 0 for the others."""
        prefix, patches = states.prefix_key.shape[2], states.key.shape[3]
        seen = left.repeat_interleave(patches, 1)
        query, key = (
            torch.cat([first, body.flatten(2, 3)], 2)
            for first, body in ((states.prefix_query, states.query), (states.prefix_key, states.key))
        )
        seen = torch.nn.functional.pad(seen, (prefix, 0), value=True)
        start = seen.float()
        if self.boost and prefix:
            start[:, 0] = seen.sum(-1).sqrt()
        start = start / start.sum(-1, keepdim=True).clamp(min=1)
        ranks = pagerank(query, key, seen, start, rounds, tolerance=self.tolerance)
        heads = informative_heads(ranks, seen, self.variance, rescale=self.rescale)
        per_patch = emphasise(ranks, heads)[:, prefix:]
        return per_patch.view(*left.shape, patches).sum(-1).masked_fill(~left, 0.0)

    def _thin(self, features: Tensor, scores: Tensor, left: Tensor, counts: list[int]) -> Tensor:
        """bool[B, N]: `left` without the given number of near-duplicates per item."""
        left = left.clone()
        for row, count in enumerate(counts):
            if count:
                where = left[row].nonzero()[:, 0]
                gone = near_duplicates(features[row, where], scores[row, where], count, self.split, self.metric)
                left[row, where[gone]] = False
        return left


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def informative_heads(ranks: Tensor, seen: Tensor, variance: tuple[float, float], *, rescale: bool = True) -> Tensor:
    """bool[B, H]: heads whose scores float[B, H, n] have a variance over the tokens within the bounds; all if none has.

    `rescale`: of scores with mean 1, else of scores that sum to 1.
    """
    count = seen.sum(-1).clamp(min=1)[:, None]
    scores = (ranks * count[..., None] if rescale else ranks).masked_fill(~seen[:, None], 0.0)
    mean = scores.sum(-1) / count
    spread = ((scores - mean[..., None]).masked_fill(~seen[:, None], 0.0) ** 2).sum(-1) / count
    inside = (spread >= variance[0]) & (spread <= variance[1])
    return inside | ~inside.any(-1, keepdim=True)


def emphasise(ranks: Tensor, heads: Tensor) -> Tensor:
    """float32[B, n]: root mean square of scores float[B, H, n] over the heads bool[B, H]."""
    squares = (ranks**2).masked_fill(~heads[..., None], 0.0).sum(1)
    return (squares / heads.sum(-1, keepdim=True)).sqrt()


def near_duplicates(features: Tensor, scores: Tensor, count: int, split: Split, metric: Metric) -> Tensor:
    """int[r]: the tokens that leave because a more (or less) important one resembles them most.

    Args:
        features: float[n, C].
        scores: float[n], importance; ties go to the lower index.
        count: how many leave, at most the smaller half.
        split: which half leaves; of an odd number the other half is the larger one.
        metric: similarity.
    """
    order = scores.argsort(descending=True, stable=True)
    half = (len(order) + 1) // 2
    if split == "alternate":
        stay, leave = order[::2], order[1::2]
    elif split == "unimportant":
        stay, leave = order[:half], order[half:]
    else:
        stay, leave = order[len(order) - half :], order[: len(order) - half]
    leave = leave.sort().values
    if metric == "cosine":
        best = similarity_stats(features[leave][None], features[stay][None]).max[0]
    elif metric == "dot":
        best = torch.cat([(features[part] @ features[stay].T).amax(-1) for part in leave.split(CHUNK)])
    else:
        best = torch.cat([-torch.cdist(features[part], features[stay]).amin(-1) for part in leave.split(CHUNK)])
    return leave[best.argsort(descending=True, stable=True)[:count]]
