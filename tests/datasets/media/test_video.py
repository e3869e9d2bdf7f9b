"""Frames come back by their time, whatever the codec, the clock and the way they lie in the file."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmtoken.datasets.media.limits import MediaLimits
from mmtoken.datasets.media.video import VideoReader
from mmtoken.errors import InputError, UnknownNameError
from tests.datasets.media.clips import H264, HEIGHT, WIDTH, clip, encodes, number_of, numbered, rotated

BACKENDS = {
    "pyav": {},
    "pyav in this process": {"trusted": True},
    "decord": {"backend": "decord", "trusted": True},
    "torchcodec": {"backend": "torchcodec"},
}

# Irregular on purpose: long and short gaps, none of them even.
VARIABLE = (0, 7, 95, 100, 333, 334, 500, 900, 1000, 1750, 1751, 1900, 2400, 2410, 2999)

B_FRAMES = {"bf": "2", "g": "12"}

CLIPS: dict[str, dict[str, Any]] = {
    "mpeg4.mp4": {"codec": "mpeg4"},
    "mpeg4-b.mp4": {"codec": "mpeg4", "options": B_FRAMES},
    "mpeg4.avi": {"codec": "mpeg4", "clock": 30, "ticks": range(30)},
    "h264.mp4": {"options": {"bf": "0", "g": "250"}},
    "h264-b.mp4": {"options": B_FRAMES},
    "h264-b.mkv": {"options": B_FRAMES},
    "h264-intra.mp4": {"options": {"g": "1"}},
    "h264-open.mkv": {"options": {"bf": "3", "g": "9", "x264-params": "open-gop=1:scenecut=0"}},
    "variable.mp4": {"ticks": VARIABLE, "clock": 1000, "options": B_FRAMES},
    "variable.mkv": {"ticks": VARIABLE, "clock": 1000},
    "late.mkv": {"ticks": range(1030, 4030, 100), "clock": 1000, "options": B_FRAMES},
    "fragments.mp4": {"container": {"movflags": "frag_keyframe+empty_moov"}, "options": {"g": "6", "bf": "0"}},
    "moov-first.mp4": {"container": {"movflags": "faststart"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "10", "deadline": "realtime", "cpu-used": "8"}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none:pools=none", "preset": "ultrafast"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "12", "svtav1-params": "lp=1"}},
    "mjpeg.avi": {"codec": "mjpeg", "clock": 30, "ticks": range(30)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clips")


def made(folder: Path, name: str) -> tuple[Path, np.ndarray]:
    """The clip of that name, and the seconds at which its frames are shown."""
    how = CLIPS[name]
    if not encodes(how.get("codec", H264)):
        pytest.skip(f"this FFmpeg cannot write {how['codec']}")
    file = folder / name
    if not file.exists():
        clip(file, **how)
    return file, np.array(how.get("ticks", range(0, 3000, 100))) / how.get("clock", 3000)


def reader(file: Path, backend: str, **settings: Any) -> VideoReader:
    if backend == "torchcodec":
        pytest.importorskip("torchcodec", reason="torchcodec is not installed")
    if backend == "decord":
        pytest.importorskip("decord", reason="decord is not installed")
    return VideoReader(file, **BACKENDS[backend], **settings)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CLIPS)
def test_each_frame_is_found_by_its_time_in_any_order(name: str, backend: str, folder: Path) -> None:
    file, times = made(folder, name)
    if backend == "decord" and name in ("hevc.mp4", "av1.mp4"):
        with pytest.raises(InputError, match=r"decord reads .*; take backend='pyav'"):
            reader(file, backend)
        return
    with reader(file, backend) as video:
        assert len(video) == len(times) and video.size == (WIDTH, HEIGHT)
        np.testing.assert_allclose(video.times, times, atol=1e-3)
        order = np.random.default_rng(0).permutation(len(times))
        order = np.concatenate([order, order[:3], [0, 0]])
        frames = video.frames_at(times[order])
        assert frames.shape == (len(order), HEIGHT, WIDTH, 3) and frames.dtype == np.uint8
        assert [number_of(frame) for frame in frames] == order.tolist()
        streamed = [(number_of(frame), when) for frame, when in video]
        assert streamed == list(enumerate(video.times.tolist()))


def test_a_time_gives_the_frame_on_display_then(folder: Path) -> None:
    file, times = made(folder, "variable.mp4")
    with VideoReader(file, trusted=True) as video:
        for number, (start, end) in enumerate(zip(times, [*times[1:], 3.0], strict=True)):
            inside = np.linspace(start, end, 4)[:-1] if end - start > 0.002 else [start]
            assert {number_of(frame) for frame in video.frames_at(inside)} == {number}


@given(st.lists(st.floats(0, 2.999), max_size=6))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_frames_at_is_a_search_in_the_time_stamps(folder: Path, wanted: list[float]) -> None:
    file, times = made(folder, "variable.mkv")
    with VideoReader(file, trusted=True) as video:
        shown = [number_of(frame) for frame in video.frames_at(wanted)]
    # In plain words: the last frame that began by then, to half a millisecond, which is this file's tick.
    assert shown == [max(k for k, start in enumerate(times) if start <= when + 0.0005) for when in wanted]


def test_sample_takes_the_centres_of_equal_slices_of_time(folder: Path) -> None:
    file, times = made(folder, "variable.mp4")
    with VideoReader(file) as video:
        end = float(times[0]) + video.duration
        for count in (1, 2, 7, 40):
            frames, stamps = video.sample(count)
            centres = [(k + 0.5) * end / count for k in range(count)]
            expected = [max(k for k, start in enumerate(times) if start <= when + 1e-6) for when in centres]
            assert [number_of(frame) for frame in frames] == expected
            np.testing.assert_allclose(stamps, times[expected], atol=1e-6)


@pytest.mark.parametrize("name", ["late.mkv", "h264-b.mp4", "variable.mp4"])
@pytest.mark.parametrize("fps", [0.4, 1, 3.7, 10, 30, 1000])
def test_stream_at_a_rate_shows_what_a_player_shows(name: str, fps: float, folder: Path) -> None:
    file, times = made(folder, name)
    with VideoReader(file, trusted=True) as video:
        streamed = [(number_of(frame), when) for frame, when in video.stream(fps)]
        end = float(video.times[0]) + video.duration
        tick = video._tick / 2
    expected: list[int] = []
    step = 0
    while times[0] + step / fps < end - tick - 1e-9:
        shown = max(k for k, start in enumerate(times) if start <= times[0] + step / fps + tick + 1e-9)
        expected += [shown] if [shown] != expected[-1:] else []
        step += 1
    assert [number for number, _ in streamed] == expected
    np.testing.assert_allclose([when for _, when in streamed], times[expected], atol=1e-3)


def test_streams_and_random_access_of_one_reader_do_not_disturb_each_other(folder: Path) -> None:
    file, times = made(folder, "h264-b.mp4")
    with VideoReader(file) as video:
        first, second = video.stream(), video.stream(10)
        for step in range(10):
            assert number_of(next(first)[0]) == step
            assert number_of(video.frames_at([times[-1 - step]])[0]) == len(times) - 1 - step
            assert number_of(next(second)[0]) == 3 * step


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("matrix", [(0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)])
def test_frames_are_upright(matrix: tuple[int, int, int, int], backend: str, tmp_path: Path) -> None:
    # decord needs rows of a round number of bytes; see the next test.
    width, height = (320, 240) if backend == "decord" else (WIDTH, HEIGHT)
    file = rotated(clip(tmp_path / "x.mp4", size=(width, height)), matrix)
    with reader(file, backend) as video:
        frame = video.frames_at([0.5])[0]
        assert video.size == (frame.shape[1], frame.shape[0])
    # ISO/IEC 14496-12: (x, y) is shown at (a x + c y, b x + d y), moved into the picture.
    a, b, c, d = matrix
    stored = numbered(15, width, height)
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    across, down = a * columns + c * rows, b * columns + d * rows
    upright = np.zeros((np.ptp(down) + 1, np.ptp(across) + 1, 3), np.uint8)
    upright[down - down.min(), across - across.min()] = stored
    assert frame.shape == upright.shape
    assert np.abs(frame.astype(int) - upright).mean() < 12


def test_decord_gives_an_error_where_its_turned_frames_are_nonsense(tmp_path: Path) -> None:
    pytest.importorskip("decord")
    file = rotated(clip(tmp_path / "x.mp4"), (0, 1, -1, 0))
    with (
        VideoReader(file, backend="decord", trusted=True) as video,
        pytest.raises(InputError, match=r"decord gives \(64, 48, 4\); take backend='pyav'"),
    ):
        video.frames_at([0.5])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(66, 50), (94, 62), (130, 48)])
def test_any_size_will_do(size: tuple[int, int], backend: str, tmp_path: Path) -> None:
    with reader(clip(tmp_path / "x.mp4", size=size), backend) as video:
        assert video.size == size
        assert [number_of(frame) for frame, _ in video] == list(range(30))


def test_a_cut_off_a_key_frame_starts_at_the_next_one(tmp_path: Path) -> None:
    source = clip(tmp_path / "whole.mkv", options={"bf": "0", "g": "10", "x264-params": "scenecut=0"})
    with av.open(str(source)) as whole, av.open(str(tmp_path / "cut.mkv"), "w") as cut:
        stream = whole.streams.video[0]
        copied = cut.add_stream_from_template(stream)
        for packet in whole.demux(stream):
            if packet.size and packet.pts >= 500:  # milliseconds: frame 15
                packet.stream = copied
                cut.mux(packet)
    with VideoReader(tmp_path / "cut.mkv") as video:
        assert [number_of(frame) for frame, _ in video] == list(range(20, 30))
        first = float(video.times[0])
        assert number_of(video.frames_at([0.0])[0]) == 20, "before the first frame there is nothing else to show"
    assert 0 < first < 1


def test_a_reader_knows_its_file(folder: Path) -> None:
    file, _ = made(folder, "late.mkv")
    with VideoReader(str(file)) as video:
        assert (video.times[0], video.codec) == (pytest.approx(1.03), "h264" if H264 == "libx264" else "mpeg4")
        assert 2.9 < video.duration < 3.2
        assert "30 frames" in repr(video) and "64 x 48" in repr(video)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda v: v.frames_at([99.0]), r"times=99.0 is not in video=.*; give times from 1.030 to"),
        (lambda v: v.frames_at([float("nan")]), "times=nan is not in"),
        (lambda v: v.frames_at([-float("inf")]), "times=-inf is not in"),
        (lambda v: v.frames_at([[1.0]]), "give a list of numbers"),
        (lambda v: v.frames_at(["a"]), "give a list of numbers"),
        (lambda v: v.frames_at(None), "give a list of numbers"),
        (lambda v: v.sample(0), "count=0; give"),
        (lambda v: v.sample(2.5), "count=2.5; give"),
        (lambda v: v.stream(0), "fps=0; give"),
        (lambda v: v.stream(float("inf")), "fps=inf; give"),
        (lambda v: v.sample(10**9), "above max_total_pixels"),
        (lambda v: v.frames_at(np.full(100_000, 2.0)), "above max_total_pixels"),
    ],
)
def test_what_cannot_be_asked_for_is_said_in_one_line(call: Any, words: str, folder: Path) -> None:
    file, _ = made(folder, "late.mkv")
    with VideoReader(file, trusted=True) as video:
        with pytest.raises(InputError, match=words) as caught:
            call(video)
        assert "\n" not in str(caught.value)
        assert len(video.frames_at([])) == 0


def test_settings_of_a_reader_are_checked(folder: Path) -> None:
    file, _ = made(folder, "late.mkv")
    with pytest.raises(UnknownNameError, match="did you mean 'pyav'"):
        VideoReader(file, backend="pyaw")
    with pytest.raises(InputError, match="trusted=True"):
        VideoReader(file, backend="decord")
    with pytest.raises(InputError, match="threads=0"):
        VideoReader(file, threads=0)
    with pytest.raises(InputError, match="path of a video"):
        VideoReader(7)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no limit; give a number above 0"):
        MediaLimits(cpu_seconds=float("inf"))


@pytest.mark.parametrize("trusted", [False, True])
def test_a_closed_reader_says_so(trusted: bool, folder: Path) -> None:
    file, _ = made(folder, "late.mkv")
    video = VideoReader(file, trusted=trusted)
    video.close()
    video.close()
    with pytest.raises(InputError, match="is closed; open it again"):
        video.frames_at([2.0])


@pytest.mark.parametrize("trusted", [False, True])
def test_a_pickled_reader_opens_the_file_anew(trusted: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, times = made(folder, "h264-b.mp4")
    monkeypatch.chdir(folder)
    limits = MediaLimits(max_duration=100)
    with VideoReader(file.name, trusted=trusted, limits=limits, threads=2, field="clip") as video:
        monkeypatch.chdir("/")
        for twin in (pickle.loads(pickle.dumps(video)), copy.copy(video)):
            with twin:
                assert twin.limits == limits and twin._threads == 2 and twin._decoding is not video._decoding
                assert number_of(twin.frames_at([times[4]])[0]) == 4
        assert number_of(video.frames_at([times[5]])[0]) == 5


def fork(file: Path, times: np.ndarray, trusted: bool) -> None:
    """Fork while a reader is open, its lock is held and one of its streams has begun; fails if anything is off."""
    with VideoReader(file, trusted=trusted) as video:
        stream = video.stream()
        next(stream)
        queue: Any = multiprocessing.get_context("fork").SimpleQueue()

        def child() -> None:
            numbers = [number_of(frame) for frame in video.frames_at(times[[20, 3]])] + [number_of(next(stream)[0])]
            video.close()
            queue.put(numbers)

        process = video._decoding
        with video._lock:  # as if another thread were reading while this one forks
            child_process = multiprocessing.get_context("fork").Process(target=child)
            child_process.start()
        child_process.join(60)
        assert child_process.exitcode == 0 and queue.get() == [20, 3, 1]
        assert [number_of(frame) for frame in video.frames_at(times[[20, 3]])] == [20, 3], "the parent's own goes on"
        assert video._decoding is process


@pytest.mark.parametrize("trusted", [False, True])
def test_a_forked_reader_opens_the_file_anew(trusted: bool, folder: Path) -> None:
    # Forked from a process of its own: this one holds what other tests left, threads and their locks among it.
    parent = multiprocessing.get_context("spawn").Process(target=fork, args=(*made(folder, "h264-b.mp4"), trusted))
    parent.start()
    parent.join(120)
    ended = parent.exitcode
    parent.kill()  # one that hangs would keep the test run from ending
    assert ended == 0


class Clips:
    """A data set of frames; its reader is opened before the loader starts its workers."""

    def __init__(self, file: Path, times: np.ndarray) -> None:
        self.video, self.times = VideoReader(file), times

    def __len__(self) -> int:
        return len(self.times)

    def __getitem__(self, index: int) -> int:
        return number_of(self.video.frames_at([self.times[index]])[0])


def load(file: Path, times: np.ndarray, method: str, workers: int) -> None:
    """Read every frame in the workers of a data loader."""
    from torch.utils.data import DataLoader

    clips = Clips(file, times)
    loader = DataLoader(clips, batch_size=5, num_workers=workers, multiprocessing_context=method, timeout=120)
    assert [int(number) for batch in loader for number in batch] == list(range(30))
    clips.video.close()


@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_readers_work_in_the_workers_of_a_data_loader(method: str, workers: int, folder: Path) -> None:
    # In a process of its own, as above: whoever forks must hold no threads and no locks of other tests.
    pytest.importorskip("torch.utils.data")
    parent = multiprocessing.get_context("spawn").Process(
        target=load, args=(*made(folder, "h264-b.mp4"), method, workers)
    )
    parent.start()
    parent.join(150)
    ended = parent.exitcode
    parent.kill()
    assert ended == 0


@pytest.mark.parametrize("trusted", [False, True])
def test_threads_may_share_a_reader(trusted: bool, folder: Path) -> None:
    file, times = made(folder, "h264-b.mp4")
    wrong: list[Any] = []
    with VideoReader(file, trusted=trusted) as video:

        def read(seed: int) -> None:
            for index in np.random.default_rng(seed).integers(0, len(times), 12):
                shown = number_of(video.frames_at([times[index]])[0])
                if shown != index:
                    wrong.append((seed, index, shown))

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_closing_ends_the_decoding_process(folder: Path) -> None:
    file, _ = made(folder, "late.mkv")
    with VideoReader(file) as video:
        process = video._decoding._process
        assert process.poll() is None
    assert process.poll() is not None
    video = VideoReader(file)
    process = video._decoding._process
    del video
    assert process.poll() is not None


def test_the_decoding_process_ends_with_its_reader(folder: Path) -> None:
    """Also when the reader's process is killed, which runs nothing at its end."""
    file, _ = made(folder, "late.mkv")
    code = (
        "import os, signal, sys\nfrom mmtoken.datasets.media.video import VideoReader\n"
        "video = VideoReader(sys.argv[1])\nprint(video._decoding._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    for _ in range(500):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        threading.Event().wait(0.02)
    raise AssertionError("the decoding process is still there")


def test_the_decoding_process_holds_no_torch(folder: Path) -> None:
    file, _ = made(folder, "late.mkv")
    code = (
        "import sys, mmtoken.datasets.media.worker as w\nw.load_library('pyav')\n"
        "print([name for name in ('torch', 'transformers', 'PIL') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    with VideoReader(file) as video:
        maps = Path(f"/proc/{video._decoding._process.pid}/maps").read_text()
    assert "libav" in maps and "torch" not in maps


def test_the_reader_loads_no_decoder_into_this_process(folder: Path) -> None:
    file, _ = made(folder, "late.mkv")
    code = (
        "import sys\nfrom mmtoken.datasets.media.video import VideoReader\nVideoReader(sys.argv[1]).sample(2)\n"
        "print([name for name in ('torch', 'av', 'decord') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_process_finds_the_mmtoken_that_runs(folder: Path, tmp_path: Path) -> None:
    """From another folder, with the package on sys.path only, and an impostor in the working folder."""
    file, _ = made(folder, "late.mkv")
    (tmp_path / "mmtoken.py").write_text("raise SystemExit('an impostor')")
    (tmp_path / "av.py").write_text("raise SystemExit('an impostor')")
    root = Path(__file__).parents[3]
    code = (
        f"import sys\nsys.path.insert(0, {str(root)!r})\nfrom mmtoken.datasets.media.video import VideoReader\n"
        "print(len(VideoReader(sys.argv[1])))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(file)],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.stdout == "30\n", done.stderr
