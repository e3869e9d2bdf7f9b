"""`mmtoken stream` on made clips and a tiny model with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mmtoken
from mmtoken.cli import stream as command
from mmtoken.cli.main import main
from mmtoken.datasets.media.video import VideoReader
from tests.backbones.processors import write_checkpoint
from tests.datasets.media.clips import clip, jpeg, numbered, packets

Output = pytest.CaptureFixture[str]

SIZE = (128, 64)
QUESTION = "What is shown?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint("llava_onevision", folder)
    return str(folder)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six frames, two per second."""
    return str(clip(tmp_path_factory.mktemp("video") / "x.mp4", range(0, 3000, 500), clock=1000, size=SIZE))


def watch(*words: str, at: str = "1.2s") -> int:
    return main(["stream", *words, "--ask-at", at, QUESTION, "--max-new-tokens", "4", "--device", "cpu"])


def test_answers_are_those_of_a_stream_with_the_same_frames(
    checkpoint: str, video: str, tmp_path: Path, capsys: Output
) -> None:
    file = tmp_path / "x.json"
    words = ["stream", "--video", video, "--model", checkpoint, "--json", str(file), "--memory-tokens", "60"]
    asked = ["--ask-at", "9s", "At the end?", "--ask-at", "1.2s", QUESTION, "--ask-at", "1000ms", QUESTION]
    assert main([*words, *asked, "--max-new-tokens", "4", "--device", "cpu"]) == 0
    written = capsys.readouterr()
    result = json.loads(file.read_text())
    model, processor = mmtoken.load(checkpoint)
    expected: list[tuple[float, str, int]] = []
    with VideoReader(video) as reader, mmtoken.stream(model, processor, memory_tokens=60) as live:
        for number, (frame, seconds) in enumerate(reader):
            if number == 3:
                expected += [(when, live.ask(QUESTION, 4), 3) for when in (1.0, 1.2)]
            live.push(frame, seconds)
        expected.append((9.0, live.ask("At the end?", 4), 6))
        held = live.report.kv_tokens
    assert [(one["time"], one["answer"], one["frames_seen"]) for one in result["answers"]] == expected
    assert result["report"]["kv_tokens"] == held <= 60
    assert (result["frames_refused"], result["compressor"], result["model"]) == (0, None, checkpoint)
    assert written.out.splitlines()[:3] == [
        f"[{when:g} s] {'At the end?' if when == 9 else QUESTION} -> {answer}" for when, answer, _ in expected
    ]
    assert "6 seen" in written.out and "frames per second" in written.out
    assert written.err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_compressor_and_a_rate_go_on_to_the_stream(
    checkpoint: str, video: str, tmp_path: Path, capsys: Output
) -> None:
    file = tmp_path / "x.json"
    seen: dict[str, Any] = {}
    for name, words in {"dense": [], "short": ["--compressor", "uniformgrid", "--keep", "0.5", "--fps", "1"]}.items():
        assert watch("--video", video, "--model", checkpoint, "--json", str(file), *words) == 0
        seen[name] = json.loads(file.read_text())
    assert "UniformGrid" in capsys.readouterr().out
    assert [seen[name]["report"]["frames_seen"] for name in ("dense", "short")] == [6, 3]
    per_frame = [seen[name]["report"]["kv_tokens"] / seen[name]["report"]["frames_held"] for name in ("dense", "short")]
    assert per_frame[1] < per_frame[0]
    assert seen["short"]["compressor"]["init_args"]["keep"] == 0.5
    assert seen["short"]["answers"][0]["last_frame"] == 1.0


def test_a_frame_that_cannot_be_used_is_named_and_passed_over(checkpoint: str, tmp_path: Path, capsys: Output) -> None:
    pictures = [jpeg(k, *SIZE) for k in range(4)]
    pictures[1] = bytes(60)
    pictures[2] = jpeg(2, 192, 96)
    file = packets(tmp_path / "x.mkv", pictures, range(0, 2000, 500), SIZE)
    assert watch("--video", str(file), "--model", checkpoint, "--json", str(tmp_path / "x.json")) == 0
    written = capsys.readouterr()
    assert json.loads((tmp_path / "x.json").read_text())["frames_refused"] == 2
    assert written.err.count("mmtoken: frame passed over: --video=") == written.err.count("\n") == 2
    assert "2 seen" in written.out and "2 refused" in written.out


def test_many_refused_frames_are_counted(checkpoint: str, tmp_path: Path, capsys: Output) -> None:
    for number in range(9):
        Image.fromarray(numbered(number, *SIZE)).save(tmp_path / f"{number}.png")
        if number not in (0, 8):
            (tmp_path / f"{number}.png").write_bytes(b"no picture")
    assert watch("--video", str(tmp_path), "--model", checkpoint) == 0
    written = capsys.readouterr()
    assert written.err.count("\n") == 5 and "further ones are only counted" in written.err.splitlines()[-1]
    assert "2 seen" in written.out and "7 refused" in written.out


def test_a_camera_is_watched_until_the_last_answer(
    checkpoint: str, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Endless:
        kind, end, taken, closed = "camera", None, 0, False

        def __next__(self) -> tuple[np.ndarray, float]:
            self.taken += 1
            return numbered(self.taken, *SIZE), self.taken / 2

        def __enter__(self) -> Endless:
            return self

        def __exit__(self, *raised: object) -> None:
            self.closed = True

    camera = Endless()
    monkeypatch.setattr("mmtoken.datasets.media.sources.open_frames", lambda *given, **settings: camera)
    assert watch("--video", "/dev/video0", "--model", checkpoint, at="2s") == 0
    assert "[2 s]" in capsys.readouterr().out
    assert (camera.taken, camera.closed) == (5, True)


def test_progress_is_written_over_on_a_terminal(
    checkpoint: str, video: str, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert watch("--video", video, "--model", checkpoint) == 0
    shown = capsys.readouterr().err
    assert "\r0.0 of 2.5 s  1 frames" in shown and "tokens held" in shown and shown.endswith("\r")


REFUSED = [
    (["--ask-at", "soon", QUESTION], "ask-at='soon' is no time; give seconds"),
    (["--ask-at", "-3", QUESTION], "ask-at='-3' is no time"),
    (["--ask-at", "5 days", QUESTION], "ask-at='5 days' is no time"),
    (["--ask-at", "5s", " "], "has an empty question; give one"),
    (["--ask-at", "5s"], "expected 2 arguments"),
    ([], "--ask-at"),
    (["--ask-at", "5s", QUESTION, "--fps", "0"], "fps=0.0; give"),
    (["--ask-at", "5s", QUESTION, "--memory-tokens", "0"], "memory-tokens=0; give at least 1"),
    (["--ask-at", "5s", QUESTION, "--max-new-tokens", "0"], "max-new-tokens=0; give at least 1"),
    (["--ask-at", "5s", QUESTION, "--json", "x.txt"], "is not a .json file"),
    (["--ask-at", "5s", QUESTION, "--backend", "decord"], "trusted=True"),
    (["--ask-at", "5s", QUESTION, "--backend", "vlc"], "backend='vlc' is unknown"),
    (["--ask-at", "5s", QUESTION, "--compressor", "nothing"], "nothing"),
]


def refused(capsys: Output, *words: str) -> str:
    assert main(["stream", *words]) == 2
    written = capsys.readouterr()
    assert written.err.startswith("mmtoken: error: ") and written.err.count("\n") == 1, written.err
    assert written.out == ""
    return written.err


@pytest.mark.parametrize(("given", "words"), REFUSED)
def test_what_cannot_be_used_is_one_line_before_a_model_is_loaded(
    given: list[str], words: str, video: str, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmtoken.hub.load", lambda *given: pytest.fail("a model was loaded"))
    assert words in refused(capsys, "--video", video, *given)


@pytest.mark.parametrize("name", ["missing.mp4", "empty.mp4", "list.mp4", "random.mp4", "text.mp4"])
def test_a_hostile_file_is_one_line_and_writes_nothing(
    name: str, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmtoken.hub.load", lambda *given: pytest.fail("a model was loaded"))
    contents = {
        "empty.mp4": b"",
        "list.mp4": b"#EXTM3U\n#EXTINF:9,\n/etc/passwd\n",
        "random.mp4": b"\0\0\0\x18ftypisom" + np.random.default_rng(0).bytes(4000),
        "text.mp4": b"a film",
    }
    if name in contents:
        (tmp_path / name).write_bytes(contents[name])
    line = refused(
        capsys, "--video", str(tmp_path / name), "--ask-at", "1s", QUESTION, "--json", str(tmp_path / "x.json")
    )
    assert f"--video={str(tmp_path / name)!r}" in line
    assert not (tmp_path / "x.json").exists()


def test_a_question_before_the_first_frame_is_one_line(checkpoint: str, tmp_path: Path, capsys: Output) -> None:
    file = str(clip(tmp_path / "x.mkv", range(1000, 3000, 500), clock=1000, size=SIZE))
    line = refused(capsys, "--video", file, "--model", checkpoint, "--ask-at", "0.5", QUESTION, "--device", "cpu")
    assert "ask-at=0.5s: there is no frame yet to ask about: the first frame comes at 1.00 s; ask later" in line


def test_a_bound_below_one_step_is_one_line(checkpoint: str, tmp_path: Path, capsys: Output) -> None:
    file = str(clip(tmp_path / "x.mp4", range(0, 10000, 500), clock=1000, size=SIZE))
    words = ["--model", checkpoint, "--memory-tokens", "1", "--ask-at", "20s", QUESTION, "--device", "cpu"]
    assert main(["stream", "--video", file, *words]) == 2
    written = capsys.readouterr()
    assert written.err.splitlines()[-1].startswith("mmtoken: error: memory_tokens=1 is less than the")
    assert written.err.count("\n") == command._SHOWN + 1 and written.out == ""


def test_the_default_model_is_named_in_the_help(capsys: Output) -> None:
    assert main(["stream", "--help"]) == 0
    assert command.DEFAULT_MODEL in "".join(capsys.readouterr().out.split())
