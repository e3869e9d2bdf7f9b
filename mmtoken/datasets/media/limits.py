"""What reading one file may cost. Sizes are compared with what a file claims before anything of it is decoded."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from mmtoken.errors import InputError

MAX_PIXELS = 64_000_000
"""Largest picture or video frame that is decoded: about 200 MB as RGB."""


@dataclass(frozen=True)
class MediaLimits:
    """What one video may claim and what decoding it may use; every field is an upper bound.

    `dataclasses.replace(MediaLimits(), max_duration=1e6)` changes one of them.

    Attributes:
        max_pixels: width x height of a frame, also of one in the middle of a file.
        max_total_pixels: frames x width x height that one call returns; 268 million are 805 MB as RGB.
        max_frames: frames in a file.
        max_duration: seconds from the first frame to the end of the last.
        memory_bytes: address space that the decoding process may use beyond what its libraries take.
        cpu_seconds: processor time of opening a file, and again of each request (one call of `frames_at`, one frame
            of a stream).
        wall_seconds: time that passes for the same; the process is killed when it is over.
    """

    max_pixels: int = MAX_PIXELS
    max_total_pixels: int = 2**28
    max_frames: int = 2_000_000
    max_duration: float = 6 * 3600.0
    memory_bytes: int = 2**31
    cpu_seconds: float = 60.0
    wall_seconds: float = 120.0

    def __post_init__(self) -> None:
        """Refuse what bounds nothing.

        Raises:
            InputError: a field is not a finite number above 0.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value <= 0:
                raise InputError(
                    f"{field.name}={value!r} is no limit; give a number above 0 (default {field.default})."
                )


class Refusal(Exception):
    """Why a file is not read, as the rest of a sentence whose subject is the file; inside this folder only.

    Attributes:
        final: nothing more can be had from this reader, as against one frame that cannot be decoded.
    """

    def __init__(self, reason: str, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final
