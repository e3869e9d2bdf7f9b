"""LLaVA-Video's grid layout: every row of every frame ends with a newline token, in the model and in the processor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import mmtoken
from mmtoken.backbones.registry import adapt
from mmtoken.compressors import DivPrune
from mmtoken.errors import UnsupportedError
from mmtoken.models.llava_video import LlavaVideoConfig, LlavaVideoForConditionalGeneration, LlavaVideoProcessor
from mmtoken.models.llava_video.network import pooled_side
from tests import oracle
from tests.backbones.processors import conversation, photograph, video, write_checkpoint
from tests.backbones.processors import processor as make_processor
from tests.backbones.tiny_models import build, inputs, roles, visual_mask

VIDEO = roles("llava_video")["video"]


def wide(side: int, mode: str = "bilinear") -> LlavaVideoForConditionalGeneration:
    """A random model whose tower has side x side patches of two pixels."""
    config = LlavaVideoConfig(
        vision_config=tf.SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=2 * side,
            patch_size=2,
            vision_use_head=False,
        ),
        text_config=tf.Qwen2Config(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=384,
            pad_token_id=0,
        ),
        image_grid_pinpoints=[[2 * side, 2 * side]],
        image_token_index=323,
        video_token_index=VIDEO,
        mm_spatial_pool_mode=mode,
    )
    torch.manual_seed(0)
    return LlavaVideoForConditionalGeneration(config).eval()


def clip(model: LlavaVideoForConditionalGeneration, videos: int, frames: int, seed: int = 0) -> Tensor:
    size = model.config.vision_config.image_size
    return torch.randn(videos, frames, 3, size, size, generator=torch.Generator().manual_seed(seed))


def prompt(rows: int, tokens: int) -> dict[str, Tensor]:
    ids = torch.tensor([[5, 6, *[VIDEO] * tokens, 7, 8]] * rows)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def embedded(model: Any, pixels: Tensor, tokens: int) -> Tensor:
    """float[videos, tokens, D]: what the decoder is fed in place of the placeholders."""
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**prompt(len(pixels), tokens), pixel_values_videos=pixels)
    hook.remove()
    return seen[0][:, 2:-2]


@torch.no_grad()
def by_hand(model: Any, pixels: Tensor) -> Tensor:
    """The grid layout in plain loops."""
    vision, videos = model.config.vision_config, []
    side = vision.image_size // vision.patch_size
    for frames in pixels:
        tokens = []
        for frame in frames:
            states = model.model.vision_tower(frame[None], output_hidden_states=True).hidden_states
            patches = model.model.multi_modal_projector(states[model.config.vision_feature_layer])[0].view(
                side, side, -1
            )
            if model.config.mm_spatial_pool_mode == "average":
                rows = [
                    [patches[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean((0, 1)) for c in range(side // 2)]
                    for r in range(side // 2)
                ]
            else:
                size = math.ceil(side / 2)
                scaled = torch.nn.functional.interpolate(
                    patches.permute(2, 0, 1)[None], size=(size, size), mode="bilinear"
                )
                rows = [list(row) for row in scaled[0].permute(1, 2, 0)]
            for row in rows:
                tokens += [*row, model.model.image_newline]
        videos.append(torch.stack(tokens))
    return torch.stack(videos)


@pytest.mark.parametrize(
    ("side", "mode", "pooled"),
    [
        (27, "bilinear", 14),
        (26, "bilinear", 13),
        (27, "average", 13),
        (4, "average", 2),
        (3, "average", 1),
        (1, "bilinear", 1),
    ],
)
def test_every_row_of_every_frame_ends_with_a_newline(side: int, mode: str, pooled: int) -> None:
    model = wide(side, mode)
    pixels = clip(model, 2, 3)
    assert pooled_side(side, mode) == pooled
    tokens = 3 * pooled * (pooled + 1)
    got = embedded(model, pixels, tokens)
    torch.testing.assert_close(got, by_hand(model, pixels), atol=1e-5, rtol=1e-4)
    newline = (got == model.model.image_newline).all(-1)
    want = (torch.arange(tokens) + 1) % (pooled + 1) == 0
    assert torch.equal(newline, want.expand(2, -1))


def test_a_frame_of_real_size_takes_210_tokens() -> None:
    assert 14 * 15 == pooled_side(384 // 14, "bilinear") * (pooled_side(384 // 14, "bilinear") + 1) == 210
    processor = LlavaVideoProcessor.__new__(LlavaVideoProcessor)
    processor.num_image_tokens, processor.mm_spatial_pool_mode = 27 * 27, "bilinear"
    assert processor.frame_tokens() == 210
    processor.mm_spatial_pool_mode = "average"
    assert processor.frame_tokens() == 182


@pytest.mark.parametrize("mode", ["bilinear", "average"])
def test_the_adapter_lays_tokens_out_as_the_model_does(mode: str) -> None:
    model = wide(5, mode)
    pixels = clip(model, 2, 3)
    side = pooled_side(5, mode)
    backbone = adapt(model)
    call = {"pixel_values_videos": pixels}
    layout = backbone.layout("video", call, 6)
    assert layout.counts == [3 * side * (side + 1)] * 2
    assert layout.grids == ((3, side, side),) * 2
    got = embedded(model, pixels, layout.counts[0])
    assert torch.equal((got == model.model.image_newline).all(-1).flatten(), layout.protected)
    # projected features carried by hand are the model's own
    with torch.no_grad():
        states = model.model.vision_tower(pixels.flatten(0, 1), output_hidden_states=True).hidden_states
        features = model.model.multi_modal_projector(states[model.config.vision_feature_layer])
        carried = backbone.to_prompt("video", call, features)
    where = ~layout.protected
    torch.testing.assert_close(carried[where], got.flatten(0, 1)[where], atol=1e-6, rtol=1e-5)
    assert not carried[layout.protected].any()


def test_newlines_stay_and_do_not_count() -> None:
    model = build("llava_video")
    batch = inputs(model, "llava_video", "video", "plain")
    session = mmtoken.compress(model, DivPrune(keep=1))
    with session:
        model(**oracle.clone(batch))
    report = session.report
    assert report.tokens_in == [16, 16]
    assert report.tokens_out == [4, 4]  # one per frame
    assert {lengths[-1] for lengths in report.layer_lengths} == {batch["input_ids"].shape[1] - 12}


def test_images_are_those_of_onevision() -> None:
    model = build("llava_video")
    batch = inputs(build("llava_onevision"), "llava_onevision", "image", "padded_ragged")
    other = tf.LlavaOnevisionForConditionalGeneration(
        tf.LlavaOnevisionConfig(**{k: v for k, v in model.config.to_dict().items() if k != "model_type"})
    ).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(**oracle.clone(batch)).logits, other(**oracle.clone(batch)).logits)
    with mmtoken.compress(model, DivPrune(keep=3)) as session:
        model(**oracle.clone(batch))
    assert session.report.tokens_out == [3] * len(session.report.tokens_in)


@pytest.mark.parametrize("mode", ["bilinear", "average"])
def test_saved_and_loaded(tmp_path: Path, mode: str) -> None:
    folder = write_checkpoint("llava_video", tmp_path / "model", layers=2)
    model, processor = mmtoken.load(folder)
    assert isinstance(model, LlavaVideoForConditionalGeneration)
    assert isinstance(processor, LlavaVideoProcessor)
    model.config.mm_spatial_pool_mode = processor.mm_spatial_pool_mode = mode
    mmtoken.save(model, tmp_path / "again", processor=processor)
    second, reader = mmtoken.load(tmp_path / "again")
    assert (second.config.mm_spatial_pool_mode, reader.mm_spatial_pool_mode) == (mode, mode)
    assert second.config.mm_newline_position == "grid"
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in model.state_dict().items())
    turn = [conversation("What happens?", video(1))]
    batch = reader.apply_chat_template(
        turn, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    side = pooled_side(3, mode)
    assert int(visual_mask(second, batch).sum()) == 4 * side * (side + 1)
    with torch.no_grad():
        assert torch.equal(model(**oracle.clone(batch)).logits, second(**oracle.clone(batch)).logits)
    picture = reader.apply_chat_template(
        [conversation("What?", photograph(1))], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    assert second.generate(**picture, max_new_tokens=2, do_sample=False).shape[1] > picture["input_ids"].shape[1]


def test_the_processor_counts_without_pixels(tmp_path: Path) -> None:
    reader = make_processor("llava_video", tmp_path)
    counts = reader._get_num_multimodal_tokens(image_sizes=[(42, 42)], video_sizes=[(4, 64, 96), (1, 64, 96)])
    assert counts["num_video_tokens"] == [24, 6]
    assert len(counts["num_image_tokens"]) == 1


def test_other_layouts_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"mm_spatial_pool_mode='max'.*'average'"):
        LlavaVideoConfig(mm_spatial_pool_mode="max")
    with pytest.raises(UnsupportedError, match=r"mm_newline_position='one_token'.*LlavaOnevision"):
        LlavaVideoConfig(mm_newline_position="one_token")


def test_a_tuple_where_a_tuple_is_asked_for() -> None:
    model = wide(4)
    pixels = clip(model, 1, 2)
    with torch.no_grad():
        whole = model.model.get_video_features(pixels)
        parts = model.model.get_video_features(pixels, return_dict=False)
    assert isinstance(parts, tuple)
    assert any(isinstance(part, Tensor) and torch.equal(part, whole.pooler_output) for part in parts)
