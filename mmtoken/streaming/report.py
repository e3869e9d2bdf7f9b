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
