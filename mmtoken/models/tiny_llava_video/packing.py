"""Clips as tensors: frames, and questions packed behind them, each asked at its own moment.

The decoder's sequence is `<bos>`, 16 tokens of each frame, then every question: a newline token, the question, the
answer. A question sees `<bos>`, the frames shown before it, and itself, at the positions that it would have if it were
asked alone after these frames; so each is computed as `generate` would, and the clip is computed once.

Some clips are made harder in ways that token compression makes them, so that a compressed prompt is not new to the
model: tokens are missing, with the positions of the rest closed up or left as they were, or positions jump between
frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmtoken.datasets.moving_shapes import DIRECTIONS, QUESTION_TYPES, Clip
from mmtoken.datasets.shapes_qa import COLORS, IMAGE_SIZE, SHAPES
from mmtoken.models.tiny_llava.processor import ASSISTANT_ID, EOS_ID, MEAN, PAD_ID, STD
from mmtoken.models.tiny_llava_video.processor import FRAME_TOKENS, VIDEO_ID, build_tokenizer

_tokenizer = cache(build_tokenizer)


@dataclass(frozen=True)
class Gaps:
    """How often, and how, visual tokens and positions are disturbed in training.

    Attributes:
        missing: fraction of clips of which visual tokens are missing at random.
        fewest: smallest fraction of tokens left in these; uniform from there to 1.
        closed: fraction of these in which the positions of what is left are closed up.
        jumps: fraction of the other clips in which positions jump between frames.
        furthest: largest position that jumps lead to.
    """

    missing: float = 0.2
    fewest: float = 0.4
    closed: float = 0.5
    jumps: float = 0.15
    furthest: int = 1200


@dataclass(frozen=True)
class ClipBatch:
    """B clips of F frames with questions, S text positions each, Q questions at most, V = 16 F visual tokens.

    `frames` uint8[B, F, 96, 96, 3]; `kept` bool[B, V] visual tokens that are there; `visual_positions` int[B, V].
    Text: `text` (token ids, `VIDEO_ID` stands for the newline), `labels` (the id to predict, -100: none), `question`
    (-1: padding), `seen` (frames shown before it), `text_positions`, all int[B, S]. `types` int[B, Q], -1 for none.
    `objects` int[B, V, 4]: colour, shape, direction and place in the order of appearance of the object on a token, -1
    where there is none or it cannot be known yet.
    """

    frames: Tensor
    kept: Tensor
    visual_positions: Tensor
    text: Tensor
    labels: Tensor
    question: Tensor
    seen: Tensor
    text_positions: Tensor
    types: Tensor
    objects: Tensor

    def to(self, device: torch.device) -> ClipBatch:
        return ClipBatch(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})

    def pixels(self) -> Tensor:
        """float[B * F, 3, 96, 96], as the video processor normalises them."""
        flat = self.frames.flatten(0, 1).permute(0, 3, 1, 2)
        return ((flat.float() / 255 - MEAN) / STD).contiguous()

    def positions(self) -> Tensor:
        """int64[B, 1 + V + S]: positions of the whole sequence."""
        start = self.visual_positions.new_zeros(len(self.frames), 1)
        return torch.cat([start, self.visual_positions, self.text_positions], dim=1).long()

    def mask(self) -> Tensor:
        """bool[B, 1, 1 + V + S, 1 + V + S]: what each position sees."""
        batch, visual = self.kept.shape
        length = self.text.shape[1]
        device = self.kept.device
        prefix = 1 + visual
        start = torch.ones(batch, 1, dtype=torch.bool, device=device)
        there = torch.cat([start, self.kept], dim=1)
        itself = torch.eye(prefix, dtype=torch.bool, device=device)  # a token that is missing still needs one to see
        causal = torch.ones(prefix, prefix, dtype=torch.bool, device=device).tril()
        seen = torch.zeros(batch, prefix + length, prefix + length, dtype=torch.bool, device=device)
        seen[:, :prefix, :prefix] = causal & (there[:, None, :] | itself)
        frame = torch.arange(visual, device=device) // FRAME_TOKENS
        shown = torch.cat(
            [start[:, None].expand(-1, length, -1), frame < self.seen[..., None]],
            dim=2,
        )
        seen[:, prefix:, :prefix] = shown & there[:, None, :]
        late = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        seen[:, prefix:, prefix:] = (self.question[:, :, None] == self.question[:, None, :]) & late
        return seen[:, None]


@cache
def encode(question: str, answer: str) -> tuple[tuple[int, ...], int]:
    """Token ids of a newline, a question and its answer with `<eos>`, and how many come before the answer."""
    tokenizer = _tokenizer()
    prompt = [VIDEO_ID, *tokenizer(question, add_special_tokens=False).input_ids, ASSISTANT_ID]
    reply = [*tokenizer(answer, add_special_tokens=False).input_ids, EOS_ID]
    return (*prompt, *reply), len(prompt)


def pack_clips(
    clips: Sequence[Clip], gaps: Gaps | None = None, rng: np.random.Generator | None = None, multiple: int = 8
) -> ClipBatch:
    """Clips of one length as a batch.

    Args:
        clips: at least one, all with as many frames.
        gaps: disturbances; None: none.
        rng: draws them.
        multiple: the whole sequence gets a length that this divides, by padding; attention kernels like that.
    """
    frames = np.stack([clip.frames for clip in clips])
    count, length = frames.shape[:2]
    visual = length * FRAME_TOKENS
    kept, at, ends = _layout(count, length, gaps, rng)
    rows = [[(*encode(q.text, q.answer), q) for q in clip.questions] for clip in clips]
    # The last <eos> of an answer is predicted, never read.
    longest = max(sum(len(ids) - 1 for ids, _, _ in row) for row in rows)
    longest += -(1 + visual + longest) % multiple
    text = np.full((count, longest), PAD_ID, dtype=np.int32)
    labels = np.full_like(text, -100)
    question = np.full_like(text, -1)
    seen = np.zeros_like(text)
    where = np.zeros_like(text)
    types = np.full((count, max(map(len, rows))), -1, dtype=np.int32)
    for b, row in enumerate(rows):
        start = 0
        for q, (ids, prompt, one) in enumerate(row):
            end = start + len(ids) - 1
            text[b, start:end] = ids[:-1]
            labels[b, start + prompt - 1 : end] = ids[prompt:]
            question[b, start:end] = q
            seen[b, start:end] = one.seen
            where[b, start:end] = ends[b, one.seen] + np.arange(end - start)
            types[b, q] = QUESTION_TYPES.index(one.type)
            start = end
    arrays = (frames, kept, at, text, labels, question, seen, where, types, object_labels(clips))
    return ClipBatch(*(torch.from_numpy(v) for v in arrays))


_CELLS = int(FRAME_TOKENS**0.5)
_EDGES: NDArray[np.int64] = np.arange(_CELLS) * (IMAGE_SIZE // _CELLS)


def object_labels(clips: Sequence[Clip], least: float = 0.3) -> NDArray[np.int8]:
    """`ClipBatch.objects`: a token shows an object if at least the fraction `least` of it lies there.

    The direction is known from the second frame in which an object is visible.
    """
    length = len(clips[0].frames)
    labels = np.full((len(clips), length, _CELLS, _CELLS, 4), -1, dtype=np.int8)
    colors, shapes, directions = list(COLORS), SHAPES, list(DIRECTIONS)
    for b, clip in enumerate(clips):
        for order, o in enumerate(clip.objects):
            boxes = np.array(o.boxes)
            x, y = (_share(boxes[:, axis], boxes[:, axis + 2]) for axis in (0, 1))
            frame, row, column = np.nonzero(y[:, :, None] * x[:, None, :] >= least)
            way = np.where(frame > 0, directions.index(o.direction), -1)
            labels[b, o.start + frame, row, column, 0] = colors.index(o.color)
            labels[b, o.start + frame, row, column, 1] = shapes.index(o.shape)
            labels[b, o.start + frame, row, column, 2] = way
            labels[b, o.start + frame, row, column, 3] = order
    return labels.reshape(len(clips), length * FRAME_TOKENS, 4)


def _share(low: NDArray[np.int64], high: NDArray[np.int64]) -> NDArray[np.float64]:
    """Fraction of low[n]..high[n] in each cell along one axis, float64[n, 4]."""
    inside = np.minimum(high[:, None], _EDGES + IMAGE_SIZE // _CELLS) - np.maximum(low[:, None], _EDGES)
    share: NDArray[np.float64] = np.maximum(inside, 0) / (high - low)[:, None]
    return share


def _layout(
    count: int, length: int, gaps: Gaps | None, rng: np.random.Generator | None
) -> tuple[NDArray[np.bool_], NDArray[np.int32], NDArray[np.int32]]:
    """Tokens that are there bool[B, V], positions int32[B, V], and the position after each frame int32[B, 1 + F]."""
    visual = length * FRAME_TOKENS
    kept = np.ones((count, visual), dtype=bool)
    at = np.tile(1 + np.arange(visual, dtype=np.int32), (count, 1))
    if gaps is not None and rng is not None:
        for b in range(count):
            if rng.random() < gaps.missing:
                kept[b] = rng.random(visual) < rng.uniform(gaps.fewest, 1)
                if rng.random() < gaps.closed:
                    at[b] = np.maximum(np.cumsum(kept[b]), 1)
            elif rng.random() < gaps.jumps and visual < gaps.furthest:
                room = int(rng.integers(gaps.furthest - visual + 1))
                jump = np.sort(rng.integers(0, room + 1, length)).astype(np.int32)
                at[b] += np.repeat(jump, FRAME_TOKENS)
    ends = np.ones((count, 1 + length), dtype=np.int32)
    ends[:, 1:] = at[:, FRAME_TOKENS - 1 :: FRAME_TOKENS] + 1
    return kept, at, ends


def answered(batch: ClipBatch, predicted: Tensor) -> Tensor:
    """bool[B, Q]: whether every token of the answer is predicted, from ids int64[labelled positions]."""
    labelled = batch.labels >= 0
    wrong = predicted != batch.labels[labelled]
    errors = torch.zeros(batch.types.shape, dtype=torch.long, device=wrong.device)
    row = torch.nonzero(labelled)[:, 0]
    errors.index_put_((row, batch.question[labelled].long()), wrong.long(), accumulate=True)
    return errors == 0
