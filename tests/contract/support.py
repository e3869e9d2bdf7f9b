"""Which compressor works with which model: the tables in README.md and docs/support.md, from what the tests found.

    make support                       # tests one setting per compressor, writes tests/contract/support.json
    python -m tests.contract.support   # writes the tables from that file

`make test-contract` adds all other settings to the file. `make check` fails when a test of a pair failed, when no run
has reached a pair, and when the tables say something else than the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mmtoken.evaluation.tables import Table
from mmtoken.wholefile import whole_file
from tests.backbones.tiny_models import CELLS
from tests.contract import matrix

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("support.json")
SCHEMA_VERSION = 1
_TABLE = re.compile(r"(<!-- support -->\n)(.*?)(<!-- end -->)", re.DOTALL)

Found = Mapping[str, Mapping[str, Mapping[str, int]]]
"""Setting -> cell -> outcome -> number of tests."""


def cell_name(cell: matrix.Cell) -> str:
    """A cell as a key of JSON."""
    return "/".join(cell)


def reason(name: str, cell: matrix.Cell) -> str | None:
    """Why a pair is refused, None where it is not; tests/contract/test_refusals.py sees each refusal."""
    return matrix.refused(name, cell) or matrix.refused_when_called(name, cell)


def wanted() -> dict[str, set[str]]:
    """Setting -> cells whose tests the file must hold: one setting of each compressor."""
    return {
        name: {cell_name(cell) for cell in CELLS if reason(name, cell) is None}
        for name in matrix.COMPRESSORS
        if matrix.stands_for_its_class(name)
    }


def read(file: Path = RESULTS) -> dict[str, Any]:
    """What the file holds; an empty one if there is none."""
    if not file.is_file():
        return {"schema_version": SCHEMA_VERSION, "environment": {}, "pairs": {}}
    results: dict[str, Any] = json.loads(file.read_text())
    return results


def add(file: Path, found: Found) -> None:
    """Put what a run found into the file; pairs that it did not reach stay, those that are no more go."""
    known = {name: {cell_name(cell) for cell in CELLS if reason(name, cell) is None} for name in matrix.COMPRESSORS}
    pairs = read(file)["pairs"]
    merged = {
        name: {
            cell: found.get(name, {}).get(cell) or pairs[name][cell]
            for cell in sorted(cells)
            if cell in found.get(name, {}) or cell in pairs.get(name, {})
        }
        for name, cells in sorted(known.items())
    }
    packages = ("torch", "transformers", "timm")
    results = {
        "schema_version": SCHEMA_VERSION,
        "environment": {"device": "cpu", **{package: version(package) for package in packages}},
        "pairs": {name: cells for name, cells in merged.items() if cells},
    }
    with whole_file(file) as target:
        target.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def untested(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(setting, cell) of the pairs that the file lacks; the tables say so."""
    pairs = results["pairs"]
    return [(name, cell) for name, cells in wanted().items() for cell in sorted(cells - set(pairs.get(name, {})))]


def failures(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(setting, cell) of the pairs of which a test failed, or none passed."""
    return [
        (name, cell)
        for name, cells in results["pairs"].items()
        for cell, counts in cells.items()
        if counts["failed"] or not counts["passed"]
    ]


def families() -> list[str]:
    """Families in the order of the cells."""
    return list(dict.fromkeys(family for family, _ in CELLS))


def marks(results: Mapping[str, Any]) -> tuple[dict[tuple[str, matrix.Cell], str], list[str]]:
    """For every pair a tick, a question mark, or the number of the reason why it is refused; and the reasons."""
    open_ = {*untested(results), *failures(results)}
    reasons: list[str] = []
    found = {}
    for name in wanted():
        for cell in CELLS:
            why = reason(name, cell)
            if why is not None and why not in reasons:
                reasons.append(why)
            mark = "?" if (name, cell_name(cell)) in open_ else "yes"
            found[name, cell] = mark if why is None else f"({reasons.index(why) + 1})"
    return found, reasons


def full_table(results: Mapping[str, Any]) -> str:
    """A row for each compressor, a column for each family; below it why pairs are refused."""
    found, reasons = marks(results)
    rows = []
    for name in wanted():
        cells = {cell: found[name, cell] for cell in CELLS}
        row = [name]
        for family in families():
            row.append(" / ".join(mark for cell, mark in cells.items() if cell[0] == family))
        rows.append(row)
    notes = [f"{number}. \u201c... {why} ...\u201d" for number, why in enumerate(reasons, 1)]
    return "\n".join([Table(["", *families()], rows).markdown(), "", *notes]) + "\n"


def short_table(results: Mapping[str, Any]) -> str:
    """A row for each model input: how many compressors work, and which do not."""
    found, _ = marks(results)
    rows = []
    for cell in CELLS:
        works = [name for name in wanted() if found[name, cell] == "yes"]
        unknown = [name for name in wanted() if found[name, cell] == "?"]
        refused = [name for name in wanted() if reason(name, cell) is not None]
        count = f"{len(works)} of {len(wanted())}" + (f", {len(unknown)} not tested" if unknown else "")
        rows.append([cell[0], cell[1], count, ", ".join(refused) or "-"])
    return Table(["family", "input", "compressors", "refused"], rows).markdown() + "\n"


def write_tables() -> None:
    """Bring the tables of README.md and docs/support.md up to date."""
    results = read()
    for file, text in ((ROOT / "README.md", short_table(results)), (ROOT / "docs" / "support.md", full_table(results))):
        page = _TABLE.sub(lambda shown, table=text: f"{shown[1]}{table}{shown[3]}", file.read_text())
        file.write_text(page)


def between(page: str) -> str:
    """What stands between the markers of the table on a page."""
    shown = _TABLE.search(page)
    assert shown is not None
    return shown[2]


if __name__ == "__main__":
    write_tables()
