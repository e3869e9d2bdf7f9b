"""Sub-commands on the shipped samples, and what the command line makes of errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

import mmtoken
from mmtoken.cli import main as cli
from mmtoken.cli.main import main
from mmtoken.compressors import FastV, QueCC
from mmtoken.compressors.registry import names
from tests.backbones.processors import write_checkpoint

pytestmark = pytest.mark.lowest

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


def test_a_compressor_comes_from_the_folder_where_it_was_saved(capsys: Output, tmp_path: Path) -> None:
    folder = FastV(keep=0.25, layer=1).save_pretrained(tmp_path / "saved")
    words = ["run", "--image", SCENE, "--ask", "x", "--compressor", str(folder), "--compressor.layer", "2", "--json"]
    assert main(words) == 0
    settings = json.loads(capsys.readouterr().out)["compressor"]["init_args"]
    assert (settings["keep"], settings["layer"]) == (0.25, 2)


def test_learned_parts_come_with_the_compressor(capsys: Output, tmp_path: Path) -> None:
    folder = mmtoken.learnable(mmtoken.load()[0], QueCC(keep=0.25)).save_pretrained(tmp_path / "saved")
    assert main(["run", "--image", SCENE, "--ask", "x", "--compressor", str(folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["compressor"]["class_path"].endswith("QueCC") and result["report"]["tokens_out"] == [16]


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


def test_the_table_of_compressors_is_readable_and_leaves_the_rest_to_json(capsys: Output) -> None:
    assert main(["list", "compressors"]) == 0
    head, *table = capsys.readouterr().out.splitlines()
    columns = head.split()
    assert columns[:3] == ["name", "year", "arXiv"] and columns[-1] == "needs"
    assert head.index("needs") <= 120  # all but the last column, which is not padded
    cells = {line.split()[0]: line.split() for line in table}
    shown = ["fastv", "2024", "2403.06764", "llm_layer", "exact", "same", "yes", "-", "-", "code", "rows"]
    assert cells["fastv"] == [*shown, "text_attention"]
    assert cells["divprune"][6:11] == ["-", "yes", "-", "oracle", "pairs"] and cells["random"][2] == "control"
    assert cells["downscale"][6:8] == ["most", "-"]
    assert main(["list", "compressors", "--json"]) == 0
    assert {"paper", "licence", "positions", "year", "parity"} <= set(json.loads(capsys.readouterr().out)[0])


def test_images_may_be_named_one_by_one(capsys: Output) -> None:
    assert main(["run", "--image", SCENE, "--ask", "read the number.", "--image", OTHER, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["visual_tokens"] == 128


def test_a_compressor_may_be_written_out(capsys: Output) -> None:
    ask = ["run", "--image", SCENE, "--ask", "x", "--json"]
    spec = "{class_path: fastv, init_args: {keep: 8}}"
    for words in (["--compressor", spec], ["--compressor", "fastv", "--compressor.init_args.keep", "8"]):
        assert main([*ask, *words, "--compressor.layer", "3"]) == 0
        settings = json.loads(capsys.readouterr().out)["compressor"]["init_args"]
        assert settings["keep"] == 8 and settings["layer"] == 3


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("qwen"), layers=3))


def test_a_model_of_dynamic_resolution_draws_overlays_and_sees_smaller_images(
    capsys: Output, tmp_path: Path, qwen: str
) -> None:
    overlay = tmp_path / "kept.png"
    ask = ["run", "--image", SCENE, OTHER, "--ask", "What is it?", "--model", qwen, "--max-new-tokens", "2", "--json"]
    assert main([*ask, "--compressor", "divprune", "--keep", "5", "--save-overlay", str(overlay)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["report"]["tokens_out"] == [5, 5] and Image.open(overlay).size == (384 + 8 + 384, 384)
    overlay.unlink()
    wide = tmp_path / "wide.png"
    Image.open(SCENE).resize((280, 140)).save(wide)
    ask[2:4] = [str(wide)]
    seen = []
    for words in ([], ["--compressor", "downscale", "--keep", "0.5"]):
        assert main([*ask, *words]) == 0
        seen.append(json.loads(capsys.readouterr().out)["visual_tokens"])
    assert seen[1] < seen[0]
    assert main([*ask, "--compressor", "downscale", "--keep", "0.5", "--save-overlay", str(overlay)]) == 2
    assert "makes the image smaller before this model sees it" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["wide.png"]


def test_doctor_says_what_fits(capsys: Output, qwen: str) -> None:
    assert main(["doctor", "--model", "tiny-llava"]) == 0
    out = capsys.readouterr().out
    assert "transformers" in out and "sdpa" in out
    # boxes instead of a budget, streams only, videos only, one token per frame only
    others = {"regionmask", "rekv", "stccacher", "videoscan"}
    assert all(f"\n  {name}" in out for name in names())
    assert {name for name in names() if re.search(rf"\n  {name} +no: ", out)} == others
    assert out.count("fits") == len(names()) - len(others)
    assert "RegionMask drops what boxes touch" in out and "ReKV acts in streams only" in out
    assert main(["doctor", "--json", "--model", qwen]) == 0
    findings = json.loads(capsys.readouterr().out)
    fits = findings["model"]["compressors"]
    assert {name for name, reason in fits.items() if reason is not None} == {
        "bus",
        "downscale",
        "regionmask",
        "rekv",
        "trips",
        "videoscan",
        "vlapruner",
    }
    assert "compressor.prepare" in fits["downscale"]
    assert findings["packages"]["torch"] and findings["attention"]["sdpa"] == "usable"
    assert main(["doctor", "--json"]) == 0
    assert "model" not in json.loads(capsys.readouterr().out)


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
