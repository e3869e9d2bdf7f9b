"""The shipped checkpoints answer as well as their card says, and the card says what the files beside it say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmtoken import load
from mmtoken.datasets.photo_digits import PHOTOGRAPHS
from mmtoken.evaluation.accuracy import evaluate
from mmtoken.evaluation.lineup import Entrant
from mmtoken.models.registry import list_models
from mmtoken.models.tiny_llava.results import photograph_table, result_table, training_facts

CARD = Path(__file__).parents[2] / "models" / "tiny_llava"
SHIPPED = [entry.name for entry in list_models() if entry.card == CARD.name]
SHOWN = [*SHIPPED, "tiny-llava-seed1", "tiny-llava-seed2"]
"""On the card; two other seeds of the recipe were measured and not shipped."""


def stated(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CARD / f"accuracy-{name}.json").read_text())
    return found


def test_the_card_shows_the_results_and_sources() -> None:
    """Out of date? Paste the output of `result_table` and `photograph_table` into the card."""
    card = (CARD / "README.md").read_text()
    training = {name: training_facts([CARD / "metrics" / f"{name}.csv"]) for name in SHOWN}
    assert result_table({name: stated(name) for name in SHOWN}, training) in card
    assert photograph_table() in card
    assert all(photograph.name in card for photograph in PHOTOGRAPHS)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_checkpoint_reaches_its_accuracy(name: str) -> None:
    """On the first of the card's pictures, with a margin of three standard errors and a half."""
    model, processor = load(name)
    found = evaluate(model, processor, [Entrant()], name=name, benchmarks=("shapes_qa",), pictures=20, rounds=0)
    share = found["results"][0]["accuracy"]["shapes_qa"]["all"]["accuracy"]
    wanted = stated(name)["results"][0]["accuracy"]["shapes_qa"]["all"]["accuracy"]
    # Questions about one scene are not independent: 160 of them count as about 80.
    assert share > wanted - 3.5 * (wanted * (1 - wanted) / 80) ** 0.5
