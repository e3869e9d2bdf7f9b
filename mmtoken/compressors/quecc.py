"""QueCC: a learned projector that turns each window of patches into one token, under the question."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmtoken.compressors.base import Budget, Compressor, Context, Dims, Need, Parity, Positions, check_whole
from mmtoken.errors import MMTokenError, UnsupportedError
from mmtoken.tokens import Grid, VisualTokens, grid_places

EPSILON = 1e-6
"""Of the layer norms."""

OFFICIAL_LEVELS = (12, 16, 22, 23)
"""Hidden states of a tower of which the projector reads the 23rd (block 22 of 24)."""


@dataclass(frozen=True)
class QueCC(Compressor):
    """Query-based convolutional cross-attention: every window of k x k patches becomes one token.

    The question's last hidden state in the language model, from a pass over the prompt's text alone, is added to all
    patches. A depth-wise convolution with kernel and stride k makes one query per window, which attends to the patches
    of its own window in features of several tower blocks. The result is projected as a patch would be.

    k follows from `keep`: the smallest one with 1 / k^2 <= keep. Windows at the border of a grid that k does not
    divide are smaller (the convolution reads zeros outside, the attention nothing), so there are
    ceil(rows / k) * ceil(columns / k) tokens per frame. The official code refuses such grids, and items that are no
    grid; here these (any-resolution crops behind their re-sampling) have windows of k^2 consecutive tokens.

    Differs from the official code: of prompts it reads all text instead of the question between image and answer;
    padding does not shift which token is the last; where the projector re-samples or merges patches, windows are made
    behind it, from projected tokens and tower features carried the same way.

    Each token stands at the place of the patch next to its window's centre.

    Attributes:
        levels: tower blocks whose outputs are keys and values; None: blocks 11, 15, 21 and 22 of 23 up to the one that
            is projected, scaled to the tower's depth.
        heads: attention heads.
    """

    keep: int | float = 0.0625
    positions: Positions = "keep"
    levels: tuple[int, ...] | None = None
    heads: int = 8

    title: ClassVar[str] = "QueCC"
    paper: ClassVar[str] = (
        "Li et al., Inference Optimal VLMs Need Fewer Visual Tokens and More Parameters, ICLR 2025, arXiv 2411.03312"
    )
    year: ClassVar[int] = 2025
    parity: ClassVar[Parity] = "official code"
    licence: ClassVar[str] = "written from the formulas, Apache-2.0; the official code has no licence file, unused"
    needs: ClassVar[frozenset[Need]] = frozenset({"prompt"})
    merges: ClassVar[bool] = True
    query_agnostic: ClassVar[bool] = False
    trainable: ClassVar[bool] = True
    budget: ClassVar[Budget] = "adaptive"
    identity_at_full: ClassVar[bool | str] = "the learned projector makes new features, however many are kept"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.keep, float):
            raise MMTokenError(
                f"keep={self.keep!r} is a count, and windows of k x k patches leave a fraction; give 1 / k^2 as a "
                "float (0.0625 for k = 4: 36 tokens of 24 x 24)."
            )
        check_whole("heads", self.heads, lowest=1)
        if self.levels is not None:
            if isinstance(self.levels, str) or not isinstance(self.levels, tuple | list) or not self.levels:
                raise MMTokenError(f"levels={self.levels!r}: give a tuple of tower blocks, as (11, 15, 21, 22).")
            object.__setattr__(self, "levels", tuple(self.levels))
            for level in self.levels:
                check_whole("levels", level, lowest=0)

    @property
    def kernel(self) -> int:
        """k, the side of a window."""
        return math.ceil(math.sqrt(1 / self.keep) - 1e-9)

    def tower_layers(self, depth: int, blocks: int) -> tuple[int, ...]:
        if self.levels is None:
            last = OFFICIAL_LEVELS[-1]
            return tuple(sorted({max(0, math.floor(level * depth / last + 0.5) - 1) for level in OFFICIAL_LEVELS}))
        for level in self.levels:
            if level >= blocks:
                raise UnsupportedError(
                    f"levels={level} but this tower has {blocks} blocks; choose from 0 to {blocks - 1}."
                )
        return self.levels

    def build(self, dims: Dims) -> QueCCParts:
        levels = len(self.tower_layers(dims.blocks, max(dims.blocks, *(self.levels or (0,))) + 1))
        return QueCCParts(dims.tokens, levels * dims.tower, dims.llm, self.kernel, self.heads)

    def project(
        self, tokens: VisualTokens, default: Callable[[VisualTokens], VisualTokens], ctx: Context
    ) -> VisualTokens:
        parts: QueCCParts = ctx.learned
        levels = ctx.tower_features(tokens, self.tower_layers(ctx.depth, ctx.blocks))
        index, inside, centre = windows(tokens, self.kernel)
        off = ~tokens.valid[..., None]
        made = parts(
            tokens.features.masked_fill(off, 0.0).to(parts.dtype),
            levels.masked_fill(off, 0.0).to(parts.dtype),
            ctx.question_state(tokens).to(parts.dtype),
            index,
            inside,
        )
        return default(_in_place(tokens, made, index, inside, centre))


class QueCCParts(nn.Module):
    """The learned parts.

    Args:
        width: D, of the tokens.
        level_width: of the features that are keys and values.
        text_width: of the question's state.
        kernel: k.
        heads: of the attention.

    Raises:
        MMTokenError: the heads do not divide the width.
    """

    def __init__(self, width: int, level_width: int, text_width: int, kernel: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise MMTokenError(f"heads={heads} does not divide the width {width} of the tokens; give a divisor of it.")
        self.text = nn.Sequential(nn.Linear(text_width, width), nn.LayerNorm(width, eps=EPSILON))
        self.query = _mlp(width, width)
        self.key = _mlp(level_width, width)
        self.value = _mlp(level_width, width)
        self.pool = nn.Conv2d(width, width, kernel, stride=kernel, groups=width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.pool.weight.dtype

    def forward(self, features: Tensor, levels: Tensor, text: Tensor, index: Tensor, inside: Tensor) -> Tensor:
        """float[B, C, D]: one token per window.

        Args:
            features: float[B, N, D], patches.
            levels: float[B, N, level width], keys and values.
            text: float[B, text width].
            index: int[B, C, k * k], the patches of each window in raster order.
            inside: bool[B, C, k * k], False where a window reaches over the border.
        """
        query = self.query(features + self.text(text)[:, None])
        assert self.pool.bias is not None
        kernel = self.pool.weight.flatten(1)
        pooled = torch.einsum("bcjd,dj->bcd", _gather(query, index, inside), kernel) + self.pool.bias
        key, value = (_gather(part(levels), index, inside).flatten(0, 1) for part in (self.key, self.value))
        # A window of padding attends to zeros, since softmax over nothing is not a number.
        hidden = ~(inside | ~inside.any(-1, keepdim=True)).flatten(0, 1)
        asked = pooled.flatten(0, 1)[:, None]
        made: Tensor = self.attention(asked, key, value, key_padding_mask=hidden, need_weights=False)[0]
        return made.view(pooled.shape)


def _mlp(width_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width_in, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width, eps=EPSILON)
    )


def _gather(values: Tensor, index: Tensor, inside: Tensor) -> Tensor:
    """float[B, C, J, D] of float[B, N, D] at int[B, C, J], zeros where not inside."""
    flat = index.flatten(1)[..., None].expand(-1, -1, values.shape[-1])
    return values.gather(1, flat).view(*index.shape, -1).masked_fill(~inside[..., None], 0.0)


def windows(tokens: VisualTokens, kernel: int) -> tuple[Tensor, Tensor, Tensor]:
    """The windows of each item, frame by frame in raster order; tokens that are gone leave holes.

    Args:
        tokens: the tokens; separators belong to no window.
        kernel: k.

    Returns:
        (int[B, C, k * k] which tokens, bool[B, C, k * k] whether there is one, int[B, C] the slot next to the centre).
        Windows without any token are left out; rows with fewer are padded with empty ones.
    """
    found, slots = [], []
    places = grid_places(tokens)
    for row, grid in enumerate(tokens.grid):
        mine = tokens.eligible[row].nonzero()[:, 0]
        if grid is None:
            place = torch.arange(len(mine), device=mine.device)
            cells, order = _strips(len(mine), kernel)
        else:
            place = places[row, mine]
            cells, order = _squares(grid, kernel)
        # The token at each place, -1 where it is gone; the last entry is for what lies over the border.
        at = torch.full((max(int(cells.max()), int(place.max())) + 2,), -1, device=mine.device)
        at[place] = mine
        cells = at[cells.to(mine.device)]
        cells = cells[(cells >= 0).any(-1)]
        first = (cells >= 0)[:, order.to(mine.device)].long().argmax(-1)
        found.append(cells)
        slots.append(order.to(mine.device)[first])
    index = torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=-1)
    centre = torch.nn.utils.rnn.pad_sequence(slots, batch_first=True)
    return index.clamp(min=0), index >= 0, centre


def _squares(grid: Grid, kernel: int) -> tuple[Tensor, Tensor]:
    """(int[C, k * k] places on the grid, -1 over the border; int[k * k] slots by distance from the centre)."""
    frames, rows, columns = grid
    down, across = -(-rows // kernel), -(-columns // kernel)
    y = torch.arange(down * kernel).view(1, down, 1, kernel, 1)
    x = torch.arange(across * kernel).view(1, 1, across, 1, kernel)
    place = torch.arange(frames).view(-1, 1, 1, 1, 1) * rows * columns + y * columns + x
    place = place.masked_fill((y >= rows) | (x >= columns), -1)
    slot = torch.arange(kernel) - (kernel - 1) / 2
    return place.reshape(-1, kernel * kernel), (slot[:, None] ** 2 + slot**2).flatten().argsort(stable=True)


def _strips(count: int, kernel: int) -> tuple[Tensor, Tensor]:
    """The same for `count` tokens in a line, k * k to a window."""
    area = kernel * kernel
    place = torch.arange(-(-count // area) * area)
    place = place.masked_fill(place >= count, -1).view(-1, area)
    return place, (torch.arange(area) - (area - 1) / 2).abs().argsort(stable=True)


def _in_place(tokens: VisualTokens, made: Tensor, index: Tensor, inside: Tensor, centre: Tensor) -> VisualTokens:
    """float[B, C, D] as tokens, each at the place of its window's central one, beside the separators."""
    chosen = index.gather(2, centre[..., None])[..., 0]
    real = inside.any(-1)
    size = tokens.size.gather(1, index.flatten(1)).view(index.shape).masked_fill(~inside, 0.0).sum(-1)
    row = torch.arange(len(tokens), device=index.device)[:, None].expand_as(chosen)
    where = (row[real], chosen[real])
    kept = torch.zeros_like(tokens.valid).index_put(where, torch.ones_like(real[real]))
    changed = tokens.replace(
        features=tokens.features.index_put(where, made[real].to(tokens.features.dtype)),
        size=tokens.size.index_put(where, size[real]),
    )
    return changed.where(kept | tokens.protected)
