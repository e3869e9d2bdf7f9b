"""The tiny LLaVA network: transformers' own `LlavaForConditionalGeneration`, built small from a configuration.

A CLIP vision tower (96 px, patches of 12 px, so 64 visual tokens and a CLS token) and a Llama decoder of the same
width, joined by LLaVA's two-layer projector. Nothing is subclassed: what runs on LLaVA-1.5 runs here.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mmtoken.datasets.shapes_qa import COLORS, IMAGE_SIZE, SHAPES
from mmtoken.models.tiny_llava.processor import BOS_ID, EOS_ID, IMAGE_ID, PAD_ID, PATCH_SIZE, VOCABULARY


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the network.

    Attributes:
        vision_layers: blocks of the CLIP tower.
        text_layers: layers of the Llama decoder.
        width: hidden size of both.
        heads: attention heads of both.
        mlp_ratio: MLP width over hidden size, in both.
        initializer_range: standard deviation of the decoder's initial weights. Llama's .02 is tiny at width 128 and
            was not seen to learn.
        rope_theta: base of the decoder's rotary positions.
    """

    vision_layers: int = 8
    text_layers: int = 8
    width: int = 128
    heads: int = 4
    mlp_ratio: int = 3
    initializer_range: float = 0.06
    rope_theta: float = 10_000.0

    def tower(self) -> CLIPVisionConfig:
        """Of the vision tower."""
        return CLIPVisionConfig(
            hidden_size=self.width,
            intermediate_size=self.width * self.mlp_ratio,
            projection_dim=self.width,
            num_hidden_layers=self.vision_layers,
            num_attention_heads=self.heads,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
        )

    def decoder(self, words: int, positions: int) -> LlamaConfig:
        """Of the decoder, for a vocabulary of so many words and prompts of up to so many tokens."""
        return LlamaConfig(
            vocab_size=words,
            hidden_size=self.width,
            intermediate_size=self.width * self.mlp_ratio,
            num_hidden_layers=self.text_layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=positions,
            initializer_range=self.initializer_range,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            pad_token_id=PAD_ID,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
            tie_word_embeddings=False,
        )


def build_network(config: NetworkConfig | None = None) -> LlavaForConditionalGeneration:
    """A freshly initialised network; seed torch before to repeat it."""
    c = config or NetworkConfig()
    whole = LlavaConfig(
        vision_config=c.tower(),
        text_config=c.decoder(len(VOCABULARY), positions=2048),
        image_token_index=IMAGE_ID,
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(whole)


class AuxiliaryHeads(nn.Module):
    """Linear read-outs of the tower that stand in for pre-training; they are not part of the exported model.

    `pairs` reads from CLS which of the 48 colour-shape pairs the picture holds, in place of CLIP's contrastive
    training: LLaVA drops CLS, so without it nothing would teach CLS to attend to what matters.
    `patches` reads from every patch the colour, shape and digit on it (class 0: none).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch_classes = (1 + len(COLORS), 1 + len(SHAPES), 1 + 10)
        self.pairs = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(COLORS) * len(SHAPES)))
        self.patches = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(self.patch_classes)))

    def forward(self, hidden: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Tower output `float[B, 1 + N, D]` -> pair logits `float[B, 48]`, patch logits `float[B, N, classes]` x 3."""
        return self.pairs(hidden[:, 0]), self.patches(hidden[:, 1:]).split(self.patch_classes, dim=-1)
