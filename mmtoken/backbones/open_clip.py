"""The vision transformers of open_clip."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from mmtoken.backbones.bare import BareTower
from mmtoken.backbones.base import Tower
from mmtoken.errors import UnsupportedError


class OpenClipViT(BareTower):
    """open_clip's `VisionTransformer`, and the CLIP models that hold one; each image is an item.

    Features are read after the last block. A mean over patches is one over those that are left. Towers that open_clip
    takes from timm are timm's.
    """

    name: ClassVar[str] = "open_clip tower"
    model_types: ClassVar[tuple[str, ...]] = ()
    module_types: ClassVar[tuple[str, ...]] = ("open_clip.transformer.VisionTransformer",)

    def tower(self) -> Tower:
        visual = self.model
        blocks = visual.transformer.resblocks
        if visual.attn_pool is not None:
            raise UnsupportedError("attentional_pool (CoCa) is not supported; use a model that pools by CLS or mean.")
        for block in blocks:
            if not isinstance(block.attn, nn.MultiheadAttention) or not block.attn.batch_first:
                raise UnsupportedError(
                    f"{type(block).__name__} of this open_clip model attends by {type(block.attn).__name__}; only its "
                    "default blocks are supported, with nn.MultiheadAttention and batch_first=True."
                )
        return Tower(
            module=visual,
            blocks=blocks,
            feature_block=len(blocks) - 1,
            prefix=1,
            unit=1,
            heads=blocks[0].attn.num_heads,
            attention="attn",
            norms=("ln_1", "ln_2"),
            split=split,
            mask="attn_mask",
            mask_per_head=True,
            any_mask=True,
            last=visual.transformer,
            entries=("forward",),
            closed=("forward_intermediates",),
            pools=visual.pool_type == "avg",
        )

    def patch_grid(self, pixels: Tensor) -> tuple[int, int]:
        height, width = self.model.patch_size
        return pixels.shape[-2] // height, pixels.shape[-1] // width

    def tower_refusal(self) -> str | None:
        if self.model.transformer.grad_checkpointing:
            return "grad_checkpointing=True runs the hooks of a block again; call set_grad_checkpointing(False)."
        if self.model.training and not isinstance(self.model.patch_dropout, nn.Identity):
            return "patch dropout and a compressor both drop patches; create the model without it."
        return None


def split(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values float[tiles, S, H * d] of what enters an `nn.MultiheadAttention`."""
    query, key, value = nn.functional.linear(hidden, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    return query, key, value
