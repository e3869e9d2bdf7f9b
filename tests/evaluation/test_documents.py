"""The line-up for document pages: who keeps what, thresholds that meet a mean, and ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

import mmtoken
from mmtoken.compressors import Downscale, Random, TokenCorr, UniformGrid, VisionZip
from mmtoken.datasets.document_pages import DocumentPages
from mmtoken.evaluation import documents
from mmtoken.evaluation.documents import (
    ADAPTIVE,
    Crop,
    CropsOnly,
    WholeCrops,
    by_kind,
    kept_per_crop,
    mean_kept,
    rank_correlation,
    read_crops,
    set_density,
    set_threshold,
    set_whole,
)

PAGES = [DocumentPages(seed=11, size=9)[i] for i in range(6)]


@pytest.fixture(scope="module")
def trained():
    return mmtoken.load("tiny-document")


@pytest.mark.parametrize("inner", [Random, UniformGrid, Downscale, VisionZip, TokenCorr])
def test_only_crops_are_compressed(trained, inner):
    model, processor = trained
    crops = kept_per_crop(model, processor, CropsOnly(keep=0.25, inner=inner(keep=0.25)), PAGES[:2])
    assert all(1 <= crop.kept <= 4 for crop in crops) and len(crops) == 12
    session = mmtoken.attach(model, CropsOnly(keep=0.25, inner=inner(keep=0.25)))
    prompt = processor.apply_chat_template(documents.ask("what is the total?"), add_generation_prompt=True)
    with session, torch.no_grad():
        model(**processor(text=prompt, images=Image.fromarray(PAGES[0].image), return_tensors="pt"))
        tokens = session.report.tokens
    assert session.report.tokens_out[-1] == 16 and not bool(tokens.protected[tokens.valid].any())


def test_whole_crops_stay_or_leave_one_token(trained):
    model, processor = trained
    assert {crop.kept for crop in kept_per_crop(model, processor, WholeCrops(least=0.0), PAGES)} == {16}
    assert {crop.kept for crop in kept_per_crop(model, processor, WholeCrops(least=1.1), PAGES)} == {1}
    some = kept_per_crop(model, processor, WholeCrops(least=0.5, tau_s=0.95, low=0), PAGES)
    assert {crop.kept for crop in some} == {1, 16}
    assert {crop.kept for crop in some if crop.kind == "blank"} == {1}
    assert {crop.kept for crop in some if crop.kind == "table"} == {16}


@pytest.mark.parametrize(
    "method",
    [
        TokenCorr(low=0),
        TokenCorr(aggregate="prumerge32", heads="mean"),
        TokenCorr(low=0, sampling="multinomial", aggregate="none"),
    ],
)
def test_thresholds_meet_the_mean_that_the_model_then_keeps(trained, method):
    model, processor = trained
    facts = read_crops(model, processor, method, PAGES)
    assert len(facts) == 36
    found = set_density(facts, method, 8)
    kept = kept_per_crop(model, processor, found, PAGES)
    assert [crop.kept for crop in kept] == [crop.kept(found) for crop in facts]
    assert abs(mean_kept(kept) - 8) < 0.5
    whole = set_whole(facts, found.tau_s, method.low, 8)
    assert abs(mean_kept(kept_per_crop(model, processor, whole, PAGES)) - 8) < 1.5


def test_bisection_finds_thresholds_from_either_side():
    assert set_threshold(lambda x: 16 * x, 4, 0.0, 1.0, rising=True) == pytest.approx(0.25, abs=1e-3)
    assert set_threshold(lambda x: 16 - 16 * x, 4, 0.0, 1.0, rising=False) == pytest.approx(0.75, abs=1e-3)
    # Of steps, the nearest one.
    assert round(10 * set_threshold(lambda x: round(10 * x), 3.2, 0.0, 1.0, rising=True)) == 3


def crop(ink: float, kept: int, kind: str = "text") -> Crop:
    return Crop(kind, ink, kept, 0)


def test_rank_correlation_by_hand():
    assert rank_correlation([crop(0.1, 2), crop(0.2, 5), crop(0.9, 6)]) == pytest.approx(1)
    assert rank_correlation([crop(0.1, 9), crop(0.2, 5), crop(0.9, 1)]) == pytest.approx(-1)
    # Ranks 1, 2, 3, 4 against 1.5, 1.5, 3, 4: covariance 4.5, variances 5 and 4.5.
    ties = [crop(0.1, 1), crop(0.2, 1), crop(0.3, 2), crop(0.4, 3)]
    assert rank_correlation(ties) == pytest.approx(4.5 / (5 * 4.5) ** 0.5)


def test_kinds_are_listed_by_their_ink():
    table = by_kind([crop(0.3, 16, "table"), crop(0.0, 1, "blank"), crop(0.0, 2, "blank")])
    assert table.rows == [("blank", "2", "0.000", "1.5", "1-2"), ("table", "1", "0.300", "16.0", "16-16")]


def test_everything_is_written(trained, tmp_path, monkeypatch):
    model, processor = trained
    monkeypatch.setattr(documents, "VARIANTS", (TokenCorr(low=0), TokenCorr(low=0, aggregate="none")))
    lines: list[str] = []
    files = documents.write(
        model, processor, tmp_path, name="tiny-document", pages=2, rounds=1, budgets=(8,), validation_pages=2,
        progress=lines.append,
    )  # fmt: skip
    assert all(file.stat().st_size > 0 for file in files) and len(files) == 6
    assert Image.open(files[4]).width > 400 and Image.open(files[5]).width > 400
    text = files[1].read_text()
    assert ADAPTIVE in text and "Spearman" in text and len(lines) >= 10


def test_a_line_up_holds_every_role_at_every_budget(trained):
    model, processor = trained
    entrants = documents.line_up(model, processor, TokenCorr(low=0), (4, 12), validation_pages=3)
    assert len({entrant.key for entrant in entrants}) == len(entrants) == 1 + 2 * 6
    fixed = [entrant.compressor for entrant in entrants if entrant.label == documents.FIXED]
    assert fixed == [TokenCorr(low=0, tau_s=1.0, keep=4), TokenCorr(low=0, tau_s=1.0, keep=12)]
    assert {crop.kept for crop in kept_per_crop(model, processor, fixed[0], PAGES[:2])} == {4}
    assert replace(fixed[0], keep=12) == fixed[1]
