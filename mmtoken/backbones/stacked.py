"""Families whose videos come as one tensor, all of the same number of frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmtoken.backbones.base import Backbone
from mmtoken.errors import UnsupportedError


def stacked_videos(call: Mapping[str, Any]) -> Tensor:
    """float[videos, frames, 3, H, W]: the pixels of a `get_video_features` call that stacks its videos."""
    # transformers 5.17 names the argument `pixel_values`.
    pixels = call.get("pixel_values_videos")
    videos: Tensor = call["pixel_values"] if pixels is None else pixels
    return videos


class StackedVideos(Backbone):
    """The part of an adapter that reads stacked videos."""

    def pictures(self, call: Mapping[str, Any]) -> list[Tensor]:
        return list(stacked_videos(call))

    def clips(self, call: Mapping[str, Any]) -> list[Tensor]:
        return list(stacked_videos(call))

    def with_frames(self, call: Mapping[str, Any], picks: list[Tensor]) -> dict[str, Any]:
        if len({len(pick) for pick in picks}) > 1:
            raise UnsupportedError(f"{self.name} stacks videos: leave the same number of frames in each of a batch.")
        argument = "pixel_values" if call.get("pixel_values_videos") is None else "pixel_values_videos"
        return {**call, argument: torch.stack([clip[pick] for clip, pick in zip(call[argument], picks, strict=True)])}
