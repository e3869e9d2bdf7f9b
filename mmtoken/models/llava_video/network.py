"""The network: LLaVA-OneVision with the video layout of LLaVA-Video.

Zhang et al., Video Instruction Tuning With Synthetic Data, arXiv 2410.02713. Written as subclasses of transformers'
LLaVA-OneVision, of which transformers has no such variant; importing this package makes `AutoConfig`, `AutoModel`,
`AutoModelForImageTextToText` and `AutoProcessor` know it, so no code from a checkpoint runs.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
)

from mmtoken.errors import UnsupportedError

POOLINGS = ("bilinear", "average")


def pooled_side(side: int, mode: str) -> int:
    """Rows (and columns) of a frame after pooling a tower grid of side x side patches by two.

    Bilinear scaling rounds up (27 to 14), averaging leaves an odd last row and column out (27 to 13).
    """
    return side // 2 if mode == "average" else math.ceil(side / 2)


def check_pooling(mode: str) -> str:
    """Return a pooling mode that exists.

    Raises:
        UnsupportedError: it is neither "bilinear" nor "average".
    """
    if mode not in POOLINGS:
        raise UnsupportedError(f"mm_spatial_pool_mode={mode!r} is unknown; use 'bilinear' or 'average'.")
    return mode


@strict
class LlavaVideoConfig(LlavaOnevisionConfig):
    """LLaVA-OneVision's settings and two of LLaVA-Video.

    Attributes:
        mm_newline_position: "grid": a newline token after every row of every frame, and none at the end of the video.
        mm_spatial_pool_mode: how a frame is pooled by two, "bilinear" or "average".

    Raises:
        UnsupportedError: a value is not one of these.
    """

    model_type = "llava_video"

    mm_newline_position: str = "grid"
    mm_spatial_pool_mode: str = "bilinear"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        check_pooling(self.mm_spatial_pool_mode)
        if self.mm_newline_position != "grid":
            raise UnsupportedError(
                f"mm_newline_position={self.mm_newline_position!r} is not supported by LLaVA-Video; use 'grid', or "
                "LlavaOnevisionForConditionalGeneration for one newline per video."
            )


class LlavaVideoModel(LlavaOnevisionModel):
    """The tower, the projector and the decoder; differs from LLaVA-OneVision in `get_video_features` alone."""

    config_class = LlavaVideoConfig

    def apply_pooling(self, image_features: Tensor) -> Tensor:
        """float[frames, side * side, D] to float[frames, pooled * pooled, D], see `pooled_side`."""
        if self.config.mm_spatial_pool_mode == "bilinear":
            pooled: Tensor = super().apply_pooling(image_features)  # type: ignore[no-untyped-call]
            return pooled
        vision: Any = self.config.vision_config
        side = vision.image_size // vision.patch_size
        grid = image_features.transpose(1, 2).unflatten(2, (side, side))
        return F.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)

    # The argument is named `pixel_values` in transformers 5.17 and `pixel_values_videos` later; whoever asks for the
    # signature gets that of this version.
    @functools.wraps(LlavaOnevisionModel.get_video_features)
    def get_video_features(self, *args: Any, **kwargs: Any) -> Any:
        """Features of videos, pooled, with `image_newline` after every row of every frame.

        `pooler_output` is float[videos, frames * rows * (columns + 1), D], one token less in transformers 5.17: there
        the model's forward adds the video's last token, which is the newline of its last row, after this call.
        """
        as_tuple = kwargs.pop("return_dict", None) is False
        output = super().get_video_features(*args, return_dict=True, **kwargs)
        videos, width = len(output.pooler_output), output.pooler_output.shape[-1]
        vision: Any = self.config.vision_config
        side = pooled_side(vision.image_size // vision.patch_size, self.config.mm_spatial_pool_mode)
        frames, closed = divmod(output.pooler_output.shape[1], side * side)
        if side == 1:
            # A frame is one token then, and the token count does not tell whether it ends with a newline.
            pixels = kwargs.get("pixel_values_videos", kwargs.get("pixel_values", args[0] if args else None))
            assert pixels is not None
            closed, frames = frames - pixels.shape[1], pixels.shape[1]
        grid = output.pooler_output[:, : frames * side * side].reshape(videos, frames, side, side, width)
        newline = self.image_newline.to(grid).expand(videos, frames, side, 1, width)
        tokens = torch.cat([grid, newline], dim=3).reshape(videos, -1, width)
        output.pooler_output = tokens if closed else tokens[:, :-1]
        return output.to_tuple() if as_tuple else output


class LlavaVideoForConditionalGeneration(LlavaOnevisionForConditionalGeneration):
    """LLaVA-Video with its language-model head: `LlavaOnevisionForConditionalGeneration` on `LlavaVideoModel`.

    A frame takes rows * (columns + 1) tokens: 14 * 15 = 210 with the 27 x 27 patches of SigLIP at 384 pixels, 13 * 14 =
    182 with 26 x 26 patches or average pooling.
    """

    config_class = LlavaVideoConfig

    def __init__(self, config: LlavaVideoConfig) -> None:
        # Past the parent, which would make the whole of a LLaVA-OneVision first.
        super(LlavaOnevisionForConditionalGeneration, self).__init__(config)
        self.model = LlavaVideoModel(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]


AutoConfig.register("llava_video", LlavaVideoConfig, exist_ok=True)
AutoModel.register(LlavaVideoConfig, LlavaVideoModel, exist_ok=True)
AutoModelForImageTextToText.register(LlavaVideoConfig, LlavaVideoForConditionalGeneration, exist_ok=True)
