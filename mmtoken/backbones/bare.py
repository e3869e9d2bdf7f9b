"""Models without the other half: a decoder whose visual tokens the caller marks, or a tower by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from mmtoken.backbones.base import Backbone, Layout, Modality, Tower
from mmtoken.errors import UnsupportedError


class BareDecoder(Backbone):
    """Any Hugging Face decoder with `layers` and `rotary_emb`; visual positions come from `visual=`."""

    name: ClassVar[str] = "bare decoder"
    model_types: ClassVar[tuple[str, ...]] = ("llama", "qwen2", "qwen3", "mistral")
    modalities: ClassVar[tuple[Modality, ...]] = ()
    whole: ClassVar[bool] = False

    @property
    def decoder(self) -> Any:
        return self.root

    def tower(self) -> None:
        return None

    def layout(self, modality: Modality, call: Mapping[str, Any], tiles: int) -> Layout:
        raise UnsupportedError("A bare decoder encodes no images; mark the visual positions with visual=bool[B, L].")

    def to_prompt(self, modality: Modality, call: Mapping[str, Any], values: Tensor) -> Tensor:
        raise UnsupportedError("A bare decoder encodes no images.")

    def item_pixels(self, modality: Modality, call: Mapping[str, Any]) -> list[Tensor]:
        raise UnsupportedError("A bare decoder encodes no images.")


class BareTower(Backbone):
    """`CLIPVisionModel` and `SiglipVisionModel`; each image is an item.

    Features are read where VLMs read them: after the last but one block for CLIP (LLaVA-1.5), after the last one for
    SigLIP (LLaVA-OneVision).
    """

    name: ClassVar[str] = "bare tower"
    model_types: ClassVar[tuple[str, ...]] = ("clip_vision_model", "siglip_vision_model")
    whole: ClassVar[bool] = False
    tokenwise_projector: ClassVar[bool] = True

    @property
    def root(self) -> Any:
        return self.model

    @property
    def decoder(self) -> None:
        return None

    def tower(self) -> Tower:
        # transformers 5.17 nests the transformer in `vision_model`; later versions do not.
        inner: Any = self.model._modules.get("vision_model", self.model)
        blocks = inner.encoder.layers
        clip = self.model.config.model_type == "clip_vision_model"
        head = inner._modules.get("head")
        return Tower(
            module=self.model,
            blocks=blocks,
            feature_block=len(blocks) - (2 if clip and len(blocks) > 1 else 1),
            prefix=int(clip),
            unit=1,
            heads=self.model.config.num_attention_heads,
            pooling=None if head is None else head.attention,
        )

    def layout(self, modality: Modality, call: Mapping[str, Any], tiles: int) -> Layout:
        pixels: Tensor = call["pixel_values"]
        rows, columns = self.patch_grid(pixels)
        protected = pixels.new_zeros(tiles * rows * columns).bool()
        return Layout([rows * columns] * tiles, ((1, rows, columns),) * tiles, protected)

    def to_prompt(self, modality: Modality, call: Mapping[str, Any], values: Tensor) -> Tensor:
        return values.flatten(0, 1)

    def item_pixels(self, modality: Modality, call: Mapping[str, Any]) -> list[Tensor]:
        return list(call["pixel_values"])
