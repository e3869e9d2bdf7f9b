"""Tiny random vision-language models with hand-made inputs: no download, no processor, no network.

`build` makes a model of a family's real architecture at width 32 to 64; `inputs` makes the keyword arguments that
this family's processor would return. Token ids follow one rule, shared with `tests.backbones.processors`: text tokens
lie below `TEXT_TOKENS` (a byte alphabet and a few merges), then come the family's special tokens in upstream order.
Runs on transformers 5.17 and later.
"""

from __future__ import annotations

import itertools
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers as tf

from mmtoken.models import openvla
from mmtoken.models.llava_video import LlavaVideoConfig, LlavaVideoForConditionalGeneration

__all__ = [
    "ANYRES",
    "CASES",
    "CELLS",
    "FAMILIES",
    "SPECIALS",
    "VOCAB",
    "build",
    "inputs",
    "special_ids",
    "video_families",
    "visual_mask",
]

VOCAB = 384
TEXT_TOKENS = 320
PINPOINTS = [[42, 42], [42, 84], [84, 42], [84, 84]]  # (height, width), multiples of the OneVision tile
NEXT_PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]  # the shapes of upstream's

_QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_QWEN_VL = [
    *_QWEN, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>",
    "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
_ROW_COL = [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)]
_COHERE = [
    "<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK_TOKEN>", "<BOS_TOKEN>", "<EOS_TOKEN>", "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|START_OF_IMG|>",
    "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>", "<|IMG_PATCH|>", "TILE", "TILE_GLOBAL",
]  # fmt: skip

# Special tokens of each family's tokenizer, in upstream order; their ids start at TEXT_TOKENS. The Llama tokenizer of
# LLaVA and OpenVLA keeps <unk>, <s>, </s> at 0, 1, 2.
SPECIALS: dict[str, list[str]] = {
    "llava": ["<image>", "<pad>"],
    "llava_next": ["<image>", "<pad>"],
    "llava_next_video": ["<video>", "<image>", "<pad>"],
    "video_llava": ["<image>", "<video>", "<pad>"],
    "llava_onevision": [*_QWEN, "<image>", "<video>"],
    "llava_video": [*_QWEN, "<image>", "<video>"],
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
    "qwen3_vl": _QWEN_VL,
    "qwen3_vl_moe": _QWEN_VL,
    "idefics3": [
        "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|eot_id|>",
        "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *_ROW_COL,
    ],
    "smolvlm": [
        "<|endoftext|>", "<|im_start|>", "<|im_end|>",
        "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *_ROW_COL,
    ],
    "internvl": [*_QWEN_VL, "<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
    "aya_vision": _COHERE,
    "cohere2_vision": _COHERE,
    "mistral3": [
        "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
        "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
    ],
    # Its tokenizer ends with the padding token; the placeholder is the next row of the table.
    "openvla": ["<PAD>", "<image>"],
    "gemma3": [
        "<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>",
        "<image_soft_token>",
    ],
    "paligemma": ["<pad>", "<eos>", "<bos>", "<unk>", "<image>"],
}  # fmt: skip

# The tokens that play each role: (beginning or None, end, padding, image, video or None).
_ROLES: dict[str, tuple[str | None, str, str, str, str | None]] = {
    "llava": ("<s>", "</s>", "<pad>", "<image>", None),
    "llava_next": ("<s>", "</s>", "<pad>", "<image>", None),
    "llava_next_video": ("<s>", "</s>", "<pad>", "<image>", "<video>"),
    "video_llava": ("<s>", "</s>", "<pad>", "<image>", "<video>"),
    "llava_onevision": (None, "<|im_end|>", "<|endoftext|>", "<image>", "<video>"),
    "llava_video": (None, "<|im_end|>", "<|endoftext|>", "<image>", "<video>"),
    "qwen2_vl": (None, "<|im_end|>", "<|endoftext|>", "<|image_pad|>", "<|video_pad|>"),
    "qwen2_5_vl": (None, "<|im_end|>", "<|endoftext|>", "<|image_pad|>", "<|video_pad|>"),
    "qwen3_vl": (None, "<|im_end|>", "<|endoftext|>", "<|image_pad|>", "<|video_pad|>"),
    "qwen3_vl_moe": (None, "<|im_end|>", "<|endoftext|>", "<|image_pad|>", "<|video_pad|>"),
    "idefics3": ("<|begin_of_text|>", "<end_of_utterance>", "<|finetune_right_pad_id|>", "<image>", None),
    "smolvlm": ("<|im_start|>", "<end_of_utterance>", "<|im_end|>", "<image>", None),
    "internvl": (None, "<|im_end|>", "<|endoftext|>", "<IMG_CONTEXT>", None),
    "aya_vision": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<PAD>", "<|IMG_PATCH|>", None),
    "cohere2_vision": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<PAD>", "<|IMG_PATCH|>", None),
    "mistral3": ("<s>", "</s>", "<pad>", "[IMG]", None),
    "openvla": ("<s>", "</s>", "<PAD>", "<image>", None),
    "gemma3": ("<bos>", "<end_of_turn>", "<pad>", "<image_soft_token>", None),
    "paligemma": ("<bos>", "<eos>", "<pad>", "<image>", None),
}

FAMILIES: tuple[str, ...] = tuple(family for family in SPECIALS if family not in ("openvla", "paligemma", "gemma3"))
"""Families that hold conversations; robot policies and PaliGemma have one kind of prompt and no chat template."""

LLAMA = (
    "llava",
    "llava_next",
    "llava_next_video",
    "video_llava",
    "openvla",
)
"""Families with the tokenizer of Llama-2."""

TOKENWISE = (
    "llava",
    "openvla",
    "paligemma",
)
"""Families of images only, whose projector maps every patch by itself."""

GEMMA = ("gemma3", "paligemma")
"""Families with one size of image, 16 tokens each, whose decoder is told the type of every token."""

COHERE = ("aya_vision", "cohere2_vision")
"""Families whose decoder rotates neighbouring features, in layers with a sliding window only."""

TILES = ("internvl", *COHERE)
"""Families whose pictures come as tiles of 16 tokens each, which the model cannot tell from pictures."""

ONEVISION = ("llava_onevision", "llava_video")
"""Families that differ in the layout of videos alone."""

NEXT = ("llava_next", "llava_next_video")
"""Families that cut every image, into crops of 4 x 4 patches."""

ANYRES = (*NEXT, *ONEVISION)
"""Families whose images come as a thumbnail, and again in crops with newline tokens."""

STACKED: dict[tuple[str, str], int] = {
    ("llava", "image"): 16,
    ("openvla", "image"): 16,
    ("video_llava", "image"): 16,
    ("gemma3", "image"): 16,
    ("paligemma", "image"): 16,
    ("video_llava", "video"): 4 * (1 + 16),
    ("llava_next_video", "video"): 4 * 4,
    ("llava_onevision", "video"): 4 * 4 + 1,
    ("llava_video", "video"): 4 * 2 * (2 + 1),
}
"""Tokens of an item where all items have equally many."""

NEXT_SIZES: list[tuple[tuple[int, int], int, int]] = [
    ((28, 112), 2, 16 + 2 * (8 + 1)),
    ((56, 112), 2, 16 + 4 * (8 + 1)),
    ((84, 112), 4, 16 + 6 * (8 + 1)),
]
"""(height, width), crops and tokens of images: half of the first one's rows of patches hold padding, a quarter of the
last one's, and nothing of the second's."""

QWEN = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
)
"""Families with a packed tower."""

DYNAMIC = (*QWEN, "mistral3")
"""Families whose number of visual tokens follows the size of the picture."""

OPAQUE = ("mistral3",)
"""Families in whose tower nothing can act or be read."""

CELLS: list[tuple[str, str]] = [
    ("llava", "image"),
    ("llava_next", "image"),
    ("llava_next_video", "image"),
    ("llava_next_video", "video"),
    ("video_llava", "image"),
    ("video_llava", "video"),
    ("llava_onevision", "image"),
    ("llava_onevision", "video"),
    ("llava_video", "image"),
    ("llava_video", "video"),
    ("qwen2_vl", "image"),
    ("qwen2_vl", "video"),
    ("qwen2_5_vl", "image"),
    ("qwen2_5_vl", "video"),
    ("qwen3_vl", "image"),
    ("qwen3_vl", "video"),
    ("qwen3_vl_moe", "image"),
    ("qwen3_vl_moe", "video"),
    ("smolvlm", "image"),
    ("idefics3", "image"),
    ("internvl", "image"),
    ("aya_vision", "image"),
    ("cohere2_vision", "image"),
    ("mistral3", "image"),
    ("openvla", "image"),
    ("gemma3", "image"),
    ("paligemma", "image"),
]

CASES: tuple[str, ...] = (
    "plain", "single", "left_padded", "ragged", "padded_ragged", "multi_image", "text_row",
)  # fmt: skip


def video_families() -> tuple[str, ...]:
    """Families that have a video cell."""
    return tuple(family for family, modality in CELLS if modality == "video")


def special_ids(family: str) -> dict[str, int]:
    """Token text to id for every special token of the family."""
    ids = {token: TEXT_TOKENS + i for i, token in enumerate(SPECIALS[family])}
    if family in LLAMA:
        ids |= {"<unk>": 0, "<s>": 1, "</s>": 2}
    return ids


def role_tokens(family: str) -> dict[str, str | None]:
    """Token texts by role: `bos`, `eos`, `pad`, `image`, `video` (None where the family has none)."""
    return dict(zip(("bos", "eos", "pad", "image", "video"), _ROLES[family], strict=True))


def roles(family: str) -> dict[str, int | None]:
    """Ids by role: `bos`, `eos`, `pad`, `image`, `video` (None where the family has none)."""
    ids = special_ids(family)
    return {name: None if token is None else ids[token] for name, token in role_tokens(family).items()}


# --------------------------------------------------------------------------------------------------------- models


def _text(layers: int, **more: object) -> dict[str, object]:
    return {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        **more,
    }


def _tower(blocks: int, **more: object) -> dict[str, object]:
    return {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": blocks, "num_attention_heads": 4, **more}


def _clip(blocks: int) -> tf.CLIPVisionConfig:
    return tf.CLIPVisionConfig(**_tower(blocks, image_size=56, patch_size=14, projection_dim=32))


def _siglip(blocks: int, size: int, patch: int = 14, head: bool = False) -> tf.SiglipVisionConfig:
    return tf.SiglipVisionConfig(**_tower(blocks, image_size=size, patch_size=patch, vision_use_head=head))


def _windows(text: dict[str, object]) -> dict[str, object]:
    """Every other layer sees a sliding window, which is wider than any tiny prompt."""
    layers = range(int(text["num_hidden_layers"]))
    kinds = ["full_attention" if number % 2 else "sliding_attention" for number in layers]
    return {**text, "head_dim": 16, "layer_types": kinds, "sliding_window": 512}


def _next(text: dict[str, object]) -> dict[str, object]:
    """What LLaVA-NeXT and LLaVA-NeXT-Video share."""
    return {
        "vision_config": _clip(4),
        "text_config": tf.LlamaConfig(**text),
        "image_grid_pinpoints": NEXT_PINPOINTS,
        "image_seq_length": 16,
        "tie_word_embeddings": False,
    }


def _mrope(section: list[int], **more: object) -> dict[str, object]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section, **more}


def _family(name: str) -> str:
    """The family of a tiny model; PaliGemma 2 gets the prompts of PaliGemma, before another decoder."""
    return "paligemma" if name == "paligemma2" else name


def config(name: str, *, layers: int = 4) -> tf.PreTrainedConfig:
    """The tiny configuration of a family or bare model; `layers` is the depth of the decoder."""
    if name == "llama":
        return tf.LlamaConfig(**_text(layers, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    if name == "qwen2":
        return tf.Qwen2Config(**_text(layers, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    if name == "clip_vision":
        return _clip(4)
    if name == "siglip_vision":
        return _siglip(4, 56)
    family = _family(name)
    if family not in SPECIALS:
        raise KeyError(f"unknown tiny model {name!r}; there are {[*FAMILIES, *_BARE]}")
    role = roles(family)
    tokens = {"pad_token_id": role["pad"], "bos_token_id": role["bos"], "eos_token_id": role["eos"]}
    text = _text(layers, **tokens)
    if name == "llava":
        return tf.LlavaConfig(
            vision_config=_clip(4),
            text_config=tf.LlamaConfig(**text),
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            image_token_index=role["image"],
            image_seq_length=16,
            tie_word_embeddings=False,
        )
    if name == "llava_next":
        return tf.LlavaNextConfig(**_next(text), image_token_index=role["image"])
    if name == "llava_next_video":
        more = {"video_token_index": role["video"], "video_seq_length": STACKED[name, "video"]}
        return tf.LlavaNextVideoConfig(**_next(text), image_token_index=role["image"], **more)
    if name == "video_llava":
        return tf.VideoLlavaConfig(
            vision_config=_clip(4),
            text_config=tf.LlamaConfig(**text),
            image_token_index=role["image"],
            video_token_index=role["video"],
            image_seq_length=STACKED[name, "image"],
            video_seq_length=STACKED[name, "video"],
            tie_word_embeddings=False,
        )
    if name in ("llava_onevision", "llava_video"):
        kind = LlavaVideoConfig if name == "llava_video" else tf.LlavaOnevisionConfig
        # 3 x 3 patches: an odd side, as upstream (27 x 27), so that pooling a video frame has to round up
        return kind(
            vision_config=_siglip(3, 42),
            text_config=tf.Qwen2Config(**text),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            image_grid_pinpoints=PINPOINTS,
            image_token_index=role["image"],
            video_token_index=role["video"],
            tie_word_embeddings=False,
        )
    if name == "internvl":
        return tf.InternVLConfig(
            vision_config=_tower(3, image_size=[56, 56], patch_size=[7, 7]),
            text_config=tf.Qwen2Config(**text),
            image_token_id=role["image"],
            image_seq_length=16,
            tie_word_embeddings=False,
        )
    if name in COHERE:
        text = tf.Cohere2Config(**_windows(text), logit_scale=1.0)
        shared = {"text_config": text, "alignment_intermediate_size": 96, "tie_word_embeddings": False}
        if name == "aya_vision":
            return tf.AyaVisionConfig(vision_config=_siglip(3, 56, 7), image_token_index=role["image"], **shared)
        return tf.Cohere2VisionConfig(
            vision_config=_siglip(3, 56, 7, head=True), image_token_id=role["image"], **shared
        )
    if name == "mistral3":
        return tf.Mistral3Config(
            vision_config=tf.PixtralVisionConfig(**_tower(3, image_size=112, patch_size=14)),
            text_config=tf.MistralConfig(**text, head_dim=16, sliding_window=None),
            image_token_index=role["image"],
            tie_word_embeddings=False,
        )
    if name == "openvla":
        return openvla.OpenVLAConfig(**OPENVLA, text_config={**text, "model_type": "llama"})
    if name in ("idefics3", "smolvlm"):
        kind = tf.Idefics3Config if name == "idefics3" else tf.SmolVLMConfig
        tower = _tower(3, image_size=56, patch_size=7) if name == "idefics3" else _tower(3, image_size=48, patch_size=4)
        return kind(
            vision_config=tower,
            text_config=tf.LlamaConfig(**text),
            scale_factor=2 if name == "idefics3" else 4,
            image_token_id=role["image"],
            tie_word_embeddings=False,
        )
    if name == "gemma3":
        return tf.Gemma3Config(
            vision_config=_siglip(3, 112),  # 8 x 8 patches, of which 2 x 2 become a token
            text_config=tf.Gemma3TextConfig(**_windows(text), query_pre_attn_scalar=16),
            mm_tokens_per_image=16,
            boi_token_index=special_ids(name)["<start_of_image>"],
            eoi_token_index=special_ids(name)["<end_of_image>"],
            image_token_index=role["image"],
            tie_word_embeddings=False,
        )
    if family == "paligemma":
        kind = tf.GemmaConfig(**text, head_dim=16)
        return tf.PaliGemmaConfig(
            vision_config=_siglip(3, 56),
            text_config=kind if name == family else tf.Gemma2Config(**_windows(text), query_pre_attn_scalar=16),
            image_token_index=role["image"],
            projection_dim=64,
            hidden_size=64,
            tie_word_embeddings=False,
        )
    ids = special_ids(name)
    vision_tokens = {
        "image_token_id": role["image"],
        "video_token_id": role["video"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    tower = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": 64,
        "num_heads": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    if name == "qwen2_vl":
        for key in ("intermediate_size", "out_hidden_size"):
            del tower[key]
        return tf.Qwen2VLConfig(
            vision_config={**tower, "patch_size": 14, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
            text_config={**text, "rope_parameters": _mrope([2, 3, 3])},
            tie_word_embeddings=False,
            **vision_tokens,
        )
    if name == "qwen2_5_vl":
        # windows of 2 x 2 merged units, so that one small image already has several windows
        return tf.Qwen2_5_VLConfig(
            vision_config={**tower, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1, 3]},
            text_config={**text, "rope_parameters": _mrope([2, 3, 3])},
            tie_word_embeddings=False,
            **vision_tokens,
        )
    kind = tf.Qwen3VLConfig
    if name == "qwen3_vl_moe":
        kind = tf.Qwen3VLMoeConfig
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    return kind(
        vision_config={**tower, "patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2]},
        text_config={**text, "head_dim": 16, "rope_parameters": _mrope([4, 2, 2], mrope_interleaved=True)},
        tie_word_embeddings=False,
        **vision_tokens,
    )


OPENVLA: dict[str, object] = {
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "timm_model_args": [
        {"embed_dim": 32, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0},
        {"embed_dim": 24, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0},
    ],
    "image_sizes": [56, 56],
    "pad_token_id": TEXT_TOKENS,
    "pad_to_multiple_of": VOCAB - TEXT_TOKENS,
    "n_action_bins": 32,
    "space_token_id": None,
}
"""Its settings but the language model's: official towers, smaller. Actions are the last text tokens, as upstream."""

_BARE: dict[str, type[tf.PreTrainedModel]] = {
    "llama": tf.LlamaForCausalLM,
    "qwen2": tf.Qwen2ForCausalLM,
    "clip_vision": tf.CLIPVisionModel,
    "siglip_vision": tf.SiglipVisionModel,
}
_MODELS: dict[str, type[tf.PreTrainedModel]] = {
    "llava": tf.LlavaForConditionalGeneration,
    "llava_next": tf.LlavaNextForConditionalGeneration,
    "llava_next_video": tf.LlavaNextVideoForConditionalGeneration,
    "video_llava": tf.VideoLlavaForConditionalGeneration,
    "llava_onevision": tf.LlavaOnevisionForConditionalGeneration,
    "llava_video": LlavaVideoForConditionalGeneration,
    "qwen2_vl": tf.Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": tf.Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": tf.Qwen3VLForConditionalGeneration,
    "qwen3_vl_moe": tf.Qwen3VLMoeForConditionalGeneration,
    "idefics3": tf.Idefics3ForConditionalGeneration,
    "smolvlm": tf.SmolVLMForConditionalGeneration,
    "internvl": tf.InternVLForConditionalGeneration,
    "aya_vision": tf.AyaVisionForConditionalGeneration,
    "cohere2_vision": tf.Cohere2VisionForConditionalGeneration,
    "mistral3": tf.Mistral3ForConditionalGeneration,
    "openvla": openvla.OpenVLAForActionPrediction,
    "gemma3": tf.Gemma3ForConditionalGeneration,
    "paligemma": tf.PaliGemmaForConditionalGeneration,
    "paligemma2": tf.PaliGemmaForConditionalGeneration,
    **_BARE,
}


def build(
    name: str, attn: str = "sdpa", seed: int = 0, dtype: torch.dtype = torch.float32, *, layers: int = 4
) -> tf.PreTrainedModel:
    """A tiny random model in eval mode: one of `FAMILIES`, or bare `llama`, `qwen2`, `clip_vision`, `siglip_vision`.

    Generation never stops early (no end token), so that compared runs have equal length.
    """
    cfg = config(name, layers=layers)
    cfg._attn_implementation = attn
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _MODELS[name](cfg).eval()
        with torch.no_grad():
            for key, p in model.named_parameters():
                # The default init (std 0.02) gives flat logits and uniform attention, under which a wrong mask or a
                # wrong position would go unnoticed: make every linear map keep roughly unit scale, and move biases
                # and norms off their constants.
                if p.ndim >= 2 and "embed" not in key:
                    fan_in = p.shape[-1] if "experts" in key else p[0].numel()
                    p.normal_(0.0, 1.0 / fan_in**0.5)
                elif p.ndim >= 2 or "class_embedding" in key or "image_newline" in key:
                    p.normal_(0.0, 1.0)
                elif key.endswith("bias"):
                    p.normal_(0.0, 0.1)
                else:
                    p.add_(torch.randn_like(p) * 0.1)
    model.to(dtype)
    if model.can_generate():
        generation = model.generation_config
        generation.eos_token_id = None
        generation.bos_token_id = None if name in _BARE else roles(_family(name))["bos"]
        generation.pad_token_id = 0 if name in _BARE else roles(_family(name))["pad"]
    return model


# --------------------------------------------------------------------------------------------------------- inputs


def _words(n: int, g: torch.Generator) -> list[int]:
    """Ids of n lower-case letters: the same range in both kinds of tokenizer, never a special token."""
    return torch.randint(100, 120, (n,), generator=g).tolist()


# Per case: for each row the number of words before and after the visual part, and the size index of each image.
_LAYOUT: dict[str, list[tuple[int, int, list[int]]]] = {
    "plain": [(4, 5, [1]), (4, 5, [1])],
    "single": [(4, 5, [1])],
    "left_padded": [(3, 4, [1]), (6, 7, [1])],
    "ragged": [(4, 5, [0]), (4, 5, [2])],
    "padded_ragged": [(7, 5, [2]), (3, 4, [0]), (4, 9, [1])],
    "multi_image": [(4, 5, [0, 1]), (4, 5, [1])],
    "text_row": [(4, 5, [1]), (9, 7, [])],
}


def _newline(family: str) -> int:
    return 3 + 10 if family in LLAMA else 10


def inputs(
    model: tf.PreTrainedModel, family: str, modality: str = "image", case: str = "plain", seed: int = 1
) -> dict[str, torch.Tensor]:
    """What the family's processor would return for a left-padded batch; pixels are random and differ per image.

    Cases: `plain` (2 rows of equal length), `single`, `left_padded` (2 rows, texts of different length), `ragged`
    (texts of equal length, images of different size; where there is one size, the rows have 1 and 2 images),
    `padded_ragged` (3 rows, both), `multi_image` (2 images in a row, 1 in the other), `text_row` (a row with no image).
    All but `plain` and `single` have left padding. In Idefics3 and SmolVLM the smallest image of `padded_ragged` is one
    unsplit tile with padded pixels, the only case in which the tower's blocks get a mask.
    For modality "video" read video for image; `ragged` then means different frame counts where a batch allows it
    (Qwen) and a different number of videos otherwise.
    """
    if (family, modality) not in CELLS:
        raise KeyError(f"no cell ({family!r}, {modality!r}); there are {CELLS}")
    g = torch.Generator().manual_seed(seed)
    layout = _LAYOUT[case]
    if (family, modality) in STACKED:
        # one visual count per item: let the number of items differ instead
        layout = [(a, b, [1] * (2 if sizes == [2] else len(sizes))) for a, b, sizes in layout]
    role, ids = roles(family), special_ids(family)
    item_kinds = [sizes for _, _, sizes in layout]
    if (family, modality) in STACKED:
        visual, pixels = _stacked(family, modality, sum(map(len, item_kinds)), g)
    elif family in NEXT:
        visual, pixels = _next_images(item_kinds, g)
    elif family in ONEVISION:
        visual, pixels = _onevision(item_kinds, g)
    elif family in ("idefics3", "smolvlm"):
        visual, pixels = _idefics(model, item_kinds, case, g)
    elif family in TILES:
        visual, pixels = _tiles(item_kinds, g)
    elif family == "mistral3":
        visual, pixels = _mistral(item_kinds, g)
    else:
        visual, pixels = _qwen(model, item_kinds, modality, g)
    rows: list[list[int]] = []
    items = iter(visual)
    for before, after, sizes in layout:
        if family == "paligemma":  # images first
            row = [role["image"]] * sum(next(items)[0] for _ in sizes)
            rows.append([*row, role["bos"], *_words(before + after, g), _newline(family)])
            continue
        row = [] if role["bos"] is None else [role["bos"]]
        row += _words(before, g)
        for i, _ in enumerate(sizes):
            if i:
                row += _words(2, g)
            row += _placeholder(family, modality, next(items), ids, g)
        rows.append([*row, _newline(family), *_words(after, g)])
    length = max(map(len, rows))
    out = {
        "input_ids": torch.tensor([[role["pad"]] * (length - len(r)) + r for r in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows]),
    }
    if family in QWEN:
        is_image, is_video = (out["input_ids"] == role[kind] for kind in ("image", "video"))
        out["mm_token_type_ids"] = is_image.long() + 2 * is_video.long()
    if family in GEMMA:  # PaliGemma's types tell the prompt, 0, from the answer
        types = out["input_ids"] == role["image"] if family == "gemma3" else torch.zeros_like(out["input_ids"])
        out["token_type_ids"] = types.long()
    dtype = next(model.parameters()).dtype
    return out | {k: v.to(dtype) if v.is_floating_point() else v for k, v in pixels.items()}


def visual_mask(model: tf.PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """`bool[B, L]`: image and video placeholders."""
    ids = batch["input_ids"]
    mask = ids == model.config.image_token_id
    video = getattr(model.config, "video_token_id", None)
    return mask if video is None else mask | (ids == video)


def _placeholder(family: str, modality: str, item: list[int], ids: dict[str, int], g: torch.Generator) -> list[int]:
    """One item's tokens in the prompt. `item`: [count] or, where it has parts, their layout (see the makers below)."""
    if family == "gemma3":
        start, end, newline = ids["<start_of_image>"], ids["<end_of_image>"], _newline(family)
        return [newline, newline, start, *[ids["<image_soft_token>"]] * item[0], end, newline, newline]
    if family in ANYRES or (family, modality) in STACKED:
        return [ids["<image>" if modality == "image" else "<video>"]] * item[0]
    if family in ("idefics3", "smolvlm"):
        rows, cols, per_tile = item
        fake, image, newline = ids["<fake_token_around_image>"], ids["<image>"], _newline(family)
        out: list[int] = []
        for r in range(rows):
            for c in range(cols):
                out += [fake, ids[f"<row_{r + 1}_col_{c + 1}>"]] + [image] * per_tile
            out.append(newline)
        if rows:
            out.append(newline)
        return [*out, fake, ids["<global-img>"], *[image] * per_tile, fake]
    if family == "internvl":
        return [ids["<img>"], *[ids["<IMG_CONTEXT>"]] * 16 * item[0], ids["</img>"]]
    if family in COHERE:
        tile = [ids["<|IMG_PATCH|>"]] * 16
        if family == "cohere2_vision":
            tiles = [*tile, ids["<|IMG_LINE_BREAK|>"]] * item[0]
        else:  # "_1", "_2", ...
            parts = [[ids["TILE"], ord("_"), ord("1") + n, *tile] for n in range(item[0] - 1)]
            tiles = [*itertools.chain.from_iterable(parts), ids["TILE_GLOBAL"], *tile]
        return [ids["<|START_OF_IMG|>"], *tiles, ids["<|END_OF_IMG|>"]]
    if family == "mistral3":
        lines, length = item
        row = [*[ids["[IMG]"]] * length, ids["[IMG_BREAK]"]]
        return [*(row * lines)[:-1], ids["[IMG_END]"]]
    start, end = ids["<|vision_start|>"], ids["<|vision_end|>"]
    pad = ids["<|image_pad|>" if modality == "image" else "<|video_pad|>"]
    frames, per_frame = item
    if family in ("qwen3_vl", "qwen3_vl_moe") and modality == "video":  # "<0.5 seconds>" before each temporal patch
        parts = [[*_words(3, g), start, *[pad] * per_frame, end] for _ in range(frames)]
        return [start, *itertools.chain.from_iterable(parts), end]
    return [start, *[pad] * (frames * per_frame), end]


def _stacked(family: str, modality: str, n: int, g: torch.Generator) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
    """`n` images of one size, or videos of 4 frames."""
    side, channels = {"gemma3": 112, **dict.fromkeys(ONEVISION, 42)}.get(family, 56), 6 if family == "openvla" else 3
    steps = (4,) if modality == "video" else ()
    name = "pixel_values_videos" if steps else "pixel_values_images" if family == "video_llava" else "pixel_values"
    return [[STACKED[family, modality]]] * n, {name: torch.randn(n, *steps, channels, side, side, generator=g)}


def _next_images(rows: list[list[int]], g: torch.Generator) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
    sizes = [NEXT_SIZES[kind] for row in rows for kind in row]
    patches = [torch.randn(1 + crops, 3, 56, 56, generator=g) for _, crops, _ in sizes]
    return [[tokens] for _, _, tokens in sizes], {
        "pixel_values": torch.nn.utils.rnn.pad_sequence(patches, batch_first=True),
        "image_sizes": torch.tensor([size for size, _, _ in sizes]),
    }


def _onevision(rows: list[list[int]], g: torch.Generator) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
    # Per size: (height, width), tiles, tokens. A lone image is the 3 x 3 overview, then its grid with one newline per
    # row of the grid; the last size fills 4 of the 6 rows of its 2 x 2 tiles and is un-padded to these.
    sizes = [((42, 42), 1, 9 + 3 * (3 + 1)), ((42, 84), 2, 9 + 3 * (6 + 1)), ((56, 84), 4, 9 + 4 * (6 + 1))]
    items, patches, image_sizes = [], [], []
    for row in rows:
        for kind in row:
            size, tiles, tokens = sizes[kind]
            alone = len(row) == 1
            items.append([tokens if alone else 9 + 1])  # several images: one overview each, and one newline
            patches.append(torch.randn(1 + tiles if alone else 1, 3, 42, 42, generator=g))
            image_sizes.append(size)
    return items, {
        "pixel_values": torch.nn.utils.rnn.pad_sequence(patches, batch_first=True),
        "image_sizes": torch.tensor(image_sizes),
        "batch_num_images": torch.tensor([len(row) for row in rows if row]),  # the processor skips rows without image
    }


def _idefics(
    model: tf.PreTrainedModel, rows: list[list[int]], case: str, g: torch.Generator
) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
    vision = model.config.vision_config
    side = vision.image_size
    per_tile = (side // vision.patch_size // model.config.scale_factor) ** 2
    grids = [(1, 2), (2, 1), (2, 2)]  # (rows, columns) of tiles; the overview comes on top
    if case == "padded_ragged":
        grids[0] = (0, 0)  # not split, as with do_image_splitting=False: one tile padded at the bottom, see below
    tiles = [[grids[kind] for kind in row] for row in rows]
    most = max(sum(r * c + 1 for r, c in row) for row in tiles)
    pixels = torch.zeros(len(rows), most, 3, side, side)
    mask = torch.zeros(len(rows), most, side, side, dtype=torch.long)
    for b, row in enumerate(tiles):
        at = 0
        for r, c in row:
            for _ in range(r * c + 1):
                bottom = side if r else side - 2 * vision.patch_size
                pixels[b, at, :, :bottom] = torch.randn(3, bottom, side, generator=g)
                mask[b, at, :bottom] = 1
                at += 1
    items = [[r, c, per_tile] for row in tiles for r, c in row]
    return items, {"pixel_values": pixels, "pixel_attention_mask": mask}


def _tiles(rows: list[list[int]], g: torch.Generator) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
    tiles = [[1, 3, 5][kind] for row in rows for kind in row]  # a picture, or its tiles and a thumbnail
    return [[n] for n in tiles], {"pixel_values": torch.randn(sum(tiles), 3, 56, 56, generator=g)}


_MISTRAL_SIZES = [(84, 56), (84, 112), (112, 112)]
"""(height, width) of images; 28 x 28 pixels become a token."""


def _mistral(rows: list[list[int]], g: torch.Generator) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
    sizes = [_MISTRAL_SIZES[kind] for row in rows for kind in row]
    pixels = torch.zeros(len(sizes), 3, *(max(side) for side in zip(*sizes, strict=True)))
    for picture, (height, width) in zip(pixels, sizes, strict=True):
        picture[:, :height, :width] = torch.randn(3, height, width, generator=g)
    return [[h // 28, w // 28] for h, w in sizes], {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def _qwen(
    model: tf.PreTrainedModel, rows: list[list[int]], modality: str, g: torch.Generator
) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
    images, videos = [(1, 8, 8), (1, 8, 12), (1, 12, 12)], [(2, 4, 8), (2, 8, 6), (3, 4, 12)]
    grids = [(images if modality == "image" else videos)[kind] for row in rows for kind in row]
    vision = model.config.vision_config
    values = 3 * vision.temporal_patch_size * vision.patch_size**2
    patches = torch.randn(sum(t * h * w for t, h, w in grids), values, generator=g)
    items = [[t, h * w // vision.spatial_merge_size**2] for t, h, w in grids]
    if modality == "image":
        return items, {"pixel_values": patches, "image_grid_thw": torch.tensor(grids)}
    out = {"pixel_values_videos": patches, "video_grid_thw": torch.tensor(grids)}
    if model.config.model_type == "qwen2_5_vl":
        out["second_per_grid_ts"] = torch.ones(len(grids))
    return items, out
