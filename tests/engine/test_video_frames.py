"""What methods may ask about a video's frames: patches before pooling, pictures, the question; QuoTA end to end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mmtoken import compress, compress_inputs
from mmtoken.backbones.registry import adapt
from mmtoken.compressors import QuoTA
from mmtoken.compressors.base import Compressor, Context, Need, Positions
from mmtoken.compressors.compose import Sequential
from mmtoken.compressors.framebudget import assign_tokens, frame_budgets, frame_shares
from mmtoken.compressors.framescorer import Clip, FrameScorer
from mmtoken.engine.encode import pictures
from mmtoken.errors import UnsupportedError
from mmtoken.tokens import VisualTokens
from tests import oracle
from tests.backbones.processors import conversation, video, write_checkpoint
from tests.backbones.tiny_models import STACKED, inputs, video_families, visual_mask
from tests.engine.agreement import assert_close, tiny
from tests.engine.test_frames import TAKES_FEATURES

VIDEO = video_families()
SEEN: list[Any] = []


@dataclass(frozen=True)
class Looks(Compressor):
    """Notes what it is told at the language model's input, and changes nothing."""

    keep: float = 1.0
    positions: Positions = "keep"

    needs: ClassVar[frozenset[Need]] = frozenset({"unpooled", "pixels", "prompt"})

    def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        SEEN.append((tokens, ctx.unpooled(tokens), ctx.pixels(tokens), ctx.prompt_ids(tokens)))
        return tokens


@dataclass(frozen=True)
class LongerQuestionsSeeMore(Compressor):
    """As many frames from the start as the video's question has tokens beyond 9, and notes what it is told."""

    keep: float = 1.0
    positions: Positions = "keep"

    needs: ClassVar[frozenset[Need]] = frozenset({"prompt", "pixels"})

    def frames(self, clip: Tensor, ctx: Context) -> Tensor:
        nothing = VisualTokens.from_features(clip.new_zeros(1, 0, 1))
        (ids,) = ctx.prompt_ids(nothing)
        SEEN.append((ids, ctx.prompt_embedding(nothing), ctx.pixels(nothing)[0], ctx.question_state(nothing)))
        return torch.arange(max(1, min(len(clip), len(ids) - 9)))


@dataclass(frozen=True)
class OddFrames(Compressor):
    """Every other frame, from the second on."""

    keep: float = 1.0
    positions: Positions = "keep"

    def frames(self, clip: Tensor, ctx: Context) -> Tensor:
        return torch.arange(1, len(clip), 2)


def patches(model: Any, pixels: Tensor) -> Tensor:
    """float[frames, 3, 3, D]: what OneVision's projector gives for pixels float[frames, 3, 42, 42]."""
    root = model.base_model
    with torch.no_grad():
        states = root.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        return root.multi_modal_projector(states).unflatten(1, (3, 3))


def texts(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    text = batch["attention_mask"].bool() & ~visual_mask(model, batch)
    return [ids[real] for ids, real in zip(batch["input_ids"], text, strict=True)]


# ------------------------------------------------------------------------------------------------------------- facts


@pytest.mark.parametrize("case", ["plain", "padded_ragged", "multi_image"])
def test_patches_before_pooling_are_those_of_the_models_projector(case: str) -> None:
    model = tiny("llava_onevision")
    batch = inputs(model, "llava_onevision", "video", case)
    SEEN.clear()
    with torch.no_grad(), compress(model, Looks()):
        model(**oracle.clone(batch))
    ((tokens, unpooled, shown, ids),) = SEEN
    pixels = batch["pixel_values_videos"]
    assert len(unpooled) == len(tokens) == len(pixels)
    for clip, got, picture in zip(pixels, unpooled, shown, strict=True):
        assert_close(got, patches(model, clip))
        want = ((clip * 0.5 + 0.5) * 255).round().clamp(0, 255)
        assert torch.equal(picture.permute(0, 3, 1, 2).float(), want)
    rows = [row for row, ids in enumerate(batch["input_ids"]) for _ in range(int((ids == 324).sum()) // 17)]
    assert [a.tolist() for a in ids] == [texts(model, batch)[row].tolist() for row in rows]


@pytest.mark.parametrize(
    ("family", "modality", "case"),
    [("llava_onevision", "image", "multi_image"), ("qwen2_5_vl", "video", "padded_ragged")],
)
def test_where_nothing_is_pooled_the_tokens_stand_for_the_patches(family: str, modality: str, case: str) -> None:
    """Pictures that are cut lie on no one grid; two of those in a prompt are not cut."""

    @dataclass(frozen=True)
    class Grids(Looks):
        needs: ClassVar[frozenset[Need]] = frozenset({"unpooled"})

        def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
            SEEN.append((tokens, ctx.unpooled(tokens)))
            return tokens

    model = tiny(family)
    SEEN.clear()
    with torch.no_grad(), compress(model, Grids()):
        model(**oracle.clone(inputs(model, family, modality, case)))
    ((tokens, unpooled),) = SEEN
    assert [grid is None for grid in tokens.grid] == ([False, False, True] if modality == "image" else [False] * 3)
    for row, (grid, got) in enumerate(zip(tokens.grid, unpooled, strict=True)):
        if grid is None:
            assert got is None
        else:
            assert torch.equal(got.flatten(0, 2), tokens.features[row, tokens.eligible[row]])
            assert got.shape[:3] == grid


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def test_pictures_are_the_frames_that_the_processor_was_given(family: str, tmp_path: Path) -> None:
    import transformers as tf

    folder = write_checkpoint(family, tmp_path, layers=1)
    processor, model = tf.AutoProcessor.from_pretrained(folder), tiny(family)
    if family == "llava_onevision":  # as checkpoints with a SigLIP tower have it; the class has CLIP's numbers
        processor.video_processor.image_mean = processor.video_processor.image_std = [0.5] * 3
    size = {"llava_onevision": (42, 42), "qwen2_5_vl": (84, 56), "qwen3_vl": (96, 64)}[family]
    clip = video(3, 4, size)
    turn = conversation("What?", clip)
    text = processor.apply_chat_template(turn, add_generation_prompt=True)
    options = {"do_resize": False, "do_sample_frames": False}
    batch = processor(text=text, videos=[clip], return_tensors="pt", **options)
    mean, deviation = processor.video_processor.image_mean, processor.video_processor.image_std
    backbone = adapt(model)
    assert backbone.pixel_scale() == (pytest.approx(mean, abs=1e-6), pytest.approx(deviation, abs=1e-6))
    (got,) = pictures(backbone, batch)
    want = clip if family == "llava_onevision" else clip[::2]
    assert np.abs(got.numpy().astype(int) - want.astype(int)).max() <= 1


@pytest.mark.parametrize("family", VIDEO)
def test_the_frames_site_reads_the_question_and_the_pictures(family: str) -> None:
    model = tiny(family)
    batch = inputs(model, family, "video", "single")
    SEEN.clear()
    with compress(model, LongerQuestionsSeeMore()) as session:
        oracle.generate_with_logits(model, batch, max_new_tokens=2)
    ((ids, mean, shown, state),) = SEEN
    (want,) = texts(model, batch)
    assert torch.equal(ids, want)
    with torch.no_grad():
        assert_close(mean[0], model.get_input_embeddings()(want).mean(0))
        assert_close(state[0], model.base_model.language_model(want[None]).last_hidden_state[0, -1])
    assert session.report.sites[0].tokens_out == [max(1, min(len(shown), len(want) - 9))]


@pytest.mark.parametrize("family", VIDEO)
def test_every_video_is_chosen_by_the_question_of_its_own_row(family: str) -> None:
    model = tiny(family)
    batch = inputs(model, family, "video", "padded_ragged")
    per_row = (batch["input_ids"] == model.config.video_token_id).sum(-1).tolist()
    SEEN.clear()
    if (family, "video") not in STACKED:  # which stacks videos, and wants as many frames of each
        with compress(model, LongerQuestionsSeeMore()):
            oracle.generate_with_logits(model, batch, max_new_tokens=2)
    else:
        with compress(model, LongerQuestionsSeeMore()), pytest.raises(UnsupportedError, match="same number of frames"):
            oracle.generate_with_logits(model, batch, max_new_tokens=2)
    rows = (
        [0, 1, 2]
        if (family, "video") not in STACKED
        else [row for row, n in enumerate(per_row) for _ in range(n // STACKED[family, "video"])]
    )
    assert [ids.tolist() for ids, *_ in SEEN] == [texts(model, batch)[row].tolist() for row in rows]


def test_what_was_not_declared_or_not_seen_is_refused() -> None:
    @dataclass(frozen=True)
    class Undeclared(Compressor):
        keep: float = 1.0
        positions: Positions = "keep"
        fact: str = "pixels"

        def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
            getattr(ctx, self.fact)(tokens)
            return tokens

    model = tiny("llava_onevision")
    batch = inputs(model, "llava_onevision", "video", "single")
    for fact in ("pixels", "prompt_ids"):
        with compress(model, Undeclared(fact=fact)), pytest.raises(UnsupportedError, match=f"{fact}.*declare"):
            model(**oracle.clone(batch))
    model = tiny("llava")
    with (
        compress(model, Looks()),
        pytest.raises(UnsupportedError, match="pixels are not known for these visual tokens"),
    ):
        model(**oracle.clone(inputs(model, "llava", "image", "single")))


# ------------------------------------------------------------------------------------------------------------- QuoTA


@dataclass(frozen=True)
class Brightness(FrameScorer):
    """The mean of a frame's pixels and the length of the question: both must arrive."""

    def score(self, clip: Clip) -> Tensor:
        assert clip.pixels is not None
        mean = clip.pixels.double().mean((1, 2, 3)) / 255
        return (mean - mean.min() + 0.01 * len(clip.question)).clamp(max=1)


class Letters:
    """Token ids as text, one character each."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, ids))


def expected(model: Any, batch: dict[str, Tensor], keep: int | float) -> list[Tensor]:
    """Per prompt row float[l, D]: its embeddings with resized frames, by loops of its own (bilinear, no cap)."""
    embed, newline = model.get_input_embeddings(), model.base_model.image_newline[None]
    by_row = model.config.model_type == "llava_video"
    rows = []
    items = iter(batch["pixel_values_videos"])
    for ids, real in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        ids = ids[real]
        question = ids[ids != model.config.video_token_id]
        parts, at = [], 0
        while at < len(ids):
            if ids[at] != model.config.video_token_id:
                parts.append(embed(ids[at : at + 1]))
                at += 1
                continue
            clip = next(items)
            mean = ((clip * 0.5 + 0.5) * 255).round().clamp(0, 255).double().mean((1, 2, 3)) / 255
            scores = (mean - mean.min() + 0.01 * len(question)).clamp(max=1)
            budget = 16 if keep == 1.0 else min(16, 4 * int(keep))
            weights = [float(s) ** 2 for s in scores]
            for frame, weight in zip(patches(model, clip), weights, strict=True):
                count = math.floor(budget * weight / sum(weights) + 1e-6)
                side = math.isqrt(count)
                shape = (side + (side * (side + 1) <= count), side)
                if count:
                    resized = interpolate(frame.permute(2, 0, 1)[None], size=shape, mode="bilinear")[0]
                    for line in resized.permute(1, 2, 0):
                        parts.append(line)
                        if by_row:
                            parts.append(newline)
            if not by_row:
                parts.append(newline)
            at += 4 * 2 * (2 + 1) if by_row else 4 * 2 * 2 + 1
        rows.append(torch.cat(parts))
    return rows


@pytest.mark.parametrize(("case", "keep"), [("plain", 1.0), ("padded_ragged", 2), ("multi_image", 1.0)])
@pytest.mark.parametrize("family", ["llava_onevision", "llava_video"])
@torch.no_grad()
def test_quota_is_the_model_on_resized_frames(family: str, case: str, keep: int | float) -> None:
    model = tiny(family)
    batch = inputs(model, family, "video", case)
    method = QuoTA(keep=keep, scorer=Brightness(), tokenizer=Letters())
    with compress(model, method) as session:
        got = oracle.generate_with_logits(model, batch, max_new_tokens=3)
    rows = expected(model, batch, keep)
    lengths = [len(row) for row in rows]
    assert session.report.layer_lengths[0] == lengths and sum(lengths) < int(batch["attention_mask"].sum())
    assert all(n <= most for n, most in zip(session.report.tokens_out, [16 if keep == 1.0 else 8] * 9, strict=False))
    for row, embeds in enumerate(rows):
        want = model.generate(
            inputs_embeds=embeds[None],
            attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
            max_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert torch.equal(got.sequences[row, -3:], want.sequences[0, -3:])
        assert_close(got.logits[row], torch.stack(want.logits, 1)[0])
    (site,) = session.report.sites
    assert set(site.timings) == {"scorer", "planner"} and 0 < site.timings["scorer"] <= site.seconds
    assert site.to_dict()["timings"] == site.timings
    assert site.scores is not None and all(bool((scores > 0).all()) for scores in site.scores)


@pytest.mark.parametrize("case", ["plain", "padded_ragged"])
@pytest.mark.parametrize("family", ["llava_onevision", "llava_video"])
def test_equal_scores_at_full_budget_are_the_plain_model(family: str, case: str) -> None:
    model = tiny(family)
    batch = inputs(model, family, "video", case)
    plain = oracle.generate_with_logits(model, batch, max_new_tokens=3)
    with compress(model, QuoTA(keep=1.0, scorer="uniform")):
        got = oracle.generate_with_logits(model, batch, max_new_tokens=3)
    assert torch.equal(got.sequences, plain.sequences) and torch.equal(got.logits, plain.logits)


def test_removed_frames_vanish_and_the_text_stays() -> None:
    model = tiny("qwen3_vl")  # writes a time before each frame
    batch = inputs(model, "qwen3_vl", "video", "single")
    grid = batch["video_grid_thw"][0].tolist()
    scores = [0.0] * (grid[0] - 1) + [1.0]
    for positions in ("keep", "renumber"):
        method = QuoTA(keep=1.0, cap=True, positions=positions, scorer={"name": "given", "scores": scores})
        with torch.no_grad(), compress(model, method) as session:
            out = model(**oracle.clone(batch))
        area = grid[1] * grid[2] // 4
        kept = session.report.kept[0]
        assert bool((kept // area == grid[0] - 1).all()) and len(kept) <= area
        text = int((~visual_mask(model, batch)).sum())
        assert session.report.layer_lengths[0] == [text + len(kept)]
        assert bool(out.logits.isfinite().all())


@pytest.mark.parametrize("family", ["llava_onevision", "llava_video"])
def test_frames_left_out_before_the_tower_have_no_share(family: str) -> None:
    model = tiny(family)
    batch = inputs(model, family, "video", "plain")
    scores = [1.0, 0.4, 1.0, 0.9]
    method = Sequential(
        parts=(OddFrames(positions="renumber"), QuoTA(keep=1.0, scorer={"name": "given", "scores": scores}))
    )
    SEEN.clear()
    with torch.no_grad(), compress(model, method) as session:
        model(**oracle.clone(batch))
    counts = frame_budgets(frame_shares(torch.tensor(scores[1::2])), 8)
    report = session.report
    assert report.tokens is not None
    for row, clip in enumerate(batch["pixel_values_videos"]):
        parts = [assign_tokens(f, n) for f, n in zip(patches(model, clip[1::2]), counts, strict=True) if n]
        got = report.tokens.features[row, report.tokens.eligible[row]]
        assert_close(got, torch.cat([part.flatten(0, 1) for part in parts]))


@pytest.mark.skipif(not TAKES_FEATURES, reason="transformers takes no mm_encoder_outputs")
@pytest.mark.parametrize("case", ["plain", "padded_ragged"])
@pytest.mark.parametrize("family", ["llava_onevision", "llava_video"])
def test_short_inputs_give_the_same_answer(family: str, case: str) -> None:
    model = tiny(family)
    batch = inputs(model, family, "video", case)
    method = QuoTA(keep=3, scorer=Brightness(), tokenizer=Letters())
    with compress(model, method):
        want = oracle.generate_with_logits(model, batch, max_new_tokens=3)
    got = oracle.generate_with_logits(model, compress_inputs(model, method, batch), max_new_tokens=3)
    assert torch.equal(got.sequences[:, -3:], want.sequences[:, -3:])
    assert_close(got.logits, want.logits)


def test_videos_that_were_encoded_without_the_method_are_refused_if_it_looks_at_them() -> None:
    model = tiny("qwen2_5_vl")
    batch = inputs(model, "qwen2_5_vl", "video", "single")
    with compress(model, QuoTA(scorer=Brightness())), pytest.raises(UnsupportedError, match="question=None"):
        model(**oracle.clone(batch))
