"""LLaVA-PruMerge: keep the patches that stand out in CLS attention, and add their look-alikes to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmtoken.compressors.base import Budget, Compressor, Context, Cost, Need, Parity, Positions, check_whole
from mmtoken.errors import MMTokenError
from mmtoken.kernels.gather_merge import gather_merge
from mmtoken.tokens import VisualTokens, refuse_nan

_IQR_FACTOR = 1.5
_OFFICIAL_END = 575


@dataclass(frozen=True)
class PruMerge(Compressor):
    """Adaptive selection by attention outliers, then merging by key similarity, before the projector.

    Attention of CLS to the patches and the patches' keys are taken from the tower's last block, although features come
    from the block that the projector reads; both use the full width, without heads. Centres are the patches whose
    attention is an outlier of the item's: above Q3 + 1.5 (Q3 - Q1). With `plus`, patches sampled at regular distance
    join them, about three for every outlier. To each centre the features of the `neighbours` patches with the most
    similar keys are added, weighted by their attention (weights are not normalised, and neighbours may be centres);
    one more token is the attention-weighted sum of all patches that are no centres.

    With adaptive=True `keep` only caps the number of tokens; with adaptive=False it is that number, the extra token
    included, and with `plus` half of the centres are sampled.

    Where the projector merges or re-samples patches, tokens are selected and merged behind it, with attention and keys
    averaged the same way. A centre's size counts the tokens added to it, so that sizes add up to more than all tokens.

    Differs from the official code: thresholds are an item's own, not those of a whole batch; any grid, not only
    24 x 24; no sample is taken twice; centres keep their positions in raster order, and the extra token sits at the
    most attended patch that it holds. variant="repo" has the counts of the official code, int(N * ratio) centres and
    one token more, and its samples below 575.

    Attributes:
        adaptive: whether outliers decide the number of tokens; if not, `keep` does.
        plus: add spatial samples (PruMerge+).
        neighbours: patches that are added to each centre.
        variant: "repo" for the counts of the official code.
    """

    keep: int | float = 1.0
    positions: Positions = "keep"
    adaptive: bool = True
    plus: bool = False
    neighbours: int = 32
    variant: Literal["paper", "repo"] = "paper"

    title: ClassVar[str] = "PruMerge"
    paper: ClassVar[str] = (
        "Shang et al., LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models, ICCV 2025, "
        "arXiv 2403.15388"
    )
    year: ClassVar[int] = 2024
    parity: ClassVar[Parity] = "official code"
    cost: ClassVar[Cost] = "pairs"
    needs: ClassVar[frozenset[Need]] = frozenset({"tower_attention", "tower_keys"})
    merges: ClassVar[bool] = True
    budget: ClassVar[Budget] = "adaptive"
    identity_at_full: ClassVar[bool | str] = "adds neighbours to every token, and outliers decide how many there are"

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("adaptive", "plus"):
            if not isinstance(getattr(self, field), bool):
                raise MMTokenError(f"{field}={getattr(self, field)!r} is no bool; give True or False.")
        if self.variant not in ("paper", "repo"):
            raise MMTokenError(f"variant={self.variant!r} is unknown; use 'paper' or 'repo'.")
        check_whole("neighbours", self.neighbours, lowest=0)
        if not self.adaptive and self.variant == "paper":
            object.__setattr__(self, "budget", "exact")

    def tower_layers(self, depth: int, blocks: int) -> tuple[int, ...]:
        return (blocks - 1,)

    def project(
        self, tokens: VisualTokens, default: Callable[[VisualTokens], VisualTokens], ctx: Context
    ) -> VisualTokens:
        last = ctx.blocks - 1
        attention = ctx.tower_attention(tokens, block=last, joint=True).float()
        keys = ctx.tower_keys(tokens, block=last, joint=True).float()
        refuse_nan(attention, tokens.eligible, "tower_attention")
        refuse_nan(keys - keys, tokens.eligible, "tower_keys")  # infinities become NaN
        if ctx.tokenwise_projector:
            return default(self._merge(tokens, attention, keys))
        return self._merge(default(tokens), attention, keys)

    def _merge(self, tokens: VisualTokens, attention: Tensor, keys: Tensor) -> VisualTokens:
        mask, features, size = tokens.protected.clone(), tokens.features.clone(), tokens.size.clone()
        for row, budget in enumerate(tokens.budget(self.keep)):
            places = tokens.eligible[row].nonzero()[:, 0]
            if not len(places):
                continue
            weights = attention[row, places]
            centres = self.centres(weights, budget).unique()
            rest = others(centres, len(places))
            merged, extra = merge_neighbours(
                tokens.features[row, places], weights, keys[row, places], centres, rest, self.neighbours
            )
            mask[row, places[centres]] = True
            features[row, places[centres]] = merged
            size[row, places[centres]] += min(self.neighbours, len(places) - 1)
            if len(rest) and (len(centres) < budget or (self.variant == "repo" and not self.adaptive)):
                spot = places[rest[weights[rest].argmax()]]
                mask[row, spot] = True
                features[row, spot] = extra
                size[row, spot] = len(rest)
        return tokens.replace(features=features, size=size).where(mask)

    def centres(self, attention: Tensor, budget: int) -> Tensor:
        """int[C]: the patches float[N] that others are added to, by falling attention, then samples.

        Args:
            attention: what an item's patches receive.
            budget: most tokens of the item, the extra token included.
        """
        total = len(attention)
        room = budget if budget in (1, total) else budget - 1
        ratio = outlier_ratio(attention) if self.adaptive else _as_ratio(self.keep, total)
        if self.variant == "repo":
            found = official_centres(attention, ratio, adaptive=self.adaptive, plus=self.plus)
            found = found[found < total]
            return found[:room] if self.adaptive else found
        if not self.adaptive:
            top = _most_attended(attention, (room + 1) // 2 if self.plus else room)
            return torch.cat([top, _spread(others(top, total), room - len(top))])
        # Attention without outliers, as of a blank image, leaves the one token.
        top = _most_attended(attention, min(room, max(1, round(ratio * total))))
        if not self.plus:
            return top
        samples = torch.arange(0, total, max(1, total // len(top) // 3), device=top.device)
        return torch.cat([top, _spread(samples[~torch.isin(samples, top)], room - len(top))])


def outlier_ratio(attention: Tensor) -> float:
    """Share of the values float[...] above Q3 + 1.5 (Q3 - Q1), with linearly interpolated quartiles."""
    values = attention.detach().float().flatten()
    first, third = (float(q) for q in values.quantile(torch.tensor([0.25, 0.75], device=values.device)))
    return int((values > third + _IQR_FACTOR * (third - first)).sum()) / len(values)


def official_centres(attention: Tensor, ratio: float, *, adaptive: bool, plus: bool) -> Tensor:
    """int[C]: centres as the official code has them: int(N * ratio) by falling attention, then samples if `plus`.

    Samples assume 24 x 24 patches. With `adaptive` they start at 0, lie floor(floor(1 / ratio) / 3) apart and leave out
    the others; without, they start at half of floor(1 / ratio), lie that far apart, and may repeat the others.
    """
    total = len(attention)
    top = _most_attended(attention, int(total * ratio))
    if not plus:
        return top
    step = int(1 / max(ratio, 1 / total))
    start, apart = (0, max(1, step // 3)) if adaptive else (step // 2, step)
    samples = torch.arange(start, _OFFICIAL_END, apart, device=top.device)
    return torch.cat([top, samples[~torch.isin(samples, top)] if adaptive else samples])


def others(centres: Tensor, total: int, *, official: bool = False) -> Tensor:
    """int[R]: the patches below `total` that are no centres, ascending.

    Args:
        centres: int[C].
        total: N.
        official: leave out the lowest ones, as many as there are repeated centres: what the official code does.
    """
    mask = torch.ones(total, dtype=torch.bool, device=centres.device)
    mask[centres] = False
    rest = mask.nonzero()[:, 0]
    return rest[len(centres) + len(rest) - total :] if official else rest


def merge_neighbours(
    features: Tensor, attention: Tensor, keys: Tensor, centres: Tensor, rest: Tensor, neighbours: int = 32
) -> tuple[Tensor, Tensor]:
    """(float[C, D] centres with their neighbours added, float[D] the extra token).

    Args:
        features: float[N, D].
        attention: float[N], the weights of what is added.
        keys: float[N, d]; the most similar ones (cosine; ties: lower index) are a centre's neighbours, itself excluded.
        centres: int[C].
        rest: int[R], what the extra token sums up.
        neighbours: how many patches are added to each centre.
    """
    unit = normalize(keys.float(), dim=-1)
    count = min(neighbours, len(features) - 1)
    found = [centres.new_zeros(0, count)]
    for part in centres.split(256):
        similarity = (unit[part] @ unit.T).scatter(1, part[:, None], -torch.inf)
        found.append(similarity.argsort(dim=-1, descending=True, stable=True)[:, :count])
    source = torch.cat([*(close.flatten() for close in found), rest])
    slot = torch.arange(len(centres), device=rest.device).repeat_interleave(count)
    slot = torch.cat([slot, torch.full_like(rest, len(centres))])
    index = torch.cat([centres, centres.new_full((1,), -1)])
    merged = gather_merge(features[None], index[None], slot[None], attention[source][None], source[None])[0]
    return merged[:-1], merged[-1]


def _as_ratio(keep: int | float, total: int) -> float:
    return keep if isinstance(keep, float) else min(1.0, keep / total)


def _most_attended(attention: Tensor, count: int) -> Tensor:
    return attention.argsort(descending=True, stable=True)[:count]


def _spread(samples: Tensor, count: int) -> Tensor:
    """At most `count` of the samples, evenly spaced."""
    count = min(count, len(samples))
    return samples[torch.arange(count, device=samples.device) * len(samples) // max(1, count)]
