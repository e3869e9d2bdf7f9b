"""Measurements of a stream."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StreamReport:
    """Measurements of a stream up to now.

    Attributes:
        fps: frames per second that `push` managed, over the last pushes; 0.0 before the first.
        ttft_ms: milliseconds from the last question to the first token of its answer; None before the first question.
        kv_tokens: decoder positions that are held of frames, in the layer that holds the most; the text before the
            video does not count.
        kv_bytes: bytes of held keys and values, the text before the video included.
        frames_held: frames of which something is held.
        frames_seen: frames pushed.
        stored_tokens: positions of frames that have left and may come back for a question.
        stored_bytes: bytes of these.
    """

    fps: float
    ttft_ms: float | None
    kv_tokens: int
    kv_bytes: int
    frames_held: int
    frames_seen: int
    stored_tokens: int
    stored_bytes: int


@dataclass(frozen=True)
class WatchedStep:
    """What a stream did with the step that it watched last.

    Attributes:
        number: 0, 1, ... in the stream.
        time: seconds of its first frame.
        grid: (rows, columns) of its visual tokens as the decoder reads them.
        kept: raster indices of those that entered the decoder; merged tokens count where their representative lies.
        held: rows held of each step that is still there, by its number, oldest first.
    """

    number: int
    time: float
    grid: tuple[int, int]
    kept: tuple[int, ...]
    held: dict[int, int]
