"""MovingShapes: what happens in a clip, that questions follow from it, and that frames show it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mmtoken.datasets import moving_shapes as data
from mmtoken.datasets.clip_mix import ClipBatches, ClipMix
from mmtoken.datasets.moving_shapes import DIRECTIONS, QUESTION_TYPES, Clip, MovingShapes, majority_baselines
from mmtoken.datasets.shapes_qa import COLORS
from mmtoken.errors import InputError


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return list(MovingShapes(11, 200))


@pytest.fixture(scope="module")
def odd_clips() -> list[Clip]:
    """Of any length, with frames missing, asked at any time."""
    return list(MovingShapes(12, 150, (6, 40), questions=8, anytime=0.6, dropped=0.7))


def test_a_clip_is_a_function_of_seed_and_index() -> None:
    first, again = MovingShapes(5, 10)[3], MovingShapes(5, 99)[3]
    np.testing.assert_array_equal(first.frames, again.frames)
    assert first.questions == again.questions
    assert not np.array_equal(first.frames, MovingShapes(6, 10)[3].frames)
    assert not np.array_equal(first.frames, MovingShapes(5, 10)[4].frames)


def test_shapes_and_times(clips: list[Clip]) -> None:
    for clip in clips[:20]:
        assert clip.frames.shape == (16, 96, 96, 3)
        assert clip.frames.dtype == np.uint8
        assert clip.times.tolist() == list(range(16))
        assert len(clip.camera) == 16
        assert clip.camera[0] == "cut"


def test_objects_come_stay_and_go(clips: list[Clip], odd_clips: list[Clip]) -> None:
    for clip in clips + odd_clips:
        assert 1 <= len(clip.objects) <= 4
        assert [o.start for o in clip.objects] == sorted({o.start for o in clip.objects})
        assert len({o.end for o in clip.objects}) == len(clip.objects)
        assert len({o.color for o in clip.objects}) == len({o.shape for o in clip.objects}) == len(clip.objects)
        for o in clip.objects:
            assert 1 <= o.start < o.end <= len(clip.frames) - 1
            assert o.end - o.start == len(o.boxes) >= (3 if np.diff(clip.times).max() == 1 else 2)
            assert o.box(o.start - 1) is None
            assert o.box(o.end) is None
        assert 1 <= clip.number_frames < len(clip.frames)


def test_objects_move_steadily_in_their_direction(clips: list[Clip]) -> None:
    for o in (o for clip in clips for o in clip.objects):
        corners = np.array([box[:2] for box in o.boxes])
        steps = np.diff(corners, axis=0)
        way = np.array(DIRECTIONS[o.direction])
        assert (steps @ way >= data.MIN_STEP - 1).all()
        assert (steps * (way == 0) == 0).all()
        assert abs(corners[-1] - corners[0]).sum() >= data.MIN_PATH - 2
        size = o.boxes[0][2] - o.boxes[0][0]
        assert data.MIN_SIZE <= size <= data.MAX_SIZE


def test_frames_show_the_objects(clips: list[Clip]) -> None:
    """The middle of an object has its colour while it is there, and has not before it comes and after it has gone."""
    hits = misses = seen = 0
    for clip in clips[:60]:
        for o in clip.objects:
            if o.shape in ("ring", "triangle"):
                continue
            for t in (*range(o.start, o.end), o.start - 1, o.end):
                box = o.box(t) or o.boxes[0 if t < o.start else -1]
                x, y = (box[0] + box[2]) // 2, (box[1] + box[3]) // 2
                if not (2 <= x < 94 and 2 <= y < 94):
                    continue
                color = clip.frames[t, y, x].astype(int)
                near = bool((abs(color - COLORS[o.color]) < 30).all())
                if o.box(t) is None:
                    misses += near
                else:
                    seen += 1
                    hits += near
    assert hits / seen > 0.95  # now and then one covers another, or the number does
    assert misses < 0.05 * seen


def test_the_camera_stands_pans_and_cuts(clips: list[Clip]) -> None:
    change: dict[str, list[float]] = {"static": [], "panning": [], "cut": []}
    for clip in clips:
        moved = np.abs(np.diff(clip.frames.astype(int), axis=0)).reshape(15, -1)
        for t, kind in enumerate(clip.camera[1:]):
            change[kind].append(float(np.median(moved[t])))
    assert max(change["static"]) <= 3
    assert min(change["panning"]) > 3
    assert np.mean(change["cut"]) > np.mean(change["panning"]) > 4
    counts = {kind: len(values) for kind, values in change.items()}
    assert counts["static"] > counts["panning"] > counts["cut"] > 100


def test_answers_follow_from_what_was_seen(clips: list[Clip], odd_clips: list[Clip]) -> None:
    """Worked out anew from the boxes, frame by frame."""
    for clip in clips + odd_clips:
        for q in clip.questions:
            shown: dict[str, list[int]] = {}
            for t in range(q.seen):
                for o in clip.objects:
                    if o.box(t) is not None:
                        shown.setdefault(o.name, []).append(t)
            order = list(shown)
            gone = sorted((times[-1], name) for name, times in shown.items() if times[-1] < q.seen - 1)
            words = q.text.rstrip("?.").split()
            newest = q.seen - 1
            if q.type == "count":
                assert q.answer == str(len(shown))
                assert q.age == newest - min(times[-1] for times in shown.values())
                continue
            if q.type == "number":
                assert q.answer == "".join(map(str, clip.number))
                assert q.age == newest - max(t for t in range(q.seen) if t < clip.number_frames)
                continue
            if q.type == "appeared":
                name = order[0] if words[-1] == "first" else order[-1]
            elif q.type == "left":
                name = gone[0][1] if words[-1] == "first" else gone[-1][1]
            else:
                name = next(n for n in order if set(n.split()) & set(words))
            about = next(o for o in clip.objects if o.name == name)
            expected = {"shape": about.shape, "direction": about.direction}.get(q.type, about.color)
            assert q.answer == expected, q
            assert q.age == newest - shown[name][-1]


def test_evidence_lies_in_the_frames_shown(odd_clips: list[Clip]) -> None:
    for clip in odd_clips:
        for q in clip.questions:
            frames = [t for t, _ in q.evidence]
            assert frames
            assert 0 <= min(frames) <= max(frames) < q.seen <= len(clip.frames)
            assert q.seen - 1 - q.age in frames
            for t, box in q.evidence:
                assert box == clip.number_box or box in [o.box(t) for o in clip.objects]


def test_every_type_is_asked_and_nothing_can_be_guessed_from_the_question() -> None:
    found = list(MovingShapes(13, 500))
    asked = [q.type for clip in found for q in clip.questions]
    assert all(asked.count(kind) >= 300 for kind in QUESTION_TYPES)
    guess = majority_baselines(found)
    assert guess["number"] < 0.1
    assert max(guess["colour"], guess["shape"], guess["appeared"], guess["left"]) < 0.25
    assert max(guess["direction"], guess["count"]) < 0.34


def test_first_to_come_and_first_to_go_are_often_different() -> None:
    several = [clip for clip in MovingShapes(14, 300) if len(clip.objects) > 1]
    different = [min(clip.objects, key=lambda o: o.end) is not clip.objects[0] for clip in several]
    assert 0.35 < np.mean(different) < 0.65


def test_long_clips_with_early_facts() -> None:
    for clip in MovingShapes(15, 20, (64, 64), active=16):
        assert max(o.end for o in clip.objects) <= 15
        assert all(q.age >= 48 for q in clip.questions)


def test_missing_frames_keep_the_order_of_things() -> None:
    found = list(MovingShapes(16, 60, (10, 20), dropped=1.0))
    gaps = [clip for clip in found if np.diff(clip.times).max() > 1]
    assert len(gaps) > 40
    assert all((np.diff(clip.times) >= 1).all() for clip in found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": (5, 9)}, "frames"),
        ({"frames": (9, 8)}, "frames"),
        ({"active": 3}, "active"),
        ({"questions": 0}, "questions"),
        ({"size": -1}, "size"),
        ({"anytime": 1.5}, "anytime"),
        ({"dropped": -0.1}, "dropped"),
        ({"mix": {"colour": 1.0}}, "number"),
        ({"mix": {"weather": 1.0, "number": 1.0}}, "weather"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MovingShapes(**{"seed": 0, "size": 1, **settings})  # type: ignore[arg-type]


def test_indices_outside_are_refused() -> None:
    with pytest.raises(IndexError):
        MovingShapes(0, 3)[3]


def test_batches_have_one_length_each_and_depend_on_the_step_alone() -> None:
    batches = ClipBatches(3, frames=96, ramp=20)
    lengths = [batches.length(step) for step in range(400)]
    assert max(lengths[:5]) <= 13
    assert min(lengths) == 6
    assert max(lengths) > 40
    assert 0.04 < np.mean([n > 24 for n in lengths[20:]]) < 0.25
    for step in (0, 399):
        clips = batches[step]
        assert {len(c.frames) for c in clips} == {lengths[step]}
        assert len(clips) == max(1, 96 // lengths[step])
        np.testing.assert_array_equal(clips[0].frames, replace(batches, questions=10)[step][0].frames)
    assert not np.array_equal(batches[7][0].frames[0], batches[8][0].frames[0])
    with pytest.raises(InputError, match="frames"):
        ClipBatches(0, frames=3)


def test_training_and_validation_are_different_clips() -> None:
    mix = ClipMix(seed=1, frames=24, validation_clips=40)
    assert mix.train.seed != mix.validation.seed
    groups = list(mix.val_dataloader())
    assert [len(clips) for _, clips in groups] == [32, 8]
    step, clips = next(iter(mix.train_dataloader()))
    assert step == 0
    np.testing.assert_array_equal(clips[0].frames, mix.train[0][0].frames)
