"""Do methods rank alike on two models? Spearman's rank correlation, and published ranks to compare with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, permutations
from typing import Any

from mmtoken.errors import InputError
from mmtoken.evaluation.accuracy import ALL
from mmtoken.evaluation.tables import Table

PUBLISHED: Mapping[int, Mapping[str, float]] = {
    192: {
        "ToMe": 96.9,
        "FastV": 96.0,
        "PyramidDrop": 96.8,
        "SparseVLM": 98.1,
        "VisionZip": 96.8,
        "DivPrune": 96.9,
        "VisPruner": 97.5,
        "HoloV": 96.5,
    },
    128: {
        "ToMe": 95.1,
        "FastV": 91.8,
        "PyramidDrop": 84.5,
        "SparseVLM": 97.2,
        "VisionZip": 95.6,
        "DivPrune": 96.3,
        "VisPruner": 96.3,
        "HoloV": 95.5,
    },
    64: {
        "ToMe": 91.6,
        "FastV": 75.2,
        "PyramidDrop": 80.9,
        "SparseVLM": 90.6,
        "VisionZip": 93.0,
        "DivPrune": 93.8,
        "VisPruner": 92.8,
        "HoloV": 92.2,
    },
}
"""Tokens of WHOLE -> method -> average of eight benchmarks in % of the whole model, LLaVA-1.5-7B; see SOURCE."""

WHOLE = 576

SOURCE = (
    "RESTORE, ICML 2026: baselines run again from their official code in one environment; GQA, MMBench, MME, POPE, "
    "SQA-IMG, VQAv2, TextVQA, SEED; tokens of methods inside the decoder are layer averages"
)

FEWEST = 3
"""Methods below which a rank correlation says nothing."""


@dataclass(frozen=True)
class Correlation:
    """How alike two lists rank the methods that both hold.

    Attributes:
        rho: Spearman's, in [-1, 1]; None where it is not defined (fewer than FEWEST methods, or one list is all ties).
        methods: those that both hold, best in the first list first.
        missing: those that only one of them holds.
        chance: share of all orders of the second list that agree at least as well (one-sided exact test); None where
            rho is, or where there are too many orders to try.
    """

    rho: float | None
    methods: tuple[str, ...]
    missing: tuple[str, ...]
    chance: float | None

    @property
    def count(self) -> int:
        """n, the methods compared."""
        return len(self.methods)


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1 for the smallest; equal values share the mean of their ranks.

    Raises:
        InputError: a value is NaN.
    """
    if any(math.isnan(value) for value in values):
        raise InputError("values contain NaN, which has no rank.")
    below = [sum(other < value for other in values) for value in values]
    return [low + (values.count(value) + 1) / 2 for low, value in zip(below, values, strict=True)]


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rho: the correlation of the ranks, ties shared; None where a list is shorter than 2 or all ties.

    Raises:
        InputError: the lists differ in length.
    """
    if len(first) != len(second):
        raise InputError(f"first has {len(first)} values and second {len(second)}; give one of each per method.")
    a, b = ranks(first), ranks(second)
    middle = (len(a) + 1) / 2
    product = sum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True))
    spread = math.sqrt(sum((x - middle) ** 2 for x in a) * sum((y - middle) ** 2 for y in b))
    return None if spread == 0 else max(-1.0, min(1.0, product / spread))


def correlate(first: Mapping[str, float], second: Mapping[str, float]) -> Correlation:
    """Rank correlation over the methods that both hold; larger scores are better."""
    both = sorted(first.keys() & second.keys(), key=lambda name: (-first[name], name))
    missing = tuple(sorted(first.keys() ^ second.keys()))
    rho = spearman([first[name] for name in both], [second[name] for name in both]) if len(both) >= FEWEST else None
    chance = None if rho is None else _chance([first[n] for n in both], [second[n] for n in both], rho)
    return Correlation(rho, tuple(both), missing, chance)


def _chance(first: Sequence[float], second: Sequence[float], rho: float, most: int = 8) -> float | None:
    """Share of all orders of `second` whose correlation with `first` reaches `rho`; None beyond `most` methods."""
    if len(first) > most:
        return None
    a, b = ranks(first), ranks(second)
    reached = sum(x * y for x, y in zip(a, b, strict=True))
    # Sums of products of ranks, which are multiples of 1/4, are exact; spreads are the same for every order.
    better = sum(sum(x * y for x, y in zip(a, order, strict=True)) >= reached for order in permutations(b))
    return better / math.factorial(len(a))


def method_scores(
    results: Mapping[str, Any], keep: int | float, *, relative: bool = True, controls: bool = False
) -> dict[str, float]:
    """Score of every method at one budget in an accuracy result: the mean over its benchmarks.

    Args:
        results: what `accuracy.evaluate` returns, or its file holds.
        keep: as it was asked for.
        relative: in % of the dense model, per benchmark, as published averages are; else accuracy.
        controls: whether random draws and the like take part.

    Raises:
        InputError: the result is no accuracy result, or holds no row at this budget.
    """
    _check_kind(results)
    dense, *rows = results["results"]
    chosen = [row for row in rows if row["keep"] == keep and type(row["keep"]) is type(keep)]
    chosen = [row for row in chosen if controls or not row["control"]]
    if not chosen:
        known = sorted({row["keep"] for row in rows})
        raise InputError(f"keep={keep!r} was not measured; the results hold {', '.join(map(str, known))}.")
    found = {}
    for row in chosen:
        scores = []
        for benchmark, table in row["accuracy"].items():
            whole = dense["accuracy"][benchmark][ALL]["accuracy"]
            if relative and whole == 0:
                raise InputError(f"the dense model has no accuracy on {benchmark!r}; nothing can be relative to it.")
            scores.append(100 * table[ALL]["accuracy"] / whole if relative else table[ALL]["accuracy"])
        found[row["method"]] = sum(scores) / len(scores)
    return found


def _check_kind(results: Mapping[str, Any]) -> None:
    if results.get("kind") != "accuracy":
        raise InputError(f"results are of kind {results.get('kind')!r}; give an accuracy result of bench.")


def scores_at(results: Mapping[str, Any], share: float, *, controls: bool = False) -> dict[str, float]:
    """Score of every method where its measured layer average is `share` of all visual tokens, in % of the dense model.

    Straight lines between the budgets that were measured, the dense model at a share of 1; methods whose measured
    budgets do not reach so far down are left out.

    Raises:
        InputError: the result is no accuracy result.
    """
    _check_kind(results)
    keeps = {row["keep"] for row in results["results"][1:]}
    points: dict[str, list[tuple[float, float]]] = {}
    for keep in keeps:
        found = method_scores(results, keep, controls=True)
        for row in results["results"][1:]:
            if row["keep"] == keep and type(row["keep"]) is type(keep) and (controls or not row["control"]):
                shares = [row["layer_average"][name] / row["tokens_in"][name] for name in row["layer_average"]]
                points.setdefault(row["method"], []).append((sum(shares) / len(shares), found[row["method"]]))
    scores = {}
    for method, measured in points.items():
        line = sorted([*measured, (1.0, 100.0)])
        for (low, below), (high, above) in pairwise(line):
            if low <= share <= high:
                part = (share - low) / (high - low) if high > low else 1.0
                scores[method] = below + part * (above - below)
                break
    return scores


def compare(results: Sequence[Mapping[str, Any]], keeps: Sequence[int | float] = ()) -> dict[str, Any]:
    """Rank correlations of the models with each other and with the published table; JSON-ready.

    At the layer averages of the published table (`scores_at`), and between the models also at equal `keep`.

    Args:
        results: accuracy results of several models.
        keeps: budgets as they were asked for.

    Raises:
        InputError: a result holds no such budget.
    """
    bases: list[tuple[str, dict[str, Mapping[str, float]]]] = []
    for tokens, published in PUBLISHED.items():
        lists: dict[str, Mapping[str, float]] = {r["model"]: scores_at(r, tokens / WHOLE) for r in results}
        bases.append((f"{tokens} of {WHOLE}, layer average", {**lists, "published": published}))
    bases += [(f"keep={keep:g}", {r["model"]: method_scores(r, keep) for r in results}) for keep in keeps]
    rows = []
    for basis, lists in bases:
        for name, other in combinations(lists, 2):
            found = correlate(lists[name], lists[other])
            rows.append(
                {
                    "basis": basis,
                    "first": name,
                    "second": other,
                    "rho": None if found.rho is None else round(found.rho, 4),
                    "n": found.count,
                    "chance": None if found.chance is None else round(found.chance, 4),
                    "methods": list(found.methods),
                    "missing": list(found.missing),
                }
            )
    return {"schema_version": 1, "kind": "ranks", "source": SOURCE, "correlations": rows}


def ranks_table(found: Mapping[str, Any]) -> Table:
    """The correlations of `compare`."""
    rows = [
        (
            f"{row['first']} / {row['second']}",
            row["basis"],
            "undefined" if row["rho"] is None else f"{row['rho']:+.2f}",
            str(row["n"]),
            "" if row["chance"] is None else f"{row['chance']:.3f}",
            str(len(row["missing"])),
        )
        for row in found["correlations"]
    ]
    return Table(("ranks of methods", "at equal", "Spearman", "n", "by chance", "left out"), rows)
