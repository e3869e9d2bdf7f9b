"""The run that shows constant memory and time per frame, cut short."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mmtoken.compressors import VideoScan
from mmtoken.errors import InputError
from mmtoken.evaluation import stream_endurance as endurance
from mmtoken.evaluation.stream_models import StreamShape, random_frames

SMALL = StreamShape(hidden=32, layers=2, intermediate=32, vision_layers=1, image=56)


@pytest.mark.parametrize("method", [None, VideoScan(bank=8)])
def test_the_bound_holds_at_every_frame(method: VideoScan | None) -> None:
    trace = endurance.watch(method, 300, shape=SMALL, every=100)
    assert len(trace.rows) == len(trace.rss) == len(trace.seconds) == 300
    assert trace.limit == (32 * SMALL.tokens if method is None else 8)  # VideoScan says how many
    assert (trace.rows <= trace.limit).all()
    assert trace.rows[-1] == (trace.limit if method is None else 7)
    assert len(set(trace.rows[64:].tolist())) == 1  # full from then on
    assert (
        (trace.rss > 2**20).all() and (trace.seconds > 0).all() and (trace.fixed > 0).all() and len(trace.ttft_ms) == 3
    )
    found = endurance.summary(trace)
    assert found["bound_held_at_every_frame"] and found["most_rows_held"] == int(trace.rows.max())


def test_drift_is_the_slope_of_medians() -> None:
    steady = np.full(2000, 50.0)
    assert endurance.drift(steady, 400) == 0
    rising = 100 + np.arange(2000) * 0.01  # 10 per 1,000 frames, of about 111 in the middle
    rising[500::97] += 1000  # single slow frames
    rising[400:500] += 500  # and a slow while
    assert endurance.drift(rising, 400) == pytest.approx(100 * 10 / np.median(rising[400:]), rel=0.02)
    fixed = 1 + np.arange(2000) * 0.001  # work that slows down alike does not count
    assert endurance.drift(50 * fixed, 400, beside=fixed) == pytest.approx(0, abs=0.1)
    assert endurance.drift(50 * fixed, 400) > 30
    with pytest.raises(InputError, match="2000 frames leave 1 windows of 100 behind frame 1850"):
        endurance.drift(steady, 1850)


def test_a_leak_and_a_broken_bound_are_told() -> None:
    frames = 1000
    even = np.full(frames, 0.01)
    good = endurance.Trace("x", 8, np.full(frames, 1e9), even, even, np.full(frames, 8), [])
    assert endurance.summary(good)["constant"]
    leaking = endurance.Trace("x", 8, 1e9 + np.arange(frames) * 3e4, even, even, good.rows, [])
    assert endurance.summary(leaking)["rss_percent_per_1000_frames"] > 1
    slower = endurance.Trace("x", 8, good.rss, 0.01 + np.arange(frames) * 1e-6, even, good.rows, [])
    broken = endurance.Trace("x", 8, good.rss, even, even, np.where(np.arange(frames) == 700, 9, 8), [])
    assert not any(endurance.summary(trace)["constant"] for trace in (leaking, slower, broken))


def test_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endurance, "TINY", SMALL)
    out = tmp_path / "stream.json"
    code = endurance.main(["--frames", "60", "--every", "20", "--compressor", "videoscan", "--out", str(out)])
    result = json.loads(out.read_text())
    assert code == (0 if all(run["constant"] for run in result["runs"]) else 1)
    assert [run["method"] for run in result["runs"]] == ["dense", "VideoScan"]
    assert all(run["bound_held_at_every_frame"] and run["questions"] == 3 for run in result["runs"])
    assert result["environment"]["versions"]["torch"] and result["threads"] >= 1
    table = (tmp_path / "stream.md").read_text()
    assert "| dense | 60 |" in table and result["environment"]["device"] in table
    assert (tmp_path / "stream.png").read_bytes().startswith(b"\x89PNG")
    assert "| VideoScan | 60 |" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stream.json", "stream.md", "stream.png"]


def test_speed_compares_methods(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(endurance, "HALF_BILLION", SMALL)
    out = tmp_path / "speed.json"
    argv = [
        "--speed",
        "--frames",
        "36",
        "--compressor",
        json.dumps({"class_path": "DivPrune", "init_args": {"keep": 2}}),
    ]
    assert endurance.main([*argv, "--out", str(out)]) == 0
    dense, pruned = json.loads(out.read_text())["runs"]
    assert dense["kv_tokens"] == 32 * SMALL.tokens and pruned["kv_tokens"] == 32 * 2
    assert 0 < pruned["kv_bytes"] < dense["kv_bytes"] and min(dense["fps"], pruned["fps"]) > 0


@pytest.mark.parametrize("argv", [["--out", "nowhere/stream.json"], ["--out", "stream.txt"], ["--frames", "0"]])
def test_wrong_arguments_are_told(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = argv if "--out" in argv else [*argv, "--out", str(tmp_path / "a.json")]
    if argv == ["--frames", "0", "--out", str(tmp_path / "a.json")]:
        argv[1] = "-3"
    assert endurance.main(argv) == 2
    assert "error: " in capsys.readouterr().err


def test_frames_differ() -> None:
    frames = list(random_frames(16, 3))
    assert all(frame.shape == (16, 16, 3) and frame.dtype == np.uint8 for frame in frames)
    assert not (frames[0] == frames[1]).all()
