"""TCA: inside tower blocks, keep what the class token attends to, condense the rest into five tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mmtoken.compressors.base import (
    Compressor,
    Context,
    Need,
    Parity,
    Positions,
    TowerCut,
    TowerStates,
    check_whole,
)
from mmtoken.compressors.stages import as_tuple, check_ascending, scaled_cuts
from mmtoken.errors import MMTokenError, UnsupportedError
from mmtoken.kernels.attention_rows import attention_rows
from mmtoken.kernels.gather_merge import gather_merge
from mmtoken.tokens import VisualTokens, kept_count, refuse_nan

PAPER_DEPTH = 12
PAPER_LAYERS = (3, 6, 9)

CENTRES = 4


class Split(NamedTuple):
    """How many tokens stay as they are, are condensed into `clusters`, and are summed up in one."""

    stay: int
    condensed: int
    summed: int
    clusters: int = CENTRES


@dataclass(frozen=True)
class TCA(Compressor):
    """Token condensation: in three tower blocks the tokens that CLS cares least about become five.

    Tokens are ranked by the attention of CLS. The best stay as they are; the next ones are condensed into four, by
    greedy k-centres (the best-ranked is the first centre, then always the token that is farthest from all centres) and
    means within clusters, weighted by 1 / distance to the centre, which itself weighs 1; the last ones become one
    token, the sum of attention times features. With N tokens, a drop rate d, k = ceil((1 - d) N) and m = N + 1 - k, the
    best k - 2m stay, 2m are condensed into four and N - k into one. `keep` is what is left after the last place, with
    the same share leaving at each and the tokens that leave split as these formulas split them; `drop` sets d instead.

    It happens between the attention and the MLP of a block. The rest of the paper, which adapts a classifier at test
    time, is `mmtoken.classify.TCAClassifier`. Differs from the paper: the first centre is not random. Towers without
    CLS (our reading): the mean query of the patches stands for it. A token of several patches has the sum of their
    attention.

    `ctx.memory["anchors"]`, if a caller gives one (`Session.remembering`), holds float[C, D] per block: states of CLS
    that stand for C classes. The one most similar to the CLS that enters the block attends in it with the other tokens.

    Attributes:
        layers: tower blocks (0-based) in which tokens are condensed; None: 3, 6 and 9 of 12, scaled.
        drop: drop rate at each place, in (0, 1); counts then follow from it alone.
        first: which of the tokens to be condensed is the first centre, by rank; cut to those that there are.
        variant: "paper" ranks by the mean over heads of a token's rank in each head, "repo" by the mean attention.
    """

    keep: int | float = 0.388
    positions: Positions = "keep"
    layers: tuple[int, ...] | None = None
    drop: float | None = None
    first: int = 0
    variant: Literal["paper", "repo"] = "paper"

    title: ClassVar[str] = "TCA"
    paper: ClassVar[str] = (
        "Wang et al., Is Less More? Exploring Token Condensation as Training-free Test-time Adaptation, ICCV 2025, "
        "arXiv 2410.14729"
    )
    year: ClassVar[int] = 2025
    needs: ClassVar[frozenset[Need]] = frozenset({"tower_states"})
    merges: ClassVar[bool] = True
    tower_cut: ClassVar[TowerCut] = "mlp"
    parity: ClassVar[Parity] = "official code"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", as_tuple("layers", self.layers))
        if self.layers is not None:
            check_ascending("layers", self.layers, lowest=0)
        if self.drop is not None and (not isinstance(self.drop, float) or not 0 < self.drop < 1):
            raise MMTokenError(f"drop={self.drop!r} is no rate; give a float between 0 and 1, or None.")
        check_whole("first", self.first, lowest=0)
        if self.variant not in ("paper", "repo"):
            raise MMTokenError(f"variant={self.variant!r} is unknown; use 'paper' or 'repo'.")

    def cuts(self, depth: int) -> tuple[int, ...]:
        """Blocks in which tokens are condensed, in a tower that is read after `depth` blocks."""
        return scaled_cuts(PAPER_LAYERS, PAPER_DEPTH, depth) if self.layers is None else self.layers

    def tower_layers(self, depth: int, blocks: int) -> tuple[int, ...]:
        if self.layers is not None and self.layers[-1] >= depth:
            raise UnsupportedError(
                f"layers={self.layers} but this tower is read after {depth} blocks; choose from 0 to {depth - 1}."
            )
        if not self.cuts(depth):
            raise UnsupportedError("This tower is read after its first block; name the block yourself (layers).")
        return ()

    def guests(self, cls: Tensor | None, layer: int, ctx: Context) -> Tensor | None:
        anchors = ctx.memory.get("anchors", {}).get(layer)
        if anchors is None or cls is None or layer not in self.cuts(ctx.depth):
            return None
        similar = nn.functional.cosine_similarity(cls[:, None].float(), anchors[None].float(), dim=-1)
        chosen: Tensor = anchors[similar.argmax(-1)][:, None]
        return chosen

    def vision_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        cuts = self.cuts(ctx.depth)
        if layer not in cuts:
            return tokens
        attention = class_attention(ctx.tower_states(tokens), tokens.eligible)
        scores = attention.mean(1)
        ctx.scores = scores
        refuse_nan(scores, tokens.eligible, "the class token's attention")
        rows = []
        for row, (now, total) in enumerate(zip(tokens.counts(), ctx.original_counts, strict=True)):
            where = tokens.eligible[row].nonzero()[:, 0]
            heads = attention[row][:, where]
            ranking = mean_rank(heads) if self.variant == "paper" else heads.mean(0)
            split = self.split(now, total, cuts.index(layer), len(cuts))
            rows.append(self._condense(tokens.row(row), where, ranking, heads.mean(0), split))
        return _stack(tokens, rows)

    def split(self, now: int, total: int, stage: int, stages: int) -> Split:
        """What becomes of `now` tokens at a place; of `total` before the first one."""
        if self.drop is not None:
            return split_by_rate(now, self.drop)
        final = kept_count(self.keep, total)
        target = final
        if total and stage < stages - 1:
            share = float((final / total) ** ((stage + 1) / stages))
            target = max(final, math.floor(total * share + 0.5))
        return split_to(now, target)

    def _condense(
        self, tokens: VisualTokens, where: Tensor, ranking: Tensor, attention: Tensor, split: Split
    ) -> VisualTokens:
        stay, condensed, summed_up, clusters = split
        if stay == len(where):
            return tokens
        order = ranking.argsort(descending=True, stable=True)
        middle, rest = order[stay : stay + condensed], order[stay + condensed :][:summed_up]
        features = tokens.features[0, where].float()
        size = tokens.size[0, where]
        parts = [(where[order[:stay]], features[order[:stay]], size[order[:stay]])]
        if condensed:
            centres, owner, merged = condense(features[middle], clusters, self.first)
            sizes = torch.zeros(len(centres), device=size.device).index_add(0, owner, size[middle])
            parts.append((where[middle[centres]], merged, sizes))
        if len(rest):
            summed = (attention[rest, None] * features[rest]).sum(0, keepdim=True)
            parts.append((where[rest[:1]], summed, size[rest].sum()[None]))
        protected = tokens.protected[0].nonzero()[:, 0]
        parts.append((protected, tokens.features[0, protected].float(), tokens.size[0, protected]))
        index, joined, sizes = (torch.cat(part) for part in zip(*parts, strict=True))
        rank = tokens.source[0, index].argsort()
        left = tokens.take(index[rank][None])
        features = joined[rank].to(left.features.dtype)
        return left.replace(features=features[None], size=sizes[rank][None])


def class_attention(states: TowerStates, eligible: Tensor) -> Tensor:
    """float32[B, H, N]: what CLS (without one, the mean query) pays to each token bool[B, N]; patches added up."""
    patches = states.key.shape[3]
    hidden = ~eligible.repeat_interleave(patches, 1)[:, None]
    key, query = (
        x.detach().float().flatten(2, 3).masked_fill(hidden[..., None], 0.0) for x in (states.key, states.query)
    )
    prefix = states.prefix_key.shape[2]
    if prefix:
        asking = states.prefix_query[:, :, 0].float()
    else:
        asking = query.sum(2) / (~hidden).sum(-1, keepdim=True).clamp(min=1)
    seen = nn.functional.pad(~hidden, (prefix, 0), value=True)
    keys = torch.cat([states.prefix_key.float(), key], 2)
    weights = attention_rows(asking[:, :, None], keys, mask=seen)[:, :, 0, prefix:]
    per_token: Tensor = weights.view(*weights.shape[:2], -1, patches).sum(-1)
    return per_token.masked_fill(~eligible[:, None], 0.0)


def mean_rank(attention: Tensor) -> Tensor:
    """float32[n]: mean over heads of the place of each token in its head, the more attention the higher.

    Args:
        attention: float[H, n]; of equal ones the lower index has the higher place.
    """
    order = attention.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(attention.shape[1], device=attention.device).expand_as(order)
    return -torch.zeros_like(attention).scatter(1, order, places.to(attention.dtype)).mean(0)


def split_by_rate(count: int, drop: float) -> Split:
    """What becomes of `count` tokens at a drop rate; all stay where none would stay as it is.

    Source: the paper's released configuration; 196 tokens at 0.1 give 137, 40 and 19.
    """
    # 0.9 * 10 is 9.000000000000002 for some rates: what a float cannot tell from a whole number is one.
    kept = math.ceil((1 - drop) * count - 1e-9)
    places = count + 1 - kept
    if kept <= 2 * places or count - kept < 1:
        return Split(count, 0, 0)
    return Split(kept - 2 * places, 2 * places, count - kept)


def split_to(count: int, target: int) -> Split:
    """What becomes of `count` tokens such that `target` are left, split as in `split_by_rate`.

    With fewer than six left, there are fewer clusters; a single one is the best token, and the others are lost.
    """
    if target >= count:
        return Split(count, 0, 0)
    if target == 1:
        return Split(1, 0, 0)
    centres = min(CENTRES, target - 2)
    stay = target - 1 - centres
    others = count - stay
    if not centres:
        return Split(stay, 0, others)
    # At least two, since a sum of one token would save nothing.
    summed = max(2, (others + 1) // 3 - 1)
    return Split(stay, others - summed, summed, centres)


def condense(features: Tensor, count: int, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy k-centres and weighted means.

    Args:
        features: float[n, D].
        count: clusters, at most n of them.
        first: the first centre.

    Returns:
        (int[k] centres, int[n] cluster of each token, float[k, D] means). Distances are Euclidean; the farthest token
        with the lowest index is the next centre, and a token goes to the first of equally near centres. Tokens at the
        place of their centre weigh as much as it.
    """
    centres, places = [min(first, len(features) - 1)], features.detach()
    nearest = torch.cdist(places, places[centres])[:, 0]
    for _ in range(min(count, len(features)) - 1):
        nearest[centres[-1]] = -1.0
        centres.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, torch.cdist(places, places[centres[-1:]])[:, 0])
        nearest[centres] = -1.0
    chosen = torch.tensor(centres, device=features.device)
    distance, owner = torch.cdist(features, features[chosen]).min(-1)
    # Two centres may be at one place; each owns itself. A copy, as gradients of the distance need the places.
    owner = owner.clone()
    owner[chosen] = torch.arange(len(chosen), device=features.device)
    distance[chosen] = 0.0
    weight = torch.where(distance > 0, 1 / distance.clamp(min=1e-12), 1.0)
    total = torch.zeros(len(chosen), device=features.device).index_add(0, owner, weight)
    nothing = torch.full_like(chosen, -1)
    means = gather_merge(features[None], nothing[None], owner[None], (weight / total[owner])[None])
    return chosen, owner, means[0]


def _stack(tokens: VisualTokens, rows: list[VisualTokens]) -> VisualTokens:
    """Rows of one item each as one batch again, shorter ones padded."""

    def pad(name: str) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([getattr(row, name)[0] for row in rows], batch_first=True)

    names = ("features", "source", "size", "valid", "protected", "item")
    return VisualTokens(**{name: pad(name) for name in names}, grid=tokens.grid)
