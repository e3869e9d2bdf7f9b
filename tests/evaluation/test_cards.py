"""Cards: what is taken from classes and results, and what cannot be."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmtoken.cli.main import main
from mmtoken.compressors import FastV, FlowCut, FlowCutHR, Random
from mmtoken.compressors.registry import names
from mmtoken.evaluation import cards
from tests.compressors.test_registry import Outsider

Output = pytest.CaptureFixture[str]


def result(name: str, correct: int) -> dict[str, Any]:
    """A row of an accuracy result."""
    method, _, keep = name.partition(" keep=")
    score = {"correct": correct, "total": 10, "accuracy": correct / 10, "low": 0.1, "high": 0.99}
    return {
        "name": name,
        "method": method,
        "keep": float(keep or 1),
        "layer_average": {"shapes_qa": 31.25},
        "flops": {"shapes_qa": 100.0},
        "flops_dense": {"shapes_qa": 400.0},
        "kv_share": {"shapes_qa": 0.3125},
        "accuracy": {"shapes_qa": {"all": score}},
    }


def accuracy(model: str) -> dict[str, Any]:
    """A small accuracy result: dense, two of FastV, one of Random."""
    return {
        "kind": "accuracy",
        "model": model,
        "weights": "trained",
        "environment": {"versions": {"torch": "2.14.1"}},
        "split": {"questions": {"shapes_qa": 10}},
        "titles": {"shapes_qa": "Shapes"},
        "results": [
            result("dense", 9),
            result("Random keep=0.5", 3),
            result("FastV keep=0.5", 8),
            result("FastV keep=0.25", 7),
        ],
    }


def test_results_are_split_by_method_and_joined_over_models() -> None:
    split = cards.split_results([("a.json", accuracy("small")), ("b.json", accuracy("large"))])
    assert set(split) == {"fastv", "random"}
    assert [model["model"] for model in split["fastv"]["models"]] == ["small", "large"]
    assert [row["name"] for row in split["fastv"]["models"][1]["results"]] == ["FastV keep=0.5", "FastV keep=0.25"]
    assert split["random"]["models"][0]["dense"]["name"] == "dense"


def test_a_card_shows_title_paper_idea_facts_preset_and_results() -> None:
    text = cards.card("fastv", FastV, cards.split_results([("a.json", accuracy("small"))])["fastv"])
    assert text.startswith("# FastV\n") and "arXiv 2403.06764." in text
    assert "One cut inside the decoder by the attention of the prompt's last token." in text
    assert "Attributes:" not in text
    assert "| layer | `2` | K, the first layer (0-based) that sees the kept tokens only; at least 1. |" in text
    assert "| parity | official code |" in text and "class_path: mmtoken.compressors.FastV" in text
    assert "| FastV keep=0.25 | 31.2 | 0.250 | 0.312 | 0.700 (0.10-0.99) |" in text
    assert "| dense | 31.2 | 0.250 | 0.312 | 0.900 (0.10-0.99) |" in text and "`a.json`" in text
    assert "## Results" not in cards.card("fastv", FastV)


def test_a_control_has_a_budget_in_its_preset_and_no_paper() -> None:
    assert yaml.safe_load(cards.preset(Random))["init_args"]["keep"] == cards.CONTROL_KEEP
    assert "control." not in cards.card("random", Random).split("## Use")[0].splitlines()


def test_settings_are_read_from_the_attributes_section() -> None:
    @dataclass(frozen=True)
    class Spread(Outsider):
        """First line.

        A list:
            indented text: stays.

        Attributes:
            low, high: between which layers,
                both inside.
            other: a | b.
        """

    text, settings = cards.docstring(Spread)
    assert text == "First line.\n\nA list:\n    indented text: stays."
    both = "between which layers, both inside."
    assert settings == {"low": both, "high": both, "other": "a | b."}


def test_settings_taken_over_from_another_method_keep_their_meaning() -> None:
    assert FlowCut in FlowCutHR.__mro__ and "interval" not in cards.docstring(FlowCutHR)[1]
    meaning = cards.docstring(FlowCut)[1]["interval"]
    assert f"| interval | `2` | {meaning} |" in cards.card("flowcuthr", FlowCutHR)


def test_every_setting_of_every_compressor_is_explained() -> None:
    for name, cls in names().items():
        assert "` |  |" not in cards.card(name, cls), name


def test_the_command_writes_and_renews_folders(tmp_path: Path, capsys: Output) -> None:
    folder = tmp_path / "shelf"
    assert main(["list", "compressors", "--cards", str(folder)]) == 0
    assert capsys.readouterr().out.count("wrote ") == 2 * len(names())
    plain = (folder / "fastv" / "README.md").read_text()
    assert plain == cards.card("fastv", FastV)
    file = tmp_path / "accuracy-small.json"
    file.write_text(json.dumps(accuracy("small")))
    assert main(["list", "compressors", "--cards", str(folder), "--results", str(file)]) == 0
    assert "## Results" in (folder / "fastv" / "README.md").read_text()
    assert not (folder / "tome" / "results.json").exists()
    (folder / "fastv" / "README.md").write_text("stale")
    assert main(["list", "compressors", "--cards", str(folder)]) == 0  # results that lie there are read
    assert "0.700 (0.10-0.99)" in (folder / "fastv" / "README.md").read_text()
    assert not [file for file in folder.rglob("*") if file.name.startswith(".")]


def test_what_cannot_be_written_or_read_is_refused(tmp_path: Path, capsys: Output) -> None:
    file = tmp_path / "file"
    file.write_text("[1]")
    speed = tmp_path / "speed.json"
    speed.write_text('{"kind": "speed"}')
    folder = str(tmp_path / "shelf")
    for words, message in (
        (["backbones", "--cards", folder], f"cards={folder!r} are made of compressors"),
        (["compressors", "--results", str(file)], "name their folder with --cards"),
        (["compressors", "--cards", str(file)], f"cards={str(file)!r}: no folder can be made"),
        (["compressors", "--cards", folder, "--json"], "not allowed with"),
        (["compressors", "--cards", folder, "--results", str(file)], "holds a list"),
        (["compressors", "--cards", folder, "--results", str(speed)], "is of kind 'speed'"),
        (["compressors", "--cards", folder, "--results", str(tmp_path / "none.json")], "cannot be read"),
    ):
        assert main(["list", *words]) == 2
        assert message in capsys.readouterr().err, words
    assert not Path(folder).exists()


def test_what_was_seen_on_videos_goes_into_the_card(tmp_path: Path) -> None:
    cls = names()["dycoke"]
    assert "On videos" not in cards.contents("dycoke", cls, tmp_path)["README.md"]
    (tmp_path / "video.md").write_text("Clips.\n\n![accuracy](video.png)\n")
    text = cards.contents("dycoke", cls, tmp_path)["README.md"]
    assert text.endswith("## On videos\n\nClips.\n\n![accuracy](video.png)\n")


def test_what_was_seen_in_closed_loop_goes_into_the_card_behind_its_reading(tmp_path: Path) -> None:
    cls = names()["vlapruner"]
    (tmp_path / "control.md").write_text("Episodes.\n")
    assert cards.contents("vlapruner", cls, tmp_path)["README.md"].endswith("## In closed loop\n\nEpisodes.\n")
    (tmp_path / "control-reading.md").write_text("A toy.\n")
    text = cards.contents("vlapruner", cls, tmp_path)["README.md"]
    assert text.endswith("## In closed loop\n\nA toy.\n\nEpisodes.\n")
