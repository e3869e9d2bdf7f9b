"""Generated pages: what is drawn is what is asked about, and nothing leaves its region."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mmtoken.datasets.document_pages import (
    BARS,
    KINDS,
    LABELS,
    QUESTION_TYPES,
    REGION,
    REGIONS,
    DocumentPages,
    Page,
    glyph,
)
from mmtoken.datasets.page_batches import PageBatches
from mmtoken.errors import InputError

PAGES = [DocumentPages(seed=7, size=120)[i] for i in range(120)]


def test_a_page_depends_on_seed_and_index_alone():
    again = DocumentPages(seed=7, size=10**9)[5]
    assert np.array_equal(again.image, PAGES[5].image) and again.questions == PAGES[5].questions
    assert not np.array_equal(DocumentPages(seed=8, size=9)[5].image, PAGES[5].image)


def test_pages_are_portrait_or_landscape_with_six_regions():
    shapes = Counter((page.rows, page.columns) for page in PAGES)
    assert set(shapes) == {(3, 2), (2, 3)} and min(shapes.values()) > 30
    for page in PAGES:
        assert page.image.shape == (page.rows * REGION, page.columns * REGION, 3)
        corners = [region.box[:2] for region in page.regions]
        assert corners == [(x * REGION, y * REGION) for y in range(page.rows) for x in range(page.columns)]
        assert len(corners) == REGIONS
    assert {region.kind for page in PAGES for region in page.regions} == set(KINDS)


def test_nothing_leaves_its_region():
    for page in PAGES:
        for region in page.regions:
            x0, y0, x1, y1 = region.box
            boxes = [c.box for c in region.characters] + list(region.text) + [box for _, box in region.bars]
            for a, b, c, d in boxes:
                assert x0 <= a < c <= x1 and y0 <= b < d <= y1, region.kind


def dark(page: Page, box: tuple[int, int, int, int]) -> float:
    x0, y0, x1, y1 = box
    return float(page.image[y0:y1, x0:x1].min())


def test_characters_and_bars_are_where_they_are_said_to_be():
    for page in PAGES:
        paper = float(np.median(page.image))
        for region in page.regions:
            for box in [c.box for c in region.characters] + list(region.text):
                assert dark(page, box) < paper - 60
            for name, (x0, y0, x1, y1) in region.bars:
                centre = page.image[(y0 + y1) // 2, (x0 + x1) // 2].astype(int)
                assert np.abs(centre - np.array(BARS[name])).max() < 12
            if region.kind == "blank":
                assert dark(page, region.box) > paper - 40


def test_ink_is_the_share_of_dark_pixels_of_each_region():
    for page in PAGES:
        ink = page.ink()
        for share, region in zip(ink, page.regions, strict=True):
            assert (share == 0) == (region.kind == "blank")
    means = {
        kind: np.mean([page.ink()[i] for page in PAGES for i, r in enumerate(page.regions) if r.kind == kind])
        for kind in KINDS
    }
    assert means["blank"] < means["fields"] < means["table"]


def test_answers_follow_from_what_is_drawn():
    """Read off the regions anew, from the words of the question."""
    asked = Counter()
    for page in PAGES:
        by_kind = {region.kind: region for region in page.regions}
        fields = {label: value for region in page.regions for label, value, _ in region.fields}
        for question in page.questions:
            words = question.text.removesuffix("?").split()
            if question.type == "field":
                expected = fields[words[-1]]
            elif question.type == "cell":
                row, column = int(words[4]), int(words[6])
                expected = by_kind["table"].cells[(row - 1) * 3 + column - 1]
            elif question.type == "bar":
                tops = {name: box[1] for name, box in by_kind["figure"].bars}
                expected = (min if words[4] == "highest" else max)(tops, key=tops.__getitem__)
                assert sorted(tops.values())[1] - sorted(tops.values())[0] >= 4
            else:
                expected = "yes" if words[-1] in by_kind or words[-1] in fields else "no"
            assert question.answer == expected
            asked[question.type] += 1
    assert set(asked) == set(QUESTION_TYPES)


def test_values_are_written_from_left_to_right_under_their_labels():
    for page in PAGES:
        for region in page.regions:
            for label, value, (x0, y0, x1, y1) in region.fields:
                inside = [c for c in region.characters if x0 <= c.box[0] and c.box[2] <= x1 and y0 <= c.box[1] < y1]
                digits = sorted((c for c in inside if c.text.isdigit()), key=lambda c: c.box[0])
                letters = sorted((c for c in inside if not c.text.isdigit()), key=lambda c: c.box[0])
                assert "".join(c.text for c in digits) == value and "".join(c.text for c in letters) == label
                assert max(c.box[3] for c in letters) <= min(c.box[1] for c in digits)


def test_labels_of_a_page_differ():
    for page in PAGES:
        labels = [label for region in page.regions for label, _, _ in region.fields]
        assert len(set(labels)) == len(labels) and set(labels) <= set(LABELS)


def test_glyphs_are_cropped_to_their_ink_and_weights_differ():
    plain, bold, wide = (glyph("e", 14, weight) for weight in ("plain", "bold", "wide"))
    assert plain.max() > 0.9 and min(plain[0].max(), plain[-1].max(), plain[:, 0].max(), plain[:, -1].max()) > 0.1
    assert bold.sum() > plain.sum() and wide.shape[1] > plain.shape[1] and wide.shape[0] == plain.shape[0]


@pytest.mark.parametrize(
    "settings",
    [{"mix": {"field": 1.0, "smell": 1.0}}, {"mix": {"cell": 1.0}}, {"mix": {"field": -1.0}}, {"questions": 0}],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(InputError, match=r"mix|questions"):
        DocumentPages(seed=0, size=1, **settings)


def test_an_index_outside_is_refused():
    with pytest.raises(IndexError):
        DocumentPages(seed=0, size=3)[3]


def test_training_goes_on_with_the_pages_that_come_next_and_never_meets_validation():
    data = PageBatches(seed=0, batch=3, validation_pages=5)
    stream = iter(data.train_dataloader())
    first, second = next(stream), next(stream)
    assert [len(first), len(second)] == [3, 3] and np.array_equal(second[0].image, data.train_pages[3].image)
    held_out = [page for batch in data.val_dataloader() for page in batch]
    assert len(held_out) == 5 and not any(np.array_equal(held_out[0].image, page.image) for page in first)


@pytest.mark.parametrize("settings", [{"batch": 0}, {"validation_pages": 0}])
def test_empty_batches_are_refused(settings):
    with pytest.raises(InputError, match="give at least 1"):
        PageBatches(**settings)
