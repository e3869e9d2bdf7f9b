"""Frames from wherever they come: a video file, a folder of pictures, a camera."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mmtoken.datasets.media.container import is_camera
from mmtoken.datasets.media.images import read_image
from mmtoken.datasets.media.limits import MediaLimits, Refusal
from mmtoken.datasets.media.process import DecodingProcess
from mmtoken.datasets.media.video import VideoReader, check_fps
from mmtoken.errors import InputError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
"""Names of files that a folder is searched for, in either case."""

TimedFrame = tuple[npt.NDArray[np.uint8], float]


class FrameSource(Iterator[TimedFrame]):
    """An iterator of (uint8[H, W, 3], seconds) that is closed when it is done with.

    `next` raises an InputError for a frame that cannot be had; the next call goes on with the one after it, and ends
    the iteration if there can be none.

    Attributes:
        kind: what the frames come from.
        end: seconds at which the last frame ends, None for a camera.
    """

    def __init__(
        self,
        kind: Literal["file", "folder", "camera"],
        frames: Iterator[TimedFrame],
        end: float | None,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.kind = kind
        self.end = end
        self._frames = frames
        self._close = close

    def __next__(self) -> TimedFrame:
        return next(self._frames)

    def close(self) -> None:
        """Give files and devices back; a second time does nothing."""
        self._close()

    def __enter__(self) -> FrameSource:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def open_frames(
    source: str | os.PathLike[str],
    fps: float | None = None,
    *,
    backend: str = "pyav",
    limits: MediaLimits | None = None,
    trusted: bool = False,
    field: str = "video",
) -> FrameSource:
    """The frames of a video file, a folder of pictures or a camera, one at a time.

    Args:
        source: a file; a folder; or `/dev/videoN`, on Linux. Reading a camera has been tested for its errors only,
            never with a camera.
        fps: frames per second. File and camera: frames in between are left out. Folder: the rate at which its
            pictures were taken. None: every frame of a file or camera; a picture per second.
        backend, limits, trusted, field: as in `VideoReader`; a folder and a camera use `limits` and `field`.

    Raises:
        InputError: there is nothing to read there.
    """
    if fps is not None:
        check_fps(fps)
    if isinstance(source, str | os.PathLike):
        if is_camera(os.fspath(source)):
            return _camera(os.fspath(source), fps, limits or MediaLimits(), field)
        if Path(source).is_dir():
            return frames_of_folder(source, 1.0 if fps is None else fps, limits=limits, field=field)
    reader = VideoReader(source, backend=backend, limits=limits, trusted=trusted, field=field)
    return FrameSource("file", reader.stream(fps), float(reader.times[0]) + reader.duration, reader.close)


def frames_of_folder(
    path: str | os.PathLike[str], fps: float = 1.0, *, limits: MediaLimits | None = None, field: str = "video"
) -> FrameSource:
    """The pictures of a folder in natural order (2.png before 10.png), the k-th at k / fps seconds.

    Pictures are read as they are asked for, upright and RGB. All must have the size of the first that can be read; one
    that has not, or is damaged, raises an InputError, and the next call of `next` goes on behind it.

    Raises:
        InputError: no such folder, no picture in it, more than `max_frames`, or longer than `max_duration`.
    """
    check_fps(fps)
    limits = limits or MediaLimits()
    name = f"{field}={os.fspath(path)!r}"
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{name} is no folder; give one with pictures in it.")
    files = sorted((file for file in folder.iterdir() if file.suffix.lower() in PICTURES), key=_natural)
    if not files:
        raise InputError(f"{name} holds no pictures ({', '.join(PICTURES)}); give a folder with some.")
    if len(files) > limits.max_frames or len(files) / fps > limits.max_duration:
        raise InputError(
            f"{name} holds {len(files)} pictures, {len(files) / fps:.6g} s at fps={fps:g}, above max_frames="
            f"{limits.max_frames} or max_duration={limits.max_duration:g}; take fewer, or raise that limit."
        )
    return FrameSource("folder", _Pictures(files, fps, limits, field), len(files) / fps)


class _Pictures(Iterator[TimedFrame]):
    def __init__(self, files: list[Path], fps: float, limits: MediaLimits, field: str) -> None:
        self._files = iter(enumerate(files))
        self._fps, self._limits, self._field = fps, limits, field
        self._size: tuple[int, int] | None = None

    def __next__(self) -> TimedFrame:
        place, file = next(self._files)
        image = read_image(file, max_pixels=self._limits.max_pixels, field=self._field)
        if self._size is None:
            self._size = image.size
        if image.size != self._size:
            (width, height), (first, second) = image.size, self._size
            raise InputError(
                f"{self._field}={str(file)!r} is {width} x {height} pixels after {first} x {second}; give pictures of "
                "one size."
            )
        return np.array(image), place / self._fps


class _Live(Iterator[TimedFrame]):
    def __init__(self, process: DecodingProcess, name: str, fps: float | None) -> None:
        self._process, self._name, self._fps = process, name, fps
        self._next = 0.0
        self._over = False

    def __next__(self) -> TimedFrame:
        if self._over:
            raise StopIteration
        while True:
            try:
                time, frame = self._process.camera_frame()
            except Refusal as refusal:
                self._over = refusal.final
                raise InputError(f"{self._name} {refusal}") from refusal
            if self._fps is None or time >= self._next - 1e-6:
                self._next = time if self._fps is None else max(self._next + 1 / self._fps, time)
                return frame, time


def _camera(path: str, fps: float | None, limits: MediaLimits, field: str) -> FrameSource:
    name = f"{field}={path!r}"
    if not Path(path).exists():
        raise InputError(f"{name} does not exist; give a camera that is there, a video file or a folder of pictures.")
    try:
        process = DecodingProcess(limits, {"backend": "pyav", "threads": 1, "camera": path})
    except Refusal as refusal:
        raise InputError(f"{name} {refusal}") from refusal
    return FrameSource("camera", _Live(process, name, fps), None, process.close)


def _natural(file: Path) -> list[Any]:
    """Digits count as numbers."""
    parts = re.split(r"(\d+)", file.name)
    return [(int(part) if place % 2 else 0, part.lower()) for place, part in enumerate(parts)] + [(0, file.name)]
