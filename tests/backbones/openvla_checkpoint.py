"""A tiny OpenVLA checkpoint in the official layout: names, files and settings as upstream's, weights random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from tests.backbones.processors import llama_tokenizer

PAD, SPACE_PIECE = "<PAD>", "▁"
VOCAB, PADDED = 608, 672  # the tokenizer's 321 tokens, then action bins up to VOCAB, which is also the padding token
IMAGE_SIZE, PATCH = 56, 14
TOWERS = ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"]
ARGS = [
    {"embed_dim": 32, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0},
    {"embed_dim": 24, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0},
]
MEANS = [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5]]
STDS = [[0.229, 0.224, 0.225], [0.5, 0.5, 0.5]]
NORM_STATS: dict[str, Any] = {
    "toy_arm": {
        "action": {"q01": [-0.5, -2.0, 0.0], "q99": [0.5, 4.0, 1.0], "mask": [True, True, False], "mean": [0.0] * 3},
        "num_trajectories": 3,
    },
    "other_arm": {"action": {"q01": [0.0, 0.0, 0.0], "q99": [1.0, 1.0, 1.0]}},
}
