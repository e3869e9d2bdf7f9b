"""Sub-commands on the shipped samples, and what the command line makes of errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mmtoken.cli import main as cli
from mmtoken.cli.main import main

SAMPLES = Path(__file__).parents[2] / "mmtoken" / "assets" / "samples"
SCENE, OTHER = str(SAMPLES / "scene_1.png"), str(SAMPLES / "scene_2.png")

Output = pytest.CaptureFixture[str]


def test_run_answers_and_says_what_was_dropped(capsys: Output, tmp_path: Path) -> None:
    overlay = tmp_path / "kept.png"
    options = ["--compressor", "fastv", "--keep", "16", "--compressor.layer", "3", "--save-overlay", str(overlay)]
    assert main(["run", "--image", SCENE, "--ask", "read the number.", *options]) == 0
    out = capsys.readouterr().out
    assert "FastV" in out and "64 -> 16" in out and str(overlay) in out
    assert Image.open(overlay).size == (384, 384)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.png"]


def test_run_as_json_equals_the_report(capsys: Output) -> None:
    assert (
        main(
            [
                "run",
                "--image",
                SCENE,
                "--ask",
                "read the number.",
                "--compressor",
                "divprune",
                "--keep",
                ".25",
                "--json",
            ]
        )
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["visual_tokens"] == 64
    assert result["report"]["tokens_out"] == [16]
    assert result["compressor"]["init_args"]["keep"] == 0.25


def test_run_without_a_compressor_and_with_two_images(capsys: Output) -> None:
    assert main(["run", "--image", SCENE, OTHER, "--ask", "read the number.", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["visual_tokens"] == 128
    assert result["compressor"] is None and "report" not in result


def test_a_compressor_comes_from_a_file(capsys: Output, tmp_path: Path) -> None:
    file = tmp_path / "compressor.yaml"
    spec = {"class_path": "mmtoken.compressors.FastV", "init_args": {"keep": 0.25, "layer": 1}}
    for content in (spec, {"compressor": spec}):
        file.write_text(yaml.safe_dump(content))
        words = ["run", "--image", SCENE, "--ask", "x", "--compressor", str(file), "--compressor.layer=2", "--json"]
        assert main(words) == 0
        assert json.loads(capsys.readouterr().out)["compressor"]["init_args"]["layer"] == 2


@pytest.mark.parametrize("what", ["compressors", "backbones", "models"])
def test_list(capsys: Output, what: str) -> None:
    assert main(["list", what]) == 0
    table = capsys.readouterr().out.splitlines()
    assert main(["list", what, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(table) == len(rows) + 1
    assert all(line.startswith(row["name"]) for line, row in zip(table[1:], rows, strict=True))
    assert main(["list", what, "--markdown"]) == 0
    assert capsys.readouterr().out.count("\n") == len(rows) + 2


def test_doctor_says_what_fits(capsys: Output) -> None:
    assert main(["doctor", "--model", "tiny-llava"]) == 0
    out = capsys.readouterr().out
    assert "transformers" in out and "sdpa" in out
    assert out.count("fits") == 8


def test_help_and_version(capsys: Output) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {command}" in out for command in cli.COMMANDS)
    assert main(["--version"]) == 0
    assert main([]) == 2
    for command in ("run", "list", "doctor", "bench", "demo"):
        assert main([command, "--help"]) == 0
        assert f"usage: mmtoken {command}" in capsys.readouterr().out


def test_ctrl_c_and_bugs_are_one_line(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(words: list[str]) -> int:
        raise KeyboardInterrupt

    def break_(words: list[str]) -> int:
        raise ZeroDivisionError("division\nby zero")

    for dispatch, code, words in ((stop, 130, "interrupted"), (break_, 1, "a bug in mmtoken")):
        monkeypatch.setattr(cli, "_dispatch", dispatch)
        assert main(["run"]) == code
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert main(["run", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
