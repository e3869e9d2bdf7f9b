"""The network of tiny-llava-video: transformers' `LlavaOnevisionForConditionalGeneration` in tiny-llava's sizes.

Tower, projector and decoder are those of tiny-llava (8 blocks, 8 layers, width 128), so its weights carry over; new are
the pooling of 2 x 2 patches to 16 tokens per frame, the newline token behind a clip, a few words, and room for 4096
positions. Nothing is subclassed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)

from mmtoken.datasets.moving_shapes import DIRECTIONS, MAX_OBJECTS
from mmtoken.datasets.shapes_qa import COLORS, IMAGE_SIZE, SHAPES
from mmtoken.models.registry import find_model
from mmtoken.models.tiny_llava.network import NetworkConfig
from mmtoken.models.tiny_llava.processor import IMAGE_ID
from mmtoken.models.tiny_llava_video.processor import VIDEO_ID, VOCABULARY

POSITIONS = 4096


def build_network(config: NetworkConfig | None = None) -> LlavaOnevisionForConditionalGeneration:
    """A freshly initialised network; seed torch before to repeat it. tiny-llava's weights fit the default sizes."""
    c = config or NetworkConfig()
    whole = LlavaOnevisionConfig(
        vision_config=c.tower(),
        text_config=c.decoder(len(VOCABULARY), POSITIONS),
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
