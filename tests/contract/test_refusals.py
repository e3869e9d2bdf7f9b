"""What cannot work is refused before it can go wrong, in words that name the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import cache_utils

from mmtoken import MMTokenError, attach, check
from mmtoken.compressors import DivPrune, FastV, PyramidDrop
from mmtoken.errors import InputError, UnsupportedError
from tests import oracle
from tests.backbones.tiny_models import CELLS, build, config
from tests.contract.matrix import (
    COMPRESSORS,
    Cell,
    batch,
    compress,
    logits,
    refused,
    refused_when_called,
    tiny,
)

pytestmark = pytest.mark.lowest
LLAVA = ("llava", "image")
VISUAL = torch.zeros(1, 12, dtype=torch.bool).index_fill(1, torch.arange(2, 9), True)

REFUSED = [
    pytest.param(name, cell, id=f"{name}-{'-'.join(cell)}")
    for name in COMPRESSORS
    for cell in CELLS
    if refused(name, cell)
]


@pytest.mark.parametrize(("name", "cell"), REFUSED)
def test_a_pair_that_cannot_work_is_refused_and_leaves_no_trace(name: str, cell: Cell) -> None:
    model = tiny(cell[0])
    before = oracle.fingerprint(model)
    reason = refused(name, cell)
    with pytest.raises(UnsupportedError, match=reason):
        attach(model, COMPRESSORS[name])
    with pytest.raises(UnsupportedError, match=reason):
        check(model, COMPRESSORS[name])
    assert oracle.fingerprint_changes(before, oracle.fingerprint(model)) == []


CALLS = [(name, cell) for name in COMPRESSORS for cell in CELLS if refused_when_called(name, cell)]


@pytest.mark.parametrize(
    ("name", "cell"), CALLS, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_an_input_that_cannot_work_is_refused_when_it_comes(name: str, cell: Cell) -> None:
    model, inputs = tiny(cell[0]), batch(cell, "plain")
    with (
        compress(model, COMPRESSORS[name]) as session,
        pytest.raises(MMTokenError, match=refused_when_called(name, cell)),
    ):
        logits(model, inputs)
    assert session.reports == []
    assert oracle.hook_count(model) == 0


def chunked() -> tf.PreTrainedModel:
    model = build("llama")
    model.config.attention_chunk_size = 8  # the cache of such a decoder is that of a sliding window
    return model


def with_attention(name: str) -> tf.PreTrainedModel:
    """Set past transformers' own check, as for a kernel that the user has registered, or one that is installed."""
    model = build("llava")
    model.config.text_config._attn_implementation = name
    return model


def pixtral() -> tf.PreTrainedModel:
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = config("llava", layers=1).text_config
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=tf.PixtralVisionConfig(**tower), text_config=text)
    )


# What is attached to what, and words of the message.
ATTACH: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "a tower method on a bare decoder": (lambda: tiny("llama"), COMPRESSORS["visionzip"], "a bare decoder has none"),
    "attention of a tower on a bare decoder": (lambda: tiny("llama"), COMPRESSORS["holov"], "a bare decoder has none"),
    "text on a bare tower": (lambda: tiny("clip_vision"), COMPRESSORS["cdpruner"], "reads the prompt"),
    "merging in a tower on a bare decoder": (lambda: tiny("llama"), COMPRESSORS["tome"], "a bare decoder has none"),
    "a decoder method on a bare tower": (lambda: tiny("clip_vision"), COMPRESSORS["fastv"], "this is a bare tower"),
    "progressive cuts on a bare tower": (lambda: tiny("siglip_vision"), COMPRESSORS["pyramiddrop"], "a bare tower"),
    "a layer beyond the depth": (lambda: tiny("llava"), FastV(layer=4), "layer=4 but this decoder has 4 layers"),
    "a stage beyond the depth": (lambda: tiny("qwen3_vl"), PyramidDrop(layers=(1, 9)), "layers=9 but"),
    "shares without stages": (lambda: tiny("llava"), PyramidDrop(keep=0.5, shares=(0.5,)), "1 stages"),
    "flash attention": (
        lambda: with_attention("flash_attention_2"),
        DivPrune(),
        "flash_attention_2.*'sdpa', 'eager' or 'flex_attention'",
    ),
    "attention that is paged": (lambda: with_attention("paged|sdpa"), FastV(), "'paged|sdpa' is unknown"),
    "attention of the user's own": (lambda: with_attention("my_kernel"), DivPrune(), "'my_kernel' is unknown"),
    "attention in chunks": (chunked, DivPrune(), "layer 0 .*SlidingWindow"),
    "an unknown family": (
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8)),
        DivPrune(),
        "model_type='gpt2' has no adapter",
    ),
    "a tower of LLaVA's without an adapter": (
        pixtral,
        DivPrune(),
        "'pixtral' is a tower of LLaVA-1.5 that has no adap",
    ),
    "something that is no model": (
        lambda: torch.nn.Linear(2, 2),
        DivPrune(),
        "expected a transformers PreTrainedModel",
    ),
}


@pytest.mark.parametrize("case", ATTACH)
def test_attach_refuses(case: str) -> None:
    make, method, words = ATTACH[case]
    model = make()
    bare = isinstance(model, tf.PreTrainedModel) and model.config.model_type in ("llama", "qwen2", "mistral")
    with pytest.raises(MMTokenError, match=words):
        attach(model, method, visual=VISUAL if bare else None)
    if isinstance(model, torch.nn.Module):
        assert oracle.hook_count(model) == 0


def test_a_bare_decoder_needs_to_be_told_where_its_visual_tokens_are() -> None:
    with pytest.raises(UnsupportedError, match="visual=bool"):
        attach(tiny("llama"), DivPrune())
    with pytest.raises(InputError, match=r"expected bool\[B, L\]"):
        attach(tiny("llama"), DivPrune(), visual=torch.ones(1, 12))
    ids = torch.arange(13)[None]
    with compress(tiny("llama"), DivPrune(), visual=VISUAL), pytest.raises(InputError, match="1 rows of 13 tokens"):
        logits(tiny("llama"), {"input_ids": ids})


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(MMTokenError, match="mode='hide'"):
        attach(tiny("llava"), DivPrune(), mode="hide")  # type: ignore[arg-type]


class RoundedLayer(cache_utils.QuantizedLayer):
    """A quantised layer that needs no quantisation package."""

    def _quantize(self, tensor: Any, axis: int) -> Any:
        return tensor

    def _dequantize(self, tensor: Any) -> Any:
        return tensor


def dynamic_cache(family: str) -> cache_utils.DynamicCache:
    return cache_utils.DynamicCache(config=oracle.text_model(tiny(family)).config)


def quantised(family: str) -> cache_utils.Cache:
    return cache_utils.Cache(layers=[RoundedLayer() for _ in range(4)])


def offloaded(family: str) -> cache_utils.Cache:
    cache = dynamic_cache(family)
    cache.offloading = True  # making one for real needs a device to load back to
    return cache


CACHES = {
    "quantised": (quantised, "RoundedLayer, which cannot be compressed"),
    "offloaded": (offloaded, "offloads its layers"),
}


@pytest.mark.parametrize("name", ["divprune", "fastv"])
@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_that_no_site_can_serve_is_refused(kind: str, name: str) -> None:
    make, words = CACHES[kind]
    model, inputs = tiny("llava"), batch(LLAVA, "plain")
    with compress(model, COMPRESSORS[name]) as session:
        with pytest.raises(UnsupportedError, match=words):
            logits(model, inputs, use_cache=True, **{oracle.CACHE: make("llava")})
        assert session.reports == []
        logits(model, inputs)  # the refusal left nothing behind
        assert len(session.reports) == 1


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
@pytest.mark.skipif(
    not oracle.ENCODES_APART, reason="this version of transformers loses the pixels of a chunked prompt"
)
def test_a_prompt_in_chunks_is_refused(cell: Cell) -> None:
    model, inputs = tiny(cell[0]), batch(cell, "plain")
    oracle.generate_with_logits(model, inputs, prefill_chunk_size=8)  # transformers has no objection
    with compress(model, COMPRESSORS["divprune"]), pytest.raises(UnsupportedError, match="prefill_chunk_size"):
        oracle.generate_with_logits(model, inputs, prefill_chunk_size=8)


def test_a_truncated_prompt_is_refused() -> None:
    model, inputs = tiny("qwen3_vl"), dict(batch(("qwen3_vl", "image"), "single"))
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        inputs[name] = inputs[name][:, :15]
    with compress(model, COMPRESSORS["divprune"]), pytest.raises(ValueError, match="tokens"):
        logits(model, inputs)


def test_a_second_compressor_is_refused() -> None:
    with (
        compress(tiny("llava"), COMPRESSORS["fastv"]),
        pytest.raises(MMTokenError, match="already has a compressor"),
    ):
        attach(tiny("llava"), COMPRESSORS["divprune"])
