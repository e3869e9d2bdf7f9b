"""LLaVA-1.5: a CLIP-like tower, a token-wise projector, any decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from mmtoken.backbones.base import Backbone, Layout, Modality, Tower, feature_tower, patch_side, prefix_flags
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
        return feature_tower(self.model, self.root.vision_tower)

    def projector(self) -> nn.Module | None:
        projector: nn.Module = self.root.multi_modal_projector
        return projector

    def layout(self, modality: Modality, call: Mapping[str, Any], tiles: int) -> Layout:
        side = patch_side(self.model)
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
