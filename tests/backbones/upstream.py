"""Tiny checkpoints in the file formats of those on the hub, which are older than what `save_pretrained` writes.

LLaVA-1.5 (`llava-hf/llava-1.5-7b-hf`), Qwen2.5-VL (`Qwen/Qwen2.5-VL-7B-Instruct`), SmolVLM
(`HuggingFaceTB/SmolVLM2-500M-Video-Instruct`) and InternVL (`OpenGVLab/InternVL3-1B-hf`): names of tensors, keys of
configs, which settings lie in which file, and types of numbers. Sizes and weights are those of `tiny_models`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.backbones.processors import CHAT_TEMPLATES, _fast, write_checkpoint
from tests.backbones.tiny_models import SPECIALS, config, role_tokens, roles

FORMATS = ("llava", "qwen2_5_vl", "smolvlm", "internvl")

_DTYPES = {"llava": "float16", "qwen2_5_vl": "bfloat16", "smolvlm": "float32", "internvl": "bfloat16"}
_TOKENIZERS = {
    "llava": "LlamaTokenizer",
    "qwen2_5_vl": "Qwen2Tokenizer",
    "smolvlm": "GPT2Tokenizer",
    "internvl": "Qwen2Tokenizer",
}
_IMAGE_PROCESSORS = {
    "llava": "CLIPImageProcessor",
    "qwen2_5_vl": "Qwen2VLImageProcessor",
    "smolvlm": "SmolVLMImageProcessor",
    "internvl": "GotOcr2ImageProcessorFast",
}

_TEXT = (
    "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "rms_norm_eps", "vocab_size", "hidden_act", "attention_dropout", "initializer_range",
)  # fmt: skip


def upstream_name(family: str, name: str) -> str:
    """What the hub's checkpoint calls a tensor that `save_pretrained` writes as `name`."""
    if family == "llava":
        return name.replace("vision_tower.", "vision_tower.vision_model.")
    return name


def write_upstream(family: str, folder: Path, layers: int = 3) -> Path:
    """Fill `folder` with a whole checkpoint of one of `FORMATS`; returns it."""
    write_checkpoint(family, folder, layers=layers, sharded=True)
    _rename(family, folder)
    made = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").unlink()
    _write(folder / "config.json", _config(family, layers))
    _write(folder / "generation_config.json", _generation(family))
    for name, settings in _processor_files(family, made).items():
        _write(folder / name, settings)
    if family == "internvl":
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATES[family])
    else:
        (folder / "chat_template.jinja").unlink()
        _write(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATES[family]})
    _write(folder / "tokenizer_config.json", _tokenizer(family, made["processor_class"]))
    role = role_tokens(family)
    special = {f"{name}_token": role[name] for name in ("bos", "eos", "pad") if role[name] is not None}
    extra = {"additional_special_tokens": SPECIALS[family]} if family != "llava" else {"unk_token": "<unk>"}
    _write(folder / "special_tokens_map.json", special | extra)
    return folder


def _write(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2))


def _rename(family: str, folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    kind = getattr(torch, _DTYPES[family])
    weights, total = {}, 0
    for shard in sorted(set(index["weight_map"].values())):
        tensors = {upstream_name(family, name): value.to(kind) for name, value in load_file(folder / shard).items()}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weights |= dict.fromkeys(tensors, shard)
        total += sum(value.numel() * value.element_size() for value in tensors.values())
    _write(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))},
    )


def _config(family: str, layers: int) -> dict[str, Any]:
    tiny = config(family, layers=layers)
    role, vision = roles(family), tiny.vision_config
    text = {name: getattr(tiny.get_text_config(), name) for name in _TEXT}
    shared = {"torch_dtype": _DTYPES[family], "model_type": family, "tie_word_embeddings": False}
    tower = {"hidden_size": vision.hidden_size}
    if family in ("llava", "smolvlm", "internvl"):
        names = ("intermediate_size", "num_attention_heads", "num_hidden_layers", "image_size", "patch_size")
        tower |= {name: getattr(vision, name) for name in names}
    if family == "llava":
        return {
            **shared,
            "architectures": ["LlavaForConditionalGeneration"],
            "ignore_index": -100,
            "image_token_index": role["image"],
            "pad_token_id": role["pad"],
            "projector_hidden_act": "gelu",
            "text_config": {**text, "architectures": ["LlamaForCausalLM"], "model_type": "llama"},
            "transformers_version": "4.36.0.dev0",
            "vision_config": {**tower, "model_type": "clip_vision_model", "projection_dim": 32, "vocab_size": 32000},
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "image_seq_length": 16,
        }
    if family == "qwen2_5_vl":  # the text model's settings lie at the top
        tokens = {f"vision_{name}_token_id": getattr(tiny, f"vision_{name}_token_id") for name in ("start", "end")}
        parts = ("depth", "intermediate_size", "num_heads", "out_hidden_size", "patch_size", "spatial_merge_size")
        parts = (*parts, "window_size", "fullatt_block_indexes", "temporal_patch_size")
        return {
            **text,
            **shared,
            **tokens,
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "bos_token_id": role["pad"],
            "eos_token_id": role["eos"],
            "image_token_id": role["image"],
            "video_token_id": role["video"],
            "vision_token_id": role["image"] - 1,
            "max_window_layers": layers,
            "use_sliding_window": False,
            "sliding_window": 32768,
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "transformers_version": "4.41.2",
            "use_cache": True,
            "vision_config": {
                **tower,
                **{name: getattr(vision, name) for name in parts},
                "hidden_act": "silu",
                "in_chans": 3,
                "spatial_patch_size": vision.patch_size,
                "tokens_per_second": 2,
            },
        }
    if family == "smolvlm":
        tokens = {"bos_token_id": role["bos"], "eos_token_id": role["eos"], "pad_token_id": role["pad"]}
        return {
            **shared,
            "architectures": ["SmolVLMForConditionalGeneration"],
            "image_token_id": role["image"],
            "pad_token_id": role["pad"],
            "scale_factor": tiny.scale_factor,
            "text_config": {**text, **tokens, "architectures": ["VLlama3ForCausalLM"], "model_type": "llama"},
            "transformers_version": "4.47.1",
            "use_cache": False,
            "vision_config": {**tower, "model_type": "smolvlm_vision", "hidden_act": "gelu_pytorch_tanh"},
        }
    tokens = {"bos_token_id": role["pad"], "eos_token_id": role["eos"]}
    return {
        **shared,
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": 0.5,
        "image_seq_length": 16,
        "image_token_id": role["image"],
        "projector_hidden_act": "gelu",
        "text_config": {
            **text,
            **tokens,
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "use_sliding_window": False,
        },
        "transformers_version": "4.52.0.dev0",
        "vision_config": {
            **tower,
            "architectures": ["InternVLVisionModel"],
            "attention_bias": False,
            "layer_norm_eps": 1e-06,
            "layer_scale_init_value": 0.1,
            "model_type": "internvl_vision",
            "norm_type": "layer_norm",
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
            "use_qk_norm": False,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }


def _generation(family: str) -> dict[str, Any]:
    role = roles(family)
    if family == "qwen2_5_vl":
        return {
            "bos_token_id": role["pad"],
            "pad_token_id": role["pad"],
            "do_sample": False,
            "eos_token_id": [role["eos"], role["pad"]],
            "repetition_penalty": 1.05,
            "transformers_version": "4.49.0",
        }
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "pad"}
    ids = {key: role[name] for key, name in names.items() if role[name] is not None}
    return {"_from_model_config": True, **ids, "transformers_version": "4.47.1"}


def _processor_files(family: str, made: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of the image processor, of the processor itself and of a video processor, file by file."""
    kind = made["processor_class"]
    images = {
        **made["image_processor"],
        "image_processor_type": _IMAGE_PROCESSORS[family],
        "processor_class": kind,
    }
    own = {name: value for name, value in made.items() if name not in ("image_processor", "video_processor")}
    if family == "qwen2_5_vl":  # no processor_config.json, and limits in pixels
        size = images.pop("size")
        names = ("image_mean", "image_std", "merge_size", "patch_size", "temporal_patch_size")
        kept = {name: images[name] for name in (*names, "image_processor_type", "processor_class")}
        limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        return {"preprocessor_config.json": kept | limits}
    files = {"preprocessor_config.json": images, "processor_config.json": own}
    if family == "smolvlm":
        images["video_sampling"] = made["video_processor"]["video_sampling"]
    if family == "internvl":
        files["video_preprocessor_config.json"] = {**made["video_processor"], "processor_class": kind}
    return files


def _tokenizer(family: str, processor: str) -> dict[str, Any]:
    role = role_tokens(family)
    added = {
        str(number): {
            "content": token.content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": True,
        }
        for number, token in sorted(_fast(family).get_added_tokens_decoder().items())
    }  # fmt: skip
    settings = {
        "added_tokens_decoder": added,
        "bos_token": role["bos"],
        "clean_up_tokenization_spaces": False,
        "eos_token": role["eos"],
        "model_max_length": 4096,
        "pad_token": role["pad"],
        "padding_side": "left",
        "processor_class": processor,
        "tokenizer_class": _TOKENIZERS[family],
    }
    if family == "llava":
        return settings | {"unk_token": "<unk>", "legacy": False, "extra_special_tokens": {"image_token": "<image>"}}
    settings |= {"additional_special_tokens": SPECIALS[family]}
    if family == "qwen2_5_vl":
        settings |= {"chat_template": CHAT_TEMPLATES[family], "split_special_tokens": False, "errors": "replace"}
    if family == "internvl":
        named = {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }
        settings |= {**named, "extra_special_tokens": named}
    return settings
