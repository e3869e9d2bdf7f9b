"""ToMe: merge the most similar tokens in every block of the vision tower, between its attention and its MLP."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmtoken.compressors.base import Compressor, Context, Cost, Need, Parity, Positions, TowerCut
from mmtoken.errors import InputError
from mmtoken.kernels.gather_merge import gather_merge
from mmtoken.kernels.similarity_stats import similarity_stats
from mmtoken.tokens import VisualTokens, kept_count, pick_rows, refuse_nan


@dataclass(frozen=True)
class ToMe(Compressor):
    """Bipartite soft matching in every tower block, a constant number of merges per block.

    Between attention and MLP, even tokens are matched with their most similar odd token (cosine of this block's
    head-averaged keys); the most similar pairs merge into size-weighted means, until `keep` tokens leave the last block
    that is read. Later blocks weigh a merged token by its size (proportional attention, equation 1). Afterwards the
    grid is restored for the projector, and of the projected tokens those stay whose patches were destinations or never
    merged.

    Differs from the paper: a token is the square of patches that becomes one projected token where the projector merges
    several; towers on packed sequences (Qwen) take no attention bias, so sizes do not weigh there.
    """

    keep: int | float = 0.5
    positions: Positions = "keep"

    title: ClassVar[str] = "ToMe"
    paper: ClassVar[str] = "Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023, arXiv 2210.09461"
    year: ClassVar[int] = 2023
    parity: ClassVar[Parity] = "official code"
    cost: ClassVar[Cost] = "pairs"
    licence: ClassVar[str] = "written from the paper's formulas, Apache-2.0; the official code is CC-BY-NC 4.0, unused"
    needs: ClassVar[frozenset[Need]] = frozenset({"tower_keys"})
    merges: ClassVar[bool] = True
    size_bias: ClassVar[bool] = True
    tower_cut: ClassVar[TowerCut] = "mlp"

    def vision_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        targets = [self.target(total, layer, ctx.depth) for total in ctx.original_counts]
        metric = ctx.tower_keys(tokens)
        while True:
            now = tokens.counts()
            merges = [min(max(n - target, 0), n // 2) for n, target in zip(now, targets, strict=True)]
            tokens, metric = _merge_once(tokens, metric, merges)
            # One round halves at most; only the last block goes on until the budget is met.
            if layer < ctx.depth - 1 or tokens.counts() == targets:
                return tokens

    def target(self, total: int, layer: int, depth: int) -> int:
        """Tokens of a row of `total` that leave block `layer` of 0 .. `depth` - 1."""
        final = kept_count(self.keep, total)
        even = total - math.floor((total - final) * (layer + 1) / depth + 0.5)
        # A block can merge half of its tokens at most, so none may leave more than the rest can get rid of.
        halvings: int = 2 ** (depth - 1 - layer)
        return max(final, min(even, final * halvings))


@dataclass(frozen=True)
class Matching:
    """Which tokens merge. Even tokens are 2 * index, odd ones 2 * index + 1.

    Attributes:
        unmerged: int[B, U] even tokens that stay; by falling similarity, or ascending with a class token.
        source: int[B, r] even tokens that merge, by falling similarity.
        destination: int[B, r] the odd token that each one merges into.
        length: tokens before the merge.
        distill_token: whether the first odd token is a distillation token, put out second.
    """

    unmerged: Tensor
    source: Tensor
    destination: Tensor
    length: int
    distill_token: bool = False

    def order(self) -> Tensor:
        """int[B, M]: the original token behind each output token: unmerged even ones, then odd ones."""
        odd = torch.arange(self.length // 2, device=self.unmerged.device).expand(len(self.unmerged), -1) * 2 + 1
        even = self.unmerged * 2
        if self.distill_token:
            return torch.cat([even[:, :1], odd[:, :1], even[:, 1:], odd[:, 1:]], 1)
        return torch.cat([even, odd], 1)

    def merge(self, values: Tensor, mode: Literal["sum", "mean"] = "sum") -> Tensor:
        """float[B, N, D] to float[B, M, D]: destinations hold the sum, or the mean, of themselves and their sources."""
        ones = torch.ones(values.shape[:2], device=values.device)
        return self.weighted(values, ones, self.totals(ones) if mode == "mean" else ones)

    def totals(self, size: Tensor) -> Tensor:
        """float[B, N]: what destinations and their sources add up to, of sizes float[B, N]; others stay as they are."""
        return size.scatter_add(1, self.destination * 2 + 1, size.gather(1, self.source * 2))

    def weighted(self, values: Tensor, size: Tensor, total: Tensor) -> Tensor:
        """float[B, M, D]: sums of size / total * values over destinations and their sources; both float[B, N]."""
        order = self.order()
        weight = size.gather(1, self.source * 2) / total.gather(1, self.destination * 2 + 1)
        # With a distillation token nothing goes to the first odd token, the only one that stands elsewhere.
        slot = self.unmerged.shape[1] + self.destination
        return gather_merge(values, order, slot, weight, self.source * 2, (size / total).gather(1, order))

    def unmerge(self, merged: Tensor) -> Tensor:
        """float[B, M, D] to float[B, N, D]: sources get a copy of what they merged into."""
        order = self.order()
        shape = (merged.shape[0], self.length, merged.shape[-1])
        full = merged.new_zeros(shape).scatter(1, _expand(order, merged), merged)
        copies = full.gather(1, _expand(self.destination * 2 + 1, merged))
        return full.scatter(1, _expand(self.source * 2, merged), copies)


def _expand(index: Tensor, values: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, values.shape[-1])


def bipartite_soft_matching(metric: Tensor, r: int, class_token: bool = False, distill_token: bool = False) -> Matching:
    """Match each even token with its most similar odd one and pick the `r` most similar pairs.

    Args:
        metric: float[B, N, C]; similarity is the cosine.
        r: pairs to merge; capped at half of the tokens that are not protected.
        class_token: the first even token (CLS) never merges, and unmerged tokens come out in order.
        distill_token: nothing merges into the first odd token.

    Raises:
        InputError: r is negative, or keys are NaN or infinite.
    """
    if r < 0:
        raise InputError(f"r={r} is negative; give the number of tokens to merge.")
    length = metric.shape[1]
    r = min(r, (length - int(class_token) - int(distill_token)) // 2)
    metric = metric.detach()
    peak = metric.abs().amax(-1)
    refuse_nan(peak * 0, torch.ones_like(peak, dtype=torch.bool), "metric")  # infinity times 0 is NaN as well
    first = 1 + 2 * int(distill_token)
    stats = similarity_stats(metric[:, ::2], metric[:, first::2])
    best, partner = stats.max, stats.argmax + first // 2
    if class_token:
        best[:, 0] = -torch.inf
    edges = best.argsort(dim=-1, descending=True, stable=True)
    unmerged, source = edges[:, r:], edges[:, :r]
    if class_token:
        unmerged = unmerged.sort(-1).values
    return Matching(unmerged, source, partner.gather(1, source), length, distill_token)


def merge_weighted(matching: Matching, values: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """(size-weighted means float[B, M, D], new sizes float[B, M, 1]) of values float[B, N, D], size float[B, N, 1]."""
    total = matching.totals(size[..., 0])
    return matching.weighted(values, size[..., 0], total), total.gather(1, matching.order())[..., None]


def _merge_once(tokens: VisualTokens, metric: Tensor, merges: list[int]) -> tuple[VisualTokens, Tensor]:
    """One round of matching over rows that may differ in length and in how much they merge."""
    if len(set(merges)) == 1 and bool(tokens.eligible.all()):
        return _merge_rows(tokens, metric, merges[0])
    parts = []
    for row, r in enumerate(merges):
        where = tokens.eligible[row].nonzero()[:, 0][None]
        single = tokens.row(row)
        part, keys = _merge_rows(single.take(where), metric[row : row + 1].gather(1, _expand(where, metric)), r)
        kept = single.where(single.protected)
        parts.append((part, keys, kept))
    return _join(tokens, parts)


def _merge_rows(tokens: VisualTokens, metric: Tensor, r: int) -> tuple[VisualTokens, Tensor]:
    matching = bipartite_soft_matching(metric, r)
    values, size = merge_weighted(matching, tokens.features, tokens.size[..., None])
    # Destinations keep their own place; back to the order of the image, which pairs neighbours in the next round.
    index = matching.order()
    rank = tokens.source.gather(1, index).argsort(-1)
    index = index.gather(1, rank)
    keys, _ = merge_weighted(matching, metric, tokens.size[..., None])
    merged = tokens.take(index).replace(features=pick_rows(values, rank), size=size[..., 0].gather(1, rank))
    return merged, pick_rows(keys, rank)


def _join(tokens: VisualTokens, parts: list[tuple[VisualTokens, Tensor, VisualTokens]]) -> tuple[VisualTokens, Tensor]:
    """Rows of different length as one padded batch, protected tokens behind."""

    def pad(name: str) -> Tensor:
        rows = [torch.cat([getattr(part, name)[0], getattr(kept, name)[0]]) for part, _, kept in parts]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    names = ("features", "source", "size", "valid", "protected", "item")
    joined = VisualTokens(**{name: pad(name) for name in names}, grid=tokens.grid)
    keys = [torch.cat([keys[0], keys.new_zeros(kept.source.shape[1], keys.shape[-1])]) for _, keys, kept in parts]
    return joined, torch.nn.utils.rnn.pad_sequence(keys, batch_first=True)
