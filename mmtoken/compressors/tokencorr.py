"""TokenCorr: how much a document page is compressed follows from how alike its patches are, crop by crop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmtoken.compressors.base import Budget, Compressor, Context, Cost, Need, Positions, check_whole
from mmtoken.errors import MMTokenError, UnsupportedError
from mmtoken.kernels.gather_merge import gather_merge
from mmtoken.kernels.similarity_stats import similarity_stats
from mmtoken.tokens import VisualTokens, kept_count, refuse_nan

Heads = Literal["joint", "mean"]
Sampling = Literal["top", "multinomial"]
Aggregate = Literal["none", "nearest_mean", "prumerge32"]
Reading = Literal["auto", "patches", "outputs"]

NEAREST = 32
"""Neighbours that a token takes over under aggregate="prumerge32"."""
_LEAST_WEIGHT = 1e-12


@dataclass(frozen=True)
class TokenCorr(Compressor):
    """Token-level correlation-guided compression of the crops of a page.

    A patch is redundant when more than `tau_c` other patches of its crop have nearly the same key in a low tower block
    (cosine above `tau_s`); the share of patches that are not is the crop's information density. Kept are the patches
    that stand out in the attention of a deep block (above the third quartile by more than `factor` inter-quartile
    ranges), and density x N patches drawn by the attention of the low block. The kept ones take over the patches that
    are dropped (`aggregate`). The thumbnail of a page that is cut into crops stays whole; a picture that is not cut is
    compressed like a crop, and so is every frame of a video.

    `keep` is an upper bound, for the density decides: at most this share, or this many tokens, of each crop. Where a
    crop exceeds it, the patches that stand out go first, then the drawn ones in the order of drawing.

    No official code exists, and the paper's numbers for most settings were not available: the defaults below are ours,
    except that the method keeps what stands out, draws by density and aggregates. Towers without CLS: the attention
    that patches receive from all patches takes its place.

    Attributes:
        deep: tower block whose attention shows what stands out; None: the one whose output is projected.
        low: tower block of the keys and of the attention for drawing; None: at a quarter of the depth.
        tau_s: cosine above which two keys are near-duplicates.
        tau_c: near-duplicates above which a patch is redundant; None: a twentieth of the crop's patches, rounded.
        factor: inter-quartile ranges above the third quartile from which a patch stands out.
        sampling: "top" draws the most attended patches, "multinomial" draws without replacement by attention.
        seed: of "multinomial", together with the pixels: the same picture always gives the same draw.
        aggregate: "nearest_mean": each dropped patch goes to the kept one with the most similar key, which becomes the
            mean of its patches, weighted by deep attention; "prumerge32": each kept patch adds its 32 nearest patches
            times their deep attention, and one more token adds up all dropped ones; "none": nothing.
        n_min: fewest tokens kept of a crop, filled up by deep attention.
        heads: "joint": one dot product over all heads, as wide as the tower; "mean": attention of each head, averaged,
            and keys averaged over the heads.
        reading: "patches": among patches before the projector, where that maps them one by one; "outputs": among what
            the projector puts out, by keys and attention averaged over the patches that it groups; "auto": patches
            where that is possible.
    """

    keep: int | float = 1.0
    positions: Positions = "keep"
    deep: int | None = None
    low: int | None = None
    tau_s: float = 0.9
    tau_c: int | None = None
    factor: float = 1.5
    sampling: Sampling = "top"
    seed: int = 0
    aggregate: Aggregate = "nearest_mean"
    n_min: int = 1
    heads: Heads = "joint"
    reading: Reading = "auto"

    title: ClassVar[str] = "TokenCorr"
    paper: ClassVar[str] = (
        "Zhang et al., Token-level Correlation-guided Compression for Efficient Multimodal Document Understanding, "
        "2024, arXiv 2407.14439"
    )
    year: ClassVar[int] = 2024
    cost: ClassVar[Cost] = "pairs"
    needs: ClassVar[frozenset[Need]] = frozenset({"tower_attention", "tower_keys", "content_seed"})
    merges: ClassVar[bool] = True
    budget: ClassVar[Budget] = "adaptive"
    identity_at_full: ClassVar[bool | str] = "keep is an upper bound; the density of the crops decides"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("deep", "low", "tau_c"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), lowest=0)
        check_whole("seed", self.seed, lowest=0)
        check_whole("n_min", self.n_min, lowest=1)
        _check_number("tau_s", self.tau_s, -1.0, 1.0)
        _check_number("factor", self.factor, 0.0, math.inf)
        for name, choices in (
            ("sampling", Sampling),
            ("aggregate", Aggregate),
            ("heads", Heads),
            ("reading", Reading),
        ):
            known = get_args(choices)
            if getattr(self, name) not in known:
                raise MMTokenError(f"{name}={getattr(self, name)!r} is unknown; use one of {list(known)}.")

    def blocks(self, depth: int, blocks: int) -> tuple[int | None, int]:
        """(deep, low) tower blocks; deep is None where it is the one that is projected.

        Raises:
            UnsupportedError: the tower has no such block.
        """
        low = depth // 4 if self.low is None else self.low
        for name, block in (("deep", self.deep), ("low", low)):
            if block is not None and block >= blocks:
                raise UnsupportedError(
                    f"{name}={block} but this tower has {blocks} blocks; choose from 0 to {blocks - 1}."
                )
        return (None if self.deep == depth - 1 else self.deep), low

    def tower_layers(self, depth: int, blocks: int) -> tuple[int, ...]:
        deep, low = self.blocks(depth, blocks)
        return tuple(sorted({block for block in (deep, low) if block is not None and block != depth - 1}))

    def project(
        self, tokens: VisualTokens, default: Callable[[VisualTokens], VisualTokens], ctx: Context
    ) -> VisualTokens:
        if self.reading == "patches" and not ctx.tokenwise_projector:
            raise UnsupportedError(
                "reading='patches' needs a projector that maps patch by patch; this one merges or re-samples them: use "
                "'outputs' or 'auto'."
            )
        facts = _Facts(*self.read(tokens, ctx), cropped=ctx.cropped)
        if ctx.tokenwise_projector and self.reading != "outputs":
            return default(self._compress(tokens, facts))
        return self._compress(default(tokens), facts)

    def read(self, tokens: VisualTokens, ctx: Context) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Attention float[B, N] in the deep and the low block, keys float[B, N, d] of the low one, seeds per item."""
        joint = self.heads == "joint"
        deep, low = self.blocks(ctx.depth, ctx.blocks or ctx.depth)
        last = low if low != ctx.depth - 1 else None
        return (
            ctx.tower_attention(tokens, deep, joint=joint),
            ctx.tower_attention(tokens, last, joint=joint),
            ctx.tower_keys(tokens, last, joint=joint),
            ctx.content_seed(tokens),
        )

    def choose(self, deep: Tensor, low: Tensor, keys: Tensor, seed: int) -> Tensor:
        """int[K], ascending: what is kept of one crop by these settings; arguments as for `select`."""
        most = kept_count(self.keep, len(deep))
        if self._extra(most) and most < len(deep):
            most -= 1
        return select(
            deep,
            low,
            keys,
            tau_s=self.tau_s,
            tau_c=self.tau_c,
            factor=self.factor,
            n_min=self.n_min,
            most=most,
            seed=seed if self.sampling == "multinomial" else None,
        )

    def crop_seed(self, seed: int, number: int) -> int:
        """The seed of the draw from crop `number` of an item whose pixels give `seed`."""
        return (seed + 0x9E3779B97F4A7C15 * (number + 1) + self.seed) % 2**63

    def _extra(self, most: int) -> bool:
        """Whether there is a token for all dropped ones, which counts; of one token in all, a kept one is more use."""
        return self.aggregate == "prumerge32" and most > 1

    def _compress(self, tokens: VisualTokens, facts: _Facts) -> VisualTokens:
        for name, values in (("deep attention", facts.deep), ("low attention", facts.low), ("keys", facts.keys)):
            refuse_nan(values, tokens.eligible, name)
        features, size = tokens.features.clone(), tokens.size.clone()
        kept = tokens.protected & tokens.valid
        for row in range(len(tokens)):
            part = tokens.item[row].masked_fill(~tokens.eligible[row], -1)
            for number in part.unique().tolist():
                if number < 0:
                    continue
                where = (part == number).nonzero()[:, 0]
                if number == 0 and facts.cropped is not None and facts.cropped[row]:
                    kept[row, where] = True
                    continue
                seed = self.crop_seed(facts.seeds[row], number)
                self._crop(row, where, seed, facts, features, size, kept)
        return tokens.replace(features=features, size=size).where(kept)

    def _crop(
        self, row: int, where: Tensor, seed: int, facts: _Facts, features: Tensor, size: Tensor, kept: Tensor
    ) -> None:
        """Compress one crop: the tokens at `where` int[N] of a row; changes the last three."""
        deep, low, keys = (values[row, where].float() for values in (facts.deep, facts.low, facts.keys))
        chosen = self.choose(deep, low, keys, seed)
        if self.aggregate == "none":
            kept[row, where[chosen]] = True
            return
        given = (features[row, where], size[row, where], deep, keys, chosen)
        index, merged, stands_for = (
            nearest_mean(*given)
            if self.aggregate == "nearest_mean"
            else prumerge32(*given, extra=self._extra(kept_count(self.keep, len(where))))
        )
        kept[row, where[index]] = True
        features[row, where[index]] = merged.to(features.dtype)
        size[row, where[index]] = stands_for.to(size.dtype)


@dataclass(frozen=True)
class _Facts:
    """What is read from the tower, float[B, N] or float[B, N, d]; seeds and whether the picture is cut, per item."""

    deep: Tensor
    low: Tensor
    keys: Tensor
    seeds: list[int]
    cropped: list[bool] | None


def near_duplicates(keys: Tensor, tau_s: float) -> Tensor:
    """int[N]: how many other patches have a key with cosine above `tau_s`, from keys float[N, d]; at 1 none has."""
    return similarity_stats(keys.detach()[None], threshold=tau_s).above[0]


def density(keys: Tensor, tau_s: float, tau_c: int | None = None) -> float:
    """Share of patches with at most `tau_c` near-duplicates (None: N / 20, rounded), from keys float[N, d], N > 0."""
    limit = math.floor(0.05 * len(keys) + 0.5) if tau_c is None else tau_c
    return 1 - int((near_duplicates(keys, tau_s) > limit).sum()) / len(keys)


def outliers(attention: Tensor, factor: float) -> Tensor:
    """bool[N]: attention float[N] above the third quartile by more than `factor` inter-quartile ranges.

    Quartiles are interpolated linearly; without any spread nothing stands out.
    """
    low, high = torch.quantile(attention.double(), attention.new_tensor([0.25, 0.75], dtype=torch.double))
    bound: Tensor = high + factor * (high - low)
    return attention.double() > bound


def drawing_order(attention: Tensor, seed: int | None) -> Tensor:
    """int[N]: patches in the order in which they are drawn without replacement, the most attended first.

    Args:
        attention: float[N], not negative.
        seed: None: in order of attention, ties to the lower index; else by attention as probability (Gumbel top-k),
            with uniform numbers from this seed.
    """
    scores = attention.double()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(len(scores), generator=generator, dtype=torch.double).clamp(min=1e-300)
        scores = (scores / scores.sum()).log() - (-uniform.log()).log().to(scores.device)
    return torch.argsort(scores, descending=True, stable=True)


def select(
    deep: Tensor,
    low: Tensor,
    keys: Tensor,
    *,
    tau_s: float,
    tau_c: int | None,
    factor: float,
    n_min: int,
    most: int,
    seed: int | None,
) -> Tensor:
    """int[K], ascending: what is kept of one crop.

    Args:
        deep, low: float[N] attention in the deep and the low block.
        keys: float[N, d] of the low block.
        tau_s, tau_c, factor, n_min: see `TokenCorr`.
        most: upper bound of K.
        seed: of the drawing; None: the most attended.
    """
    count = len(deep)
    drawn = math.floor(density(keys, tau_s, tau_c) * count + 0.5)
    standing_out = outliers(deep, factor)
    by_deep = torch.argsort(deep, descending=True, stable=True)
    by_draw = drawing_order(low, seed)
    kept = standing_out.clone()
    kept[by_draw[:drawn]] = True
    least = min(n_min, most, count)
    if int(kept.sum()) < least:
        rest = by_deep[~kept[by_deep]]
        kept[rest[: least - int(kept.sum())]] = True
    elif int(kept.sum()) > most:
        ranked = torch.cat([by_deep[standing_out[by_deep]], by_draw[~standing_out[by_draw]]])
        kept = torch.zeros_like(kept)
        kept[ranked[:most]] = True
    return kept.nonzero()[:, 0]


def nearest(keys: Tensor, among: Tensor, of: Tensor) -> Tensor:
    """int[M]: for each patch of `of` int[M] the place in `among` int[K] of the key with the highest cosine.

    Ties go to the lower place.
    """
    keys = keys.detach()
    return similarity_stats(keys[of][None], keys[among][None]).argmax[0]


def nearest_mean(
    features: Tensor, size: Tensor, attention: Tensor, keys: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Each dropped patch goes to the kept one with the most similar key, which becomes the weighted mean of both.

    Args:
        features: float[N, D].
        size: float[N], tokens that each stands for.
        attention: float[N], weights; at least 1e-12 counts.
        keys: float[N, d].
        kept: int[K], ascending.

    Returns:
        (`kept`, float[K, D], float[K] sizes); a token to which nothing goes stays the same to the bit.
    """
    gone = torch.ones(len(features), dtype=torch.bool, device=features.device)
    gone[kept] = False
    dropped = gone.nonzero()[:, 0]
    if not len(dropped):
        return kept, features[kept], size[kept]
    owner = nearest(keys, kept, dropped)
    weight = attention.float().clamp(min=_LEAST_WEIGHT)
    own = weight[kept]
    mass = own.index_add(0, owner, weight[dropped])
    shares = (weight[dropped] / mass[owner], own / mass)
    merged = gather_merge(features[None], kept[None], owner[None], shares[0][None], dropped[None], shares[1][None])
    return kept, merged[0], size[kept].index_add(0, owner, size[dropped])


def prumerge32(
    features: Tensor,
    size: Tensor,
    attention: Tensor,
    keys: Tensor,
    kept: Tensor,
    chunk: int = 256,
    *,
    extra: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each kept patch adds its 32 nearest other patches times their attention; one more token adds up the dropped ones.

    The weights are not normalised. The extra token stands where the most attended dropped patch was and for all of
    them; the neighbours of kept tokens may be kept themselves and overlap, so those stand for themselves only.

    Args:
        features, size, attention, keys, kept: as for `nearest_mean`.
        chunk: kept patches compared at a time.
        extra: whether there is the token for the dropped ones.

    Returns:
        (int[K + 1] ascending, float[K + 1, D], float[K + 1] sizes); K without dropped patches.
    """
    unit = normalize(keys.float(), dim=-1)
    neighbours = min(NEAREST, len(features) - 1)
    found = [kept.new_zeros(0, neighbours)]
    for part in kept.split(chunk):
        alike = unit[part] @ unit.T
        alike[torch.arange(len(part), device=part.device), part] = -math.inf
        found.append(torch.argsort(alike, dim=-1, descending=True, stable=True)[:, :neighbours])
    gone = torch.ones(len(features), dtype=torch.bool, device=features.device)
    gone[kept] = False
    dropped = gone.nonzero()[:, 0]
    if not extra:
        dropped = dropped[:0]
    source = torch.cat([*(close.flatten() for close in found), dropped])
    slots = torch.arange(len(kept), device=kept.device).repeat_interleave(neighbours)
    slot = torch.cat([slots, torch.full_like(dropped, len(kept))])
    index, start, sizes = kept, kept, size[kept]
    if len(dropped):
        place = dropped[attention[dropped].argmax()]
        index, order = torch.cat([kept, place[None]]).sort()
        start = torch.cat([kept, torch.full_like(place[None], -1)])
        sizes = torch.cat([sizes, size[dropped].sum()[None]])[order]
    merged = gather_merge(features[None], start[None], slot[None], attention[source][None], source[None])[0]
    return index, merged[order] if len(dropped) else merged, sizes


def _check_number(field: str, value: object, lowest: float, highest: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and lowest <= value <= highest):  # type: ignore[arg-type,operator]
        raise MMTokenError(f"{field}={value!r} is out of range; give a number from {lowest} to {highest}.")
