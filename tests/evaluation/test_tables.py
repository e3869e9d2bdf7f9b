"""Tables and reports show the results' own numbers, every entrant once."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mmtoken.evaluation.accuracy import ALL
from mmtoken.evaluation.tables import (
    Table,
    accuracy_report,
    accuracy_table,
    hooks_table,
    speed_report,
    speed_table,
    targets_table,
    types_table,
)
from tests.evaluation.results import NAMES, accuracy_results, speed_results


def test_columns_line_up_and_numbers_stand_to_the_right() -> None:
    table = Table(("name", "ms"), [("a", "1.5"), ("longer", "10.25")])
    assert table.text() == "name       ms\n-------------\na         1.5\nlonger  10.25"


def test_markdown_is_a_pipe_table() -> None:
    assert Table(("name", "ms"), [("a", "1")]).markdown() == "| name | ms |\n| --- | ---: |\n| a | 1 |"


@pytest.mark.parametrize(
    ("table", "names"),
    [
        (lambda: speed_table(speed_results()), NAMES),
        (lambda: hooks_table(speed_results()), ["UniformGrid keep=1", "FastV keep=1"]),
        (lambda: targets_table(speed_results()), [row["target"] for row in speed_results()["targets"]]),
        (lambda: accuracy_table(accuracy_results()), [*NAMES, "most frequent answer"]),
        (lambda: types_table(accuracy_results()), ["questions", *NAMES, "most frequent answer"]),
    ],
    ids=["speed", "hooks", "targets", "accuracy", "types"],
)
def test_every_row_is_there_once_and_as_wide_as_the_header(table: Any, names: list[str]) -> None:
    made = table()
    assert [row[0] for row in made.rows] == names
    assert {len(row) for row in made.rows} == {len(made.header)}
    assert len(set(made.text().splitlines()[2:])) == len(names)


def cells(table: Table, name: str) -> dict[str, str]:
    """Later columns of the same title do not replace earlier ones."""
    row = next(row for row in table.rows if row[0] == name)
    return dict(reversed(list(zip(table.header, row, strict=True))))


def test_the_speed_table_shows_what_was_measured() -> None:
    row = next(row for row in speed_results()["results"] if row["name"] == "FastV keep=0.125")
    shown = cells(speed_table(speed_results()), row["name"])
    assert (shown["tokens"], shown["layer avg"]) == ("2", f"{row['layer_average']:.0f}")
    assert shown["prefill ms"] == f"{row['milliseconds']['prefill']['median']:.1f}"
    assert shown["decode ms/token"] == f"{row['milliseconds']['decode_per_token']['median']:.2f}"
    assert shown["speed-up"] == f"{row['speedup']['prefill_with_scoring']['median']:.2f}"
    assert shown["of FLOPs"] == f"{row['share_of_flop_ratio']:.2f}"
    assert shown["peak MiB"] == f"{row['peak_mib']:.1f}" and shown["GFLOPs"] == f"{row['flops'] / 1e9:.1f}"


def test_a_run_without_decoding_leaves_its_column_empty() -> None:
    row = {**speed_results()["results"][0]}
    row["milliseconds"] = {k: v for k, v in row["milliseconds"].items() if k != "decode_per_token"}
    assert cells(speed_table({"results": [row]}), "dense")["decode ms/token"] == ""


def test_the_accuracy_table_shows_score_and_interval_of_each_benchmark() -> None:
    results = accuracy_results()
    row = next(row for row in results["results"] if row["name"] == "DivPrune keep=16")
    shown = cells(accuracy_table(results), row["name"])
    for benchmark, title in results["titles"].items():
        assert shown[title] == f"{row['accuracy'][benchmark][ALL]['accuracy']:.3f}"
    score = row["accuracy"]["shapes_qa"][ALL]
    assert shown["95 %"] == f"({score['low']:.2f}-{score['high']:.2f})"
    assert shown["tokens"] == "16.0" and shown["layer avg"] == "16.0"


def test_the_types_table_has_a_column_per_question_type_and_counts_them() -> None:
    results = accuracy_results()
    table = types_table(results)
    kinds = [kind for kind in results["baselines"]["shapes_qa"] if kind != ALL]
    assert list(table.header[1:]) == [*kinds, "digits on photographs"]
    counts = list(map(int, table.rows[0][1:]))
    assert sum(counts) == sum(results["split"]["questions"].values())


def test_a_missed_target_is_said_in_words() -> None:
    target = {"target": "one", "value": 0.5, "wanted": 0.85, "met": False}
    missed = speed_report({**speed_results(), "targets": [target, {**target, "target": "two", "met": True}]})
    assert "Missed: one." in missed and "| one | 0.500 | 0.85 | NO |" in missed
    met = speed_report({**speed_results(), "targets": [{**target, "met": True}]})
    assert "All met." in met and "Missed" not in met


@pytest.mark.parametrize("kind", ["speed", "accuracy"])
def test_a_report_says_where_and_with_what_it_was_measured_and_who_was_refused(kind: str) -> None:
    results = {**(speed_results() if kind == "speed" else accuracy_results()), "refused": {"X keep=4": "for a reason."}}
    text = speed_report(results) if kind == "speed" else accuracy_report(results, ["a.png", "b.png"])
    where = results["environment"]
    assert f"Measured on {where['device']} ({where['clock']})" in text
    assert all(f"{name} {number}" in text for name, number in where["versions"].items())
    assert "## Refused" in text and "- X keep=4: for a reason." in text
    for name in NAMES:
        assert f"| {name} |" in text
    pictures = re.findall(r"!\[\w+]\((.*?)\)", text)
    assert pictures == ([] if kind == "speed" else ["a.png", "b.png"])
    plain = {**results, "refused": {}}
    assert "Refused" not in (speed_report(plain) if kind == "speed" else accuracy_report(plain, []))
