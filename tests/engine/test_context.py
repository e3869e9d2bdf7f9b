"""What a method may ask of the decoder is what the unmodified model computes, taken from its eager attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from mmtoken import compress
from mmtoken.compressors import FastV
from mmtoken.compressors.base import Compressor, Context, Need, Positions, Recording
from mmtoken.errors import InputError, UnsupportedError
from mmtoken.tokens import VisualTokens
from tests import oracle
from tests.backbones.tiny_models import build, inputs, visual_mask
from tests.engine.agreement import assert_close, tiny

LAYER = 2
CASES = ["padded_ragged", "multi_image"]
FAMILIES = ["llava", "qwen3_vl", "smolvlm"]
models = pytest.mark.parametrize("family", FAMILIES)
attentions = pytest.mark.parametrize("attn", ["sdpa", "eager"])


@dataclass(frozen=True)
class Asks(Compressor):
    """Keeps everything and asks one question when it gets to `LAYER`."""

    keep: int | float = 1.0
    positions: Positions = "keep"

    question: ClassVar[Callable[[VisualTokens, Context], Any]]
    answers: ClassVar[list[Any]] = []
    title: ClassVar[str] = "Asks"
    paper: ClassVar[str] = "test"
    year: ClassVar[int] = 2026
    needs: ClassVar[frozenset[Need]] = frozenset(
        {"text_attention", "next_attention", "decoder_states", "text", "transitions"}
    )

    def cut_layers(self, depth: int) -> tuple[int, ...]:
        return (LAYER,)

    def score_layers(self, depth: int) -> tuple[int, ...]:
        return (0, LAYER - 1)

    def watched_layers(self, depth: int) -> tuple[int, ...]:
        return (LAYER - 1,)

    def llm_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        self.answers.append(type(self).question(tokens, ctx))
        return tokens


def ask(family: str, attn: str, case: str, question: Callable[[VisualTokens, Context], Any]) -> tuple[Any, Any, Any]:
    """(the answer, the report, the batch) of a prefill."""
    model = tiny(family, attn)
    batch = inputs(model, family, "image", case)
    kind = type("Asks", (Asks,), {"question": staticmethod(question), "answers": []})
    with compress(model, kind()) as session, torch.no_grad():
        model(**oracle.clone(batch))
    (answer,) = kind.answers
    return answer, session.report, batch


@torch.no_grad()
def eager(family: str, batch: dict[str, Tensor]) -> Any:
    return tiny(family, "eager")(**oracle.clone(batch), output_attentions=True, output_hidden_states=True)


def text_of(model: nn.Module, batch: dict[str, Tensor], row: int) -> list[int]:
    visual = visual_mask(model, batch)[row]
    return [i for i in range(len(visual)) if batch["attention_mask"][row, i] and not visual[i]]


def rows_meant(rows: str, text: list[int], real: list[int], last_place: int) -> list[int]:
    after = [i for i in text if i > last_place]
    return {"last": [real[-1]], "text": text, "after": after or [real[-1]], "all": real}[rows]


@models
@attentions
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", ["last", "after", "text", "all"])
@pytest.mark.parametrize("when", ["before", "next"])
def test_attention_of_chosen_rows(family: str, attn: str, case: str, rows: str, when: str) -> None:
    def question(tokens: VisualTokens, ctx: Context) -> Tensor:
        if when == "next":
            return ctx.next_attention(tokens, rows)  # type: ignore[arg-type]
        return ctx.text_attention(tokens, LAYER - 1, rows)  # type: ignore[arg-type]

    answer, report, batch = ask(family, attn, case, question)
    attention = eager(family, batch).attentions[LAYER if when == "next" else LAYER - 1].mean(1)
    for item, (row, places) in enumerate(zip(report.item_rows, report.places, strict=True)):
        real = batch["attention_mask"][row].nonzero()[:, 0].tolist()
        meant = rows_meant(rows, text_of(tiny(family), batch, row), real, int(places[-1]))
        want = torch.stack([attention[row, i, places] for i in meant]).mean(0)
        assert_close(answer[item, : len(places)], want)


@models
@pytest.mark.parametrize("case", CASES)
def test_attention_of_rows_that_the_method_chooses_per_head(family: str, case: str) -> None:
    def question(tokens: VisualTokens, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        text = ctx.text(tokens)
        some = text.valid & (torch.arange(text.valid.shape[1]) % 3 == 1)
        return some, ctx.head_attention(tokens, LAYER - 1, some), ctx.text_attention(tokens, LAYER - 1, some)

    (some, per_head, mean), report, batch = ask(family, "sdpa", case, question)
    attention = eager(family, batch).attentions[LAYER - 1]
    for item, (row, places) in enumerate(zip(report.item_rows, report.places, strict=True)):
        text = text_of(tiny(family), batch, row)
        meant = [place for i, place in enumerate(text) if i % 3 == 1]
        assert int(some[item].sum()) == len(meant)
        for number, i in enumerate(meant):
            assert_close(per_head[item, :, number, : len(places)], attention[row, :, i, places])
        assert bool((per_head[item, :, len(meant) :] == 0).all())
        want = torch.stack([attention[row, :, i, places].mean(0) for i in meant]).mean(0)
        assert_close(mean[item, : len(places)], want)


@models
@pytest.mark.parametrize("case", CASES)
def test_text_tokens_and_what_entered_the_decoder(family: str, case: str) -> None:
    def question(tokens: VisualTokens, ctx: Context) -> Any:
        return ctx.text(tokens), ctx.embeddings(tokens), ctx.final_norm(tokens.features)

    (text, embeddings, normed), report, batch = ask(family, "sdpa", case, question)
    decoder = oracle.text_model(tiny(family, "eager"))
    entering: list[Tensor] = []
    handle = decoder.layers[LAYER].register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    out = eager(family, batch)
    handle.remove()
    for item, (row, places) in enumerate(zip(report.item_rows, report.places, strict=True)):
        where = text_of(tiny(family), batch, row)
        assert int(text.valid[item].sum()) == len(where)
        assert text.after[item, : len(where)].tolist() == [i > int(places[-1]) for i in where]
        assert_close(text.embeddings[item, : len(where)], out.hidden_states[0][row, where])
        assert_close(text.features[item, : len(where)], entering[0][row, where])
        assert_close(embeddings[item, : len(places)], out.hidden_states[0][row, places])
        assert_close(normed[item, : len(places)], decoder.norm(entering[0][row, places]).detach())


@models
@attentions
def test_states_give_the_attention_again(family: str, attn: str) -> None:
    """softmax(q k) over text and visual tokens from `States`, with positions in order, is the eager attention."""

    def question(tokens: VisualTokens, ctx: Context) -> Any:
        return ctx.decoder_states(tokens, LAYER - 1), ctx.text_states(tokens, LAYER - 1)

    (states, text), report, batch = ask(family, attn, "padded_ragged", question)
    attention = eager(family, batch).attentions[LAYER - 1]
    assert any(report.item_rows.count(row) == 1 for row in report.item_rows)
    for item, (row, places) in enumerate(zip(report.item_rows, report.places, strict=True)):
        where = text_of(tiny(family), batch, row)
        count = len(places)
        if len(where) + count != int(batch["attention_mask"][row].sum()):
            continue  # another item in this row
        key = torch.cat([states.key[item, :, :count], text.key[item, :, : len(where)]], 1)
        heads = states.query.shape[1] // states.key.shape[1]
        key = key.repeat_interleave(heads, 0)
        query = text.query[item, :, len(where) - 1]
        scores = (key @ query[:, :, None])[..., 0] * query.shape[-1] ** -0.5
        assert_close(scores.softmax(-1)[:, :count], attention[row, :, where[-1], places])
        assert states.value.shape == states.key.shape
        # rotated by the tables at the tokens' positions: turning back and forth is nothing
        half = states.cosine.shape[-1] // 2
        assert torch.allclose(states.cosine[item, :count] ** 2 + states.sine[item, :count] ** 2, torch.ones(1))
        assert torch.equal(states.cosine[item, :count, :half], states.cosine[item, :count, half:])


@models
@pytest.mark.parametrize("case", CASES)
def test_transitions_compare_what_enters_and_leaves_a_module(family: str, case: str) -> None:
    def question(tokens: VisualTokens, ctx: Context) -> Any:
        return [ctx.transition(tokens, LAYER - 1, module) for module in ("attention", "mlp")]

    seen: dict[str, tuple[Tensor, Tensor]] = {}
    model = tiny(family, "eager")
    layer = oracle.text_model(model).layers[LAYER - 1]
    handles = [
        layer.self_attn.register_forward_hook(
            lambda m, args, kwargs, out: seen.update(attention=(kwargs["hidden_states"], out[0])), with_kwargs=True
        ),
        layer.mlp.register_forward_hook(lambda m, args, out: seen.update(mlp=(args[0], out))),
    ]
    answers, report, batch = ask(family, "sdpa", case, question)
    try:
        eager(family, batch)
    finally:
        for handle in handles:
            handle.remove()
    for answer, module in zip(answers, ("attention", "mlp"), strict=True):
        before, after = seen[module]
        for item, (row, places) in enumerate(zip(report.item_rows, report.places, strict=True)):
            index = answer.index[item, : len(places)]
            x, y = before[row, places], after[row, places]
            assert_close(answer.magnitude[item, index], y.norm(dim=-1) / x.norm(dim=-1))
            assert_close(answer.cosine[item, index], torch.nn.functional.cosine_similarity(x, y, dim=-1))
            assert int(answer.valid[item].sum()) == int(batch["attention_mask"][row].sum())


def test_what_was_not_declared_is_refused() -> None:
    for question, words in (
        (lambda tokens, ctx: ctx.text_attention(tokens, 3), "layer 3 was not declared by score_layers"),
        (lambda tokens, ctx: ctx.transition(tokens, 0, "mlp"), "not declared by watched_layers"),
        (lambda tokens, ctx: ctx.tower_states(tokens), "does not exist at this site"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            ask("llava", "sdpa", "single", question)
    with pytest.raises(InputError, match="one flag per token of text"):
        ask("llava", "sdpa", "single", lambda tokens, ctx: ctx.text_attention(tokens, 1, torch.ones(1, 1) > 0))
    with pytest.raises(InputError, match="rows='first' is unknown"):
        ask("llava", "sdpa", "single", lambda tokens, ctx: ctx.text_attention(tokens, 1, "first"))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- history


@dataclass(frozen=True)
class Remembers(FastV):
    """FastV that notes what it is told of earlier calls."""

    told: ClassVar[list[Tensor]] = []
    needs: ClassVar[frozenset[Need]] = frozenset({"text_attention", "history"})

    def recording(self, depth: int) -> Recording:
        return Recording(layers=(1, 3), tokens=3, calls=2)

    def llm_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        self.told.append(ctx.history(tokens))
        return super().llm_layer(tokens, layer, ctx)


def recorded(family: str, batch: dict[str, Tensor], tokens: int) -> list[Tensor]:
    """Per generated token float[B, L]: what it pays to the prompt in layers 1 and 3 of the unmodified model."""
    model = build(family, "eager")
    out = model.generate(
        **oracle.clone(batch),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        output_attentions=True,
        return_dict_in_generate=True,
    )
    length = batch["input_ids"].shape[1]
    return [
        torch.stack([step[layer][:, :, -1, :length].mean(1) for layer in (1, 3)]).mean(0) for step in out.attentions
    ]


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@attentions
def test_what_generated_tokens_looked_at_is_remembered(family: str, attn: str) -> None:
    model = build(family, attn)
    batch = inputs(model, family, "image", "padded_ragged")
    want = torch.stack(recorded(family, batch, 5)[-3:]).mean(0)
    kind = type("Remembers", (Remembers,), {"told": []})
    with compress(model, kind(keep=1.0)) as session:
        for _ in range(4):
            model.generate(**oracle.clone(batch), max_new_tokens=5, min_new_tokens=5, do_sample=False)
        with torch.no_grad():
            model(**oracle.clone(batch))  # a forward generates nothing and does not count
        model.generate(**oracle.clone(batch), max_new_tokens=2, min_new_tokens=2, do_sample=False)  # too short to count
        session.reset()
        model.generate(**oracle.clone(batch), max_new_tokens=3, min_new_tokens=3, do_sample=False)
        report = session.report
    assert [len(told) for told in kind.told] == [0, 1, 2, 2, 2, 2, 0]
    for item, (row, places) in enumerate(zip(report.item_rows, report.places, strict=True)):
        for call in kind.told[2]:
            assert_close(call[item, : len(places)], want[row, places])


def test_dropped_tokens_receive_nothing_behind_the_cut_and_all_of_it_before() -> None:
    model = build("llava")
    batch = inputs(model, "llava", "image", "single")
    kind = type("Remembers", (Remembers,), {"told": [], "recording": lambda self, depth: Recording((3,), 2, 1)})
    with compress(model, kind(keep=4, layer=2)) as session:
        for _ in range(2):
            model.generate(**oracle.clone(batch), max_new_tokens=2, min_new_tokens=2, do_sample=False)
    (call,) = kind.told[1]
    kept = session.reports[0].kept[0]
    gone = torch.ones(call.shape[1], dtype=torch.bool)
    gone[kept] = False
    assert bool((call[0, gone] == 0).all()) and bool((call[0, kept] > 0).all())


def test_another_picture_size_in_the_same_episode_is_an_error() -> None:
    model = build("qwen3_vl")
    kind = type("Remembers", (Remembers,), {"told": []})
    with compress(model, kind(keep=1.0)), pytest.raises(InputError, match=r"session.reset\(\)"):
        for case in ("single", "multi_image"):
            batch = inputs(model, "qwen3_vl", "image", case)
            model.generate(**oracle.clone(batch), max_new_tokens=3, min_new_tokens=3, do_sample=False)
