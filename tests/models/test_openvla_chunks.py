"""The chunk policy against timm and Llama put together by hand, and what the engine records of its action queries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mmtoken
from mmtoken.compressors import Compressor, Context, DivPrune, FastV, VLAPruner
from mmtoken.compressors.base import Need, Positions
from mmtoken.engine.prefill import without_last
from mmtoken.errors import ActionError, InputError, UnsupportedError
from mmtoken.models.openvla import OpenVLAChunksConfig, OpenVLAForActionChunks, PrismaticProcessor
from mmtoken.tokens import VisualTokens
from tests import oracle
from tests.backbones import openvla_checkpoint as official
from tests.backbones.processors import photograph
from tests.backbones.tiny_models import TEXT_TOKENS
from tests.contract.reference import kept_by_layer

pytestmark = pytest.mark.lowest
STEPS, LENGTH = 2, 3
QUERIES, IMAGE, QUERY = STEPS * LENGTH, TEXT_TOKENS + 1, TEXT_TOKENS + 2
BINS = slice(TEXT_TOKENS - official.BINS, TEXT_TOKENS)
TEXTS = ("go", "put it on the left of the right one", "describe the picture")


class Policy(NamedTuple):
    parts: official.Parts
    model: OpenVLAForActionChunks
    processor: PrismaticProcessor
    batch: dict[str, Tensor]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Policy]:
    folder = tmp_path_factory.mktemp("official")
    parts = official.write(folder)
    space = mmtoken.load(folder)[0].config.space_token_id
    config = {name: value for name, value in official.settings(2).items() if name not in ("model_type", "auto_map")}
    made = OpenVLAForActionChunks(
        OpenVLAChunksConfig(**config, space_token_id=space, action_steps=STEPS, action_dim=LENGTH)
    )
    weights = parts.named()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        weights["action_queries"] = torch.randn(QUERIES, 64)
    made.load_state_dict(weights)
    made.save_pretrained(folder)  # beside the tokenizer and the official image settings
    (folder / "model.safetensors.index.json").unlink()
    for shard in folder.glob("model-*"):
        shard.unlink()
    model, processor = mmtoken.load(folder, attn_implementation=request.param)
    pictures = [photograph(number) for number in range(len(TEXTS))]
    batch = dict(processor(text=[processor.prompt(text) for text in TEXTS], images=pictures))
    yield Policy(parts, model, processor, batch)


def bare(batch: dict[str, Tensor], row: int) -> Tensor:
    """int[1, L]: the prompt of a row without any placeholder."""
    ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
    return ids[(ids != IMAGE) & (ids != QUERY)][None]


@torch.no_grad()
def plain(policy: Policy, row: int) -> Tensor:
    """float[S * A, V]: logits of the queries of a row, one embedding after the other."""
    parts, ids = policy.parts, bare(policy.batch, row)
    hidden = parts.patches(policy.batch["pixel_values"][row : row + 1])
    for number, linear in enumerate(parts.projector):
        hidden = linear(hidden if number == 0 else nn.functional.gelu(hidden))
    words, queries = parts.llm.model.embed_tokens(ids), policy.model.action_queries[None]
    embeds = torch.cat([words[:, :1], hidden, words[:, 1:], queries], 1)
    return parts.llm(inputs_embeds=embeds).logits[0, -QUERIES:]


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_it_loads_as_itself(policy: Policy) -> None:
    assert type(policy.model) is OpenVLAForActionChunks and type(policy.processor) is PrismaticProcessor
    ids = policy.batch["input_ids"]
    assert bool((ids[:, -QUERIES:] == QUERY).all()) and int((ids == QUERY).sum()) == QUERIES * len(ids)
    assert bool((ids[:, -QUERIES - 1] == policy.processor.space_token_id).all())


def test_all_steps_come_from_one_forward(policy: Policy) -> None:
    tokens = policy.model.predict_tokens(unnorm_key="toy_arm", **policy.batch)
    want = torch.stack([plain(policy, row)[:, BINS].argmax(-1) + BINS.start for row in range(len(TEXTS))])
    assert torch.equal(tokens, want.view(len(TEXTS), STEPS, LENGTH))
    assert len(tokens.unique()) > 3
    for row in range(len(TEXTS)):
        single = {"input_ids": bare(policy.batch, row), "pixel_values": policy.batch["pixel_values"][row : row + 1]}
        assert torch.equal(policy.model.predict_tokens(unnorm_key="toy_arm", **single)[0], tokens[row])


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_and_loss_of_bare_ids_padded_on_either_side(policy: Policy, side: str) -> None:
    rows = [bare(policy.batch, row)[0] for row in range(len(TEXTS))]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=TEXT_TOKENS, padding_side=side)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    labels = torch.randint(BINS.start, BINS.stop, (len(TEXTS), STEPS, LENGTH))
    pixels = policy.batch["pixel_values"]
    with torch.no_grad():
        output = policy.model(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels)
    total = torch.zeros(())
    for row in range(len(TEXTS)):
        want = plain(policy, row)
        end = output.logits.shape[1] if side == "left" else official.PATCHES + len(rows[row]) + QUERIES
        close(output.logits[row, end - QUERIES : end], want)
        total += nn.functional.cross_entropy(want, labels[row].flatten())
    close(output.loss, total / len(TEXTS))


def test_queries_learn(policy: Policy) -> None:
    labels = torch.full((len(TEXTS), STEPS, LENGTH), BINS.start)
    policy.model(**policy.batch, labels=labels).loss.backward()
    assert policy.model.action_queries.grad is not None and bool((policy.model.action_queries.grad != 0).all())
    policy.model.zero_grad()


# ----------------------------------------------------------------------------------------------------- what is recorded


@torch.no_grad()
def attentions(policy: Policy) -> list[Tensor]:
    """Per layer float[B, L, L]: mean over heads."""
    model = policy.model
    before = model.language_model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return [layer.mean(1) for layer in model(**policy.batch, output_attentions=True).attentions]
    finally:
        model.set_attn_implementation(before)


def test_queries_are_recorded_in_the_place_of_generated_tokens(policy: Policy) -> None:
    method = VLAPruner(keep=4, layer=1, window=2, action_tokens=5, recorded=(1, 2))
    visual = policy.batch["input_ids"] == IMAGE
    layers = attentions(policy)
    want = torch.stack([
        (layers[1][row, -QUERIES:] + layers[2][row, -QUERIES:]).mean(0)[visual[row]] / 2 for row in range(len(TEXTS))
    ])  # fmt: skip
    plain_tokens = policy.model.predict_tokens(unnorm_key="toy_arm", **policy.batch)
    with mmtoken.compress(policy.model, method) as session:
        for _ in range(2):
            assert torch.equal(policy.model.predict_tokens(unnorm_key="toy_arm", **policy.batch), plain_tokens)
            assert session.report.tokens_out == [official.PATCHES] * len(TEXTS)
        policy.model.predict_tokens(unnorm_key="toy_arm", **policy.batch)
        assert session.report.tokens_out == [4] * len(TEXTS)
        assert session.thread.recorder is not None
        calls = session.thread.recorder.calls
    assert len(calls) == 2
    for call in calls:
        close(call, want)


def test_prefill_rows_leave_queries_out(policy: Policy) -> None:
    visual, real = policy.batch["input_ids"] == IMAGE, policy.batch["attention_mask"].bool()
    layers = attentions(policy)
    for rows in ("prefill", "last"):
        method = VLAPruner(keep=4, layer=1, window=1, rows=rows)
        with mmtoken.compress(policy.model, method) as session:
            for _ in range(2):
                policy.model.predict_tokens(unnorm_key="toy_arm", **policy.batch)
            (site,) = session.report.sites
        assert site.scores is not None
        for row in range(len(TEXTS)):
            asking = layers[0][row, real[row]][:-QUERIES]
            close(site.scores[row], (asking.mean(0) if rows == "prefill" else asking[-1])[visual[row]])


@dataclass(frozen=True)
class Listener(Compressor):
    """Keeps everything and notes what it is told of the text."""

    keep: int | float = 1.0
    positions: Positions = "keep"

    title: ClassVar[str] = "Listener"
    paper: ClassVar[str] = "none"
    year: ClassVar[int] = 2026
    needs: ClassVar[frozenset[Need]] = frozenset({"prompt", "text"})
    query_agnostic: ClassVar[bool] = False
    heard: ClassVar[list[Any]] = []

    def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        text = ctx.text(tokens)
        self.heard.append((ctx.prompt_ids(tokens), text.valid.sum(-1).tolist(), ctx.prompt_embedding(tokens)))
        return tokens


class EarlyListener(Listener):
    """The same before the projector, where there is no decoder yet."""

    needs: ClassVar[frozenset[Need]] = frozenset({"prompt"})

    def project(self, tokens: VisualTokens, default: Any, ctx: Context) -> VisualTokens:
        ids = ctx.prompt_ids(tokens)
        self.heard.append((ids, [len(row) for row in ids], ctx.prompt_embedding(tokens)))
        projected: VisualTokens = default(tokens)
        return projected

    llm_input = Compressor.llm_input


@pytest.mark.parametrize("listener", [Listener, EarlyListener])
def test_queries_are_no_words(policy: Policy, listener: type[Listener]) -> None:
    Listener.heard.clear()
    with mmtoken.compress(policy.model, listener()):
        policy.model.predict_tokens(unnorm_key="toy_arm", **policy.batch)
    ((ids, counts, means),) = Listener.heard
    for row in range(len(TEXTS)):
        want = bare(policy.batch, row)[0]
        assert ids[row].tolist() == want.tolist() and counts[row] == len(want)
        close(means[row], policy.model.get_input_embeddings()(want).mean(0))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(0, 4))
def test_without_last_is_a_plain_loop(flags: list[bool], count: int) -> None:
    left, gone = [False] * len(flags), count
    for place in reversed(range(len(flags))):
        left[place] = flags[place] and gone <= 0
        gone -= flags[place]
    assert without_last(torch.tensor([flags]), count)[0].tolist() == left


@pytest.mark.parametrize("method", [DivPrune(keep=5), FastV(keep=3, layer=1)], ids=["before", "inside"])
def test_dropping_is_masking(policy: Policy, method: Compressor) -> None:
    model = policy.model
    with mmtoken.compress(model, method) as session, torch.no_grad():
        got = model(**policy.batch, logits_to_keep=QUERIES).logits
    keep = kept_by_layer(session.report, torch.zeros_like(policy.batch["input_ids"], dtype=torch.bool), 3)
    assert sum(int((~mask).sum()) for mask in keep.values())
    with oracle.masked_keys(model, keep), torch.no_grad():
        want = model(**policy.batch, logits_to_keep=QUERIES).logits
    close(got, want)


# ------------------------------------------------------------------------------------------------------------ bad input


def test_what_cannot_be_used_is_refused(policy: Policy, tmp_path: Path) -> None:
    model, batch = policy.model, policy.batch
    with pytest.raises(UnsupportedError, match="predict_tokens"):
        model.generate(**batch)
    with pytest.raises(InputError, match=r"labels have shape .* expected int\[B, 2, 3\]"):
        model(**batch, labels=batch["input_ids"])
    short = {name: value[:, :-1] if value.ndim == 2 else value for name, value in batch.items()}
    with pytest.raises(InputError, match=r"\[5, 5, 5\] action queries .* must hold 6"):
        model(**short)
    with pytest.raises(InputError, match="must end with 6 action queries"):
        model.predict_tokens(unnorm_key="toy_arm", **short)
    spaceless = batch["input_ids"].clone()
    spaceless[:, -QUERIES - 1] = 100
    with pytest.raises(InputError, match="must end with token"):
        model.predict_tokens(unnorm_key="toy_arm", **{**batch, "input_ids": spaceless})
    with pytest.raises(InputError, match="do not say where the action queries are"):
        model(inputs_embeds=torch.zeros(1, 30, 64))
    weights = model.get_output_embeddings().weight.data
    before = weights.clone()
    weights.fill_(torch.nan)
    with pytest.raises(ActionError, match="NaN"):
        model.predict_tokens(unnorm_key="toy_arm", **batch)
    weights.copy_(before)
    model.config.norm_stats["long"] = {"action": {"q01": [0.0] * 7, "q99": [1.0] * 7}}
    with pytest.raises(InputError, match="for 7 dimensions and this policy has 3"):
        model.predict_tokens(unnorm_key="long", **batch)
    del model.config.norm_stats["long"]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"action_steps": 0}, "action_steps=0"), ({"action_token_id": 32001}, "other than image_token_id")],
)
def test_settings_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        OpenVLAChunksConfig(**change)
