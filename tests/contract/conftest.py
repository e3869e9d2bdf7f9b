"""`--support FILE` writes what the contract tests found for every pair of compressor and model input.

Pairs that a run does not reach keep what FILE says of them, so that a new family needs its own tests only.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.contract import support

FOUND = pytest.StashKey[dict[str, dict[str, dict[str, int]]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support", metavar="FILE", type=Path, help="add what was found for each pair to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FOUND] = {}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    report = (yield).get_result()
    params = getattr(getattr(item, "callspec", None), "params", {})
    if {"name", "cell"} <= set(params):
        # The processes of xdist hand reports over, not items.
        report.user_properties.append(("pair", [params["name"], support.cell_name(params["cell"])]))


@pytest.hookimpl(hookwrapper=True)
def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> Generator[None, None, None]:
    yield
    pair = dict(getattr(report, "user_properties", ())).get("pair")
    if pair is not None and (report.when == "call" or report.outcome != "passed"):
        name, cell = pair
        counts = config.stash[FOUND].setdefault(name, {}).setdefault(cell, {"passed": 0, "failed": 0, "skipped": 0})
        counts[report.outcome] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    file = session.config.getoption("--support", None)
    if file is not None and not hasattr(session.config, "workerinput"):
        support.add(file, session.config.stash[FOUND])
