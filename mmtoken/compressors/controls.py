"""Controls: what any method must beat before its score means anything."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool3d

from mmtoken.compressors.base import Budget, Compressor, Context, Need, Positions, check_whole
from mmtoken.errors import InputError
from mmtoken.tokens import Grid, VisualTokens, kept_count

_MASK = 0x7FFFFFFFFFFFFFFF


@dataclass(frozen=True)
class Random(Compressor):
    """Tokens drawn at random, before the language model.

    The generator is seeded with `seed` and the exact bits of the item's pixels, so an image loses the same tokens
    alone, in any batch and on every beam.

    Attributes:
        seed: another seed, another draw.
    """

    keep: int | float
    positions: Positions = "keep"
    seed: int = 0

    title: ClassVar[str] = "Random"
    paper: ClassVar[str] = "control"
    year: ClassVar[int] = 2026
    needs: ClassVar[frozenset[Need]] = frozenset({"content_seed"})
    control: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("seed", self.seed, lowest=0)

    def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        scores = torch.zeros(tokens.source.shape)
        counts = tokens.valid.sum(-1).tolist()
        for row, (seed, count) in enumerate(zip(ctx.content_seed(tokens), counts, strict=True)):
            generator = torch.Generator().manual_seed((seed ^ (self.seed * 0x9E3779B97F4A7C15)) & _MASK)
            scores[row, :count] = torch.rand(count, generator=generator)
        return tokens.top(scores.to(tokens.features.device), self.keep)


@dataclass(frozen=True)
class UniformGrid(Compressor):
    """Tokens evenly spread over the image (and over the frames of a video), before the language model."""

    keep: int | float
    positions: Positions = "keep"

    title: ClassVar[str] = "Uniform grid"
    paper: ClassVar[str] = "control"
    year: ClassVar[int] = 2026
    control: ClassVar[bool] = True

    def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        mask = tokens.protected.clone()
        counts = zip(tokens.counts(), tokens.budget(self.keep), tokens.grid, strict=True)
        for row, (total, keep, grid) in enumerate(counts):
            places = tokens.eligible[row].nonzero()[:, 0]
            chosen = spread(keep, total) if grid is None or math.prod(grid) != total else lattice(keep, grid)
            mask[row, places[torch.tensor(chosen, dtype=torch.long, device=places.device)]] = True
        return tokens.where(mask)


def spread(count: int, total: int) -> list[int]:
    """`count` evenly spaced numbers below `total`, each in the middle of its share."""
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def lattice(count: int, grid: Grid) -> list[int]:
    """Exactly `count` raster indices spread over (frames, rows, columns), as evenly as whole numbers allow."""
    frames, rows, columns = grid
    if count < frames:
        return [f * rows * columns + i for f in spread(count, frames) for i in lattice(1, (1, rows, columns))]
    chosen: list[int] = []
    for frame, mine in enumerate(_shares(count, frames)):
        bands = round(math.sqrt(mine * rows / columns))
        bands = max(1, -(-mine // columns), min(rows, mine, bands))
        for row, inside in zip(spread(bands, rows), _shares(mine, bands), strict=True):
            chosen += [(frame * rows + row) * columns + column for column in spread(inside, columns)]
    return chosen


def _shares(count: int, parts: int) -> list[int]:
    """`count` dealt to `parts`, larger shares spread out: whole numbers that differ by one at most."""
    edges = [(2 * count * i + parts) // (2 * parts) for i in range(parts + 1)]
    return [b - a for a, b in itertools.pairwise(edges)]


@dataclass(frozen=True)
class Downscale(Compressor):
    """The plainest way to fewer tokens: a smaller image.

    Models whose token count follows the image size: `prepare` shrinks the image before the processor, keeping its
    aspect ratio. Fixed towers always give the same number of tokens, so the projected grid is average-pooled to the
    largest grid of about the same shape within the budget instead; a pooled token takes the place of the middle of its
    cell. Tokens that lie on no single grid (any-resolution crops) are pooled along their sequence.

    Attributes:
        token_pixels: pixels that become one token, for an int `keep` in `prepare`: 784 (28 x 28) for Qwen2.5-VL,
            1024 (32 x 32) for Qwen3-VL.
    """

    keep: int | float
    positions: Positions = "keep"
    token_pixels: int = 784

    title: ClassVar[str] = "Down-scaling"
    paper: ClassVar[str] = "control"
    year: ClassVar[int] = 2026
    merges: ClassVar[bool] = True
    control: ClassVar[bool] = True
    budget: ClassVar[Budget] = "at_most"
    identity_at_full: ClassVar[bool | str] = "averages over cells, and images are re-sampled"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("token_pixels", self.token_pixels, lowest=1)

    def prepare(self, media: Any) -> Any:
        """Shrink one PIL image, or every image of a (nested) list; never enlarge.

        Raises:
            InputError: something in `media` is not a PIL image.
        """
        if isinstance(media, list | tuple):
            return type(media)(self.prepare(part) for part in media)
        if not isinstance(media, Image.Image):
            raise InputError(f"media is a {type(media).__name__}; give PIL images or lists of them.")
        width, height = media.size
        wanted = self.keep if isinstance(self.keep, float) else self.keep * self.token_pixels / (width * height)
        if wanted >= 1:
            return media
        scale = math.sqrt(wanted)
        size = max(1, math.floor(width * scale)), max(1, math.floor(height * scale))
        return media.resize(size, Image.Resampling.LANCZOS)

    def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        rows = [self._pool(tokens, row, total) for row, total in enumerate(tokens.counts())]
        index = torch.nn.utils.rnn.pad_sequence([index for _, index, _ in rows], batch_first=True)
        lengths = torch.tensor([len(index) for _, index, _ in rows], device=index.device)
        valid = torch.arange(index.shape[1], device=index.device) < lengths[:, None]
        features = torch.nn.utils.rnn.pad_sequence([features for features, _, _ in rows], batch_first=True)
        size = torch.nn.utils.rnn.pad_sequence([size for _, _, size in rows], batch_first=True)
        return tokens.take(index, valid).replace(features=features, size=size)

    def _pool(self, tokens: VisualTokens, row: int, total: int) -> tuple[Tensor, Tensor, Tensor]:
        """(features float[K, D], index int[K], size float[K]) of one item, separators included."""
        places = tokens.eligible[row].nonzero()[:, 0]
        features = tokens.features[row, places]
        grid = tokens.grid[row]
        budget = kept_count(self.keep, total, tokens.steps[row])
        if not total:  # separators only
            pooled, centres = features, places
        elif grid is None or math.prod(grid) != total:
            pooled = adaptive_avg_pool1d(features.T[None], budget)[0].T
            centres = torch.tensor(spread(budget, total), dtype=torch.long, device=places.device)
        else:
            frames, height, width = grid
            fewer = min(frames, budget)  # a budget of less than a token per frame averages over frames, too
            smaller = fewer, *fit(budget // fewer, height, width)
            stacked = features.view(frames, height, width, -1).permute(3, 0, 1, 2)
            pooled = adaptive_avg_pool3d(stacked, smaller).flatten(1).T
            axes = [spread(few, many) for few, many in zip(smaller, grid, strict=True)]
            order = [(f * height + r) * width + c for f, r, c in itertools.product(*axes)]
            centres = torch.tensor(order, dtype=torch.long, device=places.device)
        separators = tokens.protected[row].nonzero()[:, 0]
        each = total / max(1, len(centres))
        return (
            torch.cat([pooled, tokens.features[row, separators]]),
            torch.cat([places[centres], separators]),
            torch.cat([tokens.size.new_full(centres.shape, each), tokens.size[row, separators]]),
        )


def fit(budget: int, height: int, width: int) -> tuple[int, int]:
    """The largest grid within `budget` cells that is shaped about like height x width, and no larger."""
    if budget >= height * width:
        return height, width
    scale = math.sqrt(budget / (height * width))
    rows = min(height, max(1, math.floor(height * scale)), budget)
    columns = min(width, budget // rows)
    rows = min(height, budget // columns)
    return rows, columns
