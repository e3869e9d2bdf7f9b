"""The towers of OpenVLA, made by timm and named as in official checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmtoken.errors import InputError, UnsupportedError
from mmtoken.models.openvla.config import OpenVLAConfig


class LayerScale(nn.Module):
    """Multiplies every channel by a factor of its own; timm calls the factor `gamma`, OpenVLA `scale_factor`."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(scale)

    def forward(self, states: Tensor) -> Tensor:
        return states * self.scale_factor


@dataclass(frozen=True)
class TowerConfig:
    """What the engine asks a tower's `config` for.

    Attributes:
        patch_size: pixels.
        hidden_size: width of the first tower.
        output_size: width of all towers side by side.
        num_attention_heads: of the first tower.
    """

    patch_size: int
    hidden_size: int
    output_size: int
    num_attention_heads: int
    _attn_implementation: str = "sdpa"


def make_tower(config: OpenVLAConfig, number: int, **overrides: Any) -> Any:
    """A timm vision transformer without weights: tower `number` of a model.

    Raises:
        UnsupportedError: timm knows no such model, or it is no plain vision transformer.
    """
    import timm  # takes seconds

    assert config.timm_model_ids and config.image_sizes and config.timm_override_act_layers and config.timm_model_args
    name = config.timm_model_ids[number]
    options: dict[str, Any] = {**(config.timm_model_args[number] or {}), **overrides}
    if config.timm_override_act_layers[number] is not None:
        options["act_layer"] = config.timm_override_act_layers[number]
    try:
        tower = timm.create_model(name, pretrained=False, num_classes=0, img_size=config.image_sizes[number], **options)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedError(
            f"timm_model_ids[{number}]={name!r} with {options} cannot be made: {error}; name a vision transformer of "
            "timm."
        ) from error
    if not isinstance(tower, timm.models.VisionTransformer):
        raise UnsupportedError(f"timm_model_ids[{number}]={name!r} is a {type(tower).__name__}, no VisionTransformer.")
    for block in tower.blocks:
        for scale in ("ls1", "ls2"):
            old = getattr(block, scale)
            if not isinstance(old, nn.Identity):
                setattr(block, scale, LayerScale(old.gamma.detach().clone()))
    return tower


def count_patches(config: OpenVLAConfig) -> int:
    """Visual tokens per image, without making the towers."""
    with torch.device("meta"):
        return int(make_tower(config, 0, depth=1).patch_embed.num_patches)


class PrismaticVisionBackbone(nn.Module):
    """One or two timm towers on the same patches: the second-to-last block of each, side by side on the channels.

    Registers and CLS are left out, and no final norm is applied. The last block and what follows it are not run; they
    are there because checkpoints hold their weights.

    Raises:
        UnsupportedError: the towers cut the image into different grids.
    """

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__()
        self.featurizer = make_tower(config, 0)
        towers = [self.featurizer]
        if config.use_fused_vision_backbone:
            self.fused_featurizer = make_tower(config, 1)
            towers.append(self.fused_featurizer)
        self.towers = len(towers)
        self.side = config.image_size
        grids = {tuple(tower.patch_embed.grid_size) for tower in towers}
        if len(grids) > 1:
            raise UnsupportedError(f"timm_model_ids={config.timm_model_ids}: patch grids {sorted(grids)} differ.")
        self.patches = int(towers[0].patch_embed.num_patches)
        self.config = TowerConfig(
            patch_size=int(self.featurizer.patch_embed.patch_size[0]),
            hidden_size=int(self.featurizer.embed_dim),
            output_size=sum(int(tower.embed_dim) for tower in towers),
            num_attention_heads=int(self.featurizer.blocks[0].attn.num_heads),
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """float[n, patches, D_v] from normalised pixels float[n, 3 * towers, H, W].

        The first three channels are normalised for the first tower, the next three for the second.

        Raises:
            InputError: another number of channels, or another size.
        """
        wanted = (3 * self.towers, self.side, self.side)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != wanted:
            raise InputError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; expected (images, *{wanted}): three channels for "
                f"each of {self.towers} towers, as the processor makes them."
            )
        parts = pixel_values.split(3, 1)
        features = [_second_to_last(self.featurizer, parts[0])]
        if self.towers == 2:
            features.append(_second_to_last(self.fused_featurizer, parts[1]))
        return torch.cat(features, -1)


def _second_to_last(tower: Any, pixels: Tensor) -> Tensor:
    """float[n, patches, D]: what the second-to-last block puts out, patches only."""
    found: list[Tensor] = tower.forward_intermediates(
        pixels,
        indices=[len(tower.blocks) - 2],
        norm=False,
        stop_early=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    return found[0]
