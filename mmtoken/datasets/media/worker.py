"""The decoding process: reads one video and nothing else, within limits of memory and time. Imports no torch.

Started by process.py as `python -m mmtoken.datasets.media.worker`, with requests on its standard input.
"""

from __future__ import annotations

import json
import math
import os
import resource
import traceback
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mmtoken.datasets.media.decoders import Decoder, load_library, open_decoder
from mmtoken.datasets.media.limits import MediaLimits, Refusal
from mmtoken.datasets.media.pyav import Camera
from mmtoken.datasets.media.wire import LENGTHS, lengths, pack


def main() -> None:
    """Serve requests until the reader goes away."""
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print must not get between the replies
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 0)
    source: Decoder | Camera | None = None
    limits = MediaLimits()
    while True:
        raw = _exactly(requests, LENGTHS.size)
        if not raw:
            break
        size, payload = lengths(raw, max_payload=2**30)
        request = json.loads(_exactly(requests, size))
        body = _exactly(requests, payload)
        try:
            if request["do"] == "open":
                limits = MediaLimits(**request["limits"])
                source = _open(request, limits, replies)
            else:
                _allow_time(limits)
                _frames(source, np.frombuffer(body, np.int64), replies)
        except Refusal as refusal:
            _send(replies, {"refused": str(refusal), "final": refusal.final or source is None})
        except MemoryError:
            _send(replies, {"memory": True})
        except BrokenPipeError:
            break
        except Exception:
            _send(replies, {"bug": traceback.format_exc()[-4000:]})
    os._exit(0)  # libraries that hang when they are taken down do not matter here


def _open(request: dict[str, Any], limits: MediaLimits, replies: BinaryIO) -> Decoder | Camera:
    load_library(request["backend"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _allow_memory(limits)
    _allow_time(limits)
    if "camera" in request:
        camera = Camera(request["camera"], limits)
        _send(replies, {"open": True})
        return camera
    _allow_no_files(request["backend"])
    decoder = open_decoder(request["backend"], request["handle"], limits, request["threads"])
    facts = decoder.facts
    times = np.ascontiguousarray(facts.times, dtype=np.float64).tobytes()
    header = {name: getattr(facts, name) for name in ("end", "tick", "width", "height", "codec")}
    _send(replies, header, times)
    return decoder


def _frames(source: Decoder | Camera | None, indices: Any, replies: BinaryIO) -> None:
    if isinstance(source, Camera):
        time, pixels = source.read()
        _send(replies, {"shape": list(pixels.shape), "time": time}, pixels.reshape(-1).data)
        return
    assert source is not None
    for pixels in source.frames([int(index) for index in indices]):
        _send(replies, {"shape": list(pixels.shape)}, pixels.reshape(-1).data)


def _send(replies: BinaryIO, header: dict[str, Any], payload: bytes | memoryview = b"") -> None:
    for part in (pack(header, len(payload)), payload):
        rest = memoryview(part)
        while rest:
            rest = rest[replies.write(rest) :]


def _exactly(requests: BinaryIO, size: int) -> bytes:
    """`size` bytes, or none once the other side is gone."""
    data = b""
    while len(data) < size:
        more = requests.read(size - len(data))
        if not more:
            return b""
        data += more
    return data


def _allow_memory(limits: MediaLimits) -> None:
    """Address space: what the libraries took, and `memory_bytes` for the video."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        taken = pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no Linux: address space means something else there
        return
    most = taken + int(limits.memory_bytes)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _allow_time(limits: MediaLimits) -> None:
    """Processor time from now on; the signal at its end stops the process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = math.ceil(used.ru_utime + used.ru_stime + limits.cpu_seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))


def _allow_no_files(backend: str) -> None:
    """No file can be opened from here on, whatever a video says: its own is open already.

    decord and torchcodec open it once more; the one descriptor left is taken by that.
    """
    free = 0
    if backend != "pyav":
        free = os.open(os.devnull, os.O_RDONLY)
        os.close(free)
        free += 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, free))


if __name__ == "__main__":
    main()
