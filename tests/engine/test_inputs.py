"""Shortened inputs give what the compressor gives when it is attached, without hooks and under torch.compile."""

from __future__ import annotations

import dataclasses
import inspect
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from mmtoken import compress, compress_inputs
from mmtoken.compressors import DivPrune, FastV, PyramidDrop, UniformGrid
from mmtoken.compressors.base import Compressor, Context, Positions
from mmtoken.engine import inputs as inputs_module
from mmtoken.engine.report import Report
from mmtoken.errors import InputError, MMTokenError, UnsupportedError
from mmtoken.tokens import VisualTokens
from tests import oracle
from tests.backbones.tiny_models import CELLS, QWEN, build, inputs, visual_mask
from tests.engine.agreement import BATCHES, BEFORE_DECODER, assert_close, cells, hosts, tiny

TAKES_FEATURES = "mm_encoder_outputs" in inspect.signature(tf.LlavaModel.forward).parameters
"""Whether this version of transformers takes encoded images; 5.17 does not."""

needs_features = pytest.mark.skipif(not TAKES_FEATURES, reason="transformers takes no mm_encoder_outputs")

PAIRS = [(family, modality, name) for family, modality in CELLS for name in hosts(family)]
pairs = pytest.mark.parametrize(
    ("family", "modality", "name"), PAIRS, ids=[f"{family}-{modality}-{name}" for family, modality, name in PAIRS]
)


def reading(family: str) -> str:
    """A method that merges and reads the tower, or another one where the tower cannot be read."""
    return "visionzip" if "visionzip" in hosts(family) else "divprune"


def assert_paths_agree(model: nn.Module, method: Compressor, batch: dict[str, Tensor], **options: Any) -> None:
    """generate with the compressor attached equals generate on shortened inputs: tokens and logits."""
    options = {"max_new_tokens": 3, **options}
    with compress(model, method) as session:
        want = oracle.generate_with_logits(model, batch, **options)
    short = compress_inputs(model, method, batch)
    got = oracle.generate_with_logits(model, short, **options)
    new = options["max_new_tokens"]
    assert torch.equal(got.sequences[:, -new:], want.sequences[:, -new:])
    assert_close(got.logits, want.logits)
    copies = options.get("num_beams", 1)
    assert placeholders(model, short) == placeholders(model, batch) - dropped(session.report, copies)


def placeholders(model: nn.Module, batch: dict[str, Tensor]) -> Counter[int]:
    """Visible visual tokens per row."""
    shown = visual_mask(model, batch) & batch["attention_mask"].bool()
    return Counter(shown.nonzero()[:, 0].tolist())


def dropped(report: Report, copies: int) -> Counter[int]:
    """Dropped visual tokens per row of a prompt whose rows were repeated `copies` times for beams."""
    gone: Counter[int] = Counter()
    for row, before, after in zip(report.item_rows, report.tokens_in, report.tokens_out, strict=True):
        if row % copies == 0:
            gone[row // copies] += before - after
    return gone


@needs_features
@pairs
@pytest.mark.parametrize("case", BATCHES)
def test_generate_on_short_inputs_equals_the_attached_compressor(
    family: str, modality: str, name: str, case: str
) -> None:
    model = tiny(family)
    assert_paths_agree(model, BEFORE_DECODER[name], inputs(model, family, modality, case))


@needs_features
@cells
@pytest.mark.parametrize("case", ["ragged", "padded_ragged", "multi_image"])
def test_renumbered_positions_travel_along(family: str, modality: str, case: str) -> None:
    model = tiny(family)
    method = DivPrune(keep=0.4, positions="renumber")
    batch = inputs(model, family, modality, case)
    assert_paths_agree(model, method, batch)
    kept = compress_inputs(model, DivPrune(keep=0.4), batch)
    moved = compress_inputs(model, method, batch)
    assert torch.equal(kept["input_ids"], moved["input_ids"])
    assert int(moved["position_ids"].max()) < int(kept["position_ids"].max())


@needs_features
@pytest.mark.contract_full
@pairs
@pytest.mark.parametrize("case", BATCHES)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_renumbered_positions_travel_along_everywhere(
    family: str, modality: str, name: str, case: str, attn: str
) -> None:
    model = tiny(family, attn)
    method = dataclasses.replace(BEFORE_DECODER[name], positions="renumber")
    assert_paths_agree(model, method, inputs(model, family, modality, case))


MODES: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "returned-beams": {"num_beams": 3, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
    "sampling": {"do_sample": True},
    "no-cache": {"use_cache": False},
}


@needs_features
@cells
@pytest.mark.parametrize("mode", ["beams", "static"])
def test_beams_and_static_caches_take_short_inputs(family: str, modality: str, mode: str) -> None:
    model = tiny(family)
    batch = inputs(model, family, modality, "padded_ragged")
    assert_paths_agree(model, BEFORE_DECODER[reading(family)], batch, **MODES[mode])


@dataclass(frozen=True)
class Bright(Compressor):
    """Keeps the first token and those with one feature above another: as many as the content says."""

    keep: float = 1.0
    positions: Positions = "keep"

    def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        wanted = tokens.features[..., 3] > tokens.features[..., 4]
        wanted[:, 0] = True
        return tokens.where(wanted | tokens.protected)


@needs_features
@cells
@pytest.mark.parametrize(
    "mode",
    [
        "greedy",
        "beams",
        pytest.param("returned-beams", marks=pytest.mark.contract_full),
        pytest.param("static", marks=pytest.mark.contract_full),
    ],
)
def test_counts_may_depend_on_the_content(family: str, modality: str, mode: str) -> None:
    model = tiny(family)
    for case in ("plain", "padded_ragged"):
        batch = inputs(model, family, modality, case)
        assert_paths_agree(model, Bright(), batch, **MODES.get(mode, {}))
        with compress(model, Bright()) as session, torch.no_grad():
            model(**batch)
        assert len(set(session.report.tokens_out)) > 1


@needs_features
@pytest.mark.contract_full
@pairs
@pytest.mark.parametrize("case", BATCHES)
@pytest.mark.parametrize("mode", MODES)
def test_every_decoding_mode_takes_short_inputs(family: str, modality: str, name: str, case: str, mode: str) -> None:
    model, method = tiny(family), BEFORE_DECODER[name]
    batch = inputs(model, family, modality, case)
    options = MODES[mode]
    if mode == "no-cache":
        # Every step reads the pixels again: a generated placeholder would be one too many, compressed or not.
        kinds = [getattr(model.config, f"{kind}_token_id", None) for kind in ("image", "video")]
        options = {**options, "suppress_tokens": [token for token in kinds if token is not None]}
        if bool(compress_inputs(model, method, batch)["attention_mask"].all()):
            # Without padding transformers takes gaps in the positions for packed sequences, see compress_inputs.
            method = dataclasses.replace(method, positions="renumber")  # type: ignore[type-var]
    assert_paths_agree(model, method, batch, **options)


@needs_features
@cells
def test_keeping_everything_is_the_plain_model(family: str, modality: str) -> None:
    model = tiny(family)
    for case in ("plain", "padded_ragged"):
        batch = inputs(model, family, modality, case)
        plain = oracle.generate_with_logits(model, batch, max_new_tokens=3)
        short = compress_inputs(model, DivPrune(keep=1.0), batch)
        assert torch.equal(short["input_ids"], batch["input_ids"])
        got = oracle.generate_with_logits(model, short, max_new_tokens=3)
        assert torch.equal(got.sequences, plain.sequences)
        assert torch.equal(got.logits, plain.logits)


@needs_features
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_forward_on_short_inputs_gives_the_logits_of_what_is_left(family: str) -> None:
    model = tiny(family)
    batch = inputs(model, family, "image", "padded_ragged")
    short = compress_inputs(model, UniformGrid(keep=0.4), batch)
    with torch.no_grad():
        got = model(**short).logits
        with compress(model, UniformGrid(keep=0.4)):
            want = model(**oracle.clone(batch)).logits
    for row in range(len(got)):
        text = (~visual_mask(model, batch) & batch["attention_mask"].bool())[row]
        short_text = (~visual_mask(model, short) & short["attention_mask"].bool())[row]
        assert_close(got[row][short_text], want[row][text])


@needs_features
@pytest.mark.parametrize("family", ["llava_onevision", "qwen3_vl", "idefics3"])
def test_the_given_inputs_stay_as_they_are(family: str) -> None:
    model = tiny(family)
    batch = inputs(model, family, "image", "padded_ragged")
    copied, versions = oracle.clone(batch), {name: value._version for name, value in batch.items()}
    compress_inputs(model, DivPrune(keep=0.3), batch)
    assert batch.keys() == copied.keys()
    assert all(torch.equal(batch[name], value) for name, value in copied.items())
    assert {name: value._version for name, value in batch.items()} == versions


@needs_features
@pytest.mark.parametrize("kind", [tf.BatchFeature, tf.BatchEncoding])
def test_what_processors_return_is_taken_as_it_is(kind: type) -> None:
    model = tiny("llava")
    batch = inputs(model, "llava", "image", "left_padded")
    want = compress_inputs(model, DivPrune(keep=0.3), batch)
    got = compress_inputs(model, DivPrune(keep=0.3), kind(batch))
    assert got.keys() == want.keys()
    assert torch.equal(got["input_ids"], want["input_ids"])
    assert torch.equal(got["position_ids"], want["position_ids"])


@needs_features
@cells
def test_a_missing_attention_mask_means_no_padding(family: str, modality: str) -> None:
    model = tiny(family)
    batch = inputs(model, family, modality, "single")
    want = compress_inputs(model, DivPrune(keep=0.4), batch)
    del batch["attention_mask"]
    got = compress_inputs(model, DivPrune(keep=0.4), batch)
    assert torch.equal(got["position_ids"], want["position_ids"])
    assert torch.equal(got["attention_mask"], want["attention_mask"])


@needs_features
def test_a_name_or_a_dict_will_do_for_the_compressor() -> None:
    model = tiny("llava")
    batch = inputs(model, "llava", "image", "single")
    want = compress_inputs(model, DivPrune(keep=4), batch)
    spec = {"class_path": "mmtoken.compressors.DivPrune", "init_args": {"keep": 4}}
    got = compress_inputs(model, spec, batch)
    assert torch.equal(got["position_ids"], want["position_ids"])


@needs_features
@cells
def test_nothing_is_left_on_the_model(family: str, modality: str) -> None:
    model = tiny(family)
    before = oracle.fingerprint(model)
    compress_inputs(model, BEFORE_DECODER[reading(family)], inputs(model, family, modality, "plain"))
    assert oracle.fingerprint_changes(before, oracle.fingerprint(model)) == []


# ------------------------------------------------------------------------------------------------------- compile


def compiled_equals_eager(family: str, modality: str, name: str, case: str, backend: str) -> None:
    model = tiny(family)
    short = compress_inputs(model, BEFORE_DECODER[name], inputs(model, family, modality, case))
    torch._dynamo.reset()
    with torch.no_grad():
        want = model(**short).logits
        got = torch.compile(model, fullgraph=True, backend=backend)(**short).logits
    assert_close(got, want)


@needs_features
@pytest.mark.parametrize(
    ("family", "modality", "case"),
    [("llava", "image", "padded_ragged"), ("qwen3_vl", "image", "ragged"), ("qwen2_5_vl", "video", "plain")],
)
def test_short_inputs_compile_in_one_graph(family: str, modality: str, case: str) -> None:
    compiled_equals_eager(family, modality, "divprune", case, "aot_eager")


@needs_features
@pytest.mark.contract_full
@cells
@pytest.mark.parametrize("case", ["plain", "padded_ragged", "multi_image"])
def test_short_inputs_compile_in_one_graph_everywhere(family: str, modality: str, case: str) -> None:
    compiled_equals_eager(family, modality, reading(family), case, "eager")


@needs_features
def test_inductor_compiles_short_inputs() -> None:
    compiled_equals_eager("llava", "image", "divprune", "plain", "inductor")


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("method", [FastV(keep=0.5), PyramidDrop(keep=0.5)], ids=["fastv", "pyramiddrop"])
def test_cuts_inside_the_decoder_have_no_short_prompt(method: Compressor) -> None:
    model = tiny("llava")
    before = oracle.fingerprint(model)
    with pytest.raises(UnsupportedError, match="between decoder layers"):
        compress_inputs(model, method, inputs(model, "llava", "image", "plain"))
    allowed = ("registry.attention.mmtoken_", "registry.mask.mmtoken_")
    assert oracle.fingerprint_changes(before, oracle.fingerprint(model), allow=allowed) == []


@needs_features
@pytest.mark.parametrize("missing", ["pixel_values", "input_ids"])
def test_pixels_and_ids_are_asked_for(missing: str) -> None:
    model = tiny("llava")
    batch = inputs(model, "llava", "image", "plain")
    del batch[missing]
    with pytest.raises(InputError, match=missing):
        compress_inputs(model, DivPrune(keep=0.5), batch)
    assert oracle.hook_count(model) == 0


@needs_features
def test_more_placeholders_than_features_are_named() -> None:
    model = tiny("llava")
    batch = inputs(model, "llava", "image", "plain")
    batch["pixel_values"] = batch["pixel_values"][:1]
    with pytest.raises(InputError, match=r"32 image tokens .* 16 features"):
        compress_inputs(model, DivPrune(keep=0.5), batch)


@pytest.mark.parametrize("name", ["llama", "clip_vision"])
def test_models_that_encode_no_images_into_text_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match="compress_inputs needs a model that encodes images into a prompt"):
        compress_inputs(build(name), DivPrune(keep=0.5), {"input_ids": torch.zeros(1, 4, dtype=torch.long)})


@needs_features
@pytest.mark.parametrize("family", QWEN)
def test_downscaling_dynamic_resolution_is_sent_to_the_processor(family: str) -> None:
    model = tiny(family)
    with pytest.raises(UnsupportedError, match=r"compressor\.prepare"):
        compress_inputs(model, BEFORE_DECODER["downscale"], inputs(model, family, "image", "plain"))


@needs_features
def test_an_attached_model_is_refused() -> None:
    model = build("llava")
    with compress(model, DivPrune(keep=0.5)), pytest.raises(MMTokenError, match="already has a compressor"):
        compress_inputs(model, DivPrune(keep=0.5), inputs(model, "llava", "image", "plain"))


def test_versions_without_encoded_images_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llava")
    if TAKES_FEATURES:
        monkeypatch.setattr(inputs_module, "takes_encoded_images", lambda root: False)
    with pytest.raises(UnsupportedError, match="takes no mm_encoder_outputs"):
        compress_inputs(model, DivPrune(keep=0.5), inputs(model, "llava", "image", "plain"))
