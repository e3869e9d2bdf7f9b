"""Results in the form that `accuracy.evaluate` and `speed.measure` give, made once for all tests that read them."""

from __future__ import annotations

from functools import cache
from typing import Any

from mmtoken.evaluation import accuracy, speed
from mmtoken.evaluation.lineup import line_up
from mmtoken.hub import load

ENTRANTS = line_up(["fastv", "divprune"], keeps=[16, 0.125], controls=["random"])
NAMES = [entrant.key for entrant in ENTRANTS]


@cache
def shipped() -> tuple[Any, Any]:
    """The shipped tiny LLaVA and its processor, nothing attached."""
    return load("tiny-llava")


@cache
def accuracy_results() -> dict[str, Any]:
    model, processor = shipped()
    return accuracy.evaluate(
        model, processor, ENTRANTS, name="tiny-llava", pictures={"shapes_qa": 2, "photo_digits": 4}, rounds=1
    )


@cache
def speed_results() -> dict[str, Any]:
    return speed.measure(ENTRANTS, shape=speed.SMALL, rounds=1, decode_steps=2)
