"""RegionMask: hide boxes of an image from the model, and see whether it still knows what was in them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from mmtoken.compressors.base import Budget, Compressor, Context, Positions, check_whole
from mmtoken.errors import InputError, KeepError, MMTokenError
from mmtoken.tokens import VisualTokens

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) as fractions of the item's width and height."""

Fill = Literal["zero", "mean", "drop", "mask"]
Place = Literal["llm_input", "patches"]


@dataclass(frozen=True)
class RegionMask(Compressor):
    """Takes the tokens that given boxes touch away from the language model, or out of the tower.

    No method to save tokens but a probe of what leaks: whatever mixed tokens before the mask acted has carried the
    content of the boxes to their neighbours. At site="patches" the mask acts when the tower's second block begins, so
    one block has mixed; at site="llm_input" the whole tower has. Models that add features of the tower to deeper layers
    of the decoder (Qwen3-VL) do so at filled tokens, too; only dropped and masked ones are spared. There is no budget:
    `keep` is always 1.0.

    Boxes are fractions of an item. A processor that cuts an image into tiles makes each tile an item of its own in
    some models (Idefics3, SmolVLM), and inside the tower every row is a tile or frame; tokens on no grid are refused.

    Differs from the paper, which masks at seven places of one model and publishes no code: the shape of the dilation
    and the filling are ours, and there is no learned token.

    Attributes:
        boxes: boxes for all items, or a list of boxes per item; (left, top, right, bottom) as fractions.
        dilation: r, masked cells grow by a square of 2 r + 1 cells.
        mode: "zero" features; the "mean" of the item's other tokens; "drop" the tokens; or "mask", which leaves them in
            the decoder's sequence where no other token sees them (the same answers as "drop").
        site: "llm_input" after the projector, or "patches" inside the tower.
    """

    keep: int | float = 1.0
    positions: Positions = "keep"
    boxes: tuple[Any, ...] = ()
    dilation: int = 0
    mode: Fill = "drop"
    site: Place = "llm_input"

    title: ClassVar[str] = "RegionMask"
    paper: ClassVar[str] = (
        "Young, Vision Token Masking Alone Cannot Prevent PHI Leakage in Medical Document OCR, 2025, arXiv 2511.18272"
    )
    year: ClassVar[int] = 2025
    merges: ClassVar[bool] = True
    budget: ClassVar[Budget] = "adaptive"
    identity_at_full: ClassVar[bool | str] = (
        "masks its boxes at keep=1.0, the only value; without boxes nothing changes"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep != 1.0 or not isinstance(self.keep, float):
            raise KeepError(f"keep={self.keep!r} means nothing here: RegionMask drops what boxes touch; use keep=1.0.")
        if self.mode not in get_args(Fill):
            raise MMTokenError(f"mode={self.mode!r} is unknown; use one of {', '.join(get_args(Fill))}.")
        if self.site not in get_args(Place):
            raise MMTokenError(f"site={self.site!r} is unknown; use 'llm_input' or 'patches'.")
        check_whole("dilation", self.dilation, lowest=0)
        object.__setattr__(self, "boxes", _frozen(self.boxes))
        object.__setattr__(self, "sites", frozenset({"vision_layer" if self.site == "patches" else "llm_input"}))

    def hides(self) -> bool:
        return self.mode == "mask"

    def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        return self._apply(tokens)

    def vision_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        return self._apply(tokens) if layer == 1 else tokens

    def _apply(self, tokens: VisualTokens) -> VisualTokens:
        if not self.boxes:
            return tokens
        inside = self.region(tokens)
        if self.mode in ("drop", "mask"):
            return tokens.where(~inside)
        filled = tokens.features.clone()
        for row, where in enumerate(inside):
            others = tokens.features[row, tokens.eligible[row] & ~where]
            blank = self.mode == "zero" or not len(others)
            filled[row, where] = 0.0 if blank else others.float().mean(0).to(filled.dtype)
        return tokens.replace(features=filled)

    def region(self, tokens: VisualTokens) -> Tensor:
        """bool[B, N]: the tokens that are masked; separators never are.

        Raises:
            InputError: tokens lie on no grid, or boxes per item do not fit the number of items.
        """
        per_item = bool(self.boxes) and not _is_box(self.boxes[0])
        if per_item and len(self.boxes) != len(tokens):
            raise InputError(
                f"boxes has lists for {len(self.boxes)} items but there are {len(tokens)}; give one per item (inside "
                "the tower per tile or frame), or one list of boxes for all."
            )
        inside = torch.zeros_like(tokens.eligible)
        for row, grid in enumerate(tokens.grid):
            boxes = self.boxes[row] if per_item else self.boxes
            places = tokens.eligible[row].nonzero()[:, 0]
            if not boxes or not len(places):
                continue
            if grid is None or math.prod(grid) != len(places):
                raise InputError(
                    f"boxes cannot be placed: the {len(places)} tokens of item {row} do not fill one grid ({grid}); "
                    "use a single tile, and RegionMask before methods that drop tokens."
                )
            frames, rows, columns = grid
            cells = cells_of(boxes, rows, columns, self.dilation).flatten().repeat(frames).to(places.device)
            # Towers with windows hold tokens in another order than the raster.
            rank = tokens.source[row, places].argsort().argsort()
            inside[row, places] = cells[rank]
        return inside


def cells_of(boxes: Sequence[Box], rows: int, columns: int, dilation: int = 0) -> Tensor:
    """bool[rows, columns]: the cells of a grid that boxes touch, grown by a square of (2 * dilation + 1) cells.

    A box touches a cell if they share an area; sides that lie on an edge between cells touch one of the two only.
    """
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        mask[_span(top, bottom, rows), _span(left, right, columns)] = True
    if dilation:
        grown = max_pool2d(mask[None, None].float(), 2 * dilation + 1, stride=1, padding=dilation)
        mask = grown[0, 0] > 0
    return mask


def _span(low: float, high: float, cells: int) -> slice:
    # A side on an edge must not touch the next cell because of rounding in the fraction.
    first = min(cells - 1, math.floor(low * cells + 1e-9))
    return slice(first, max(first + 1, math.ceil(high * cells - 1e-9)))


def pool_cells(mask: Tensor, stride: int) -> Tensor:
    """bool[R, C] to bool[ceil(R / stride), ceil(C / stride)]: a pooled cell is masked if any of its cells is."""
    pooled = max_pool2d(mask[None, None].float(), stride, ceil_mode=True)
    return pooled[0, 0] > 0


def removal_rates(removed: Mapping[str, Sequence[float]]) -> tuple[dict[str, float], float]:
    """(share of each category's entries that the answer no longer gives away, mean over the categories).

    Args:
        removed: by category, 1 (or True) for each entry that was removed, 0 for each that leaked.

    Raises:
        InputError: there is no category, or one has no entries.
    """
    if not removed or not all(len(entries) for entries in removed.values()):
        raise InputError(f"removed={dict(removed)!r} has nothing to average; give entries for every category.")
    rates = {category: sum(map(float, entries)) / len(entries) for category, entries in removed.items()}
    return rates, sum(rates.values()) / len(rates)


def _is_box(value: object) -> bool:
    return isinstance(value, Sequence) and len(value) == 4 and not any(isinstance(side, Sequence) for side in value)


def _frozen(boxes: object) -> tuple[Any, ...]:
    """Boxes from lists (YAML, JSON) as checked tuples, so that settings can be hashed."""
    if isinstance(boxes, str) or not isinstance(boxes, Sequence):
        raise MMTokenError(f"boxes={boxes!r} is a {type(boxes).__name__}; give a list of boxes, or one per item.")
    if any(map(_is_box, boxes)):
        return tuple(_checked(box, boxes) for box in boxes)
    for entry in boxes:
        if isinstance(entry, str) or not isinstance(entry, Sequence):
            raise MMTokenError(f"boxes={boxes!r} holds {entry!r}; give boxes of four numbers, or lists of them.")
    return tuple(tuple(_checked(box, boxes) for box in entry) for entry in boxes)


def _checked(box: Any, boxes: object) -> Box:
    numbers = _is_box(box) and all(isinstance(side, int | float) and not isinstance(side, bool) for side in box)
    if not numbers or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise MMTokenError(
            f"boxes={boxes!r} holds {box!r}; give (left, top, right, bottom) as fractions from 0 to 1 of the item's "
            "width and height, left below right and top below bottom."
        )
    left, top, right, bottom = (float(side) for side in box)
    return left, top, right, bottom
