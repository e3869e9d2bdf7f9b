"""VLA-Pruner over the calls of an episode: a warm-up without pruning, then what its formulas choose, until a reset."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from mmtoken import compress
from mmtoken.compressors import FastV, VLAPruner
from mmtoken.engine.recorder import EpisodeState
from tests import oracle
from tests.contract.matrix import Cell, assert_close, batch, dense, keeps, protected, tiny
from tests.contract.reference import alone, kept_by_layer
from tests.contract.test_bare_models import marked

pytestmark = pytest.mark.lowest
METHOD = VLAPruner(keep=0.4, layer=2, window=2, action_tokens=3)
TOKENS = 3
CELLS: list[Cell] = [("llava", "image"), ("qwen3_vl", "image"), ("smolvlm", "image")]
cells = pytest.mark.parametrize("cell", CELLS, ids="-".join)
attentions = pytest.mark.parametrize("attn", ["sdpa", "eager"])


def act(model: nn.Module, inputs: oracle.Inputs) -> oracle.Generated:
    """One control step: as many tokens as an action has."""
    return oracle.generate_with_logits(model, inputs, max_new_tokens=TOKENS)


def same(a: oracle.Generated, b: oracle.Generated) -> bool:
    return torch.equal(a.logits, b.logits) and torch.equal(a.sequences, b.sequences)


@cells
@attentions
@pytest.mark.parametrize("case", ["plain", "padded_ragged", "multi_image"])
def test_the_warm_up_is_the_plain_model_and_then_dropping_is_masking(cell: Cell, attn: str, case: str) -> None:
    model, frames = tiny(cell[0], attn), [batch(cell, case, seed) for seed in (1, 1, 1)]
    plain = dense(cell, case, attn, TOKENS)
    with compress(model, METHOD) as session:
        answers = [act(model, frame) for frame in frames]
    assert same(answers[0], plain) and same(answers[1], plain)
    assert [report.tokens_out == report.tokens_in for report in session.reports] == [True, True, False]
    report = session.report
    for number, (left, total) in enumerate(zip(report.tokens_out, report.tokens_in, strict=True)):
        assert report.tokens is not None
        grid = report.tokens.grid[number]
        assert grid is None or grid[0] == 1
        assert left == max(1, math.floor(0.4 * total + 0.5))
    with oracle.masked_keys(model, keeps(report, cell, case)):
        want = act(model, frames[2])
    assert torch.equal(answers[2].sequences, want.sequences)
    assert_close(answers[2].logits, want.logits)


@cells
def test_a_reset_begins_with_the_warm_up_again(cell: Cell) -> None:
    model, inputs, plain = tiny(cell[0]), batch(cell, "plain"), dense(cell, "plain", tokens=TOKENS)
    with compress(model, METHOD) as session:
        first = [act(model, inputs) for _ in range(3)]
        kept = [kept.tolist() for kept in session.report.kept]
        session.reset()
        again = [act(model, inputs) for _ in range(3)]
    assert same(again[0], plain) and same(again[1], plain)
    assert not torch.equal(again[2].logits, plain.logits) and same(again[2], first[2])
    assert [kept.tolist() for kept in session.report.kept] == kept


@cells
def test_interleaved_episodes_of_other_sessions_and_settings_are_what_each_is_alone(cell: Cell) -> None:
    model, other = tiny(cell[0]), dataclasses.replace(METHOD, keep=0.7, window=1, layer=1)
    frames = {METHOD: [batch(cell, "plain", s) for s in (1, 2, 3)], other: [batch(cell, "plain", s) for s in (4, 5, 6)]}
    want = {}
    for method in frames:
        with compress(model, method) as session:
            want[method] = [(act(model, frame), [k.tolist() for k in session.report.kept]) for frame in frames[method]]
    assert want[METHOD][2][1] != want[METHOD][1][1]
    states = {method: EpisodeState() for method in frames}
    bare = oracle.fingerprint(model)
    for step in range(3):
        for method, state in states.items():
            with compress(model, method) as session, session.resuming(state):
                answer = act(model, frames[method][step])
            assert same(answer, want[method][step][0])
            assert [k.tolist() for k in session.report.kept] == want[method][step][1]
            assert oracle.fingerprint(model) == bare


def test_a_step_that_fails_is_no_part_of_an_episode_and_the_thread_keeps_its_own() -> None:
    cell: Cell = ("llava", "image")
    model, inputs, state = tiny("llava"), batch(cell, "plain"), EpisodeState()
    with compress(model, METHOD) as session:
        act(model, inputs)
        act(model, inputs)
        with session.resuming(state):
            act(model, inputs)
            assert session.report.tokens_out == session.report.tokens_in
        assert len(state.calls) == 1
        act(model, inputs)  # the thread's own third step; the other episode has seen one, and would not prune yet
        assert sum(session.report.tokens_out) < sum(session.report.tokens_in)
        before = state.calls
        with pytest.raises(RuntimeError, match="arm"), session.resuming(state):
            act(model, inputs)
            raise RuntimeError("the arm hit something")
        assert state.calls is before and len(before) == 1
        act(model, inputs)
        assert sum(session.report.tokens_out) < sum(session.report.tokens_in)


def test_methods_without_a_memory_do_not_look_at_the_episode() -> None:
    cell: Cell = ("llava", "image")
    model, inputs, state = tiny("llava"), batch(cell, "plain"), EpisodeState()
    with compress(model, FastV(keep=0.4, layer=2)) as session:
        plain = act(model, inputs)
        with session.resuming(state):
            assert same(act(model, inputs), plain)
    assert state == EpisodeState()


@cells
def test_keeping_everything_is_the_plain_model_after_the_warm_up_too(cell: Cell) -> None:
    model, inputs, plain = tiny(cell[0]), batch(cell, "padded_ragged"), dense(cell, "padded_ragged", tokens=TOKENS)
    with compress(model, dataclasses.replace(METHOD, keep=1.0)):
        assert all(same(act(model, inputs), plain) for _ in range(4))


@cells
def test_rows_of_a_batch_act_as_they_do_alone(cell: Cell) -> None:
    model = tiny(cell[0])
    frames = [batch(cell, "left_padded", seed) for seed in (1, 2, 3)]
    length = frames[0]["input_ids"].shape[1]
    with compress(model, METHOD) as session:
        together = [act(model, frame) for frame in frames]
        whole = session.report
        for row in range(len(frames[0]["input_ids"])):
            session.reset()
            for frame, batched in zip(frames, together, strict=True):
                single = alone(model, cell, frame, row)
                answer = act(model, single)
                start = single["input_ids"].shape[1]
                assert torch.equal(batched.sequences[row, length:], answer.sequences[0, start:])
                assert_close(answer.logits[0], batched.logits[row])
            mine = [kept for kept, of in zip(whole.kept, whole.item_rows, strict=True) if of == row]
            assert [kept.tolist() for kept in session.report.kept] == [kept.tolist() for kept in mine]


@torch.no_grad()
def action_attention(model: nn.Module, inputs: oracle.Inputs, answer: oracle.Generated) -> Tensor:
    """float[B, L]: what the rows that make the action tokens pay, mean over tokens, later layers and heads."""
    length = inputs["input_ids"].shape[1]
    sequences = answer.sequences[:, :-1]
    more = sequences.shape[1] - length
    longer = {**oracle.clone(inputs), "input_ids": sequences}
    longer["attention_mask"] = nn.functional.pad(inputs["attention_mask"], (0, more), value=1)
    if "mm_token_type_ids" in inputs:
        longer["mm_token_type_ids"] = nn.functional.pad(inputs["mm_token_type_ids"], (0, more))
    out = model(**longer, output_attentions=True)
    later = torch.stack(out.attentions[len(out.attentions) // 2 :])
    rows: Tensor = later[:, :, :, length - 1 :, :length].mean((0, 2, 3))
    return rows


@torch.no_grad()
def semantic_attention(model: nn.Module, inputs: oracle.Inputs) -> Tensor:
    """float[B, L]: what all rows of the prompt pay in layer 1, mean over heads and rows."""
    out = model(**oracle.clone(inputs), output_attentions=True)
    paid: Tensor = out.attentions[1].mean(1)
    real = inputs["attention_mask"].bool()
    return torch.where(real[..., None], paid, 0.0).sum(1) / real.sum(-1, keepdim=True)


@torch.no_grad()
def entering(model: nn.Module, inputs: oracle.Inputs) -> Tensor:
    """float[B, L, D]: what enters the decoder."""
    seen: list[Tensor] = []
    handle = oracle.text_model(model).layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**oracle.clone(inputs))
    handle.remove()
    return seen[0]


def best(scores: dict[int, float], count: int) -> set[int]:
    order = sorted(scores, key=lambda i: (-scores[i], i))
    gap = scores[order[count - 1]] - scores[order[count]]
    assert gap > 1e-6, "choose another seed: rounding could decide"
    return set(order[:count])


@cells
@pytest.mark.parametrize("variant", ["paper", "repo"])
def test_what_is_kept_is_what_the_formulas_choose(cell: Cell, variant: str) -> None:
    model, method = tiny(cell[0], "eager"), dataclasses.replace(METHOD, variant=variant, recorded=(2, 3))
    frames = [batch(cell, "plain", seed) for seed in (1, 2, 3)]
    with compress(model, method) as session:
        answers = [act(model, frame) for frame in frames]
    report, separate = session.report, protected(cell, "plain", 3)
    past = [action_attention(model, frame, answer) for frame, answer in zip(frames[:2], answers[:2], strict=True)]
    # The newest of two calls counts .8, the one before .64; in the official code the oldest counts 1, the newest .8.
    old, new = (0.64, 0.8) if variant == "paper" else (1.0, 0.8)
    action = old * past[0] + new * past[1]
    semantic, embeds = semantic_attention(model, frames[2]), entering(model, frames[2])
    for item, (row, places) in enumerate(zip(report.item_rows, report.places, strict=True)):
        eligible = [i for i, place in enumerate(places.tolist()) if not separate[row, place]]
        count = max(1, math.floor(0.4 * len(eligible) + 0.5))

        given = [{i: float(scores[row, places[i]]) for i in eligible} for scores in (semantic, action)]
        pool = sorted(best(given[0], count) | best(given[1], count))
        unit = nn.functional.normalize(embeds[row, places].double(), dim=-1)
        picked: list[int] = []
        while len(picked) < count:
            nearest = {
                i: min(1 - float(unit[i] @ unit[j]) for j in (picked or pool) if j != i)
                for i in pool
                if i not in picked
            }
            picked.append(min(nearest, key=lambda i: (-round(nearest[i], 7), i)))
        assert report.kept[item].tolist() == sorted(picked)


@attentions
def test_a_bare_decoder_with_marked_tokens(attn: str) -> None:
    model = tiny("llama", attn)
    inputs, visual = marked(padded=True)

    def run() -> oracle.Generated:
        return oracle.generate_with_logits(model, inputs, max_new_tokens=TOKENS)

    plain = run()
    with compress(model, METHOD, visual=visual) as session:
        answers = [run() for _ in range(3)]
    assert same(answers[0], plain) and same(answers[1], plain)
    assert sum(session.report.tokens_out) < sum(session.report.tokens_in)
    with oracle.masked_keys(model, kept_by_layer(session.report, torch.zeros_like(visual), 4)):
        want = run()
    assert torch.equal(answers[2].sequences, want.sequences)
    assert_close(answers[2].logits, want.logits)


def test_an_answer_that_is_too_short_for_an_action_is_not_remembered() -> None:
    cell: Cell = ("llava", "image")
    model, inputs = tiny("llava"), batch(cell, "plain")
    with compress(model, METHOD) as session:
        for _ in range(4):
            oracle.generate_with_logits(model, inputs, max_new_tokens=TOKENS - 1)
        assert session.report.tokens_out == session.report.tokens_in
