"""Tiny checkpoints made offline: weights, tokenizer, processor and chat template in the upstream file formats.

`write_checkpoint` fills a folder from which `AutoProcessor` and `AutoModelForImageTextToText` load without remote code.
Token ids agree with `tests.backbones.tiny_models`. SmolVLM's processor needs the package num2words (as upstream).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import transformers as tf
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mmtoken.models.llava_video import LlavaVideoProcessor
from tests.backbones.tiny_models import (
    COHERE,
    LLAMA,
    NEXT,
    NEXT_PINPOINTS,
    ONEVISION,
    PINPOINTS,
    SPECIALS,
    TEXT_TOKENS,
    build,
    role_tokens,
)

__all__ = ["conversation", "photograph", "processor", "tokenizer", "video", "write_checkpoint"]

_CORPUS = (
    "What is shown in the image? Describe the picture in one sentence. You are a helpful assistant. USER: ASSISTANT: "
    "user assistant system User: Assistant: How many cats are there? The answer is on the left of the right one. "
) * 4

_QWEN_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_REGEX = _QWEN_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def _byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers use for each of the 256 bytes, by byte value."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(rest)) for b in range(256)]


def _merges(base: list[str], pre: pre_tokenizers.PreTokenizer, count: int) -> list[tuple[str, str]]:
    """The first `count` merges of a BPE learned on the corpus above."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre
    trainer = trainers.BpeTrainer(
        vocab_size=4096, initial_alphabet=[c for c in base if len(c) == 1], show_progress=False
    )
    learner.train_from_iterator([_CORPUS], trainer)
    learned = json.loads(learner.to_str())["model"]["merges"]
    return [tuple(pair) for pair in learned if all(part in base or len(part) > 1 for part in pair)][:count]


def _bpe(base: list[str], pre: pre_tokenizers.PreTokenizer, **options: Any) -> models.BPE:
    """A vocabulary of exactly TEXT_TOKENS entries: `base`, then one entry per merge."""
    merges = _merges(base, pre, TEXT_TOKENS - len(base))
    vocab = {token: i for i, token in enumerate([*base, *("".join(pair) for pair in merges)])}
    if len(vocab) != TEXT_TOKENS:
        raise RuntimeError(f"the corpus gives {len(vocab)} text tokens, not {TEXT_TOKENS}")
    return models.BPE(vocab=vocab, merges=merges, **options)


@cache
def _fast(family: str) -> Tokenizer:
    """The family's kind of tokenizer, special tokens at the ids of `tiny_models.special_ids`."""
    if family in LLAMA:  # sentencepiece style with byte fallback, <s> in front
        pre = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
        letters = [*"▁abcdefghijklmnopqrstuvwxyzAEHINRSTUWY:.?"]
        base = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters]
        words = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
        fast = Tokenizer(_bpe(base, words, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        fast.pre_tokenizer = pre
        fast.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        # No tokenizer of OpenVLA knows the placeholder.
        specials = ["<unk>", "<s>", "</s>", *SPECIALS[family][: 1 if family == "openvla" else None]]
    else:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        if family in ("smolvlm", *COHERE):  # GPT-2 with single digits
            pre = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        else:
            regex = Regex(_LLAMA3_REGEX if family == "idefics3" else _QWEN_REGEX)
            pre = pre_tokenizers.Sequence([pre_tokenizers.Split(regex, behavior="isolated"), byte_level])
        fast = Tokenizer(_bpe(_byte_characters(), pre))
        fast.pre_tokenizer = pre
        fast.decoder = decoders.ByteLevel()
        if family not in ("smolvlm", "idefics3", "mistral3"):
            fast.normalizer = normalizers.NFC()
        specials = SPECIALS[family]
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    if family in (*LLAMA, *COHERE, "idefics3", "mistral3"):
        bos = role_tokens(family)["bos"]
        fast.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, fast.token_to_id(bos))]
        )
    return fast


# The class each family's upstream tokenizer_config.json names.
_TOKENIZER_CLASSES = {
    "llava": "LlamaTokenizer",
    "llava_next": "LlamaTokenizer",
    "llava_next_video": "LlamaTokenizer",
    "video_llava": "LlamaTokenizer",
    "llava_onevision": "Qwen2Tokenizer",
    "llava_video": "Qwen2Tokenizer",
    "qwen2_vl": "Qwen2Tokenizer",
    "qwen2_5_vl": "Qwen2Tokenizer",
    "qwen3_vl": "Qwen2Tokenizer",
    "qwen3_vl_moe": "Qwen2Tokenizer",
    "idefics3": "PreTrainedTokenizerFast",
    "smolvlm": "GPT2Tokenizer",
    "internvl": "Qwen2Tokenizer",
    "aya_vision": "CohereTokenizer",
    "cohere2_vision": "CohereTokenizer",
    "mistral3": "PreTrainedTokenizerFast",
    "openvla": "LlamaTokenizer",
}


# Tokens that a family's processor asks its tokenizer for by name.
_NAMED = {
    "internvl": {
        "extra_special_tokens": {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }
    },
    "cohere2_vision": {
        "extra_special_tokens": {
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "image_token": "<|IMG_PATCH|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        }
    },
}


def _write_tokenizer(family: str, folder: Path) -> None:
    role = role_tokens(family)
    named = {f"{name}_token": role[name] for name in ("bos", "eos", "pad") if role[name] is not None}
    if family in LLAMA:
        named["unk_token"] = "<unk>"
    fast = tf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_fast(family).to_str()),
        additional_special_tokens=[
            t for t in SPECIALS[family] if t not in named.values() and (family, t) != ("openvla", "<image>")
        ],
        padding_side="right" if family == "openvla" else "left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        **named,
    )
    fast.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = _TOKENIZER_CLASSES[family]
    settings |= _NAMED.get(family, {})
    path.write_text(json.dumps(settings, indent=2))


# ------------------------------------------------------------------------------------------------- chat templates

# Written for these tests in the form of each family's template; macros differ, the rendered prompts are the family's.
_PART = (
    "{% if part['type'] == 'image' %}IMAGE{% elif part['type'] == 'video' %}VIDEO"
    "{% else %}{{ part['text'] }}{% endif %}"
)


def _template(before: str, image: str, video: str, after: str, start: str, prompt: str, *, media_first: bool) -> str:
    """A template that writes `before`, the parts, `after` per message; with `media_first` images precede the text."""
    part = _PART.replace("IMAGE", image).replace("VIDEO", video)
    if media_first:
        media = "{% for part in message['content'] if part['type'] != 'text' %}" + part + "{% endfor %}"
        text = "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
        parts = media + text
    else:
        parts = "{% for part in message['content'] %}" + part + "{% endfor %}"
    body = "{% if message['content'] is string %}{{ message['content'] }}{% else %}" + parts + "{% endif %}"
    loop = "{% for message in messages %}" + before + body + after + "{% endfor %}"
    return start + loop + "{% if add_generation_prompt %}" + prompt + "{% endif %}"


_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
)
_ROLE = "{{ message['role'] }}"
_NAME = "{{ message['role'] | capitalize }}:{% if message['content'][0]['type'] != 'image' %} {% endif %}"
_SPEAKER = "{{ {'user': 'USER', 'assistant': 'CHATBOT', 'system': 'SYSTEM'}[message['role']] }}"
_VISION = "<|vision_start|><|{}_pad|><|vision_end|>"

CHAT_TEMPLATES: dict[str, str] = {
    "llava": _template(
        "{{ message['role'] | upper }}: ", "<image>\n", "<video>\n", " ", "", "ASSISTANT:", media_first=True
    ),
    "llava_onevision": _template(
        f"<|im_start|>{_ROLE} ", "<image>\n", "<video>\n", "<|im_end|>", "", "<|im_start|>assistant\n",
        media_first=True,
    ),
    "qwen2_5_vl": _template(
        f"<|im_start|>{_ROLE}\n", _VISION.format("image"), _VISION.format("video"), "<|im_end|>\n", _SYSTEM,
        "<|im_start|>assistant\n", media_first=False,
    ),
    "qwen3_vl": _template(
        f"<|im_start|>{_ROLE}\n", _VISION.format("image"), _VISION.format("video"), "<|im_end|>\n", "",
        "<|im_start|>assistant\n", media_first=False,
    ),
    "internvl": _template(
        f"<|im_start|>{_ROLE}\n", "<IMG_CONTEXT>\n", "<video>\n", "<|im_end|>\n", "", "<|im_start|>assistant\n",
        media_first=False,
    ),
    "idefics3": _template(
        _NAME, "<image>", "", "<end_of_utterance>\n", "<|begin_of_text|>", "Assistant:", media_first=False
    ),
    "mistral3": _template(
        "{% if message['role'] == 'user' %}[INST]{% endif %}", "[IMG]", "",
        "{% if message['role'] == 'user' %}[/INST]{% else %}</s>{% endif %}", "<s>", "", media_first=False,
    ),
    "smolvlm": _template(
        _NAME, "<image>", "<video>", "<end_of_utterance>\n", "<|im_start|>", "Assistant:", media_first=False
    ),
}  # fmt: skip
for _family, _image in (("aya_vision", "<image>"), ("cohere2_vision", "<|IMG_PATCH|>")):
    CHAT_TEMPLATES[_family] = _template(
        f"<|START_OF_TURN_TOKEN|><|{_SPEAKER}_TOKEN|>", _image, "", "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>",
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", media_first=False,
    )  # fmt: skip
CHAT_TEMPLATES["llava_next"] = CHAT_TEMPLATES["llava"]
CHAT_TEMPLATES["llava_next_video"] = CHAT_TEMPLATES["llava"]
CHAT_TEMPLATES["video_llava"] = CHAT_TEMPLATES["llava"]
CHAT_TEMPLATES["qwen2_vl"] = CHAT_TEMPLATES["qwen2_5_vl"]
CHAT_TEMPLATES["qwen3_vl_moe"] = CHAT_TEMPLATES["qwen3_vl"]
CHAT_TEMPLATES["llava_video"] = CHAT_TEMPLATES["llava_onevision"]


# ----------------------------------------------------------------------------------------------------- processors


def _processor(family: str, tok: Any) -> Any:
    template = CHAT_TEMPLATES[family]
    if family == "llava":
        return tf.LlavaProcessor(
            tf.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
            tok,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
    if family in NEXT or family == "video_llava":
        size = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
        facts = {
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "chat_template": template,
        }
        if family == "video_llava":
            image, video = tf.VideoLlavaImageProcessor(**size), tf.VideoLlavaVideoProcessor(**size)
            return tf.VideoLlavaProcessor(image_processor=image, video_processor=video, tokenizer=tok, **facts)
        image = tf.LlavaNextImageProcessor(**size, image_grid_pinpoints=NEXT_PINPOINTS)
        if family == "llava_next":
            return tf.LlavaNextProcessor(image, tok, **facts)
        video = tf.LlavaNextVideoVideoProcessor(**size)
        return tf.LlavaNextVideoProcessor(video_processor=video, image_processor=image, tokenizer=tok, **facts)
    if family in ONEVISION:
        size = {"height": 42, "width": 42}
        kind = LlavaVideoProcessor if family == "llava_video" else tf.LlavaOnevisionProcessor
        return kind(
            tf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS),
            tok,
            tf.LlavaOnevisionVideoProcessor(size=size),
            num_image_tokens=9,
            vision_feature_select_strategy="full",
            chat_template=template,
        )
    if family in ("qwen2_vl", "qwen2_5_vl"):
        kind = tf.Qwen2VLProcessor if family == "qwen2_vl" else tf.Qwen2_5_VLProcessor
        unit = 28 * 28  # pixels of one merged token; 16 to 40 of these per image, 4 to 8 per video frame
        return kind(
            tf.Qwen2VLImageProcessor(patch_size=14, size={"shortest_edge": 16 * unit, "longest_edge": 40 * unit}),
            tok,
            tf.Qwen2VLVideoProcessor(patch_size=14, size={"shortest_edge": 4 * unit, "longest_edge": 8 * unit}),
            chat_template=template,
        )
    if family in ("qwen3_vl", "qwen3_vl_moe"):
        unit = 32 * 32  # its video limits count the pixels of all frames
        half = [0.5, 0.5, 0.5]
        image = tf.Qwen2VLImageProcessor(
            patch_size=16,
            size={"shortest_edge": 16 * unit, "longest_edge": 40 * unit},
            image_mean=half,
            image_std=half,
        )
        video = tf.Qwen3VLVideoProcessor(size={"shortest_edge": 16 * unit, "longest_edge": 48 * unit})
        return tf.Qwen3VLProcessor(image, tok, video, chat_template=template)
    if family == "internvl":
        size = {"height": 56, "width": 56}
        return tf.InternVLProcessor(
            tf.GotOcr2ImageProcessor(size=size, max_patches=4),
            tok,
            tf.InternVLVideoProcessor(size=size),
            image_seq_length=16,
            chat_template=template,
        )
    if family in COHERE:
        size = {"height": 56, "width": 56}
        if family == "aya_vision":
            images = tf.GotOcr2ImageProcessor(size=size, max_patches=4, crop_to_patches=True)
            return tf.AyaVisionProcessor(images, tok, patch_size=14, img_size=56, chat_template=template)
        # Its `patch_size` is the side of a tile in tokens.
        images = tf.Cohere2VisionImageProcessor(size=size, max_patches=4, patch_size=4)
        return tf.Cohere2VisionProcessor(images, tok, chat_template=template)
    if family == "mistral3":
        images = tf.PixtralImageProcessor(size={"longest_edge": 112}, patch_size=14)
        return tf.PixtralProcessor(images, tok, patch_size=14, spatial_merge_size=2, chat_template=template)
    side, tokens = (56, 16) if family == "idefics3" else (48, 9)
    sizes = {"size": {"longest_edge": 2 * side}, "max_image_size": {"longest_edge": side}}
    if family == "idefics3":
        return tf.Idefics3Processor(
            tf.Idefics3ImageProcessor(**sizes), tok, image_seq_len=tokens, chat_template=template
        )
    sampling = {"fps": 1, "max_frames": 4, "video_size": {"longest_edge": side}}
    return tf.SmolVLMProcessor(
        tf.SmolVLMImageProcessor(**sizes),
        tok,
        tf.SmolVLMVideoProcessor(**sizes, video_sampling=sampling),
        image_seq_len=tokens,
        chat_template=template,
    )


def tokenizer(family: str, folder: Path) -> Any:
    """Write the family's tokenizer files into `folder` and load them as a user does."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(family, folder)
    return tf.AutoTokenizer.from_pretrained(folder)


def processor(family: str, folder: Path) -> Any:
    """Write tokenizer and processor files into `folder`; returns the processor as `AutoProcessor` loads it."""
    _processor(family, tokenizer(family, folder)).save_pretrained(folder)
    if not (folder / "config.json").exists():
        build(family, layers=1).config.save_pretrained(folder)
    return tf.AutoProcessor.from_pretrained(folder)


def write_checkpoint(family: str, folder: Path | str, *, seed: int = 0, layers: int = 4, sharded: bool = False) -> Path:
    """A whole checkpoint of a tiny model of the family; returns the folder.

    Args:
        sharded: split the weights into several files with `model.safetensors.index.json`, as large models are.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = build(family, seed=seed, layers=layers)
    end = model.config.get_text_config().eos_token_id
    model.generation_config.eos_token_id = end  # a checkpoint stops where upstream's does
    model.save_pretrained(folder, max_shard_size="100KB" if sharded else "5GB")
    processor(family, folder)
    return folder


# ---------------------------------------------------------------------------------------------------------- media


def photograph(seed: int = 0, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """A synthetic "photograph" of (width, height): a smooth background, a disc and a box, different per seed."""
    rng = np.random.default_rng(seed)
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    phase, slope = rng.uniform(0, 6.3, 3), rng.uniform(0.02, 0.12, (3, 2))
    image = 127 + 60 * np.sin(phase + x[..., None] * slope[:, 0] + y[..., None] * slope[:, 1])
    cx, cy, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.1, 0.3) * min(size)
    image[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] = rng.uniform(0, 255, 3)
    left, top = rng.integers(0, width * 2 // 3), rng.integers(0, height * 2 // 3)
    image[top : top + height // 4, left : left + width // 4] = rng.uniform(0, 255, 3)
    return Image.fromarray((image + rng.normal(0, 4, image.shape)).clip(0, 255).astype(np.uint8))


def video(seed: int = 0, frames: int = 4, size: tuple[int, int] = (96, 64)) -> np.ndarray:
    """`uint8[F, H, W, 3]`: a window that moves over a larger picture, so that neighbouring frames are similar."""
    width, height = size
    large = np.asarray(photograph(seed, (width + 4 * frames, height)))
    return np.stack([large[:, 4 * i : 4 * i + width] for i in range(frames)])


def conversation(text: str, *media: Image.Image | np.ndarray) -> list[dict[str, Any]]:
    """One user turn, media first; pictures become image parts, arrays video parts."""
    parts: list[dict[str, Any]] = [
        {"type": "video", "video": m} if isinstance(m, np.ndarray) else {"type": "image", "image": m} for m in media
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
