"""The words of tiny-openvla: a small vocabulary laid out as OpenVLA's.

Ids below `WORDS` are real: special tokens and words from the front, the 256 action tokens at the end. As in OpenVLA
the embedding is padded beyond them: the padding token is the first id there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mmtoken.datasets.tabletop import BASE_SHAPES, COLORS, ITEM_SHAPES, SIZE, TEMPLATES
from mmtoken.models.openvla import PrismaticImageProcessor, PrismaticProcessor

PATCH_SIZE = 8
VISUAL_TOKENS = 64
MEAN, STD = 0.35, 0.25
PROMPT = "In: What action should the robot take to {instruction}?\nOut: ▁"
BINS = 255
"""Between 256 edges."""
SPECIAL = ("<unk>", "<s>", "</s>", "▁")
UNK_ID, BOS_ID, EOS_ID, SPACE_ID = range(len(SPECIAL))
_TEMPLATE_WORDS = sorted({word for t in TEMPLATES for word in t.split() if "{" not in word})
VOCABULARY = tuple(
    dict.fromkeys(
        (
            *SPECIAL,
            *(":", "?", "in", "what", "action", "should", "the", "robot", "take", "to", "out"),
            *_TEMPLATE_WORDS,
            *COLORS,
            *ITEM_SHAPES,
            *BASE_SHAPES,
        )
    )
)
WORDS = 320
PADDED_TO = 64
PAD_ID, IMAGE_ID = WORDS, WORDS + 1


def action_ids(action: NDArray[np.float32]) -> tuple[int, ...]:
    """Token ids of numbers in [-1, 1]."""
    bins = np.clip(np.digitize(action, np.linspace(-1, 1, BINS + 1)), 1, BINS) - 1
    return tuple(int(WORDS - 1 - b) for b in bins)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One id per word and punctuation mark, lower case."""
    ids = {word: i for i, word in enumerate(VOCABULARY)}
    ids |= {f"<unused_{i}>": i for i in range(len(ids), WORDS - BINS - 1)}
    ids |= {f"<action_{i}>": i for i in range(WORDS - BINS - 1, WORDS)}
    ids |= {"<PAD>": PAD_ID}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS_ID)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<PAD>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"space_token": "▁"},
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> PrismaticProcessor:
    """Tokenizer and image processor (64 x 64, mean .35, std .25) in one."""
    images = PrismaticImageProcessor(
        use_fused_vision_backbone=False,
        image_resize_strategy="resize-naive",
        input_sizes=[(3, SIZE, SIZE)],
        interpolations=["bicubic"],
        means=[(MEAN,) * 3],
        stds=[(STD,) * 3],
    )
    return PrismaticProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        num_image_tokens=VISUAL_TOKENS,
        image_token_id=IMAGE_ID,
        space_token_id=SPACE_ID,
    )
