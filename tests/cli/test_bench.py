"""`mmtoken bench` with tiny settings: the files it writes, what it says, and what it refuses before any work."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mmtoken.cli import bench
from mmtoken.cli.bench import main
from mmtoken.errors import MMTokenError
from mmtoken.evaluation import speed
from mmtoken.evaluation.speed import SMALL

Output = pytest.CaptureFixture[str]
TINY = ["--compressors", "fastv", "--keeps", "16,1/8", "--pictures", "1", "--rounds", "1"]
SIZES = {"hidden": 16, "heads": 2, "intermediate": 24, "vision_hidden": 16, "image": 84, "vocabulary": 64}
KEYS = ["dense"] + [
    f"{method} keep={keep}" for method in ("Random", "UniformGrid", "Downscale", "FastV") for keep in (16, 0.125)
]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The random model of the speed run, made small."""
    monkeypatch.setitem(speed.SHAPES, "default", SMALL)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


SPEED = {"speed.json", "speed.md"}
ACCURACY = {"accuracy-tiny-llava.json", "accuracy-tiny-llava.md"} | {
    f"accuracy-tiny-llava-{name}.png" for name in ("tokens", "flops", "cache", "time", "scoring", "types")
}


def test_both_results_hold_the_same_line_up_in_two_files(tmp_path: Path, capsys: Output) -> None:
    folder = tmp_path / "deep" / "bench"
    assert main([*TINY, "--out", str(folder)]) == 0
    assert names(folder) == SPEED | ACCURACY
    results = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("speed", "accuracy-tiny-llava")}
    for result in results.values():
        assert [row["name"] for row in result["results"]] == KEYS
        assert result["environment"]["device"].startswith("CPU: ")
    assert {result["kind"] for result in results.values()} == {"speed", "accuracy"}
    assert {result["weights"].partition(",")[0] for result in results.values()} == {"random", "trained"}
    assert results["accuracy-tiny-llava"]["split"]["pictures"] == {"shapes_qa": 1, "photo_digits": 1}
    report = (folder / "accuracy-tiny-llava.md").read_text()
    assert all(f"({name})" in report for name in ACCURACY if name.endswith(".png"))
    captured = capsys.readouterr()
    for name in SPEED | ACCURACY:
        assert f"wrote {folder / name}\n" in captured.out
    assert all(captured.out.count(key) >= 3 for key in KEYS)
    assert "speed: round 1 of 1" in captured.err and "accuracy: 9 of 9" in captured.err


def test_speed_alone_needs_no_trained_model_and_no_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setattr(bench, "load", lambda name: pytest.fail("loaded a model"))
    monkeypatch.setattr(bench.pictures, "check_matplotlib", lambda: pytest.fail("asked for matplotlib"))
    assert main([*TINY, "--what", "speed", "--out", str(tmp_path)]) == 0
    assert names(tmp_path) == SPEED


def test_speed_is_measured_on_the_shape_and_in_the_type_that_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(speed.SHAPES, "7b", dataclasses.replace(speed.SHAPES["7b"], **SIZES))
    words = ["--what", "speed", "--compressors", "zerotprune", "--keeps", "0.5", "--rounds", "1"]
    assert main([*words, "--shape", "7b", "--dtype", "bfloat16", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "speed.json").read_text())
    assert (results["dtype"], results["shape"]["visual_tokens"], results["shape"]["layers"]) == ("bfloat16", 36, 32)
    two_bytes = 2 * 32 * 16 * 2 * (36 + 32)  # keys and values, layers, hidden, bytes, tokens
    assert results["results"][0]["kv_bytes"] == two_bytes
    row = next(row for row in results["results"] if row["name"] == "ZeroTPrune keep=0.5")
    assert row["milliseconds"]["scoring"]["median"] > 0


def test_accuracy_alone_measures_no_random_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setattr(speed, "measure", lambda *args, **kwargs: pytest.fail("measured speed"))
    assert main([*TINY, "--what", "accuracy", "--out", str(tmp_path)]) == 0
    assert names(tmp_path) == ACCURACY


def test_scoring_that_costs_more_than_it_saves_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setattr(bench.tables, "scoring_warnings", lambda results: ["FastV keep=16: scoring costs more"])
    assert main([*TINY, "--what", "speed", "--out", str(tmp_path)]) == 0
    assert "\nWARNING: FastV keep=16: scoring costs more\n" in capsys.readouterr().out
    assert "WARNING: FastV keep=16" in (tmp_path / "speed.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pictures", "0"], "pictures=0; give a whole number of at least 1"),
        (["--pictures", "two"], "invalid int value: 'two'"),
        (["--rounds", "0"], "rounds=0"),
        (["--rounds", "-3"], "rounds=-3"),
        (["--what", "everything"], "invalid choice: 'everything'"),
        (["--compressors", "fastvv"], "did you mean 'fastv'"),
        (["--compressors", "fastv,,tome"], "compressors='fastv,,tome' has an empty name"),
        (["--compressors", ""], "empty name"),
        (["--compressors", "os.system"], "os.system"),
        (["--keeps", "0"], "keeps=0 "),
        (["--keeps", "0.5,1.5"], "keeps=1.5"),
        (["--keeps", "nan"], "keeps=nan"),
        (["--keeps", "half"], "keeps='half'"),
        (["--keeps", ""], "keeps="),
        (["--keeps", "0.5,"], "keeps="),
        (["--device", "warp"], "device='warp' cannot be used"),
        (["--model", "tiny-lava"], "did you mean 'tiny-llava'"),
        (["--model", "/no/such/folder"], "does not exist"),
        (["--picture", "3"], "--picture"),
        (["extra"], "extra"),
    ],
)
def test_an_argument_that_cannot_be_used_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    for module in (speed, bench.accuracy):
        name = "measure" if module is speed else "evaluate"
        monkeypatch.setattr(module, name, lambda *args, **kwargs: pytest.fail("worked"))
    out = tmp_path / "bench"
    with pytest.raises(MMTokenError) as caught:
        main([*TINY, "--out", str(out), *options])
    assert message in str(caught.value)
    assert not out.exists()


def test_a_place_that_is_no_folder_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "measure", lambda *args, **kwargs: pytest.fail("worked"))
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(MMTokenError, match=r"out=.* is no folder and none can be made there"):
            main([*TINY, "--what", "speed", "--out", str(place)])
    assert (tmp_path / "file").read_text() == "mine"


def test_a_missing_matplotlib_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise MMTokenError("pictures need matplotlib")

    monkeypatch.setattr(speed, "measure", lambda *args, **kwargs: pytest.fail("worked"))
    monkeypatch.setattr(bench, "load", lambda name: pytest.fail("loaded a model"))
    monkeypatch.setattr(bench.pictures, "check_matplotlib", missing)
    with pytest.raises(MMTokenError, match="matplotlib"):
        main([*TINY, "--out", str(tmp_path / "bench")])
    assert not (tmp_path / "bench").exists()


def test_results_that_cannot_be_written_leave_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    def half(results: Any, **kwargs: Any) -> str:
        return '{"half": ' + str(1 / 0)

    (tmp_path / "speed.json").write_text("old")
    monkeypatch.setattr(bench.json, "dumps", half)
    with pytest.raises(ZeroDivisionError):
        main([*TINY, "--what", "speed", "--out", str(tmp_path)])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("speed.json", "old")]
