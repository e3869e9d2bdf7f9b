"""Who takes part, under which name, and who cannot."""

from __future__ import annotations

import pytest

from mmtoken.errors import KeepError, MMTokenError, UnknownNameError
from mmtoken.evaluation.lineup import CONTROLS, DENSE, KEEPS, METHODS, Entrant, line_up, supported
from tests.backbones.tiny_models import build


def test_dense_comes_first_then_controls_then_methods_at_every_budget() -> None:
    entrants = line_up()
    assert entrants[0] == Entrant() and entrants[0].key == DENSE and entrants[0].title == "Dense"
    assert len(entrants) == 1 + (len(CONTROLS) + len(METHODS)) * len(KEEPS)
    assert [entrant.key for entrant in entrants[1:4]] == ["Random keep=0.5", "Random keep=0.25", "Random keep=0.125"]
    assert [entrant.control for entrant in entrants] == [True] * 10 + [False] * 15
    assert all(entrant.compressor.keep == entrant.keep for entrant in entrants[1:])


def test_budgets_are_counts_or_fractions_as_given() -> None:
    entrants = line_up(["fastv"], keeps=[16, 1 / 3], controls=[])
    assert [entrant.key for entrant in entrants] == [DENSE, "FastV keep=16", "FastV keep=0.3333"]
    assert [(type(entrant.keep), entrant.method) for entrant in entrants[1:]] == [(int, "FastV"), (float, "FastV")]


def test_nobody_takes_part_twice() -> None:
    entrants = line_up(["fastv", "random", "FastV", "fast-v", "fastv"], keeps=[0.5, 0.5], controls=["random"])
    keys = [entrant.key for entrant in entrants]
    assert keys == [DENSE, "Random keep=0.5", "FastV keep=0.5"]


def test_unknown_names_and_impossible_budgets_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'fastv'"):
        line_up(["fastvv"])
    with pytest.raises(KeepError, match="keeps=0 "):
        line_up(keeps=[0.5, 0])
    with pytest.raises(MMTokenError, match="keeps"):
        line_up(keeps=[1.5])
    with pytest.raises(UnknownNameError, match="raandom"):
        line_up(controls=["raandom"])


def test_whom_a_model_cannot_host_is_named_with_the_reason() -> None:
    entrants = line_up(["divprune"], keeps=[0.5], controls=["downscale"])
    able, refused = supported(build("qwen2_5_vl", layers=1), entrants)
    assert [entrant.key for entrant in able] == [DENSE, "DivPrune keep=0.5"]
    assert list(refused) == ["Downscale keep=0.5"]
    assert "works before the processor" in refused["Downscale keep=0.5"]
    assert supported(build("llava", layers=1), entrants) == (entrants, {})


def test_a_model_that_has_too_few_layers_hosts_the_others() -> None:
    able, refused = supported(build("llava", layers=2), line_up(["fastv"], keeps=[4], controls=["random"]))
    assert [entrant.method for entrant in able] == [DENSE, "Random"]
    assert "layer=2 but this decoder has 2 layers" in refused["FastV keep=4"]
