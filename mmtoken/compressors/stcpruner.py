"""STC-Pruner: of every frame of a stream, keep what differs from the frame itself and from all that came before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from mmtoken.compressors.base import Budget, Compressor, Context, Parity, Positions, check_whole
from mmtoken.errors import InputError, MMTokenError, UnsupportedError
from mmtoken.tokens import VisualTokens, frame_places, kept_count, refuse_nan

Score = Literal["gaussian", "dual_anchor"]
Memory = Literal["running", "window"]
Newlines = Literal["append", "in_place"]

BANDWIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
"""Of the Gaussian kernel."""


@dataclass(frozen=True)
class STCPruner(Compressor):
    """Streaming Token Compression, the pruner: a budget of tokens per frame, chosen before the language model.

    Frames are taken in order. Of a frame only the channels that vary least are looked at. Its anchors are the mean of
    its own tokens and the mean of what has been seen so far; the tokens that are far from both stay. What is remembered
    of a video is one vector and a count (memory="running") or `window` vectors, however long it is: a stream carries it
    from push to push, and `generate()` works through a video in the same way, with the same result. Images are videos
    of one frame, crops of a picture included. Newline tokens at the ends of rows stay where they are.

    `keep` is a number of tokens per frame (64 of 196 in the authors' scripts), or a share of each frame.

    Differs from the official code: it appends the newlines of a frame after the frame's kept tokens, which would need
    tokens to change places (`with_newlines` has that order); it keeps a growing list where here a running mean gives
    the same; and its memory outlives the video.

    Attributes:
        score: "gaussian": a sum of Gaussian kernels of the distances to both anchors, lowest first (official code's
            default). "dual_anchor": `alpha` times the cosine distance to the memory plus 1 - `alpha` times that to the
            frame, highest first (paper).
        alpha: weight of the memory in "dual_anchor".
        channel_ratio: share of channels that are looked at, those with the lowest variance in the frame.
        memory: "running": the mean over all frames up to and with this one, position by position, where channels are
            ordered by rising variance in each frame (official code). "window": the mean tokens of the last `window`
            frames before this one, channel by channel (paper); of a first frame, its own.
        window: frames that memory="window" reaches back. The paper has such a bound and its value was not found; 64 is
            ours.
        chunk_frames: frames that are decided at once, from common channels and, with memory="running", a common memory.
            A stream decides every step by itself, so it needs 1.
    """

    keep: int | float = 64
    positions: Positions = "renumber"
    score: Score = "gaussian"
    alpha: float = 0.5
    channel_ratio: float = 0.5
    memory: Memory = "running"
    window: int = 64
    chunk_frames: int = 1

    title: ClassVar[str] = "STC-Pruner"
    paper: ClassVar[str] = (
        "Wang et al., Accelerating Streaming Video Large Language Models via Hierarchical Token Compression, "
        "CVPR 2026, arXiv 2512.00891"
    )
    year: ClassVar[int] = 2026
    parity: ClassVar[Parity] = "official code"
    licence: ClassVar[str] = "written from the formulas, Apache-2.0; the official code has no licence file, unused"
    budget: ClassVar[Budget] = "adaptive"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in ("gaussian", "dual_anchor"):
            raise MMTokenError(f"score={self.score!r} is unknown; use 'gaussian' or 'dual_anchor'.")
        if self.memory not in ("running", "window"):
            raise MMTokenError(f"memory={self.memory!r} is unknown; use 'running' or 'window'.")
        for field, lowest in (("alpha", "0"), ("channel_ratio", "above 0")):
            value = getattr(self, field)
            if not isinstance(value, float) or not (0 <= value <= 1) or (field == "channel_ratio" and value == 0):
                raise MMTokenError(f"{field}={value!r} is no such share; give a float from {lowest} to 1.0.")
        check_whole("window", self.window, lowest=1)
        check_whole("chunk_frames", self.chunk_frames, lowest=1)

    def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        if ctx.streaming and self.chunk_frames > 1:
            raise UnsupportedError(
                f"chunk_frames={self.chunk_frames} waits for later frames, which a stream does not have; use 1."
            )
        features = tokens.features.detach().float()
        refuse_nan(features - features, tokens.eligible, "features")  # infinities become NaN
        mask = tokens.protected.clone()
        # A new dictionary each time, and histories that never change: whoever keeps a copy of `memory` can go back.
        histories: dict[int, History] = dict(ctx.memory.get("histories", {}))
        for row in range(len(tokens)):
            frames = frame_places(tokens, row)
            history = histories.get(row, History())
            for first in range(0, len(frames), self.chunk_frames):
                places = frames[first : first + self.chunk_frames]
                scores = self.read([features[row, place] for place in places], history)
                history = scores.history
                for place, total in zip(places, scores.total, strict=True):
                    mask[row, place[lowest(total, kept_count(self.keep, len(place)))]] = True
            histories[row] = history
        ctx.memory["histories"] = histories
        return tokens.where(mask)

    def read(self, frames: Sequence[Tensor], history: History) -> Scores:
        """Score a chunk of frames, each float[P, D], after `history`."""
        return score_chunk(
            frames,
            history,
            score=self.score,
            alpha=self.alpha,
            channel_ratio=self.channel_ratio,
            memory=self.memory,
            window=self.window,
        )


@dataclass(frozen=True)
class History:
    """What is remembered of a video.

    Attributes:
        mean: float32[C], the mean of the chunk means, positions by rising variance; None at the start.
        chunks: how many there were.
        recent: float32[D] mean tokens of the last frames, oldest first (memory="window" only).
    """

    mean: Tensor | None = None
    chunks: int = 0
    recent: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Scores:
    """Scores of a chunk; tokens with the lowest total stay.

    Attributes:
        channels: int[C], those that are looked at, by rising variance.
        frame, memory: per frame float32[P], the parts that come from the frame's own anchor and from the memory.
        total: per frame float32[P].
        history: what is remembered after the chunk.
    """

    channels: Tensor
    frame: list[Tensor]
    memory: list[Tensor]
    total: list[Tensor]
    history: History


def score_chunk(
    frames: Sequence[Tensor],
    history: History,
    *,
    score: Score = "gaussian",
    alpha: float = 0.5,
    channel_ratio: float = 0.5,
    memory: Memory = "running",
    window: int = 64,
) -> Scores:
    """Score the tokens of some consecutive frames.

    Args:
        frames: float[P, D] each; P may differ.
        history: of the frames before them.
        score, alpha, channel_ratio, memory, window: see `STCPruner`.

    Raises:
        InputError: there is no frame, a frame has no token, or a width differs from that of earlier frames.
    """
    if not frames or any(not len(frame) for frame in frames):
        raise InputError(f"frames has {[len(frame) for frame in frames]} tokens; give at least one frame and token.")
    frames = [frame.detach().float() for frame in frames]
    width = frames[0].shape[-1]
    known = [history.recent[-1].shape[-1]] if history.recent else []
    if any(frame.shape[-1] != width for frame in frames) or any(other != width for other in known):
        raise InputError("frames of one video differ in width; start a new History for another model.")
    channels = quiet_channels(torch.cat(list(frames)), channel_ratio)
    looked = [frame[:, channels] for frame in frames]
    if memory == "running":
        mean = torch.cat(looked).mean(0)
        if history.mean is not None:
            if history.mean.shape != mean.shape:
                raise InputError("frames of one video differ in width; start a new History for another model.")
            mean = history.mean + (mean - history.mean) / (history.chunks + 1)
        after = History(mean, history.chunks + 1)
        anchors = [mean] * len(frames)
    else:
        recent, anchors = list(history.recent), []
        for frame in frames:
            own = frame.mean(0)
            anchors.append((torch.stack(recent).mean(0) if recent else own)[channels])
            recent = [*recent, own][-window:]
        after = History(None, history.chunks + 1, tuple(recent))
    by_frame, by_memory, total = [], [], []
    for tokens, anchor in zip(looked, anchors, strict=True):
        if score == "gaussian":
            unit = normalize(tokens, dim=-1)
            # The frame's anchor is a mean of unit vectors and no unit vector itself, unlike the memory's.
            by_frame.append(kernel((unit - unit.mean(0)).square().sum(-1)))
            by_memory.append(kernel((unit - normalize(anchor, dim=-1)).square().sum(-1)))
            total.append(by_frame[-1] + by_memory[-1])
        else:
            by_frame.append(1 - cosine_similarity(tokens, tokens.mean(0, keepdim=True), dim=-1))
            by_memory.append(1 - cosine_similarity(tokens, anchor[None], dim=-1))
            total.append(-(alpha * by_memory[-1] + (1 - alpha) * by_frame[-1]))
    return Scores(channels, by_frame, by_memory, total, after)


def quiet_channels(tokens: Tensor, ratio: float) -> Tensor:
    """int[max(1, int(D * ratio))]: channels of tokens float[N, D] with the lowest population variance, lowest first."""
    count = max(1, int(tokens.shape[-1] * ratio))
    return tokens.float().var(0, correction=0).argsort(stable=True)[:count]


def kernel(squared: Tensor) -> Tensor:
    """Sum of Gaussian kernels exp(-d^2 / 2a) of squared distances d^2, over `BANDWIDTHS` a; 5 at distance 0."""
    result = torch.zeros_like(squared)
    for bandwidth in BANDWIDTHS:
        result += torch.exp(-squared / (2 * bandwidth))
    return result


def lowest(scores: Tensor, count: int) -> Tensor:
    """int[K], ascending: the `count` lowest of float[N]; of equal ones the first."""
    return scores.argsort(stable=True)[:count].sort().values


def with_newlines(kept: Tensor, rows: int, columns: int, newlines: Newlines = "in_place") -> Tensor:
    """Carry what is kept of a frame over to its tokens with a newline after each row, all newlines included.

    Args:
        kept: int[K], ascending, of the rows * columns tokens.
        rows, columns: of the frame.
        newlines: "in_place": each at the end of its row. "append": all after the kept tokens (official code).

    Returns:
        int[K + rows], indices into rows * (columns + 1) tokens, in the order in which they are fed.
    """
    tokens = kept + kept // columns
    ends = torch.arange(rows, device=kept.device) * (columns + 1) + columns
    both = torch.cat([tokens, ends])
    return both if newlines == "append" else both.sort().values
