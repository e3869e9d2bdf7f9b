"""The task: Gymnasium's interface, seeds, what an action does, what an expert reaches, what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st

from mmtoken.datasets.demonstrations import DemonstrationBatches, DemonstrationMix, draw_demonstration
from mmtoken.datasets.pick_place import LIMIT, PickPlace
from mmtoken.datasets.tabletop import (
    BASE_SIZE,
    COLORS,
    GAIN,
    ITEM_SIZE,
    NEAR,
    REACH,
    SIZE,
    STEP,
    TEMPLATES,
    Camera,
    Order,
    Scene,
    Thing,
    draw_order,
    draw_scene,
    expert,
    move,
    placed,
    render,
)
from mmtoken.errors import InputError

PLAIN = Scene(
    items=(Thing("red", "ring", (20, 20)), Thing("red", "block", (40, 20)), Thing("blue", "ring", (20, 50))),
    bases=(Thing("green", "plate", (50, 50)), Thing("green", "tray", (50, 30))),
    gripper=(20.0, 24.0),
)
seeds = st.integers(0, 2**32 - 1)


def run_expert(env: PickPlace, seed: int) -> tuple[bool, int, list[Any]]:
    seen, _ = env.reset(seed=seed)
    frames = [seen["image"]]
    while True:
        seen, reward, success, cut, info = env.step(env.expert_action())
        frames.append(seen["image"])
        assert reward == float(success) and info["success"] == success
        if success or cut:
            return success, info["steps"], frames


def test_gymnasium_finds_nothing_wrong() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(PickPlace(render_mode="rgb_array"), skip_render_check=True)  # which wants a registered name


def test_rendering_gives_what_the_policy_sees() -> None:
    env = PickPlace(render_mode="rgb_array")
    assert env.render() is None
    seen, _ = env.reset(seed=3)
    np.testing.assert_array_equal(env.render(), seen["image"])
    assert env.observation_space.contains(seen)
    assert PickPlace().render() is None


def test_the_expert_succeeds_in_half_the_time() -> None:
    env = PickPlace()
    runs = [run_expert(env, seed) for seed in range(100)]
    assert all(success for success, _, _ in runs)
    steps = [n for _, n, _ in runs]
    assert 10 <= np.mean(steps) <= LIMIT / 2 and max(steps) < LIMIT


def test_a_seed_fixes_the_episode_and_another_changes_it() -> None:
    first, second, other = (run_expert(PickPlace(), seed) for seed in (5, 5, 6))
    assert first[:2] == second[:2]
    assert all(np.array_equal(a, b) for a, b in zip(first[2], second[2], strict=True))
    assert not np.array_equal(first[2][0], other[2][0])


def test_without_a_seed_episodes_go_on_differing() -> None:
    env = PickPlace()
    first = env.reset(seed=1)[0]["image"]
    assert not np.array_equal(first, env.reset()[0]["image"])


def test_an_episode_is_cut_off_at_its_limit_and_then_over() -> None:
    env = PickPlace(limit=3)
    env.reset(seed=0)
    still = np.array([0, 0, -1], dtype=np.float32)
    ends = [env.step(still)[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]
    with pytest.raises(InputError, match=r"ended after 3 steps; call reset"):
        env.step(still)


@given(seeds)
def test_an_instruction_names_one_item_and_one_base(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = draw_scene(rng)
    for things, size in ((scene.items, ITEM_SIZE), (scene.bases, BASE_SIZE)):
        for t in things:
            assert all(size / 2 <= v <= SIZE - size / 2 for v in t.at)
    everything = [*scene.items, *scene.bases]
    assert len(scene.items) == 3 and len(scene.bases) == 2 and len({t.color for t in everything}) == 5
    for i, a in enumerate(everything):
        for b in everything[:i]:
            assert np.hypot(a.at[0] - b.at[0], a.at[1] - b.at[1]) >= 13
    order = draw_order(rng, scene)
    assert not placed(scene, order)
    words = order.text(scene).split()
    for thing in (scene.items[order.item], scene.bases[order.base]):
        assert thing.color in words and thing.shape in words


@given(seeds, st.lists(st.tuples(*[st.floats(-1, 1)] * 3), min_size=1, max_size=12))
def test_moving_keeps_the_world_whole(seed: int, actions: list[tuple[float, float, float]]) -> None:
    scene = draw_scene(np.random.default_rng(seed))
    for action in actions:
        after = move(scene, action)
        assert all(abs(b - a) <= STEP + 1e-9 for a, b in zip(scene.gripper, after.gripper, strict=True))
        assert after.closed == (action[2] > 0) and after.bases == scene.bases
        assert after.held is None or (after.closed and after.items[after.held].at == after.gripper)
        if scene.closed and scene.held is None:
            assert after.held is None
        for i, (a, b) in enumerate(zip(scene.items, after.items, strict=True)):
            assert a == b or i in (scene.held, after.held)
        scene = after


def test_a_gripper_takes_the_nearest_item_carries_it_and_lets_go() -> None:
    taken = move(PLAIN, (0, -0.4, 1))  # 2 px up: 2 px from the ring
    assert taken.held == 0 and taken.items[0].at == taken.gripper == (20.0, 22.0)
    carried = move(taken, (1, 1, 1))
    assert carried.items[0].at == (25.0, 27.0)
    let_go = move(carried, (0, 0, 0))  # 0 opens
    assert let_go.held is None and not let_go.closed and let_go.items[0].at == (25.0, 27.0)
    nothing = move(replace(PLAIN, gripper=(20.0, 20 + REACH + 0.1)), (0, 0, 1))
    assert nothing.held is None and nothing.closed
    assert move(replace(nothing, gripper=(20.0, 20.0)), (0, 0, 1)).held is None  # it has to open first
    assert move(replace(PLAIN, gripper=(58.0, 24.0)), (1, 0, -1)).gripper == (58.0, 24.0)


def test_placed_means_on_the_named_base_and_let_go() -> None:
    there = replace(PLAIN, items=(Thing("red", "ring", (50, 50 - REACH)), *PLAIN.items[1:]))
    assert placed(there, Order(0, 0))
    assert not placed(there, Order(0, 1)) and not placed(there, Order(1, 0))
    assert not placed(replace(there, held=0, closed=True), Order(0, 0))
    beside = replace(PLAIN, items=(Thing("red", "ring", (50, 49.9 - REACH)), *PLAIN.items[1:]))
    assert not placed(beside, Order(0, 0))


def test_the_expert_by_hand() -> None:
    order = Order(0, 0)
    # The ring is 4 px up: further than NEAR, so it goes there, open.
    np.testing.assert_allclose(expert(PLAIN, order), [0, -4 * GAIN / STEP, -1], rtol=1e-6)
    beside = replace(PLAIN, gripper=(20 - NEAR, 20.0))
    np.testing.assert_allclose(expert(beside, order), [NEAR * GAIN / STEP, 0, 1], rtol=1e-6)
    # Closed on nothing it opens, however near.
    np.testing.assert_allclose(expert(replace(PLAIN, gripper=(20.0, 20.0), closed=True), order), [0, 0, -1])
    held = move(PLAIN, (0, -0.8, 1))
    np.testing.assert_allclose(expert(held, order), [1, 1, 1])
    # Another item is let go at once, on the way to the named one.
    np.testing.assert_allclose(expert(held, Order(1, 0)), [1, 0, -1])
    over = replace(held, gripper=(50.0, 48.0))
    np.testing.assert_allclose(expert(over, order), [0, 2 * GAIN / STEP, -1], rtol=1e-6)


def test_pictures_show_things_where_they_are_and_the_camera_shifts_everything() -> None:
    picture = render(PLAIN)
    assert picture.dtype == np.uint8 and picture.shape == (SIZE, SIZE, 3)
    np.testing.assert_array_equal(picture[20, 38], COLORS["red"])  # the block, left of its centre
    np.testing.assert_array_equal(picture[0, 0], [PLAIN.shade] * 3)
    np.testing.assert_array_equal(render(PLAIN, (3, 2))[2:, 3:], picture[:-2, :-3])


def test_the_gripper_looks_different_open_closed_and_holding() -> None:
    at = replace(PLAIN, gripper=(20.0, 20.0))
    states = [at, replace(at, closed=True), replace(at, closed=True, held=0)]
    pictures = [render(s) for s in states]
    for i, a in enumerate(pictures):
        for b in pictures[:i]:
            assert (a != b).any(axis=-1).sum() >= 20


def test_the_camera_jitters_and_drifts() -> None:
    rng = np.random.default_rng(3)
    camera = Camera.draw(rng)
    shifts = np.array([camera.shift(t, rng) for t in range(60)])
    assert np.abs(shifts).max() <= 4 and np.ptp(shifts, axis=0).min() >= 4
    assert 0 < np.abs(np.diff(shifts, axis=0)).max() <= 3
    again = [camera.shift(7, np.random.default_rng(s)) for s in range(8)]
    assert len(set(again)) > 1


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ([0, float("nan"), 0], "NaN or infinity"),
        ([0, 0, float("inf")], "NaN or infinity"),
        ([0, 0], r"shape \(2,\)"),
        ([[0, 0, 0]], r"shape \(1, 3\)"),
        ([0, 1.01, 0], r"leaves \[-1, 1\]"),
        ("left", "give 3 numbers"),
        (None, "shape"),
    ],
)
def test_what_is_no_action_is_refused_and_changes_nothing(action: Any, message: str) -> None:
    env = PickPlace()
    env.reset(seed=0)
    before = env.scene
    with pytest.raises(InputError, match=message):
        env.step(action)
    assert env.scene is before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PickPlace(limit=0), "limit=0"),
        (lambda: PickPlace(render_mode="human"), "render_mode='human'"),
        (lambda: PickPlace().step(np.zeros(3, np.float32)), r"call reset\(\) first"),
        (lambda: PickPlace().reset(options={"hard": True}), "options="),
        (lambda: DemonstrationMix(size=0), "size=0"),
    ],
)
def test_other_bad_input(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_demonstrations_carry_the_experts_labels_and_cover_what_can_go_wrong() -> None:
    batch = DemonstrationBatches(seed=4, size=200)[0]
    for d in batch:
        assert np.array_equal(d.image, render(d.scene, d.camera))
        assert sorted((o.item, o.base) for o in d.orders) == [(i, b) for i in range(3) for b in range(2)]
        for order, text, action in zip(d.orders, d.instructions, d.actions, strict=True):
            assert text == order.text(d.scene)
            np.testing.assert_array_equal(action, expert(d.scene, order))
    assert {o.template for d in batch for o in d.orders} == set(range(len(TEMPLATES)))
    held = [d.scene.held is not None for d in batch]
    empty = [d.scene.closed and d.scene.held is None for d in batch]
    assert 60 < sum(held) < 140 and sum(empty) > 3
    grips = np.stack([d.actions[:, 2] for d in batch])
    assert (grips[held] == -1).any(axis=1).all()  # each with an instruction about another item
    assert 0.1 < (grips > 0).mean() < 0.5
    spread = np.array([d.scene.gripper for d in batch])
    assert np.ptp(spread, axis=0).min() > 40


def test_close_states_are_mostly_about_to_close_or_open() -> None:
    batches = DemonstrationBatches(seed=4, size=200, close_from=7)
    deciding = []
    for step in (6, 7):
        of_all = 0
        for d in batches[step]:
            assert len(d.orders) == 6
            for order, action in zip(d.orders, d.actions, strict=True):
                np.testing.assert_array_equal(action, expert(d.scene, order))
                closes = d.scene.held is None and action[2] > 0
                opens = d.scene.held == order.item and action[2] < 0
                of_all += closes or opens
        deciding.append(of_all / 1200)
    assert deciding[0] < 0.08 and deciding[1] > 0.2


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    stream = iter(DemonstrationBatches(seed=1, size=2, start=3))
    for step in (3, 4):
        for a, b in zip(next(stream), DemonstrationBatches(seed=1, size=2)[step], strict=True):
            assert a.instructions == b.instructions and np.array_equal(a.image, b.image)
    assert not np.array_equal(
        DemonstrationBatches(seed=1, size=1)[0][0].image, DemonstrationBatches(seed=2, size=1)[0][0].image
    )
    rng = np.random.default_rng(0)
    assert not np.array_equal(draw_demonstration(rng).image, draw_demonstration(rng).image)
