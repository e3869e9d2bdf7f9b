"""EVS: of every frame after the first, keep the places that changed most since the frame before."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mmtoken.compressors.base import Budget, Compressor, Context, Positions
from mmtoken.errors import InputError
from mmtoken.tokens import VisualTokens, kept_count, refuse_nan

ALWAYS = 255.0
"""The change of a first frame's tokens, above any that is measured."""


@dataclass(frozen=True)
class EVS(Compressor):
    """Efficient Video Sampling: tokens that equal their neighbour in time are left out.

    Every token is compared with the one at the same place of the frame before, whether that one stays or not; the
    tokens of the whole video that changed most stay, the first frame always whole. A frame may end with none. Needs the
    whole video. Images have one frame and pass unchanged, whatever `keep` is.

    `keep` is a share of the video (the pruning rate is 1 - keep), at least its first frame; the serving engines that
    have it leave it off by default, so 0.25 is ours. The paper compares pixels; here projected tokens are compared, as
    in vLLM and SGLang. Positions stay.
    """

    keep: int | float = 0.25
    positions: Positions = "keep"

    title: ClassVar[str] = "EVS"
    paper: ClassVar[str] = (
        "Bagrov et al., Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference, 2025, "
        "arXiv 2510.14624"
    )
    year: ClassVar[int] = 2025
    causal: ClassVar[bool] = False
    budget: ClassVar[Budget] = "adaptive"

    def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        features = tokens.features.detach().float()
        refuse_nan(features - features, tokens.eligible, "features")  # infinities become NaN
        mask = tokens.valid.clone()
        for row, (total, grid) in enumerate(zip(tokens.counts(), tokens.grid, strict=True)):
            if grid is None or grid[0] == 1:
                continue
            if math.prod(grid) != total:
                raise InputError(
                    f"grid={grid} of item {row} has {math.prod(grid)} tokens but {total} came; EVS compares whole "
                    "frames: use it before methods that drop tokens."
                )
            places = tokens.eligible[row].nonzero()[:, 0]
            frames = features[row, places].view(grid[0], -1, features.shape[-1])
            mask[row, places] = False
            mask[row, places[moved_tokens(frames, self.keep)]] = True
        return tokens.where(mask)


def moved_tokens(frames: Tensor, keep: int | float) -> Tensor:
    """int[K], ascending: what stays of a video, frame * P + place.

    Args:
        frames: float[F, P, D].
        keep: share of the video, or tokens per frame on average.
    """
    number, area = frames.shape[:2]
    count = max(area, kept_count(keep, number * area, number))
    return change(frames).flatten().argsort(descending=True, stable=True)[:count].sort().values


def change(frames: Tensor) -> Tensor:
    """float32[F, P]: 1 - cosine of each token of float[F, P, D] and that before it; `ALWAYS` in the first frame."""
    frames = frames.float()
    moved = 1 - cosine_similarity(frames[1:], frames[:-1], dim=-1)
    return torch.cat([moved.new_full((1, frames.shape[1]), ALWAYS), moved])
