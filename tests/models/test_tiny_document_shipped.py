"""The checkpoint of tiny-document that ships: it reads pages it never saw, and TokenCorr follows their content."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mmtoken
from mmtoken.compressors import TokenCorr
from mmtoken.datasets.document_pages import DocumentPages
from mmtoken.evaluation.accuracy import answer, prepare
from mmtoken.evaluation.benchmarks import ask, find
from mmtoken.evaluation.documents import kept_per_crop, rank_correlation
from mmtoken.evaluation.lineup import Entrant
from mmtoken.models.registry import find_model

SAMPLES = Path(mmtoken.__file__).parent / "assets" / "samples"


@pytest.fixture(scope="module")
def trained():
    return mmtoken.load("tiny-document")


def test_it_reads_held_out_pages(trained):
    model, processor = trained
    prepared = prepare(find("document_pages"), processor, 12, 48, torch.device("cpu"))
    found = answer(model, processor, Entrant(), prepared)
    right = {
        kind: np.mean([mark for item, mark in zip(prepared.items, found.correct, strict=True) if item.type == kind])
        for kind in ("field", "cell")
    }
    assert found.tokens_in == found.tokens_out == 7 * 16
    assert right["cell"] > 0.9 and right["field"] > 0.6


def test_tokens_are_counted_per_page(trained):
    model, processor = trained
    prepared = prepare(find("document_pages"), processor, 2, 16, torch.device("cpu"))
    found = answer(model, processor, Entrant(TokenCorr(keep=4, tau_s=1.0), 0.25), prepared)
    assert found.tokens_in == 112 and found.tokens_out == 6 * 4 + 16
    assert found.tokens_out == pytest.approx(found.layer_average)


def test_blank_crops_keep_less_than_dense_ones(trained):
    model, processor = trained
    pages = [DocumentPages(2, 24)[i] for i in range(24)]
    crops = kept_per_crop(model, processor, TokenCorr(tau_s=0.8), pages)
    means = {kind: np.mean([c.kept for c in crops if c.kind == kind]) for kind in ("blank", "fields", "table")}
    assert means["blank"] < 0.5 * means["fields"] and means["fields"] < means["table"]
    assert rank_correlation(crops) > 0.6


def test_the_sample_pages_are_those_of_the_generator(trained):
    model, processor = trained
    asked = right = 0
    for sample in json.loads((SAMPLES / "pages.json").read_text())["samples"]:
        image = Image.open(SAMPLES / sample["file"])
        matches = [page for page in DocumentPages(2, 4) if np.array_equal(page.image, np.asarray(image))]
        assert len(matches) == 1
        assert {q["text"]: q["answer"] for q in sample["questions"]} == {q.text: q.answer for q in matches[0].questions}
        for question in sample["questions"]:
            prompt = processor.apply_chat_template(ask(question["text"]), add_generation_prompt=True)
            inputs = processor(text=prompt, images=image, return_tensors="pt")
            output = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
            right += processor.decode(output, skip_special_tokens=True) == question["answer"]
            asked += 1
    assert right >= 0.75 * asked


def test_it_is_listed_with_what_it_was_trained_for():
    entry = find_model("tiny-document")
    assert entry.benchmarks == ("document_pages",) and find_model("tiny-llava").benchmarks[0] == "shapes_qa"
    assert sum(file.stat().st_size for file in entry.path.iterdir()) < 6_000_000


def test_the_card_states_what_was_measured():
    folder = Path(__file__).parents[2] / "models" / "tiny_document"
    card = (folder / "README.md").read_text()
    results = json.loads((folder / "documents.json").read_text())
    dense = results["results"][0]["accuracy"]["document_pages"]
    for kind, row in dense.items():
        cells = f"{row['accuracy']:.3f} ({row['low']:.2f}-{row['high']:.2f}) |"
        assert any(line.startswith(f"| {kind} ") and line.endswith(cells) for line in card.splitlines()), kind
    half = {row["title"]: row for row in results["results"] if row["keep"] == 0.5}
    for row in half.values():
        assert f"{row['accuracy']['document_pages']['all']['accuracy']:.3f}".removeprefix("0") in card
    assert f"{results['crops']['spearman_of_ink_and_tokens']:.2f}".removeprefix("0") in card
