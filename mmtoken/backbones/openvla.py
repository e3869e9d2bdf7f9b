"""OpenVLA: one or two timm towers side by side, a token-wise projector, a Llama that answers with action tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from mmtoken.backbones.base import Backbone, Layout, Modality, Tower, prefix_flags


class OpenVLA(Backbone):
    """`mmtoken.models.openvla.OpenVLAForActionPrediction` and `OpenVLAForActionChunks`.

    Facts of the tower (attention, keys, features) are those of the first tower, DINOv2 in official models: both towers
    see the same patches.
    """

    name: ClassVar[str] = "OpenVLA"
    model_types: ClassVar[tuple[str, ...]] = ("openvla", "openvla_chunks")
    tokenwise_projector: ClassVar[bool] = True
    plain_tower: ClassVar[bool] = False

    @property
    def root(self) -> Any:
        return self.model

    @property
    def decoder(self) -> Any:
        return self.root.language_model.model

    def tower(self) -> Tower:
        module = self.root.vision_backbone
        first = module.featurizer
        # The projector reads the second-to-last block, and the last one never runs.
        blocks = first.blocks[: len(first.blocks) - 1]
        return Tower(
            module=module,
            blocks=blocks,
            feature_block=len(blocks) - 1,
            prefix=int(first.num_prefix_tokens),
            unit=1,
            heads=module.config.num_attention_heads,
            attention="attn",
            queries="qkv",
            keys="qkv",
            values="qkv",
            output="proj",
            norms=("norm1", "norm2"),
        )

    @property
    def action_queries(self) -> int:
        return int(self.model.config.action_queries)

    def widths(self) -> tuple[int, int]:
        facts = self.root.vision_backbone.config
        return facts.hidden_size, facts.output_size

    def projector(self) -> nn.Module:
        projector: nn.Module = self.root.projector
        return projector

    def layout(self, modality: Modality, call: Mapping[str, Any], tiles: int) -> Layout:
        rows, columns = self.root.vision_backbone.featurizer.patch_embed.grid_size
        protected = prefix_flags(tiles * rows * columns, call["pixel_values"].device)
        return Layout([rows * columns] * tiles, ((1, rows, columns),) * tiles, protected)

    def to_prompt(self, modality: Modality, call: Mapping[str, Any], values: Tensor) -> Tensor:
        return values.flatten(0, 1)

    def item_pixels(self, modality: Modality, call: Mapping[str, Any]) -> list[Tensor]:
        return list(call["pixel_values"])
