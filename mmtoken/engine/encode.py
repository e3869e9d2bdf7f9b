"""What one call of `get_image_features` / `get_video_features` leaves behind for the compressor and the decoder."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mmtoken.backbones.base import Backbone, Layout, Modality
from mmtoken.compressors.base import Compressor, Context, Need
from mmtoken.engine.report import SiteReport
from mmtoken.engine.tower import TowerRun
from mmtoken.errors import InputError, UnsupportedError
from mmtoken.tokens import VisualTokens

if TYPE_CHECKING:
    from mmtoken.engine.prompt import Prompt


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
class VideoFrames:
    """The frames of the videos of a call, for methods that look at them again.

    Attributes:
        unpooled: per video float[F, h, w, D], see `Context.unpooled`; None where the model pools nothing.
        pictures: gives per video uint8[F, H, W, 3]; None unless asked for.
    """

    unpooled: list[Tensor] | None = None
    pictures: Callable[[], list[Tensor]] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> VideoFrames:
        """Itself, as `TowerFacts`."""
        return self

    def at(self, index: list[Tensor]) -> VideoFrames:
        """The same with frames int[F] of each video."""
        pictures = self.pictures

        def some(values: list[Tensor]) -> list[Tensor]:
            return [value[pick.to(value.device)] for value, pick in zip(values, index, strict=True)]

        return VideoFrames(
            None if self.unpooled is None else some(self.unpooled),
            None if pictures is None else lambda: some(pictures()),
        )


@dataclass
class Encoded:
    """Items encoded in one call, in prompt order.

    Attributes:
        modality: "image" or "video".
        layout: tokens per item, grids, separators.
        mass: float[tokens], share of each token's patches that a tower method left, None if none acted; for methods
            around the projector 1 or 0; -1 for separators that leave with their frame.
        size: float[tokens], how many original tokens each stands for, None where nothing was merged.
        tower: attention, keys and features of tower blocks per token; None without a tower.
        cls: float[items, D] CLS features where the projector reads, None without CLS.
        seeds: an integer per item computed from its pixels, None unless asked for.
        frames: of videos, for methods that need them; None for images and where nobody asks.
        sites: what the compressor did during the call.
        seconds: wall time of the call.
        ran: which scoring operations ran during the call, as `mmtoken.kernels.dispatch.ran` counts them.
    """

    modality: Modality
    layout: Layout
    mass: Tensor | None = None
    size: Tensor | None = None
    tower: TowerFacts | None = None
    cls: Tensor | None = None
    seeds: list[int] | None = None
    frames: VideoFrames | None = None
    sites: list[SiteReport] = field(default_factory=list)
    seconds: float = 0.0
    ran: Counter[tuple[str, str]] = field(default_factory=Counter)


@dataclass
class EncoderCall:
    """The call in progress: tower runs and projections seen so far, and the prompt row of each tile if it was asked.

    `unpooled` is what the projector gave before the model pools it, float[frames, patches, D].
    """

    modality: Modality
    arguments: Mapping[str, Any]
    runs: list[TowerRun] = field(default_factory=list)
    tiles: int = 0
    projected_mass: Tensor | None = None
    projected_size: Tensor | None = None
    prompt_rows: Tensor | None = None
    unpooled: Tensor | None = None

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
        if self.modality == "video" and needs & {"unpooled", "pixels"}:
            encoded.frames = VideoFrames(
                None if self.unpooled is None else backbone.unpooled(self.arguments, self.unpooled),
                functools.partial(pictures, backbone, self.arguments) if "pixels" in needs else None,
            )
        return encoded

    def seeds(self, backbone: Backbone) -> list[int]:
        """An integer per item from the exact bits of its pixels."""
        return [bit_hash(item) for item in backbone.item_pixels(self.modality, self.arguments)]


def pictures(backbone: Backbone, call: Mapping[str, Any]) -> list[Tensor]:
    """The videos of a call as uint8[F, H, W, 3]."""
    mean, deviation = (torch.tensor(values)[:, None, None] for values in backbone.pixel_scale())
    found = []
    for clip in backbone.pictures(call):
        scaled = (clip.detach().float() * deviation.to(clip.device) + mean.to(clip.device)) * 255
        found.append(scaled.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous())
    return found


class FrameContext(Context):
    """The context of the `frames` site: nothing has been encoded yet.

    Args:
        counts: frames of the video.
        seed: of its pixels, None unless declared.
        prompt: the prompt and the video's row in it, None unless declared.
        clip: gives the video as uint8[F, H, W, 3], None unless declared.
    """

    tokenwise_projector = False

    def __init__(
        self,
        counts: list[int],
        seed: int | None,
        prompt: tuple[Prompt, Tensor] | None = None,
        clip: Callable[[], Tensor] | None = None,
    ) -> None:
        self.depth = 0
        self.original_counts = counts
        self.memory = {}
        self._seed = seed
        self._prompt = prompt
        self._clip = clip

    def prompt_embedding(self, tokens: VisualTokens) -> Tensor:
        prompt, row = self._asked("prompt_embedding")
        return prompt.mean(row)

    def question_state(self, tokens: VisualTokens) -> Tensor:
        prompt, row = self._asked("question_state")
        return prompt.state(row)

    def prompt_ids(self, tokens: VisualTokens) -> list[Tensor]:
        prompt, row = self._asked("prompt_ids")
        return prompt.ids_of(row)

    def _asked(self, name: str) -> tuple[Prompt, Tensor]:
        if self._prompt is None:
            raise self._missing(name)
        return self._prompt

    def pixels(self, tokens: VisualTokens) -> list[Tensor | None]:
        if self._clip is None:
            raise self._missing("pixels")
        return [self._clip()]

    def content_seed(self, tokens: VisualTokens) -> list[int]:
        if self._seed is None:
            raise UnsupportedError("content_seed was not declared in `needs`.")
        return [self._seed]


def choose_frames(method: Compressor, clips: list[Tensor], contexts: list[FrameContext]) -> list[Tensor]:
    """Ask a method which frames of each video to encode: int[K] per video, checked.

    Raises:
        InputError: an index is out of range, repeated, out of order, or none is left.
    """
    picks = []
    for number, (clip, context) in enumerate(zip(clips, contexts, strict=True)):
        pick = method.frames(clip, context)
        if not len(pick) or bool((pick.diff() <= 0).any()) or int(pick[0]) < 0 or int(pick[-1]) >= len(clip):
            raise InputError(
                f"frames chose {pick.tolist()} of video {number} with {len(clip)} frames; give ascending "
                "indices below that, at least one."
            )
        picks.append(pick)
    return picks


def fill_frames(output: Any, record: Encoded, full: Layout, picks: list[Tensor]) -> Encoded:
    """Stretch features and facts of some frames to all frames, so that they fit the prompt.

    A frame that was not encoded holds copies of the last encoded one before it, at mass 0; a separator of its own,
    which comes first in it (CLS), leaves with it and has mass -1.
    """
    index, chosen, frames_at = [], [], []
    protected = full.protected.split(full.counts)
    encoded = record.layout.protected.split(record.layout.counts)
    for item, pick in enumerate(picks):
        grid = full.grids[item]
        assert grid is not None
        frames, area = grid[0], grid[1] * grid[2]
        device = full.protected.device
        nearest = (torch.searchsorted(pick.to(device), torch.arange(frames, device=device), right=True) - 1).clamp(
            min=0
        )
        frames_at.append(nearest)
        inside = torch.arange(frames * area, device=device)
        places = (~protected[item]).nonzero()[:, 0]
        copied = (~encoded[item]).nonzero()[:, 0][nearest[inside // area] * area + inside % area]
        # A separator belongs to the token before it, or, where frames begin with one, to the token after it.
        first, token = bool(protected[item][0]), (~protected[item]).long()
        owner = (token.cumsum(-1) - (token if first else 1)).clamp(min=0)
        where = copied[owner] + torch.arange(full.counts[item], device=device) - places[owner]
        index.append(where)
        mass = torch.isin(owner // area, pick.to(device)).float()
        mass[protected[item]] = mass[protected[item]] - 1 if first else 0.0
        chosen.append(mass)
    offsets = torch.tensor([0, *record.layout.counts[:-1]], device=full.protected.device).cumsum(0)
    flat = torch.cat([where + offset for where, offset in zip(index, offsets, strict=True)])
    features = output.pooler_output
    if len(features) > len(index):  # an entry per frame
        features = torch.stack(features.flatten(0, 1).split(record.layout.counts))
    stretched = [
        part[_within(where, separators, len(part))]
        for part, where, separators in zip(features, index, encoded, strict=True)
    ]
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
        mass=mass if inner is None else torch.where(mass > 0, mass * inner, mass),
        size=stretch(record.size),
        tower=None if record.tower is None else record.tower.at(flat),
        frames=None if record.frames is None else record.frames.at(frames_at),
        cls=None,
    )


def _within(where: Tensor, encoded: Tensor, length: int) -> Tensor:
    """`where` for features of which transformers 5.17 leaves the last token out: a separator, which it adds later.

    Args:
        where: int[tokens], indices into the encoded item.
        encoded: bool[n], its separators.
        length: how many of its tokens have features.
    """
    where = where[: len(where) - (len(encoded) - length)]
    beyond = where >= length
    if not bool(beyond.any()):
        return where
    # All separators are the same vector.
    return where.masked_fill(beyond, int(encoded.nonzero()[0, 0]))


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
