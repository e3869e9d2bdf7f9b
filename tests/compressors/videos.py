"""Videos of made-up tokens, all at once and step by step as a stream hands them in: for methods that take frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmtoken.compressors import Compressor, Context
from mmtoken.tokens import VisualTokens


class VideoContext(Context):
    """A context that gives nothing but memory."""

    def __init__(self, *, streaming: bool = False, memory: dict[str, Any] | None = None) -> None:
        self.streaming = streaming
        self.memory = {} if memory is None else memory


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def video(frames: Tensor, rows: int = 1, newlines: str = "none") -> VisualTokens:
    """One video of float[F, P, D] in frames of `rows` rows, as families lay it out.

    Args:
        newlines: "none"; "end": a separator of NaN after the last frame; "rows": one after every row.
    """
    number, area, width = frames.shape
    grid = frames.reshape(number, rows, area // rows, width)
    if newlines == "rows":
        grid = torch.cat([grid, grid.new_full((number, rows, 1, width), torch.nan)], 2)
    features = grid.reshape(-1, width)
    if newlines == "end":
        features = torch.cat([features, features.new_full((1, width), torch.nan)])
    protected = features.isnan().all(-1)
    return VisualTokens.from_features(features[None], protected=protected[None], grid=((number, rows, area // rows),))


def together(tokens: Sequence[VisualTokens]) -> VisualTokens:
    """Several items in one batch, padded with NaN."""
    longest = max(one.features.shape[1] for one in tokens)

    def padded(one: VisualTokens, name: str) -> Tensor:
        value = getattr(one, name)
        fill = torch.nan if name == "features" else 0
        short = longest - value.shape[1]
        return torch.nn.functional.pad(value, (0, 0, 0, short) if value.ndim == 3 else (0, short), value=fill)

    fields = ("features", "source", "size", "valid", "protected", "item")
    return VisualTokens(
        **{name: torch.cat([padded(one, name) for one in tokens]) for name in fields},
        grid=tuple(one.grid[0] for one in tokens),
    )


def offline(method: Compressor, frames: Tensor, rows: int = 1, newlines: str = "none") -> list[int]:
    """What a method leaves of a video, frame * P + place."""
    tokens = video(frames, rows, newlines)
    left = method.llm_input(tokens, VideoContext())
    return positions(left, frames.shape[1] // rows, newlines)


def streamed(method: Compressor, frames: Tensor, rows: int = 1, newlines: str = "none") -> list[int]:
    """The same of a stream that hands in one frame after the other."""
    context, kept = VideoContext(streaming=True), []
    for number, frame in enumerate(frames):
        left = method.llm_input(video(frame[None], rows, newlines), context)
        kept += [number * len(frame) + place for place in positions(left, len(frame) // rows, newlines)]
    return kept


def positions(left: VisualTokens, columns: int, newlines: str) -> list[int]:
    """Places of the eligible tokens of a single item, separators not counted."""
    kept: list[int] = left.kept()[0].tolist()
    return [place - place // (columns + 1) for place in kept] if newlines == "rows" else kept
