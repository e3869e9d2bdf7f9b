"""VidCom2: frames that are unlike the rest of a video get more of its budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmtoken.compressors.base import Budget, Compressor, Context, Positions, check_whole
from mmtoken.compressors.stcpruner import kernel, lowest, quiet_channels
from mmtoken.errors import InputError, MMTokenError
from mmtoken.tokens import VisualTokens, frame_places, refuse_nan

TEMPERATURE = 0.01
"""Of the softmax over frames."""


@dataclass(frozen=True)
class VidCom2(Compressor):
    """Video Compression Commander: a budget per frame by its uniqueness, then the least typical tokens of each frame.

    On the half of the channels that vary least over the video, every unit token is compared with the mean of all tokens
    and with that of its frame, by a sum of Gaussian kernels. Frames whose tokens are far from the video's mean get a
    larger share; in a frame the tokens that are far from both means stay. Needs the whole video. Images are videos of
    one frame.

    With exact=True the counts of the frames, which are rounded, are corrected to the budget of the whole video: of too
    many the most typical ones go, of too few the least typical ones come back, whatever their frame, so that a frame
    may end with none (`floor` prevents that). This is the correction of vLLM's implementation with the library's own
    rounding. exact=False is the official code.

    Attributes:
        channel_ratio: share of channels that are looked at.
        exact: whether the budget of the video is met exactly.
        floor: tokens that the correction leaves of every frame, as far as the budget reaches; 0 in vLLM.
    """

    keep: int | float = 0.25
    positions: Positions = "renumber"
    channel_ratio: float = 0.5
    exact: bool = True
    floor: int = 0

    title: ClassVar[str] = "VidCom2"
    paper: ClassVar[str] = (
        "Liu et al., Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language "
        "Models, EMNLP 2025, arXiv 2505.14454"
    )
    year: ClassVar[int] = 2025
    causal: ClassVar[bool] = False
    budget: ClassVar[Budget] = "adaptive"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.channel_ratio, float) or not 0 < self.channel_ratio <= 1:
            raise MMTokenError(f"channel_ratio={self.channel_ratio!r} is no such share; give a float in (0, 1].")
        if not isinstance(self.exact, bool):
            raise MMTokenError(f"exact={self.exact!r} is a {type(self.exact).__name__}; give True or False.")
        check_whole("floor", self.floor, lowest=0)

    def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        features = tokens.features.detach().float()
        refuse_nan(features - features, tokens.eligible, "features")  # infinities become NaN
        mask = tokens.protected.clone()
        for row, budget in enumerate(tokens.budget(self.keep)):
            frames = frame_places(tokens, row)
            if not frames:
                continue
            total = sum(map(len, frames))
            ratio = self.keep if isinstance(self.keep, float) else min(1.0, self.keep * len(frames) / total)
            chosen = unique_tokens(
                [features[row, places] for places in frames],
                ratio,
                channel_ratio=self.channel_ratio,
                exact=budget if self.exact else None,
                floor=self.floor,
            )
            mask[row, torch.cat(frames)[chosen]] = True
        return tokens.where(mask)


def unique_tokens(
    frames: Sequence[Tensor], ratio: float, *, channel_ratio: float = 0.5, exact: int | None = None, floor: int = 0
) -> Tensor:
    """int[K], ascending: what stays of a video, counted over all its frames.

    Args:
        frames: float[P, D] each.
        ratio: base share of each frame that stays; from 1 on all tokens do, though the formula leaves typical frames
            fewer.
        channel_ratio: share of channels that are looked at.
        exact: tokens that stay altogether; None: as many as the frames' own shares give.
        floor: tokens that the correction to `exact` leaves of every frame, as far as `exact` reaches.

    Raises:
        InputError: there is no frame, or a frame has no token.
    """
    if not frames or any(not len(frame) for frame in frames):
        raise InputError(f"frames has {[len(frame) for frame in frames]} tokens; give at least one frame and token.")
    tokens = torch.cat([frame.detach().float() for frame in frames])
    if ratio >= 1:
        return torch.arange(len(tokens), device=tokens.device)
    tokens = normalize(tokens[:, quiet_channels(tokens, channel_ratio)], dim=-1)
    parts = tokens.split([len(frame) for frame in frames])
    to_video = kernel((tokens - tokens.mean(0)).square().sum(-1)).split([len(frame) for frame in frames])
    typical = [
        video + kernel((part - part.mean(0)).square().sum(-1)) for part, video in zip(parts, to_video, strict=True)
    ]
    share = torch.softmax(torch.stack([-video.mean() for video in to_video]) / TEMPERATURE, 0)
    shares = (ratio * (1 + share - share.mean())).clamp(max=1).tolist()
    # round() goes to the even neighbour, as the official code does.
    counts = [max(1, round(part * len(frame))) for part, frame in zip(shares, frames, strict=True)]
    chosen, first = [], 0
    for scores, count in zip(typical, counts, strict=True):
        chosen.append(first + lowest(scores, count))
        first += len(scores)
    index = torch.cat(chosen)
    return index if exact is None else corrected(index, typical, exact, floor)


def corrected(index: Tensor, typical: Sequence[Tensor], total: int, floor: int) -> Tensor:
    """int[total], ascending: `index` with the most typical tokens taken out, or the least typical of the others added.

    Args:
        index: int[K], what the frames chose.
        typical: per frame float[P].
        total: how many there shall be.
        floor: tokens that stay of every frame, the least typical ones, as far as `total` reaches.
    """
    scores = torch.cat(list(typical))
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[index] = True
    # Whom the floor protects goes last, who is chosen comes before who is not, and then the least typical come first.
    rank = torch.where(chosen, 1, 0)
    floor = min(floor, total // len(typical))
    first = 0
    for frame in typical:
        rank[first + lowest(frame, floor)] = 2
        first += len(frame)
    order = (-scores).argsort(descending=True, stable=True)
    order = order[rank[order].argsort(descending=True, stable=True)]
    return order[:total].sort().values
