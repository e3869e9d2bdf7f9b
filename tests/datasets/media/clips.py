"""Small videos whose frames show their own number, and watches over what is opened."""

from __future__ import annotations

import ctypes
import io
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

WIDTH, HEIGHT, CELL = 64, 48, 16


def encodes(codec: str) -> bool:
    """This build of FFmpeg can write `codec`."""
    try:
        av.codec.Codec(codec, "w")
    except av.FFmpegError:
        return False
    return True


H264 = "libx264" if encodes("libx264") else "mpeg4"


def numbered(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """uint8[H, W, 3] with `number` as twelve bits in cells of black and white, which survive a lossy codec."""
    bits = np.array([number >> bit & 1 for bit in range(12)], np.uint8).reshape(3, 4)
    picture = np.kron(bits, np.ones((CELL, CELL), np.uint8)) * 255
    picture = np.pad(picture, ((0, height - HEIGHT), (0, width - WIDTH)))
    return np.repeat(picture[..., None], 3, axis=2)


def number_of(frame: np.ndarray) -> int:
    """The number that a frame shows."""
    cells = frame[:HEIGHT, :WIDTH].mean(-1).reshape(3, CELL, 4, CELL).mean((1, 3))
    assert (np.abs(cells - 127.5) > 60).all(), cells
    return int(((cells > 127.5).reshape(-1) * 2 ** np.arange(12)).sum())


def clip(
    path: Path,
    ticks: Sequence[int] = tuple(range(0, 3000, 100)),
    clock: int = 3000,
    codec: str = H264,
    options: dict[str, str] | None = None,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    container: dict[str, str] | None = None,
) -> Path:
    """A video whose k-th frame shows k at ticks[k] / clock seconds."""
    with av.open(str(path), "w", options=container or {}) as out:
        stream: Any = out.add_stream(codec, rate=30)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, clock)
        stream.options = options or {}
        for number, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(numbered(number, *size), format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, clock)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def packets(
    path: Path,
    payloads: Sequence[bytes],
    ticks: Sequence[int],
    size: tuple[int, int] = (WIDTH, HEIGHT),
    clock: int = 1000,
    codec: str = "mjpeg",
) -> Path:
    """A video of ready-made pictures under a header that claims `size`."""
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream(codec, rate=30)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, clock)
        for place, (payload, tick) in enumerate(zip(payloads, ticks, strict=True)):
            packet = av.Packet(payload)
            packet.stream, packet.pts, packet.dts = stream, tick, place - 1000
            packet.time_base, packet.is_keyframe = Fraction(1, clock), True
            out.mux(packet)
    return path


def jpeg(number: int = 0, width: int = WIDTH, height: int = HEIGHT, claim: tuple[int, int] | None = None) -> bytes:
    """A JPEG of a number; `claim` is what its header says in place of its size."""
    buffer = io.BytesIO()
    Image.fromarray(numbered(number, width, height)).save(buffer, "JPEG", quality=90, subsampling=2)
    data = bytearray(buffer.getvalue())
    if claim is not None:
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", claim[1], claim[0])
    return bytes(data)


def patched(path: Path, box: bytes, offset: int, new: bytes, times: int = 1) -> Path:
    """Overwrite bytes behind the name of an MP4 box (its contents begin at offset 4, after version and flags)."""
    data = bytearray(path.read_bytes())
    at = -1
    for _ in range(times):
        at = data.index(box, at + 1)
    data[at + 4 + offset : at + 4 + offset + len(new)] = new
    path.write_bytes(data)
    return path


def rotated(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Give an MP4 a display matrix of a, b, c, d, each -1, 0 or 1."""
    a, b, c, d = (value << 16 for value in matrix)
    return patched(path, b"tkhd", 40, struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30))


@contextmanager
def openings(folder: Path) -> Iterator[list[str]]:
    """Names of files in `folder` that any process opened while the block ran (filled at its end), by inotify."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = libc.inotify_init1(os.O_NONBLOCK)
    assert handle >= 0
    names: list[str] = []
    try:
        assert libc.inotify_add_watch(handle, os.fsencode(folder), 0x20) >= 0  # IN_OPEN
        yield names
        while True:
            try:
                data = os.read(handle, 65536)
            except BlockingIOError:
                break
            while data:
                _, _, _, length = struct.unpack_from("iIII", data)
                names.append(data[16 : 16 + length].rstrip(b"\0").decode())
                data = data[16 + length :]
    finally:
        os.close(handle)
