"""How each family lays a temporal step of a video into its prompt: one small class per family.

A step is what the model's video encoder makes of the fewest frames that it takes: one frame, or two for Qwen. Encoded
by itself it gives what it gives inside a longer video, since no encoder here looks from one step into another.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmtoken.backbones.base import Backbone
from mmtoken.errors import InputError, UnsupportedError
from mmtoken.streaming.prompt import StreamPrompt
from mmtoken.tokens import VisualTokens

Choose = Callable[[Any, VisualTokens, int], tuple[VisualTokens, VisualTokens]]
"""What the compressor makes of an encoder's output, the step's tokens in it, and the number of those behind them:
(tokens as encoded, tokens that enter the decoder)."""


@dataclass(frozen=True)
class Rows:
    """A run of decoder positions, ready to enter the decoder.

    Attributes:
        embeddings: float[n, D].
        relative: int[A, n], positions from where the run starts; A is 1, or 3 with M-RoPE (time, height, width).
        extent: where the text that follows the run starts, counted like `relative`.
        advance: per axis, where the next run starts.
        stamp: position of the run's time on the time axis, where time moves on with the clock (else 0).
        visual: int[v], which rows are visual tokens of the encoder.
        deepstack: per decoder layer float[v, D], added to the visual rows behind that layer (Qwen3-VL).
    """

    embeddings: Tensor
    relative: Tensor
    extent: int
    advance: tuple[int, ...]
    stamp: int = 0
    visual: Tensor | None = None
    deepstack: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.embeddings)


@dataclass(frozen=True)
class StepTokens:
    """What enters the decoder of a temporal step.

    Attributes:
        features: float[k, D]; what the compressor adds comes last.
        source: int[s], s <= k, places of the encoder's own tokens among the `total` ones of the step, ascending.
        total: tokens of the step before any cut.
        side: rows and columns of its grid.
        times: seconds of its frames.
        first: seconds of the stream's first frame.
        deepstack: per decoder layer float[s, D].
    """

    features: Tensor
    source: Tensor
    total: int
    side: tuple[int, int]
    times: Sequence[float]
    first: float
    deepstack: list[Tensor]

    @property
    def added(self) -> int:
        """Tokens that the compressor adds."""
        return len(self.features) - len(self.source)


class Framing(ABC):
    """Turns frames into rows of the decoder's input.

    Args:
        model: a transformers VLM.
        processor: its processor.
        backbone: its adapter.
        closed: whether a step's rows close the gaps of tokens that did not enter (positions="renumber").
    """

    model_types: ClassVar[tuple[str, ...]]
    frames: ClassVar[int] = 1
    """Frames of a temporal step."""
    axes: ClassVar[int] = 1
    """Axes of position ids."""
    tail: ClassVar[int] = 0
    """Tokens at the end of a video that belong to no step: they come before the question instead."""

    def __init__(self, model: Any, processor: Any, backbone: Backbone, *, closed: bool = False) -> None:
        self.model, self.processor, self.backbone, self.closed = model, processor, backbone, closed
        self.prompt = StreamPrompt(processor)
        if getattr(processor, "video_processor", None) is None:
            raise UnsupportedError(
                f"processor is a {type(processor).__name__} without video_processor; hand in the model's own processor."
            )

    # --- pixels -------------------------------------------------------------------------------------------------------

    def pixels(self, frames: Sequence[Tensor]) -> dict[str, Any]:
        """Arguments of the model's `get_video_features` for one step.

        Args:
            frames: uint8[H, W, 3] each, `self.frames` of them.

        Raises:
            InputError: the processor takes no frames of this size.
        """
        clip = torch.stack(list(frames)).permute(0, 3, 1, 2)
        try:
            made = self.processor.video_processor(
                videos=[clip], do_sample_frames=False, return_tensors="pt", input_data_format="channels_first"
            )
        except (ValueError, RuntimeError) as error:
            shape = tuple(frames[0].shape)
            raise InputError(f"frame of shape {shape} cannot be processed: {error}; give another size.") from error
        call = {"pixel_values_videos": made["pixel_values_videos"].to(self.model.device, self.model.dtype)}
        if "video_grid_thw" in made:
            call["video_grid_thw"] = made["video_grid_thw"].to(self.model.device)
        return call

    # --- rows ---------------------------------------------------------------------------------------------------------

    def encode(self, call: dict[str, Any], times: Sequence[float], first: float, choose: Choose) -> Rows:
        """One temporal step.

        Args:
            call: see `pixels`.
            times: seconds of its frames.
            first: seconds of the stream's first frame.
            choose: what enters the decoder.
        """
        # By place: transformers 5.17 calls the argument of LLaVA-OneVision `pixel_values`.
        rest = {name: value for name, value in call.items() if name != "pixel_values_videos"}
        output = self.backbone.root.get_video_features(call["pixel_values_videos"], **rest, return_dict=True)
        layout = self.backbone.layout("video", call, self.frames)
        count = layout.counts[0] - self.tail
        flat = torch.cat([part.reshape(-1, part.shape[-1]) for part in output.pooler_output])
        encoded = VisualTokens.from_features(
            self.complete(flat, count)[None], protected=layout.protected[None, :count], grid=layout.grids
        )
        before, tokens = choose(output, encoded, self.tail)
        total = before.source.shape[1]
        source, features = tokens.source[0][tokens.valid[0]], tokens.features[0][tokens.valid[0]]
        order = torch.argsort(source, stable=True)
        source, features = source[order], features[order]
        own = source < total
        layers = getattr(output, "deepstack_features", None) or []
        deepstack = [torch.cat([*layer] if not isinstance(layer, Tensor) else [layer])[source[own]] for layer in layers]
        grid = before.grid[0]
        if grid is None:
            raise UnsupportedError(f"{self.backbone.name} encoded a step without a grid, so it has no positions.")
        return self.arrange(StepTokens(features, source[own], total, grid[1:], times, first, deepstack))

    @abstractmethod
    def arrange(self, step: StepTokens) -> Rows:
        """Lay a step's tokens out."""

    def complete(self, features: Tensor, count: int) -> Tensor:
        """float[count, D]: a step's tokens among what the encoder put out."""
        return features[:count]

    def prefix(self) -> Rows:
        """What comes before the video."""
        return self.text(self.embed(self.prompt.prefix()))

    def question(self, question: str) -> tuple[Rows, slice]:
        """What comes behind the video, and which of these rows are the question's own words."""
        closing = self.closing()
        ids, words = self.prompt.suffix(question)
        rows = self.text(torch.cat([closing, self.embed(ids)]))
        return rows, slice(words.start + len(closing), words.stop + len(closing))

    def closing(self) -> Tensor:
        """float[`tail`, D]: tokens that end the video."""
        return self.embed([])

    def embed(self, ids: Sequence[int]) -> Tensor:
        """float[n, D]."""
        rows: Tensor = self.model.get_input_embeddings()(
            torch.tensor(list(ids), dtype=torch.long, device=self.model.device)
        )
        return rows

    def text(self, embeddings: Tensor) -> Rows:
        """Rows of text: every axis counts them."""
        count = len(embeddings)
        return Rows(embeddings, self.count(0, count), count, (count,) * self.axes)

    def count(self, start: int, length: int) -> Tensor:
        """int[A, length]: start, start + 1, ... on every axis."""
        return torch.arange(start, start + length, device=self.model.device).expand(self.axes, -1)


class LlavaOneVisionFraming(Framing):
    """One frame is a step, counted row by row; the newline that ends a video comes before the question."""

    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)
    tail: ClassVar[int] = 1

    def arrange(self, step: StepTokens) -> Rows:
        if self.closed:
            return self.text(step.features)
        relative = torch.cat([step.source[None], self.count(step.total, step.added)], 1)
        end = step.total + step.added
        return Rows(step.features, relative, end, (end,))

    def closing(self) -> Tensor:
        newline: Tensor = self.backbone.root.image_newline
        return newline[None].to(self.model.device, self.model.get_input_embeddings().weight.dtype)


class LlavaVideoFraming(LlavaOneVisionFraming):
    """The same, but rows of a frame end in newlines, which belong to it, and nothing ends a video."""

    model_types: ClassVar[tuple[str, ...]] = ("llava_video",)
    tail: ClassVar[int] = 0

    def complete(self, features: Tensor, count: int) -> Tensor:
        # In transformers 5.17 a video's last newline comes later, in the model's forward.
        missing = count - len(features)
        return torch.cat([features, super().closing().to(features).expand(missing, -1)]) if missing > 0 else features

    def closing(self) -> Tensor:
        return self.embed([])


class _Grid(Framing):
    """Two frames are a step with a time, a height and a width."""

    frames: ClassVar[int] = 2
    axes: ClassVar[int] = 3

    def grid(self, source: Tensor, side: tuple[int, int], start: int) -> tuple[Tensor, int]:
        """(int[3, s] places on the grid, from `start` on; where what follows starts).

        The box around the places, with `closed`: it moves to the start, and what follows is behind its longest side.
        """
        places = torch.stack([torch.zeros_like(source), source // side[1], source % side[1]])
        if not self.closed or not len(source):
            return places + start, start + max(side)
        places = places - places.amin(1, keepdim=True)
        return places + start, start + int(places.max()) + 1


class Qwen25VLFraming(_Grid):
    """All steps of a video start at one place; their time moves on with the clock, in tokens per second."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)

    def arrange(self, step: StepTokens) -> Rows:
        grid, extent = self.grid(step.source, step.side, 0)
        relative = torch.cat([grid, self.count(extent, step.added)], 1)
        # Times that are sums of fractions miss whole numbers by a little.
        stamp = math.floor((step.times[0] - step.first) * self.model.config.vision_config.tokens_per_second + 1e-4)
        return Rows(step.features, relative, extent + step.added, (0, 0, 0), stamp)


class Qwen3VLFraming(_Grid):
    """A step is its time as text, a start mark, the grid and an end mark; what follows starts behind its box."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl",)

    def arrange(self, step: StepTokens) -> Rows:
        processor, features, own = self.processor, step.features, len(step.source)
        middle = (step.times[0] + step.times[-1]) / 2
        before = self.embed([*self.prompt.ids(f"<{middle:.1f} seconds>"), processor.vision_start_token_id])
        after = self.embed([processor.vision_end_token_id])
        start = len(before)
        grid, behind = self.grid(step.source, step.side, start)
        extent = behind + len(after) + step.added
        relative = torch.cat([self.count(0, start), grid, self.count(behind, extent - behind)], 1)
        rows = torch.cat([before, features[:own].to(before.dtype), after, features[own:].to(before.dtype)])
        visual = torch.arange(start, start + own, device=rows.device)
        return Rows(rows, relative, extent, (extent,) * 3, visual=visual, deepstack=step.deepstack)


FRAMINGS: tuple[type[Framing], ...] = (LlavaOneVisionFraming, LlavaVideoFraming, Qwen25VLFraming, Qwen3VLFraming)


def framing_of(model: Any, processor: Any, backbone: Backbone, *, closed: bool = False) -> Framing:
    """The framing that serves a model; `closed` as in `Framing`.

    Raises:
        UnsupportedError: there is none.
    """
    kind = model.config.model_type
    for framing in FRAMINGS:
        if kind in framing.model_types:
            return framing(model, processor, backbone, closed=closed)
    known = ", ".join(name for framing in FRAMINGS for name in framing.model_types)
    raise UnsupportedError(f"model_type={kind!r} has no streams; those that have: {known}.")
