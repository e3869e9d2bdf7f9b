"""OpenVLA's processor: prompts, places for visual tokens, and pictures as upstream's settings ask for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from mmtoken.errors import InputError
from mmtoken.models.openvla import PrismaticImageProcessor, PrismaticProcessor
from mmtoken.models.openvla.splice import insert
from tests.backbones import openvla_checkpoint as official
from tests.backbones.processors import photograph, tokenizer
from tests.backbones.tiny_models import TEXT_TOKENS

pytestmark = pytest.mark.lowest


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> PrismaticProcessor:
    folder = tmp_path_factory.mktemp("openvla")
    official.write(folder)
    return PrismaticProcessor.from_pretrained(folder)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_inserting_is_a_plain_loop(data: st.DataObject) -> None:
    rows, length, count = (data.draw(st.integers(1, 5)) for _ in range(3))
    values = torch.arange(rows * length).view(rows, length)
    at = [data.draw(st.integers(0, length)) for _ in range(rows)]
    want = [[*row[:place], *[-7] * count, *row[place:]] for row, place in zip(values.tolist(), at, strict=True)]
    assert insert(values, torch.tensor(at), count, -7).tolist() == want


def test_a_prompt_is_bos_patches_text_and_a_space(processor: PrismaticProcessor) -> None:
    prompt = processor.prompt("Put the CUP down")
    assert prompt == "In: What action should the robot take to put the cup down?\nOut:"
    batch = processor(text=[prompt, "go"], images=[photograph(1), photograph(2)])
    ids, mask = batch["input_ids"].tolist(), batch["attention_mask"].tolist()
    words = processor.tokenizer(prompt)["input_ids"]
    assert processor.space_token_id == processor.tokenizer.convert_tokens_to_ids("▁") != words[-1]
    assert ids[0] == [1, *[TEXT_TOKENS + 1] * 16, *words[1:], processor.space_token_id]
    short = [1, *[TEXT_TOKENS + 1] * 16, *processor.tokenizer("go")["input_ids"][1:], processor.space_token_id]
    assert ids[1] == [TEXT_TOKENS] * (len(ids[0]) - len(short)) + short
    assert mask == [[1] * len(ids[0]), [0] * (len(ids[0]) - len(short)) + [1] * len(short)]
    assert batch["pixel_values"].shape == (2, 6, 56, 56)
    assert set(batch) == set(processor.model_input_names)


def test_a_prompt_that_ends_with_the_space_gets_no_other_one(processor: PrismaticProcessor) -> None:
    plain = processor(text="go", images=photograph(1))["input_ids"]
    assert torch.equal(processor(text="go ", images=photograph(1))["input_ids"], plain)


def test_pictures_may_come_as_arrays(processor: PrismaticProcessor) -> None:
    picture = photograph(1)
    want = processor(text="go", images=picture)["pixel_values"]
    for same in (np.asarray(picture), [picture], np.asarray(picture)[None]):
        assert torch.equal(processor(text=["go"], images=same)["pixel_values"], want)


def towers(strategy: str, **options: Any) -> PrismaticImageProcessor:
    return PrismaticImageProcessor(
        use_fused_vision_backbone=True,
        image_resize_strategy=strategy,
        input_sizes=[(3, 28, 28)] * 2,
        means=official.MEANS,
        stds=official.STDS,
        **options,
    )


def scaled(picture: Image.Image, mean: Any, deviation: Any) -> Tensor:
    values = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    return (values - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]


def seen(strategy: str, picture: Image.Image) -> Image.Image:
    """The square that a strategy makes of a picture twice as wide as it is high."""
    wide, high = picture.size
    if strategy == "resize-naive":
        return picture.resize((28, 28), Image.Resampling.BICUBIC)
    if strategy == "resize-crop":
        return picture.resize((56, 28), Image.Resampling.BICUBIC).crop((14, 0, 42, 28))
    square = Image.new("RGB", (wide, wide), tuple(int(value * 255) for value in official.MEANS[0]))
    square.paste(picture, (0, (wide - high) // 2))
    return square.resize((28, 28), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("strategy", ["resize-naive", "resize-crop", "letterbox"])
def test_every_strategy_for_both_towers(strategy: str) -> None:
    picture = photograph(4, (80, 40))
    pixels = towers(strategy)(picture)["pixel_values"]
    want = [scaled(seen(strategy, picture), *how) for how in zip(official.MEANS, official.STDS, strict=True)]
    torch.testing.assert_close(pixels[0], torch.cat(want), atol=1e-5, rtol=1e-4)


def test_the_crop_of_ninety_percent() -> None:
    picture = photograph(6, (41, 31))
    values = np.asarray(picture).astype(np.float64) / 255
    side, (high, wide) = 0.9**0.5, values.shape[:2]
    want = np.zeros_like(values)
    for y in range(high):
        for x in range(wide):
            # Corners of the result lie on corners of the cut.
            v = (1 - side) / 2 * (high - 1) + y * side
            u = (1 - side) / 2 * (wide - 1) + x * side
            top, left = int(v), int(u)
            down, right = min(top + 1, high - 1), min(left + 1, wide - 1)
            upper = values[top, left] * (1 - (u - left)) + values[top, right] * (u - left)
            lower = values[down, left] * (1 - (u - left)) + values[down, right] * (u - left)
            want[y, x] = upper * (1 - (v - top)) + lower * (v - top)
    cut = Image.fromarray((want * 255.5).astype(np.uint8))
    whole = towers("resize-naive")(cut)["pixel_values"]
    got = towers("resize-naive", crop_share=0.9)(picture)["pixel_values"]
    assert (got - whole).abs().max() < 0.03  # a rounding of one grey level
    assert (got - towers("resize-naive")(picture)["pixel_values"]).abs().max() > 0.1
    kept = towers("resize-naive", crop_share=1.0)(picture)["pixel_values"]
    torch.testing.assert_close(kept, towers("resize-naive")(picture)["pixel_values"], atol=0.03, rtol=0)


def test_settings_are_saved_and_read_again(processor: PrismaticProcessor, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    processor.save_pretrained(folder)
    again = PrismaticProcessor.from_pretrained(folder)
    for name in ("num_image_tokens", "image_token_id", "space_token_id"):
        assert getattr(again, name) == getattr(processor, name)
    first, second = processor.image_processor.to_dict(), again.image_processor.to_dict()
    assert {name: first[name] for name in official.image_settings(2) if name in first and name != "auto_map"} == {
        name: value for name, value in second.items() if name in official.image_settings(2)
    }
    assert first["tvf_resize_params"] == official.image_settings(2)["tvf_resize_params"]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 4), np.uint8), r"images\[0\] is uint8 of shape \(4, 4, 4\)"),
        (np.zeros((4, 4), np.uint8), r"shape \(4, 4\)"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.full((4, 4, 3), np.nan), "holds NaN"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
    ],
)
def test_images_that_are_none(processor: PrismaticProcessor, image: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        processor(text="go", images=image)


def test_other_bad_input(processor: PrismaticProcessor, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="instruction is empty"):
        processor.prompt("  ")
    with pytest.raises(InputError, match="2 prompts but 1 images"):
        processor(text=["a", "b"], images=[photograph(1)])
    with pytest.raises(InputError, match="belong together"):
        processor(text="a")
    with pytest.raises(InputError, match="image_resize_strategy='stretch'"):
        PrismaticImageProcessor(image_resize_strategy="stretch")
    with pytest.raises(InputError, match=r"crop_share=1\.5"):
        PrismaticImageProcessor(crop_share=1.5)
    with pytest.raises(InputError, match="other numbers of towers"):
        PrismaticImageProcessor(use_fused_vision_backbone=True)
    padless = tokenizer("openvla", tmp_path)
    padless.pad_token = None
    with pytest.raises(InputError, match="no padding token"):
        PrismaticProcessor(processor.image_processor, padless)
