"""What the decoding process may say and how long it may take, with impostors in its place."""

from __future__ import annotations

import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmtoken.datasets.media.limits import MediaLimits, Refusal
from mmtoken.datasets.media.video import VideoReader
from mmtoken.datasets.media.wire import LENGTHS, lengths, pack
from mmtoken.errors import InputError
from tests.datasets.media.clips import clip, number_of

GREETING = (
    "import os, struct, sys, json, time, signal\n"
    "def say(header, payload=b'', claim=None):\n"
    "    text = header if isinstance(header, bytes) else json.dumps(header).encode()\n"
    "    size = len(payload) if claim is None else claim\n"
    "    os.write(1, struct.pack('>IQ', len(text), size) + text + payload)\n"
    "good = {'end': 1.0, 'tick': 0.01, 'width': 4, 'height': 2, 'codec': 'x'}\n"
    "times = struct.pack('2d', 0.0, 0.5)\n"
)
SERVE = "say(good, times)\nos.read(0, 4096)\ntime.sleep(0.2)\nos.set_blocking(0, False)\n"


@pytest.fixture
def impostor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the next decoding process run some other code; gives a file to read."""

    def install(code: str) -> Path:
        script = tmp_path / "impostor.py"
        script.write_text(f"#!{sys.executable}\n{GREETING}{code}\n")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))
        return clip(tmp_path / "x.mp4", codec="mpeg4")

    return install


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("say(good, b'', claim=2**62)", "made its decoder answer with a message of"),
        ("os.write(1, struct.pack('>IQ', 2**31, 0))", "made its decoder answer with a message of"),
        ("say(b'{not json')", "made its decoder answer with no JSON"),
        ("say([1])", "made its decoder answer with no JSON object"),
        ("say({**good, 'width': 10**6, 'height': 10**6}, times)", "answer with nonsense; do not use"),
        ("say({**good, 'width': -1}, times)", "nonsense"),
        ("say({**good, 'end': 'x'}, times)", "nonsense"),
        ("say({**good, 'end': float('nan')}, times)", "nonsense"),
        ("say({**good, 'end': 1e9}, times)", "nonsense"),
        ("say({**good, 'tick': 0}, times)", "nonsense"),
        ("say(good, b'')", "nonsense"),
        ("say(good, b'abc')", "nonsense"),
        ("say(good, struct.pack('2d', 0.5, 0.0))", "nonsense"),
        ("say(good, struct.pack('2d', 0.5, float('nan')))", "nonsense"),
        ("sys.exit(3)", "the decoding process ended with code 3; try"),
        ("os.abort()", r"crashed its decoder \(SIGABRT\)"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", r"crashed its decoder \(SIGSEGV\)"),
        ("say({'bug': 'Traceback\\nKeyError: 7'})", r"the decoder stumbled: KeyError: 7\); write it anew"),
        ("say({'bug': ''})", "the decoder stumbled: unknown"),
        ("say({'memory': True})", "bytes of memory to decode; make it smaller, or raise the limit memory_bytes"),
        ("os.close(1)\ntime.sleep(600)", "made its decoder answer with nothing"),
    ],
)
def test_a_first_answer_that_is_none_is_an_error(code: str, words: str, impostor: Any) -> None:
    file = impostor(code)
    with pytest.raises(InputError, match=words) as caught:
        VideoReader(file, limits=MediaLimits(wall_seconds=20))
    assert str(caught.value).startswith(f"video={str(file)!r} ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("say({'shape': [2, 4, 3]}, bytes(23))", "23 bytes instead of 24"),
        ("say({'shape': [2, 4, 3]}, bytes(24), claim=25)", "message of"),
        ("say({'shape': [4, 2, 3]}, bytes(24))", r"a frame of shape \[4, 2, 3\]"),
        ("say({}, bytes(24))", "a frame of shape None"),
        ("os.abort()", "SIGABRT"),
    ],
)
def test_a_frame_of_another_size_is_an_error_and_the_process_is_gone(code: str, words: str, impostor: Any) -> None:
    video = VideoReader(impostor(SERVE + code), limits=MediaLimits(wall_seconds=20))
    process = video._decoding._process
    with pytest.raises(InputError, match=words):
        video.frames_at([0.0])
    assert process.poll() is not None and video._decoding is None


def test_a_process_that_hangs_is_killed(impostor: Any) -> None:
    file = impostor("time.sleep(600)")
    start = time.monotonic()
    with pytest.raises(InputError, match=r"takes more than 0.5 s to decode; make it smaller, or raise .* wall_seconds"):
        VideoReader(file, limits=MediaLimits(wall_seconds=0.5))
    assert time.monotonic() - start < 60


def test_a_process_that_hangs_in_a_frame_is_killed_and_the_reader_opens_anew(impostor: Any, tmp_path: Path) -> None:
    """The impostor hangs once; the second time it answers."""
    mark = tmp_path / "mark"
    code = (
        f"{SERVE}\nmark = {str(mark)!r}\nif not os.path.exists(mark):\n    open(mark, 'w')\n    time.sleep(600)\n"
        "say({'shape': [2, 4, 3]}, bytes(range(24)))\ntime.sleep(600)"
    )
    with VideoReader(impostor(code), limits=MediaLimits(wall_seconds=3)) as video:
        with pytest.raises(InputError, match="wall_seconds"):
            video.frames_at([0.0])
        np.testing.assert_array_equal(video.frames_at([0.0]).reshape(-1), np.arange(24))


def test_a_process_that_reads_no_requests_is_killed(impostor: Any) -> None:
    """A request of more bytes than a pipe holds."""
    file = impostor("say(good, struct.pack('200000d', *(k / 1e6 for k in range(200000))))\ntime.sleep(600)")
    with (
        VideoReader(file, limits=MediaLimits(wall_seconds=3)) as video,
        pytest.raises(InputError, match="wall_seconds"),
    ):
        video.frames_at(video.times)


def test_processor_time_is_limited(impostor: Any) -> None:
    code = (
        "sys.path[:0] = os.environ['PYTHONPATH'].split(os.pathsep)\n"
        "from mmtoken.datasets.media.limits import MediaLimits\nfrom mmtoken.datasets.media.worker import _allow_time\n"
        "_allow_time(MediaLimits(cpu_seconds=0.01))\nwhile True: pass"
    )
    file = impostor(code)
    with pytest.raises(InputError, match=r"takes more than 0.01 s of processor time .*raise the limit cpu_seconds"):
        VideoReader(file, limits=MediaLimits(cpu_seconds=0.01))


def test_the_real_process_gets_the_limit_of_processor_time_at_each_request(tmp_path: Path) -> None:
    with VideoReader(clip(tmp_path / "x.mp4"), limits=MediaLimits(cpu_seconds=7)) as video:
        pid = video._decoding._process.pid

        def granted() -> int:
            line = next(line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if "cpu time" in line)
            return int(line.split()[3])

        assert 7 <= granted() <= 10
        resource.prlimit(pid, resource.RLIMIT_CPU, (1000, resource.RLIM_INFINITY))
        video.frames_at([0.0])
        assert 7 <= granted() <= 11


def test_an_interrupted_request_does_not_mix_up_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with VideoReader(clip(tmp_path / "x.mp4")) as video:
        process, calls = type(video._decoding), []
        real = process._fill

        def interrupted(self: Any, target: memoryview) -> None:
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            real(self, target)

        monkeypatch.setattr(process, "_fill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            video.frames_at(video.times[:9])
        assert [number_of(frame) for frame in video.frames_at(video.times[5:8])] == [5, 6, 7]


def test_no_descriptors_or_processes_are_left_behind(tmp_path: Path) -> None:
    file = clip(tmp_path / "x.mp4")
    (tmp_path / "bad.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(100))
    VideoReader(file).close()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        VideoReader(file).close()
        VideoReader(file, trusted=True).close()
        for trusted in (False, True):
            with pytest.raises(InputError):
                VideoReader(tmp_path / "bad.mp4", trusted=trusted)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
    assert threading.active_count() < 20


def test_messages_have_their_lengths_in_front() -> None:
    packed = pack({"do": "open"}, 7)
    assert lengths(packed[: LENGTHS.size], 7) == (len(packed) - LENGTHS.size, 7)
    with pytest.raises(ValueError, match="message of"):
        lengths(packed[: LENGTHS.size], 6)
    with pytest.raises(ValueError, match="message of"):
        lengths(LENGTHS.pack(65537, 0), 6)


def test_a_refusal_is_final_only_if_it_says_so() -> None:
    assert not Refusal("x").final and Refusal("x", True).final
