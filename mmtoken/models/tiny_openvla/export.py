"""From a training checkpoint to a folder that transformers loads by itself."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig

from mmtoken.datasets.tabletop import ACTIONS
from mmtoken.models.tiny_openvla.network import NetworkConfig, build_network
from mmtoken.models.tiny_openvla.processor import BOS_ID, EOS_ID, PAD_ID, build_processor
from mmtoken.training.export import export_network


def export(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    config: NetworkConfig | None = None,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write network and processor of a Lightning checkpoint of `TinyOpenVLA` to `folder`, see `export_network`.

    Raises:
        CheckpointError: no checkpoint of this network at that path.
    """
    network = build_network(config)
    network.generation_config = GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID, max_new_tokens=len(ACTIONS), do_sample=False
    )
    return export_network(network, build_processor(), checkpoint, folder, name="TinyOpenVLA", dtype=dtype)
