"""VisionZip: keep the patches that the tower attends to, merge the rest into a few contextual tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmtoken.compressors.base import Compressor, Context, Need, Parity, Positions, check_whole
from mmtoken.errors import MMTokenError
from mmtoken.kernels.gather_merge import gather_merge
from mmtoken.kernels.similarity_stats import similarity_stats
from mmtoken.tokens import VisualTokens, top_mask


@dataclass(frozen=True)
class VisionZip(Compressor):
    """Dominant and contextual tokens, chosen in the tower's feature block before the projector.

    Dominant tokens receive most attention from CLS (from all patches where the tower has no CLS). Of the remaining
    ones, regularly spaced anchors become contextual tokens: every other remaining token is assigned to the anchor with
    the most similar key (cosine of head-averaged keys), and an anchor adds the mean of its members to itself; an
    anchor without members stays as it is. Of 64 tokens 54 are dominant and 10 contextual, as in the paper.

    Where the projector merges or re-samples patches (2x2 mergers, pixel shuffle, any-resolution), tokens are selected
    and merged behind it, with attention and keys averaged the same way.

    Differs from the official code in the default: no CLS token, each at its original position. variant="repo" puts the
    CLS feature first, counted in `keep` and placed at the lowest position that no other kept token uses (so keep=1.0
    then replaces one patch by CLS and is not the plain model).

    Attributes:
        contextual: number of contextual tokens; None: 10/64 of the budget.
        variant: "repo" adds CLS.
    """

    keep: int | float = 64
    positions: Positions = "keep"
    contextual: int | None = None
    variant: Literal["paper", "repo"] = "paper"

    title: ClassVar[str] = "VisionZip"
    paper: ClassVar[str] = (
        "Yang et al., VisionZip: Longer is Better but Not Necessary in Vision Language Models, CVPR 2025, "
        "arXiv 2412.04467"
    )
    year: ClassVar[int] = 2025
    parity: ClassVar[Parity] = "official code"
    needs: ClassVar[frozenset[Need]] = frozenset({"tower_attention", "tower_keys"})
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("paper", "repo"):
            raise MMTokenError(f"variant={self.variant!r} is unknown; use 'paper' or 'repo'.")
        if self.contextual is not None:
            check_whole("contextual", self.contextual, lowest=0)

    def project(
        self, tokens: VisualTokens, default: Callable[[VisualTokens], VisualTokens], ctx: Context
    ) -> VisualTokens:
        attention, keys = ctx.tower_attention(tokens), ctx.tower_keys(tokens)
        if not ctx.tokenwise_projector:
            return self._zip(default(tokens), attention, keys, None)
        cls = ctx.tower_cls(tokens) if self.variant == "repo" else None
        return default(self._zip(tokens, attention, keys, cls))

    def split(self, budget: int, cls: bool) -> tuple[int, int]:
        """(dominant, contextual) tokens of a budget, CLS taken off."""
        left = budget - int(cls)
        wanted = math.floor(budget * 10 / 64 + 0.5) if self.contextual is None else self.contextual
        contextual = max(0, min(wanted, left - 1))
        return left - contextual, contextual

    def _zip(self, tokens: VisualTokens, attention: Tensor, keys: Tensor, cls: Tensor | None) -> VisualTokens:
        splits = [self.split(budget, cls is not None) for budget in tokens.budget(self.keep)]
        dominant = top_mask(attention, [d for d, _ in splits], tokens.eligible)
        rows = []
        for row, (_, contextual) in enumerate(splits):
            first = dominant[row].nonzero()[:, 0]
            rest = (tokens.eligible[row] & ~dominant[row]).nonzero()[:, 0]
            anchors, members, owner = assign_to_anchors(keys[row, rest], contextual)
            merged, size = merge_into_anchors(
                tokens.features[row, rest], tokens.size[row, rest], anchors, members, owner
            )
            protected = tokens.protected[row].nonzero()[:, 0]
            index = torch.cat([first, rest[anchors], protected])
            features = torch.cat([tokens.features[row, first], merged, tokens.features[row, protected]])
            sizes = torch.cat([tokens.size[row, first], size, tokens.size[row, protected]])
            rows.append((features, tokens.source[row, index], sizes, index))
        return _stack(tokens, rows, cls)


def assign_to_anchors(keys: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Regularly spaced anchors among R tokens, and the most similar anchor of every other one.

    Args:
        keys: float[R, d].
        count: number of anchors.

    Returns:
        (int[A] anchors, int[R - A] members, int[R - A] which anchor owns each member); ties go to the lower anchor.
    """
    remaining = len(keys)
    count = min(count, remaining)
    if not count:
        nothing = torch.zeros(0, dtype=torch.long, device=keys.device)
        return nothing, nothing, nothing
    anchors = torch.arange(count, device=keys.device) * (remaining // count)
    others = torch.ones(remaining, dtype=torch.bool, device=keys.device)
    others[anchors] = False
    members = others.nonzero()[:, 0]
    keys = keys.detach()
    return anchors, members, similarity_stats(keys[members][None], keys[anchors][None]).argmax[0]


def merge_into_anchors(
    features: Tensor, size: Tensor, anchors: Tensor, members: Tensor, owner: Tensor
) -> tuple[Tensor, Tensor]:
    """(float[A, D]: anchor + mean of its members, float[A]: tokens it stands for); see `assign_to_anchors`."""
    share = 1.0 / owner.bincount(minlength=len(anchors))[owner]
    merged = gather_merge(features[None], anchors[None], owner[None], share[None], members[None])
    return merged[0], size[anchors].index_add(0, owner, size[members])


def _stack(tokens: VisualTokens, rows: list[tuple[Tensor, Tensor, Tensor, Tensor]], cls: Tensor | None) -> VisualTokens:
    """Rows of (features, source, size, index into `tokens`) as one batch, CLS in front if given."""
    pad = torch.nn.utils.rnn.pad_sequence
    device = tokens.features.device
    lengths = torch.tensor([len(source) for _, source, _, _ in rows], device=device)
    index = pad([index for *_, index in rows], batch_first=True)
    made = VisualTokens(
        features=pad([features for features, *_ in rows], batch_first=True),
        source=pad([source for _, source, _, _ in rows], batch_first=True),
        size=pad([size for _, _, size, _ in rows], batch_first=True),
        valid=torch.arange(index.shape[1], device=device) < lengths[:, None],
        protected=tokens.protected.gather(1, index),
        item=tokens.item.gather(1, index),
        grid=tokens.grid,
    )
    if cls is None:
        return made
    # Padding points at position 0 and must not take it back, so uses are counted.
    used = torch.zeros_like(tokens.source).scatter_add(1, made.source, made.valid.long())
    slot = (used == 0).long().argmax(-1, keepdim=True)

    def in_front(value: Tensor, first: Tensor) -> Tensor:
        return torch.cat([first.to(value.dtype), value], 1)

    ones = torch.ones_like(slot)
    return VisualTokens(
        features=in_front(made.features, cls[:, None]),
        source=in_front(made.source, slot),
        size=in_front(made.size, ones),
        valid=in_front(made.valid, ones),
        protected=in_front(made.protected, torch.zeros_like(slot)),
        item=in_front(made.item, torch.zeros_like(slot)),
        grid=made.grid,
    )
