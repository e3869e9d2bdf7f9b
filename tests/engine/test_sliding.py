"""Windows that are smaller than the prompt: what is left sees exactly what the uncompressed model's windows show.

The reference is the masked model on a cache that forgets nothing, whose masks alone make the windows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, StaticCache

import mmtoken
from mmtoken.compressors import Compressor, DivPrune, FastV, KeyDiff, PyramidDrop
from mmtoken.compressors.base import CacheEntry, Context, Positions
from mmtoken.engine.cache import LogicalSlidingLayer, logical_layer, make_logical
from mmtoken.errors import UnsupportedError
from tests import oracle
from tests.backbones.tiny_models import build, inputs
from tests.contract.matrix import assert_close
from tests.contract.reference import evicted_by_layer, kept_by_layer
from tests.contract.test_modes import options

WINDOW = 8
METHODS: dict[str, Compressor] = {
    "divprune": DivPrune(keep=0.4),
    "fastv": FastV(keep=0.4, layer=1),
    "pyramiddrop": PyramidDrop(keep=0.25, layers=(1, 3)),
}
CASES = ("plain", "left_padded", "padded_ragged", "multi_image")


@functools.cache
def narrow(name: str, attn: str = "sdpa", window: int = WINDOW) -> nn.Module:
    """A model whose sliding layers see 8 tokens."""
    model = build(name, attn)
    config = model.config.get_text_config()
    config.sliding_window = window
    for layer in oracle.text_model(model).layers:
        if layer.self_attn.sliding_window is not None:
            layer.self_attn.sliding_window = window
    return model


def forgetful(cache: Any, window: int = WINDOW) -> bool:
    """Whether a sliding layer stores no more than its window."""
    return all(layer.keys.shape[2] < window for layer in cache.layers if layer.is_sliding)


def masked(model: nn.Module, batch: oracle.Inputs, report: Any, **options: Any) -> oracle.Generated:
    keep = kept_by_layer(report, torch.zeros_like(batch["input_ids"], dtype=torch.bool), 4)
    with oracle.masked_keys(model, keep):
        return oracle.generate_with_logits(model, batch, **{oracle.CACHE: DynamicCache()}, **options)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_the_model(attn: str, case: str) -> None:
    model = narrow("gemma3", attn)
    batch = inputs(model, "gemma3", "image", case)
    want = oracle.generate_with_logits(model, batch, max_new_tokens=12)
    got = oracle.generate_with_logits(model, batch, max_new_tokens=12, **{oracle.CACHE: DynamicCache()})
    assert forgetful(want.cache)
    assert not any(layer.is_sliding for layer in got.cache.layers)
    assert_close(got.logits, want.logits)
    wide = oracle.generate_with_logits(build("gemma3", attn), batch, max_new_tokens=12)
    assert oracle.max_error(wide.logits, want.logits) > 0.01  # the window hides something


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", [FastV(keep=1.0, layer=1), DivPrune(keep=1.0)], ids=["fastv", "divprune"])
def test_keeping_all_changes_no_bit(method: Compressor, case: str, attn: str, static: bool) -> None:
    model = narrow("gemma3", attn)
    batch = inputs(model, "gemma3", "image", case)
    how = {"cache_implementation": "static"} if static else {}
    want = oracle.generate_with_logits(model, batch, max_new_tokens=12, **how)
    with mmtoken.compress(model, method):
        got = oracle.generate_with_logits(model, batch, max_new_tokens=12, **how)
    assert torch.equal(got.logits, want.logits)


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=["", "static", "beams"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_dropping_equals_masking(method: str, case: str, how: dict[str, Any]) -> None:
    check("gemma3", "sdpa", METHODS[method], case, how)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["left_padded", "padded_ragged"])
@pytest.mark.parametrize("method", METHODS)
def test_dropping_equals_masking_where_other_layers_rotate_nothing(method: str, case: str, attn: str) -> None:
    check("cohere2_vision", attn, METHODS[method], case, {})


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}], ids=["", "beams"])
@pytest.mark.parametrize("case", CASES)
def test_dropping_equals_masking_in_paligemma_2(case: str, how: dict[str, Any]) -> None:
    check("paligemma2", "eager", METHODS["divprune"], case, how)


def test_transformers_itself_has_no_static_cache_for_paligemma_2() -> None:
    model = narrow("paligemma2", "eager")
    with pytest.raises(AttributeError, match="'dict' object"):
        oracle.generate_with_logits(model, inputs(model, "paligemma", "image", "plain"), cache_implementation="static")


def test_reading_capped_attention_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="attn_logit_softcapping"):
        mmtoken.attach(narrow("paligemma2", "eager"), METHODS["fastv"])


def check(name: str, attn: str, method: Compressor, case: str, how: dict[str, Any]) -> None:
    model = narrow(name, attn)
    batch = inputs(model, {"paligemma2": "paligemma"}.get(name, name), "image", case)
    with mmtoken.compress(model, method) as session:
        got = oracle.generate_with_logits(model, batch, max_new_tokens=12, **how)
    beams = how.get("num_beams", 1)
    if beams > 1:  # its report has each row twice
        with mmtoken.compress(model, method) as session:
            oracle.generate_with_logits(model, batch, max_new_tokens=1)
    want = masked(model, batch, session.report, max_new_tokens=12, **({"num_beams": beams} if beams > 1 else {}))
    assert torch.equal(got.sequences, want.sequences)
    assert_close(got.logits, want.logits)
    if not how:
        assert forgetful(got.cache)


@pytest.mark.parametrize("method", METHODS)
def test_a_second_turn_sees_the_same_windows(method: str) -> None:
    model = narrow("gemma3")
    batch = inputs(model, "gemma3", "image", "padded_ragged")
    with mmtoken.compress(model, METHODS[method]) as session:
        got = oracle.second_turn(model, batch)
    keep = kept_by_layer(session.reports[0], torch.zeros_like(batch["input_ids"], dtype=torch.bool), 4)
    with oracle.masked_keys(model, keep):
        first = oracle.generate_with_logits(model, batch, **{oracle.CACHE: DynamicCache()})
        ids = torch.cat([first.sequences, first.sequences.new_tensor((104, 105, 106)).expand(3, -1)], 1)
        mask = nn.functional.pad(batch["attention_mask"], (0, ids.shape[1] - batch["attention_mask"].shape[1]), value=1)
        again = {"input_ids": ids, "attention_mask": mask, oracle.CACHE: first.cache}
        want = oracle.generate_with_logits(model, again)
    assert_close(got.logits, want.logits)


@dataclass(frozen=True)
class Alike(Compressor):
    """About half of the visual tokens that a layer holds, by their keys, the same in every head."""

    keep: int | float = 0.5
    positions: Positions = "keep"

    def cache(self, entry: CacheEntry, layer: int, ctx: Context) -> Tensor:
        stay = entry.valid & ((entry.item < 0) | (entry.keys[:, 0, :, layer] > 0))
        return stay[:, None].expand(entry.keys.shape[:3])


@pytest.mark.parametrize(
    ("method", "mode"),
    [(Alike(), "drop"), (Alike(), "mask"), (KeyDiff(keep=2), "mask")],
    ids=["alike", "alike hidden", "per head"],
)
@pytest.mark.parametrize("case", CASES)
def test_entries_leave_layers_with_a_window_and_layers_without(case: str, method: Compressor, mode: Any) -> None:
    """What a window has passed is gone for good; of what it still shows, decoding misses what left and nothing else.

    Behind the picture come up to 13 tokens of text, so that a window of 20 holds some of both.
    """
    model = narrow("gemma3", window=20)
    batch = inputs(model, "gemma3", "image", case)
    with mmtoken.compress(model, method, mode=mode) as session:
        got = oracle.generate_with_logits(model, batch, max_new_tokens=12)
    keep = kept_by_layer(session.report, torch.zeros_like(batch["input_ids"], dtype=torch.bool), 4)
    evicted = evicted_by_layer(session.report, keep)
    assert [layer.is_sliding for layer in got.cache.layers] == [True, False, True, False]
    for site in session.report.sites:
        assert 0 < sum(site.tokens_out) < sum(site.tokens_in)
    with oracle.masked_keys(model, evicted, decode_only=True):
        want = oracle.generate_with_logits(model, batch, max_new_tokens=12, **{oracle.CACHE: DynamicCache()})
    assert torch.equal(got.sequences, want.sequences)
    assert_close(got.logits, want.logits)
    assert forgetful(got.cache, window=20)


@torch.no_grad()
@pytest.mark.parametrize("method", [FastV(keep=0.4, layer=1), PyramidDrop(keep=0.4, layers=(2,))], ids=["of", "ahead"])
def test_a_second_picture_is_scored_by_what_the_window_still_shows(method: Compressor) -> None:
    """Whatever the cache still holds of the first one: the window's share, in either kind of cache, or all."""
    model = narrow("gemma3", window=20)
    batch = inputs(model, "gemma3", "image", "plain")
    config, more = oracle.text_model(model).config, {**batch, "pixel_values": batch["pixel_values"].flip(-1)}
    more["attention_mask"] = torch.cat([batch["attention_mask"]] * 2, 1)
    found = []
    for cache in (DynamicCache(), DynamicCache(config=config), StaticCache(config=config, max_cache_len=80)):
        with mmtoken.compress(model, method) as session:
            model(**oracle.clone(batch), use_cache=True, **{oracle.CACHE: cache})
            logits = model(**oracle.clone(more), use_cache=True, **{oracle.CACHE: cache}).logits
        found.append((session.report.sites[-1].scores, session.report.kept, logits))
    (wanted, kept, logits), *others = found
    assert wanted is not None
    for scores, left, got in others:
        for score, want in zip(scores, wanted, strict=True):
            assert_close(score, want)
        assert [one.tolist() for one in left] == [one.tolist() for one in kept]
        assert_close(got, logits)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "gemma3"])
@pytest.mark.parametrize("case", ["plain", "padded_ragged"])
@pytest.mark.parametrize("method", [PyramidDrop(keep=0.25, layers=(2, 3)), Alike()], ids=["cuts", "evicts"])
def test_a_second_picture_sees_in_every_layer_what_the_first_one_left_there(
    family: str, case: str, method: Compressor
) -> None:
    """Layers of one kind hold different entries by then, so that the mask of the first one does not fit them."""
    model = build(family)
    batch = inputs(model, family, "image", case)
    more = {**batch, "pixel_values": batch["pixel_values"].flip(-1)}
    more["attention_mask"] = torch.cat([batch["attention_mask"]] * 2, 1)
    found = []
    for mode in ("drop", "mask"):
        with mmtoken.compress(model, method, mode=mode) as session:  # type: ignore[arg-type]
            cache = model(**oracle.clone(batch), use_cache=True)[oracle.CACHE]
            logits = model(**oracle.clone(more), use_cache=True, **{oracle.CACHE: cache}).logits
        found.append((session.report, logits[batch["attention_mask"].bool()]))
    (dropped, got), (hidden, want) = found
    for mine, site in zip(dropped.sites, hidden.sites, strict=True):
        assert 0 < sum(mine.tokens_out) < sum(mine.tokens_in)
        assert [kept.tolist() for kept in mine.kept] == [kept.tolist() for kept in site.kept]
        assert (mine.scores is None) == isinstance(method, Alike)
        for score, other in zip(mine.scores or (), site.scores or (), strict=True):
            assert_close(score, other)
    assert_close(got, want)


def bare(kind: str) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """A decoder with windows, a prompt of 20 tokens of which 12 are marked, and the marks."""
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
             "num_key_value_heads": 2, "vocab_size": 64, "sliding_window": WINDOW, "eos_token_id": None}  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "mistral":
            model = tf.MistralForCausalLM(tf.MistralConfig(**shape)).eval()
        else:
            model = tf.Qwen2ForCausalLM(tf.Qwen2Config(**shape, use_sliding_window=True, max_window_layers=2)).eval()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim == 2:
                    weight.normal_(0.0, weight.shape[1] ** -0.5)
        ids = torch.randint(1, 64, (2, 20))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    visual = torch.zeros_like(ids, dtype=torch.bool)
    visual[:, 4:16] = True
    return model, {"input_ids": ids, "attention_mask": mask}, visual


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
@pytest.mark.parametrize("method", METHODS)
def test_decoders_alone(method: str, kind: str) -> None:
    model, batch, visual = bare(kind)
    with mmtoken.compress(model, METHODS[method], visual=visual) as session:
        got = oracle.generate_with_logits(model, batch, max_new_tokens=12)
    want = masked(model, batch, session.report, max_new_tokens=12)
    assert_close(got.logits, want.logits)
    plain = oracle.generate_with_logits(model, batch, max_new_tokens=12)
    assert oracle.max_error(got.logits, plain.logits) > 0.01


@pytest.mark.skipif(
    not hasattr(LogicalSlidingLayer(8), "record_past"), reason="this version of transformers forgets what it guessed"
)
@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_guesses_are_taken_back_over_a_full_window_while_it_remembers(method: str) -> None:
    model = narrow("gemma3")
    batch = inputs(model, "gemma3", "image", "single")
    with mmtoken.compress(model, METHODS[method]) as session:
        how = {"assistant_model": build("gemma3", seed=3, layers=2), **options("gemma3")}
        got = oracle.generate_with_logits(model, batch, max_new_tokens=12, **how)
    want = masked(model, batch, session.report, max_new_tokens=12, **options("gemma3"))
    assert torch.equal(got.sequences, want.sequences)
    assert_close(got.logits, want.logits)


def test_taking_tokens_back_over_a_full_window_is_refused() -> None:
    model = narrow("gemma3")
    with mmtoken.compress(model, METHODS["divprune"]):
        cache = oracle.generate_with_logits(model, inputs(model, "gemma3", "image", "plain")).cache
    layer = logical_layer(cache, 0)
    assert isinstance(layer, LogicalSlidingLayer)
    with pytest.raises(UnsupportedError, match="window of 8 tokens is full"):
        layer.crop(-2)


@pytest.mark.parametrize("steps", [(5,), (8,), (5, 3), (5, 3, 1, 1), (8, 1), (12, 1)])
def test_a_static_window_holds_what_the_next_token_sees(steps: tuple[int, ...]) -> None:
    """A full buffer has one entry more, its oldest, which the next token pushes out."""
    config = oracle.text_model(narrow("gemma3", window=WINDOW)).config
    cache = StaticCache(config=config, max_cache_len=32)
    make_logical(cache)
    number = config.layer_types.index("sliding_attention")
    entries = torch.arange(float(sum(steps)))[None, None, :, None].expand(1, config.num_key_value_heads, -1, 4)
    for part in entries.split(steps, 2):
        cache.update(part, part, number)
    keys, values = cache.layers[number].held()
    assert keys[0, 0, :, 0].tolist() == values[0, 0, :, 0].tolist() == list(range(sum(steps)))[1 - WINDOW :]
