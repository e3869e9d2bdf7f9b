"""Under flex attention, whose masks are no tensors, a compressed model gives what it gives under sdpa.

Transformers compiles flex attention, which takes a minute on a CPU; here the same function runs uncompiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import mmtoken
from mmtoken import compress
from mmtoken.compressors import DivPrune, FastV, PyramidDrop, Sequential, SnapKV, SparseVLM, VisionZip, VLAPruner
from mmtoken.compressors.base import Compressor
from mmtoken.engine import attention
from mmtoken.errors import UnsupportedError
from tests import oracle
from tests.backbones.tiny_models import build, inputs
from tests.engine.agreement import assert_close, left_in_layers, tiny
from tests.engine.test_session import leaves_nothing

FLEX = "flex_attention"
FAMILIES = ("llava", "llava_onevision")
METHODS: dict[str, Compressor] = {
    "divprune": DivPrune(keep=0.4),
    "fastv": FastV(keep=0.4),
    "pyramiddrop": PyramidDrop(keep=0.25),
    "visionzip": VisionZip(keep=0.4),
}

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", ["plain", "padded_ragged"])
@pytest.mark.parametrize("name", METHODS)
def test_dropping_equals_masking(family: str, case: str, name: str) -> None:
    flex, sdpa = tiny(family, FLEX), tiny(family)
    batch = inputs(flex, family, "image", case)
    with compress(flex, METHODS[name]) as session:
        got = oracle.generate_with_logits(flex, batch, max_new_tokens=3)
    if name == "visionzip":  # merges, so that no masked model equals it
        with compress(sdpa, METHODS[name]):
            want = oracle.generate_with_logits(sdpa, batch, max_new_tokens=3)
    else:
        with oracle.masked_keys(sdpa, left_in_layers(session.report, batch, 4)):
            want = oracle.generate_with_logits(sdpa, batch, max_new_tokens=3)
    assert torch.equal(got.sequences, want.sequences)
    assert_close(got.logits, want.logits)


@pytest.mark.parametrize(("family", "mode"), [("llava", "drop"), ("llava", "mask"), ("idefics3", "drop")])
def test_keeping_everything_is_the_plain_model(family: str, mode: Any) -> None:
    model = tiny(family, FLEX)
    batch = inputs(model, family, "image", "padded_ragged")
    plain = oracle.generate_with_logits(model, batch, max_new_tokens=3)
    with leaves_nothing(model), compress(model, FastV(keep=1.0), mode=mode):
        got = oracle.generate_with_logits(model, batch, max_new_tokens=3)
    assert torch.equal(got.logits, plain.logits)


@pytest.mark.parametrize("method", [FastV(keep=0.4), SparseVLM(keep=0.4), PyramidDrop(keep=0.25)], ids=str)
def test_the_rows_that_methods_read_are_those_of_eager_attention(method: Compressor) -> None:
    scores: list[list[Tensor]] = []
    for attn in (FLEX, "eager"):
        model = tiny("llava", attn)
        with compress(model, method) as session, torch.no_grad():
            model(**inputs(model, "llava", "image", "padded_ragged"))
        found = [s for site in session.report.sites for s in site.scores or ()]
        assert found
        scores.append(found)
    for got, want in zip(*scores, strict=True):
        assert oracle.max_error(got, want) <= 1e-6


def test_padding_is_not_looked_at() -> None:
    """A row of a padded batch scores and answers as it does by itself."""
    model = tiny("llava", FLEX)
    batch = inputs(model, "llava", "image", "left_padded")
    real = batch["attention_mask"][0].bool()
    assert not bool(real.all())
    alone = {name: batch[name][:1, real] for name in ("input_ids", "attention_mask")}
    alone["pixel_values"] = batch["pixel_values"][:1]
    found = []
    for given in (batch, alone):
        with compress(model, FastV(keep=0.4)) as session:
            out = oracle.generate_with_logits(model, given, max_new_tokens=3)
        (site,) = session.report.sites
        assert site.scores is not None
        found.append((site.scores[0], out.logits[0]))
    for together, single in zip(*found, strict=True):
        assert_close(together, single)


@pytest.mark.parametrize("method", [SnapKV(keep=0.4, window=2), VLAPruner(keep=0.4)], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_masks_per_head_and_recorded_steps_are_those_of_sdpa(method: Compressor, mode: Any) -> None:
    found = []
    for attn in (FLEX, "sdpa"):
        model = tiny("llava", attn)
        batch = inputs(model, "llava", "image", "padded_ragged")
        with compress(model, method, mode=mode) as session:
            oracle.generate_with_logits(model, batch, max_new_tokens=3)
            found.append(oracle.generate_with_logits(model, batch, max_new_tokens=3).logits)
            found.append(torch.cat(session.report.kept))
    assert_close(found[0], found[2])
    assert torch.equal(found[1], found[3])


@pytest.mark.parametrize("name", ["divprune", "fastv"])
@pytest.mark.parametrize("how", [{"cache_implementation": "static"}, {"num_beams": 2}, {"use_cache": False}], ids=str)
def test_other_ways_of_decoding_give_the_same(name: str, how: dict[str, Any]) -> None:
    """For a static cache transformers makes the mask itself, in the form of flex attention."""
    found = []
    for attn in (FLEX, "sdpa"):
        model = tiny("llava", attn)
        batch = inputs(model, "llava", "image", "padded_ragged")
        with compress(model, METHODS[name]):
            found.append(oracle.generate_with_logits(model, batch, max_new_tokens=3, **how))
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert_close(found[0].logits, found[1].logits)


def test_a_block_mask_of_the_caller_is_cut_as_well() -> None:
    flex, sdpa = tiny("llava", FLEX), tiny("llava")
    batch = inputs(flex, "llava", "image", "plain")
    length = batch["input_ids"].shape[1]
    hidden = 2  # a word of the second row that the caller hides

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & ((row == 0) | (key != hidden) | (query == key))

    block = create_block_mask(seen, 2, None, length, length, "cpu")
    with torch.no_grad(), compress(flex, FastV(keep=0.4)) as session:
        got = flex(**{**batch, "attention_mask": block}, use_cache=False).logits
    keep = left_in_layers(session.report, batch, 4)
    for mask in keep.values():
        mask[1, hidden] = False
    with torch.no_grad(), oracle.masked_keys(sdpa, keep):
        want = sdpa(**batch, use_cache=False).logits
    assert_close(got[:, -1], want[:, -1])


def test_a_mask_that_adds_to_scores_is_refused() -> None:
    model = tiny("llava", FLEX)
    batch = inputs(model, "llava", "image", "plain")
    length = batch["input_ids"].shape[1]
    batch["attention_mask"] = torch.zeros(2, 1, length, length)
    with torch.no_grad(), compress(model, FastV(keep=0.4)), pytest.raises(UnsupportedError, match="adds nothing"):
        model(**batch)
    assert oracle.hook_count(model) == 0


def test_weights_of_merged_tokens_are_refused() -> None:
    method = Sequential(parts=(VisionZip(keep=0.5),), calibrate=True)
    with compress(tiny("llava"), method), pytest.raises(UnsupportedError, match=r"log\(size\).*'sdpa' or 'eager'"):
        mmtoken.attach(tiny("llava", FLEX), method)


@pytest.mark.parametrize("name", ["tome", "flowcut", "zerotprune"])
def test_acting_inside_a_tower_needs_another_attention_there(name: str) -> None:
    model = build("llava", FLEX)
    batch = inputs(model, "llava", "image", "padded_ragged")
    with pytest.raises(UnsupportedError, match=r"of the vision tower .*'vision_config': 'sdpa'"):
        mmtoken.attach(model, {"class_path": name, "init_args": {"keep": 0.6}})
    model.set_attn_implementation({"vision_config": "sdpa"})
    found = []
    for attached in (model, tiny("llava")):
        with compress(attached, {"class_path": name, "init_args": {"keep": 0.6}}):
            found.append(oracle.generate_with_logits(attached, batch, max_new_tokens=3).logits)
    assert_close(*found)


def test_padding_of_pictures_is_not_read_in_a_tower() -> None:
    """The only tower whose blocks get a mask."""
    scores = []
    for attn in (FLEX, "sdpa"):
        model = tiny("idefics3", attn)
        with compress(model, VisionZip(keep=0.4)) as session, torch.no_grad():
            model(**inputs(model, "idefics3", "image", "padded_ragged"))
        scores.append([s for site in session.report.sites for s in site.scores or ()])
    assert scores[0]
    for got, want in zip(*scores, strict=True):
        assert_close(got, want)


def test_layers_share_what_is_made_of_a_mask_and_a_call_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def count(*args: Any) -> Any:
        made.append(args)
        return create_block_mask(*args)

    monkeypatch.setattr(attention, "create_block_mask", count)
    model = tiny("llava", FLEX)
    with torch.no_grad(), compress(model, FastV(keep=0.4)):
        model(**inputs(model, "llava", "image", "padded_ragged"))
    assert len(made) == 2  # before and after the cut
    assert "blocks" not in vars(attention._listening)
