"""Random networks that watch streams, in any size: what a stream costs does not depend on the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

_WORDS = ["<pad>", "<unk>", "<image>", "<video>", "what", "happens", "now", "?"]


@dataclass(frozen=True)
class StreamShape:
    """Sizes of a random LLaVA-OneVision.

    Attributes:
        hidden, layers, heads, key_heads, intermediate, vocabulary: of the Qwen2 decoder.
        vision_hidden, vision_layers, vision_heads, vision_intermediate: of the SigLIP tower.
        image, patch: pixels; a frame has ceil(image / patch / 2)^2 tokens after pooling.
    """

    hidden: int = 64
    layers: int = 4
    heads: int = 4
    key_heads: int = 2
    intermediate: int = 128
    vocabulary: int = 64
    vision_hidden: int = 32
    vision_layers: int = 2
    vision_heads: int = 4
    vision_intermediate: int = 64
    image: int = 112
    patch: int = 14

    @property
    def tokens(self) -> int:
        """Visual tokens of a frame."""
        return math.ceil(self.image // self.patch / 2) ** 2


TINY = StreamShape()
"""For runs of ten thousand frames on one core."""

HALF_BILLION = StreamShape(
    hidden=896, layers=24, heads=14, key_heads=2, intermediate=4864, vocabulary=151936,
    vision_hidden=1152, vision_layers=26, vision_heads=16, vision_intermediate=4304, image=384,
)  # fmt: skip
"""The shape of LLaVA-OneVision-0.5B: Qwen2-0.5B behind SigLIP-so400m, 196 tokens a frame."""


def random_stream_model(
    shape: StreamShape, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor]:
    """A model of `shape` with random weights and its processor; no file is read, no global generator is moved."""
    vision = SiglipVisionConfig(
        hidden_size=shape.vision_hidden,
        intermediate_size=shape.vision_intermediate,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=shape.image,
        patch_size=shape.patch,
        vision_use_head=False,
    )
    text = Qwen2Config(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=32768,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_token_index=2,
        video_token_index=3,
    )
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = LlavaOnevisionForConditionalGeneration(config).eval()
        finally:
            torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    return model, _processor(shape)


def _processor(shape: StreamShape) -> LlavaOnevisionProcessor:
    table = Tokenizer(models.WordLevel({word: number for number, word in enumerate(_WORDS)}, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(
        tokenizer_object=table,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<video>"],
    )
    size = {"height": shape.image, "width": shape.image}
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size),
        words,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(shape.image // shape.patch) ** 2,
        vision_feature_select_strategy="full",
        chat_template=None,
    )


def random_frames(side: int, count: int, seed: int = 0) -> Iterator[np.ndarray[Any, Any]]:
    """uint8[side, side, 3] frames: a bright square that drifts over noise that is new in every frame."""
    rng = np.random.default_rng(seed)
    width = max(1, side // 4)
    for number in range(count):
        frame = rng.integers(0, 128, (side, side, 3), dtype=np.uint8)
        left = number % max(1, side - width)
        frame[left : left + width, left : left + width] = 255
        yield frame
