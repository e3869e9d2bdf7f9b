"""Zero-shot classification through a tower: open_clip's own logits at keep=1.0, a plain composition below."""

from __future__ import annotations

import open_clip
import pytest
import torch
from torch import Tensor

from mmtoken import compress
from mmtoken.classify import zero_shot_logits
from mmtoken.compressors import TCA, ToMe
from mmtoken.compressors.base import Compressor
from mmtoken.errors import InputError, UnsupportedError
from tests.backbones.test_towers import assert_close, composed_by_hand, tca_by_hand
from tests.backbones.tiny_models import build
from tests.backbones.tiny_towers import make_clip, pictures

CLASSES = ["cat", "ox", "sparrow", "newt"]


def tokenize(texts: list[str]) -> Tensor:
    """int[n, 8]: letters as numbers, padded, the highest number at the end of each text."""
    rows = [[*(ord(c) % 50 + 1 for c in text[:7]), 59] for text in texts]
    return torch.tensor([row + [0] * (8 - len(row)) for row in rows])


def weights_of(model: object) -> Tensor:
    with torch.no_grad():
        found: Tensor = open_clip.build_zero_shot_classifier(
            model, tokenize, CLASSES, ["a {}"], num_classes_per_batch=None
        )
    return found


@pytest.mark.parametrize("bias", [None, -2.0])
@pytest.mark.parametrize("method", [TCA(keep=1.0), ToMe(keep=1.0)], ids=["tca", "tome"])
def test_keeping_everything_gives_the_logits_of_open_clip(method: Compressor, bias: float | None) -> None:
    model, images = make_clip(), pictures(3)
    if bias is not None:
        model.logit_bias = torch.nn.Parameter(torch.tensor(bias))
    texts = tokenize([f"a {name}" for name in CLASSES])
    with torch.no_grad():
        want, _ = model.get_logits(images, texts)
        weights = model.encode_text(texts, normalize=True).T
        with compress(model, method) as session:
            got = zero_shot_logits(model, images, weights)
    assert session.report.tokens_out == [16] * 3
    assert torch.equal(got, want)
    assert_close(zero_shot_logits(model, images, weights_of(model)).detach(), want)


def test_a_compressed_towers_logits_equal_a_plain_composition() -> None:
    model, images = make_clip(), pictures(3)
    weights = weights_of(model)
    with torch.no_grad(), compress(model, TCA(keep=7, layers=(0, 2), variant="repo")):
        got = zero_shot_logits(model, images, weights)
    ends = [composed_by_hand(model.visual, "clip", image[None], tca_by_hand((0, 2), 7)) for image in images]
    features = torch.stack([model.visual.ln_post(end)[0] @ model.visual.proj for end in ends])
    want = model.logit_scale.exp() * features / features.norm(dim=-1, keepdim=True) @ weights
    assert_close(got, want.detach())
    assert not torch.equal(got, zero_shot_logits(model, images, weights))


def test_what_is_no_open_clip_model_or_fits_none_is_refused() -> None:
    model, images = make_clip(), pictures(1)
    with pytest.raises(UnsupportedError, match="model is a CLIPVisionModel"):
        zero_shot_logits(build("clip_vision"), images, torch.zeros(16, 2))
    with pytest.raises(InputError, match=r"weights has shape \(16,\)"):
        zero_shot_logits(model, images, torch.zeros(16))
    with pytest.raises(InputError, match="image features are 16 wide"):
        zero_shot_logits(model, images, torch.zeros(4, 16))
    with pytest.raises(InputError, match="images has shape"):
        zero_shot_logits(model, images[0], torch.zeros(16, 2))
