"""What InternVL has for itself: videos as pictures, norms of queries and keys, blocks that take no mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import InternVLForConditionalGeneration

from mmtoken import compress
from mmtoken.compressors import DivPrune, DyCoke, FastV, ToMe, UniformGrid, VisionZip
from mmtoken.compressors.base import Compressor, Context, Need, Positions
from mmtoken.errors import UnsupportedError
from mmtoken.tokens import VisualTokens
from tests import oracle
from tests.backbones.processors import conversation, photograph, processor, video
from tests.backbones.tiny_models import build, config, inputs, visual_mask
from tests.contract.reference import assert_items_are_the_placeholders, kept_by_layer
from tests.engine.agreement import assert_close


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """A row with a video of four frames and a picture, and a row with a video: what the real processor makes."""
    made = processor("internvl", tmp_path_factory.mktemp("internvl"))
    turns = [
        conversation("What happens?", video(1), photograph(2, (128, 64))),
        conversation("Describe the video.", video(3)),
    ]
    batch: dict[str, Tensor] = made.apply_chat_template(
        turns,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    return dict(batch)


@pytest.mark.parametrize("method", [UniformGrid(keep=1.0), FastV(keep=1.0, layer=2), ToMe(keep=1.0)])
def test_videos_with_everything_kept_are_answered_alike(frames: dict[str, Tensor], method: Compressor) -> None:
    model = build("internvl")
    want = oracle.generate_with_logits(model, frames, max_new_tokens=4)
    with compress(model, method) as session:
        got = oracle.generate_with_logits(model, frames, max_new_tokens=4)
    assert torch.equal(got.logits, want.logits) and torch.equal(got.sequences, want.sequences)
    # Four frames, the picture in two tiles and its thumbnail, four frames.
    assert session.report.item_rows == [0] * 7 + [1] * 4
    assert session.report.tokens_in == [16] * 11
    assert_items_are_the_placeholders(session.report, model, frames)


@pytest.mark.parametrize("method", [DivPrune(keep=0.4), DivPrune(keep=3), VisionZip(keep=0.4, contextual=0)])
def test_each_frame_of_a_video_is_cut_as_a_picture(frames: dict[str, Tensor], method: Any) -> None:
    model = build("internvl")
    with compress(model, method) as session:
        got = oracle.generate_with_logits(model, frames, max_new_tokens=4)
    assert session.report.tokens_out == [3 if method.keep == 3 else 6] * 11
    depth = len(oracle.text_model(model).layers)
    keep = kept_by_layer(session.report, torch.zeros_like(visual_mask(model, frames)), depth)
    with oracle.masked_keys(model, keep):
        want = oracle.generate_with_logits(model, frames, max_new_tokens=4)
    assert_close(got.logits, want.logits)
    assert torch.equal(got.sequences, want.sequences)


def test_methods_for_videos_leave_frames_that_come_as_pictures(frames: dict[str, Tensor]) -> None:
    model = build("internvl")
    with compress(model, DyCoke(keep=0.3)) as session, torch.no_grad():
        model(**frames)
    assert session.report.tokens_out == [16] * 11


@dataclass(frozen=True)
class Look(Compressor):
    """Leaves everything, and notes attention and keys of the tower."""

    keep: float = 1.0
    positions: Positions = "keep"
    needs: ClassVar[frozenset[Need]] = frozenset({"tower_attention", "tower_keys"})

    def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        SEEN.append((ctx.tower_attention(tokens), ctx.tower_keys(tokens)))
        return tokens


SEEN: list[tuple[Tensor, Tensor]] = []


@pytest.mark.parametrize("norm", [False, True])
@torch.no_grad()
def test_attention_and_keys_are_those_behind_their_norms(norm: bool) -> None:
    settings = config("internvl")
    settings.vision_config.use_qk_norm = norm
    settings._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = InternVLForConditionalGeneration(settings).eval()
        for name, p in model.model.vision_tower.named_parameters():
            if p.ndim == 2 or "norm" in name:
                p.normal_(0.0, 0.3)
    batch = inputs(model, "internvl", "image", "single")
    SEEN.clear()
    seen: list[Tensor] = []
    block = model.model.vision_tower.encoder.layer[-1].attention
    handles = [
        block.k_norm.register_forward_hook(lambda module, args, out: seen.append(out)),
        block.register_forward_hook(lambda module, args, out: seen.append(out[1])),
    ]
    model(**batch)
    for handle in handles:
        handle.remove()
    keys, weights = seen
    with compress(model, Look()):
        model(**batch)
    ((got_attention, got_keys),) = SEEN
    squares = [[(y + i) * 8 + x + j for i in (0, 1) for j in (0, 1)] for y in range(0, 8, 2) for x in range(0, 8, 2)]
    received = weights[:, :, 0, 1:].sum(1)
    mean = keys[:, 1:].unflatten(-1, (4, -1)).mean(-2)
    assert_close(got_attention, torch.stack([received[:, square].mean(1) for square in squares], 1))
    assert_close(got_keys, torch.stack([mean[:, square].mean(1) for square in squares], 1))


def test_a_mask_is_refused_where_the_recomputation_would_miss_it() -> None:
    model = build("internvl").train()
    batch = inputs(model, "internvl", "image", "single")
    model.gradient_checkpointing_enable()
    with compress(model, ToMe(keep=0.5)), pytest.raises(UnsupportedError, match="take no mask"):
        model(**batch)
    with compress(model, VisionZip(keep=0.5)) as session:  # reads the blocks, and masks nothing
        model(**batch, labels=batch["input_ids"]).loss.backward()
    assert session.report.tokens_out == [8] * 3
    with compress(model.eval(), ToMe(keep=0.5)) as session, torch.no_grad():  # recomputes nothing
        model(**batch)
    assert session.report.tokens_out == [8] * 3
    model.train().gradient_checkpointing_disable()
    with compress(model, ToMe(keep=0.5)) as session:
        model(**batch, labels=batch["input_ids"]).loss.backward()
    assert session.report.tokens_out == [8] * 3
