"""Pages as tensors: tiles, the prompt around them, packed questions, and what is on every patch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage
from torch import Tensor

from mmtoken.datasets.document_pages import (
    BARS,
    CHARACTERS,
    KINDS,
    LABELS,
    QUESTION_TYPES,
    REGION,
    REGIONS,
    Page,
    Region,
)
from mmtoken.datasets.shapes_qa import Box
from mmtoken.models.tiny_document.processor import (
    ASSISTANT_ID,
    BOS_ID,
    EOS_ID,
    IMAGE_ID,
    MEAN,
    PAD_ID,
    PATCH_SIZE,
    STD,
    TOKENS,
    VOCABULARY,
    build_tokenizer,
)
from mmtoken.training.packing import Encoded, Packed, pack

_SIDE = REGION // PATCH_SIZE
TILES = REGIONS + 1
PREFIX = 1 + TILES * (TOKENS + 2) + 1
"""`<bos>`, a mark and a place before each tile, the tiles, and a mark behind the last one."""
_ID = {word: i for i, word in enumerate(VOCABULARY)}
_tokenizer = cache(build_tokenizer)


@cache
def prefix_ids(rows: int, columns: int) -> tuple[int, ...]:
    """Token ids before the question on a page of that many regions, as the processor writes them."""
    mark, visual = _ID["<fake_token_around_image>"], (IMAGE_ID,) * TOKENS
    ids = [BOS_ID]
    for row in range(rows):
        for column in range(columns):
            ids += [mark, _ID[f"<row_{row + 1}_col_{column + 1}>"], *visual]
    return (*ids, mark, _ID["<global-img>"], *visual, mark)


@cache
def encode(question: str, answer: str, type: str) -> Encoded:
    """A question with its answer as the chat template writes them."""
    tokenizer = _tokenizer()
    prompt = [*tokenizer(question, add_special_tokens=False).input_ids, ASSISTANT_ID]
    reply = [*tokenizer(answer, add_special_tokens=False).input_ids, EOS_ID]
    return Encoded((*prompt, *reply), len(prompt), QUESTION_TYPES.index(type))


def pack_pages(pages: Sequence[Page]) -> Packed:
    """The questions of every page, packed."""
    return pack([[encode(q.text, q.answer, q.type) for q in page.questions] for page in pages], PREFIX, PAD_ID)


def prefixes(pages: Sequence[Page]) -> Tensor:
    """int64[B, P]: token ids before the questions."""
    return torch.tensor([prefix_ids(page.rows, page.columns) for page in pages])


def tiles(pages: Sequence[Page]) -> Tensor:
    """float[B, 7, 3, 48, 48], as the image processor makes them: crops row by row, then the whole page."""
    out = np.empty((len(pages), TILES, REGION, REGION, 3), dtype=np.uint8)
    for b, page in enumerate(pages):
        grid = page.image.reshape(page.rows, REGION, page.columns, REGION, 3)
        out[b, :-1] = grid.swapaxes(1, 2).reshape(REGIONS, REGION, REGION, 3)
        whole = PILImage.fromarray(page.image).resize((REGION, REGION), PILImage.Resampling.BILINEAR)
        out[b, -1] = np.asarray(whole)
    return ((torch.from_numpy(out).permute(0, 1, 4, 2, 3).float() / 255 - MEAN) / STD).contiguous()


def patch_labels(pages: Sequence[Page], least: float = 0.3) -> Tensor:
    """int64[4, B, 6, 64]: character, field, bar colour and height of the bar on each patch of the crops, 0 for none.

    A patch shows the character or bar that covers most of it, if that is at least the fraction `least`. Heights are 1
    for the highest bar of a figure, 2 for the lowest, 3 for others.
    """
    labels = np.zeros((4, len(pages), REGIONS, _SIDE, _SIDE), dtype=np.int64)
    for b, page in enumerate(pages):
        for r, region in enumerate(page.regions):
            best = np.full((_SIDE, _SIDE), least)
            for classes, (x0, y0, x1, y1) in _content(region):
                x, y, _, _ = region.box
                share = np.outer(_overlap(y0 - y, y1 - y), _overlap(x0 - x, x1 - x))
                wins = share >= best
                best = np.where(wins, share, best)
                labels[:, b, r, wins] = np.array(classes)[:, None]
    return torch.from_numpy(labels.reshape(4, len(pages), REGIONS, _SIDE * _SIDE))


def _content(region: Region) -> list[tuple[tuple[int, int, int, int], Box]]:
    """Classes and box of everything in a region that is read off patches."""
    found = []
    for c in region.characters:
        field = next((LABELS.index(name) + 1 for name, _, box in region.fields if _inside(c.box, box)), 0)
        found.append(((CHARACTERS.index(c.text) + 1, field, 0, 0), c.box))
    tops = sorted(box[1] for _, box in region.bars)
    for name, box in region.bars:
        height = 1 if box[1] == tops[0] else 2 if box[1] == tops[-1] else 3
        found.append(((0, 0, list(BARS).index(name) + 1, height), box))
    return found


def _inside(inner: Box, outer: Box) -> bool:
    return all(a >= b for a, b in zip(inner[:2], outer[:2], strict=True)) and all(
        a <= b for a, b in zip(inner[2:], outer[2:], strict=True)
    )


def kind_labels(pages: Sequence[Page]) -> Tensor:
    """int64[B, 64]: the kind of region under the centre of each patch of the whole page."""
    at = (np.arange(_SIDE) + 0.5) / _SIDE
    labels = []
    for page in pages:
        kinds = np.array([KINDS.index(r.kind) for r in page.regions]).reshape(page.rows, page.columns)
        rows, columns = (at * page.rows).astype(int), (at * page.columns).astype(int)
        labels.append(kinds[rows][:, columns].reshape(-1))
    return torch.from_numpy(np.stack(labels))


_EDGES: NDArray[np.int64] = np.arange(_SIDE) * PATCH_SIZE


def _overlap(low: int, high: int) -> NDArray[np.float64]:
    """Fraction of each patch, along one axis, that lies in low..high."""
    inside: NDArray[np.int64] = np.minimum(high, _EDGES + PATCH_SIZE) - np.maximum(low, _EDGES)
    share: NDArray[np.float64] = np.maximum(inside, 0) / PATCH_SIZE
    return share
