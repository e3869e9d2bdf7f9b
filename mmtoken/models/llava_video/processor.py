"""The processor of LLaVA-Video: LLaVA-OneVision's with the token count of the grid layout."""

from __future__ import annotations

import math
from typing import Any

from transformers import AutoProcessor, LlavaOnevisionProcessor

from mmtoken.models.llava_video.network import LlavaVideoConfig, check_pooling, pooled_side


class LlavaVideoProcessor(LlavaOnevisionProcessor):
    """`LlavaOnevisionProcessor` that writes rows * (columns + 1) placeholders per video frame and none at the end.

    Attributes:
        mm_spatial_pool_mode: as in the model's config, "bilinear" or "average".

    Raises:
        UnsupportedError: the pooling mode is another one.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        video_processor: Any = None,
        num_image_tokens: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
        vision_aspect_ratio: str = "anyres_max_9",
        mm_spatial_pool_mode: str = "bilinear",
        **kwargs: Any,
    ) -> None:
        self.mm_spatial_pool_mode = check_pooling(mm_spatial_pool_mode)
        super().__init__(  # type: ignore[no-untyped-call]
            image_processor=image_processor,
            tokenizer=tokenizer,
            video_processor=video_processor,
            num_image_tokens=num_image_tokens,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            video_token=video_token,
            vision_aspect_ratio=vision_aspect_ratio,
            **kwargs,
        )

    def frame_tokens(self) -> int:
        """Placeholders per video frame, newline tokens included."""
        side = pooled_side(math.isqrt(self.num_image_tokens), self.mm_spatial_pool_mode)
        return side * (side + 1)

    def replace_video_token(self, video_inputs: dict[str, Any], video_idx: int, **kwargs: Any) -> str:
        """The placeholders of one video."""
        placeholders: str = self.video_token * (
            len(video_inputs["pixel_values_videos"][video_idx]) * self.frame_tokens()
        )
        return placeholders

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, video_sizes: Any = None, **kwargs: Any) -> Any:
        counts = super()._get_num_multimodal_tokens(image_sizes, **kwargs)  # type: ignore[no-untyped-call]
        if video_sizes is not None:
            counts.num_video_tokens = [frames * self.frame_tokens() for frames, _, _ in video_sizes]
        return counts


AutoProcessor.register(LlavaVideoConfig, LlavaVideoProcessor, exist_ok=True)
