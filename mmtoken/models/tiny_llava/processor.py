"""The tiny LLaVA processor: a word-level tokenizer, a chat template and CLIP image processing.

All three are transformers' own classes, so a saved folder loads with `AutoProcessor.from_pretrained`. A conversation
becomes `<bos>`, 64 x `<image>`, the question, `<assistant>`, the answer, `<eos>`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from mmtoken.datasets.shapes_qa import COLORS, IMAGE_SIZE, PLURALS, SHAPES, SUPERLATIVES

PATCH_SIZE = 12
MEAN, STD = 0.45, 0.27
SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>", "<assistant>", "<unk>")
PAD_ID, BOS_ID, EOS_ID, IMAGE_ID, ASSISTANT_ID, UNK_ID = range(len(SPECIAL))
VOCABULARY = (
    *SPECIAL,
    *("?", ".", ","),
    *("what", "color", "shape", "is", "the", "a", "an", "there", "how", "many", "object", "objects", "are", "of"),
    *("left", "right", "above", "below", "beside", "read", "number", "yes", "no", "and", "in", "image", "picture"),
    "which",
    *SUPERLATIVES,
    *COLORS,
    *SHAPES,
    *PLURALS.values(),
    *"0123456789",
)
# Content is a string or a list of {"type": "image"} and {"type": "text", "text": ...} parts, as for LLaVA-1.5.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant> {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_tokenizer(
    vocabulary: Sequence[str] = VOCABULARY, special: Mapping[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """One id per word, digit and punctuation mark; upper case and British "colour" are accepted; pads on the left.

    Args:
        vocabulary: words by id; it begins with `SPECIAL`.
        special: further special tokens, by the names under which a processor looks for them.
    """
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("colour", "color")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    )
    # Words are joined by blanks, none before punctuation; the digits of a number are closed up again.
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=True),
            decoders.Fuse(),
            decoders.Replace(Regex(r"(?<=\d) (?=\d)"), ""),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", "assistant_token": "<assistant>", **(special or {})},
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    """Tokenizer, image processor (96 x 96, mean .45, std .27) and chat template in one."""
    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the tower's CLS, which "default" drops
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )
