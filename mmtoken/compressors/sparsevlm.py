"""SparseVLM: the text tokens that mean the image rate its tokens; of those dropped, the better ones are clustered."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmtoken.compressors.base import Compressor, Context, Cost, Need, Parity, Positions, check_whole
from mmtoken.compressors.stages import as_tuple, check_ascending, check_stages, checked_cuts, scaled_cuts
from mmtoken.errors import MMTokenError
from mmtoken.kernels.attention_rows import attention_rows
from mmtoken.kernels.gather_merge import gather_merge
from mmtoken.tokens import VisualTokens, check_keep, kept_count, pick_rows, refuse_nan, top_mask

PAPER_DEPTH = 32
PAPER_CUTS = (3, 7, 16)
"""Layers of the paper's decoder, and those (0-based) before which it drops tokens."""

PAPER_HEADS = 14
"""Heads out of 32 that SparseVLM+ averages."""

TILE = 256
"""Rows of the matrix of distances that exist at once."""

_PAPER = (
    "Zhang et al., SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference, ICML 2025, "
    "arXiv 2410.04417"
)


@dataclass(frozen=True)
class SparseVLM(Compressor):
    """Cuts in stages by the attention of text raters; the better of the dropped tokens come back as a few clusters.

    Raters are the text tokens after the image that matter to it: softmax over the text of the dot products of input
    embeddings, averaged over the image, above the mean. A visual token's score is the attention that the raters pay to
    it in the layer that has just run, mean over heads and raters. Of the tokens that a stage prunes the best
    `recycle` (and one more) are clustered, one cluster per `members` of them (and one more): density from the nearest
    neighbours, centres that are dense and far from denser tokens, everyone else to the nearest centre. The mean of a
    cluster goes on as one token.

    `keep` is what is left after the last cut, clusters included; stages before it follow a geometric series.

    Differs from the official code in the default: equal densities are settled by score (the code adds noise); clusters
    stand at the positions of their centres, count in `keep`, and one stage after the other meets its budget, where the
    code reads a table of kept tokens for three budgets of 576. variant="repo" takes `stages` as such a table (clusters
    come on top, at least one token is pruned) and puts clusters behind the kept tokens; with positions="renumber" that
    is the official code. Not in the code any more, and off by default: `scale`, the paper's rule for how much a stage
    prunes.

    Attributes:
        layers: layers (0-based) before which tokens are dropped; None: before 3, 7 and 16 of 32, scaled.
        stages: budget after each cut, all counts or all fractions, the last one equal to `keep`; None: as above.
        recycle: share of the pruned tokens that are clustered, in (0, 1].
        members: recycled tokens per cluster.
        scale: lambda; each stage but the last prunes floor(lambda * (N - rank of the raters' attention to N tokens)).
        variant: "repo" as above.
    """

    keep: int | float = 0.196
    positions: Positions = "keep"
    layers: tuple[int, ...] | None = None
    stages: tuple[int | float, ...] | None = None
    recycle: float = 0.3
    members: int = 10
    scale: float | None = None
    variant: Literal["paper", "repo"] = "paper"

    title: ClassVar[str] = "SparseVLM"
    paper: ClassVar[str] = _PAPER
    year: ClassVar[int] = 2025
    parity: ClassVar[Parity] = "official code"
    cost: ClassVar[Cost] = "pairs"
    needs: ClassVar[frozenset[Need]] = frozenset({"text", "text_attention"})
    merges: ClassVar[bool] = True
    query_agnostic: ClassVar[bool] = False
    causal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_stages(self)
        if isinstance(self.recycle, bool) or not isinstance(self.recycle, int | float) or not 0 < self.recycle <= 1:
            raise MMTokenError(f"recycle={self.recycle!r} is no share; give a number above 0 and up to 1.")
        check_whole("members", self.members, lowest=1)
        if self.scale is not None and (
            isinstance(self.scale, bool) or not isinstance(self.scale, int | float) or not 0 < self.scale <= 1
        ):
            raise MMTokenError(f"scale={self.scale!r} is no factor; give a number above 0 and up to 1, or None.")
        if self.scale is not None and self.stages is not None:
            raise MMTokenError(
                f"scale={self.scale!r} and stages={self.stages} both say what is left; give one of them."
            )

    def cut_layers(self, depth: int) -> tuple[int, ...]:
        return _cuts(self, depth)

    def score_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(layer - 1 for layer in self.cut_layers(depth))

    def llm_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        raters = text_raters(tokens, ctx)
        ranks = None
        if self.scale is not None:
            ranks = attention_ranks(ctx.head_attention(tokens, layer - 1, raters).mean(1), tokens.eligible)
        scores = ctx.text_attention(tokens, layer - 1, raters)
        lefts = _lefts(self, tokens, layer, ctx)
        if ranks is not None and layer != self.cut_layers(ctx.depth)[-1]:
            assert self.scale is not None
            final = [
                kept_count(self.keep, n, steps) for n, steps in zip(ctx.original_counts, tokens.steps, strict=True)
            ]
            pruned = [math.floor(self.scale * (n - rank)) for n, rank in zip(tokens.counts(), ranks, strict=True)]
            lefts = [min(n, max(least, n - p)) for n, least, p in zip(tokens.counts(), final, pruned, strict=True)]
        plans = [self.split(total, left) for total, left in zip(tokens.counts(), lefts, strict=True)]
        kept = top_mask(scores, [count for count, _ in plans], tokens.eligible)
        refuse_nan(tokens.features.detach() * 0, tokens.eligible, "features")  # infinity times 0 is NaN as well
        return self.merge(tokens, scores, kept, [clusters for _, clusters in plans])

    def clusters(self, pruned: int) -> int:
        """How many clusters the recycled ones of so many pruned tokens form."""
        return min(int(self.recycled(pruned) / self.members) + 1, self.recycled(pruned))

    def recycled(self, pruned: int) -> int:
        """How many of so many pruned tokens are recycled."""
        return min(int(self.recycle * pruned) + 1, pruned)

    def split(self, total: int, left: int) -> tuple[int, int]:
        """(kept tokens, clusters) of an item of `total` tokens of which `left` are to be left."""
        if self.variant == "repo":
            kept = max(0, min(left, total - 1))
            return kept, self.clusters(total - kept)
        if left >= total:
            return total, 0
        for kept in range(left - 1, 0, -1):
            # One token less makes one cluster more at most, so the first that fits fits exactly.
            if kept + self.clusters(total - kept) <= left:
                return kept, left - kept
        return 1, left - 1

    def best_pruned(self, scores: Tensor, pruned: Tensor) -> Tensor:
        """int[r]: the recycled ones of an item's pruned tokens bool[N], best score float[N] first."""
        where = pruned.nonzero()[:, 0]
        return where[scores[where].argsort(descending=True, stable=True)][: self.recycled(len(where))]

    def merge(self, tokens: VisualTokens, scores: Tensor, kept: Tensor, clusters: list[int]) -> VisualTokens:
        """The kept tokens and the clusters of the best of the others, by original position.

        Args:
            tokens: the tokens.
            scores: float[B, N].
            kept: bool[B, N].
            clusters: number of clusters of each item.
        """
        features, size = tokens.features.clone(), tokens.size.clone()
        sources, index = tokens.source.clone(), []
        for row, count in enumerate(clusters):
            stays = kept[row].nonzero()[:, 0]
            best = self.best_pruned(scores[row], tokens.eligible[row] & ~kept[row])
            best = best if count else best[:0]
            centres, owner = cluster(tokens.features[row, best], count)
            merged = cluster_means(tokens.features[row, best], owner, count)
            features[row, best[centres]] = merged.to(features.dtype)
            size[row, best[centres]] = size.new_zeros(count).index_add(0, owner, tokens.size[row, best])
            left = torch.cat([stays[tokens.source[row, stays].argsort()], best[centres]])
            if self.variant == "repo":
                places = tokens.source[row, tokens.eligible[row]].sort().values
                sources[row, left] = behind(places, tokens.source[row, left[: len(stays)]], count)
            left = torch.cat([left, tokens.protected[row].nonzero()[:, 0]])
            index.append(left[sources[row, left].argsort()])
        padded = torch.nn.utils.rnn.pad_sequence(index, batch_first=True)
        lengths = torch.tensor([len(row) for row in index], device=features.device)
        valid = torch.arange(padded.shape[1], device=features.device) < lengths[:, None]
        return tokens.replace(features=features, size=size, source=sources).take(padded, valid)


@dataclass(frozen=True)
class SparseVLMPlus(Compressor):
    """SparseVLM's second version: raters' attention freed of the bias of rotary positions, best heads, no clusters.

    Raters as in `SparseVLM`. The attention that they pay to a visual token in the layer that has just run is divided,
    head by head, by what rotary positions alone would make of it: the scaled dot product of two vectors of ones,
    rotated to both positions. The score is the mean over raters of the mean over the heads in which it sums up to most.
    `keep` is what is left after the last cut; stages before it follow a geometric series.

    Differs from the official code in the default: the number of heads is scaled to the decoder (the code: 14, whatever
    the number of heads), and budgets are free and counts rounded by `kept_count`. variant="repo" takes 14 heads and
    prunes at least one token.

    Attributes:
        layers: layers (0-based) before which tokens are dropped; None: before 3, 7 and 16 of 32, scaled.
        stages: budget after each cut, all counts or all fractions, the last one equal to `keep`; None: as above.
        heads: how many heads are averaged; None: as above.
        variant: "repo" as above.
    """

    keep: int | float = 0.196
    positions: Positions = "keep"
    layers: tuple[int, ...] | None = None
    stages: tuple[int | float, ...] | None = None
    heads: int | None = None
    variant: Literal["paper", "repo"] = "paper"

    title: ClassVar[str] = "SparseVLM Plus"
    paper: ClassVar[str] = _PAPER
    year: ClassVar[int] = 2025
    parity: ClassVar[Parity] = "official code"
    needs: ClassVar[frozenset[Need]] = frozenset({"decoder_states", "text", "text_attention"})
    query_agnostic: ClassVar[bool] = False
    causal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_stages(self)
        if self.heads is not None:
            check_whole("heads", self.heads, lowest=1)

    def cut_layers(self, depth: int) -> tuple[int, ...]:
        return _cuts(self, depth)

    def score_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(layer - 1 for layer in self.cut_layers(depth))

    def llm_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        raters = text_raters(tokens, ctx)
        attention = ctx.head_attention(tokens, layer - 1, raters)
        states, text = ctx.decoder_states(tokens, layer - 1), ctx.text_states(tokens, layer - 1)
        width = states.query.shape[-1]
        # The raters of each item, in order, as `head_attention` has them.
        first = torch.argsort((~raters).to(torch.uint8), dim=-1, stable=True)[:, : attention.shape[2]]
        bias = rotary_bias(
            (pick_rows(text.cosine, first), pick_rows(text.sine, first)), (states.cosine, states.sine), width
        )
        scores = unbiased_scores(
            attention, bias, raters.gather(1, first), tokens.eligible, self._heads(attention.shape[1])
        )
        silent = ~raters.any(-1, keepdim=True)
        if bool(silent.any()):  # no text after the item: the prompt's last token stands for it
            scores = torch.where(silent, ctx.text_attention(tokens, layer - 1, "last"), scores)
        ctx.scores = scores
        lefts = _lefts(self, tokens, layer, ctx)
        if self.variant == "repo":
            lefts = [max(0, min(left, total - 1)) for left, total in zip(lefts, tokens.counts(), strict=True)]
        return tokens.top(scores, lefts)

    def _heads(self, heads: int) -> int:
        if self.heads is not None:
            return min(self.heads, heads)
        if self.variant == "repo":
            return min(PAPER_HEADS, heads)
        return max(1, math.floor(PAPER_HEADS * heads / 32 + 0.5))


def _check_stages(method: SparseVLM | SparseVLMPlus) -> None:
    if method.variant not in ("paper", "repo"):
        raise MMTokenError(f"variant={method.variant!r} is unknown; use 'paper' or 'repo'.")
    for field in ("layers", "stages"):
        object.__setattr__(method, field, as_tuple(field, getattr(method, field)))
    if method.layers is not None:
        check_ascending("layers", method.layers, lowest=1)
    stages = method.stages
    if stages is None:
        return
    for budget in stages:
        check_keep(budget, "stages")
    if len({type(budget) for budget in stages}) > 1 or list(stages) != sorted(stages, reverse=True):
        raise MMTokenError(
            f"stages={stages} mix counts and fractions or grow; give one kind, none larger than the one before."
        )
    if stages[-1] != method.keep or type(stages[-1]) is not type(method.keep):
        raise MMTokenError(f"keep={method.keep!r} but stages={stages} leave {stages[-1]}; give keep={stages[-1]}.")
    if method.layers is not None:
        check_stages("stages", stages, method.layers)


def _cuts(method: SparseVLM | SparseVLMPlus, depth: int) -> tuple[int, ...]:
    layers = scaled_cuts(PAPER_CUTS, PAPER_DEPTH, depth) if method.layers is None else method.layers
    layers = checked_cuts(layers, depth)
    if method.stages is not None:
        check_stages("stages", method.stages, layers)
    return layers


def _lefts(method: SparseVLM | SparseVLMPlus, tokens: VisualTokens, layer: int, ctx: Context) -> list[int]:
    """How many tokens of each item the budget leaves after the cut before `layer`."""
    cuts = method.cut_layers(ctx.depth)
    stage = cuts.index(layer)
    lefts = []
    for now, total, steps in zip(tokens.counts(), ctx.original_counts, tokens.steps, strict=True):
        if method.stages is not None:
            left = kept_count(method.stages[stage], total, steps)
        else:
            left = kept_count(method.keep, total, steps)
            if total and stage < len(cuts) - 1:
                fraction = method.keep if isinstance(method.keep, float) else left / total
                left = max(left, kept_count(float(fraction ** ((stage + 1) / len(cuts))), total))
        lefts.append(min(now, left))
    return lefts


def text_raters(tokens: VisualTokens, ctx: Context) -> Tensor:
    """bool[B, T] among the tokens of `Context.text`: the raters of each item, chosen once, before the first cut."""
    if "raters" not in ctx.memory:
        text = ctx.text(tokens)
        ctx.memory["raters"] = choose_raters(
            ctx.embeddings(tokens), tokens.eligible, text.embeddings, text.valid & text.after
        )
    raters: Tensor = ctx.memory["raters"]
    return raters


def choose_raters(visual: Tensor, eligible: Tensor, text: Tensor, asked: Tensor) -> Tensor:
    """Text tokens that matter to the image more than the average one.

    Args:
        visual: float[B, N, D] input embeddings.
        eligible: bool[B, N].
        text: float[B, T, D] input embeddings.
        asked: bool[B, T], the text tokens in question.

    Returns:
        bool[B, T]; all that were asked where none is above the mean (a single one never is).
    """
    tokens, words = visual.detach()[:, None], text.detach()[:, None]
    weight = attention_rows(tokens, words, scale=1.0, mask=asked[:, None], valid=eligible, mean="queries")
    mean = weight.sum(-1, keepdim=True) / asked.sum(-1, keepdim=True).clamp(min=1)
    chosen = (weight > mean) & asked
    return torch.where(chosen.any(-1, keepdim=True), chosen, asked)


def attention_ranks(attention: Tensor, eligible: Tensor) -> list[int]:
    """Rank of each item's matrix of raters' attention, float[B, R, N], over its eligible tokens."""
    return [
        int(torch.linalg.matrix_rank(rows[:, mine].float())) if rows.shape[0] and bool(mine.any()) else 0
        for rows, mine in zip(attention, eligible, strict=True)
    ]


def cluster(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Density peaks among R tokens and the cluster of each token.

    Distance: Euclidean / sqrt(D). Density: exp(-mean squared distance to the `count` nearest, itself included). A
    centre is dense and far from any denser token (from all, for the densest); of two equally dense ones the lower index
    counts as denser. The others go to the nearest centre.

    Args:
        features: float[R, D].
        count: number of clusters, at most R.

    Returns:
        (int[count] centres, best first; int[R] which of them owns each token). Ties go to the lower index.
    """
    points = features.detach().float()
    if not count:
        nothing = torch.zeros(0, dtype=torch.long, device=points.device)
        return nothing, nothing

    def tiles() -> list[Tensor]:
        return list(points.split(TILE))

    def distances(some: Tensor, to: Tensor) -> Tensor:
        # Without matrix products: those round (i, j) and (j, i) apart.
        return torch.cdist(some, to, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(points.shape[1])

    densities, largest = [], []
    for some in tiles():
        distance = distances(some, points)
        densities.append((-distance.topk(count, largest=False).values.square().mean(-1)).exp())
        largest.append(distance.max())
    density, farthest = torch.cat(densities), torch.stack(largest).max()
    order = density.argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    apart = torch.cat(
        [
            distances(some, points).masked_fill(rank >= mine[:, None], torch.inf).amin(-1).clamp(max=farthest)
            for some, mine in zip(tiles(), rank.split(TILE), strict=True)
        ]
    )
    centres = (apart * density).argsort(descending=True, stable=True)[:count]
    owner = torch.cat([distances(some, points[centres]).argmin(-1) for some in tiles()])
    owner[centres] = torch.arange(count, device=owner.device)
    return centres, owner


def cluster_means(features: Tensor, owner: Tensor, count: int) -> Tensor:
    """float[count, D]: mean of each cluster's features float[R, D]; `owner` int[R] as `cluster` returns it."""
    share = 1.0 / owner.bincount(minlength=count)[owner]
    return gather_merge(features[None], owner.new_full((1, count), -1), owner[None], share[None])[0]


def behind(places: Tensor, kept: Tensor, clusters: int) -> Tensor:
    """Places for kept tokens and the clusters behind them: in this order, and as near to their own as that allows.

    Args:
        places: int[n] places of the item's tokens, ascending.
        kept: int[k] places of the kept ones, ascending.
        clusters: how many there are; k + clusters <= n.

    Returns:
        int[k + clusters], ascending: clusters at the end, a kept token where it was if that leaves room behind it.
    """
    total, count = len(places), len(kept)
    own = torch.searchsorted(places, kept)
    # From the last to the first: min(own, next - 1), and the last cluster gets the last place.
    room = total - clusters - count + torch.arange(count, device=places.device)
    last = torch.arange(total - clusters, total, device=places.device)
    return places[torch.cat([torch.minimum(own, room), last])]


def rotary_bias(rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], width: int) -> Tensor:
    """float32[B, R, N]: scaled dot products of vectors of ones that are rotated to the positions of both.

    Args:
        rows: (cosine, sine), float[B, R, d'] tables at the rows' positions.
        columns: the same at the columns' positions, float[B, N, d'].
        width: channels of a head; those beyond d' are not rotated.
    """

    def ones(table: tuple[Tensor, Tensor]) -> Tensor:
        cosine, sine = (part.float() for part in table)
        half = cosine.shape[-1] // 2
        sign = torch.where(torch.arange(cosine.shape[-1], device=cosine.device) < half, -1.0, 1.0)
        return cosine + sign * sine

    still = width - rows[0].shape[-1]
    return (ones(rows) @ ones(columns).transpose(1, 2) + still) / math.sqrt(width)


def unbiased_scores(attention: Tensor, bias: Tensor, raters: Tensor, eligible: Tensor, heads: int) -> Tensor:
    """Mean over the raters and the best heads of attention over bias.

    Args:
        attention: float[B, H, R, N].
        bias: float[B, R, N].
        raters: bool[B, R], which rows are real.
        eligible: bool[B, N].
        heads: how many heads, those with the largest sum over raters and eligible tokens.

    Returns:
        float32[B, N].
    """
    real = (raters[:, None, :, None] & eligible[:, None, None]).expand_as(attention)
    share = torch.where(real, attention.float() / bias[:, None], 0.0).sum(2)
    best = share.sum(-1).argsort(dim=-1, descending=True, stable=True)[:, :heads]
    return pick_rows(share, best).mean(1) / raters.sum(-1, keepdim=True).clamp(min=1)
