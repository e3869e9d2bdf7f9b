"""Decoders and towers by themselves: the plain model at keep=1.0, the masked one below, and drop-in outputs."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from mmtoken import attach, compress
from mmtoken.compressors import DivPrune, Downscale, FastV, PyramidDrop, Random, ToMe, UniformGrid, VisionZip
from mmtoken.compressors.base import Compressor
from mmtoken.errors import InputError, MMTokenError, UnsupportedError
from tests import oracle
from tests.backbones.tiny_models import build, config
from tests.engine.agreement import assert_close, left_in_layers

PRUNERS: dict[str, Compressor] = {
    "divprune": DivPrune(keep=0.4),
    "uniformgrid": UniformGrid(keep=0.4),
    "random": Random(keep=0.4),
    "fastv": FastV(keep=0.4),
    "pyramiddrop": PyramidDrop(keep=0.25),
}
KINDS: dict[str, Any] = {
    "llama": tf.LlamaForCausalLM,
    "llama-inner": tf.LlamaModel,
    "qwen2": tf.Qwen2ForCausalLM,
    "qwen2-inner": tf.Qwen2Model,
    "qwen3": tf.Qwen3ForCausalLM,
    "mistral": tf.MistralForCausalLM,
}
CAUSAL = [kind for kind in KINDS if not kind.endswith("-inner")]


@functools.cache
def decoder(kind: str, attn: str = "sdpa") -> Any:
    """A tiny decoder with weights of unit scale."""
    text = config("llama").to_dict()
    shape = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    settings = {name: text[name] for name in (*shape, "vocab_size", "pad_token_id")}
    more = {"mistral": {"sliding_window": None}, "qwen3": {"head_dim": 16}}.get(kind, {})
    cls = KINDS[kind]
    cfg = cls.config_class(**settings, **more, eos_token_id=None, bos_token_id=None)
    cfg._attn_implementation = attn
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(cfg).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim == 2 and "embed" not in name:
                    weight.normal_(0.0, weight.shape[1] ** -0.5)
                elif weight.ndim == 2:
                    weight.normal_(0.0, 1.0)
    return model


def prompt(padded: bool = True) -> tuple[dict[str, Tensor], Tensor]:
    """(inputs, visual): two rows with one and two runs of visual tokens, the first row padded on the left."""
    ids = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(3))
    mask, visual = torch.ones_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    visual[0, 6:18] = True
    visual[1, 2:8] = True
    visual[1, 10:20] = True
    if padded:
        mask[0, :4], ids[0, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}, visual


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_keeping_everything_is_the_plain_decoder(kind: str, attn: str) -> None:
    model = decoder(kind, attn)
    batch, visual = prompt()
    with torch.no_grad():
        plain = model(**batch)[0]
        for method in (DivPrune(keep=1.0), FastV(keep=1.0), PyramidDrop(keep=1.0)):
            with compress(model, method, visual=visual) as session:
                assert torch.equal(model(**batch)[0], plain)
            assert session.report.calls > 0
            assert session.report.tokens_out == [12, 6, 10]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("name", PRUNERS)
def test_a_decoder_generates_what_the_masked_one_does(kind: str, attn: str, name: str) -> None:
    model = decoder(kind, attn)
    for padded in (True, False):
        batch, visual = prompt(padded)
        with compress(model, PRUNERS[name], visual=visual) as session:
            got = oracle.generate_with_logits(model, batch, max_new_tokens=4)
        keep = left_in_layers(session.report, batch, 4)
        assert not all(bool(left.all()) for left in keep.values())
        with oracle.masked_keys(model, keep):
            want = oracle.generate_with_logits(model, batch, max_new_tokens=4)
        assert torch.equal(got.sequences, want.sequences)
        assert_close(got.logits, want.logits)


@pytest.mark.parametrize("kind", ["llama-inner", "qwen2-inner"])
@pytest.mark.parametrize("name", PRUNERS)
def test_an_inner_decoder_gives_the_masked_hidden_states(kind: str, name: str) -> None:
    model = decoder(kind)
    batch, visual = prompt()
    with torch.no_grad():
        with compress(model, PRUNERS[name], visual=visual) as session:
            got = model(**batch).last_hidden_state
        with oracle.masked_keys(model, left_in_layers(session.report, batch, 4)):
            want = model(**batch).last_hidden_state
    seen = batch["attention_mask"].bool() & left_in_layers(session.report, batch, 4)[3]
    assert got.shape == want.shape
    assert_close(got[seen], want[seen])


def test_beams_and_second_turns_of_a_decoder_follow_the_masked_one() -> None:
    model = decoder("llama")
    batch, visual = prompt()
    with compress(model, FastV(keep=0.4), visual=visual) as session:
        beams = oracle.generate_with_logits(model, batch, num_beams=3, max_new_tokens=4)
        turns = oracle.second_turn(model, batch, max_new_tokens=3)
    with oracle.masked_keys(model, left_in_layers(session.report, batch, 4)):
        assert torch.equal(beams.sequences, oracle.generate_with_logits(model, batch, num_beams=3,
                                                                        max_new_tokens=4).sequences)  # fmt: skip
        assert_close(turns.logits, oracle.second_turn(model, batch, max_new_tokens=3).logits)


def test_embeddings_may_be_handed_in_instead_of_ids() -> None:
    model = decoder("llama")
    batch, visual = prompt()
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with torch.no_grad(), compress(model, DivPrune(keep=0.4), visual=visual):
        want = model(**batch).logits
        got = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
    assert torch.equal(got, want)


def test_the_report_of_a_decoder_says_what_is_left() -> None:
    model = decoder("llama")
    batch, visual = prompt()
    with torch.no_grad(), compress(model, UniformGrid(keep=4), visual=visual) as session:
        model(**batch)
    report = session.report
    assert report.item_rows == [0, 1, 1]
    assert report.tokens_in == [12, 6, 10]
    assert report.tokens_out == [4, 4, 4]
    assert report.tokens is not None
    assert report.tokens.features.shape == (3, 4, 64)
    assert [places.tolist() for places in report.places][1] == list(range(2, 8))
    assert report.layer_lengths[0] == [20 - 8, 24 - 8]


# ------------------------------------------------------------------------------------------------------ refusals


def test_a_decoder_asks_for_visual() -> None:
    with pytest.raises(UnsupportedError, match=r"visual=bool\[B, L\]"):
        attach(decoder("llama"), DivPrune())


@pytest.mark.parametrize("method", [ToMe(), VisionZip()], ids=["tome", "visionzip"])
def test_tower_methods_need_a_tower(method: Compressor) -> None:
    with pytest.raises(UnsupportedError, match="bare decoder has none"):
        attach(decoder("llama"), method, visual=prompt()[1])


@pytest.mark.parametrize("visual", [torch.ones(1, 4), torch.ones(4, dtype=torch.bool)], ids=["float", "one axis"])
def test_visual_must_be_flags_per_row(visual: Tensor) -> None:
    with pytest.raises(InputError, match=r"expected bool\[B, L\]"):
        attach(decoder("llama"), DivPrune(), visual=visual)


def test_visual_must_fit_the_prompt() -> None:
    model = decoder("llama")
    batch, visual = prompt()
    with compress(model, DivPrune(), visual=visual[:, :-1]), pytest.raises(InputError, match="2 rows of 24 tokens"):
        model(**batch)
    assert oracle.hook_count(model) == 0


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop"])
@pytest.mark.parametrize("tower", ["clip_vision", "siglip_vision"])
def test_a_tower_cannot_host_cuts_in_a_decoder(tower: str, name: str) -> None:
    with pytest.raises(UnsupportedError, match="bare tower"):
        attach(build(tower), PRUNERS[name])


@pytest.mark.parametrize("kind", ["gemma", "gpt2"])
def test_other_decoders_are_refused_by_name(kind: str) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    cfg = tf.AutoConfig.for_model(kind, **small)
    with pytest.raises(UnsupportedError, match=f"model_type='{kind}' has no adapter"):
        attach(tf.AutoModelForCausalLM.from_config(cfg), DivPrune(), visual=prompt()[1])


def test_what_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="model is a Linear"):
        attach(nn.Linear(2, 2), DivPrune())  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------- towers

TOWERS = ("clip_vision", "siglip_vision")


def pictures(model: Any, count: int = 3) -> Tensor:
    size = model.config.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize(
    "method",
    [DivPrune(keep=1.0), Random(keep=1.0), UniformGrid(keep=1.0), VisionZip(keep=1.0), ToMe(keep=1.0)],
    ids=lambda method: type(method).__name__,
)
def test_keeping_everything_is_the_plain_tower(name: str, attn: str, method: Compressor) -> None:
    model = build(name, attn)
    pixels = pictures(model)
    with torch.no_grad():
        plain = model(pixels, output_hidden_states=True)
        with compress(model, method) as session:
            got = model(pixels, output_hidden_states=True)
    assert torch.equal(got.last_hidden_state, plain.last_hidden_state)
    assert all(torch.equal(a, b) for a, b in zip(got.hidden_states, plain.hidden_states, strict=True))
    assert session.report.calls > 0
    assert session.report.tokens_out == session.report.tokens_in


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize(
    "method",
    [DivPrune(keep=5), Random(keep=5), UniformGrid(keep=5), VisionZip(keep=5), ToMe(keep=5), Downscale(keep=5)],
    ids=lambda method: type(method).__name__,
)
def test_a_compressed_tower_is_a_drop_in_and_reports_what_is_left(name: str, method: Compressor) -> None:
    model = build(name)
    pixels = pictures(model)
    with torch.no_grad():
        plain = model(pixels, output_hidden_states=True)
        with compress(model, method) as session:
            got = model(pixels, output_hidden_states=True)
            again = model(pixel_values=pixels, return_dict=False)
    assert got.last_hidden_state.shape == plain.last_hidden_state.shape
    assert [s.shape for s in got.hidden_states] == [s.shape for s in plain.hidden_states]
    assert torch.equal(again[0], got.last_hidden_state)
    report = session.report
    total = (model.config.image_size // model.config.patch_size) ** 2
    assert report.tokens_in == [total] * 3
    assert all(0 < left <= 5 for left in report.tokens_out)
    assert method.budget == "at_most" or report.tokens_out == [5] * 3
    tokens = report.tokens
    assert tokens is not None
    assert tokens.features.shape == (3, report.tokens_out[0], 32)
    assert [k.tolist() for k in report.kept] == [
        s[v].tolist() for s, v in zip(tokens.source, tokens.valid, strict=True)
    ]
    assert len(session.reports) == 2
    if "vision_layer" not in method.sites:  # such methods change nothing in the tower itself
        assert torch.equal(got.last_hidden_state, plain.last_hidden_state)


@pytest.mark.parametrize("name", TOWERS)
def test_an_image_loses_the_same_tokens_alone_and_in_a_batch(name: str) -> None:
    model = build(name)
    pixels = pictures(model)
    for method in (DivPrune(keep=5), Random(keep=5), VisionZip(keep=5), ToMe(keep=5)):
        with torch.no_grad(), compress(model, method) as session:
            model(pixels)
            together = [kept.tolist() for kept in session.report.kept]
            for row, kept in enumerate(together):
                model(pixels[row : row + 1])
                assert session.report.kept[0].tolist() == kept


def test_a_tower_inside_a_model_can_be_compressed_by_itself() -> None:
    whole = build("llava")
    tower = whole.model.vision_tower
    with torch.no_grad(), compress(tower, ToMe(keep=5)) as session:
        tower(pictures(tower, 2))
    assert session.report.tokens_out == [5, 5]
    with pytest.raises(MMTokenError), compress(tower, ToMe(keep=5)), compress(whole, DivPrune()):
        pass
