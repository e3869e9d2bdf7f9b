"""Rank correlations against known values, and what is left out or undefined."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mmtoken.compressors.registry import names
from mmtoken.errors import InputError
from mmtoken.evaluation.ranks import (
    PUBLISHED,
    compare,
    correlate,
    method_scores,
    ranks,
    ranks_table,
    scores_at,
    spearman,
)

CARD = Path(__file__).parents[2] / "models" / "tiny_llava"


@pytest.mark.parametrize(
    ("first", "second", "rho"),
    [
        # the textbook example of IQ and hours of television: 1 - 6 * 194 / 990
        ([106, 86, 100, 101, 99, 103, 97, 113, 112, 110], [7, 0, 27, 50, 28, 29, 20, 12, 6, 17], -29 / 165),
        ([1, 2, 3, 4], [10, 20, 30, 31], 1.0),
        ([1, 2, 3, 4], [9, 8, 7, 1], -1.0),
        ([1, 2, 2, 3], [1, 3, 2, 4], 4.5 / math.sqrt(4.5 * 5)),
        ([1, 1, 2, 2], [1, 2, 3, 4], 4 / math.sqrt(4 * 5)),
        ([0.1, 0.2, 0.3], [5, 5, 5], None),
        ([1], [1], None),
        ([], [], None),
    ],
)
def test_known_values(first: list[float], second: list[float], rho: float | None) -> None:
    found = spearman(first, second)
    assert found is None if rho is None else found == pytest.approx(rho)
    assert spearman(second, first) == found
    assert spearman([math.exp(x / 50) for x in first], second) == found  # only the order counts


def test_ranks_share_ties() -> None:
    assert ranks([3.0, 1.0, 3.0, 2.0, 3.0]) == [4.0, 1.0, 4.0, 2.0, 4.0]


def test_methods_that_one_list_lacks_are_left_out_and_named() -> None:
    found = correlate({"A": 3, "B": 2, "C": 1, "D": 9}, {"A": 30, "B": 20, "C": 10, "E": 0})
    assert (found.rho, found.count, found.methods, found.missing) == (1.0, 3, ("A", "B", "C"), ("D", "E"))
    assert found.chance == pytest.approx(1 / 6)  # one order of six


def test_fewer_than_three_methods_say_nothing() -> None:
    found = correlate({"A": 1, "B": 2}, {"A": 1, "B": 2, "C": 3})
    assert (found.rho, found.chance, found.count) == (None, None, 2)


@pytest.mark.parametrize(
    ("second", "chance"),
    [([1, 2, 3, 4], 1 / 24), ([4, 3, 2, 1], 1.0), ([2, 1, 3, 4], 4 / 24), ([1, 1, 3, 4], 2 / 24)],
)
def test_the_share_of_orders_that_agree_as_well(second: list[float], chance: float) -> None:
    first = dict(zip("ABCD", [1.0, 2.0, 3.0, 4.0], strict=True))
    found = correlate(first, dict(zip("ABCD", second, strict=True)))
    assert found.chance == pytest.approx(chance)


def test_many_methods_have_a_correlation_without_that_share() -> None:
    many = {str(number): float(number) for number in range(12)}
    assert correlate(many, many).rho == 1.0 and correlate(many, many).chance is None


def test_the_published_table_is_complete_and_of_methods_that_exist_or_are_known() -> None:
    assert list(PUBLISHED) == [192, 128, 64]
    assert len({frozenset(table) for table in PUBLISHED.values()}) == 1 and len(PUBLISHED[64]) == 8
    assert {cls.__name__ for cls in names().values()} >= {"ToMe", "FastV", "PyramidDrop", "VisionZip", "DivPrune"}
    assert PUBLISHED[128]["SparseVLM"] == 97.2 and PUBLISHED[64]["FastV"] == 75.2 and PUBLISHED[192]["HoloV"] == 96.5


def row(method: str, keep: float, average: float, correct: float, control: bool = False) -> dict[str, Any]:
    return {
        "method": method,
        "keep": keep,
        "control": control,
        "tokens_in": {"a": 64.0, "b": 64.0},
        "layer_average": {"a": average, "b": average},
        "accuracy": {"a": {"all": {"accuracy": correct}}, "b": {"all": {"accuracy": correct / 2}}},
    }


def results(model: str = "small") -> dict[str, Any]:
    return {
        "kind": "accuracy",
        "model": model,
        "results": [
            row("dense", 1.0, 64, 0.8),
            row("Random", 0.25, 16, 0.4, control=True),
            row("One", 0.25, 16, 0.6),
            row("One", 0.5, 32, 0.7),
            row("Two", 0.25, 40, 0.72),
        ],
    }


def test_scores_are_means_over_benchmarks_relative_to_dense() -> None:
    assert method_scores(results(), 0.25) == pytest.approx({"One": 75.0, "Two": 90.0})
    assert method_scores(results(), 0.25, controls=True)["Random"] == pytest.approx(50.0)
    assert method_scores(results(), 0.25, relative=False) == pytest.approx({"One": 0.45, "Two": 0.54})


def test_scores_at_a_layer_average_lie_on_the_measured_line() -> None:
    assert scores_at(results(), 0.25) == pytest.approx({"One": 75.0})  # two was never measured so far down
    assert scores_at(results(), 0.375) == pytest.approx({"One": 81.25})
    assert scores_at(results(), 0.75)["One"] == pytest.approx(93.75)  # half way from 87.5 to the dense model
    assert scores_at(results(), 0.8125)["Two"] == pytest.approx(95.0)
    assert scores_at(results(), 1.0, controls=True) == pytest.approx({"One": 100.0, "Two": 100.0, "Random": 100.0})
    assert scores_at(results(), 0.1) == {}


@pytest.mark.parametrize("keep", [0.125, 1])
def test_a_budget_that_was_not_measured_is_refused(keep: float) -> None:
    with pytest.raises(InputError, match=r"was not measured; the results hold 0\.25, 0\.5"):
        method_scores(results(), keep)


def test_other_results_and_nonsense_are_refused() -> None:
    with pytest.raises(InputError, match="kind 'speed'"):
        method_scores({"kind": "speed"}, 0.5)
    with pytest.raises(InputError, match="kind 'speed'"):
        scores_at({"kind": "speed"}, 0.5)
    with pytest.raises(InputError, match="NaN"):
        ranks([1.0, math.nan])
    with pytest.raises(InputError, match="first has 2 values and second 1"):
        spearman([1, 2], [1])


def test_the_shipped_results_are_compared_with_each_other_and_with_what_was_published() -> None:
    files = [CARD / f"accuracy-{name}.json" for name in ("tiny-llava", "tiny-llava-brief-dense")]
    found = compare([json.loads(file.read_text()) for file in files], keeps=[0.25])
    assert json.loads(json.dumps(found)) == found and found["kind"] == "ranks" and "RESTORE" in found["source"]
    assert len(found["correlations"]) == 3 * 3 + 1
    last = found["correlations"][-1]
    assert (last["basis"], last["first"], last["second"]) == ("keep=0.25", "tiny-llava", "tiny-llava-brief-dense")
    assert last["n"] >= 5 and last["missing"] == []
    published = [row for row in found["correlations"] if row["second"] == "published"]
    assert len(published) == 6 and all(set(row["methods"]) <= set(PUBLISHED[64]) for row in published)
    for row in found["correlations"]:
        assert (row["rho"] is None) or (-1 <= row["rho"] <= 1 and row["n"] >= 3)
    table = ranks_table(found).text()
    assert "tiny-llava / published" in table and " n " in table.splitlines()[0]
