"""Tiny towers of timm and open_clip with random weights of unit scale."""

from __future__ import annotations

import functools
from typing import Any

import open_clip
import timm
import torch
from torch import Tensor

TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"qk_norm": True},
    "vit_base_patch14_reg4_dinov2": {},
    "vit_base_patch16_siglip_224": {},
    "eva02_tiny_patch14_224": {},
    "vit_small_patch16_dinov3": {},
    "vit_small_patch16_rope_mixed_224": {},
    "vit_pe_core_tiny_patch16_384": {},
    "deit_tiny_distilled_patch16_224": {},
}
OPEN_CLIP = ("clip", "clip-mean")
TOWERS = (*TIMM, *OPEN_CLIP)
SIDE, PATCHES, WIDTH = 32, 16, 32


def scaled(model: Any) -> Any:
    """The model in evaluation mode, with weights that make attention uneven."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, weight[0].numel() ** -0.5)
            else:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


def make_timm(name: str, **settings: Any) -> Any:
    """A model of timm with three blocks, 16 patches and five classes."""
    shape = {"embed_dim": WIDTH, "depth": 3, "num_heads": 2, "img_size": SIDE, "patch_size": 8, "num_classes": 5}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return scaled(timm.create_model(name, pretrained=False, **{**shape, **settings}))


def make_clip(**settings: Any) -> Any:
    """A CLIP model of open_clip with three blocks and 16 patches in its tower."""
    vision = {"image_size": SIDE, "patch_size": 8, "width": WIDTH, "layers": 3, "head_width": 16, **settings}
    text = {"context_length": 8, "vocab_size": 60, "width": 16, "heads": 2, "layers": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return scaled(open_clip.model.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text))


@functools.cache
def tower(name: str) -> Any:
    """A tower by name; shared, so tests must leave it as it was."""
    if name in TIMM:
        return make_timm(name, **TIMM[name])
    return make_clip(**({"pool_type": "avg"} if name == "clip-mean" else {})).visual


def prefix_of(name: str) -> int:
    """Tokens before the patches."""
    return int(tower(name).num_prefix_tokens) if name in TIMM else 1


def blocks_of(model: Any, name: str) -> Any:
    """The blocks of a tower."""
    return model.blocks if name in TIMM else model.transformer.resblocks


def last_of(model: Any, name: str) -> Any:
    """The module whose output is the sequence that a tower ends with."""
    return model.norm if name in TIMM else model.transformer


def pictures(count: int = 2, seed: int = 1) -> Tensor:
    """float[count, 3, 32, 32]."""
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
