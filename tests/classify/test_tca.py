"""TCA's adapter: plain CLIP where it may add nothing, plain loops where it may, and nothing left between test sets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmtoken import MMTokenError, compress
from mmtoken.classify import Correction, Reservoir, TCAClassifier, zero_shot_logits
from mmtoken.classify.tca import entropy
from mmtoken.compressors import TCA
from mmtoken.engine.class_states import class_states
from mmtoken.errors import InputError, UnsupportedError
from tests import oracle
from tests.backbones.test_towers import assert_close
from tests.backbones.tiny_towers import make_clip, pictures, tower

METHOD = TCA(keep=6, layers=(1, 2))


def weights(classes: int = 2, seed: int = 0) -> Tensor:
    """float[16, C], unit columns."""
    drawn = torch.randn(16, classes, generator=torch.Generator().manual_seed(seed))
    return nn.functional.normalize(drawn, dim=0)


@torch.no_grad()
def by_hand(model: Any, columns: Tensor, images: Tensor, settings: Correction) -> tuple[list[Tensor], int]:
    """(corrected logits per image, how many were classified with anchors): the paper's steps in plain loops."""
    held: list[list[tuple[float, Tensor]]] = [[] for _ in range(columns.shape[1])]
    logits, anchored = [], 0
    for image in images:
        memory: dict[str, Any] = {}
        if all(len(some) >= 2 for some in held):
            anchored += 1
            memory["anchors"] = {
                block: torch.stack([sum(s[block - 1] for _, s in some) / len(some) for some in held])
                for block in range(1, 3)
            }
        with compress(model, METHOD) as session, session.remembering(memory), class_states(model) as noted:
            plain = zero_shot_logits(model, image[None], columns)[0]
        states = torch.cat(noted)
        p = plain.softmax(-1).tolist()
        held[int(plain.argmax())].append((-sum(v * math.log(v) for v in p if v > 0), states))
        mine = held[int(plain.argmax())]
        if len(mine) > settings.size:
            costs = []
            for i, (loss, one) in enumerate(mine):
                alike = [_cosine(one.mean(0), other.mean(0)) for j, (_, other) in enumerate(mine) if j != i]
                costs.append(loss + sum(alike) / len(alike))
            mine.pop(costs.index(max(costs)))
        depth = [math.exp(i / (len(states) - 1) / settings.scale) for i in range(len(states))]
        for label, some in enumerate(held):
            for _, other in some:
                affinity = sum(w * _cosine(a, b) for w, a, b in zip(depth, states, other, strict=True)) / sum(depth)
                plain[label] += settings.strength * math.exp(-settings.sharpness * (1 - affinity))
        logits.append(plain)
    return logits, anchored


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


def test_a_stream_of_images_equals_plain_loops_with_and_without_anchors() -> None:
    model, images = make_clip(), pictures(14)
    for settings in (Correction(scale=0.5), Correction(size=1, strength=7.0, sharpness=2.0)):
        want, anchored = by_hand(model, weights(), images, settings)
        classifier = TCAClassifier(model, weights(), METHOD, settings)
        got = torch.cat([classifier(images[:5]), classifier(images[5:])])
        assert_close(got, torch.stack(want))
        assert (anchored > 2) == (settings.size > 1), "the images must bring every class to two entries"
        assert all(len(some) <= settings.size for some in classifier.reservoir.held)
    assert oracle.hook_count(model) == 0


def test_anchors_change_what_is_seen_and_the_classifier_forgets_on_reset() -> None:
    model, images = make_clip(), pictures(14)
    classifier = TCAClassifier(model, weights(), METHOD, Correction(strength=0.0))
    got = classifier(images)
    with torch.no_grad(), compress(model, METHOD):
        plain = zero_shot_logits(model, images, weights())
    assert classifier.reservoir.anchors().keys() == {1, 2}
    assert_close(got[:4], plain[:4])
    assert oracle.max_error(got, plain) > 1e-3
    classifier.reset()
    assert classifier.reservoir.anchors() == {}
    assert torch.equal(classifier(images), got)


def test_nothing_held_and_nothing_dropped_is_plain_clip() -> None:
    model, images = make_clip(), pictures(6)
    classifier = TCAClassifier(model, weights(), TCA(keep=1.0), Correction(size=1, strength=0.0))
    with torch.no_grad():
        want = torch.cat([zero_shot_logits(model, image[None], weights()) for image in images])
    assert torch.equal(classifier(images), want)


def test_the_first_image_gains_the_full_strength_at_its_own_class() -> None:
    model, images = make_clip(), pictures(1)
    with torch.no_grad(), compress(model, METHOD):
        plain = zero_shot_logits(model, images, weights(5))[0]
    gained = TCAClassifier(model, weights(5), METHOD, Correction(strength=4.0))(images)[0] - plain
    assert_close(gained, 4.0 * nn.functional.one_hot(plain.argmax(), 5).float())


def test_classes_may_come_in_any_order() -> None:
    model, images, order = make_clip(), pictures(12), torch.tensor([2, 0, 1])
    one = TCAClassifier(model, weights(3), METHOD)(images)
    other = TCAClassifier(model, weights(3)[:, order], METHOD)(images)
    assert_close(other, one[:, order])


def test_the_least_certain_and_most_alike_image_leaves() -> None:
    reservoir = Reservoir(1, Correction(size=2))
    east, north = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    reservoir.add(0, 0.0, east)
    reservoir.add(0, 0.1, east)
    reservoir.add(0, 0.5, north)  # costs 0.5 each for the two alike, 0 for the other one, and the entropies
    assert [round(image.entropy, 3) for image in reservoir.held[0]] == [0.0, 0.5]
    reservoir.add(0, 2.0, north)
    assert [round(image.entropy, 3) for image in reservoir.held[0]] == [0.0, 0.5]


def test_entropies_in_nats() -> None:
    assert float(entropy(torch.zeros(4))) == pytest.approx(math.log(4))
    assert float(entropy(torch.tensor([300.0, -300.0]))) == 0.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("size", value) for value in (0, -1, 1.5, True)),
        *(("scale", value) for value in (0, -1.0, math.nan, "1", True)),
        *((name, value) for name in ("strength", "sharpness") for value in (-0.1, math.inf, math.nan, None)),
    ],
)
def test_bad_settings_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(MMTokenError, match=f"{field}="):
        Correction(**{field: value})


def test_what_cannot_be_adapted_is_refused() -> None:
    classifier = TCAClassifier(make_clip(), weights())
    for images in (torch.zeros(3, 32, 32), torch.zeros(0, 3, 32, 32)):
        with pytest.raises(InputError, match="images has shape"):
            classifier(images)
    with pytest.raises(InputError, match="weights has shape"):
        TCAClassifier(make_clip(), torch.zeros(16))
    with pytest.raises(UnsupportedError, match="model is a Linear"):
        TCAClassifier(nn.Linear(2, 2), weights())
    with pytest.raises(UnsupportedError, match="class token"), class_states(tower("vit_base_patch16_siglip_224")):
        pass
    with pytest.raises(UnsupportedError, match="layers="):
        TCAClassifier(make_clip(), weights(), TCA(layers=(3,)))(pictures(1))
