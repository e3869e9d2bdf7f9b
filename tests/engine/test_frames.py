"""The frames site: whole frames of a video are never encoded, and the answer is that of the masked model."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from mmtoken import compress, compress_inputs
from mmtoken.compressors.base import Compressor, Context, Need, Positions
from mmtoken.errors import InputError, UnsupportedError
from mmtoken.tokens import VisualTokens
from tests import oracle
from tests.backbones.tiny_models import CELLS, inputs, video_families
from tests.engine.agreement import assert_close, left_in_layers, tiny, tower_of

TAKES_FEATURES = "mm_encoder_outputs" in inspect.signature(tf.LlavaModel.forward).parameters
VIDEO = video_families()
IMAGES_ONLY = sorted({family for family, _ in CELLS} - set(VIDEO))


@dataclass(frozen=True)
class EveryOther(Compressor):
    """Every other frame, from `first` on."""

    keep: float = 1.0
    positions: Positions = "keep"
    first: int = 0
    step: int = 2

    def frames(self, clip: Tensor, ctx: Context) -> Tensor:
        return torch.arange(self.first, len(clip), self.step)


@dataclass(frozen=True)
class EveryOtherThenThin(EveryOther):
    """The same, and then every other token of what is left, at another two sites."""

    def vision_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        return tokens.where(tokens.source % 2 == 0) if layer == 1 else tokens


@dataclass(frozen=True)
class Picks(Compressor):
    """Whatever frames it is told."""

    keep: float = 1.0
    positions: Positions = "keep"
    picks: tuple[int, ...] = (0,)

    needs: ClassVar[frozenset[Need]] = frozenset({"content_seed"})

    def frames(self, clip: Tensor, ctx: Context) -> Tensor:
        assert isinstance(ctx.content_seed(_nothing(clip))[0], int)
        return torch.tensor(self.picks, dtype=torch.long)


def _nothing(clip: Tensor) -> VisualTokens:
    return VisualTokens.from_features(clip.new_zeros(1, 0, 1))


def frames_left(model: nn.Module, session: Any, batch: dict[str, Tensor], pick: Any) -> Tensor:
    """bool[B, L]: False at the tokens of frames that `pick` leaves out, from the grids of the batch alone."""
    keep = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    where = (batch["input_ids"] == model.config.video_token_id).nonzero()
    if "video_grid_thw" in batch:
        grids = [(t, h * w // 4, 0) for t, h, w in batch["video_grid_thw"].tolist()]
    else:
        videos, frames = batch["pixel_values_videos"].shape[:2]
        grids = [(frames, 4, 1)] * videos  # 2 x 2 per frame after pooling, one newline at the end
    if model.config.model_type == "llava_video":  # or after each of the 4 x 2 rows, where they stay
        grids = [(frames, 4, 0)] * videos
        newline = torch.tensor([False, False, True]).repeat(8 * videos)
        where = where[~newline]
    if model.config.model_type == "llava_next_video":
        grids = [(frames, 4, 0)] * videos
    if model.config.model_type == "video_llava":  # CLS and 16 patches
        grids = [(frames, 17, 0)] * videos
    start = 0
    for frames, area, newline in grids:
        left = pick(frames)
        flags = torch.isin(torch.arange(frames * area) // area, left)
        flags = torch.cat([flags, torch.ones(newline, dtype=torch.bool)])
        rows, columns = where[start : start + len(flags)].unbind(-1)
        keep[rows, columns] = flags
        start += len(flags)
    assert start == len(where)
    return keep


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["plain", "left_padded", "ragged", "padded_ragged", "multi_image", "text_row"])
@pytest.mark.parametrize("family", VIDEO)
def test_leaving_frames_out_equals_masking_their_tokens(family: str, case: str, attn: str) -> None:
    model = tiny(family, attn)
    batch = inputs(model, family, "video", case)
    for method in (EveryOther(), EveryOther(first=1, step=9)):
        with compress(model, method) as session:
            got = oracle.generate_with_logits(model, batch, max_new_tokens=3)
        keep = frames_left(model, session, batch, lambda frames, m=method: m.frames(torch.empty(frames), None))
        assert not bool(keep.all())
        with oracle.masked_keys(model, oracle.keep_in_layers(keep, range(4))):
            want = oracle.generate_with_logits(model, batch, max_new_tokens=3)
        assert torch.equal(got.sequences, want.sequences)
        assert_close(got.logits, want.logits)
        assert torch.equal(left_in_layers(session.report, batch, 4)[0], keep)


@pytest.mark.parametrize("family", VIDEO)
def test_all_frames_is_the_plain_model(family: str) -> None:
    model = tiny(family)
    batch = inputs(model, family, "video", "padded_ragged")
    plain = oracle.generate_with_logits(model, batch, max_new_tokens=3)
    with compress(model, EveryOther(step=1)) as session:
        got = oracle.generate_with_logits(model, batch, max_new_tokens=3)
    assert torch.equal(got.sequences, plain.sequences)
    assert torch.equal(got.logits, plain.logits)
    assert session.report.calls == 1
    assert session.report.sites[0].site == "frames"


@pytest.mark.parametrize("family", VIDEO)
def test_the_tower_encodes_the_chosen_frames_only(family: str) -> None:
    model = tiny(family)
    batch = inputs(model, family, "video", "single")
    tower, _, _ = tower_of(model)
    rows: list[int] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pixels = args[0] if args else kwargs.get("pixel_values", kwargs.get("hidden_states"))
        rows.append(len(pixels))

    handle = tower.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**oracle.clone(batch))
        with compress(model, EveryOther()) as session:
            model(**oracle.clone(batch))
    handle.remove()
    site = session.report.sites[0]
    frames, left = site.tokens_in[0], site.tokens_out[0]
    assert (site.site, left) == ("frames", -(-frames // 2))
    assert rows[1] * frames == rows[0] * left


@pytest.mark.parametrize("family", VIDEO)
def test_frames_and_tower_may_both_act(family: str) -> None:
    model = tiny(family)
    batch = inputs(model, family, "video", "padded_ragged")
    with torch.no_grad(), compress(model, EveryOther()) as session:
        model(**oracle.clone(batch))
    frames_only = [set(kept.tolist()) for kept in session.report.kept]
    with torch.no_grad(), compress(model, EveryOtherThenThin()) as session:
        out = model(**oracle.clone(batch))
    assert torch.isfinite(out.logits[batch["attention_mask"].bool()]).all()
    assert [site.site for site in session.report.sites][:2] == ["frames", "vision_layer"]
    for both, frames in zip(session.report.kept, frames_only, strict=True):
        assert len(both) > 0
        assert set(both.tolist()) <= frames


@pytest.mark.skipif(not TAKES_FEATURES, reason="transformers takes no mm_encoder_outputs")
@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("case", ["plain", "padded_ragged", "multi_image"])
@pytest.mark.parametrize("family", VIDEO)
def test_short_inputs_leave_frames_out_too(family: str, case: str, positions: Positions) -> None:
    model = tiny(family)
    batch = inputs(model, family, "video", case)
    method = EveryOther(positions=positions)
    with compress(model, method):
        want = oracle.generate_with_logits(model, batch, max_new_tokens=3)
    got = oracle.generate_with_logits(model, compress_inputs(model, method, batch), max_new_tokens=3)
    assert torch.equal(got.sequences[:, -3:], want.sequences[:, -3:])
    assert_close(got.logits, want.logits)


@pytest.mark.parametrize("family", VIDEO)
def test_images_pass_unchanged(family: str) -> None:
    model = tiny(family)
    batch = inputs(model, family, "image", "left_padded")
    plain = oracle.generate_with_logits(model, batch, max_new_tokens=2)
    with compress(model, EveryOther()):
        got = oracle.generate_with_logits(model, batch, max_new_tokens=2)
    assert torch.equal(got.logits, plain.logits)


@pytest.mark.parametrize("family", IMAGES_ONLY)
def test_models_that_read_images_only_are_refused(family: str) -> None:
    with pytest.raises(UnsupportedError, match="reads images only"), compress(tiny(family), EveryOther()):
        pass


@pytest.mark.parametrize("picks", [(), (1, 0), (0, 0), (-1, 0), (0, 99)])
@pytest.mark.parametrize("family", VIDEO)
def test_a_wrong_choice_of_frames_is_named(family: str, picks: tuple[int, ...]) -> None:
    model = tiny(family)
    batch = inputs(model, family, "video", "single")
    plain = oracle.generate_with_logits(model, batch, max_new_tokens=2)
    with compress(model, Picks(picks=picks)), pytest.raises(InputError, match="frames chose"):
        model(**oracle.clone(batch))
    assert torch.equal(oracle.generate_with_logits(model, batch, max_new_tokens=2).logits, plain.logits)


def test_stacked_videos_need_the_same_number_of_frames() -> None:
    @dataclass(frozen=True)
    class ByContent(EveryOther):
        def frames(self, clip: Tensor, ctx: Context) -> Tensor:
            return torch.arange(1 + int(bool(clip[0, 0, 0, 0] > first)))

    model = tiny("llava_onevision")
    batch = inputs(model, "llava_onevision", "video", "plain")
    first = batch["pixel_values_videos"][:, 0, 0, 0, 0].min()
    with compress(model, ByContent()), pytest.raises(UnsupportedError, match="same number of frames"):
        model(**batch)
