"""Packs several questions about one picture into one sequence.

Every question sees `<bos>`, the picture and itself, never another question, and its positions start anew after the
picture, so each one is computed exactly as if it had been asked alone; the picture is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmtoken.datasets.shapes_qa import COLORS, IMAGE_SIZE, QUESTION_TYPES, SHAPES, Sample
from mmtoken.models.tiny_llava.processor import ASSISTANT_ID, EOS_ID, MEAN, PAD_ID, PATCH_SIZE, STD, build_tokenizer

# Added to the attention scores of what must not be seen. Eager attention adds its mask, so it has to be a float.
BLOCKED = -1e4
_SIDE = IMAGE_SIZE // PATCH_SIZE
VISUAL_TOKENS = _SIDE * _SIDE
PREFIX = 1 + VISUAL_TOKENS
_COLOR_IDS = {c: i for i, c in enumerate(COLORS)}
_SHAPE_IDS = {s: i for i, s in enumerate(SHAPES)}


@dataclass(frozen=True)
class Packed:
    """Questions about B pictures, S text positions for each; the prefix of `<bos>` and 64 visual tokens is left out.

    `text`, `labels` and `question` are int64[B, S]: token ids, the id each position has to predict (-100: none), and
    which question a position belongs to (-1: padding). `positions` is int64[B, 65 + S], `mask` float[B, 1, 65 + S,
    65 + S], both with the prefix. `types` is int64[B, Q]: index into `QUESTION_TYPES`, -1 where a picture has fewer.
    """

    text: Tensor
    labels: Tensor
    question: Tensor
    positions: Tensor
    mask: Tensor
    types: Tensor

    def to(self, device: torch.device) -> Packed:
        return Packed(**{name: tensor.to(device) for name, tensor in vars(self).items()})


@cache
def encode(question: str, answer: str) -> tuple[tuple[int, ...], int]:
    """Token ids of a question with its answer, as the chat template writes them, and how many come before the answer.

    The final `<eos>` is included.
    """
    tokenizer = _tokenizer()
    prompt = [*tokenizer(question, add_special_tokens=False).input_ids, ASSISTANT_ID]
    reply = [*tokenizer(answer, add_special_tokens=False).input_ids, EOS_ID]
    return (*prompt, *reply), len(prompt)


_tokenizer = cache(build_tokenizer)


def pack(samples: Sequence[Sample]) -> Packed:
    """Lay out the questions of every sample one behind the other; padding is at the end."""
    rows = [[encode(q.text, q.answer) for q in sample.questions] for sample in samples]
    # The last <eos> of an answer is predicted, never read.
    length = max(sum(len(ids) - 1 for ids, _ in row) for row in rows)
    text = np.full((len(rows), length), PAD_ID, dtype=np.int64)
    labels = np.full_like(text, -100)
    question = np.full_like(text, -1)
    offset = np.zeros_like(text)
    types = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int64)
    for b, (row, sample) in enumerate(zip(rows, samples, strict=True)):
        start = 0
        for q, (ids, prompt) in enumerate(row):
            end = start + len(ids) - 1
            text[b, start:end] = ids[:-1]
            labels[b, start + prompt - 1 : end] = ids[prompt:]
            question[b, start:end] = q
            offset[b, start:end] = np.arange(end - start)
            types[b, q] = QUESTION_TYPES.index(sample.questions[q].type)
            start = end
    whole = PREFIX + length
    seen = np.zeros((len(rows), whole, whole), dtype=bool)
    seen[:, :PREFIX, :PREFIX] = np.tri(PREFIX, dtype=bool)
    seen[:, PREFIX:, :PREFIX] = True
    seen[:, PREFIX:, PREFIX:] = (question[:, :, None] == question[:, None, :]) & np.tri(length, dtype=bool)
    mask = torch.zeros(seen.shape).masked_fill_(torch.from_numpy(~seen), BLOCKED)[:, None]
    prefix = np.broadcast_to(np.arange(PREFIX), (len(rows), PREFIX))
    positions = np.concatenate([prefix, PREFIX + offset], axis=1)
    return Packed(
        text=torch.from_numpy(text),
        labels=torch.from_numpy(labels),
        question=torch.from_numpy(question),
        positions=torch.from_numpy(positions),
        mask=mask,
        types=torch.from_numpy(types),
    )


def pixels(samples: Sequence[Sample]) -> Tensor:
    """float[B, 3, 96, 96], as the image processor normalises them."""
    images = torch.from_numpy(np.stack([sample.image for sample in samples]))
    return ((images.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD).contiguous()


def pair_labels(samples: Sequence[Sample]) -> Tensor:
    """float[B, 48]: 1 where the picture holds an object of that colour and shape."""
    labels = torch.zeros(len(samples), len(COLORS) * len(SHAPES))
    for b, sample in enumerate(samples):
        for o in sample.objects:
            labels[b, _COLOR_IDS[o.color] * len(SHAPES) + _SHAPE_IDS[o.shape]] = 1
    return labels


def patch_labels(samples: Sequence[Sample], least: float = 0.3) -> Tensor:
    """int64[3, B, 64]: colour, shape and digit on each patch, 0 for none.

    A patch shows the object or digit that covers most of it, if that is at least the fraction `least`.
    """
    labels = np.zeros((3, len(samples), _SIDE, _SIDE), dtype=np.int64)
    for b, sample in enumerate(samples):
        best = np.full((_SIDE, _SIDE), least)
        content = [(o.box, (_COLOR_IDS[o.color] + 1, _SHAPE_IDS[o.shape] + 1, 0)) for o in sample.objects]
        content += [(box, (0, 0, d + 1)) for box, d in zip(sample.digit_boxes, sample.number, strict=True)]
        for (x0, y0, x1, y1), classes in content:
            share = np.outer(_overlap(y0, y1), _overlap(x0, x1))
            wins = share >= best
            best = np.where(wins, share, best)
            labels[:, b, wins] = np.array(classes)[:, None]
    return torch.from_numpy(labels.reshape(3, len(samples), VISUAL_TOKENS))


_EDGES: NDArray[np.int64] = np.arange(_SIDE) * PATCH_SIZE


def _overlap(low: int, high: int) -> NDArray[np.float64]:
    """Fraction of each patch, along one axis, that lies in low..high."""
    inside: NDArray[np.int64] = np.minimum(high, _EDGES + PATCH_SIZE) - np.maximum(low, _EDGES)
    share: NDArray[np.float64] = np.maximum(inside, 0) / PATCH_SIZE
    return share
