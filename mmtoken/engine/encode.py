"""What one call of `get_image_features` / `get_video_features` leaves behind for the compressor and the decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mmtoken.backbones.base import Backbone, Layout, Modality
from mmtoken.compressors.base import Compressor, Context, Need
from mmtoken.engine.report import SiteReport
from mmtoken.engine.tower import TowerRun
from mmtoken.errors import InputError, UnsupportedError
from mmtoken.tokens import VisualTokens


@dataclass
class TowerFacts:
    """What the blocks of a tower computed, at the resolution of the prompt; made when it is first asked for.

    Attributes:
        run: the tower's call.
        carry: values float[tiles, patches, C] or float[units, C] to float[tokens, C] of the prompt.
    """

    run: TowerRun
    carry: Callable[[Tensor], Tensor]
    _made: dict[tuple[str, int | None, bool], Tensor] = field(default_factory=dict)

    def read(self, name: Literal["attention", "keys", "features"], block: int | None, joint: bool) -> Tensor:
        """float[tokens, C]: a fact of a block (None: the one that the projector reads); attention has C = 1.

        Raises:
            UnsupportedError: it was not declared.
        """
        key = (name, block, joint)
        if key not in self._made:
            if name == "attention":
                values = self.run.attention(block, joint=joint)[..., None]
            elif name == "keys":
                values = self.run.mean_keys(block, joint=joint)
            else:
                assert block is not None
                values = self.run.features(block)
            self._made[key] = self.carry(values)
        return self._made[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> TowerFacts:
        """Itself: assisted generation copies encoder outputs, and facts of a call do not change."""
        return self

    def at(self, index: Tensor) -> TowerFacts:
        """The same for tokens int[n] of these."""
        carry = self.carry
        return TowerFacts(self.run, lambda values: carry(values)[index])


@dataclass
class Encoded:
    """Items encoded in one call, in prompt order.

    Attributes:
        modality: "image" or "video".
        layout: tokens per item, grids, separators.
        mass: float[tokens], share of each token's patches that a tower method left, None if none acted; for methods
            around the projector 1 or 0.
        size: float[tokens], how many original tokens each stands for, None where nothing was merged.
        tower: attention, keys and features of tower blocks per token; None without a tower.
        cls: float[items, D] CLS features where the projector reads, None without CLS.
        seeds: an integer per item computed from its pixels, None unless asked for.
        sites: what the compressor did during the call.
        seconds: wall time of the call.
    """

    modality: Modality
    layout: Layout
    mass: Tensor | None = None
    size: Tensor | None = None
    tower: TowerFacts | None = None
    cls: Tensor | None = None
    seeds: list[int] | None = None
    sites: list[SiteReport] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class EncoderCall:
    """The call in progress: tower runs and projections seen so far, and the prompt row of each tile if it was asked."""

    modality: Modality
    arguments: Mapping[str, Any]
    runs: list[TowerRun] = field(default_factory=list)
    tiles: int = 0
    projected_mass: Tensor | None = None
    projected_size: Tensor | None = None
    prompt_rows: Tensor | None = None

    def finish(self, backbone: Backbone, needs: frozenset[Need], acted: bool) -> Encoded:
        """Bring everything to the resolution of the prompt."""
        layout = backbone.layout(self.modality, self.arguments, self.tiles)
        encoded = Encoded(self.modality, layout)

        def carry(values: Tensor) -> Tensor:
            return backbone.to_prompt(self.modality, self.arguments, values)

        if self.runs:
            run = self.runs[-1]
            if acted:
                encoded.mass = carry(run.representatives())[:, 0]
            encoded.tower = TowerFacts(run, carry)
            encoded.cls = run.cls
        if self.projected_mass is not None:
            encoded.mass = carry(self.projected_mass[..., None])[:, 0]
            assert self.projected_size is not None
            encoded.size = carry(self.projected_size[..., None])[:, 0]
        if "content_seed" in needs:
            encoded.seeds = self.seeds(backbone)
        return encoded

    def seeds(self, backbone: Backbone) -> list[int]:
        """An integer per item from the exact bits of its pixels."""
        return [bit_hash(item) for item in backbone.item_pixels(self.modality, self.arguments)]


class FrameContext(Context):
    """The context of the `frames` site: nothing has been encoded yet."""

    tokenwise_projector = False

    def __init__(self, counts: list[int], seed: int | None) -> None:
        self.depth = 0
        self.original_counts = counts
        self._seed = seed

    def content_seed(self, tokens: VisualTokens) -> list[int]:
        if self._seed is None:
            raise UnsupportedError("content_seed was not declared in `needs`.")
        return [self._seed]


def choose_frames(method: Compressor, clips: list[Tensor], seeds: list[int] | None) -> list[Tensor]:
    """Ask a method which frames of each video to encode: int[K] per video, checked.

    Raises:
        InputError: an index is out of range, repeated, out of order, or none is left.
    """
    picks = []
    for number, clip in enumerate(clips):
        pick = method.frames(clip, FrameContext([len(clip)], None if seeds is None else seeds[number]))
        if not len(pick) or bool((pick.diff() <= 0).any()) or int(pick[0]) < 0 or int(pick[-1]) >= len(clip):
            raise InputError(
                f"frames chose {pick.tolist()} of video {number} with {len(clip)} frames; give ascending "
                "indices below that, at least one."
            )
        picks.append(pick)
    return picks


def fill_frames(output: Any, record: Encoded, full: Layout, picks: list[Tensor]) -> Encoded:
    """Stretch features and facts of some frames to all frames, so that they fit the prompt.

    A frame that was not encoded holds copies of the last encoded one before it, at mass 0.
    """
    index, chosen = [], []
    protected = full.protected.split(full.counts)
    for item, pick in enumerate(picks):
        grid = full.grids[item]
        assert grid is not None
        frames, area = grid[0], grid[1] * grid[2]
        device = full.protected.device
        nearest = (torch.searchsorted(pick.to(device), torch.arange(frames, device=device), right=True) - 1).clamp(
            min=0
        )
        inside = torch.arange(frames * area, device=device)
        where = torch.zeros(full.counts[item], dtype=torch.long, device=device)
        where[~protected[item]] = nearest[inside // area] * area + inside % area
        tail = int(protected[item].sum())
        where[protected[item]] = len(pick) * area + torch.arange(tail, device=device)
        index.append(where)
        mass = torch.zeros(full.counts[item], device=device)
        mass[~protected[item]] = torch.isin(inside // area, pick.to(device)).float()
        chosen.append(mass)
    offsets = torch.tensor([0, *record.layout.counts[:-1]], device=full.protected.device).cumsum(0)
    flat = torch.cat([where + offset for where, offset in zip(index, offsets, strict=True)])
    features = output.pooler_output
    # transformers 5.17 adds the separators of a video later, so that its features end before them.
    stretched = [part[where[where < len(part)]] for part, where in zip(features, index, strict=True)]
    output.pooler_output = torch.stack(stretched) if isinstance(features, Tensor) else tuple(stretched)
    if getattr(output, "deepstack_features", None) is not None:
        # one tensor per layer in 5.17, one per layer and item later
        output.deepstack_features = [
            layer[flat]
            if isinstance(layer, Tensor)
            else tuple(part[where] for part, where in zip(layer, index, strict=True))
            for layer in output.deepstack_features
        ]

    def stretch(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[flat]

    mass = torch.cat(chosen)
    inner = stretch(record.mass)
    return replace(
        record,
        layout=full,
        mass=mass if inner is None else mass * inner,
        size=stretch(record.size),
        tower=None if record.tower is None else record.tower.at(flat),
        cls=None,
    )


def without_tail(record: Encoded, tail: int) -> Encoded:
    """The record of a single item without its last `tail` tokens."""
    if not tail:
        return record
    layout = record.layout
    (count,) = layout.counts
    left = count - tail

    def cut(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[:left]

    return replace(
        record,
        layout=replace(layout, counts=[left], protected=layout.protected[:left], crops=cut(layout.crops)),
        mass=cut(record.mass),
        size=cut(record.size),
        tower=None if record.tower is None else record.tower.at(torch.arange(left, device=layout.protected.device)),
    )


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
