"""The tiny OpenVLA: `OpenVLAForActionPrediction`, built small from a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig

from mmtoken.datasets.tabletop import ACTIONS, SIZE
from mmtoken.models.openvla import OpenVLAConfig, OpenVLAForActionPrediction
from mmtoken.models.tiny_openvla.packing import PATCH_CLASSES
from mmtoken.models.tiny_openvla.processor import (
    BOS_ID,
    EOS_ID,
    IMAGE_ID,
    PAD_ID,
    PADDED_TO,
    PATCH_SIZE,
    SPACE_ID,
    VISUAL_TOKENS,
    WORDS,
)

DATASET = "pick_place"
"""The name of the action statistics, `unnorm_key`."""
TOWER = "vit_tiny_patch16_224"
"""timm's name; its sizes are replaced."""


WORD_SCALE = 0.6
"""Standard deviation of the initial word embeddings."""


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the network.

    Attributes:
        vision_layers: blocks of the tower; as in every OpenVLA the last one is not run.
        vision_width: hidden size of the tower.
        text_layers: layers of the Llama decoder.
        width: hidden size of the decoder.
        heads: attention heads of both.
        mlp_ratio: MLP width over hidden size, in both.
        initializer_range: standard deviation of the decoder's initial weights. Llama's .02 is tiny at this width and
            was not seen to learn.
    """

    vision_layers: int = 5
    vision_width: int = 96
    text_layers: int = 6
    width: int = 96
    heads: int = 4
    mlp_ratio: int = 3
    initializer_range: float = 0.06

    def whole(self) -> OpenVLAConfig:
        """The configuration of the network."""
        tower = {
            "patch_size": PATCH_SIZE,
            "embed_dim": self.vision_width,
            "depth": self.vision_layers,
            "num_heads": self.heads,
            "mlp_ratio": self.mlp_ratio,
        }
        decoder = LlamaConfig(
            vocab_size=WORDS + PADDED_TO,
            hidden_size=self.width,
            intermediate_size=self.width * self.mlp_ratio,
            num_hidden_layers=self.text_layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=512,
            initializer_range=self.initializer_range,
            pad_token_id=PAD_ID,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
            tie_word_embeddings=False,
        )
        ends = {"q01": [-1.0] * len(ACTIONS), "q99": [1.0] * len(ACTIONS), "mask": [True] * len(ACTIONS)}
        return OpenVLAConfig(
            vision_backbone_id="tiny-vit-64px",
            llm_backbone_id="tiny-llama",
            hf_llm_id="",
            arch_specifier="no-align+gelu-mlp",
            use_fused_vision_backbone=False,
            timm_model_ids=[TOWER],
            timm_model_args=[tower],
            image_sizes=[SIZE],
            text_config=decoder,
            pad_token_id=PAD_ID,
            pad_to_multiple_of=PADDED_TO,
            image_token_id=IMAGE_ID,
            space_token_id=SPACE_ID,
            norm_stats={DATASET: {"action": ends}},
        )


def build_network(config: NetworkConfig | None = None) -> OpenVLAForActionPrediction:
    """A freshly initialised network; seed torch before to repeat it."""
    network = OpenVLAForActionPrediction((config or NetworkConfig()).whole())
    tower: Any = network.vision_backbone.featurizer
    # timm's random positions are so faint that a short training hardly finds them.
    places = build_sincos2d_pos_embed(list(tower.patch_embed.grid_size), tower.embed_dim)
    tower.pos_embed.data[:, 1:] = places
    # Words as faint as the other weights drown, from the first layer on, in the mean of what they attend to.
    nn.init.normal_(network.language_model.model.embed_tokens.weight, std=WORD_SCALE)
    return network


class PatchHeads(nn.Module):
    """Linear read-outs of the tower that stand in for pre-training; they are not part of the exported model.

    They read from every patch what is on it (`PATCH_CLASSES`) and where in the picture these things are.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.parts = (*PATCH_CLASSES, 6)
        self.read = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(self.parts)))

    def forward(self, patches: Tensor) -> tuple[Tensor, ...]:
        """Patches float[B, N, D] -> logits float[B, N, classes] x 5 and places float[B, N, 6]."""
        found: tuple[Tensor, ...] = self.read(patches).float().split(self.parts, dim=-1)
        return found


class Pointers(nn.Module):
    """Linear read-outs of the decoder, for training only: where the things are that the words name.

    Each reads the patch (64 classes) and the place on it, seen from the patch's centre, in patches.
    """

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.read = nn.ModuleList(nn.Linear(width, VISUAL_TOKENS + 2) for _ in range(count))

    def loss(self, number: int, hidden: Tensor, points: Tensor) -> Tensor:
        """Of read-out `number` on hidden float[..., D] of which points float[..., 2], in patches, are asked."""
        side = SIZE // PATCH_SIZE
        found = self.read[number](self.norm(hidden)).float().flatten(0, -2)
        column, row = points.floor().long().clamp(0, side - 1).flatten(0, -2).unbind(-1)
        offset = points.flatten(0, -2) - torch.stack([column, row], -1) - 0.5
        where = functional.cross_entropy(found[:, :-2], row * side + column)
        return where + functional.smooth_l1_loss(found[:, -2:], offset)
