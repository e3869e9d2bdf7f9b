"""The processor of tiny-llava-video: tiny-llava's tokenizer with a few more words, and clips of 96 x 96 frames.

All parts are transformers' own classes. A conversation becomes `<bos>`, F x 16 + 1 times `<video>` for F frames, the
question, `<assistant>`, the answer, `<eos>`.
"""

from __future__ import annotations

from typing import Any

from transformers import LlavaOnevisionProcessor, PreTrainedTokenizerFast

from mmtoken.datasets.shapes_qa import IMAGE_SIZE
from mmtoken.models.tiny_llava import processor as image
from mmtoken.models.tiny_llava.processor import MEAN, PATCH_SIZE, STD

VOCABULARY = (
    *image.VOCABULARY,
    "<video>",
    *("was", "were", "did", "way", "move", "appeared", "first", "last", "up", "down"),
)
"""tiny-llava's words keep their ids, so its embeddings carry over."""
VIDEO_ID = len(image.VOCABULARY)
SIDE = IMAGE_SIZE // PATCH_SIZE
FRAME_TOKENS = (SIDE // 2) ** 2
"""Tokens per frame, after the pooling of 2 x 2 patches."""
CHAT_TEMPLATE = image.CHAT_TEMPLATE.replace(
    "{% for part in message['content'] if part['type'] == 'text' %}",
    "{% for part in message['content'] if part['type'] == 'video' %}<video>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}",
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """tiny-llava's tokenizer with the words of MovingShapes."""
    return image.build_tokenizer(VOCABULARY, {"video_token": "<video>"})


def build_processor() -> LlavaOnevisionProcessor:
    """Tokenizer, image and video processor (96 x 96, mean .45, std .27) and chat template in one."""
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionVideoProcessor  # they import torchvision

    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    normal: dict[str, Any] = {"image_mean": [MEAN] * 3, "image_std": [STD] * 3}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            size=size, image_grid_pinpoints=[[IMAGE_SIZE, IMAGE_SIZE]], **normal
        ),
        video_processor=LlavaOnevisionVideoProcessor(size=size, **normal),
        tokenizer=build_tokenizer(),
        # The tower's CLS counts here and is taken off again under "default".
        num_image_tokens=SIDE * SIDE + 1,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
    )
