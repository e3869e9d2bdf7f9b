"""Streams in which rows leave are one pass over everything under the mask of what was held, at true positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import mmtoken
from mmtoken.compressors import DyCoke, ReKV, STCCacher, STCPruner
from mmtoken.compressors.base import Compressor
from tests.streaming import oneshot
from tests.streaming.methods import Loudest, SecondOldest, Thins, held_rows
from tests.streaming.offline import FAMILIES, answered, clip, generated, inputs, parts, push_all

QUESTION = "How many cats are there?"


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def stream_logits(model: Any, processor: Any, video: Any, method: Compressor | None, **more: Any) -> torch.Tensor:
    with mmtoken.stream(model, processor, method, **more) as live:
        push_all(live, video)
        return answered(live, QUESTION, 1)[1][0]


# With "renumber" generate() closes the box of a whole video of Qwen2.5-VL, a stream that of every step.
@pytest.mark.parametrize(
    ("family", "positions"),
    [*((f, "keep") for f in FAMILIES), *((f, "renumber") for f in FAMILIES if f != "qwen2_5_vl")],
)
def test_tokens_that_never_enter_are_as_in_generate(family: str, positions: str) -> None:
    model, processor = parts(family)
    video, method = clip(6), Loudest(keep=2, positions=positions)  # type: ignore[arg-type]
    with torch.no_grad(), mmtoken.compress(model, method):
        expected, logits = generated(model, inputs(processor, video, QUESTION), 5)
    with mmtoken.stream(model, processor, method, positions="true", memory_tokens=10_000) as live:
        push_all(live, video)
        tokens, found = answered(live, QUESTION, 5)
    assert tokens == expected
    close(found, logits)


def held_at(order: Sequence[int], rows: list[list[int]]) -> list[int]:
    return [row for step in order for row in rows[step]]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oldest_leave(family: str) -> None:
    model, processor = parts(family)
    video = clip(6)
    given = oneshot.prompt(model, processor, video, QUESTION)
    frames = len(given.steps)
    length = given.steps[0][1] - given.steps[0][0]
    rows = [list(range(first, end)) for first, end in given.steps]
    held = 2 if frames > 3 else 1  # steps that fit the bound
    allowed = oneshot.mask(
        given,
        lambda step: held_at(range(max(0, step - held), step), rows),
        held_at(range(frames - held, frames), rows),
    )
    expected = oneshot.run(given, lambda layer, hidden: allowed)
    found = stream_logits(model, processor, video, None, positions="true", memory_tokens=held * length)
    close(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_hold_rows_of_their_own(family: str) -> None:
    model, processor = parts(family)
    video = clip(6)
    given = oneshot.prompt(model, processor, video, QUESTION)
    frames = len(given.steps)

    def masks(layer: int, hidden: torch.Tensor) -> torch.Tensor:
        rows = [(held_rows(end - first, layer) + first).tolist() for first, end in given.steps]
        return oneshot.mask(given, lambda step: held_at(range(step), rows), held_at(range(frames), rows))

    expected = oneshot.run(given, masks)
    close(stream_logits(model, processor, video, Thins(), positions="true", memory_tokens=10_000), expected)


def test_a_method_decides_which_step_leaves() -> None:
    model, processor = parts("llava_onevision")
    video = clip(7)
    given = oneshot.prompt(model, processor, video, QUESTION)
    rows = [list(range(first, end)) for first, end in given.steps]
    held: list[int] = []
    before: list[list[int]] = []
    for step in range(len(rows)):
        before.append(list(held))
        held.append(step)
        while len(held) > 3:
            held.pop(1)
    allowed = oneshot.mask(given, lambda step: held_at(before[step], rows), held_at(held, rows))
    expected = oneshot.run(given, lambda layer, hidden: allowed)
    close(stream_logits(model, processor, video, SecondOldest(most=3), positions="true"), expected)


@pytest.mark.parametrize("method", [None, Thins()])
def test_held_rows_are_placed_without_gaps(method: Compressor | None) -> None:
    """With one layer keys depend on embeddings only, so a fresh pass over what is held must give the same."""
    model, processor = parts("llava_onevision", layers=1)
    video = clip(6)
    given = oneshot.prompt(model, processor, video, QUESTION)
    rows = [list(range(first, end)) for first, end in given.steps]
    if method is not None:
        rows = [[row[place] for place in held_rows(len(row), 0).tolist()] for row in rows]
    bound = sum(map(len, rows[-3:]))
    held = [*range(given.start), *held_at(range(3, 6), rows), *range(given.end, len(given.embeddings))]
    fresh = oneshot.Prompt(model, given.embeddings[held], torch.arange(len(held))[None], [(0, 0)], given.visual[:0], [])
    allowed = torch.ones(len(held), len(held), dtype=torch.bool).tril()
    expected = oneshot.run(fresh, lambda layer, hidden: allowed)
    close(stream_logits(model, processor, video, method, memory_tokens=bound), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_agree_while_nothing_leaves(family: str) -> None:
    model, processor = parts(family)
    found = [
        stream_logits(model, processor, clip(6), None, positions=policy, memory_tokens=10_000)
        for policy in ("true", "contiguous")
    ]
    close(found[1], found[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_comes_after_does_not_depend_on_what_left_long_ago(family: str) -> None:
    """Contiguous positions of the last steps are those of a stream that began with them, if these saw nothing else."""
    model, processor = parts(family, layers=1)
    frames = 2 if family.startswith("qwen") else 1
    with mmtoken.stream(model, processor, memory_tokens=10_000) as live:
        push_all(live, clip(8)[:frames])
        length = live.report.kv_tokens
    bound = 2 * length
    with mmtoken.stream(model, processor, memory_tokens=bound) as long:
        push_all(long, clip(8))
        found = answered(long, QUESTION, 3)[1]
    with mmtoken.stream(model, processor, memory_tokens=bound) as short:
        push_all(short, clip(8)[-2 * frames :], first=8 - 2 * frames)
        expected = answered(short, QUESTION, 3)[1]
    close(found, expected)


# --- retrieval --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["true", "contiguous"])
@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_retrieving_everything_is_the_dense_stream(family: str, window: bool, positions: str) -> None:
    model, processor = parts(family)
    method = ReKV(keep=1.0, window=window)
    found = stream_logits(model, processor, clip(6), method, positions=positions, memory_tokens=10_000)
    expected = stream_logits(model, processor, clip(6), None, positions=positions, memory_tokens=10_000)
    close(found, expected)


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_brings_back_its_own_steps(family: str, window: bool) -> None:
    model, processor = parts(family)
    video = clip(10 if family.startswith("qwen") else 6)
    if family == "qwen3_vl":
        video = video[:6]
    given = oneshot.prompt(model, processor, video, QUESTION)
    rows = [list(range(first, end)) for first, end in given.steps]
    frames, keep = len(rows), 2 if len(rows) > 3 else 1
    words = _words(processor, given)
    decoder = model.base_model.language_model
    keys: dict[int, torch.Tensor] = {}
    chosen_by: list[tuple[int, ...]] = []

    def masks(layer: int, hidden: torch.Tensor) -> torch.Tensor:
        module = decoder.layers[layer].self_attn
        normed = decoder.layers[layer].input_layernorm(hidden)

        def heads(name: str) -> torch.Tensor:
            states = getattr(module, f"{name}_proj")(normed).view(len(hidden), -1, module.head_dim)
            return getattr(module, f"{name}_norm")(states) if hasattr(module, f"{name}_norm") else states

        queries, states = heads("q"), heads("k")
        keys[layer] = states
        share = queries.shape[1] // states.shape[1]
        question = queries[words].mean(0)
        candidates = range(frames - 1) if window else range(frames)
        scores = []
        for step in candidates:
            mean = states[rows[step]].mean(0).repeat_interleave(share, 0)
            scores.append(float((mean * question).sum()))
        best = sorted(sorted(candidates, key=lambda step: -scores[step])[:keep])
        chosen_by.append(tuple(best))
        asked = [*best, frames - 1] if window else best
        return oneshot.mask(given, lambda step: held_at(range(max(0, step - 1), step), rows), held_at(asked, rows))

    expected = oneshot.run(given, masks)
    method = ReKV(keep=keep, window=window)
    bound = max(map(len, rows))
    found = stream_logits(model, processor, video, method, positions="true", memory_tokens=bound)
    close(found, expected)
    assert frames < 4 or len(set(chosen_by)) > 1  # layers differ, or the test would say little


def _words(processor: Any, given: oneshot.Prompt) -> list[int]:
    """Rows of the question's own words."""
    ids = processor.tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    tail = processor.tokenizer(text.partition(QUESTION)[2], add_special_tokens=False)["input_ids"]
    end = len(given.embeddings) - len(tail)
    return list(range(end - len(ids), end))


def test_the_attention_that_a_row_paid_is_that_of_the_model() -> None:
    model, processor = parts("llava_onevision", attn="eager")
    video = clip(4)
    given = oneshot.prompt(model, processor, video, QUESTION)
    allowed = torch.ones(len(given.embeddings), len(given.embeddings), dtype=torch.bool).tril()
    oneshot.run(given, lambda layer, hidden: allowed)
    seen = []

    class Notes(Thins):
        def retain(self, frame: Any, ctx: Any) -> torch.Tensor:
            seen.append([[frame.attention(layer, row) for row in (0, -1)] for layer in range(4)])
            return torch.arange(len(frame.embeddings))

    with mmtoken.stream(model, processor, Notes(), positions="true", memory_tokens=1000) as live:
        push_all(live, video)
    for number, (first, end) in enumerate(given.steps):
        for layer in range(4):
            for place, row in ((0, first), (1, end - 1)):
                expected = given.attention[layer][:, row, first:end].mean(0)
                torch.testing.assert_close(seen[number][layer][place], expected, atol=1e-5, rtol=1e-4)


# --- methods of the library -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [STCPruner(keep=2), STCPruner(keep=0.5, positions="keep"), DyCoke()])
@pytest.mark.parametrize("family", ["llava_onevision", "llava_video", "qwen3_vl"])
def test_methods_that_take_frames_in_order_leave_the_same_in_a_stream(family: str, method: Compressor) -> None:
    model, processor = parts(family)
    video = clip(6)
    with torch.no_grad(), mmtoken.compress(model, method) as session:
        logits = generated(model, inputs(processor, video, QUESTION), 2)[1]
        assert session.report.tokens_out[0] < session.report.tokens_in[0]
    with mmtoken.stream(model, processor, method, positions="true", memory_tokens=10_000) as live:
        push_all(live, video)
        close(answered(live, QUESTION, 2)[1], logits)


def test_a_tower_that_reuses_frames_goes_on_from_push_to_push() -> None:
    model, processor = parts("llava_onevision")
    method = STCCacher(keep=0.5)
    with torch.no_grad(), mmtoken.compress(model, method):
        logits = generated(model, inputs(processor, clip(6), QUESTION), 2)[1]
    with mmtoken.stream(model, processor, method, positions="true", memory_tokens=10_000) as live:
        push_all(live, clip(6))
        found = answered(live, QUESTION, 2)[1]
    close(found, logits)
    dense = stream_logits(model, processor, clip(6), None, positions="true", memory_tokens=10_000)
    assert (found[0] - dense).abs().max() > 1e-3
