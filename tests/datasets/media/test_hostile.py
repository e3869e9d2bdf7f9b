"""Files made to break readers: each gives one clear error or the right frames, here and in no other file."""

from __future__ import annotations

import io
import os
import random
import re
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from mmtoken.datasets.media.limits import MediaLimits
from mmtoken.datasets.media.video import VideoReader
from mmtoken.errors import InputError
from tests.datasets.media.clips import H264, HEIGHT, WIDTH, clip, jpeg, number_of, openings, packets, patched

BACKENDS: dict[str, dict[str, Any]] = {
    "pyav": {},
    "pyav in this process": {"trusted": True},
    "decord": {"backend": "decord", "trusted": True},
    "torchcodec": {"backend": "torchcodec"},
}

FAST_START = {"movflags": "faststart"}


def _truncated(path: Path) -> None:
    clip(path, container=FAST_START, options={"g": "3"})
    data = path.read_bytes()
    start = data.index(b"mdat")
    path.write_bytes(data[: start + (len(data) - start) // 2])


def _sound(path: Path) -> None:
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 8000, 0, Fraction(1, 8000)
        out.mux(stream.encode(frame))
        out.mux(stream.encode())


def _frameless(path: Path) -> None:
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        out.start_encoding()


def _sizes_forged(path: Path) -> None:
    # A table of 2^31 sample sizes, and of one size for all of them.
    patched(clip(path, container=FAST_START), b"stsz", 8, struct.pack(">I", 2**31))


def _one_size_forged(path: Path) -> None:
    patched(clip(path, container=FAST_START), b"stsz", 4, struct.pack(">II", 100, 2**31 - 1))


def _times_forged(path: Path) -> None:
    patched(clip(path, container=FAST_START, options={"bf": "0"}), b"stts", 8, struct.pack(">I", 2**31 - 1))


def _long(path: Path) -> None:
    patched(clip(path, container=FAST_START, options={"bf": "0"}), b"stts", 12, struct.pack(">I", 2**31 - 1))


def _chunks_forged(path: Path) -> None:
    patched(clip(path, container=FAST_START), b"stsc", 12, struct.pack(">I", 2**31 - 1))


def _size_forged(path: Path) -> None:
    patched(clip(path, container=FAST_START), b"mp4v" if b"mp4v" in path.read_bytes() else b"avc1", 24, b"\x7f\xff" * 2)


def _text(path: Path) -> None:
    path.write_text("a film about a cat\n" * 20)


def _png(path: Path) -> None:
    Image.new("RGB", (64, 48), "red").save(path, "PNG")


# Name of the file, how it is made, what the error says.
REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("x.mp4", lambda p: None, "does not exist; give"),
    "a folder": ("x.mp4", lambda p: p.mkdir(), "is a directory; give"),
    "a pipe": ("x.mp4", os.mkfifo, "is a device or pipe; give"),
    "empty": ("x.mp4", lambda p: p.write_bytes(b""), r"is empty \(0 bytes\); give"),
    "text": ("x.mp4", _text, "is no video .*; give"),
    "random bytes": ("x.mp4", lambda p: p.write_bytes(random.Random(0).randbytes(5000)), "is no video"),
    "random bytes behind a good beginning": (
        "x.mp4",
        lambda p: p.write_bytes(b"\0\0\0\x18ftypisom\0\0\2\0isommp41" + random.Random(0).randbytes(5000)),
        "cannot be opened .*damaged or no video, give|has no video in it",
    ),
    "only a beginning": ("x.mkv", lambda p: p.write_bytes(b"\x1a\x45\xdf\xa3"), "cannot be opened"),
    "a picture": ("x.mp4", _png, "is a picture; give"),
    "raw frames": ("x.mp4", lambda p: p.write_bytes(b"YUV4MPEG2 W30000 H30000 F30:1\nFRAME\n"), "holds raw frames"),
    "truncated": ("x.mp4", _truncated, "is cut off: its header announces .*fetch"),
    "sound": ("x.mkv", _sound, "has no video in it; give"),
    "no frames": ("x.mp4", _frameless, "no frame that can be shown|no video in it|cannot be opened"),
    "huge frames": (
        "x.mkv",
        lambda p: packets(p, [jpeg(claim=(16000, 16000))] * 3, [0, 40, 80], (16000, 16000)),
        "claims frames of .* more than max_pixels=64000000; scale it down, raise",
    ),
    "huge frames under a small header": (
        "x.mkv",
        lambda p: packets(p, [jpeg(claim=(16000, 16000))] * 3, [0, 40, 80]),
        "damaged at 0.000 s|above max_pixels",
    ),
    "forged sample sizes": ("x.mp4", _sizes_forged, "cannot be opened|damaged|cut off"),
    "one forged sample size": ("x.mp4", _one_size_forged, "no frame that can be shown|memory|cut off"),
}


def reader(file: Path, backend: str, **settings: Any) -> VideoReader:
    if backend in ("decord", "torchcodec"):
        pytest.importorskip(backend, reason=f"{backend} is not installed")
    return VideoReader(file, **BACKENDS[backend], **settings)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", REFUSED)
def test_each_is_refused_in_one_line_with_its_name_and_a_fix(case: str, backend: str, tmp_path: Path) -> None:
    name, make, words = REFUSED[case]
    if backend == "pyav in this process" and "forged" in case:
        pytest.skip("no limit of memory there; that is what trusted=True means")
    file = tmp_path / name
    make(file)
    limits = MediaLimits(wall_seconds=30)
    with (
        pytest.raises(InputError, match=words) as caught,
        reader(file, backend, limits=limits, field="--video") as read,
    ):
        read.frames_at(read.times[:1])
    message = str(caught.value)
    assert message.startswith(f"--video={str(file)!r} ") and "\n" not in message
    assert re.search(r"[;,] (give|cut|scale|take|raise|fetch|write|make|do not)", message), "no fix named"


@pytest.mark.parametrize("make", [_times_forged, _chunks_forged, _size_forged])
def test_forged_counts_that_nothing_is_sized_by_do_no_harm(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "x.mp4")
    with VideoReader(tmp_path / "x.mp4") as video:
        assert [number_of(frame) for frame, _ in video] == list(range(30))


def test_forged_durations_are_an_error_or_are_not_believed(tmp_path: Path) -> None:
    """FFmpeg 8 takes the forged step between frames; FFmpeg 7 takes none, so that all frames have one time."""
    _long(tmp_path / "x.mp4")
    try:
        with VideoReader(tmp_path / "x.mp4") as video:
            assert [number_of(frame) for frame, _ in video] == [0]
    except InputError as error:
        assert re.search("claims to last 178957 s, above max_duration=21600; cut it, or raise", str(error))


def test_a_decoder_that_aborts_is_an_error_here_and_the_next_file_is_read(tmp_path: Path) -> None:
    pytest.importorskip("decord")
    _times_forged(tmp_path / "x.mp4")
    for _ in range(2):
        with pytest.raises(InputError, match=r"x.mp4' crashed its decoder \(SIGABRT\), .*; do not use this file"):
            VideoReader(tmp_path / "x.mp4", backend="decord", trusted=True)
        with VideoReader(clip(tmp_path / "good.mp4"), backend="decord", trusted=True) as video:
            assert number_of(video.frames_at([0.5])[0]) == 15


def _playlists(target: Path) -> dict[str, tuple[str, str]]:
    hls = f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:9\n#EXTINF:9.0,\n{target}\n#EXT-X-ENDLIST\n"
    return {
        "hls named mp4": ("list.mp4", hls),
        "hls": ("list.m3u8", hls),
        "hls with a file url": ("list.mp4", hls.replace(str(target), f"file://{target}")),
        "hls relative": ("list.m3u8", hls.replace(str(target), target.name)),
        "hls behind a blank line": ("list.m3u8", "\n" + hls),
        "ffconcat absolute": ("list.ffconcat", f"ffconcat version 1.0\nfile '{target}'\n"),
        "ffconcat relative": ("list.mp4", f"ffconcat version 1.0\nfile {target.name}\n"),
        "concat without a head": ("list.ffconcat", f"file '{target}'\n"),
        "dash": (
            "list.mpd",
            '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
            f"<Representation id='1'><BaseURL>{target}</BaseURL></Representation></AdaptationSet></Period></MPD>",
        ),
    }


# The look at the first bytes comes before any backend; behind it each has to hold by itself.
_LINES = [
    *(("pyav", kind, case, True) for kind in ("a clip", "a pipe") for case in _playlists(Path("/x"))),
    *((backend, "a clip", case, False) for backend in BACKENDS for case in _playlists(Path("/x"))),
    *((backend, "a pipe", "hls with a file url", False) for backend in BACKENDS),
]


@pytest.mark.parametrize(("backend", "kind", "case", "sniffed"), _LINES)
def test_no_file_that_a_playlist_names_is_opened(
    sniffed: bool, case: str, backend: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also behind the look at the first bytes: `sniffed` False takes that line of defence away."""
    target = tmp_path / "target.mp4"
    if kind == "a clip":
        clip(target)
    else:
        os.mkfifo(target)  # whoever opens it to read waits for ever
    name, text = _playlists(target)[case]
    (tmp_path / name).write_text(text)
    if not sniffed:
        monkeypatch.setattr("mmtoken.datasets.media.container.check_kind", lambda head: None)
    with openings(tmp_path) as opened, pytest.raises(InputError):
        reader(tmp_path / name, backend, limits=MediaLimits(wall_seconds=20)).sample(1)
    assert set(opened) == {name}


def test_the_watch_over_files_sees_what_is_opened(tmp_path: Path) -> None:
    file = clip(tmp_path / "x.mp4")
    with openings(tmp_path) as opened:
        VideoReader(file).close()
    assert opened == ["x.mp4"]


def test_the_decoding_process_can_open_nothing(tmp_path: Path) -> None:
    file = clip(tmp_path / "x.mp4")
    with VideoReader(file) as video:
        limits = Path(f"/proc/{video._decoding._process.pid}/limits").read_text()
    assert re.search(r"Max open files +0 +0 ", limits)
    assert re.search(r"Max core file size +0 +0 ", limits)
    room = int(re.search(r"Max address space +(\d+)", limits).group(1))  # type: ignore[union-attr]
    assert 2**31 < room < 2**31 + 2**30


def test_a_changing_size_is_an_error_where_it_changes_and_the_stream_goes_on(tmp_path: Path) -> None:
    pictures = [jpeg(0), jpeg(1), jpeg(2, 128, 96), jpeg(3), jpeg(4, claim=(16000, 16000)), jpeg(5)]
    file = packets(tmp_path / "x.mkv", pictures, range(0, 600, 100))
    with VideoReader(file) as video:
        got: list[int | str] = []
        stream = video.stream()
        while True:
            try:
                got.append(number_of(next(stream)[0]))
            except StopIteration:
                break
            except InputError as error:
                got.append(str(error))
        assert [g for g in got if isinstance(g, int)] == [0, 1, 3, 5]
        assert re.search(r"changes its size at 0.200 s: 128 x 96 after 64 x 48; cut it there", str(got[2]))
        assert re.search(r"is damaged at 0.400 s|max_pixels", str(got[4]))
        with pytest.raises(InputError, match="changes its size"):
            video.frames_at(video.times)
        assert [number_of(f) for f in video.frames_at(video.times[[0, 3, 5]])] == [0, 3, 5]


def test_time_stamps_that_run_backwards_are_an_error_or_the_right_frame(tmp_path: Path) -> None:
    ticks = [1000, 1100, 1500, 1300, 1400, 1200, 1600]
    file = packets(tmp_path / "x.mkv", [jpeg(k) for k in range(7)], ticks)
    with VideoReader(file) as video:
        outcomes = set()
        for when in video.times:
            try:
                assert number_of(video.frames_at([when])[0]) == ticks.index(round(1000 * when))
                outcomes.add("frame")
            except InputError as error:
                outcomes.add("error")
                assert "is damaged" in str(error) or re.search("run backwards behind .*write it anew", str(error))
                outcomes |= {"the cause"} if "backwards" in str(error) else set()
    assert outcomes == {"frame", "error", "the cause"}


def test_b_frames_in_avi_have_no_usable_time_stamps(tmp_path: Path) -> None:
    if H264 != "libx264":
        pytest.skip("this FFmpeg cannot write H.264")
    file = clip(tmp_path / "x.avi", range(30), clock=30, options={"bf": "2", "g": "12", "b-adapt": "0"})
    with pytest.raises(InputError, match=r"run backwards behind .*write it anew as MP4 or MKV"):
        VideoReader(file).frames_at([0.5])


def test_pictures_that_decode_in_part_are_damaged(tmp_path: Path) -> None:
    """FFmpeg's own default fills in what is missing of a JPEG and says nothing."""
    noise = Image.effect_noise((192, 96), 80).convert("RGB")
    buffer = io.BytesIO()
    noise.save(buffer, "JPEG", quality=90)
    damaged = 0
    for seed in range(20):
        broken = bytearray(buffer.getvalue())
        at = len(broken) // 2 + 50 * seed
        broken[at : at + 20] = random.Random(seed).randbytes(20)
        file = packets(tmp_path / "x.mkv", [buffer.getvalue(), bytes(broken)], [0, 40], (192, 96))
        with VideoReader(file, trusted=True) as video:
            try:
                video.frames_at([0.04])
            except InputError:
                damaged += 1
    assert damaged >= 8


def test_formats_other_than_the_listed_are_closed_to_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the look at the first bytes."""
    monkeypatch.setattr("mmtoken.datasets.media.container.check_kind", lambda head: None)
    _png(tmp_path / "x.mp4")
    (tmp_path / "y.mp4").write_bytes(b"YUV4MPEG2 W16 H16 F30:1 C420\n" + b"FRAME\n" + bytes(384))
    for name in ("x.mp4", "y.mp4"):
        for trusted in (False, True):
            with pytest.raises(InputError, match="cannot be opened"):
                VideoReader(tmp_path / name, trusted=trusted)


def test_equal_time_stamps_give_one_frame(tmp_path: Path) -> None:
    file = packets(tmp_path / "x.mkv", [jpeg(k) for k in range(4)], [1000, 1100, 1100, 1200])
    with VideoReader(file) as video:
        assert len(video) == 3
        assert [number_of(frame) for frame, _ in video] in ([0, 1, 3], [0, 2, 3])


# Nothing but zeros is a whole picture without a change in MPEG-4 part 2, so no decoder can tell.
@pytest.mark.parametrize(
    ("codec", "how"),
    [("libx264", "random"), ("libx264", "zero"), ("libx265", "random"), ("libx265", "zero"), ("mpeg4", "random")],
)
def test_damaged_data_give_errors_and_never_another_frame(codec: str, how: str, tmp_path: Path) -> None:
    options = {"g": "6"} if codec != "libx265" else {"x265-params": "log-level=none:keyint=6:pools=none"}
    try:
        file = clip(tmp_path / "x.mp4", codec=codec, options=options)
    except av.FFmpegError:
        pytest.skip(f"this FFmpeg cannot write {codec}")
    if codec == "libx265" and av.library_versions["libavcodec"][0] < 62:
        pytest.skip("FFmpeg 7 fills in what is missing in HEVC and says nothing; docs/media.md says so")
    whole = file.read_bytes()
    with av.open(str(file)) as container:
        places = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    good = bad = 0
    for place in (1, 7, 15, 29):
        start, size = places[place]
        broken = random.Random(place).randbytes(size - 4) if how == "random" else bytes(size - 4)
        file.write_bytes(whole[: start + 4] + broken + whole[start + size :])
        with VideoReader(file, trusted=True) as video:
            stream = video.stream()
            for number in range(30):
                try:
                    assert number_of(next(stream)[0]) == number
                    good += 1
                except InputError as error:
                    assert re.search(r"is damaged at \d", str(error))
                    bad += 1
    assert bad >= 4 and good >= 60, "what is whole is still read"


def test_memory_is_limited(tmp_path: Path) -> None:
    file = packets(tmp_path / "x.mkv", [jpeg(k, 1920, 1088) for k in range(2)], [0, 40], (1920, 1088))
    with VideoReader(file) as video:
        assert number_of(video.frames_at([0.04])[0]) == 1
    # FFmpeg 7 calls a frame that there is no room for invalid data.
    words = r"takes more than 2000000 bytes of memory .*raise the limit memory_bytes|is damaged at 0.000 s"
    with pytest.raises(InputError, match=words):
        VideoReader(file, limits=MediaLimits(memory_bytes=2_000_000))


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (MediaLimits(max_pixels=64 * 48 - 1), "64 x 48 = 3072 pixels, above max_pixels=3071"),
        (MediaLimits(max_frames=29), "more than max_frames=29 frames"),
        (MediaLimits(max_duration=0.9), "last 1 s, above max_duration=0.9"),
    ],
)
@pytest.mark.parametrize("trusted", [False, True])
def test_what_a_file_claims_is_compared_with_the_limits(
    trusted: bool, limits: MediaLimits, words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        VideoReader(clip(tmp_path / "x.mp4"), limits=limits, trusted=trusted)


def test_claims_are_compared_before_anything_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmtoken.datasets.media.pyav import Video

    decoded = []
    monkeypatch.setattr(Video, "_decode", lambda self: decoded.append(1) or iter(()))
    for limits in (MediaLimits(max_pixels=99), MediaLimits(max_duration=0.1), MediaLimits(max_frames=2)):
        with pytest.raises(InputError, match=r"above|more than"):
            VideoReader(clip(tmp_path / "x.mp4"), limits=limits, trusted=True)
    assert not decoded
    with pytest.raises(InputError, match="damaged"):
        VideoReader(tmp_path / "x.mp4", trusted=True)
    assert decoded


def test_a_call_gives_no_more_than_max_total_pixels(tmp_path: Path) -> None:
    with VideoReader(clip(tmp_path / "x.mp4"), limits=MediaLimits(max_total_pixels=3 * 64 * 48)) as video:
        assert len(video.sample(3)[0]) == 3
        with pytest.raises(InputError, match=r"4 frames of 64 x 48 are 12288 pixels, above max_total_pixels=9216"):
            video.sample(4)


def test_a_file_that_changed_is_noticed_when_it_is_opened_again(tmp_path: Path) -> None:
    file = clip(tmp_path / "x.mp4")
    with VideoReader(file) as video:
        video._let_go()
        clip(file, range(0, 500, 100))
        with pytest.raises(InputError, match="is another file now; make a new reader"):
            video.frames_at([0.0])
