"""Episodes: what one remembers is its own, the model is plain between calls, and bad input is never an action."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmtoken import Episode, MMTokenError, Policy, attach
from mmtoken.compressors import DivPrune, FastV, VLAPruner
from mmtoken.compressors.base import Compressor
from mmtoken.errors import ActionError, InputError, UnsupportedError
from tests import oracle
from tests.control.policies import ACTION, SIDE, camera, model, policy, processor

ORDER = "pick up the cup"
PRUNER = VLAPruner(keep=0.25, layer=2, window=2, action_tokens=ACTION)
OTHERS: list[Compressor | None] = [
    VLAPruner(keep=0.5, layer=1, window=1, action_tokens=ACTION),
    FastV(keep=0.5, layer=2),
    DivPrune(keep=0.25),
    None,
]


class Ear:
    """Notes the logits of every call of a model's decoder."""

    def __init__(self, arm: Policy) -> None:
        self.logits: list[Tensor] = []
        head = arm.model.language_model.lm_head
        self.handle = head.register_forward_hook(lambda module, args, output: self.logits.append(output.clone()))

    def take(self) -> list[Tensor]:
        heard, self.logits = self.logits, []
        return heard


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def alone(arm: Policy, compressor: Compressor | None, images: list[Any]) -> list[tuple[Any, list[Tensor]]]:
    """Actions and logits of every step of an episode."""
    ear, steps = Ear(arm), []
    with Episode(arm, compressor) as episode:
        for image in images:
            steps.append((episode.act(image, ORDER), ear.take()))
    ear.handle.remove()
    return steps


@pytest.mark.parametrize("other", [PRUNER, *OTHERS], ids=["same", "vlapruner", "fastv", "divprune", "dense"])
def test_two_interleaved_episodes_give_what_each_gives_alone(other: Compressor | None) -> None:
    arm, images = policy(), [camera(1, 4), camera(2, 4)]
    want = [alone(arm, PRUNER, images[0]), alone(arm, other, images[1])]
    ear = Ear(arm)
    first, second = Episode(arm, PRUNER), Episode(arm, other)
    for step in range(4):
        for number, episode in enumerate((first, second)):
            action = episode.act(images[number][step], ORDER)
            assert np.array_equal(action, want[number][step][0])
            assert same(ear.take(), want[number][step][1])


def test_a_chunk_policy_gives_all_its_steps_and_its_episodes_do_not_mix() -> None:
    arm, images = policy(steps=4), [camera(1, 4), camera(2, 4)]
    want = [alone(arm, PRUNER, images[0]), alone(arm, PRUNER, images[1])]
    dense = [alone(arm, None, clip) for clip in images]
    episodes, ear = [Episode(arm, PRUNER), Episode(arm, PRUNER)], Ear(arm)
    for step in range(4):
        for number, episode in enumerate(episodes):
            action = episode.act(images[number][step], ORDER)
            assert action.shape == (4, ACTION) and np.array_equal(action, want[number][step][0])
            heard = ear.take()
            assert same(heard, want[number][step][1])
            # Two steps of warm-up, then tokens leave.
            assert same(heard, dense[number][step][1]) == (step < 2)
            assert episode.history.shape == (min(step + 1, 2), 1, 16)
    both = Episode(arm, PRUNER)
    for step in range(4):
        actions = both.act([clip[step] for clip in images], [ORDER, ORDER])
        assert np.array_equal(actions, np.stack([want[0][step][0], want[1][step][0]]))


def test_the_warm_up_is_dense_to_the_bit_and_reset_brings_it_back() -> None:
    arm, images = policy(), camera(3, 4)
    dense, pruned = alone(arm, None, images), alone(arm, PRUNER, images)
    assert [same(d[1], p[1]) for d, p in zip(dense, pruned, strict=True)] == [True, True, False, False]
    ear, episode = Ear(arm), Episode(arm, PRUNER)
    for image in camera(4, 3):
        episode.act(image, ORDER)
    assert episode.report.tokens_out == [4] and episode.steps == 3
    episode.reset()
    assert episode.steps == 0 and episode.history.size == 0
    ear.take()
    for image, (action, logits) in zip(images, pruned, strict=True):
        assert np.array_equal(episode.act(image, ORDER), action)
        assert same(ear.take(), logits)


def test_the_model_is_plain_between_calls_and_after_an_error() -> None:
    arm, image = policy(), camera(5, 1)[0]
    before = oracle.fingerprint(arm.model)
    episode = Episode(arm, PRUNER)
    for _ in range(3):
        episode.act(image, ORDER)
        assert oracle.fingerprint(arm.model) == before
    with pytest.raises(InputError):
        episode.act(camera(5, 1, size=30)[0], ORDER)
    assert oracle.fingerprint(arm.model) == before and episode.steps == 3


def test_a_step_that_fails_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    arm, images = policy(), camera(6, 4)
    want = alone(arm, PRUNER, images)
    episode = Episode(arm, PRUNER)
    found = [episode.act(images[0], ORDER)]
    with monkeypatch.context() as patch:
        # The model has answered by then, and its answer is refused.
        patch.setattr(type(arm.codec), "unnormalise", lambda self, actions, key: actions * torch.nan)
        with pytest.raises(ActionError, match="not finite"):
            episode.act(images[3], ORDER)
    found += [episode.act(image, ORDER) for image in images[1:]]
    assert all(np.array_equal(mine, step[0]) for mine, step in zip(found, want, strict=True))


def test_episodes_in_lockstep_act_as_they_do_alone_also_when_some_have_ended() -> None:
    arm, images = policy(), [camera(seed, 4) for seed in (7, 8, 9)]
    orders = ["pick it up", "put the cup down", "put it to the cup"]
    singles = []
    for mine, order in zip(images, orders, strict=True):
        with Episode(arm, PRUNER) as episode:
            singles.append([(episode.act(image, order), episode.report.kept[0].tolist()) for image in mine])
    episode, alive = Episode(arm, PRUNER), [0, 1, 2]
    for step in range(4):
        if step == 3:
            episode.only([2, 0])
            alive = [2, 0]
        actions = episode.act([images[row][step] for row in alive], [orders[row] for row in alive])
        assert actions.shape == (len(alive), ACTION) and actions.dtype == np.float32
        assert [kept.tolist() for kept in episode.report.kept] == [singles[row][step][1] for row in alive]
        assert np.array_equal(actions, np.stack([singles[row][step][0] for row in alive]))
    assert episode.history.shape == (2, 2, 16)
    for bad in ([], [0, 0], [2], [-1]):
        with pytest.raises(InputError, match="rows="):
            episode.only(bad)


def test_threads_take_turns() -> None:
    arm, images = policy(), camera(10, 4)
    want = {True: alone(arm, PRUNER, images), False: alone(arm, None, images)}
    wrong: list[Any] = []

    def live(pruned: bool) -> None:
        try:
            with Episode(arm, PRUNER if pruned else None) as episode:
                for image, step in zip(images, want[pruned], strict=True):
                    if not np.array_equal(episode.act(image, ORDER), step[0]):
                        wrong.append(pruned)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=live, args=(pruned,)) for pruned in (True, False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ----------------------------------------------------------------------------------------------------------- bad input


def test_statistics_that_are_missing_or_do_not_fit() -> None:
    network = model()
    with pytest.raises(InputError, match="unnorm_key='no_arm' is not in norm_stats; choose one of: other_arm, toy_arm"):
        Policy(network, processor(network), unnorm_key="no_arm")
    with pytest.raises(InputError, match="unnorm_key=None but norm_stats has several"):
        Policy(network, processor(network))
    bare = model(norm_stats=None)
    with pytest.raises(InputError, match="norm_stats is empty"):
        Policy(bare, processor(bare))
    crooked = model(norm_stats={"arm": {"action": {"q01": [0.0, 0.0, 0.0], "q99": [1.0]}}})
    with pytest.raises(InputError, match="entries of different lengths"):
        Policy(crooked, processor(crooked))
    assert policy(unnorm_key="other_arm").predict(camera(0, 1), [ORDER]).shape == (1, 1, 4)


def test_an_answer_outside_the_bins_is_no_action() -> None:
    arm = policy()
    # Words beat bins now.
    arm.model.language_model.lm_head.weight.data.neg_()
    arm.model.language_model.lm_head.weight.data[-256 - 64 : -64] = 0
    arm.model.language_model.lm_head.weight.data[5] = arm.model.language_model.lm_head.weight.data[4] + 1
    arm.model.language_model.lm_head.weight.data[6] = -arm.model.language_model.lm_head.weight.data[5]
    with pytest.raises(ActionError, match=r"token [56] at .* is no action: the bins are the tokens"):
        Episode(arm).act(camera(0, 1)[0], ORDER)


NAN = np.full((40, 40, 3), np.nan, np.float32)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((40, 40, 4), np.uint8), r"image 0 has shape \[40, 40, 4\]; give uint8\[H, W, 3\]"),
        (np.zeros((40, 40, 6), np.uint8), r"image 0 has shape \[40, 40, 6\]; give"),
        (np.zeros((40, 40), np.uint8), r"image 0 has shape \[40, 40\]; give"),
        (np.zeros((0, 40, 3), np.uint8), "no pixel; give a picture"),
        (np.zeros((40, 40, 3), np.float32), r"image 0 is float32; give uint8\[H, W, 3\]"),
        (NAN, "image 0 holds NaN or infinity"),
        (None, "image 0 is object; give"),
    ],
)
def test_what_is_no_camera_picture(image: Any, message: str) -> None:
    arm = policy()
    with pytest.raises(InputError, match=message):
        arm.predict([image], [ORDER])
    with pytest.raises(InputError, match=message):
        Episode(arm, PRUNER).act(image, ORDER)


def test_pictures_of_another_size_and_instructions_that_say_nothing() -> None:
    arm, image, small = policy(), camera(0, 1)[0], camera(0, 1, size=20)[0]
    episode = Episode(arm, PRUNER)
    episode.act(image, ORDER)
    with pytest.raises(InputError, match=r"image is \[20, 20, 3\] and the episode began with \[40, 40, 3\].*reset"):
        episode.act(small, ORDER)
    with pytest.raises(InputError, match=r"image 1 is \[20, 20, 3\] and image 0 is \[40, 40, 3\]"):
        arm.predict([image, small], [ORDER, ORDER])
    with pytest.raises(InputError, match="2 and the episode has 1; call only"):
        episode.act([image, image], [ORDER, ORDER])
    for images, orders in (([image], []), ([], []), ([image, image], [ORDER])):
        with pytest.raises(InputError, match="give one instruction per image"):
            arm.predict(images, orders)
    for order in ("", "  ", None, 3):
        with pytest.raises(InputError, match=r"instruction 0 is .*say in words"):
            arm.predict([image], [order])  # type: ignore[list-item]


def test_pixels_and_prompts_made_by_hand_are_checked_as_well() -> None:
    arm = policy()
    inputs = dict(arm.processor(text=[arm.processor.prompt(ORDER)], images=camera(0, 1)))

    def predict(**changed: Tensor) -> None:
        arm.model.predict_tokens(unnorm_key="toy_arm", **{**inputs, **changed})

    predict()
    with pytest.raises(InputError, match=r"must end with token .* lone space"):
        predict(input_ids=inputs["input_ids"][:, :-1], attention_mask=inputs["attention_mask"][:, :-1])
    with pytest.raises(InputError, match="NaN"):
        predict(pixel_values=inputs["pixel_values"] * torch.nan)
    for bad in ((1, 3, SIDE, SIDE), (1, 6, SIDE + 14, SIDE + 14)):
        with pytest.raises(InputError, match=r"pixel_values"):
            predict(pixel_values=torch.zeros(bad))


def test_an_episode_ends_with_its_policy_and_when_it_is_closed() -> None:
    arm, image = policy(), camera(0, 1)[0]
    episode = Episode(arm, PRUNER)
    episode.act(image, ORDER)
    arm.unload()
    arm.unload()
    for use in (lambda: episode.act(image, ORDER), lambda: Episode(arm, PRUNER), lambda: arm.predict([image], [ORDER])):
        with pytest.raises(MMTokenError, match="policy was unloaded; load the model again"):
            use()
    with Episode(policy()) as short:
        short.act(image, ORDER)
    for use in (lambda: short.act(image, ORDER), short.reset, lambda: short.only([0]), lambda: short.history):
        with pytest.raises(MMTokenError, match="episode is closed"):
            use()


def test_reports_are_there_when_something_was_measured() -> None:
    arm = policy()
    with pytest.raises(MMTokenError, match="no step was taken"):
        _ = Episode(arm, PRUNER).report
    plain = Episode(arm)
    plain.act(camera(0, 1)[0], ORDER)
    with pytest.raises(MMTokenError, match="no compressor was given"):
        _ = plain.report


def test_what_cannot_be_attached_is_refused_at_once_and_a_taken_model_too() -> None:
    arm, image = policy(), camera(0, 1)[0]
    with pytest.raises(UnsupportedError, match="layer=9"):
        Episode(arm, VLAPruner(layer=9))
    episodes = [Episode(arm, PRUNER), Episode(arm)]
    with attach(arm.model, FastV(keep=0.5, layer=2)):
        for episode in episodes:
            with pytest.raises(MMTokenError, match="already has a compressor attached"):
                episode.act(image, ORDER)
    assert episodes[0].act(image, ORDER).shape == (ACTION,)
