"""VideoScan: carriers, the bank, raw rows, positions and the mask of its second stage, against plain loops."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from mmtoken.compressors import Context, VideoScan
from mmtoken.compressors.base import HeldFrame, StreamFrame
from mmtoken.compressors.videoscan import (
    additive,
    attended,
    duplicate,
    mean_token,
    semantic_mask,
    stage_mask,
    thinned_rate,
)
from mmtoken.errors import InputError, KeepError, MMTokenError, UnsupportedError
from mmtoken.tokens import VisualTokens
from tests.compressors.carrier_stream import CarrierStream, StepContext

WIDTH = 16


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def video(frames: Tensor, columns: int, layout: str = "plain") -> VisualTokens:
    """A video float[F, P, D]: "plain", with one newline at its "end", or with one behind every row ("rows")."""
    count, places, width = frames.shape
    rows = places // columns
    newline = torch.full((width,), 7.0)
    parts, protected = [], []
    for frame in frames:
        for row in frame.split(columns):
            parts += [row, newline[None]] if layout == "rows" else [row]
            protected += [False] * columns + [True] * (layout == "rows")
    if layout == "end":
        parts, protected = [*parts, newline[None]], [*protected, True]
    features = torch.cat(parts)
    return VisualTokens.from_features(
        features[None], protected=torch.tensor(protected)[None], grid=((count, rows, columns),)
    )


# ------------------------------------------------------------------------------------------------------------ carriers


def plain_mean(tokens: list[list[float]]) -> list[float]:
    return [math.fsum(column) / len(tokens) for column in zip(*tokens, strict=True)]


@settings(deadline=None, max_examples=40)
@given(
    frames=st.integers(1, 5),
    rows=st.integers(1, 3),
    columns=st.integers(1, 4),
    layout=st.sampled_from(["plain", "end", "rows"]),
    kind=st.sampled_from(["block", "visual"]),
    streaming=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_frame_becomes_the_mean_of_its_tokens(frames, rows, columns, layout, kind, streaming, seed):
    frames = 1 if streaming else frames
    if layout == "end" and frames * rows == 1:
        return  # one newline behind one row: both layouts are the same
    pixels = random(frames, rows * columns, 5, seed=seed)
    tokens = video(pixels, columns, layout)
    left = VideoScan(carrier=kind).llm_input(tokens, StepContext(tokens) if streaming else Context())
    wanted = []
    for frame in pixels.tolist():
        ends = [[7.0] * 5] * rows if layout == "rows" and kind == "block" else []
        wanted.append(plain_mean(frame + ends))
    if streaming:  # all that came, and the carrier behind it
        assert torch.equal(left.features[0, :-1], tokens.features[0])
        assert left.source[0].tolist() == list(range(tokens.features.shape[1] + 1))
        carriers, size = left.features[0, -1:], left.size[0, -1:]
        assert left.valid.all() and not left.protected[0, -1]
    else:
        separate = left.protected[0] & left.valid[0]
        assert int(separate.sum()) == (layout == "end")  # newlines of rows leave with their frame
        carriers, size = left.features[0, ~separate], left.size[0, ~separate]
        assert left.counts() == tokens.budget(1) == [frames]
        assert left.item[0, ~separate].tolist() == list(range(frames))
        # A carrier stands at the last visual token of its frame.
        wide = columns + (layout == "rows")
        places = [(f * rows + rows - 1) * wide + columns - 1 for f in range(frames)]
        assert left.kept()[0].tolist() == places
    torch.testing.assert_close(carriers, torch.tensor(wanted), atol=1e-5, rtol=1e-5)
    assert size.tolist() == [rows * columns] * frames


def test_constant_frames_carry_their_constant():
    frames = torch.tensor([[0.5, -2.0], [4.0, 1.0]])[:, None].expand(-1, 6, -1)
    left = VideoScan().llm_input(video(frames, 3), Context())
    assert torch.equal(left.features[0], frames[:, 0])


def test_half_precision_is_added_up_in_float32():
    tokens = torch.full((4096, 1), 1.0)
    tokens[0] = 3.0
    assert float(mean_token(tokens.half())) == float(tokens.mean().half())
    assert mean_token(tokens.bfloat16()).dtype == torch.bfloat16
    assert bool(mean_token(torch.full((4, 1), 60000.0).half()).isfinite().all())


def test_gradients_reach_every_token_of_a_frame():
    features = random(2, 6, 3).requires_grad_()
    VideoScan().llm_input(video(features, 3), Context()).features.sum().backward()
    assert torch.allclose(features.grad, torch.full_like(features, 1 / 6))


def test_images_and_items_without_a_grid_are_one_frame():
    features = random(2, 12, 5)
    tokens = VisualTokens.from_features(features, grid=((1, 3, 4), None))
    left = VideoScan().llm_input(tokens, Context())
    assert left.counts() == [1, 1]
    torch.testing.assert_close(left.features[:, 0], features.mean(1))


def test_videos_of_a_padded_batch_are_treated_as_alone():
    features = random(2, 12, 5)
    features[1, 6:] = torch.nan
    valid = torch.arange(12) < torch.tensor([12, 6])[:, None]
    tokens = VisualTokens.from_features(features, valid=valid, grid=((3, 2, 2), (2, 1, 3)))
    for context in (lambda _: Context(), StepContext):
        both = VideoScan().llm_input(tokens, context(tokens))
        for row, length in enumerate((12, 6)):
            alone = VisualTokens.from_features(features[row : row + 1, :length], grid=(tokens.grid[row],))
            want = VideoScan().llm_input(alone, context(alone))
            here = both.valid[row]
            assert torch.equal(both.features[row, here], want.features[0])
            assert torch.equal(both.source[row, here], want.source[0])


def test_what_an_earlier_method_left_of_a_frame_is_its_mean():
    frames = random(3, 4, 5)
    tokens = video(frames, 2).where(torch.tensor([[True] * 4 + [False] * 4 + [True, False, False, True]]))
    left = VideoScan().llm_input(tokens, Context())
    assert left.counts() == [2]  # nothing was left of the second frame
    torch.testing.assert_close(left.features[0], torch.stack([frames[0].mean(0), frames[2, [0, 3]].mean(0)]))
    assert left.item[0].tolist() == [0, 2]


def test_the_carrier_stands_behind_the_whole_step_whatever_is_left_of_it():
    whole = video(random(1, 4, 5), 2, "rows")
    left = whole.where(whole.protected | (whole.source == 0))
    carried = VideoScan().llm_input(left, StepContext(whole))
    assert carried.source[0][carried.valid[0]].tolist() == [0, 2, 5, 6]  # two newlines stay


def test_the_plain_model_at_keep_one_point_nought():
    tokens = video(random(3, 4, 5), 2, "rows")
    for context in (Context(), StepContext()):
        assert VideoScan(keep=1.0).llm_input(tokens, context) is tokens
    method, frames = VideoScan(keep=1.0, bank=2), held([(1.0, 0.0)] * 5)
    assert method.retain(step(4), StepContext()).tolist() == [0, 1, 2, 3]
    assert method.evict(frames, False, StepContext()) is None and method.evict(frames, True, StepContext()) == 0


@pytest.mark.parametrize("keep", [0.5, 2, 64, 0.99])
def test_there_is_no_budget_between_a_carrier_and_the_plain_model(keep):
    with pytest.raises(KeepError, match=rf"keep={keep}: .*give 1 .* or 1\.0"):
        VideoScan(keep=keep)


@pytest.mark.parametrize("streaming", [False, True])
def test_not_a_number_in_a_frame_is_an_error(streaming):
    frames = random(1, 4, 5)
    frames[0, 1, 2] = math.nan
    with pytest.raises(InputError, match="features contains NaN for item 0"):
        VideoScan().llm_input(video(frames, 2), StepContext() if streaming else Context())


def test_a_stream_without_keys_and_values_gets_the_carriers_of_generate():
    tokens = video(random(1, 6, 5), 3, "rows")
    alone = VideoScan(without="kv").llm_input(tokens, StepContext())
    offline = VideoScan().llm_input(tokens, Context())
    assert torch.equal(alone.features, offline.features) and alone.features.shape[1] == 1


def test_a_stream_without_the_embedding_appends_zeros():
    tokens = video(random(1, 6, 5), 3, "rows")
    left = VideoScan(without="embedding").llm_input(tokens, StepContext(tokens))
    assert torch.equal(left.features[0, :-1], tokens.features[0]) and not left.features[0, -1].any()
    # In generate() there is nothing but the embedding.
    offline = VideoScan(without="embedding").llm_input(tokens, Context())
    assert torch.equal(offline.features, VideoScan().llm_input(tokens, Context()).features)


def test_raw_rows_need_raw_tokens():
    with pytest.raises(MMTokenError, match="extra_kv=2 cannot be with without='kv'"):
        VideoScan(without="kv", extra_kv=2)


# ------------------------------------------------------------------------------------------------------------ the bank


def held(carriers: list[tuple[float, ...]]) -> list[HeldFrame]:
    return [HeldFrame(number, float(number), 1, torch.tensor(values)) for number, values in enumerate(carriers)]


def plain_duplicate(carriers: list[list[float]]) -> int:
    best, found = -2.0, -1
    for j in range(len(carriers) - 1):
        a, b = carriers[j], carriers[j + 1]
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        cosine = dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
        if cosine > best:
            best, found = cosine, j
    return found


def test_the_older_of_the_most_similar_neighbours_leaves():
    carriers = torch.tensor([(1, 0), (0.9, 0.1), (0, 1), (0.05, 1), (1, 1)])
    cosines = torch.nn.functional.cosine_similarity(carriers[:-1], carriers[1:])
    torch.testing.assert_close(cosines, torch.tensor([0.993884, 0.110432, 0.998752, 0.741536]), atol=1e-6, rtol=0)
    assert duplicate(carriers) == 2
    assert duplicate(torch.tensor([(1.0, 0.0)] * 4)) == 0  # the first on ties
    assert duplicate(torch.zeros(3, 2)) == 0
    for wrong in (carriers[:1], carriers[0]):
        with pytest.raises(InputError, match="give"):
            duplicate(wrong)
    with pytest.raises(InputError, match="NaN"):
        duplicate(torch.tensor([(1.0, 0.0), (torch.nan, 0.0)]))


@settings(deadline=None, max_examples=60)
@given(bank=st.integers(2, 6), frames=st.integers(1, 20), seed=st.integers(0, 999))
def test_a_bank_holds_one_less_than_its_size_in_order_and_always_the_newest(bank, frames, seed):
    method, carriers = VideoScan(bank=bank), random(frames, 4, seed=seed).double()
    here: list[int] = []
    for number in range(frames):
        here.append(number)
        row = [HeldFrame(i, 0.0, 1, carriers[i].float()) for i in here]
        left = method.evict(row, False, StepContext()) if len(here) > 1 else None
        if len(here) < bank:
            assert left is None
        else:
            assert left == plain_duplicate([carriers[i].tolist() for i in here])
            del here[left]
        assert here == sorted(here) and here[-1] == number
        assert len(here) == min(number + 1, bank - 1)


def test_a_stream_that_may_hold_less_evicts_by_the_same_rule():
    frames = held([(1, 0), (0.9, 0.1), (0, 1), (0.05, 1), (1, 1)])
    for bank in (64, None):
        assert VideoScan(bank=bank).evict(frames, False, StepContext()) is None
        assert VideoScan(bank=bank).evict(frames, True, StepContext()) == 2
    assert VideoScan(bank=None).evict(frames * 30, False, StepContext()) is None


# ------------------------------------------------------------------------------------------------------------ raw rows


def step(rows: int, layers: int = 3, seed: int = 0) -> StreamFrame:
    scores = random(layers, rows, seed=seed).softmax(-1)
    keys = [torch.zeros(1, rows, 2)] * layers

    def attention(layer: int, row: int) -> Tensor:
        assert row == -1  # the carrier
        return scores[layer]

    return StreamFrame(0, 0.0, torch.zeros(rows, 5), keys, keys, attention)


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 9), extra=st.integers(0, 12), seed=st.integers(0, 99), one=st.sampled_from([None, 0, 2]))
def test_the_rows_that_a_carrier_attends_to_are_held_in_order_before_it(rows, extra, seed, one):
    frame = step(rows, seed=seed)
    kept = VideoScan(extra_kv=extra, kv_select_layer=one).retain(frame, StepContext())
    for layer in range(3):
        mine = (kept if isinstance(kept, Tensor) else kept[layer]).tolist()
        scores = frame.attention(one if one is not None and extra else layer, -1).tolist()[:-1]
        ranked = sorted(range(rows - 1), key=lambda i: (-scores[i], i))[:extra]
        assert mine == [*sorted(ranked), rows - 1]


def test_equal_attention_goes_to_the_first_rows_and_layers_must_exist():
    assert attended(torch.ones(4), 2).tolist() == [0, 1]
    with pytest.raises(UnsupportedError, match="kv_select_layer=3 but this decoder has 3 layers; choose from 0 to 2"):
        VideoScan(extra_kv=1, kv_select_layer=3).retain(step(4), StepContext())


# ---------------------------------------------------------------------------------------------------------- frame rate


@pytest.mark.parametrize(
    ("seconds", "n"),
    [(1, 1), (300, 1), (300.5, 2), (600, 2), (601, 3), (900, 3), (901, 4), (1280, 4), (1281, 5), (9000, 5)],
)
def test_long_videos_are_read_less_often(seconds, n):
    assert thinned_rate(seconds) == pytest.approx(1 / n)
    assert thinned_rate(seconds, 2.0) == pytest.approx(2 / n)


# ---------------------------------------------------------------------------------------------------- the training mask


def plain_mask(system: int, frames: int, block: int, text: int) -> list[list[bool]]:
    """Who sees whom, from the words of the definition."""
    parts = [("sys", 0, i) for i in range(system)]
    parts += [("frame", f, j) for f in range(frames) for j in range(block)]
    parts += [("text", 0, i) for i in range(text)]

    def sees(me: tuple[str, int, int], other: tuple[str, int, int]) -> bool:
        kind, f, j = other
        carrier = kind == "frame" and j == block - 1
        if me[0] == "sys":
            return kind == "sys" and j <= me[2]
        if kind == "sys":
            return True
        if me[0] == "frame":
            return kind == "frame" and ((carrier and f < me[1]) or (f == me[1] and j <= me[2]))
        return carrier or (kind == "text" and j <= me[2])

    return [[sees(me, other) for other in parts] for me in parts]


@pytest.mark.parametrize(
    ("sizes", "pairs"), [((2, 2, 3, 2), 41), ((3, 4, 5, 2), 173), ((14, 8, 211, 20), 209223)], ids=str
)
def test_how_many_pairs_the_mask_allows(sizes, pairs):
    system, frames, block, text = sizes
    formula = (
        system * (system + 1) // 2
        + sum(system + f + j + 1 for f in range(frames) for j in range(block))
        + sum(system + frames + i + 1 for i in range(text))
    )
    assert int(stage_mask(*sizes).sum()) == formula == pairs


@settings(deadline=None, max_examples=30)
@given(system=st.integers(0, 4), frames=st.integers(0, 4), block=st.integers(1, 4), text=st.integers(0, 4))
def test_the_mask_is_what_its_words_say(system, frames, block, text):
    mask = stage_mask(system, frames, block, text)
    assert mask[0, 0].tolist() == plain_mask(system, frames, block, text)
    added = additive(mask, torch.float16)
    assert torch.equal(added == 0, mask) and added.dtype == torch.float16 and bool(added.isfinite().all())


def test_questions_about_one_video_do_not_see_each_other():
    segment = torch.tensor([[-1, 0, 0, 1, 1, 2, 2, 3]])
    shared = torch.tensor([[True, False, True, False, True, False, False, False]])
    mask = semantic_mask(segment, shared)
    assert mask.shape == (1, 1, 8, 8)
    assert mask[0, 0, 6].tolist() == [True, False, True, False, True, True, True, False]
    assert mask[0, 0, 7].tolist() == [True, False, True, False, True, False, False, True]


# -------------------------------------------------------------------------------------------------- in a language model

FRAMES, PLACES, SYSTEM, TEXT = 4, 6, 3, 5
SIZES = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 3, "vocab_size": 30}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@functools.cache
def language_model(family: str, attention: str = "eager") -> Any:
    torch.manual_seed(0)
    config, kind = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[family]
    model = kind(config(**SIZES, **HEADS, initializer_range=0.3, attn_implementation=attention))
    return model.eval()


def sequence(frames: Tensor) -> Tensor:
    """float[L, D]: text, every frame with its carrier behind it, text."""
    blocks = torch.cat([frames, frames.mean(1, keepdim=True)], 1).flatten(0, 1)
    return torch.cat([random(SYSTEM, WIDTH, seed=5), blocks, random(TEXT, WIDTH, seed=6)])


def frames_of(seed: int = 3) -> Tensor:
    return random(FRAMES, PLACES, WIDTH, seed=seed)


@torch.no_grad()
def one_shot(model: Any, frames: Tensor, mask: Tensor | None = None) -> Tensor:
    """float[text, V]: logits of the text behind the video, at contiguous positions."""
    embeds = sequence(frames)[None]
    if mask is None:
        mask = stage_mask(SYSTEM, FRAMES, PLACES + 1, TEXT)
    if model.config._attn_implementation == "eager":
        mask = additive(mask, embeds.dtype)
    positions = torch.arange(embeds.shape[1])[None]
    logits: Tensor = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits[0, -TEXT:]
    return logits


@torch.no_grad()
def streamed(model: Any, frames: Tensor, policy: str, **options: Any) -> tuple[Tensor, CarrierStream]:
    """The same logits, from a stream that lets go of every frame but its carrier; and the stream."""
    stream = CarrierStream(model.model, VideoScan(**options), random(SYSTEM, WIDTH, seed=5), policy)
    for frame in frames:
        stream.push(video(frame[None], 3))
    return model.lm_head(stream.ask(random(TEXT, WIDTH, seed=6))), stream


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_one_pass_under_the_mask_is_the_stream_at_the_same_positions(family):
    model = language_model(family)
    want = one_shot(model, frames_of())
    torch.testing.assert_close(streamed(model, frames_of(), "true")[0], want, atol=1e-5, rtol=1e-4)
    compressed = streamed(model, frames_of(), "repo")[0]
    assert float((compressed - want).abs().max()) > 1e-2


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_any_decoder_takes_the_mask_as_bools_and_as_numbers(family):
    eager, fused = (one_shot(language_model(family, kind), frames_of()) for kind in ("eager", "sdpa"))
    torch.testing.assert_close(eager, fused, atol=1e-5, rtol=1e-4)


@contextmanager
def carriers_fixed(model: Any, states: dict[Any, Tensor], *, write: bool) -> Iterator[None]:
    """Note keys and values at the places of carriers, or write those noted before there."""
    places = SYSTEM + torch.arange(1, FRAMES + 1) * (PLACES + 1) - 1

    def hook(module: Any, args: Any, output: Tensor) -> Tensor | None:
        if not write:
            states[module] = output[:, places].clone()
            return None
        output = output.clone()
        output[:, places] = states[module]
        return output

    handles = []
    for layer in model.model.layers:
        handles += [part.register_forward_hook(hook) for part in (layer.self_attn.k_proj, layer.self_attn.v_proj)]
    yield
    for handle in handles:
        handle.remove()


def test_text_reads_frames_through_the_keys_and_values_of_carriers_only():
    model, before, after = language_model("qwen2"), frames_of(), frames_of()
    after[2] = random(PLACES, WIDTH, seed=77)
    causal = torch.ones(1, 1, *[len(sequence(before))] * 2, dtype=torch.bool).tril()
    for mask, same in ((None, True), (causal, False)):
        states: dict[Any, Tensor] = {}
        with carriers_fixed(model, states, write=False):
            want = one_shot(model, before, mask)
        with carriers_fixed(model, states, write=True):
            got = one_shot(model, after, mask)
        assert torch.allclose(got, want, atol=1e-6) == same
        assert not torch.allclose(one_shot(model, after, mask), want, atol=1e-3)  # through the carriers it does matter


@pytest.mark.parametrize("extra", [0, 2])
def test_what_is_held_does_not_depend_on_the_query(extra):
    model = language_model("qwen2")
    caches = []
    for length in (0, 1, 4):
        method = VideoScan(extra_kv=extra)
        stream = CarrierStream(model.model, method, random(SYSTEM, WIDTH, seed=5), "repo")
        with torch.no_grad():
            for number, frame in enumerate(frames_of()):
                stream.push(video(frame[None], 3), random(length, WIDTH, seed=8))
                assert stream.cache.get_seq_length() == SYSTEM + (number + 1) * (1 + extra)
        caches.append(torch.stack([layer.keys for layer in stream.cache.layers]))
    for other in caches[1:]:
        torch.testing.assert_close(other, caches[0], atol=1e-5, rtol=1e-4)


def test_a_full_bank_takes_the_same_bytes_from_then_on():
    model, frames, bank = language_model("qwen2"), random(9, PLACES, WIDTH, seed=4), 4
    stream = CarrierStream(model.model, VideoScan(bank=bank), random(SYSTEM, WIDTH, seed=5), "repo")
    held_bytes = []
    with torch.no_grad():
        for frame in frames:
            stream.push(video(frame[None], 3))
            tensors = [part for layer in stream.cache.layers for part in (layer.keys, layer.values)]
            held_bytes.append(sum(part.numel() * part.element_size() for part in tensors))
    full = 2 * 3 * 2 * (WIDTH // 4) * 4 * (SYSTEM + bank - 1)  # keys and values, layers, heads, head width, bytes
    assert held_bytes[bank - 1 :] == [full] * (9 - bank + 1) and held_bytes[0] < full


def test_carriers_without_embedding_still_gather_the_frame_and_the_oldest_leaves():
    model = language_model("qwen2")
    plain, stream = streamed(model, frames_of(), "true", without="embedding", bank=3)
    other, _ = streamed(model, frames_of(seed=9), "true", without="embedding", bank=3)
    assert float((plain - other).abs().max()) > 1e-2
    assert [frame.number for frame in stream.held] == [SYSTEM + 3 * (PLACES + 1), SYSTEM + 4 * (PLACES + 1)]


def test_carriers_without_keys_and_values_of_their_frame_are_the_sequence_of_carriers():
    model = language_model("qwen2")
    got, _ = streamed(model, frames_of(), "true", without="kv")
    embeds = torch.cat([random(SYSTEM, WIDTH, seed=5), frames_of().mean(1), random(TEXT, WIDTH, seed=6)])
    with torch.no_grad():
        want = model(inputs_embeds=embeds[None]).logits[0, -TEXT:]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
