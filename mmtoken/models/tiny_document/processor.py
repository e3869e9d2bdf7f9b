"""The processor of tiny-document: a word-level tokenizer, a chat template and Idefics3's tiles.

All three are transformers' own classes, so a saved folder loads with `AutoProcessor`. A page of 144 x 96
pixels becomes six crops of 48 x 48 in reading order and the whole page at 48 x 48 behind them; the prompt is `<bos>`,
the crops with their row and column, the whole page, the question, `<assistant>`, the answer, `<eos>`.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import Idefics3ImageProcessor, Idefics3Processor, PreTrainedTokenizerFast

from mmtoken.datasets.document_pages import BARS, LABELS, LONG, PAGE_SIZE, REGION
from mmtoken.models.tiny_llava.processor import CHAT_TEMPLATE

PATCH_SIZE = 6
SCALE = 2
TOKENS = (REGION // PATCH_SIZE // SCALE) ** 2
"""Visual tokens of a crop."""
MEAN, STD = 0.5, 0.5
TAGS = (
    "<fake_token_around_image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{row + 1}_col_{column + 1}>" for row in range(LONG) for column in range(LONG)),
)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>", "<assistant>", "<unk>", *TAGS)
PAD_ID, BOS_ID, EOS_ID, IMAGE_ID, ASSISTANT_ID, UNK_ID, *_ = range(len(SPECIAL))
VOCABULARY = (
    *SPECIAL,
    *("?", ".", ","),
    *("what", "is", "in", "the", "row", "column", "there", "color", "bar", "highest", "lowest", "table", "figure"),
    *("yes", "no"),
    *LABELS,
    *BARS,
    *"0123456789",
    *"abcdefghijklmnopqrstuvwxyz",
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One id per word, letter, digit and mark; upper case and British "colour" are accepted; pads on the left."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("colour", "color")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=True),
            decoders.Fuse(),
            decoders.Replace(Regex(r"(?<=\d) (?=\d)"), ""),
        ]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", "assistant_token": "<assistant>"},
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    # They stand next to words without a blank in between and must not be taken apart.
    wrapped.add_tokens(list(TAGS), special_tokens=True)
    return wrapped


def build_processor() -> Idefics3Processor:
    """Tokenizer, image processor (crops of 48 x 48, mean .5, std .5) and chat template in one."""
    images = Idefics3ImageProcessor(
        size={"longest_edge": PAGE_SIZE},
        max_image_size={"longest_edge": REGION},
        resample=2,  # bilinear
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )
    return Idefics3Processor(
        image_processor=images, tokenizer=build_tokenizer(), image_seq_len=TOKENS, chat_template=CHAT_TEMPLATE
    )
