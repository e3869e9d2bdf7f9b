"""The tables of supported pairs say what the tests found, and a hole or a failure shows."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import versions
from tests.backbones.tiny_models import CELLS
from tests.contract import support
from tests.contract.conftest import pair_of
from tests.contract.matrix import COMPRESSORS

FINE = {"passed": 2, "failed": 0, "skipped": 0}
BROKEN = {"passed": 5, "failed": 1, "skipped": 0}


def complete() -> dict[str, Any]:
    pairs = {name: {cell: dict(FINE) for cell in cells} for name, cells in support.wanted().items()}
    return {"schema_version": 1, "environment": {"torch": "2"}, "pairs": pairs}


def test_a_complete_file_has_no_problems_and_a_hole_is_one() -> None:
    results = complete()
    assert support.untested(results) == support.failures(results) == []
    assert "?" not in support.full_table(results) + support.short_table(results)
    del results["pairs"]["fastv"]["llava/image"]
    assert support.untested(results) == [("fastv", "llava/image")] and support.failures(results) == []
    assert "| fastv | ? |" in support.full_table(results)
    names, cell = list(support.wanted()), ("llava", "image")
    rest = [name for name in names if support.reason(name, cell) is not None]
    count = f"{len(names) - len(rest) - 1} of {len(names)}, 1 not tested"
    line = f"| llava | image | {count} | {', '.join(rest)} |"
    assert line in support.short_table(results)


@pytest.mark.parametrize("counts", [BROKEN, {"passed": 0, "failed": 0, "skipped": 3}])
def test_failures_and_pairs_that_only_skip_are_problems(counts: dict[str, int]) -> None:
    results = complete()
    results["pairs"]["random"]["llava/image"] = counts
    assert support.failures(results) == [("random", "llava/image")] and support.untested(results) == []


def test_refusals_are_numbered_and_explained_once() -> None:
    text = support.full_table(complete())
    reasons = {support.reason(name, cell) for name in support.wanted() for cell in CELLS} - {None}
    notes = [line for line in text.splitlines() if line[:1].isdigit()]
    assert len(notes) == len(reasons) and all(any(str(why) in note for note in notes) for why in reasons)
    assert f"({len(notes)})" in text and f"({len(notes) + 1})" not in text


def test_a_run_adds_its_pairs_and_leaves_the_others(tmp_path: Path) -> None:
    file = tmp_path / "support.json"
    support.add(file, {"fastv": {"llava/image": BROKEN, "llava/sound": FINE}, "gone": {"llava/image": FINE}})
    support.add(file, {"fastv": {"smolvlm/image": FINE}, "random": {"llava/image": FINE}})
    pairs = json.loads(file.read_text())["pairs"]
    assert pairs == {"fastv": {"llava/image": BROKEN, "smolvlm/image": FINE}, "random": {"llava/image": FINE}}
    support.add(file, {"fastv": {"llava/image": FINE}})
    assert json.loads(file.read_text())["pairs"]["fastv"]["llava/image"] == FINE
    assert set(pairs) <= set(COMPRESSORS)


@pytest.mark.parametrize(("place", "pair"), [("contract", ("fastv", "llava/image")), ("engine", None)])
def test_only_tests_of_the_contract_count(place: str, pair: tuple[str, str] | None) -> None:
    given = SimpleNamespace(params={"name": "fastv", "cell": ("llava", "image")})
    item: Any = SimpleNamespace(path=support.ROOT / "tests" / place / "test_some.py", callspec=given)
    assert pair_of(item) == pair


def test_versions_say_which_families_hold() -> None:
    results = copy.deepcopy(complete())
    results["pairs"]["fastv"]["smolvlm/image"] = BROKEN
    said = versions.lines(results)
    assert said[0] == "torch 2" and len(said) == 1 + len(support.families())
    assert [line.split()[0] for line in said[1:] if "FAILS" in line] == ["smolvlm"]


def test_the_tables_are_those_of_the_last_run() -> None:
    """Out of date? Run `make support`, which tests every pair and writes the tables."""
    results = support.read()
    assert support.failures(results) == support.untested(results) == []
    assert support.between((support.ROOT / "README.md").read_text()) == support.short_table(results)
    assert support.between((support.ROOT / "docs" / "support.md").read_text()) == support.full_table(results)
