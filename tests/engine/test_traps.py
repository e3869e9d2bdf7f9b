"""Ways in which a compressor could be silently wrong inside transformers: one regression test for each."""

from __future__ import annotations

import gc
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import cache_utils
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mmtoken
from mmtoken import compress
from mmtoken.compressors import DivPrune, FastV, PyramidDrop, Random, SparseVLM, ToMe, UniformGrid, VisionZip
from mmtoken.compressors.base import Compressor, Context
from mmtoken.engine import attention, gather
from mmtoken.engine.cache import LogicalDynamicLayer, make_logical
from mmtoken.errors import InputError, UnsupportedError
from mmtoken.tokens import VisualTokens
from tests import oracle
from tests.backbones.tiny_models import QWEN, build, inputs, special_ids, visual_mask
from tests.engine.agreement import BEFORE_DECODER, INSIDE_DECODER, assert_close, left_in_layers, tiny

CUTS: dict[str, Compressor] = {
    "divprune": DivPrune(keep=0.4),
    "fastv": FastV(keep=0.4),
    "pyramiddrop": PyramidDrop(keep=0.25),
}
cuts = pytest.mark.parametrize("name", CUTS)


def one_row(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """A row of a LLaVA batch by itself, without its padding."""
    real = batch["attention_mask"][row].bool()
    images = (batch["input_ids"] == special_ids("llava")["<image>"]).sum(-1) // 16
    first = int(images[:row].sum())
    return {
        "input_ids": batch["input_ids"][row : row + 1, real],
        "attention_mask": batch["attention_mask"][row : row + 1, real],
        "pixel_values": batch["pixel_values"][first : first + int(images[row])],
    }


def masked_reference(
    model: nn.Module, method: Compressor, batch: dict[str, Tensor], **call: Any
) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """(logits with the compressor, logits of the masked model, what layers saw) of one forward."""
    with torch.no_grad():
        with compress(model, method) as session:
            got = model(**{**oracle.clone(batch), **call}).logits
        keep = left_in_layers(session.report, batch, len(oracle.text_model(model).layers))
        with oracle.masked_keys(model, keep):
            want = model(**{**oracle.clone(batch), **call}).logits
    return got, want, keep


# ------------------------------------------------------------------------------------------------ masks and positions


@cuts
@pytest.mark.parametrize("family", ["llava", "llava_onevision", "idefics3"])
def test_gapped_positions_are_not_read_as_packed_sequences(family: str, name: str) -> None:
    """Packed-sequence detection: no cache, no mask, and position ids that jump."""
    model = tiny(family)
    batch = inputs(model, family, "image", "single")
    positions = torch.arange(batch["input_ids"].shape[1])[None]
    want = masked_reference(model, CUTS[name], batch, use_cache=False)[1]
    bare = {k: v for k, v in batch.items() if k != "attention_mask"}
    with torch.no_grad(), compress(model, CUTS[name]):
        for more in ({}, {"position_ids": positions}):
            got = model(**oracle.clone(bare), use_cache=False, **more).logits
            assert_close(got[:, -1], want[:, -1])


def test_the_tapped_attention_has_a_mask_of_its_own() -> None:
    """An attention name without a mask entry would get no mask at all, so padding would be seen."""
    model = tiny("llava")
    batch = inputs(model, "llava", "image", "padded_ragged")
    with compress(model, FastV(keep=0.4)):
        name = oracle.text_model(model).config._attn_implementation
        assert name == attention.TAPPED_SDPA
        assert name in ALL_ATTENTION_FUNCTIONS
        assert ALL_MASK_ATTENTION_FUNCTIONS[name] is ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
        together = oracle.generate_with_logits(model, batch, max_new_tokens=3)
        for row in range(3):
            alone = oracle.generate_with_logits(model, one_row(batch, row), max_new_tokens=3)
            assert_close(together.logits[row : row + 1], alone.logits)


@dataclass(frozen=True)
class Uneven(DivPrune):
    """Leaves 3, 5, 7, ... tokens of the items of a call."""

    def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        items, count = tokens.valid.shape
        return tokens.where(torch.arange(count) < 3 + 2 * torch.arange(items)[:, None])


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "method", [Uneven(keep=0.5), FastV(keep=0.4, layer=1), SparseVLM(keep=0.4)], ids=["uneven", "fastv", "sparsevlm"]
)
def test_no_mask_is_as_the_module_says(method: Compressor, attn: str) -> None:
    """Without types of tokens, sdpa and padding PaliGemma's prompt gets no mask, and sees itself both ways."""
    model = build("paligemma", attn)
    batch = inputs(model, "paligemma", "image", "plain")
    plain = {name: value for name, value in batch.items() if name != "token_type_ids"}
    with compress(model, method) as session:
        want = oracle.generate_with_logits(model, batch)
        report = session.report
        got = oracle.generate_with_logits(model, plain)
    if attn == "sdpa":
        assert [kept.tolist() for kept in session.report.kept] == [kept.tolist() for kept in report.kept]
        assert_close(got.logits, want.logits)
    else:  # eager attention gets a causal mask
        assert oracle.max_error(got.logits, want.logits) > 0.01


def _additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


MASKS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "2-D": lambda flat, square: flat,
    "2-D bool": lambda flat, square: flat.bool(),
    "4-D bool": lambda flat, square: square,
    "4-D additive": lambda flat, square: _additive(square),
    "per layer type": lambda flat, square: {"full_attention": square},
}


@cuts
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_masks_of_every_kind_mean_the_same(kind: str, name: str, use_cache: bool) -> None:
    """Callers hand in flat masks, square boolean or additive ones, or one per layer type."""
    decoder = oracle.text_model(tiny("qwen2"))
    batch = inputs(tiny("llava"), "llava", "image", "padded_ragged")
    flat, visual = batch["attention_mask"], visual_mask(tiny("llava"), batch)
    length = flat.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    square = causal & flat.bool()[:, None, None, :] | torch.eye(length, dtype=torch.bool)
    positions = (flat.cumsum(-1) - 1).clamp(min=0)
    call = {"input_ids": batch["input_ids"].clamp(max=300), "position_ids": positions, "use_cache": use_cache}
    with torch.no_grad(), compress(decoder, CUTS[name], visual=visual):
        want = decoder(**call, attention_mask=flat).last_hidden_state
        got = decoder(**call, attention_mask=MASKS[kind](flat, square)).last_hidden_state
    assert_close(got[flat.bool()], want[flat.bool()])


@cuts
def test_padding_shows_in_mixed_batches_although_generate_drops_full_masks(name: str) -> None:
    """generate passes no mask when nothing is padded, so only a mixed batch shows how padding is treated."""
    model = tiny("llava")
    batch = inputs(model, "llava", "image", "padded_ragged")
    with compress(model, CUTS[name]):
        together = oracle.generate_with_logits(model, batch)
        rows = [oracle.generate_with_logits(model, one_row(batch, row)) for row in range(3)]
    for row, alone in enumerate(rows):
        assert torch.equal(together.sequences[row, -8:], alone.sequences[0, -8:])
        assert_close(together.logits[row], alone.logits[0])


@cuts
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_no_row_of_a_mask_is_empty(name: str, attn: str, use_cache: bool) -> None:
    """A query that sees no key is NaN in some kernels, and NaN times zero poisons everybody's gradients."""
    model = build("llava", attn)
    batch = inputs(model, "llava", "image", "padded_ragged")
    seen: list[Tensor] = []

    def watch(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs["attention_mask"]
        seen.append(mask if mask.dtype == torch.bool else mask == 0)

    with compress(model, CUTS[name]):
        # registered last, so it sees what the layers get
        for layer in oracle.text_model(model).layers:
            layer.register_forward_pre_hook(watch, with_kwargs=True)
        for each in (batch, oracle.right_padded(batch)):
            out = model(**oracle.clone(each), labels=oracle.labels_for(model, each), use_cache=use_cache)
            assert torch.isfinite(out.logits).all()
            out.loss.backward()
    assert len(seen) == 8
    assert len({mask.shape[-1] for mask in seen}) == {"divprune": 1, "fastv": 2, "pyramiddrop": 4}[name]
    # the model's own masks, before a cut, leave padding without a key where transformers does
    assert all(bool(mask.any(-1).all()) for mask in seen if mask.shape[-1] < batch["input_ids"].shape[1])
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@cuts
@pytest.mark.parametrize("case", ["plain", "left_padded", "padded_ragged"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_static_caches_hide_entries_that_were_never_written(family: str, case: str, name: str) -> None:
    """A mask as wide as the uncompressed prompt would unmask zero keys behind the shortened one."""
    model = tiny(family)
    batch = inputs(model, family, "image", case)
    with compress(model, CUTS[name]):
        growing = oracle.generate_with_logits(model, batch, max_new_tokens=4)
        static = oracle.generate_with_logits(model, batch, max_new_tokens=4, cache_implementation="static")
    assert torch.equal(static.sequences, growing.sequences)
    assert_close(static.logits, growing.logits)


# --------------------------------------------------------------------------------------- what counts as visual


@pytest.mark.parametrize("family", ["llava", "idefics3", "qwen3_vl"])
@pytest.mark.parametrize("name", CUTS)
def test_without_pixels_a_placeholder_id_is_an_ordinary_token(family: str, name: str) -> None:
    """A model may generate the placeholder's id, and a question may hold it."""
    model = tiny(family)
    batch = inputs(model, family, "image", "single")
    text = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if family in QWEN:  # transformers itself looks for grids where token types say image
        text["mm_token_type_ids"] = torch.zeros_like(batch["mm_token_type_ids"])
    with torch.no_grad():
        plain = model(**oracle.clone(text)).logits
        with compress(model, CUTS[name]) as session:
            assert torch.equal(model(**oracle.clone(text)).logits, plain)
            assert session.reports == []


@cuts
def test_a_generated_placeholder_is_an_ordinary_token(name: str) -> None:
    model = build("llava")
    batch = inputs(model, "llava", "image", "left_padded")
    image = model.config.image_token_id
    with torch.no_grad():
        model.lm_head.weight[image] = model.lm_head.weight[104] * 3  # often the winner
    got_ids = oracle.generate_with_logits(model, batch)
    assert bool((got_ids.sequences[:, -8:] == image).any())
    with compress(model, CUTS[name]) as session:
        got = oracle.generate_with_logits(model, batch)
    assert bool((got.sequences[:, -8:-1] == image).any())
    assert len(session.reports) == 1
    with oracle.masked_keys(model, left_in_layers(session.report, batch, 4)):
        want = oracle.generate_with_logits(model, batch)
    assert torch.equal(got.sequences, want.sequences)
    assert_close(got.logits, want.logits)


@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_empty_encoder_outputs_are_no_images(family: str) -> None:
    """Some models are called with an empty dict of encoder outputs while decoding."""
    model = tiny(family)
    if "mm_encoder_outputs" not in inspect.signature(type(model.base_model).forward).parameters:
        pytest.skip("transformers takes no mm_encoder_outputs")
    ids = torch.tensor([[101, 102, model.config.image_token_id, 103]])
    with torch.no_grad(), compress(model, DivPrune()) as session:
        model(input_ids=ids, mm_encoder_outputs={})
    assert session.reports == []


def test_pixels_are_found_although_generate_encodes_them_before_the_forward() -> None:
    model = tiny("llava")
    batch = inputs(model, "llava", "image", "single")
    with compress(model, VisionZip(keep=5)) as session:
        model.generate(**oracle.clone(batch), max_new_tokens=1)
        with torch.no_grad():
            model(**oracle.clone(batch))
    generated, called = session.reports
    assert generated.tokens_out == called.tokens_out == [5]
    assert [k.tolist() for k in generated.kept] == [k.tolist() for k in called.kept]
    assert generated.vision_seconds > 0


@pytest.mark.parametrize("modality", ["image", "video"])
def test_newlines_of_onevision_stay_and_are_not_counted(modality: str) -> None:
    model = tiny("llava_onevision")
    batch = inputs(model, "llava_onevision", modality, "single")
    with torch.no_grad(), compress(model, DivPrune(keep=4)) as session:
        model(**oracle.clone(batch))
    tokens, report = session.report.tokens, session.report
    newlines = int(visual_mask(model, batch).sum()) - report.tokens_in[0]
    assert newlines == (1 if modality == "video" else 3)
    assert tokens is not None
    assert int(tokens.protected.sum()) == newlines
    steps = 4 if modality == "video" else 1
    assert report.tokens_out == [4 * steps]
    assert report.layer_lengths[0][0] == batch["input_ids"].shape[1] - report.tokens_in[0] + report.tokens_out[0]


@cuts
def test_timestamps_between_the_frames_of_a_video_stay(name: str) -> None:
    """Qwen3-VL writes text between frames, so a video is no run of placeholders."""
    model = tiny("qwen3_vl")
    batch = inputs(model, "qwen3_vl", "video", "single")
    got, want, keep = masked_reference(model, CUTS[name], batch)
    visual = visual_mask(model, batch)
    assert int((visual[:, 1:] & ~visual[:, :-1]).sum()) > 1
    assert all(bool(left[~visual].all()) for left in keep.values())
    assert_close(got[:, -1], want[:, -1])


# ------------------------------------------------------------------------------------------- selections and beams


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("name", [*BEFORE_DECODER, *INSIDE_DECODER])
def test_selections_depend_on_content_and_not_on_the_row(family: str, name: str) -> None:
    """Beams repeat rows: every copy, and every order of rows, must lose the same tokens."""
    if name == "downscale" and family in QWEN:
        with pytest.raises(UnsupportedError):
            mmtoken.attach(tiny(family), BEFORE_DECODER[name])
    else:
        model = tiny(family)
        batch = inputs(model, family, "image", "plain")
        pixels = batch["pixel_values"]
        flipped = {n: v.flip(0) for n, v in batch.items() if n != "pixel_values"}
        flipped["pixel_values"] = torch.cat(list(pixels.chunk(2))[::-1])
        with compress(model, (BEFORE_DECODER | INSIDE_DECODER)[name]) as session:
            model.generate(**oracle.clone(batch), max_new_tokens=2, num_beams=3)
            beams = [kept.tolist() for kept in session.report.kept]
            with torch.no_grad():
                model(**oracle.clone(batch))
                once = [kept.tolist() for kept in session.report.kept]
                model(**flipped)
                turned = [kept.tolist() for kept in session.report.kept]
        assert beams in (once, [kept for kept in once for _ in range(3)])
        assert turned == once[::-1]


def test_a_random_draw_leaves_the_global_generators_alone() -> None:
    model = tiny("llava")
    batch = inputs(model, "llava", "image", "single")
    state = torch.get_rng_state()
    with torch.no_grad(), compress(model, Random(keep=5)):
        model(**batch)
    assert torch.equal(torch.get_rng_state(), state)


# --------------------------------------------------------------------------------------------------------- caches


def test_logical_layers_are_registered_nowhere() -> None:
    """A cache layer with a layer type would replace transformers' own class for every model of the process."""
    before = {name: dict(getattr(cache_utils, name)) for name in
              ("DYNAMIC_LAYER_TYPE_MAPPING", "STATIC_LAYER_TYPE_MAPPING")}  # fmt: skip
    cache = DynamicCache(config=oracle.text_model(tiny("llava")).config)
    kind = type(cache.layers[0])
    make_logical(cache)
    assert isinstance(cache.layers[0], LogicalDynamicLayer)
    assert {name: dict(getattr(cache_utils, name)) for name in before} == before
    other = DynamicCache(config=oracle.text_model(tiny("llava")).config)
    assert type(other.layers[0]) is kind
    assert not any("mmtoken" in value.__module__ for mapping in before.values() for value in mapping.values())


@cuts
@pytest.mark.parametrize("kind", ["none", "empty", "with config", "static"])
def test_every_way_to_get_a_cache_gives_the_same(kind: str, name: str) -> None:
    """The decoder makes its cache itself, or layers appear when they are first used, or the caller brings one."""
    model = tiny("llava")
    batch = inputs(model, "llava", "image", "padded_ragged")
    config = model.config.get_text_config()
    caches: dict[str, Callable[[], Any]] = {
        "none": lambda: None,
        "empty": DynamicCache,
        "with config": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config=config, max_cache_len=80),
    }
    given = caches[kind]()
    with torch.no_grad(), compress(model, CUTS[name]) as session:
        out = model(**oracle.clone(batch), use_cache=True, **({} if given is None else {oracle.CACHE: given}))
        cache = out[oracle.CACHE]
        mask = nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
        step = model(input_ids=torch.tensor([[101], [102], [103]]), attention_mask=mask, **{oracle.CACHE: cache})
    assert given is None or cache is given
    assert int(cache.get_seq_length()) == batch["input_ids"].shape[1] + 1
    keep = left_in_layers(session.report, batch, 4)
    whole = {**batch, "attention_mask": mask}
    whole["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([[101], [102], [103]])], 1)
    with torch.no_grad(), oracle.masked_keys(model, keep):
        want = model(**whole, use_cache=False).logits
    assert_close(out.logits[:, -1], want[:, -2])
    assert_close(step.logits[:, -1], want[:, -1])


@cuts
def test_a_cache_made_while_attached_works_after_detaching_or_is_the_same_length(name: str) -> None:
    """The layers of a cache outlive the session: their length stays the number of tokens seen."""
    model = tiny("llava")
    batch = inputs(model, "llava", "image", "single")
    with torch.no_grad(), compress(model, CUTS[name]):
        cache = model(**oracle.clone(batch), use_cache=True)[oracle.CACHE]
    assert int(cache.get_seq_length()) == batch["input_ids"].shape[1]


def test_cropping_takes_back_generated_tokens_only() -> None:
    """Versions differ in what `crop` takes: the number to remove as a negative number, or the length to keep."""
    model = tiny("llava")
    batch = inputs(model, "llava", "image", "single")
    length = batch["input_ids"].shape[1]
    with torch.no_grad(), compress(model, DivPrune(keep=4)):
        cache = model(**oracle.clone(batch), use_cache=True)[oracle.CACHE]
        more = torch.tensor([[101, 102, 103]])
        first = model(input_ids=more, **{oracle.CACHE: cache}).logits
        for amount in (-3, length):
            for layer in cache.layers:
                layer.crop(amount)
            assert int(cache.get_seq_length()) == length
            again = model(input_ids=more, **{oracle.CACHE: cache}).logits
            assert_close(again, first)
        with pytest.raises(UnsupportedError, match="reaches into compressed ones"):
            cache.layers[0].crop(-20)


# ------------------------------------------------------------------------------------------------ state of the model


@pytest.mark.parametrize("family", QWEN)
@cuts
def test_rope_deltas_of_an_earlier_call_do_not_matter(family: str, name: str) -> None:
    """Qwen keeps the offset of its last prompt on the model."""
    model = build(family)
    small, large = (inputs(model, family, "image", case) for case in ("single", "ragged"))
    with compress(model, CUTS[name]):
        fresh = oracle.generate_with_logits(model, small)
        oracle.generate_with_logits(model, large)
        again = oracle.generate_with_logits(model, small)
    assert torch.equal(again.logits, fresh.logits)
    plain = oracle.generate_with_logits(build(family), large)
    assert torch.equal(oracle.generate_with_logits(model, large).logits, plain.logits)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_hidden_states_and_attentions_have_the_lengths_of_their_layers(family: str) -> None:
    model = tiny(family, "eager")
    batch = inputs(model, family, "image", "single")
    with torch.no_grad(), compress(model, FastV(keep=5)) as session:
        out = model(**oracle.clone(batch), output_hidden_states=True, output_attentions=True)
    lengths = [n for (n,) in session.report.layer_lengths]
    length = batch["input_ids"].shape[1]
    dropped = session.report.tokens_in[0] - 5
    assert lengths == [length, length, length - dropped, length - dropped]
    assert [a.shape[-1] for a in out.attentions] == lengths
    assert [s.shape[1] for s in out.hidden_states[:3]] == [*lengths[:2], length]
    assert out.hidden_states[3].shape[1] == length - dropped
    assert out.logits.shape[1] == length


def test_the_memo_of_a_cut_keeps_the_objects_that_it_knows_by_id() -> None:
    """Ids of temporaries are used again: an entry must hold its object."""
    model = tiny("llava")
    memos = []

    @dataclass(frozen=True)
    class Watch(PyramidDrop):
        def llm_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
            gc.collect()
            memos.append(ctx.call.cut.memo)  # type: ignore[attr-defined]
            return PyramidDrop.llm_layer(self, tokens, layer, ctx)

    batch = inputs(model, "llava", "image", "padded_ragged")
    got, want, _ = masked_reference(model, Watch(keep=0.25), batch)
    entries = [(key, value) for memo in memos for key, value in memo.items()]
    assert len(entries) > 1
    assert all(key[: len(held)] == tuple(map(id, held)) for key, (held, _) in entries)
    assert_close(got[:, -1], want[:, -1])


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_deepstack_features_go_to_the_tokens_that_are_left(layer: int) -> None:
    """Qwen3-VL adds features between layers, for as many visual tokens as there were."""
    model = tiny("qwen3_vl")
    for case in ("plain", "padded_ragged", "multi_image"):
        got, want, _ = masked_reference(model, FastV(keep=0.4, layer=layer), inputs(model, "qwen3_vl", "image", case))
        assert_close(got[:, -1], want[:, -1])


# ------------------------------------------------------------------------------------------------------ the source


def test_indices_are_checked() -> None:
    """`torch.take_along_dim` does not check bounds on a CPU; `gather` does."""
    sources = Path(mmtoken.__file__).parent.rglob("*.py")
    assert not [path.name for path in sources if re.search(r"\btake_along_dim\(", path.read_text())]
    states, beyond = torch.zeros(1, 5, 2), torch.tensor([[0, 7]])
    for pick in (gather.rows, lambda t, i: gather.last(t[..., 0], i)):
        with pytest.raises((RuntimeError, IndexError), match=r"out of.* bounds"):
            pick(states, beyond)


def test_the_engine_needs_no_modelling_file() -> None:
    """Hooks sit at public boundaries; no copied forward, no import of private modelling names."""
    sources = [p for part in ("engine", "backbones", "compressors") for p in
               (Path(mmtoken.__file__).parent / part).glob("*.py")]  # fmt: skip
    assert sources
    assert not [p.name for p in sources if re.search(r"transformers\.models|modeling_\w+_\w+", p.read_text())]


def test_methods_that_read_the_tower_say_so_when_it_was_not_watched() -> None:
    """Features encoded before attaching carry no attention: an error, not a guess."""
    model = tiny("llava")
    if "mm_encoder_outputs" not in inspect.signature(type(model.base_model).forward).parameters:
        pytest.skip("transformers takes no mm_encoder_outputs")
    batch = inputs(model, "llava", "image", "single")
    with torch.no_grad():
        features = model.base_model.get_image_features(batch["pixel_values"], return_dict=True)
        call = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        for method in (VisionZip(keep=4), ToMe(keep=4)):
            with compress(model, method), pytest.raises(UnsupportedError, match="encoded outside the attached model"):
                model(**call, mm_encoder_outputs={"image": features})
        with compress(model, UniformGrid(keep=4)) as session:
            model(**call, mm_encoder_outputs={"image": features})
    assert session.report.tokens_out == [4]


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "smolvlm"])
@pytest.mark.parametrize("generating", [False, True])
def test_placeholders_that_do_not_fit_are_named_before_the_model_stumbles(family: str, generating: bool) -> None:
    """transformers counts numbers instead of features in its own message, and checks after encoding only."""
    model = tiny(family)
    batch = inputs(model, family, "image", "single")
    ids = batch["input_ids"]
    first = int((ids[0] == model.config.image_token_id).nonzero()[0, 0])
    for field in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if field in batch:
            batch[field] = torch.cat([batch[field][:, :first], batch[field][:, first + 1 :]], 1)
    # Qwen prepares positions for generation from grids and ids, before anything of ours runs.
    kind, words = (RuntimeError, "shape") if generating and family in QWEN else (InputError, "placeholder per feature")
    with compress(model, DivPrune(keep=0.5)), pytest.raises(kind, match=words), torch.no_grad():
        if generating:
            model.generate(**batch, max_new_tokens=2)
        else:
            model(**batch)
    assert oracle.hook_count(model) == 0
