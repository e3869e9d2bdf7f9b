"""A tiny OpenVLA checkpoint in the official layout, and what it computes, put together from timm and Llama by hand.

Nothing here uses `mmtoken.models.openvla`: names of files, settings and weights are written down as upstream has them.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import timm
import torch
import transformers as tf
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.backbones.processors import tokenizer
from tests.backbones.tiny_models import TEXT_TOKENS, VOCAB

IDS = ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224")
ARGS: tuple[dict[str, Any], ...] = (
    {"embed_dim": 32, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0},
    {"embed_dim": 24, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0},
)
SIDE, PATCHES = 56, 16
MEANS = ((0.485, 0.456, 0.406), (0.5, 0.5, 0.5))
STDS = ((0.229, 0.224, 0.225), (0.5, 0.5, 0.5))
BINS = 32
NORM_STATS: dict[str, Any] = {
    "toy_arm": {
        "action": {
            "q01": [-0.5, -2.0, 0.0], "q99": [0.5, 4.0, 1.0], "mask": [True, True, False], "mean": [0.0, 0.0, 0.5],
        },
        "num_trajectories": 3,
    },
    "other_arm": {"action": {"q01": [0.0, 0.0, 0.0], "q99": [1.0, 2.0, 3.0]}},
}  # fmt: skip
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "pad_token_id": TEXT_TOKENS,
}


class Parts(nn.Module):
    """Towers, projector and language model as a reader of the paper would put them together."""

    def __init__(self, towers: int = 2, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.towers = nn.ModuleList(
                timm.create_model(name, pretrained=False, num_classes=0, img_size=SIDE, **args)
                for name, args in zip(IDS[:towers], ARGS, strict=False)
            )
            width, llm = sum(args["embed_dim"] for args in ARGS[:towers]), TEXT["hidden_size"]
            widths = [width, 4 * width, llm, llm] if towers == 2 else [width, llm, llm]
            self.projector = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
            self.llm = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT))
            for name, value in self.named_parameters():
                # Far from the constants of a fresh network, so that nothing can be left out unnoticed.
                if value.ndim == 1:
                    value.data = torch.randn_like(value) * 0.3 + (0.0 if name.endswith("bias") else 1.0)
                elif "embed" in name or name.endswith("_token"):
                    value.data.normal_()
                else:
                    value.data.normal_(0, value[0].numel() ** -0.5)
        self.eval()

    def named(self) -> dict[str, Tensor]:
        """Weights under their official names."""
        prefixes = ("vision_backbone.featurizer.", "vision_backbone.fused_featurizer.")
        named = {}
        for prefix, tower in zip(prefixes, self.towers, strict=False):
            for name, value in tower.state_dict().items():
                named[prefix + name.replace(".gamma", ".scale_factor")] = value
        for number, linear in enumerate(self.projector, 1):
            named |= {f"projector.fc{number}.{name}": value for name, value in linear.state_dict().items()}
        return named | {f"language_model.{name}": value for name, value in self.llm.state_dict().items()}

    @torch.no_grad()
    def patches(self, pixels: Tensor) -> Tensor:
        """float[n, patches, D_v] of pixels float[n, 3 * towers, H, W]."""
        seen = []
        for tower, part in zip(self.towers, pixels.split(3, 1), strict=True):
            hidden = tower.norm_pre(tower._pos_embed(tower.patch_embed(part)))
            for block in tower.blocks[:-1]:
                hidden = block(hidden)
            seen.append(hidden[:, tower.num_prefix_tokens :])
        return torch.cat(seen, -1)

    @torch.no_grad()
    def logits(self, ids: Tensor, pixels: Tensor) -> Tensor:
        """float[1, patches + L, V] of one prompt int[1, L] without placeholders."""
        hidden = self.patches(pixels)
        for number, linear in enumerate(self.projector):
            hidden = linear(hidden if number == 0 else nn.functional.gelu(hidden))
        words = self.llm.model.embed_tokens(ids)
        return self.llm(inputs_embeds=torch.cat([words[:, :1], hidden, words[:, 1:]], 1)).logits


def settings(towers: int) -> dict[str, Any]:
    """`config.json` as upstream writes it, with what makes it tiny: `timm_model_args` and `space_token_id`."""
    return {
        "arch_specifier": "no-align+fused-gelu-mlp" if towers == 2 else "no-align+gelu-mlp",
        "architectures": ["OpenVLAForActionPrediction"],
        "auto_map": {
            "AutoConfig": "configuration_prismatic.OpenVLAConfig",
            "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction",
        },
        "hf_llm_id": "meta-llama/Llama-2-7b-hf",
        "image_resize_strategy": "resize-naive",
        "image_sizes": [SIDE] * towers,
        "llm_backbone_id": "llama2-7b-pure",
        "llm_max_length": 2048,
        "model_type": "openvla",
        "n_action_bins": BINS,
        "norm_stats": NORM_STATS,
        "output_projector_states": False,
        "pad_to_multiple_of": VOCAB - TEXT_TOKENS,
        "pad_token_id": TEXT_TOKENS,
        "text_config": {"model_type": "llama", "torch_dtype": "float32", **TEXT},
        "timm_model_ids": list(IDS[:towers]),
        "timm_override_act_layers": [None] * towers,
        "torch_dtype": "float32",
        "transformers_version": "4.40.1",
        "use_fused_vision_backbone": towers == 2,
        "vision_backbone_id": "dinosiglip-vit-so-224px" if towers == 2 else "dinov2-vit-l",
        "timm_model_args": list(ARGS[:towers]),
    }


def image_settings(towers: int) -> dict[str, Any]:
    """`preprocessor_config.json` as upstream writes it."""
    sizes = range(towers)
    return {
        "auto_map": {
            "AutoImageProcessor": "processing_prismatic.PrismaticImageProcessor",
            "AutoProcessor": "processing_prismatic.PrismaticProcessor",
        },
        "image_processor_type": "PrismaticImageProcessor",
        "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, SIDE, SIDE] for _ in sizes],
        "interpolations": ["bicubic" for _ in sizes],
        "means": [list(MEANS[i]) for i in sizes],
        "processor_class": "PrismaticProcessor",
        "stds": [list(STDS[i]) for i in sizes],
        "tvf_crop_params": [{"output_size": [SIDE, SIDE]} for _ in sizes],
        "tvf_do_letterbox": False,
        "tvf_letterbox_fill": None,
        "tvf_normalize_params": [{"inplace": False, "mean": list(MEANS[i]), "std": list(STDS[i])} for i in sizes],
        "tvf_resize_params": [
            {"antialias": True, "interpolation": 3, "max_size": None, "size": [SIDE, SIDE]} for _ in sizes
        ],
        "use_fused_vision_backbone": towers == 2,
    }


def write(folder: Path, towers: int = 2, seed: int = 0) -> Parts:
    """Fill a folder with a checkpoint in three shards; returns what it holds."""
    parts = Parts(towers, seed)
    space = tokenizer("openvla", folder).convert_tokens_to_ids("▁")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "processor_class": "PrismaticProcessor"}))
    (folder / "config.json").write_text(json.dumps({**settings(towers), "space_token_id": space}))
    (folder / "preprocessor_config.json").write_text(json.dumps(image_settings(towers)))
    (folder / "generation_config.json").write_text(
        json.dumps({"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": TEXT_TOKENS})
    )
    weights, places = parts.named(), {}
    for number in range(3):
        shard = f"model-{number + 1:05}-of-00003.safetensors"
        mine = {name: value.contiguous().clone() for name, value in [*weights.items()][number::3]}
        save_file(mine, folder / shard, metadata={"format": "pt"})
        places |= dict.fromkeys(mine, shard)
    size = sum(value.numel() * value.element_size() for value in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return parts
