"""What one call of `get_image_features` / `get_video_features` leaves behind for the compressor and the decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmtoken.backbones.base import Backbone, Layout, Modality
from mmtoken.engine.tower import TowerRun


@dataclass
class Encoded:
    """Items encoded in one call, in prompt order.

    Attributes:
        modality: "image" or "video".
        layout: tokens per item, grids, separators.
        mass: float[tokens], share of each token's patches that a tower method left, None if none acted; for methods
            around the projector 1 or 0.
        size: float[tokens], how many original tokens each stands for, None where nothing was merged.
        attention, keys: what the tower paid to each token, and its keys; None unless asked for.
        cls: float[items, D] CLS features where the projector reads, None without CLS.
        seeds: an integer per item computed from its pixels, None unless asked for.
        seconds: wall time of the call.
    """

    modality: Modality
    layout: Layout
    mass: Tensor | None = None
    size: Tensor | None = None
    attention: Tensor | None = None
    keys: Tensor | None = None
    cls: Tensor | None = None
    seeds: list[int] | None = None
    seconds: float = 0.0


@dataclass
class EncoderCall:
    """The call in progress: tower runs and projections seen so far."""

    modality: Modality
    arguments: Mapping[str, Any]
    runs: list[TowerRun] = field(default_factory=list)
    tiles: int = 0
    projected_mass: Tensor | None = None
    projected_size: Tensor | None = None

    def finish(self, backbone: Backbone, needs: frozenset[str], acted: bool, seeds: bool) -> Encoded:
        """Bring everything to the resolution of the prompt."""
        layout = backbone.layout(self.modality, self.arguments, self.tiles)
        encoded = Encoded(self.modality, layout)

        def carry(values: Tensor) -> Tensor:
            return backbone.to_prompt(self.modality, self.arguments, values)

        if self.runs:
            run = self.runs[-1]
            if acted:
                encoded.mass = carry(run.representatives())[:, 0]
            if "tower_attention" in needs:
                encoded.attention = carry(run.attention()[..., None])[:, 0]
            if "tower_keys" in needs:
                encoded.keys = carry(run.mean_keys())
            encoded.cls = run.cls
        if self.projected_mass is not None:
            encoded.mass = carry(self.projected_mass[..., None])[:, 0]
            assert self.projected_size is not None
            encoded.size = carry(self.projected_size[..., None])[:, 0]
        if seeds:
            encoded.seeds = self.seeds(backbone)
        return encoded

    def seeds(self, backbone: Backbone) -> list[int]:
        """An integer per item from the exact bits of its pixels."""
        return [bit_hash(item) for item in backbone.item_pixels(self.modality, self.arguments)]


def bit_hash(tensor: Tensor) -> int:
    """A 63-bit integer from the exact bits of a tensor: equal content gives equal numbers on every device.

    Position-weighted sum of the bit patterns in wrapping 64-bit integer arithmetic, which does not depend on the order
    of summation.
    """
    flat = tensor.detach().contiguous().flatten()
    if flat.is_floating_point():
        flat = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    bits = flat.long()
    weights = torch.arange(1, bits.numel() + 1, device=bits.device) * 0x9E3779B97F4A7C1 + 0x5851F42D4C957F2
    return int((bits * weights).sum()) & 0x7FFFFFFFFFFFFFFF
