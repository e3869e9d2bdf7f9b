"""The text of the prompt is known before anything is encoded, for every tile, frame and item."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from mmtoken import VisualTokens, attach, check, compress, compress_inputs
from mmtoken.compressors import Compressor, Context
from mmtoken.compressors.base import Need, Positions
from mmtoken.errors import InputError, UnsupportedError
from tests import oracle
from tests.backbones.tiny_models import CELLS, OPAQUE, inputs, visual_mask
from tests.contract.reference import alone
from tests.engine.agreement import tiny

Seen = list[tuple[str, Tensor, Tensor]]
SEEN: Seen = []
"""(site, prompt embeddings, question states) of every row of tokens, in the order in which they were asked for."""

# The reader acts inside the tower, which OpenVLA and opaque towers refuse.
cells = pytest.mark.parametrize("cell", [cell for cell in CELLS if cell[0] not in ("openvla", *OPAQUE)], ids="-".join)


@dataclass(frozen=True)
class Reader(Compressor):
    """Keeps everything and notes what it is told of the prompt at three sites."""

    keep: int | float = 1.0
    positions: Positions = "keep"

    title: ClassVar[str] = "Reader"
    paper: ClassVar[str] = "none"
    year: ClassVar[int] = 2026
    needs: ClassVar[frozenset[Need]] = frozenset({"prompt"})
    query_agnostic: ClassVar[bool] = False

    def _note(self, site: str, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        SEEN.append((site, ctx.prompt_embedding(tokens), ctx.question_state(tokens)))
        assert len(SEEN[-1][1]) == len(SEEN[-1][2]) == len(tokens)
        return tokens

    def vision_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        return self._note("vision_layer", tokens, ctx) if layer == 1 else tokens

    def project(
        self, tokens: VisualTokens, default: Callable[[VisualTokens], VisualTokens], ctx: Context
    ) -> VisualTokens:
        return default(self._note("project", tokens, ctx))

    def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        return self._note("llm_input", tokens, ctx)


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    SEEN.clear()
    yield
    SEEN.clear()


@torch.no_grad()
def text_alone(model: nn.Module, row: dict[str, Tensor], text: Tensor) -> tuple[Tensor, Tensor]:
    """(mean embedding, last hidden state) of a row's text tokens, from the unmodified decoder without padding."""
    embeds = model.get_input_embeddings()(row["input_ids"][text])[None]
    state = oracle.text_model(model)(inputs_embeds=embeds, use_cache=False).last_hidden_state[0, -1]
    return embeds[0].mean(0), state


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * max(1.0, float(want.abs().max())))


@torch.no_grad()
def forward(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> Any:
    return model(**oracle.clone(batch), **options)


@cells
@pytest.mark.parametrize("case", ["single", "padded_ragged", "multi_image", "text_row"])
def test_every_tile_and_item_is_told_the_text_of_its_own_row(cell: tuple[str, str], case: str) -> None:
    model = tiny(cell[0])
    batch = inputs(model, *cell, case)
    visual = visual_mask(model, batch)
    wanted: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for row in range(len(visual)):
        if not bool(visual[row].any()):
            continue
        single = alone(model, cell, batch, row)
        mean, state = text_alone(model, single, ~visual_mask(model, single))
        SEEN.clear()
        with compress(model, Reader()):
            forward(model, single)
        for site, means, states in SEEN:  # alone, every row of tokens belongs to the one prompt
            close(means, mean.expand_as(means))
            close(states, state.expand_as(states))
            wanted.setdefault(site, []).extend([(mean, state)] * len(means))
    SEEN.clear()
    with compress(model, Reader()):
        forward(model, batch)
    sites = [site for site, _, _ in SEEN]
    assert sites == ["vision_layer", "project", "llm_input"] == list(wanted)
    for site, means, states in SEEN:
        close(means, torch.stack([mean for mean, _ in wanted[site]]))
        close(states, torch.stack([state for _, state in wanted[site]]))


def in_order(values: Tensor) -> Tensor:
    """Rows by their first entry."""
    return values[values[:, 0].argsort()]


@cells
def test_generate_with_beams_and_compress_inputs_know_what_forward_knows(cell: tuple[str, str]) -> None:
    model = tiny(cell[0])
    batch = inputs(model, *cell, "padded_ragged")
    with compress(model, Reader()):
        forward(model, batch)
        direct = {site: (means, states) for site, means, states in SEEN}
        SEEN.clear()
        oracle.generate_with_logits(model, batch, max_new_tokens=2, num_beams=2)
        beams = {site: (means, states) for site, means, states in SEEN}
        SEEN.clear()
    for site, got in beams.items():
        for values, want in zip(got, direct[site], strict=True):
            if len(values) != len(want):  # beams have repeated the rows
                assert len(values) == 2 * len(want)
                values, want = in_order(values), in_order(want.repeat_interleave(2, 0))
            close(values, want)
    assert set(beams) == set(direct)
    if oracle.ENCODES_APART:
        compress_inputs(model, Reader(), batch)
        for site, *got in SEEN:
            for values, want in zip(got, direct[site], strict=True):
                close(values, want)
        assert [site for site, *_ in SEEN] == ["vision_layer", "project", "llm_input"]


@cells
def test_reading_the_question_in_the_middle_of_a_call_changes_nothing(cell: tuple[str, str]) -> None:
    model = tiny(cell[0])
    batch = inputs(model, *cell, "padded_ragged")
    want = oracle.generate_with_logits(model, batch, max_new_tokens=3)
    before = oracle.fingerprint(model)
    with compress(model, Reader()):
        got = oracle.generate_with_logits(model, batch, max_new_tokens=3)
    assert len(SEEN) == 3
    assert torch.equal(got.logits, want.logits) and torch.equal(got.sequences, want.sequences)
    assert oracle.fingerprint_changes(before, oracle.fingerprint(model)) == []
    assert "generate" not in vars(model)


def test_what_is_to_be_predicted_is_no_prompt() -> None:
    model = tiny("llava")
    batch = inputs(model, "llava", "image", "left_padded")
    visual, real = visual_mask(model, batch), batch["attention_mask"].bool()
    labels = batch["input_ids"].masked_fill(~real | visual, -100)
    labels[0, :-3] = -100  # of the first row the last three tokens are the answer
    with compress(model, Reader()):
        forward(model, batch, labels=labels)
    text = real & ~visual
    text[0, -3:] = False  # of the other row all text is to be predicted: then it is the prompt as well
    assert len(SEEN) == 3
    for _, means, states in SEEN:
        for row in range(2):
            mean, state = text_alone(model, {"input_ids": batch["input_ids"][row]}, text[row])
            close(means[row], mean)
            close(states[row], state)
    SEEN.clear()
    with compress(model, Reader()):
        forward(model, batch, labels=labels)
        forward(model.base_model, batch)  # labels of an earlier call are forgotten
    mean, _ = text_alone(model, {"input_ids": batch["input_ids"][0]}, (real & ~visual)[0])
    close(SEEN[-1][1][0], mean)


def test_embeddings_tell_the_same_as_ids() -> None:
    model = tiny("llava")
    batch = inputs(model, "llava", "image", "left_padded")
    with compress(model, Reader()):
        forward(model, batch)
        embeds = model.get_input_embeddings()(batch["input_ids"])
        rest = {name: value for name, value in batch.items() if name != "input_ids"}
        forward(model, rest | {"inputs_embeds": embeds})
    assert len(SEEN) == 6
    for (site, *want), (other, *got) in zip(SEEN[:3], SEEN[3:], strict=True):
        assert site == other
        for a, b in zip(got, want, strict=True):
            close(a, b)


def test_a_second_turn_with_a_new_image_reads_the_new_text() -> None:
    model = tiny("llava")
    batch = inputs(model, "llava", "image", "single")
    more = inputs(model, "llava", "image", "single", seed=5)
    with compress(model, Reader()):
        first = model.generate(**oracle.clone(batch), max_new_tokens=2, return_dict_in_generate=True, use_cache=True)
        SEEN.clear()
        ids = torch.cat([first.sequences, more["input_ids"]], 1)
        cache = getattr(first, oracle.CACHE)
        past = cache.get_seq_length()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=more["pixel_values"],
            **{oracle.CACHE: cache},
            max_new_tokens=2,
        )
    fresh = ids[0, past:]
    mean, state = text_alone(model, {"input_ids": fresh}, fresh != model.config.image_token_id)
    assert len(SEEN) == 3
    for _, means, states in SEEN:
        close(means[0], mean)
        close(states[0], state)


def test_images_that_are_encoded_by_themselves_have_no_prompt() -> None:
    model = tiny("llava")
    batch = inputs(model, "llava", "image", "plain")
    with compress(model, Reader()):
        forward(model, batch)
        oracle.generate_with_logits(model, batch, max_new_tokens=1)
        with pytest.raises(UnsupportedError, match=r"encoded by themselves; call generate\(\)"):
            model.get_image_features(pixel_values=batch["pixel_values"])
        forward(model, batch)


def test_a_row_without_text_and_a_truncated_prompt_are_errors() -> None:
    model = tiny("llava")
    batch = inputs(model, "llava", "image", "single")
    visual = visual_mask(model, batch)
    bare = batch | {"attention_mask": visual.long()}
    with compress(model, Reader()):
        with pytest.raises(InputError, match="row 0 of the prompt holds no text"):
            forward(model, bare)
        short = {name: value[:, :10] if value.ndim == 2 else value for name, value in batch.items()}
        with pytest.raises(InputError, match="input_ids has"):
            forward(model, short)


@pytest.mark.parametrize("family", ["clip_vision", "siglip_vision"])
def test_a_bare_tower_has_no_prompt(family: str) -> None:
    with pytest.raises(UnsupportedError, match="Reader reads the prompt, and a bare tower has none"):
        attach(tiny(family), Reader())
    with pytest.raises(UnsupportedError, match="reads the prompt"):
        check(tiny(family), Reader())


def test_a_bare_decoder_reads_the_text_around_its_marked_tokens() -> None:
    class AtTheInput(Compressor):
        """Only the site at the decoder."""

        keep, positions, needs, merges = 1.0, "keep", Reader.needs, False
        llm_input = Reader.llm_input
        _note = Reader._note

    model = tiny("llama")
    ids = torch.arange(10, 34).view(2, 12)
    visual = torch.zeros(2, 12, dtype=torch.bool)
    visual[0, 2:9] = visual[1, 4:8] = True
    want = forward(model, {"input_ids": ids}).logits
    with compress(model, AtTheInput(), visual=visual):
        assert torch.equal(forward(model, {"input_ids": ids}).logits, want)
    ((_, means, states),) = SEEN
    for row in range(2):
        mean, state = text_alone(model, {"input_ids": ids[row]}, ~visual[row])
        close(means[row], mean)
        close(states[row], state)


def test_what_was_not_declared_is_not_told() -> None:
    class Silent(Reader):
        needs = frozenset()

    model = tiny("llava")
    with (
        compress(model, Silent()),
        pytest.raises(UnsupportedError, match="prompt_embedding does not exist at this site, or was not declared"),
    ):
        forward(model, inputs(model, "llava", "image", "single"))


def test_patches_are_mapped_as_the_model_s_projector_maps_them() -> None:
    found: list[tuple[Tensor, Tensor]] = []

    class Mapper(Reader):
        patchwise_projector = True

        def vision_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
            found.append((tokens.features, ctx.to_llm(tokens)))
            return tokens

    model = tiny("llava")
    batch = inputs(model, "llava", "image", "plain")
    want = forward(model, batch).logits
    with compress(model, Mapper()):
        assert torch.equal(forward(model, batch).logits, want)
    assert len(found) == 2
    for features, mapped in found:
        close(mapped, model.model.multi_modal_projector(features))
    with pytest.raises(UnsupportedError, match="Mapper needs a projector that maps every patch by itself"):
        attach(tiny("qwen3_vl"), Mapper())
