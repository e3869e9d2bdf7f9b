"""Makes one test of every case file: the test of a module `test_<method>.py` that asks for `case_path`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden.case import FOLDER, HOME, METHODS, find_cases

ABSENT = "no cases"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise by the files that are there; a method without any gets one entry that says so."""
    if "case_path" not in metafunc.fixturenames:
        return
    method = metafunc.module.METHOD
    paths = find_cases(FOLDER, method)
    metafunc.parametrize("case_path", paths or [FOLDER / method / ABSENT], ids=lambda path: path.name)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a folder of the caller's own, methods without cases are left out, as long as there is any case at all."""
    if FOLDER == HOME or not any(find_cases(FOLDER, method) for method in METHODS):
        return
    absent = [item for item in items if _path(item).name == ABSENT]
    if absent:
        config.hook.pytest_deselected(items=absent)
        items[:] = [item for item in items if item not in absent]


def _path(item: pytest.Item) -> Path:
    call = getattr(item, "callspec", None)
    return Path() if call is None else call.params.get("case_path", Path())
