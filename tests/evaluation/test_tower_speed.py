"""What a run of the tower benchmark says, on a tower of two tiny blocks."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtoken.errors import InputError, MMTokenError
from mmtoken.evaluation import tower_speed
from mmtoken.evaluation.tower_speed import MODES, VARIANTS, TowerSize, main, measure, tower_report

TINY = TowerSize(width=16, mlp=24, heads=2, side=4, layers=2, frames=8)


@functools.cache
def results() -> dict[str, Any]:
    return measure(TINY, torch.device("cpu"), torch.float32, rounds=2, modes=tuple(MODES))


def test_results_are_data_with_device_versions_and_sizes() -> None:
    found = results()
    assert json.loads(json.dumps(found)) == found
    assert (found["schema_version"], found["kind"], found["dtype"], found["rounds"]) == (1, "tower", "float32", 2)
    assert found["weights"].startswith("random") and len(found["load_average"]) == 2
    assert found["size"]["patches"] == 16 and found["environment"]["clock"] == "process CPU time, one thread"
    assert [(row["mode"], row["name"]) for row in found["results"]] == [(m, n) for m in MODES for n in VARIANTS]


def test_times_stand_beside_what_the_multiply_adds_promise() -> None:
    c, t, n, m = 16, 16, 4, 2 * 16 * 24
    some = ((t + 3 * n) * c * c + 2 * n * t * c + n * m) / (4 * t * c * c + 2 * t * t * c + t * m)
    wanted = {"dense": 1, "u=0.25 N=2": (1 + some) / 2, "u=0.25 N=4": (1 + 3 * some) / 4, "u=1": 1}
    wanted["u=0.25 N=2 shared"] = wanted["u=0.25 N=2"]
    for row in results()["results"]:
        assert row["share_of_multiply_adds"] == pytest.approx(wanted[row["name"]], abs=1e-4)
        assert row["share_of_time"]["count"] == row["milliseconds"]["tower"]["count"] == 2
        assert row["milliseconds"]["tower"]["median"] > 0
        if row["name"] == "dense":
            assert row["share_of_time"]["median"] == 1.0 and row["compressor"] is None
        else:
            assert row["compressor"]["class_path"] == "mmtoken.compressors.STCCacher"


def test_computing_all_patches_is_the_plain_tower() -> None:
    assert results()["u=1 is dense to the bit"] is True


def test_the_default_shape_is_that_of_siglip() -> None:
    size = TowerSize()
    assert (size.width, size.mlp, size.side**2, size.layers, size.heads) == (1152, 4304, 729, 27, 16)


def test_the_report_names_device_load_and_every_variant() -> None:
    text = tower_report(results())
    for words in ("CPU", "load average", "Medians of 2", "random weights", "u=1 is that of the plain tower", *VARIANTS):
        assert words in text


def test_both_files_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[TowerSize] = []

    def quick(size: TowerSize, *args: Any, **kwargs: Any) -> dict[str, Any]:
        asked.append(size)
        return results()

    monkeypatch.setattr(tower_speed, "measure", quick)
    assert main(["--out", str(tmp_path / "tower.json"), "--frames", "4"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tower.json", "tower.md"]
    assert json.loads((tmp_path / "tower.json").read_text())["kind"] == "tower"
    assert (asked[0].layers, asked[0].frames) == (2, 4)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--rounds", "-1"], "rounds=-1"),
        (["--frames", "0"], "frames=0"),
        (["--device", "toaster"], "device='toaster'"),
        (["--out", "tower.txt"], r"not a \.json file"),
    ],
)
def test_bad_arguments_are_named(argv: list[str], words: str) -> None:
    with pytest.raises((MMTokenError, InputError), match=words):
        main(argv)
