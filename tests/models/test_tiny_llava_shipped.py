"""The shipped checkpoints answer as well as their card says, and the card says what results.json says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoProcessor, LlavaForConditionalGeneration

from mmtoken.datasets.photo_digits import PHOTOGRAPHS
from mmtoken.datasets.shapes_qa import ShapesQA
from mmtoken.models.tiny_llava.results import answers, photograph_table, result_table

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "mmtoken" / "assets"
CARD = ROOT / "models" / "tiny_llava"
SHIPPED = {p.name.replace("_", "-"): p for p in sorted(ASSETS.glob("tiny_llava*"))}


def test_the_card_shows_the_results_and_sources() -> None:
    card = (CARD / "README.md").read_text()
    results = json.loads((CARD / "results.json").read_text())
    assert result_table(results) in card
    assert photograph_table() in card and all(p.name in card for p in PHOTOGRAPHS)
    assert set(results["models"]) == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_checkpoint_reaches_its_accuracy(name: str) -> None:
    """On other scenes than the card's, with a margin of three standard errors and a half."""
    stated = json.loads((CARD / "results.json").read_text())["models"][name]["scenes_overall"]["accuracy"]
    model = LlavaForConditionalGeneration.from_pretrained(SHIPPED[name]).eval()
    processor = AutoProcessor.from_pretrained(SHIPPED[name])
    pairs = [(sample, q) for sample in ShapesQA(seed=77, size=24) for q in sample.questions]
    given = answers(model, processor, [(sample, q.text) for sample, q in pairs])
    right = sum(answer == q.answer for answer, (_, q) in zip(given, pairs, strict=True)) / len(pairs)
    # Questions about one scene are not independent: 192 of them count as about 100.
    assert right > stated - 3.5 * (stated * (1 - stated) / 100) ** 0.5
