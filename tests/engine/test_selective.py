"""Towers that compute some patches of a frame: against plain loops, frame by frame and one attention row at a time.

The loops share no code with the engine: they read the weights of the plain model's blocks, go through the frames of
each video in order, and hold one reference.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmtoken
from mmtoken import compress
from mmtoken.compressors import Context, DivPrune, DyCoke, FlowCut, Sequential, STCCacher, VisionZip
from mmtoken.engine.flops import TowerShape, block_multiply_adds
from mmtoken.engine.reuse import VideoState
from mmtoken.engine.session import Session
from mmtoken.errors import InputError, UnsupportedError
from tests import oracle
from tests.backbones.tiny_models import build, inputs, video_families
from tests.engine.agreement import tiny, tower_of

VIDEO = video_families()
BARE = ("clip_vision", "siglip_vision")
SETTINGS = {
    "default": STCCacher(),
    "half": STCCacher(keep=0.5, interval=3),
    "shared": STCCacher(keep=3, interval=4, share_selection=True),
    "distance": STCCacher(keep=0.4, similarity="l1"),
    "chunks": STCCacher(keep=0.3, chunk=2),
}


# ------------------------------------------------------------------------------------------------------ plain loops


@dataclass
class SlowBlock:
    """What a block of a plain tower has, whatever its family calls it."""

    first: nn.Module
    second: nn.Module
    mlp: nn.Module
    query: tuple[Tensor, Tensor]
    key: tuple[Tensor, Tensor]
    value: tuple[Tensor, Tensor]
    out: nn.Linear
    heads: int

    @classmethod
    def of(cls, block: Any, heads: int) -> SlowBlock:
        if hasattr(block, "self_attn"):
            a = block.self_attn
            parts = [(p.weight, p.bias) for p in (a.q_proj, a.k_proj, a.v_proj)]
            return cls(block.layer_norm1, block.layer_norm2, block.mlp, *parts, a.out_proj, heads)
        parts = list(zip(block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True))
        return cls(block.norm1, block.norm2, block.mlp, *parts, block.attn.proj, heads)


def turned(vectors: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """A head's queries or keys float[T, d], rotated pair by pair (i, i + d / 2)."""
    half = vectors.shape[1] // 2
    first, second = vectors[:, :half], vectors[:, half:]
    low = first * cosine[:, :half] - second * sine[:, :half]
    return torch.cat([low, second * cosine[:, half:] + first * sine[:, half:]], 1)


@dataclass
class Frame:
    """A frame at the input of a block: float[T, D], rotary tables float[T, d] or None, segment of each patch."""

    hidden: Tensor
    rotary: tuple[Tensor, Tensor] | None
    segments: list[int]


Buffers = tuple[Tensor, Tensor, Tensor, Tensor]


def slow_block(block: SlowBlock, frame: Frame, chosen: list[int], reference: Buffers | None) -> tuple[Tensor, Buffers]:
    """A block's output when only `chosen` patches are computed, and (K, V, A, M) as this frame ends up with."""
    normed = block.first(frame.hidden)
    length, width = frame.hidden.shape
    d = width // block.heads
    # Queries and values of all patches are at hand; only those of chosen ones are looked at.
    queries, keys, fresh = (normed @ weight.T + bias for weight, bias in (block.query, block.key, block.value))
    values, added, more = ([*part] for part in reference[1:]) if reference else ([None] * length for _ in range(3))
    for t in chosen:
        values[t] = fresh[t]
    seen = torch.tensor(frame.segments)[:, None] == torch.tensor(frame.segments)
    heads = []
    for h in range(block.heads):
        part = slice(h * d, (h + 1) * d)
        q, k, v = queries[:, part], keys[:, part], torch.stack(values)[:, part]
        if frame.rotary is not None:
            q, k = turned(q, *frame.rotary), turned(k, *frame.rotary)
        weights = (q @ k.T / math.sqrt(d)).exp() * seen
        heads.append(weights / weights.sum(1, keepdim=True) @ v)
    mixed = block.out(torch.cat(heads, 1))
    for t in chosen:
        added[t] = mixed[t]
    middle = frame.hidden + torch.stack(added)
    for t in chosen:
        more[t] = block.mlp(block.second(middle[t][None]))[0]
    return middle + torch.stack(more), (keys, torch.stack(values), torch.stack(added), torch.stack(more))


def slow_choice(method: STCCacher, keys: Tensor, reference: Tensor) -> list[int]:
    length = len(keys)
    count = min(max(int(length * method.keep) if isinstance(method.keep, float) else method.keep, 1), length)
    if method.similarity == "cosine":
        close = [float((torch.dot(a, b) / a.norm() / b.norm()).detach()) for a, b in zip(keys, reference, strict=True)]
    else:
        close = [-float((a - b).abs().sum().detach()) for a, b in zip(keys, reference, strict=True)]
    return sorted(sorted(range(length), key=lambda t: (close[t], t))[:count])


@dataclass
class Slow:
    """What the loops say: outputs per block and frame, what was chosen, and the last references."""

    outputs: list[list[Tensor]]
    chosen: dict[tuple[int, int], list[int]]
    references: dict[int, list[Buffers]]


def slow_tower(method: STCCacher, blocks: list[SlowBlock], videos: list[list[list[Frame]]]) -> Slow:
    """Every frame of every video through all blocks; frames are those of the plain model's first block.

    Args:
        method: the settings.
        blocks: of the tower.
        videos: per video and frame, one entry per block (its `hidden` counts in the first only).
    """
    slow = Slow([[] for _ in blocks], {}, {})
    place = 0
    for number, video in enumerate(videos):
        reference: list[Buffers] = []
        for count, frame in enumerate(video):
            hidden, buffers, first = frame[0].hidden, [], None
            whole = (count // method.chunk) % method.interval == 0
            for b, block in enumerate(blocks):
                now = dataclasses.replace(frame[b], hidden=hidden)
                if whole:
                    chosen = list(range(len(hidden)))
                else:
                    keys = torch.stack([block.key[0] @ z + block.key[1] for z in block.first(hidden)])
                    chosen = slow_choice(method, keys, reference[b][0])
                    if method.share_selection:
                        first = chosen if first is None else first
                        chosen = first
                    slow.chosen[place, b] = chosen
                hidden, made = slow_block(block, now, chosen, None if whole else reference[b])
                buffers.append(made)
                slow.outputs[b].append(hidden)
            if whole:
                reference = buffers
            place += 1
        slow.references[number] = reference
    return slow


@contextmanager
def watching(blocks: nn.ModuleList) -> Iterator[tuple[list[Any], list[Tensor]]]:
    """(hidden, keyword arguments) that enter each block, and what each puts out, in the order of the calls."""
    entered: list[Any] = []
    left: list[Tensor] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        entered.append((args[0] if args else kwargs["hidden_states"], kwargs))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        left.append(output if isinstance(output, Tensor) else output[0])

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(after) for block in blocks]
    try:
        yield entered, left
    finally:
        for handle in handles:
            handle.remove()


def frames_of(entered: list[Any], shapes: list[tuple[int, int]], depth: int) -> list[list[list[Frame]]]:
    """Per video of (frames, patches) and frame, what enters each block."""
    videos, start, tile = [], 0, 0
    for frames, patches in shapes:
        video = []
        for _ in range(frames):
            parts = []
            for hidden, kwargs in entered[:depth]:
                if hidden.ndim == 3:
                    parts.append(Frame(hidden[tile], None, [0] * hidden.shape[1]))
                    continue
                rows = slice(start, start + patches)
                bounds = kwargs["cu_seqlens"].tolist()
                inside = [sum(bound <= place for bound in bounds) for place in range(start, start + patches)]
                cosine, sine = kwargs["position_embeddings"]
                parts.append(Frame(hidden[rows], (cosine[rows], sine[rows]), inside))
            video.append(parts)
            start, tile = start + patches, tile + 1
        videos.append(video)
    return videos


def shapes_of(batch: dict[str, Tensor]) -> list[tuple[int, int]]:
    """(frames, patches) of each video of a batch; CLS is one of them where the tower has it."""
    if "video_grid_thw" in batch:
        return [(t, h * w) for t, h, w in batch["video_grid_thw"].tolist()]
    videos, frames, *_, side = batch["pixel_values_videos"].shape
    return [(frames, {42: 3 * 3, 56: 1 + 4 * 4}[side])] * videos


@dataclass(frozen=True)
class Watched(STCCacher):
    """Notes what is asked and chosen."""

    asked: list[tuple[int, Tensor, Tensor, Tensor]] = field(default_factory=list, compare=False)

    def refresh(self, keys: Tensor, reference: Tensor, block: int, ctx: Context) -> Tensor:
        index = super().refresh(keys, reference, block, ctx)
        self.asked.append((block, index, keys.detach(), reference.detach()))
        return index


def watched(method: STCCacher) -> Watched:
    return Watched(**method.settings())


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def encode(model: Any, batch: dict[str, Tensor]) -> Any:
    """The encoder's output for the videos of a batch."""
    base = model.base_model
    if "video_grid_thw" in batch:
        return base.get_video_features(batch["pixel_values_videos"], batch["video_grid_thw"]).pooler_output
    # 5.17 names the argument `pixel_values`
    return base.get_video_features(batch["pixel_values_videos"]).pooler_output


# ------------------------------------------------------------------------------------------- against the plain loops


@pytest.mark.parametrize(
    ("name", "case", "attention"),
    [*((name, "single", "sdpa") for name in SETTINGS), ("default", "padded_ragged", "eager")],
)
@pytest.mark.parametrize("family", VIDEO)
@torch.no_grad()
def test_every_block_puts_out_what_plain_loops_do(family: str, name: str, case: str, attention: str) -> None:
    model, method = build(family, attention), SETTINGS[name]
    batch = inputs(model, family, "video", case, seed=7)
    _, blocks, heads = tower_of(model)
    shapes = shapes_of(batch)
    with watching(blocks) as (entered, _):
        encode(model, batch)
    videos = frames_of(entered, shapes, len(blocks))
    slow = slow_tower(method, [SlowBlock.of(block, heads) for block in blocks], videos)
    with compress(model, method) as session, watching(blocks) as (_, left):
        model(**batch)
    assert len(left) == len(blocks)
    sizes = [patches for frames, patches in shapes for _ in range(frames)]
    for block, output in enumerate(left):
        want = torch.cat(slow.outputs[block])
        close(output.reshape(want.shape), want)
    sites = [site for site in session.report.sites if site.site == "refresh"]
    assert [site.layer for site in sites] == list(range(len(blocks)))
    for block, site in enumerate(sites):
        assert site.tokens_in == sizes
        wanted = [slow.chosen.get((frame, block), list(range(size))) for frame, size in enumerate(sizes)]
        assert [index.tolist() for index in site.kept] == wanted
        assert site.tokens_out == [len(index) for index in wanted]


@pytest.mark.parametrize(("family", "name"), [("clip_vision", "default"), ("clip_vision", "chunks"), (BARE[1], "half")])
@torch.no_grad()
def test_a_bare_tower_takes_its_batch_as_a_video_where_it_is_told_to(family: str, name: str) -> None:
    model, method = build(family), SETTINGS[name]
    _, blocks, heads = tower_of(model)
    pixels = moving(7)
    with watching(blocks) as (entered, _):
        want = model(pixel_values=pixels).last_hidden_state
    videos = frames_of(entered, [(7, 0)], len(blocks))
    slow = slow_tower(method, [SlowBlock.of(block, heads) for block in blocks], videos)
    state = VideoState()
    with compress(model, method) as session, watching(blocks) as (_, left):
        images = model(pixel_values=pixels).last_hidden_state
        left.clear()
        with session.continuing(state):
            model(pixel_values=pixels)
    assert torch.equal(images, want)  # images refer to nothing
    for block, output in enumerate(left):
        close(output, torch.stack(slow.outputs[block]))
    assert state.frames == 7
    for block, want_buffers in enumerate(slow.references[0]):
        kept = state.blocks[block]
        for got, wanted in zip((kept.keys, kept.values, kept.attention, kept.mlp), want_buffers, strict=True):
            close(got, wanted)


def moving(frames: int, *, size: int = 56, seed: int = 5, change: float = 0.3) -> Tensor:
    """float[F, 3, S, S]: pictures that drift."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(frames, 3, size, size, generator=generator) * change
    steps[0] /= change
    return steps.cumsum(0)


# ------------------------------------------------------------------------------------------------------------ oracles


@pytest.fixture
def bare() -> Iterator[tuple[Any, nn.ModuleList]]:
    model = build("siglip_vision")
    with torch.no_grad():
        yield model, tower_of(model)[1]


@pytest.mark.parametrize("method", [STCCacher(keep=1.0), STCCacher(keep=64), STCCacher(interval=1)], ids=str)
def test_nothing_changes_to_the_bit_where_everything_is_computed(bare: Any, method: STCCacher) -> None:
    model, _ = bare
    pixels = moving(5)
    want = model(pixel_values=pixels, output_hidden_states=True)
    with compress(model, method) as session, session.continuing(VideoState()):
        got = model(pixel_values=pixels, output_hidden_states=True)
    assert all(torch.equal(a, b) for a, b in zip(got.hidden_states, want.hidden_states, strict=True))
    assert session.report.tower_multiply_adds == session.report.tower_multiply_adds_dense > 0


@pytest.mark.parametrize("keep", [1, 0.1, 0.5])
def test_a_frame_equal_to_its_reference_comes_out_equal(bare: Any, keep: int | float) -> None:
    model, _ = bare
    pixels = moving(2)[[0, 0, 0, 1, 1, 1]]
    with compress(model, STCCacher(keep=keep, interval=3)) as session, session.continuing(VideoState()):
        got = model(pixel_values=pixels).last_hidden_state
    for frame, reference in ((1, 0), (2, 0), (4, 3), (5, 3)):
        torch.testing.assert_close(got[frame], got[reference], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got[0], got[3], atol=1e-2)


def test_reference_frames_are_those_of_the_plain_tower(bare: Any) -> None:
    model, _ = bare
    pixels = moving(9)
    want = model(pixel_values=pixels).last_hidden_state
    with compress(model, STCCacher(interval=4)) as session, session.continuing(VideoState()):
        got = model(pixel_values=pixels).last_hidden_state
    equal = [frame for frame in range(9) if torch.allclose(got[frame], want[frame], atol=1e-5)]
    assert equal == [0, 4, 8]
    done = session.report.sites[0].tokens_out
    assert done == [16, 4, 4, 4, 16, 4, 4, 4, 16]


def test_a_patch_that_is_not_computed_moves_by_what_the_reference_moved(bare: Any) -> None:
    model, blocks = bare
    state, pixels = VideoState(), moving(2)
    method = Watched(keep=0.25)
    with compress(model, method) as session, session.continuing(state):
        model(pixel_values=pixels[:1])
        references = dict(state.blocks)
        with watching(blocks) as (entered, left):
            model(pixel_values=pixels[1:])
    assert len(method.asked) == len(blocks)
    for number, (block, chosen, _, _) in enumerate(method.asked):
        assert number == block
        others = [t for t in range(16) if t not in chosen[0].tolist()]
        assert len(others) == 12
        before, after = entered[block][0][0, others], left[block][0, others]
        added = references[block]
        assert torch.equal(after, (before + added.attention[others]) + added.mlp[others])


def test_patches_whose_pixels_change_are_chosen_in_the_first_block(bare: Any) -> None:
    model, _ = bare
    first = moving(1)
    second, changed = first.clone(), [2, 7, 13]
    for t in changed:
        row, column = divmod(t, 4)
        second[0, :, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14] += 1.0
    method = Watched(keep=4)
    with compress(model, method) as session, session.continuing(VideoState()):
        model(pixel_values=torch.cat([first, second]))
    block, chosen, _, _ = method.asked[0]
    assert block == 0 and set(changed) < set(chosen[0].tolist())


def test_frames_between_leave_the_references_as_they_are(bare: Any) -> None:
    model, _ = bare
    state, pixels = VideoState(), moving(4)
    with compress(model, STCCacher(interval=3)) as session, session.continuing(state):
        model(pixel_values=pixels[:1])
        before = {block: dataclasses.astuple(made) for block, made in state.blocks.items()}
        copies = {block: tuple(part.clone() for part in made) for block, made in before.items()}
        for frame in (1, 2):
            model(pixel_values=pixels[frame : frame + 1])
            assert state.frames == frame + 1
        for block, made in state.blocks.items():
            for now, then in zip((made.keys, made.values, made.attention, made.mlp), copies[block], strict=True):
                assert torch.equal(now, then)
        model(pixel_values=pixels[3:])
    assert not torch.equal(state.blocks[0].keys, copies[0][0])
    assert all(part._base is None for part in dataclasses.astuple(state.blocks[0]))  # no part of a larger tensor


def test_keys_are_fresh_and_compared_with_those_of_the_reference(bare: Any) -> None:
    model, blocks = bare
    pixels = moving(3)
    method = Watched(interval=3)
    projected: list[Tensor] = []
    handle = blocks[0].self_attn.k_proj.register_forward_hook(lambda *call: projected.append(call[-1]))
    model(pixel_values=pixels)
    with compress(model, method) as session, session.continuing(VideoState()):
        model(pixel_values=pixels)
    handle.remove()
    _, _, keys, reference = method.asked[0]
    close(keys, projected[0][1:])
    close(reference, projected[0][:1].expand(2, -1, -1))


def test_shared_choices_are_those_of_the_first_block(bare: Any) -> None:
    model, _ = bare
    choices = {}
    for share in (False, True):
        method = Watched(keep=3, share_selection=share)
        with compress(model, method) as session, session.continuing(VideoState()):
            model(pixel_values=moving(6))
        choices[share] = [index for _, index, _, _ in method.asked]
    assert torch.equal(choices[True][0], choices[False][0])
    assert all(torch.equal(index, choices[True][0]) for index in choices[True])
    assert not all(torch.equal(index, choices[False][0]) for index in choices[False])


# ---------------------------------------------------------------------------------------------- streams and batches


@pytest.mark.parametrize(
    ("name", "steps"), [*((name, [1] * 9) for name in SETTINGS), ("half", [1, 3, 5]), ("chunks", [4, 4, 1])], ids=str
)
@torch.no_grad()
def test_it_does_not_matter_in_how_many_calls_a_video_comes(name: str, steps: list[int]) -> None:
    model = tiny("clip_vision")
    pixels = moving(9)
    with compress(model, SETTINGS[name]) as session:
        with session.continuing(VideoState()):
            want = model(pixel_values=pixels).last_hidden_state
        state, parts = VideoState(), []
        for some in pixels.split(steps):
            with session.continuing(state):
                parts.append(model(pixel_values=some).last_hidden_state)
    close(torch.cat(parts), want)
    assert state.frames == 9


@pytest.mark.parametrize("family", VIDEO)
@torch.no_grad()
def test_a_stream_of_steps_is_the_video_in_one_call(family: str) -> None:
    model = tiny(family)
    batch = inputs(model, family, "video", "single", seed=3)
    pixels, base = batch["pixel_values_videos"], model.base_model
    state = VideoState()
    with compress(model, STCCacher(keep=0.3, interval=2)) as session:
        if "video_grid_thw" in batch:
            t, h, w = batch["video_grid_thw"][0].tolist()
            pixels = torch.cat([pixels, pixels.flip(0)])
            t *= 2
            want = base.get_video_features(pixels, torch.tensor([[t, h, w]])).pooler_output[0]
            parts = []
            for step in pixels.split(h * w):
                with session.continuing(state):
                    parts.append(base.get_video_features(step, torch.tensor([[1, h, w]])).pooler_output[0])
        else:
            t = pixels.shape[1]
            _, blocks, _ = tower_of(model)
            with watching(blocks) as (_, left):
                base.get_video_features(pixels)
            want = left[-1]
            parts = []
            for step in pixels.split(1, 1):
                with session.continuing(state), watching(blocks) as (_, left):
                    base.get_video_features(step)
                parts.append(left[-1])
    close(torch.cat(parts), want)
    assert state.frames == t


@torch.no_grad()
def test_later_frames_change_nothing_before_them() -> None:
    model, pixels = tiny("siglip_vision"), moving(7)
    other = pixels.clone()
    other[4:] = moving(3, seed=9)
    with compress(model, STCCacher(interval=3)) as session:
        outputs = []
        for video in (pixels, other):
            with session.continuing(VideoState()):
                outputs.append(model(pixel_values=video).last_hidden_state)
    assert torch.equal(outputs[0][:4], outputs[1][:4])
    assert not torch.allclose(outputs[0][4:], outputs[1][4:], atol=1e-2)


@pytest.mark.parametrize("family", VIDEO)
@torch.no_grad()
def test_videos_of_a_batch_refer_to_their_own_frames(family: str) -> None:
    model = tiny(family)
    batch = inputs(model, family, "video", "padded_ragged", seed=4)
    _, blocks, _ = tower_of(model)
    pixels = batch["pixel_values_videos"]
    with compress(model, STCCacher(keep=0.3, interval=2)), watching(blocks) as (_, left):
        encode(model, batch)
        together = left[-1].flatten(0, -2)
        start = 0
        for number, (frames, patches) in enumerate(shapes_of(batch)):
            left.clear()
            length = frames * patches
            if "video_grid_thw" in batch:
                grid = batch["video_grid_thw"][number : number + 1]
                encode(model, {"pixel_values_videos": pixels[start : start + length], "video_grid_thw": grid})
            else:
                encode(model, {"pixel_values_videos": pixels[number : number + 1]})
            close(left[-1].flatten(0, -2), together[start : start + length])
            start += length


@torch.no_grad()
def test_several_streams_share_a_call_each_with_its_own_counter() -> None:
    model, method = tiny("siglip_vision"), STCCacher(interval=3)
    one, two = moving(5, seed=1), moving(5, seed=2)
    alone = []
    with compress(model, method) as session:
        for video in (one, two[1:]):
            with session.continuing(VideoState()):
                alone.append(model(pixel_values=video).last_hidden_state)
        states = [VideoState(), VideoState()]
        with session.continuing(states[0]):
            first = model(pixel_values=one[:1]).last_hidden_state
        with session.continuing(*states):
            rest = model(pixel_values=torch.cat([one[1:], two[1:]])).last_hidden_state
    assert [state.frames for state in states] == [5, 4]
    close(torch.cat([first, rest[:4]]), alone[0])
    close(rest[4:], alone[1])


@torch.no_grad()
def test_a_copy_of_a_state_goes_its_own_way() -> None:
    model, pixels = tiny("siglip_vision"), moving(4)
    with compress(model, STCCacher(interval=2)) as session:
        state = VideoState()
        with session.continuing(state):
            model(pixel_values=pixels[:2])
        copy = state.copy()
        with session.continuing(copy):
            once = model(pixel_values=pixels[2:]).last_hidden_state
        assert (state.frames, copy.frames) == (2, 4)
        assert not torch.equal(copy.blocks[0].keys, state.blocks[0].keys)
        with session.continuing(state):
            again = model(pixel_values=pixels[2:]).last_hidden_state
    assert torch.equal(once, again)


@torch.no_grad()
def test_a_frame_of_another_size_is_a_reference() -> None:
    model = tiny("qwen2_5_vl")
    visual, state = model.base_model, VideoState()
    generator = torch.Generator().manual_seed(2)

    def step(session: Session, rows: int, columns: int) -> None:
        pixels = torch.randn(rows * columns, 3 * 2 * 14**2, generator=generator)
        with session.continuing(state):
            visual.get_video_features(pixels, torch.tensor([[1, rows, columns]]))

    method = Watched(interval=100, keep=5)
    with compress(model, method) as session:
        for rows, columns, asked in ((8, 4, 0), (8, 4, 1), (4, 8, 1), (4, 8, 2), (8, 4, 2)):
            step(session, rows, columns)
            assert len(method.asked) == asked * 4  # blocks
    assert state.frames == 5 and state.grid == (8, 4)


@torch.no_grad()
def test_what_raises_in_the_middle_leaves_no_state() -> None:
    model, pixels = tiny("siglip_vision"), moving(6)
    _, blocks, _ = tower_of(model)
    state = VideoState()
    with compress(model, STCCacher(interval=2)) as session:
        with session.continuing(VideoState()):
            want = model(pixel_values=pixels).last_hidden_state
        with session.continuing(state):
            model(pixel_values=pixels[:2])
            before = dict(state.blocks)

            def fail(*_: object) -> None:
                raise RuntimeError("in the middle")

            handle = blocks[2].mlp.register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="in the middle"):
                model(pixel_values=pixels[2:])
            handle.remove()
            assert state.frames == 2 and state.blocks == before
            rest = model(pixel_values=pixels[2:]).last_hidden_state
        assert session.thread.videos is None
        with pytest.raises(ZeroDivisionError), session.continuing(state):
            _ = 1 / 0
        assert session.thread.videos is None
        close(rest, want[2:])
        assert torch.equal(model(pixel_values=pixels).last_hidden_state, dense_of(pixels))


def dense_of(pixels: Tensor) -> Tensor:
    return build("siglip_vision")(pixel_values=pixels).last_hidden_state


@torch.no_grad()
def test_other_threads_do_not_go_on_with_a_video() -> None:
    model, pixels = tiny("siglip_vision"), moving(3)
    found: list[Tensor] = []

    def other() -> None:
        with torch.no_grad():
            found.append(model(pixel_values=pixels).last_hidden_state)

    with compress(model, STCCacher()) as session, session.continuing(VideoState()):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        mine = model(pixel_values=pixels).last_hidden_state
    assert torch.equal(found[0], dense_of(pixels))
    assert not torch.allclose(mine, found[0], atol=1e-3)


@torch.no_grad()
def test_methods_that_reuse_nothing_do_not_look_at_states() -> None:
    model, pixels, state = tiny("siglip_vision"), moving(3), VideoState()
    with compress(model, DivPrune()) as session, session.continuing(state):
        model(pixel_values=pixels)
    assert state == VideoState()


# ---------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("family", VIDEO)
@torch.no_grad()
def test_pictures_are_computed_in_full(family: str) -> None:
    model = tiny(family)
    batch = inputs(model, family, "image", "padded_ragged")
    want = model(**oracle.clone(batch)).logits
    with compress(model, STCCacher(keep=1)) as session:
        got = model(**oracle.clone(batch)).logits
    assert torch.equal(got, want)
    assert all(site.tokens_in == site.tokens_out for site in session.report.sites)


@pytest.mark.parametrize("family", VIDEO)
@torch.no_grad()
def test_it_goes_together_with_methods_behind_the_projector(family: str) -> None:
    model = tiny(family)
    batch = inputs(model, family, "video", "padded_ragged")
    method = Sequential(parts=(STCCacher(), DyCoke(keep=0.5)))
    with compress(model, STCCacher()):
        reused = encode(model, batch)
    with compress(model, method) as session:
        got = encode(model, batch)
        model.generate(**oracle.clone(batch), max_new_tokens=2)
    for a, b in zip(got, reused, strict=True):
        assert torch.equal(a, b)
    sites = [site.site for site in session.report.sites]
    assert set(sites) == {"refresh", "llm_input"}
    assert sum(session.report.tokens_out) < sum(session.report.tokens_in)


@pytest.mark.skipif(not oracle.ENCODES_APART, reason="transformers takes no encoded images")
@torch.no_grad()
def test_inputs_encoded_beforehand_are_those_of_the_attached_method() -> None:
    model = tiny("qwen3_vl")
    batch = inputs(model, "qwen3_vl", "video", "single")
    with compress(model, STCCacher()):
        want = model(**oracle.clone(batch)).logits
    got = model(**mmtoken.compress_inputs(model, STCCacher(), batch)).logits
    close(got[:, -1], want[:, -1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", VIDEO)
@torch.no_grad()
def test_half_precision_stays_close(family: str, dtype: torch.dtype) -> None:
    method, found = STCCacher(keep=0.5), []
    for kind in (torch.float32, dtype):
        model = build(family, dtype=kind)
        batch = inputs(model, family, "video", "single")
        _, blocks, _ = tower_of(model)
        with compress(model, method), watching(blocks) as (_, left):
            encode(model, batch)
        assert left[0].dtype == kind
        found.append(left[0].float())
    # Rounding may change a choice here and there, so single numbers may differ more than all on average.
    assert float((found[1] - found[0]).abs().mean()) < 0.05 * float(found[0].abs().mean())


def test_gradients_flow_through_what_is_computed_and_what_is_taken() -> None:
    """Against the gradients of the plain loops, for pixels and weights."""
    model, method = build("siglip_vision"), STCCacher(keep=0.3, interval=3)
    model.requires_grad_(True)
    _, blocks, heads = tower_of(model)
    pixels = moving(3)
    weights = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(8))
    watch = [blocks[0].self_attn.v_proj.weight, blocks[1].mlp.fc1.weight, blocks[2].self_attn.q_proj.bias]
    found = []
    for slow in (False, True):
        given = pixels.clone().requires_grad_(True)
        if slow:
            with watching(blocks) as (entered, _):
                model(pixel_values=given)
            first = entered[0][0]
            videos = [[[Frame(frame, None, [0] * 16)] * len(blocks) for frame in first]]
            output = torch.stack(slow_tower(method, [SlowBlock.of(b, heads) for b in blocks], videos).outputs[-1])
        else:
            with compress(model, method) as session, session.continuing(VideoState()), watching(blocks) as (_, left):
                model(pixel_values=given)
            output = left[-1]
        found.append(torch.autograd.grad((output * weights).sum(), [given, *watch]))
    for got, want in zip(*found, strict=True):
        assert float(want.abs().max()) > 0
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_references_that_outlive_a_call_hold_no_graph() -> None:
    model, state = tiny("siglip_vision"), VideoState()
    with compress(model, STCCacher()) as session, session.continuing(state):
        output = model(pixel_values=moving(1).requires_grad_(True)).last_hidden_state
    assert output.requires_grad
    assert not any(part.requires_grad for part in dataclasses.astuple(state.blocks[0]))


@torch.no_grad()
def test_a_fused_projection_that_is_no_plain_linear_map_is_called_as_a_whole() -> None:
    class Adapted(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: Tensor) -> Tensor:
            return (
                self.inner(hidden) + 0.5 * hidden.repeat(1, 3)
                if hidden.ndim == 2
                else self.inner(hidden) + 0.5 * hidden.repeat(1, 1, 3)
            )

    model = build("qwen3_vl")
    batch = inputs(model, "qwen3_vl", "video", "single")
    _, blocks, _ = tower_of(model)
    for block in blocks:
        block.attn.qkv = Adapted(block.attn.qkv)
    with compress(model, STCCacher()):
        got = encode(model, batch)
    for block in blocks:
        inner = block.attn.qkv.inner
        with torch.no_grad():
            width = inner.in_features
            inner.weight += 0.5 * torch.eye(width).repeat(3, 1)
        block.attn.qkv = inner
    with compress(model, STCCacher()):
        want = encode(model, batch)
    for a, b in zip(got, want, strict=True):
        close(a, b)


@pytest.mark.parametrize("family", [*VIDEO, *BARE])
def test_nothing_is_left_behind(family: str) -> None:
    model = build(family)
    before = oracle.fingerprint(model)
    with compress(model, STCCacher()):
        pass
    assert oracle.fingerprint_changes(before, oracle.fingerprint(model)) == []
    blocks = tower_of(model)[1]

    def own(*args: Any, **kwargs: Any) -> Any:
        return type(blocks[0]).forward(blocks[0], *args, **kwargs)

    blocks[0].forward = own  # as other packages do
    with compress(model, STCCacher()):
        assert blocks[0].forward is not own
    assert blocks[0].__dict__["forward"] is own


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("family", ["llava", "idefics3", "smolvlm"])
def test_families_that_read_images_only_are_refused(family: str) -> None:
    with pytest.raises(UnsupportedError, match="reads images only"):
        mmtoken.check(tiny(family), STCCacher())


def test_methods_that_cut_or_read_the_same_tower_are_refused() -> None:
    model = tiny("llava_onevision")
    with pytest.raises(UnsupportedError, match="places no longer agree"):
        mmtoken.check(model, Sequential(parts=(STCCacher(), FlowCut())))
    with pytest.raises(UnsupportedError, match="compute some patches of a frame only"):
        mmtoken.check(model, Sequential(parts=(STCCacher(), VisionZip())))
    with pytest.raises(UnsupportedError, match="a bare decoder has none"):
        mmtoken.check(tiny("llama"), STCCacher(), visual=torch.ones(1, 3, dtype=torch.bool))


def test_gradient_checkpointing_is_refused() -> None:
    model = build("siglip_vision")
    model.gradient_checkpointing_enable()
    model.train()
    with compress(model, STCCacher()) as session:
        model(pixel_values=moving(2))  # images refer to nothing
        with pytest.raises(UnsupportedError, match="disable checkpointing"), session.continuing(VideoState()):
            model(pixel_values=moving(2))


@torch.no_grad()
def test_attention_maps_are_refused() -> None:
    model = build("siglip_vision", "eager")
    with compress(model, STCCacher()) as session:
        model(pixel_values=moving(2), output_attentions=True)
        with pytest.raises(UnsupportedError, match="output_attentions"), session.continuing(VideoState()):
            model(pixel_values=moving(2), output_attentions=True)


@torch.no_grad()
def test_a_tower_compiled_in_one_graph_is_refused() -> None:
    model = build("siglip_vision")
    with (
        compress(model, STCCacher()) as session,
        pytest.raises(Exception, match=r"torch\.compile cannot trace"),
        session.continuing(VideoState()),
    ):
        torch.compile(model, backend="eager", fullgraph=True)(pixel_values=moving(4))


@torch.no_grad()
def test_one_state_per_video_is_wanted() -> None:
    model = tiny("siglip_vision")
    with compress(model, STCCacher()) as session:
        for states in ([], [VideoState(), VideoState()]):
            with pytest.raises(InputError, match=rf"given {len(states)} states"), session.continuing(*states):
                model(pixel_values=moving(3))
    model = tiny("qwen3_vl")
    batch = inputs(model, "qwen3_vl", "video", "padded_ragged")
    with (
        compress(model, STCCacher()) as session,
        pytest.raises(InputError, match="given 1 states, but this call has 3 videos"),
        session.continuing(VideoState()),
    ):
        encode(model, batch)


@pytest.mark.parametrize("wrong", ["shape", "dtype"])
@torch.no_grad()
def test_a_wrong_choice_is_refused(wrong: str) -> None:
    @dataclass(frozen=True)
    class Wrong(STCCacher):
        def refresh(self, keys: Tensor, reference: Tensor, block: int, ctx: Context) -> Tensor:
            index = super().refresh(keys, reference, block, ctx)
            return index[:, :-1] if wrong == "shape" else index.int()

    with (
        compress(tiny("siglip_vision"), Wrong()) as session,
        pytest.raises(InputError, match=r"refresh chose .* in block 0; give int64\[1, 4\]"),
        session.continuing(VideoState()),
    ):
        tiny("siglip_vision")(pixel_values=moving(2))


@torch.no_grad()
def test_an_attention_mask_in_the_tower_is_refused() -> None:
    model = tiny("siglip_vision")
    _, blocks, _ = tower_of(model)

    def masked(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return args[:1], {**kwargs, "attention_mask": torch.zeros(1, 1, 16, 16)}

    handle = blocks[0].register_forward_pre_hook(masked, with_kwargs=True)
    with (
        compress(model, STCCacher()) as session,
        pytest.raises(UnsupportedError, match="given an attention mask"),
        session.continuing(VideoState()),
    ):
        model(pixel_values=moving(2))
    handle.remove()


# ------------------------------------------------------------------------------------------------------ multiply-adds


def ratio(patches: int, width: int, mlp_width: int, computed: int) -> float:
    shape = TowerShape(width, 2 * width * mlp_width)
    return block_multiply_adds(shape, patches, computed) / block_multiply_adds(shape, patches, patches)


@pytest.mark.parametrize(
    ("patches", "width", "mlp_width", "computed", "wanted"),
    [
        (729, 1152, 4304, 182, 0.3086),
        (729, 1152, 4304, 109, 0.2163),
        (729, 1152, 4304, 364, 0.5386),
        (577, 1024, 4096, 144, 0.307),
        (257, 1024, 4096, 64, 0.309),
    ],
)
def test_a_block_costs_what_the_paper_counts(patches, width, mlp_width, computed, wanted):
    assert ratio(patches, width, mlp_width, computed) == pytest.approx(wanted, abs=5e-4 if wanted > 0.3 else 5e-5)
    full = 4 * patches * width**2 + 2 * patches**2 * width + 2 * patches * width * mlp_width
    assert block_multiply_adds(TowerShape(width, 2 * width * mlp_width), patches, patches) == full


@pytest.mark.parametrize(("interval", "wanted"), [(2, 0.654), (4, 0.481)])
def test_a_video_costs_the_average_over_an_interval(interval: int, wanted: float) -> None:
    some = ratio(729, 1152, 4304, 182)
    assert (1 + (interval - 1) * some) / interval == pytest.approx(wanted, abs=5e-4)


@torch.no_grad()
def test_the_report_counts_every_block_and_frame() -> None:
    model = tiny("siglip_vision")
    with compress(model, STCCacher(keep=5, interval=3)) as session, session.continuing(VideoState()):
        model(pixel_values=moving(4))
    report = session.report
    n, c, m = 16, 32, 64
    full = 4 * n * c * c + 2 * n * n * c + 2 * n * c * m
    some = (n + 3 * 5) * c * c + 2 * 5 * n * c + 2 * 5 * c * m
    assert report.tower_multiply_adds == 4 * (2 * full + 2 * some)
    assert report.tower_multiply_adds_dense == 4 * 4 * full
    written = report.to_dict()
    assert written["tower_multiply_adds"] == report.tower_multiply_adds
    assert all(site.multiply_adds_dense == 4 * full for site in report.sites)


@torch.no_grad()
def test_a_gated_mlp_has_three_maps() -> None:
    model = tiny("qwen2_5_vl")
    with compress(model, STCCacher()) as session:
        encode(model, inputs(model, "qwen2_5_vl", "video", "single"))
    site = session.thread.report
    with compress(model, STCCacher()) as session:
        model(**inputs(model, "qwen2_5_vl", "video", "single"))
    n, c, m = 48, 32, 64
    full = 4 * n * c * c + 2 * n * n * c + 3 * n * c * m
    assert site is None and session.report.tower_multiply_adds_dense == 4 * 2 * full
