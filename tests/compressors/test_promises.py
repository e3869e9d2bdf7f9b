"""Which compressors promise less than the plain model at keep=1.0 and the exact budget, and why: all of them, by name.

A new method that promises less fails here until it has its line.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mmtoken.compressors.registry import names

GOLDEN = Path(__file__).parents[1] / "golden"

# One line per entry, in alphabetical order: name -> what the class says about keep=1.0.
NOT_THE_PLAIN_MODEL: dict[str, str] = {
    "bus": "the learned decoder makes new features, however many are kept",
    "downscale": "averages over cells, and images are re-sampled",
    "prumerge": "adds neighbours to every token, and outliers decide how many there are",
    "quecc": "the learned projector makes new features, however many are kept",
    "quota": (
        "resizes frames by their scores; the plain model only if these are equal and it pools bilinearly or not at all"
    ),
    "regionmask": "masks its boxes at keep=1.0, the only value; without boxes nothing changes",
    "tokencorr": "keep is an upper bound; the density of the crops decides",
}

# name -> (what the class declares, why the budget cannot be met exactly).
NO_EXACT_BUDGET: dict[str, tuple[str, str]] = {
    "downscale": ("at_most", "a smaller grid has whole rows and columns"),
    "dycoke": ("adaptive", "keep is what a reduced frame keeps, every fourth frame stays whole and images pass"),
    "evs": ("adaptive", "the first frame always stays whole and images pass"),
    "prumerge": ("adaptive", "outliers of the attention decide, keep bounds it; adaptive=False meets it"),
    "quecc": ("adaptive", "cells of the grid become tokens, so only whole divisors of its side are possible"),
    "quota": ("at_most", "a frame's grid has whole rows and columns"),
    "regionmask": ("adaptive", "boxes decide what goes, there is no budget"),
    "rekv": ("at_most", "keep counts the steps that come back for a question; the last chunk may be short"),
    "stccacher": ("adaptive", "patches are computed less often in the tower, and none is dropped"),
    "stcpruner": ("adaptive", "a share is one of each frame, and rounded there; counts are met"),
    "tokencorr": ("adaptive", "the density of each crop decides, keep bounds it"),
    "vidcom2": ("adaptive", "shares of frames are rounded one by one; exact=True, the default, meets it"),
}


def test_all_others_are_the_plain_model_at_full_budget() -> None:
    declared = {name: cls.identity_at_full for name, cls in names().items() if cls.identity_at_full is not True}
    assert declared == NOT_THE_PLAIN_MODEL


def test_all_others_meet_the_budget_exactly() -> None:
    declared = {name: cls.budget for name, cls in names().items() if cls.budget != "exact"}
    assert declared == {name: kind for name, (kind, _) in NO_EXACT_BUDGET.items()}
    assert all(len(reason.split()) > 2 for _, reason in NO_EXACT_BUDGET.values())


@pytest.mark.parametrize("entries", [NOT_THE_PLAIN_MODEL, NO_EXACT_BUDGET], ids=["identity", "budget"])
def test_the_lists_are_sorted(entries: dict[str, object]) -> None:
    assert list(entries) == sorted(entries)


@pytest.mark.parametrize("name", [name for name, cls in names().items() if cls.parity == "official code"])
def test_parity_with_official_code_is_claimed_only_where_its_numbers_are_compared(name: str) -> None:
    uses = re.compile(rf"\b{names()[name].__name__}\b")
    assert any(uses.search(file.read_text()) for file in GOLDEN.glob("test_*.py"))
