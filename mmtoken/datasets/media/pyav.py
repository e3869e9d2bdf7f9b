"""Containers and frames by PyAV. Runs in the decoding process (worker.py), and in the caller's for trusted files."""

from __future__ import annotations

import bisect
import io
import itertools
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from mmtoken.datasets.media.container import KINDS
from mmtoken.datasets.media.limits import MediaLimits, Refusal

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
"""Demuxers that may be used. FFmpeg knows more, some of which (hls, concat) open other files."""

_WALK = 16  # frames decoded rather than sought over: a seek throws away what the decoder holds
_TRIES = 8  # key frames that may be damaged at the beginning of a file that is read all the same

Frame = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Facts:
    """What is known of a video once it is open.

    Attributes:
        times: float64[N], seconds at which each frame is shown first, ascending.
        end: seconds at which the last frame ends.
        tick: seconds per step of the container's clock.
        width, height: pixels, of the frame as it is shown.
        codec: FFmpeg's name of the decoder.
    """

    times: npt.NDArray[np.float64]
    end: float
    tick: float
    width: int
    height: int
    codec: str


class _File:
    """A descriptor as PyAV wants it. FFmpeg is given no path, so it has none that it could build others from."""

    name = "video"

    def __init__(self, handle: int) -> None:
        self._file = io.FileIO(handle, "rb", closefd=True)

    def read(self, size: int) -> bytes:
        return self._file.read(size) or b""

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """FFmpeg's errors as refusals."""
    try:
        yield
    except (av.FFmpegError, ValueError, OverflowError) as error:
        if isinstance(error, MemoryError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise Refusal(f"{what} ({' '.join(reason.split())}); the file is damaged or no video, give {KINDS}.") from error


class Video:
    """One video stream, its frames found by their time stamps.

    Args:
        handle: a descriptor of the file, which is closed with this object.
        limits: what the file may claim.
        threads: decoding threads.

    Raises:
        Refusal: nothing in the file can be shown, or it claims more than `limits`.
    """

    def __init__(self, handle: int, limits: MediaLimits, threads: int = 1) -> None:
        self._limits = limits
        self._file = _File(handle)
        self._container: Any = None
        try:
            with _explained("cannot be opened"):
                self._container = av.open(
                    self._file,
                    options={
                        "format_whitelist": FORMATS,
                        "protocol_whitelist": "none",
                        "max_streams": "64",
                        "max_pixels": str(int(limits.max_pixels)),  # FFmpeg decodes a little to find out what it has
                    },
                    metadata_errors="ignore",
                    buffer_size=131072,
                )
            self._stream = _video_stream(self._container)
            context = self._stream.codec_context
            check_size(context.width, context.height, limits)
            self._check_duration(float(self._stream.duration or 0) * float(self._stream.time_base))
            # `explode`: what does not decode as it should is an error and no guess. `max_pixels`: frames grow, too.
            context.options = {"err_detect": "explode", "max_pixels": str(int(limits.max_pixels))}
            context.thread_type = "AUTO" if threads > 1 else "NONE"
            context.thread_count = threads
            with _explained("cannot be read"):
                self._index()
            self._damage: list[tuple[float, float]] = []
            self._decoded: Iterator[Any] | None = None
            self._last: Any = None
            self._size: tuple[int, int] | None = None
            first = self._first()
            self._size = first.shape[1], first.shape[0]
        except BaseException:
            self.close()
            raise
        tick = float(self._stream.time_base)
        self.facts = Facts(
            times=np.array(self._pts, dtype=np.float64) * tick,
            end=self._end * tick,
            tick=tick,
            width=first.shape[1],
            height=first.shape[0],
            codec=str(context.name),
        )

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        """Frames by their place in `facts.times`, ascending; uint8[H, W, 3] each.

        Raises:
            Refusal: a frame cannot be decoded; the others still can.
        """
        for index in indices:
            yield self._at(index)

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
        self._file.close()

    def _check_duration(self, seconds: float) -> None:
        if seconds > self._limits.max_duration:
            raise Refusal(
                f"claims to last {seconds:.6g} s, above max_duration={self._limits.max_duration:g}; cut it, or raise "
                "that limit."
            )

    def _index(self) -> None:
        """Time stamps of all frames, by reading packets without decoding them.

        Counts and durations in headers are claims, so nothing is sized by them.
        """
        stream = self._stream
        # A container without a duration per stream is measured against all of them, to see that nothing is missing.
        watched = self._container.streams if stream.duration is None else [stream]
        stamps: set[int] = set()
        keys: list[int] = []
        ends: dict[int, int] = {}
        last = 0.0
        for packet in self._container.demux(list(watched)):
            if packet.size == 0:
                continue
            when = packet.pts if packet.pts is not None else packet.dts
            if when is None:
                continue
            last = max(last, (when + (packet.duration or 0)) * float(packet.time_base))
            if packet.stream_index != stream.index or packet.is_discard:
                continue
            if packet.is_keyframe:
                keys.append(when)
            stamps.add(when)
            ends[when] = when + (packet.duration or 0)
            if len(stamps) > self._limits.max_frames:
                raise Refusal(
                    f"holds more than max_frames={self._limits.max_frames} frames; cut it, or raise that limit."
                )
        self._keys = sorted(set(keys))
        # Behind a cut that did not fall on a key frame there are some that have nothing to build on.
        self._pts = sorted(when for when in stamps if keys and when >= self._keys[0])
        if not self._pts:
            raise Refusal(f"holds no frame that can be shown; give {KINDS}.")
        gaps = [after - before for before, after in zip(self._pts, self._pts[1:], strict=False)]
        final = self._pts[-1]
        self._end = max(ends[final], final + 1)
        if ends[final] == final:
            self._end = final + max(1, int(statistics.median(gaps)) if gaps else 1)
        self._check_duration((self._end - self._pts[0]) * float(stream.time_base))
        self._check_whole(last)

    def _check_whole(self, last: float) -> None:
        """Refuse a file whose data end before what its header announces."""
        stream = self._stream
        if stream.duration is not None:
            announced = ((stream.start_time or 0) + stream.duration) * float(stream.time_base)
        elif self._container.duration is not None:
            announced = self._container.duration / av.time_base  # Matroska's duration counts from 0
        else:
            return
        if announced - last > 0.1 + 0.02 * announced:
            raise Refusal(
                f"is cut off: its header announces {announced:.2f} s and its data end at {last:.2f} s; fetch or "
                "record it anew."
            )

    def _first(self) -> Frame:
        """The first frame that can be decoded, or that of a later key frame: its size is that of the video."""
        refusals = []
        for when in [self._pts[0], *self._keys[1:_TRIES]]:
            try:
                return self._at(bisect.bisect_left(self._pts, when))
            except Refusal as refusal:
                refusals.append(refusal)
        raise refusals[0]

    def _at(self, index: int) -> Frame:
        when = self._pts[index]
        for low, high in self._damage:
            if low <= when < high:
                raise self._damaged(when)
        key = bisect.bisect_right(self._keys, when) - 1
        reached = -1 if self._last is None else bisect.bisect_left(self._pts, self._last.pts)
        behind = self._last is None or self._last.pts > when
        far = not behind and bisect.bisect_left(self._pts, self._keys[key]) - reached > _WALK
        if self._decoded is None or behind or far:
            self._seek(self._keys[key])
        frame = self._walk(when)
        if frame is None:  # damage on the way, from which a key frame may have recovered
            self._seek(self._keys[key])
            frame = self._walk(when)
        if frame is None:  # the decoder wants to start earlier than at this key frame
            self._seek(None)
            frame = self._walk(when)
        if frame is None:
            self._lose(index)
            raise self._damaged(when)
        return self._picture(frame)

    def _seek(self, key: int | None) -> None:
        """Go to the last key frame at or before `key`, or to the beginning."""
        self._last = None
        start = min(self._keys[0], 0) if key is None else key
        with _explained("cannot be sought in"):
            self._container.seek(start, stream=self._stream, backward=True, any_frame=False)
        self._decoded = self._decode()

    def _decode(self) -> Iterator[Any]:
        """Frames in the order they are shown, from where the container stands, up to one that is damaged."""
        started = False
        for packet in self._container.demux(self._stream):
            if packet.size and not started:
                if not packet.is_keyframe:
                    continue
                started = True
            try:
                yield from packet.decode()
            except (av.FFmpegError, ValueError) as error:
                if isinstance(error, MemoryError):
                    raise
                self._spoil(packet.pts)
                return

    def _spoil(self, when: int | None) -> None:
        """Mark everything from the last frame that came out to the next key frame as damaged."""
        after = self._keys[0] if self._last is None else self._last.pts + 1
        around = after if when is None else max(after, when)
        following = bisect.bisect_right(self._keys, around)
        low = after if self._last is not None else min(around, self._keys[max(following - 1, 0)])
        high = self._keys[following] if following < len(self._keys) else float("inf")
        self._damage.append((low, high))

    def _walk(self, when: int) -> Any:
        """Decode up to the frame shown at `when`; None if it cannot be had from where the decoder stands."""
        if self._last is not None and self._last.pts == when:
            return self._last
        assert self._decoded is not None
        known = len(self._damage)
        try:
            for frame in self._decoded:
                if frame.pts is None:
                    continue
                before, self._last = self._last, frame
                if before is None and frame.pts > when:
                    return None
                if before is not None and (frame.pts < before.pts or self._skipped(before.pts, frame.pts)):
                    self._check_forwards(min(before.pts, frame.pts), frame)
                    self._lose(bisect.bisect_right(self._pts, before.pts))
                    break
                if frame.is_corrupt:
                    self._lose(bisect.bisect_left(self._pts, frame.pts))
                    break
                if frame.pts >= when:
                    return frame if frame.pts == when else before
        except av.FFmpegError as error:  # from the demuxer
            if isinstance(error, MemoryError):
                raise
            self._spoil(None)
        self._decoded = None
        if len(self._damage) == known:  # the end, or a decoder that gave nothing for what it got
            self._lose(bisect.bisect_left(self._pts, when))
        if any(low <= when < high for low, high in self._damage):
            raise self._damaged(when)
        return None

    def _skipped(self, before: int, now: int) -> bool:
        """No frame came out for a time stamp in between."""
        if self._stream.codec_context.name == "vp8":  # has packets that are never shown
            return False
        following = bisect.bisect_right(self._pts, before)
        return following < len(self._pts) and self._pts[following] < now

    def _check_forwards(self, before: int, frame: Any) -> None:
        """Tell frames in the wrong order, which is the whole file's fault, from a frame that is missing.

        Raises:
            Refusal: what comes next is earlier.
        """
        assert self._decoded is not None
        following = [frame.pts, *(later.pts for later in itertools.islice(self._decoded, _WALK))]
        known = [when for when in following if when is not None]
        if known != sorted(known) or known[0] <= before:
            self._decoded = self._last = None
            raise Refusal(
                f"has time stamps that run backwards behind {self._seconds(before)}, so it is unknown which frame "
                "belongs there; write it anew as MP4 or MKV."
            )

    def _lose(self, index: int) -> None:
        """Mark a frame as damaged, and those up to the next key frame, which may be built on it."""
        following = bisect.bisect_right(self._keys, self._pts[index])
        high = self._keys[following] if following < len(self._keys) else float("inf")
        self._damage.append((self._pts[index], high))

    def _picture(self, frame: Any) -> Frame:
        check_size(frame.width, frame.height, self._limits)
        with _explained(f"has pixels at {self._seconds(frame.pts)} that cannot be turned into RGB"):
            pixels: Frame = frame.to_ndarray(format="rgb24")
        # FFmpeg's angle counts counterclockwise, as rot90 does.
        pixels = np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90) % 4))
        if self._size is not None and (pixels.shape[1], pixels.shape[0]) != self._size:
            width, height = self._size
            raise Refusal(
                f"changes its size at {self._seconds(frame.pts)}: {pixels.shape[1]} x {pixels.shape[0]} after "
                f"{width} x {height}; cut it there."
            )
        return pixels

    def _seconds(self, when: float) -> str:
        return f"{when * float(self._stream.time_base):.3f} s"

    def _damaged(self, when: int) -> Refusal:
        return Refusal(f"is damaged at {self._seconds(when)}; take another time, or fetch the file anew.")


class Camera:
    """Frames of a camera as they come, by FFmpeg's Video4Linux input.

    Raises:
        Refusal: the device is missing, busy or no camera.
    """

    def __init__(self, path: str, limits: MediaLimits) -> None:
        self._limits = limits
        try:
            self._container = av.open(path, format="v4l2", options={"max_pixels": str(int(limits.max_pixels))})
        except (av.FFmpegError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise Refusal(f"cannot be opened ({reason}); give a camera that is there and free.", True) from error
        self._frames = self._container.decode(_video_stream(self._container))
        self._start: float | None = None

    def read(self) -> tuple[float, Frame]:
        """The next frame and its time in seconds after the first.

        Raises:
            Refusal: the camera stopped.
        """
        try:
            frame = next(self._frames)
        except StopIteration:
            raise Refusal("gives no more frames; start anew.", True) from None
        except av.FFmpegError as error:
            raise Refusal(f"stopped ({error.strerror}); start anew.", True) from error
        check_size(frame.width, frame.height, self._limits)
        now = float(frame.time or 0.0)
        self._start = now if self._start is None else self._start
        return now - self._start, frame.to_ndarray(format="rgb24")

    def close(self) -> None:
        self._container.close()


def check_size(width: int, height: int, limits: MediaLimits) -> None:
    """Refuse a frame of no pixels, or of more than allowed.

    Raises:
        Refusal: it is one of these.
    """
    if width < 1 or height < 1:
        # FFmpeg says the same of a size above the limit that it was given.
        raise Refusal(
            f"claims frames of {width} x {height} pixels, or of more than max_pixels={limits.max_pixels}; scale it "
            f"down, raise that limit, or give {KINDS}."
        )
    if width * height > limits.max_pixels:
        raise Refusal(
            f"claims frames of {width} x {height} = {width * height} pixels, above max_pixels={limits.max_pixels}; "
            "scale it down, or raise that limit."
        )


def _video_stream(container: Any) -> Any:
    """The first video stream that is no cover picture of a sound file."""
    for stream in container.streams.video:
        if stream.codec_context is None:
            raise Refusal(f"holds video in a form that is not supported here; give {KINDS} with H.264 in it.")
        if "attached_pic" not in str(stream.disposition.name).lower():
            return stream
    raise Refusal(f"has no video in it; give {KINDS} with a video stream.")
