"""The optional decoder libraries. PyAV reads the container first: limits, time stamps and size come from there."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import av

from mmtoken.datasets.media.limits import MediaLimits, Refusal
from mmtoken.datasets.media.pyav import Facts, Frame, Video


class Decoder(Protocol):
    """An open video."""

    facts: Facts

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        """Frames by their place in `facts.times`, ascending."""

    def close(self) -> None:
        """Give the file back."""


class Decord:
    """decord 0.6: fast, unmaintained. It cannot be told apart from a right answer when it is wrong, so what it is
    known to read wrongly (HEVC) or not at all (AV1) is refused here."""

    def __init__(self, handle: int, limits: MediaLimits, threads: int = 1) -> None:
        decord = _library("decord")
        self.facts = _facts(handle, limits)
        if self.facts.codec in ("hevc", "av1", "libdav1d", "libaom-av1"):
            fault = "wrong frames of HEVC" if self.facts.codec == "hevc" else "no AV1"
            raise Refusal(f"is {self.facts.codec} and decord reads {fault}; take backend='pyav'.")
        try:
            self._reader: Any = decord.VideoReader(_path(handle), num_threads=threads)
            count = len(self._reader)
        except Exception as error:  # DECORDError is a plain Exception
            raise _failed("decord", error) from error
        if count != len(self.facts.times):
            raise Refusal(
                f"holds {len(self.facts.times)} frames and decord counts {count}, so it would give wrong ones; take "
                "backend='pyav'."
            )

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        for index in indices:
            try:
                pixels = self._reader[int(index)].asnumpy()
            except Exception as error:
                raise _failed("decord", error) from error
            yield _checked("decord", pixels, self.facts)

    def close(self) -> None:
        self._reader = None


class TorchCodec:
    """torchcodec in its exact mode; its approximate mode takes the wrong frames where the rate varies."""

    def __init__(self, handle: int, limits: MediaLimits, threads: int = 1) -> None:
        library = _library("torchcodec.decoders")
        self.facts = _facts(handle, limits)
        try:
            self._decoder: Any = library.VideoDecoder(
                _path(handle), dimension_order="NHWC", num_ffmpeg_threads=threads, seek_mode="exact"
            )
        except Exception as error:
            raise _failed("torchcodec", error) from error

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        times = self.facts.times
        for index in indices:
            try:
                # By number: by time it takes the next frame where one is shown for longer than its container says.
                shown = self._decoder.get_frame_at(int(index))
                pixels = shown.data.numpy()
            except Exception as error:
                raise _failed("torchcodec", error) from error
            if abs(float(shown.pts_seconds) - times[index]) > self.facts.tick:
                raise Refusal(
                    f"shows another frame at {times[index]:.3f} s by torchcodec ({float(shown.pts_seconds):.3f} s); "
                    "take backend='pyav'."
                )
            yield _checked("torchcodec", pixels, self.facts)

    def close(self) -> None:
        self._decoder = None


def open_decoder(backend: str, handle: int, limits: MediaLimits, threads: int) -> Decoder:
    """The open video of a descriptor, which is closed with it.

    Raises:
        Refusal: the library is missing, or the file cannot be read with it.
    """
    kinds: dict[str, Any] = {"pyav": Video, "decord": Decord, "torchcodec": TorchCodec}
    decoder: Decoder = kinds[backend](handle, limits, threads)
    return decoder


def load_library(backend: str) -> None:
    """Import all that `backend` needs: afterwards no file can be opened, and what libraries cost is known."""
    for module in pkgutil.walk_packages(av.__path__, "av."):  # PyAV imports its parts when a file needs them
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    if backend != "pyav":
        _library("decord" if backend == "decord" else "torchcodec.decoders")


def _library(name: str) -> Any:
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Refusal(
            f"needs {package}, which is not installed; pip install {package}, or take backend='pyav'.", True
        ) from error
    except Exception as error:  # torchcodec says so when it finds no FFmpeg
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise Refusal(f"needs {package}, which does not load ({reason}); take backend='pyav'.", True) from error


def _facts(handle: int, limits: MediaLimits) -> Facts:
    video = Video(os.dup(handle), limits)
    video.close()
    return video.facts


def _path(handle: int) -> str:
    """The open file by a path: these libraries take no descriptor, and the file's own path may lead elsewhere now."""
    return f"/proc/self/fd/{handle}"


def _checked(library: str, pixels: Frame, facts: Facts) -> Frame:
    wanted = (facts.height, facts.width, 3)
    if pixels.shape != wanted:
        raise Refusal(f"has frames of shape {wanted} and {library} gives {pixels.shape}; take backend='pyav'.")
    return pixels


def _failed(library: str, error: Exception) -> Refusal:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return Refusal(f"cannot be decoded by {library} ({reason[:200]}); take backend='pyav', or fetch the file anew.")
