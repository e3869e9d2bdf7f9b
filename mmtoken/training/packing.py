"""Packs several questions about one picture into one sequence.

Every question sees the prefix (`<bos>`, the picture and what marks it) and itself, never another question, and its
positions start anew after the prefix, so each one is computed exactly as if it had been asked alone; the picture is
computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Added to the attention scores of what must not be seen. Eager attention adds its mask, so it has to be a float.
BLOCKED = -1e4


@dataclass(frozen=True)
class Packed:
    """Questions about B pictures, S text positions for each; the prefix of P tokens is left out.

    `text`, `labels` and `question` are int64[B, S]: token ids, the id each position has to predict (-100: none), and
    which question a position belongs to (-1: padding). `positions` is int64[B, P + S], `mask` float[B, 1, P + S,
    P + S], both with the prefix. `types` is int64[B, Q]: number of the question type, -1 where a picture has fewer.
    """

    text: Tensor
    labels: Tensor
    question: Tensor
    positions: Tensor
    mask: Tensor
    types: Tensor

    def to(self, device: torch.device) -> Packed:
        return Packed(**{name: tensor.to(device) for name, tensor in vars(self).items()})


@dataclass(frozen=True)
class Encoded:
    """Token ids of a question with its answer and the final `<eos>`, how many come before the answer, and its type."""

    ids: tuple[int, ...]
    prompt: int
    type: int


def pack(rows: Sequence[Sequence[Encoded]], prefix: int, pad_id: int) -> Packed:
    """Lay out the questions of every picture one behind the other; padding is at the end.

    Args:
        rows: questions of each picture.
        prefix: P, tokens before the questions.
        pad_id: token id of padding.
    """
    # The last <eos> of an answer is predicted, never read.
    length = max(sum(len(e.ids) - 1 for e in row) for row in rows)
    text = np.full((len(rows), length), pad_id, dtype=np.int64)
    labels = np.full_like(text, -100)
    question = np.full_like(text, -1)
    offset = np.zeros_like(text)
    types = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int64)
    for b, row in enumerate(rows):
        start = 0
        for q, one in enumerate(row):
            end = start + len(one.ids) - 1
            text[b, start:end] = one.ids[:-1]
            labels[b, start + one.prompt - 1 : end] = one.ids[one.prompt :]
            question[b, start:end] = q
            offset[b, start:end] = np.arange(end - start)
            types[b, q] = one.type
            start = end
    whole = prefix + length
    seen = np.zeros((len(rows), whole, whole), dtype=bool)
    seen[:, :prefix, :prefix] = np.tri(prefix, dtype=bool)
    seen[:, prefix:, :prefix] = True
    seen[:, prefix:, prefix:] = (question[:, :, None] == question[:, None, :]) & np.tri(length, dtype=bool)
    mask = torch.zeros(seen.shape).masked_fill_(torch.from_numpy(~seen), BLOCKED)[:, None]
    before = np.broadcast_to(np.arange(prefix), (len(rows), prefix))
    positions = np.concatenate([before, prefix + offset], axis=1)
    return Packed(
        text=torch.from_numpy(text),
        labels=torch.from_numpy(labels),
        question=torch.from_numpy(question),
        positions=torch.from_numpy(positions),
        mask=mask,
        types=torch.from_numpy(types),
    )


def answered(packed: Packed, predicted: Tensor) -> Tensor:
    """bool[B, Q]: whether every token of the answer is predicted, from ids int64[labelled positions]."""
    labelled = packed.labels >= 0
    wrong = predicted != packed.labels[labelled]
    errors = torch.zeros(packed.types.shape, dtype=torch.long, device=wrong.device)
    row = torch.nonzero(labelled)[:, 0]
    errors.index_put_((row, packed.question[labelled]), wrong.long(), accumulate=True)
    return errors == 0
