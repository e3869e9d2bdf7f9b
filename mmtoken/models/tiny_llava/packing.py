"""Samples as tensors: pictures, packed questions, and what the auxiliary losses read off CLS and the patches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmtoken.datasets.shapes_qa import COLORS, IMAGE_SIZE, QUESTION_TYPES, SHAPES, Sample
from mmtoken.models.tiny_llava.processor import ASSISTANT_ID, EOS_ID, MEAN, PAD_ID, PATCH_SIZE, STD, build_tokenizer
from mmtoken.training import packing
from mmtoken.training.packing import Encoded, Packed

_SIDE = IMAGE_SIZE // PATCH_SIZE
VISUAL_TOKENS = _SIDE * _SIDE
PREFIX = 1 + VISUAL_TOKENS
_COLOR_IDS = {c: i for i, c in enumerate(COLORS)}
_SHAPE_IDS = {s: i for i, s in enumerate(SHAPES)}


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
    """The questions of every sample, packed."""
    rows = []
    for sample in samples:
        encoded = [(encode(q.text, q.answer), QUESTION_TYPES.index(q.type)) for q in sample.questions]
        rows.append([Encoded(ids, prompt, kind) for (ids, prompt), kind in encoded])
    return packing.pack(rows, PREFIX, PAD_ID)


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
