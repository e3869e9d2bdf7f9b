"""Files, folders and cameras give frames the same way, and go on after one that cannot be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmtoken.datasets.media.container import is_camera
from mmtoken.datasets.media.limits import MediaLimits
from mmtoken.datasets.media.sources import frames_of_folder, open_frames
from mmtoken.errors import InputError
from tests.datasets.media.clips import clip, jpeg, number_of, numbered, packets


def fill(folder: Path, names: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        Image.fromarray(numbered(number)).save(folder / name)
    return folder


def everything(frames: Any) -> list[Any]:
    """Numbers of frames, with messages in place of those that cannot be had."""
    got: list[Any] = []
    while True:
        try:
            got.append(number_of(next(frames)[0]))
        except StopIteration:
            return got
        except InputError as error:
            got.append(str(error))


def test_the_pictures_of_a_folder_come_in_natural_order(tmp_path: Path) -> None:
    folder = fill(tmp_path / "x", ["f1.png", "f2.jpg", "F3.PNG", "f10.webp", "f11.bmp", "f100.tiff", "g1.ppm"])
    (folder / "notes.txt").write_text("not a picture")
    (folder / ".hidden").write_text("neither")
    with frames_of_folder(folder, fps=4) as frames:
        assert (frames.kind, frames.end) == ("folder", 7 / 4)
        got = list(frames)
    assert [number_of(frame) for frame, _ in got] == list(range(7))
    assert [time for _, time in got] == [k / 4 for k in range(7)]
    assert all(frame.dtype == np.uint8 and frame.shape == (48, 64, 3) for frame, _ in got)


def test_a_folder_goes_on_after_a_picture_that_cannot_be_used(tmp_path: Path) -> None:
    folder = fill(tmp_path / "x", ["0.png", "1.png", "2.png", "3.png", "4.png"])
    (folder / "1.png").write_bytes(b"no picture")
    Image.fromarray(numbered(2, 128, 96)).save(folder / "2.png")
    (folder / "3.png").unlink()
    (folder / "3.png").mkdir()
    got = everything(open_frames(folder, field="--video"))
    assert got[0] == 0 and got[4:] == [4]
    assert got[1].startswith(f"--video={str(folder / '1.png')!r} is no picture")
    assert "2.png' is 128 x 96 pixels after 64 x 48; give pictures of one size" in got[2]
    assert "3.png' is a directory" in got[3]


def test_the_limits_hold_for_pictures(tmp_path: Path) -> None:
    folder = fill(tmp_path / "x", ["0.png", "1.png"])
    with pytest.raises(InputError, match="above the limit of 100"):
        next(open_frames(folder, limits=MediaLimits(max_pixels=100)))
    for limits in (MediaLimits(max_frames=1), MediaLimits(max_duration=1.5)):
        with pytest.raises(InputError, match="holds 2 pictures, 2 s at fps=1, above max_frames"):
            open_frames(folder, limits=limits)


def test_a_file_gives_its_frames(tmp_path: Path) -> None:
    file = clip(tmp_path / "x.mp4")
    with open_frames(file, fps=10) as frames:
        assert (frames.kind, frames.end) == ("file", pytest.approx(1.0))
        assert everything(frames) == list(range(0, 30, 3))
    pytest.importorskip("decord")
    with open_frames(str(file), trusted=True, backend="decord") as frames:
        assert everything(frames) == list(range(30))


def test_a_file_goes_on_after_a_frame_that_cannot_be_had(tmp_path: Path) -> None:
    file = packets(tmp_path / "x.mkv", [jpeg(0), bytes(50), jpeg(2), jpeg(3)], [0, 100, 200, 300])
    with open_frames(file) as frames:
        got = everything(frames)
    assert [got[0], *got[2:]] == [0, 2, 3] and "is damaged at 0.100 s" in got[1]


def test_a_closed_source_gives_nothing_more(tmp_path: Path) -> None:
    frames = open_frames(clip(tmp_path / "x.mp4"))
    next(frames)
    frames.close()
    with pytest.raises(InputError, match="is closed; open it again"):
        next(frames)
    with pytest.raises(StopIteration):
        next(frames)


@pytest.mark.parametrize(
    ("source", "is_one"),
    [("/dev/video0", True), ("/dev/video12", True), ("/dev/video", False), ("/dev/null", False), ("video0", False)],
)
def test_cameras_are_told_by_their_name(source: str, is_one: bool) -> None:
    assert is_camera(source) == is_one


@pytest.mark.skipif(Path("/dev/video99").exists(), reason="there is a camera")
def test_a_camera_that_is_not_there_is_one_error() -> None:
    with pytest.raises(InputError, match="--video='/dev/video99' does not exist; give a camera that is there"):
        open_frames("/dev/video99", field="--video")


def test_what_is_no_camera_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A regular file under a camera's name gets as far as the device calls of Video4Linux."""
    file = tmp_path / "video0"
    file.write_bytes(b"no camera")
    monkeypatch.setattr("mmtoken.datasets.media.sources.is_camera", lambda source: True)
    with pytest.raises(InputError, match=r"video0' cannot be opened \(.*\); give a camera"):
        open_frames(file)


@pytest.mark.parametrize(
    ("source", "fps", "words"),
    [
        ("missing", None, "does not exist; give"),
        ("empty", None, "holds no pictures"),
        ("empty", 0, "fps=0; give a number of frames per second"),
        ("empty", float("nan"), "fps=nan; give"),
        (7, None, "video=7 is a int; give the path"),
        (None, None, "video=None is a NoneType; give the path"),
    ],
)
def test_what_is_no_source_is_one_error(source: Any, fps: Any, words: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=words):
        open_frames(tmp_path / source if isinstance(source, str) else source, fps)


def test_a_folder_that_is_none_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder; give one"):
        frames_of_folder(tmp_path / "missing")
