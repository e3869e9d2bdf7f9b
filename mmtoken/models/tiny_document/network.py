"""The network of tiny-document: transformers' own `Idefics3ForConditionalGeneration`, built small from a configuration.

A SigLIP-like tower on tiles of 48 px (patches of 6 px: 64 per tile), pixel shuffle by 2 (16 visual tokens per tile) and
a Llama decoder of the same width. Nothing is subclassed: what runs on Idefics3 runs here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, LlamaConfig

from mmtoken.datasets.document_pages import BARS, CHARACTERS, KINDS, LABELS, REGION
from mmtoken.models.tiny_document.processor import BOS_ID, EOS_ID, IMAGE_ID, PAD_ID, PATCH_SIZE, SCALE, VOCABULARY


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the network.

    Attributes:
        vision_layers: blocks of the tower.
        text_layers: layers of the Llama decoder.
        width: hidden size of both.
        heads: attention heads of both.
        mlp_ratio: MLP width over hidden size, in both.
        initializer_range: standard deviation of the initial weights.
        rope_theta: base of the decoder's rotary positions.
    """

    vision_layers: int = 4
    text_layers: int = 6
    width: int = 128
    heads: int = 4
    mlp_ratio: int = 3
    initializer_range: float = 0.06
    rope_theta: float = 10_000.0


def build_network(config: NetworkConfig | None = None) -> Idefics3ForConditionalGeneration:
    """A freshly initialised network; seed torch before to repeat it."""
    c = config or NetworkConfig()
    vision = {
        "hidden_size": c.width,
        "intermediate_size": c.width * c.mlp_ratio,
        "num_hidden_layers": c.vision_layers,
        "num_attention_heads": c.heads,
        "image_size": REGION,
        "patch_size": PATCH_SIZE,
        "initializer_range": c.initializer_range,
    }
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=c.width,
        intermediate_size=c.width * c.mlp_ratio,
        num_hidden_layers=c.text_layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.heads,
        max_position_embeddings=2048,
        initializer_range=c.initializer_range,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        tie_word_embeddings=False,
    )
    whole = Idefics3Config(
        vision_config=vision, text_config=text, image_token_id=IMAGE_ID, scale_factor=SCALE, tie_word_embeddings=False
    )
    return Idefics3ForConditionalGeneration(whole)


class TowerStates(nn.Module):
    """The tower on whole tiles: float[tiles, 3, 48, 48] -> float[tiles, 64, D], as the model computes it.

    The model's own embedding finds the position of every patch in a loop over tiles, for tiles that are padded; ours
    never are, and the loop cannot be compiled.
    """

    def __init__(self, tower: Any) -> None:
        super().__init__()
        # In a tuple: the weights belong to the network, and shall not be listed twice.
        self._tower: tuple[Any] = (tower,)

    def forward(self, pixels: Tensor) -> Tensor:
        tower = self._tower[0]
        embed = tower.embeddings
        hidden = embed.patch_embedding(pixels).flatten(2).transpose(1, 2) + embed.position_embedding.weight
        hidden = tower.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state
        out: Tensor = tower.post_layernorm(hidden)
        return out


class AuxiliaryHeads(nn.Module):
    """Linear read-outs of the tower that stand in for pre-training; they are not part of the exported model.

    On the patches of crops: the character on it, the field that it belongs to (by label), the colour of the bar on it,
    and whether that is the highest, the lowest or another bar; class 0 is none of them. On the patches of the whole
    page: the kind of region there.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classes = (1 + len(CHARACTERS), 1 + len(LABELS), 1 + len(BARS), 1 + 3, len(KINDS))
        self.read = nn.Linear(width, sum(self.classes))

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Tower output `float[..., D]` -> logits of each of them in this order, `float[..., classes]`."""
        return tuple(self.read(self.norm(hidden)).split(self.classes, dim=-1))
