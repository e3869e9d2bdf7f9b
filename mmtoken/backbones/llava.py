"""LLaVA-1.5: a CLIP-like tower, a token-wise projector, any decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from mmtoken.backbones.base import Backbone, Layout, Modality, Tower, hidden_state_block, prefix_flags
from mmtoken.errors import UnsupportedError

_TOWERS = ("clip_vision_model", "siglip_vision_model")


class Llava(Backbone):
    """`LlavaForConditionalGeneration`."""

    name: ClassVar[str] = "LLaVA-1.5"
    model_types: ClassVar[tuple[str, ...]] = ("llava",)
    tokenwise_projector: ClassVar[bool] = True

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        kind = model.config.vision_config.model_type
        if kind not in _TOWERS:
            raise UnsupportedError(
                f"vision_config.model_type={kind!r} is a tower of {self.name} that has no adapter; there are {_TOWERS}."
            )

    def tower(self) -> Tower:
        tower = self.root.vision_tower
        blocks = tower.encoder.layers
        # SigLIP-like towers have no CLS token.
        prefix = 1 if self.model.config.vision_config.model_type == "clip_vision_model" else 0
        return Tower(
            module=tower,
            blocks=blocks,
            feature_block=hidden_state_block(self.model.config.vision_feature_layer, len(blocks)),
            prefix=prefix,
            unit=1,
            heads=self.model.config.vision_config.num_attention_heads,
        )

    def projector(self) -> nn.Module:
        projector: nn.Module = self.root.multi_modal_projector
        return projector

    def _side(self) -> int:
        config = self.model.config.vision_config
        return int(config.image_size) // int(config.patch_size)

    def layout(self, modality: Modality, call: Mapping[str, Any], tiles: int) -> Layout:
        side = self._side()
        extra = int(self.model.config.vision_feature_select_strategy == "full" and self.tower().prefix)
        protected = prefix_flags(tiles * (side * side + extra), call["pixel_values"].device).view(tiles, -1)
        protected[:, :extra] = True
        return Layout([side * side + extra] * tiles, ((1, side, side),) * tiles, protected.flatten())

    def to_prompt(self, modality: Modality, call: Mapping[str, Any], values: Tensor) -> Tensor:
        if self.model.config.vision_feature_select_strategy == "full" and self.tower().prefix:
            values = nn.functional.pad(values, (0, 0, 1, 0))
        return values.flatten(0, 1)

    def item_pixels(self, modality: Modality, call: Mapping[str, Any]) -> list[Tensor]:
        return list(call["pixel_values"])
