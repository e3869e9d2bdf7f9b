"""Visual tokens and the arithmetic of `keep`: the vocabulary that every other part of mmtoken shares.

Shape letters: B items (one image or one video each), N visual tokens of an item, K kept tokens, D width.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmtoken.errors import InputError, KeepError

Grid = tuple[int, int, int]
"""(frames, rows, columns) of an item's visual tokens as the language model reads them."""


def check_keep(keep: object, field: str = "keep") -> int | float:
    """Return `keep` if it is a fraction in (0, 1] (float) or a positive count (int).

    Raises:
        KeepError: for bool, 0, negative, NaN, infinite, a float above 1, or another type.
    """
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise KeepError(
            f"{field}={keep!r} is a {type(keep).__name__}; give a fraction in (0, 1] as a float (0.25) or a count of "
            "tokens as an int (64)."
        )
    if isinstance(keep, float) and not math.isfinite(keep):
        raise KeepError(f"{field}={keep!r} is not finite; give a fraction in (0, 1] or a positive int.")
    if keep <= 0:
        raise KeepError(f"{field}={keep!r} keeps nothing; give a fraction in (0, 1] or an int of at least 1.")
    if isinstance(keep, float) and keep > 1:
        raise KeepError(
            f"{field}={keep!r} is a float above 1; a fraction goes up to 1.0, a count of tokens is an int "
            f"({field}={int(keep)})."
        )
    return keep


def kept_count(keep: int | float, total: int, steps: int = 1) -> int:
    """How many of `total` visual tokens of an item `keep` keeps: the one place where budgets are rounded.

    Args:
        keep: a fraction of `total`, or a count per temporal grid step.
        total: N, the item's tokens that may be dropped.
        steps: temporal grid steps of the item (1 for an image); an int `keep` is pooled over them.

    Returns:
        min(N, max(1, floor(keep * N + 0.5))) for a fraction, min(N, keep * steps) for a count; 0 when N is 0.
    """
    if total == 0:
        return 0
    wanted = math.floor(keep * total + 0.5) if isinstance(keep, float) else keep * steps
    return min(total, max(1, wanted))


def refuse_nan(values: Tensor, eligible: Tensor, name: str) -> None:
    """Fail if a value of an eligible token is NaN.

    Args:
        values: float[B, N] or float[B, N, D].
        eligible: bool[B, N].
        name: what the values are, for the message.

    Raises:
        InputError: one is.
    """
    found = values.isnan() if values.ndim == 2 else values.isnan().any(-1)
    found = found & eligible
    if bool(found.any()):
        row = int(found.any(-1).long().argmax())
        raise InputError(
            f"{name} contains NaN for item {row}; every token needs numbers. Check the pixels and the weights for NaN "
            "or infinities (in float16, try bfloat16)."
        )


@dataclass(frozen=True)
class VisualTokens:
    """Visual tokens of B items with everything that must travel with them.

    Rows are items (an image or a whole video), padded to the longest one; `valid` is False on padding.

    Attributes:
        features: float[B, N, D].
        source: int[B, N], the original position of each token in its item (0 .. N_original - 1), unique in a row.
        size: float[B, N], how many original tokens it stands for (1 until something is merged).
        valid: bool[B, N].
        protected: bool[B, N], separators such as newline tokens: never dropped, never counted.
        item: int[B, N], the part of the item that the token comes from: the temporal grid step (frame) of a video; the
            crop of a picture that is cut (1, 2, ...), 0 for its thumbnail and for pictures that are not cut.
        grid: per row (frames, rows, columns) of the original tokens, or None where they are not on a grid.
    """

    features: Tensor
    source: Tensor
    size: Tensor
    valid: Tensor
    protected: Tensor
    item: Tensor
    grid: tuple[Grid | None, ...]

    @classmethod
    def from_features(
        cls,
        features: Tensor,
        *,
        valid: Tensor | None = None,
        protected: Tensor | None = None,
        grid: tuple[Grid | None, ...] | None = None,
    ) -> VisualTokens:
        """Tokens in original order: features float[B, N, D], everything else at its initial value."""
        if features.ndim != 3:
            raise InputError(f"features has shape {tuple(features.shape)}; expected [items, tokens, width].")
        rows, length = features.shape[:2]
        grids = grid if grid is not None else (None,) * rows
        ones = torch.ones(rows, length, dtype=torch.bool, device=features.device)
        source = torch.arange(length, device=features.device).expand(rows, -1)
        protected = ~ones if protected is None else protected
        item = torch.zeros_like(source)
        for row, shape in enumerate(grids):
            if shape is not None and shape[0] > 1:
                step = (~protected[row]).long().cumsum(-1) - 1
                item[row] = (step.clamp(min=0) // (shape[1] * shape[2])).clamp(max=shape[0] - 1)
        return cls(
            features=features,
            source=source.contiguous(),
            size=torch.ones(rows, length, device=features.device),
            valid=ones if valid is None else valid,
            protected=protected,
            item=item,
            grid=grids,
        )

    def __len__(self) -> int:
        return self.features.shape[0]

    @functools.cached_property
    def eligible(self) -> Tensor:
        """bool[B, N]: tokens that may be dropped and that `keep` counts."""
        return self.valid & ~self.protected

    @property
    def steps(self) -> tuple[int, ...]:
        """Temporal grid steps per item."""
        return tuple(1 if grid is None else grid[0] for grid in self.grid)

    def counts(self) -> list[int]:
        """Eligible tokens per item (one device synchronisation, the first time)."""
        return list(self._counts)

    @functools.cached_property
    def _counts(self) -> list[int]:
        return [int(n) for n in self.eligible.sum(-1).tolist()]

    def kept(self) -> list[Tensor]:
        """Per item, int[K]: `source` of its eligible tokens."""
        return list(self._kept)

    @functools.cached_property
    def _kept(self) -> list[Tensor]:
        return self.per_item(self.source)

    def per_item(self, values: Tensor) -> list[Tensor]:
        """`values` [B, N, ...] of the eligible tokens, one tensor per item."""
        return [row[where] for row, where in zip(values, self.eligible, strict=True)]

    def budget(self, keep: int | float) -> list[int]:
        """Tokens to keep per item under `keep`, by `kept_count`."""
        return [kept_count(keep, total, steps) for total, steps in zip(self.counts(), self.steps, strict=True)]

    def row(self, number: int) -> VisualTokens:
        """Item `number` by itself, a batch of one."""
        one = slice(number, number + 1)
        return VisualTokens(
            features=self.features[one],
            source=self.source[one],
            size=self.size[one],
            valid=self.valid[one],
            protected=self.protected[one],
            item=self.item[one],
            grid=self.grid[one],
        )

    def take(self, index: Tensor, valid: Tensor | None = None) -> VisualTokens:
        """The tokens at `index` int[B, K]; `valid` bool[B, K] marks which of them are real (default: theirs)."""
        if index.ndim != 2 or index.shape[0] != self.features.shape[0]:
            raise InputError(f"index has shape {tuple(index.shape)}; expected [{self.features.shape[0]}, kept].")
        picked = self.valid.gather(1, index)
        return replace(
            self,
            features=pick_rows(self.features, index),
            source=self.source.gather(1, index),
            size=self.size.gather(1, index),
            valid=picked if valid is None else picked & valid,
            protected=self.protected.gather(1, index),
            item=self.item.gather(1, index),
        )

    def where(self, mask: Tensor) -> VisualTokens:
        """The tokens for which `mask` bool[B, N] holds, order kept, shorter rows padded on the right."""
        mask = mask & self.valid
        counts = mask.sum(-1)
        longest = int(counts.max()) if len(self) else 0
        index = torch.argsort((~mask).to(torch.uint8), dim=-1, stable=True)[:, :longest]
        return self.take(index, torch.arange(longest, device=mask.device) < counts[:, None])

    def top(self, scores: Tensor, keep: int | float | list[int]) -> VisualTokens:
        """Keep the best-scored eligible tokens of every item, and all protected ones, in original order.

        Args:
            scores: float[B, N]; ties go to the lower index.
            keep: a budget as in `kept_count`, or counts per item.

        Raises:
            InputError: a score of an eligible token is NaN.
        """
        counts = keep if isinstance(keep, list) else self.budget(keep)
        return self.where(top_mask(scores, counts, self.eligible) | self.protected)

    def replace(self, **changes: Tensor) -> VisualTokens:
        """A copy with some fields replaced (features after merging, sizes, ...)."""
        return replace(self, **changes)  # type: ignore[arg-type]


def grid_places(tokens: VisualTokens) -> Tensor:
    """int[B, N]: the place of each token among the original ones, separators not counted; theirs have no meaning."""
    if not tokens.source.numel():
        return tokens.source
    flags = torch.zeros(len(tokens), int(tokens.source.max()) + 1, dtype=torch.long, device=tokens.source.device)
    before = flags.scatter_add(1, tokens.source, (tokens.protected & tokens.valid).long()).cumsum(-1)
    return tokens.source - before.gather(1, tokens.source)


def frame_places(tokens: VisualTokens, row: int) -> list[Tensor]:
    """Per frame of item `row`, int[n]: where its eligible tokens are; frames of which nothing is left are passed over.

    Images, and items that are no grid, count as one frame.
    """
    grid = tokens.grid[row]
    places = tokens.eligible[row].nonzero()[:, 0]
    if grid is None or grid[0] == 1:
        return [places] if len(places) else []
    frames = tokens.item[row, places]
    counts = torch.bincount(frames, minlength=grid[0]).tolist()
    ordered = places[frames.argsort(stable=True)]
    return [part for part in ordered.split(counts) if len(part)]


def pick_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """tensor[b, index[b]]: [B, L, ...] and int[B, n] give [B, n, ...]; indices out of range raise."""
    if len(index) == 1:
        # The same as below, but it copies whole rows: ten times as fast on a CPU, for the most common batch.
        return tensor.index_select(1, index[0])
    return tensor.gather(1, index.view(*index.shape, *(1,) * (tensor.ndim - 2)).expand(*index.shape, *tensor.shape[2:]))


def top_mask(scores: Tensor, counts: list[int], eligible: Tensor) -> Tensor:
    """bool[B, N]: the `counts[b]` highest of the eligible scores float[B, N] per row; ties go to the lower index.

    Raises:
        InputError: the shapes differ, or an eligible score is NaN.
    """
    if scores.shape != eligible.shape:
        raise InputError(f"scores has shape {tuple(scores.shape)}; expected {tuple(eligible.shape)} (items, tokens).")
    scores = scores.detach().float()
    refuse_nan(scores, eligible, "scores")
    order = torch.argsort(scores.masked_fill(~eligible, -math.inf), dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    limit = torch.tensor(counts, device=rank.device)[:, None]
    return (rank < limit) & eligible
