"""Vision transformers of timm: plain ones with CLS and registers, and Eva's with rotary embeddings (DINOv3, PE)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmtoken.backbones.bare import BareTower
from mmtoken.backbones.base import Tower
from mmtoken.errors import UnsupportedError


class TimmViT(BareTower):
    """timm's `VisionTransformer` and `Eva`, called by forward or by `forward_features`; each image is an item.

    Features are read after the last block, before the final norm. Heads that pool over patches (mean, attention) see
    those that are left.
    """

    name: ClassVar[str] = "timm tower"
    model_types: ClassVar[tuple[str, ...]] = ()
    module_types: ClassVar[tuple[str, ...]] = (
        "timm.models.vision_transformer.VisionTransformer",
        "timm.models.eva.Eva",
    )

    def tower(self) -> Tower:
        from timm.layers.attention import Attention, AttentionRope
        from timm.models.eva import EvaAttention, EvaBlock
        from timm.models.vision_transformer import Block

        model = self.model
        if model.num_prefix_tokens and model.cls_token is None:
            raise UnsupportedError(
                "this timm model has registers but no class token, so that methods would read a register as CLS; use a "
                "model with class_token=True or reg_tokens=0."
            )
        for block in model.blocks:
            attention = block._modules.get("attn")
            if not isinstance(attention, Attention | AttentionRope | EvaAttention):
                raise UnsupportedError(
                    f"{type(block).__name__} of this timm model attends by {type(attention).__name__}, which is not "
                    "known here; use a model with timm's Attention, AttentionRope or EvaAttention."
                )
        return Tower(
            module=model,
            blocks=model.blocks,
            feature_block=len(model.blocks) - 1,
            prefix=model.num_prefix_tokens,
            unit=1,
            heads=model.blocks[0].attn.num_heads,
            attention="attn",
            norms=("norm1", "norm2"),
            sequential=all(isinstance(block, Block | EvaBlock) for block in model.blocks),
            split=split,
            rotate=None if isinstance(model.blocks[0].attn, Attention) else rotate,
            mask="attn_mask",
            any_mask=True,
            last=model.norm,
            entries=("forward", "forward_features"),
            closed=("forward_intermediates",),
            pools=model.attn_pool is not None or model.global_pool not in ("", "token"),
        )

    def patch_grid(self, pixels: Tensor) -> tuple[int, int]:
        rows, columns = self.model.patch_embed.dynamic_feat_size(tuple(pixels.shape[-2:]))
        return int(rows), int(columns)

    def tower_refusal(self) -> str | None:
        from timm.layers.patch_dropout import PatchDropout

        if self.model.grad_checkpointing:
            return "grad_checkpointing=True runs the hooks of a block again; call set_grad_checkpointing(False)."
        if self.model.training and isinstance(self.model.patch_drop, PatchDropout):
            return "patch dropout and a compressor both drop patches; create the model without it."
        return None


def split(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values float[tiles, S, H * d] of what enters an attention, normalised where it does so."""
    heads = attention.num_heads
    width = attention.proj.in_features // heads
    if attention.qkv is None:
        parts = [layer(hidden) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    else:
        # Eva holds its biases apart, and no module adds them.
        apart = [
            attention._parameters.get(name, attention._buffers.get(name)) for name in ("q_bias", "k_bias", "v_bias")
        ]
        if apart[0] is None:
            fused = attention.qkv(hidden)
        else:
            fused = nn.functional.linear(hidden, attention.qkv.weight, torch.cat(apart))
        parts = list(fused.chunk(3, -1))
    query, key, value = (part.unflatten(-1, (-1, width)) for part in parts)
    query, key = attention.q_norm(query), attention.k_norm(key)
    # Grouped keys and values, once per head.
    states = (part.repeat_interleave(heads // part.shape[-2], -2) for part in (query, key, value))
    query, key, value = (part.flatten(-2) for part in states)
    return query, key, value


def rotate(attention: Any, states: Tensor, tables: Tensor) -> Tensor:
    """Queries or keys float[tiles, H, P, d] of patches with their rotary embedding."""
    from timm.layers.pos_embed_sincos import apply_rot_embed_cat

    rotated: Tensor = apply_rot_embed_cat(states, tables, half=attention.rotate_half)
    return rotated
