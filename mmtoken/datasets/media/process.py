"""The reader's side of the decoding process: start it, ask it, and stop it when it takes too long or too much."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mmtoken.datasets.media.limits import MediaLimits, Refusal
from mmtoken.datasets.media.wire import LENGTHS, lengths, pack


class DecodingProcess:
    """One `worker.py`, which reads one file.

    Args:
        limits: what the process may use.
        request: what to open: backend, threads, and the camera's path where it is one.
        handle: descriptor of the file; the process gets a copy.

    Raises:
        Refusal: the file or library cannot be used, or the process went past a limit or crashed.
    """

    def __init__(self, limits: MediaLimits, request: dict[str, Any], handle: int | None = None) -> None:
        self._limits = limits
        self._deadline = 0.0
        environment = dict(os.environ)
        # The process must find the mmtoken that is running, wherever it came from.
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        environment.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mmtoken.datasets.media.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=() if handle is None else (handle,),
            env=environment,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is the caller's to handle
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        for pipe in (self._in, self._out):
            os.set_blocking(pipe, False)
            with contextlib.suppress(OSError, AttributeError):
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 2**20)
        try:
            self._send({"do": "open", "limits": asdict(limits), "handle": handle, **request})
            # A frame is bounded by the limits; time stamps are eight bytes each.
            self.header, self.payload = self._receive(8 * limits.max_frames)
        except BaseException:
            self.close()
            raise

    def frames(self, indices: Sequence[int], size: tuple[int, int], into: Any) -> Iterator[int]:
        """Read frames into `into` (uint8[K, H, W, 3]); gives each place once it is filled.

        Raises:
            Refusal: as in `__init__`, or a frame cannot be decoded.
        """
        width, height = size
        self._send({"do": "frames"}, np.asarray(indices, dtype=np.int64).tobytes())
        for place in range(len(indices)):
            header, _ = self._receive(height * width * 3, memoryview(into[place]).cast("B"))
            if header.get("shape") != [height, width, 3]:
                raise self._broken(f"a frame of shape {header.get('shape')}")
            yield place

    def camera_frame(self) -> tuple[float, Any]:
        """The next frame of a camera, and its time in seconds after the first."""
        self._send({"do": "frames"})
        header, payload = self._receive(3 * int(self._limits.max_pixels))
        shape = header.get("shape")
        if not isinstance(shape, list) or len(shape) != 3 or shape[2] != 3 or len(payload) != shape[0] * shape[1] * 3:
            raise self._broken(f"a frame of shape {shape}")
        return float(header["time"]), np.frombuffer(payload, np.uint8).reshape(shape)

    def close(self) -> None:
        """Stop the process. In a forked copy of the caller only the pipes close: the process is no child of its own."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        self._deadline = time.monotonic() + self._limits.wall_seconds
        rest = memoryview(pack(header, len(payload)) + payload)
        while rest:
            self._wait(self._in, select.POLLOUT)
            try:
                rest = rest[os.write(self._in, rest) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise self._ended() from None

    def _receive(self, most: int, into: memoryview | None = None) -> tuple[dict[str, Any], bytes]:
        raw = bytearray(LENGTHS.size)
        self._fill(memoryview(raw))
        try:
            size, payload = lengths(bytes(raw), most)
        except ValueError as error:
            raise self._broken(str(error)) from None
        text = bytearray(size)
        self._fill(memoryview(text))
        try:
            header = json.loads(bytes(text))
        except ValueError:
            raise self._broken("no JSON") from None
        if not isinstance(header, dict):
            raise self._broken("no JSON object")
        if "refused" in header:
            raise Refusal(str(header["refused"]), bool(header.get("final")))
        if "memory" in header:
            raise self._over("memory_bytes", f"{self._limits.memory_bytes} bytes of memory")
        if "bug" in header:
            self.close()
            story = str(header["bug"]).strip()
            reason = story.splitlines()[-1][:200] if story else "unknown"
            raise Refusal(
                f"cannot be read (the decoder stumbled: {reason}); write it anew, or take another backend.", True
            ) from RuntimeError(story)
        if into is not None and payload != len(into):
            raise self._broken(f"{payload} bytes instead of {len(into)}")
        body = memoryview(bytearray(payload)) if into is None else into
        self._fill(body)
        return header, b"" if into is not None else bytes(body)

    def _fill(self, target: memoryview) -> None:
        while target:
            self._wait(self._out, select.POLLIN)
            try:
                count = os.readv(self._out, [target])
            except BlockingIOError:
                continue
            if not count:
                raise self._ended()
            target = target[count:]

    def _wait(self, pipe: int, event: int) -> None:
        poll = select.poll()
        poll.register(pipe, event)
        left = self._deadline - time.monotonic()
        if left <= 0 or not poll.poll(1000 * left):
            self.close()
            raise self._over("wall_seconds", f"{self._limits.wall_seconds:g} s")

    def _over(self, limit: str, amount: str) -> Refusal:
        self.close()
        return Refusal(f"takes more than {amount} to decode; make it smaller, or raise the limit {limit}.", True)

    def _broken(self, what: str) -> Refusal:
        self.close()
        return Refusal(f"made its decoder answer with {what}; do not use this file.", True)

    def _ended(self) -> Refusal:
        """The process is gone; say why."""
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return self._broken("nothing")
        self.close()
        if code == -signal.SIGXCPU:
            return self._over("cpu_seconds", f"{self._limits.cpu_seconds:g} s of processor time")
        if code < 0:
            name = signal.Signals(-code).name
            return Refusal(
                f"crashed its decoder ({name}), which was in a process of its own; do not use this file, or take "
                "another backend.",
                True,
            )
        return Refusal(
            f"cannot be read: the decoding process ended with code {code}; try `{sys.executable} -m "
            "mmtoken.datasets.media.worker </dev/null` to see why.",
            True,
        )
