"""Decoders and towers by themselves: the caller marks the visual tokens, or gets the full grid back."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.contract.matrix import COMPRESSORS, assert_close, compress, drops, tiny
from tests.contract.reference import (
    given_merged,
    given_prompts,
    kept_by_layer,
    masked_per_call,
    noting_merged,
    prompts_of,
    recording,
)

pytestmark = pytest.mark.lowest
DECODERS = ("llama", "qwen2")
TOWERS = ("clip_vision", "siglip_vision")
AT_THE_DECODER = [
    name
    for name, method in COMPRESSORS.items()
    if method.positions == "keep"
    and method.sites <= {"prepare", "llm_input", "llm_layer"}
    and not method.needs & {"tower_attention", "tower_keys"}
    and not name.startswith(("dycoke", "evs", "regionmask"))  # marked tokens lie on no grid
]


def marked(padded: bool) -> tuple[dict[str, Tensor], Tensor]:
    """A batch of three rows and its visual tokens: one run, two runs, and none."""
    ids = torch.randint(3, 300, (3, 30), generator=torch.Generator().manual_seed(4))
    visual = torch.zeros(3, 30, dtype=torch.bool)
    visual[0, 8:24] = True
    visual[1, 9:15] = visual[1, 17:25] = True
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
        mask[2, :6] = 0
    return {"input_ids": ids, "attention_mask": mask}, visual


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("name", AT_THE_DECODER)
def test_a_bare_decoder_drops_marked_tokens_as_if_masked(name: str, family: str, attn: str, padded: bool) -> None:
    model, method = tiny(family, attn), COMPRESSORS[name]
    inputs, visual = marked(padded)

    def run() -> oracle.Generated:
        return oracle.generate_with_logits(model, inputs, max_new_tokens=4)

    noting = noting_merged(method)
    with recording(model) as calls, noting as notes, compress(model, method, visual=visual) as session:
        got = run()
    report = session.report
    assert report.item_rows == [0, 1, 1]
    assert (sum(report.tokens_out) < sum(report.tokens_in)) == drops(name, (family, "image"))
    assert sum(report.tokens_in) == int(visual.sum())
    keep = kept_by_layer(report, torch.zeros_like(visual), 4)
    embeds = [{"inputs_embeds": model.get_input_embeddings()(calls[0]["input_ids"])}]
    prompts = prompts_of(method, session.reports, embeds)
    with given_prompts(model, prompts), given_merged(model, notes, [report]), masked_per_call(model, [keep]):
        want = run()
    assert torch.equal(got.sequences, want.sequences)
    assert_close(got.logits, want.logits)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("name", [name for name in AT_THE_DECODER if COMPRESSORS[name].identity_at_full is True])
def test_a_bare_decoder_that_keeps_everything_is_the_plain_one_to_the_bit(name: str, family: str, attn: str) -> None:
    settings = {"shares": (1.0, 1.0)} if name == "pyramiddrop-shares" else {}
    model, method = tiny(family, attn), dataclasses.replace(COMPRESSORS[name], keep=1.0, **settings)
    inputs, visual = marked(padded=True)
    want = oracle.generate_with_logits(model, inputs, max_new_tokens=4)
    with compress(model, method, visual=visual) as session:
        got = oracle.generate_with_logits(model, inputs, max_new_tokens=4)
    assert session.report.calls > 0
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.sequences, want.sequences)


def pixels(family: str) -> Tensor:
    config = tiny(family).config
    return torch.randn(3, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", TOWERS)
@pytest.mark.parametrize("name", ["divprune", "random", "uniformgrid", "visionzip", "vispruner", "holov", "tome"])
def test_a_bare_tower_that_keeps_everything_is_the_plain_one_to_the_bit(name: str, family: str) -> None:
    model, images = tiny(family), pixels(family)
    method = dataclasses.replace(COMPRESSORS[name], keep=1.0)
    with torch.no_grad():
        want = model(pixel_values=images, output_hidden_states=True)
        with compress(model, method) as session:
            got = model(pixel_values=images, output_hidden_states=True)
    assert session.report.calls > 0
    assert session.report.tokens_out == session.report.tokens_in
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(got.last_hidden_state, want.last_hidden_state)


@pytest.mark.parametrize("family", TOWERS)
@pytest.mark.parametrize(
    "name", ["divprune", "prumerge", "random", "uniformgrid", "visionzip", "vispruner", "holov", "tome"]
)
def test_a_bare_tower_stays_a_drop_in(name: str, family: str) -> None:
    model, images = tiny(family), pixels(family)
    with torch.no_grad():
        want = model(pixel_values=images).last_hidden_state
        with compress(model, COMPRESSORS[name]) as session:
            got = model(pixel_values=images).last_hidden_state
            alone = model(pixel_values=images[1:2]).last_hidden_state
            by_itself = session.report.tokens
        batched = session.reports[0]
    assert got.shape == want.shape
    assert all(0 < left < total for left, total in zip(batched.tokens_out, batched.tokens_in, strict=True))
    assert by_itself is not None
    assert by_itself.kept()[0].tolist() == batched.kept[1].tolist()
    assert_close(alone[0], got[1])
