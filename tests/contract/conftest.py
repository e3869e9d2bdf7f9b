"""`--support FILE` writes what the contract tests found for every pair of compressor and model input.

Pairs that a run does not reach, or does not end, keep what FILE says of them: a new family needs its own tests only,
and a run that is broken off has lost little, for it goes from family to family.
"""

from __future__ import annotations

import collections
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.backbones.tiny_models import CELLS
from tests.contract import support

FOUND = pytest.StashKey[dict[str, dict[str, dict[str, int]]]]()
TOTALS = pytest.StashKey[collections.Counter[tuple[str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support", metavar="FILE", type=Path, help="add what was found for each pair to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FOUND] = {}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[TOTALS] = collections.Counter(pair for item in items if (pair := pair_of(item)) is not None)
    if config.getoption("--support", None) is not None:
        order = {support.cell_name(cell): number for number, cell in enumerate(CELLS)}
        items.sort(key=lambda item: order.get((pair_of(item) or ("", ""))[1], -1))


def pair_of(item: pytest.Item) -> tuple[str, str] | None:
    """(setting, cell) of a contract test, None if it is about no pair; tests elsewhere have a name and a cell, too."""
    if Path(__file__).parent not in item.path.parents:
        return None
    params = getattr(getattr(item, "callspec", None), "params", {})
    return (params["name"], support.cell_name(params["cell"])) if {"name", "cell"} <= set(params) else None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    report = (yield).get_result()
    pair = pair_of(item)
    if pair is not None:
        # The processes of xdist hand reports over, not items.
        report.user_properties.append(("pair", [*pair, item.config.stash[TOTALS][pair]]))


@pytest.hookimpl(hookwrapper=True)
def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> Generator[None, None, None]:
    yield
    pair = dict(getattr(report, "user_properties", ())).get("pair")
    if pair is not None and (report.when == "call" or report.outcome != "passed"):
        name, cell, total = pair
        none = {"passed": 0, "failed": 0, "skipped": 0, "left": total}
        counts = config.stash[FOUND].setdefault(name, {}).setdefault(cell, none)
        counts[report.outcome] += 1
        counts["left"] -= 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    file = session.config.getoption("--support", None)
    if file is not None and not hasattr(session.config, "workerinput"):
        ended = {
            name: {
                cell: {outcome: count for outcome, count in counts.items() if outcome != "left"}
                for cell, counts in cells.items()
                if counts["left"] <= 0
            }
            for name, cells in session.config.stash[FOUND].items()
        }
        support.add(file, ended)
