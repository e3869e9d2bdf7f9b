"""The network of tiny-llava-video: transformers' `LlavaOnevisionForConditionalGeneration` in tiny-llava's sizes.

Tower, projector and decoder are those of tiny-llava (8 blocks, 8 layers, width 128), so its weights carry over; new are
the pooling of 2 x 2 patches to 16 tokens per frame, the newline token behind a clip, a few words, and room for 4096
positions. Nothing is subclassed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)

from mmtoken.datasets.moving_shapes import DIRECTIONS, MAX_OBJECTS
from mmtoken.datasets.shapes_qa import COLORS, IMAGE_SIZE, SHAPES
from mmtoken.models.registry import find_model
from mmtoken.models.tiny_llava.processor import BOS_ID, EOS_ID, IMAGE_ID, PAD_ID, PATCH_SIZE
from mmtoken.models.tiny_llava_video.processor import VIDEO_ID, VOCABULARY

POSITIONS = 4096


@dataclass(frozen=True)
class VideoConfig:
    """Sizes of the network; the defaults are those of tiny-llava, whose weights fit no others.

    Attributes:
        vision_layers: blocks of the CLIP tower.
        text_layers: layers of the Llama decoder.
        width: hidden size of both.
        heads: attention heads of both.
        mlp_ratio: MLP width over hidden size, in both.
        initializer_range: standard deviation of the decoder's initial weights.
        rope_theta: base of the decoder's rotary positions.
    """

    vision_layers: int = 8
    text_layers: int = 8
    width: int = 128
    heads: int = 4
    mlp_ratio: int = 3
    initializer_range: float = 0.06
    rope_theta: float = 10_000.0


def build_network(config: VideoConfig | None = None) -> LlavaOnevisionForConditionalGeneration:
    """A freshly initialised network; seed torch before to repeat it."""
    c = config or VideoConfig()
    vision = CLIPVisionConfig(
        hidden_size=c.width,
        intermediate_size=c.width * c.mlp_ratio,
        projection_dim=c.width,
        num_hidden_layers=c.vision_layers,
        num_attention_heads=c.heads,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=c.width,
        intermediate_size=c.width * c.mlp_ratio,
        num_hidden_layers=c.text_layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.heads,
        max_position_embeddings=POSITIONS,
        initializer_range=c.initializer_range,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        tie_word_embeddings=False,
    )
    whole = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        video_token_index=VIDEO_ID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=[[IMAGE_SIZE, IMAGE_SIZE]],
        tie_word_embeddings=False,
    )
    return LlavaOnevisionForConditionalGeneration(whole)


def from_tiny_llava(seed: int = 0) -> LlavaOnevisionForConditionalGeneration:
    """The network with the weights of the shipped tiny-llava; the newline and the new words start at random."""
    torch.manual_seed(seed)
    network = build_network()
    shipped = LlavaForConditionalGeneration.from_pretrained(find_model("tiny-llava").path, dtype=torch.float32)
    own = network.state_dict()
    for name, value in shipped.state_dict().items():
        if own[name].shape == value.shape:
            own[name].copy_(value)
        else:  # embedding and output of words: the old ones come first
            own[name][: len(value)].copy_(value)
    return network


class ObjectHeads(nn.Module):
    """Linear read-outs of the decoder at visual tokens; they are not part of the exported model.

    On tokens that show an object: its colour, shape, direction, and its place in the order of appearance. All of them
    can be known from the frames so far; nothing is read that would sum up the clip on one token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.classes = (len(COLORS), len(SHAPES), len(DIRECTIONS), MAX_OBJECTS)
        self.read = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(self.classes)))

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Hidden states float[..., D] -> logits of each in this order, float[..., classes]."""
        colour, shape, direction, order = self.read(hidden).split(self.classes, dim=-1)
        return colour, shape, direction, order
