"""Frames of a video by time, decoded outside this process."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from mmtoken.datasets.media.container import open_regular
from mmtoken.datasets.media.limits import MediaLimits, Refusal
from mmtoken.datasets.media.process import DecodingProcess
from mmtoken.errors import InputError, UnknownNameError, near_names

BACKENDS = ("pyav", "decord", "torchcodec")
"""The first is the default; docs/media.md says what each gets wrong."""


_LEFT_BY_FORKS: list[Any] = []
"""Decoders of the process that this one was forked from: never closed, which could wait for threads that are not here.
There is at most one per reader and fork."""


class VideoReader:
    """A video file whose frames are addressed by time.

    A frame is shown from its time stamp to that of the next, so each time from the first stamp to the end names one
    frame, also where the frame rate varies. Nothing is decoded in this process unless `trusted` says so: a separate
    one that imports no torch, has limits of memory and time and can open no other file does it. It may crash or hang;
    here that is an error. docs/media.md says what each backend gets wrong.

    A reader may be used by several threads (one at a time gets frames), may be pickled (the copy opens the file anew)
    and may cross a fork (the child opens the file anew at its first use).

    Args:
        path: an MP4, MOV, MKV, WebM or AVI file.
        backend: "pyav"; "decord" for trusted files only; "torchcodec" if it is installed.
        limits: what the file may claim and decoding may use; `MediaLimits()` by default.
        trusted: the file comes from a source that you trust. PyAV then reads in this process, which starts faster and
            has no limits of memory and time.
        threads: decoding threads.
        field: how messages name the input.

    Attributes:
        times: float64[N], seconds, the time stamp of each frame, ascending. The first need not be 0.
        duration: seconds from `times[0]` to the end of the last frame.
        size: (width, height) in pixels, upright.
        codec: FFmpeg's name of the video's format, "h264" for example.

    Raises:
        InputError: no such file, no video, damaged, or beyond a limit.
        UnknownNameError: no such backend.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        backend: str = "pyav",
        limits: MediaLimits | None = None,
        trusted: bool = False,
        threads: int = 1,
        field: str = "video",
    ) -> None:
        if not isinstance(path, str | os.PathLike):
            raise InputError(f"{field}={path!r} is a {type(path).__name__}; give the path of a video file.")
        if backend not in BACKENDS:
            raise UnknownNameError(f"backend={backend!r} is unknown{near_names(backend, BACKENDS)}")
        if backend == "decord" and not trusted:
            raise InputError(
                "backend='decord' reads trusted files only: damaged ones abort it; pass trusted=True if you know where "
                "the file comes from, or take backend='pyav'."
            )
        if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 64:
            raise InputError(f"threads={threads!r}; give a whole number from 1 to 64.")
        self._path = str(Path(path).absolute())  # a pickled reader may wake up in another folder
        self._name = f"{field}={os.fspath(path)!r}"
        self._made = (os.fspath(path), backend, limits, trusted, threads, field)
        self._backend, self._trusted, self._threads = backend, trusted, threads
        self.limits = MediaLimits() if limits is None else limits
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._decoding: Any = None
        self._closed = False
        with self._named():
            facts = self._open()
        self.times: npt.NDArray[np.float64] = facts["times"]
        self._end: float = facts["end"]
        self._tick: float = facts["tick"]
        self.size: tuple[int, int] = facts["width"], facts["height"]
        self.codec: str = facts["codec"]
        self.duration: float = self._end - float(self.times[0])

    def __len__(self) -> int:
        """Frames in the file."""
        return len(self.times)

    def __repr__(self) -> str:
        width, height = self.size
        seen = f"{width} x {height}, {len(self)} frames, {self.duration:.2f} s, {self.codec}"
        return f"VideoReader({self._made[0]!r}, {seen})"

    def frames_at(self, times: Iterable[float]) -> npt.NDArray[np.uint8]:
        """The frames shown at some times, in the order asked for.

        Times are compared to half a tick of the file's clock, so that 1/30 finds a frame stamped 33 ms. What is
        before the first frame gives that one.

        Args:
            times: seconds, any number, in any order.

        Returns:
            uint8[K, H, W, 3].

        Raises:
            InputError: a time is no number or after the end, the frames are more than `max_total_pixels`, or one of
                them cannot be decoded.
        """
        return self._read(self._indices(times))

    def sample(self, count: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
        """`count` frames uniform in time: those shown at the centres of `count` equal slices of the video.

        A video of fewer frames gives some of them more than once.

        Returns:
            uint8[count, H, W, 3] and the time stamps of the frames, float64[count].

        Raises:
            InputError: `count` is no whole number above 0, or as in `frames_at`.
        """
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError(f"count={count!r}; give a whole number of frames, at least 1.")
        self._check_total(count)
        wanted = self.times[0] + (np.arange(count) + 0.5) * self.duration / count
        indices = self._indices(wanted)
        return self._read(indices), self.times[indices]

    def stream(self, fps: float | None = None) -> Iterator[tuple[npt.NDArray[np.uint8], float]]:
        """Frames one after the other; memory is that of one frame, however long the video.

        A frame that cannot be decoded raises an InputError, and the next call of `next` gives the one after it.

        Args:
            fps: frames per second: those shown at 0, 1 / fps, 2 / fps, ... seconds after the first. A frame that is
                shown longer than that comes once. None: every frame.

        Yields:
            uint8[H, W, 3] and the frame's time stamp in seconds.

        Raises:
            InputError: `fps` is no number above 0, or a frame cannot be decoded.
        """
        return _Frames(self, range(len(self)) if fps is None else self._thinned(check_fps(fps)))

    def __iter__(self) -> Iterator[tuple[npt.NDArray[np.uint8], float]]:
        return self.stream()

    def close(self) -> None:
        """End the decoding process and close the file; a second time does nothing."""
        self._closed = True
        self._let_go()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_decoding", None) is not None:
            with contextlib.suppress(Exception):
                self._let_go()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self._path, *self._made[1:])

    def _open(self) -> dict[str, Any]:
        handle = open_regular(self._path)
        if self._trusted and self._backend == "pyav":
            from mmtoken.datasets.media.pyav import Video

            self._decoding = video = Video(handle, self.limits, self._threads)  # which closes the handle
            return vars(video.facts)
        try:
            process = DecodingProcess(self.limits, {"backend": self._backend, "threads": self._threads}, handle)
        finally:
            os.close(handle)
        self._decoding = process
        try:
            return _facts(process, self.limits)
        except BaseException:
            self._let_go()
            raise

    def _read(self, indices: npt.NDArray[np.intp]) -> npt.NDArray[np.uint8]:
        self._check_total(len(indices))
        if self._closed:
            raise InputError(f"{self._name} is closed; open it again.")
        if os.getpid() != self._owner:
            # A fork. The lock may be held by a thread that is not here, and so may locks of a decoder that ran in the
            # same process: it is left as it lies.
            if isinstance(self._decoding, DecodingProcess):
                self._let_go()
            elif self._decoding is not None:
                _LEFT_BY_FORKS.append(self._decoding)
                self._decoding = None
            self._lock, self._owner = threading.Lock(), os.getpid()
        width, height = self.size
        order, back = np.unique(indices, return_inverse=True)
        found = np.empty((len(order), height, width, 3), np.uint8)
        with self._lock, self._named():
            if self._decoding is None:
                facts = self._open()
                if not np.array_equal(facts["times"], self.times) or (facts["width"], facts["height"]) != self.size:
                    raise Refusal("is another file now; make a new reader.")
            try:
                if isinstance(self._decoding, DecodingProcess):
                    for _ in self._decoding.frames(order.tolist(), self.size, found):
                        pass
                else:
                    for place, frame in enumerate(self._decoding.frames(order.tolist())):
                        found[place] = frame
            except Refusal as refusal:
                if refusal.final:
                    self._let_go()
                raise
            except BaseException:  # Ctrl-C in the middle of a reply: what follows in the pipe belongs to nothing
                self._let_go()
                raise
        return found if np.array_equal(back, np.arange(len(order))) else found[back]

    def _let_go(self) -> None:
        decoding, self._decoding = self._decoding, None
        if decoding is not None:
            decoding.close()

    def _indices(self, times: Iterable[float]) -> npt.NDArray[np.intp]:
        try:
            wanted = np.asarray(times if isinstance(times, np.ndarray) else list(times), dtype=np.float64)
        except (TypeError, ValueError):
            raise InputError(f"times={times!r}; give a list of numbers, in seconds.") from None
        if wanted.ndim != 1:
            raise InputError(f"times has shape {wanted.shape}; give a list of numbers, in seconds.")
        slack = self._tick / 2 + 1e-9
        bad = ~np.isfinite(wanted) | (wanted > self._end + slack)
        if bad.any():
            raise InputError(
                f"times={float(wanted[bad][0])!r} is not in {self._name}; give times from {self.times[0]:.3f} to "
                f"{self._end:.3f} seconds."
            )
        return np.maximum(np.searchsorted(self.times, wanted + slack, side="right") - 1, 0)

    def _thinned(self, fps: float) -> Iterator[int]:
        """Places of the frames of a stream at `fps`, found as they are asked for."""
        slack = self._tick / 2 + 1e-9
        before, step = -1, 0
        while (when := float(self.times[0]) + step / fps) < self._end - slack:
            index = int(np.searchsorted(self.times, when + slack, side="right")) - 1
            if index != before:
                yield index
            before = index
            # The next step at which another frame is shown: frames that last for hours do not keep us here.
            following = float(self.times[index + 1]) if index + 1 < len(self) else math.inf
            if following == math.inf:
                return
            step = max(step + 1, math.ceil((following - slack - float(self.times[0])) * fps))

    def _check_total(self, count: int) -> None:
        width, height = self.size
        if count * width * height > self.limits.max_total_pixels:
            raise InputError(
                f"{self._name}: {count} frames of {width} x {height} are {count * width * height} pixels, above "
                f"max_total_pixels={self.limits.max_total_pixels}; take fewer at a time, or raise that limit."
            )

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except Refusal as refusal:
            error = InputError(f"{self._name} {refusal}")
            error.__cause__ = refusal
            raise error from refusal


class _Frames:
    """An iterator that goes on after an error about one frame, which a generator cannot."""

    def __init__(self, reader: VideoReader, indices: Iterable[int]) -> None:
        self._reader, self._indices = reader, iter(indices)
        self._over = False

    def __iter__(self) -> _Frames:
        return self

    def __next__(self) -> tuple[npt.NDArray[np.uint8], float]:
        if self._over:
            raise StopIteration
        index = next(self._indices)
        try:
            frame = self._reader._read(np.array([index]))[0]
        except InputError as error:
            cause = error.__cause__
            self._over = not isinstance(cause, Refusal) or cause.final
            raise
        return frame, float(self._reader.times[index])


def check_fps(fps: float) -> float:
    """`fps` if it is a number of frames per second.

    Raises:
        InputError: it is not.
    """
    number = isinstance(fps, int | float) and not isinstance(fps, bool)
    if not number or not math.isfinite(fps) or fps <= 0:
        raise InputError(f"fps={fps!r}; give a number of frames per second above 0.")
    return float(fps)


def _facts(process: DecodingProcess, limits: MediaLimits) -> dict[str, Any]:
    """What the process says of the file, checked: it has worked on the file and may be in the file's hands."""
    header, stamps = process.header, process.payload
    times = np.frombuffer(stamps, np.float64, len(stamps) // 8)
    numbers = all(isinstance(header.get(name), int | float) for name in ("end", "tick", "width", "height"))
    good = (
        numbers
        and len(times) > 0
        and bool(np.isfinite(times).all() and (np.diff(times) > 0).all())
        and math.isfinite(header["end"])
        and times[-1] < header["end"] <= times[0] + limits.max_duration * 1.001
        and 0 < header["tick"] < math.inf
        and min(header["width"], header["height"]) >= 1
        and header["width"] * header["height"] <= limits.max_pixels
    )
    if not good:
        raise Refusal("made its decoder answer with nonsense; do not use this file.", True)
    return {
        "times": times,
        "end": float(header["end"]),
        "tick": float(header["tick"]),
        "width": int(header["width"]),
        "height": int(header["height"]),
        "codec": str(header.get("codec")),
    }


def _reopen(
    path: str, backend: str, limits: MediaLimits | None, trusted: bool, threads: int, field: str
) -> VideoReader:
    return VideoReader(path, backend=backend, limits=limits, trusted=trusted, threads=threads, field=field)
