"""ShapesQA: the same sample for the same seed and index, and answers that an independent reading of the boxes gives."""

from __future__ import annotations

import numpy as np
import pytest

from mmtoken.datasets.shapes_qa import COLORS, PLURALS, QUESTION_TYPES, SHAPES, Sample, ShapesQA, majority_baselines
from mmtoken.errors import MMTokenError


@pytest.fixture(scope="module")
def scenes() -> list[Sample]:
    return list(ShapesQA(seed=21, size=300, min_objects=1))


def oracle(text: str, scene: Sample) -> str:
    """The answer, by plain loops over objects and boxes; written against the wording alone."""
    words = text.replace("?", "").replace(".", "").split()
    things = [(o.color, o.shape, o.box) for o in scene.objects]
    if words[0] == "read":
        left_to_right = sorted(zip(scene.digit_boxes, scene.number, strict=True))
        return "".join(str(digit) for _, digit in left_to_right)
    if words[:3] == ["is", "there", "a"]:
        return "yes" if [t for t in things if [t[0], t[1]] == words[3:]] else "no"
    if words[:2] == ["how", "many"]:
        what = words[2]
        singular = {plural: shape for shape, plural in PLURALS.items()}
        if what == "objects":
            return str(len(things))
        return str(len([t for t in things if t[0] == what or t[1] == singular.get(what)]))
    if words[:2] == ["what", "shape"]:
        (found,) = [t for t in things if t[0] == words[4]]
        return found[1]
    if words[-1] in SHAPES and words[:4] == ["what", "color", "is", "the"] and len(words) == 5:
        (found,) = [t for t in things if t[1] == words[4]]
        return found[0]
    if "beside" in words:
        (named,) = [t for t in things if [t[0], t[1]] == words[-2:]]
        band = named[2][1] // 24
        (other,) = [t for t in things if t is not named and t[2][1] // 24 == band]
        return other[0]
    if words[:4] == ["what", "color", "is", "the"]:
        low = {"leftmost": 0, "rightmost": 0, "topmost": 1, "bottommost": 1}[words[4]]
        middles = [t[2][low] + t[2][low + 2] for t in things]
        extreme = min(middles) if words[4] in ("leftmost", "topmost") else max(middles)
        (index,) = [i for i, m in enumerate(middles) if m == extreme]
        return things[index][0]
    assert words[:2] == ["is", "the"], text
    (first,) = [t for t in things if [t[0], t[1]] == words[2:4]]
    (second,) = [t for t in things if [t[0], t[1]] == words[-2:]]
    low = 0 if words[4] in ("left", "right") else 1
    a, b = first[2][low] + first[2][low + 2], second[2][low] + second[2][low + 2]
    return "yes" if (a < b if words[4] in ("left", "above") else a > b) else "no"


def test_a_sample_depends_on_seed_and_index_alone() -> None:
    a, b = ShapesQA(seed=3, size=5)[4], ShapesQA(seed=3, size=5000)[4]
    assert np.array_equal(a.image, b.image)
    assert a.questions == b.questions and a.objects == b.objects and a.number == b.number
    assert not np.array_equal(a.image, ShapesQA(seed=4, size=5)[4].image)
    assert not np.array_equal(a.image, ShapesQA(seed=3, size=5)[3].image)


def test_answers_follow_from_the_boxes(scenes: list[Sample]) -> None:
    seen = set()
    for scene in scenes:
        for question in scene.questions:
            assert question.answer == oracle(question.text, scene), question
            seen.add(question.type)
    assert seen == set(QUESTION_TYPES)


def test_the_picture_shows_what_the_boxes_say(scenes: list[Sample]) -> None:
    for scene in scenes[:100]:
        assert scene.image.shape == (96, 96, 3) and scene.image.dtype == np.uint8
        covered = np.zeros((96, 96), dtype=int)
        for x0, y0, x1, y1 in scene.boxes:
            assert 0 <= x0 < x1 <= 96 and 0 <= y0 < y1 <= 96
            covered[y0:y1, x0:x1] += 1
        assert covered.max() == 1, "objects and number must not overlap"
        for o in scene.objects:
            x0, y0, x1, y1 = o.box
            assert x0 // 24 == (x1 - 1) // 24 and y0 // 24 == (y1 - 1) // 24, "an object stays in its cell"
            pixels = scene.image[y0:y1, x0:x1].astype(int)
            off = np.abs(pixels - np.array(COLORS[o.color])).max(axis=-1)
            assert (off <= 16).sum() > 25, "the box must hold the object's colour"


def test_evidence_is_drawn_content(scenes: list[Sample]) -> None:
    for scene in scenes:
        for question in scene.questions:
            assert question.evidence and set(question.evidence) <= set(scene.boxes)


def test_questions_of_a_scene_do_not_repeat(scenes: list[Sample]) -> None:
    # A scene of one object can run out of questions; then, and only then, one comes twice.
    repeats = [s for s in scenes if len({q.text for q in s.questions}) < len(s.questions)]
    assert all(len(s.objects) == 1 for s in repeats) and len(repeats) < len(scenes) / 50


def test_no_type_is_answered_by_its_most_frequent_answer() -> None:
    scenes = list(ShapesQA(seed=5, size=800))
    baselines = majority_baselines(scenes)
    limits = dict.fromkeys(QUESTION_TYPES, 0.25) | {"existence": 0.55, "relation": 0.55}
    limits |= {"counting": 0.45, "number": 0.05}
    assert {t: b for t, b in baselines.items() if b > limits[t]} == {}
    for word in ("left", "right", "above", "below"):
        answers = [q.answer for s in scenes for q in s.questions if q.type == "relation" and word in q.text.split()]
        assert 0.4 < answers.count("yes") / len(answers) < 0.6


def test_mix_changes_how_often_types_are_asked() -> None:
    only = list(ShapesQA(seed=1, size=40, questions=4, mix={"beside": 1.0, "number": 0.01}))
    kinds = [q.type for s in only for q in s.questions]
    assert set(kinds) <= {"beside", "number"} and len(kinds) == 160


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"mix": {"color": 1.0}}, "mix"),
        ({"mix": {"shape": 1.0}}, "mix"),
        ({"min_objects": 0}, "min_objects"),
        ({"min_objects": 4, "max_objects": 3}, "max_objects"),
        ({"max_objects": 15}, "max_objects"),
        ({"questions": 0}, "questions"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], field: str) -> None:
    with pytest.raises(MMTokenError, match=field):
        ShapesQA(seed=0, size=1, **settings)  # type: ignore[arg-type]


def test_an_index_outside_is_an_index_error() -> None:
    with pytest.raises(IndexError):
        ShapesQA(seed=0, size=2)[2]
