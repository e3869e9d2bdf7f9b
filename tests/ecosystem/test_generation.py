"""transformers' own ways to run a model, inside compress()."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from mmtoken import attached, compress
from mmtoken.compressors import DivPrune, FastV, SnapKV, ToMe, VisionZip
from mmtoken.compressors.base import Compressor
from tests import oracle
from tests.backbones.processors import conversation, photograph, processor
from tests.backbones.tiny_models import build, inputs
from tests.engine.agreement import assert_close, tiny
from tests.engine.test_session import leaves_nothing

QUESTION = "What is shown in the image?"


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_pipeline_answers_what_generate_answers(family: str, batch_size: int, tmp_path: Path) -> None:
    model, parts = tiny(family), processor(family, tmp_path)
    talks = [conversation(QUESTION, photograph(0)), conversation("How many cats are there?", photograph(1))]
    pipe = tf.pipeline("image-text-to-text", model=model, processor=parts)
    how = {"max_new_tokens": 6, "do_sample": False}
    wanted, plain = [], []
    for talk in talks:
        given = parts.apply_chat_template(
            talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        length = given["input_ids"].shape[1]
        for answers, method in ((wanted, FastV(keep=0.3, layer=1)), (plain, FastV(keep=1.0))):
            with compress(model, method):
                out = model.generate(**given, **how)
            answers.append(parts.batch_decode(out[:, length:], skip_special_tokens=True)[0])
    assert wanted != plain
    with leaves_nothing(model), compress(model, FastV(keep=0.3, layer=1)) as session:
        found = pipe(text=talks, generate_kwargs=how, return_full_text=False, batch_size=batch_size)
    assert [answer[0]["generated_text"] if isinstance(answer, list) else answer["generated_text"]
            for answer in found] == wanted  # fmt: skip
    assert len(session.reports) == 2 // batch_size


@pytest.mark.parametrize("method", [DivPrune(keep=0.4), FastV(keep=0.4)], ids=lambda m: type(m).__name__)
def test_a_streamer_in_another_thread_gets_the_same_text(method: Compressor, tmp_path: Path) -> None:
    model, parts = tiny("llava"), processor("llava", tmp_path)
    batch = inputs(model, "llava", "image", "single")
    streamer = tf.TextIteratorStreamer(parts.tokenizer, skip_prompt=True, timeout=60)
    with compress(model, method) as session:
        length = batch["input_ids"].shape[1]
        wanted = model.generate(**oracle.clone(batch), max_new_tokens=6, do_sample=False)[0, length:]
        arguments = {**oracle.clone(batch), "streamer": streamer, "max_new_tokens": 6, "do_sample": False}
        thread = threading.Thread(target=model.generate, kwargs=arguments)
        thread.start()
        pieces = list(streamer)
        thread.join()
        assert len(session.reports) == 2
        assert session.reports[1].kept[0].tolist() == session.reports[0].kept[0].tolist()
    assert len(pieces) > 1
    assert "".join(pieces) == parts.tokenizer.decode(wanted)


# ------------------------------------------------------------------------------------------------ bfloat16

METHODS: dict[str, Compressor] = {
    "fastv": FastV(keep=0.4),
    "visionzip": VisionZip(keep=0.4),
    "tome": ToMe(keep=0.6),
    "snapkv": SnapKV(keep=0.4, window=2),
}
FULL: dict[str, Compressor] = {"fastv": FastV(keep=1.0), "divprune": DivPrune(keep=1.0)}


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "smolvlm"])
@pytest.mark.parametrize("name", FULL)
def test_keeping_everything_in_bfloat16_is_the_plain_model(family: str, name: str) -> None:
    model = build(family, dtype=torch.bfloat16)
    batch = in_bfloat16(inputs(model, family, "image", "padded_ragged"))
    plain = oracle.generate_with_logits(model, batch, max_new_tokens=3)
    with compress(model, FULL[name]):
        got = oracle.generate_with_logits(model, batch, max_new_tokens=3)
    assert got.logits.dtype == plain.logits.dtype
    assert torch.equal(got.logits, plain.logits)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("name", METHODS)
def test_scores_in_bfloat16_are_float32_and_near_those_of_float32(family: str, name: str) -> None:
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        model = build(family, dtype=dtype)
        batch = inputs(model, family, "image", "padded_ragged")
        with compress(model, METHODS[name]) as session:
            out = oracle.generate_with_logits(model, in_bfloat16(batch) if dtype == torch.bfloat16 else batch)
        assert bool(out.logits.isfinite().all())
        found.append(session.report)
    coarse, fine = found
    assert coarse.tokens_out == fine.tokens_out
    compared = 0
    for site, wanted in zip(coarse.sites, fine.sites, strict=True):
        for got, want in zip(site.scores or [], wanted.scores or [], strict=True):
            compared += 1
            assert got.dtype == torch.float32
            # bfloat16 has 8 bits; a few layers of it
            assert oracle.max_error(got, want) <= 0.1 * float(want.abs().max())
    assert bool(compared) == (name in ("fastv", "visionzip"))  # the reports of the others hold no scores


def in_bfloat16(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.bfloat16() if value.is_floating_point() else value for name, value in batch.items()}


# ------------------------------------------------------------------------------------------------ eight bits


class Int8Linear(nn.Module):
    """A linear layer with one byte per weight and a scale per row, as quantisation packages put in its place."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def quantised(model: nn.Module, change: Any) -> nn.Module:
    """The model with every linear layer but its head replaced."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and name != "lm_head":
                setattr(module, name, change(child))
    return model


def rounded(linear: nn.Linear) -> nn.Linear:
    """A linear layer whose weights are the ones that `Int8Linear` multiplies by."""
    copy = Int8Linear(linear)
    with torch.no_grad():
        linear.weight.copy_(copy.weight.float() * copy.scale)
    return linear


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("name", METHODS)
def test_linear_layers_of_eight_bits_give_what_their_rounded_weights_give(family: str, name: str, attn: str) -> None:
    """Nothing may read the weights of a linear layer instead of calling it."""
    eight, wanted = quantised(build(family, attn), Int8Linear), quantised(build(family, attn), rounded)
    batch = inputs(eight, family, "image", "padded_ragged")
    found = []
    for model in (eight, wanted):
        with leaves_nothing(model), compress(model, METHODS[name]) as session:
            found.append((oracle.generate_with_logits(model, batch, max_new_tokens=3), session.report.kept))
    (got, kept), (want, kept_by_rounded) = found
    assert [k.tolist() for k in kept] == [k.tolist() for k in kept_by_rounded]
    assert_close(got.logits, want.logits)


@pytest.mark.filterwarnings("ignore")  # it is deprecated in favour of a package of its own
def test_dynamic_quantisation_of_torch() -> None:
    model = build("llava")
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    batch = inputs(model, "llava", "image", "padded_ragged")
    plain = oracle.generate_with_logits(model, batch, max_new_tokens=3)
    with compress(model, FastV(keep=1.0)):
        assert torch.equal(oracle.generate_with_logits(model, batch, max_new_tokens=3).logits, plain.logits)
    with compress(model, FastV(keep=0.4)) as session:
        oracle.generate_with_logits(model, batch, max_new_tokens=3)
    assert session.report.tokens_out[0] < session.report.tokens_in[0]
    assert attached(model) is None
