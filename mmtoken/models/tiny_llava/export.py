"""From a training checkpoint to a folder that transformers loads by itself."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch
from transformers import GenerationConfig

from mmtoken.errors import CheckpointError
from mmtoken.models.tiny_llava.network import NetworkConfig, build_network
from mmtoken.models.tiny_llava.processor import BOS_ID, EOS_ID, PAD_ID, build_processor
from mmtoken.wholefile import whole_folder

MAX_NEW_TOKENS = 8
"""Answers are a word or three digits, and `<eos>`."""
_PREFIX = "network."


def export(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    config: NetworkConfig | None = None,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write network and processor of a Lightning checkpoint of `TinyLlava` to `folder`, replacing what is there.

    The weights are read with `weights_only=True` and stored as safetensors in `dtype`, to be loaded as float32; the
    auxiliary heads stay behind. The folder appears whole or not at all. Returns the folder.

    Raises:
        CheckpointError: no checkpoint of this network at that path.
    """
    source, target = Path(checkpoint), Path(folder)
    try:
        saved = torch.load(source, map_location="cpu", weights_only=True)
        state = {k.removeprefix(_PREFIX): v for k, v in saved["state_dict"].items() if k.startswith(_PREFIX)}
        network = build_network(config)
        network.load_state_dict(state)
    except (OSError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"checkpoint={str(source)!r} is not a TinyLlava checkpoint of this size ({reason}); "
            "give the last.ckpt of an `mmtoken fit` run and the `config` it was trained with."
        ) from error
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    network.generation_config = GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID, max_new_tokens=MAX_NEW_TOKENS, do_sample=False
    )
    with whole_folder(target) as whole:
        network.save_pretrained(whole)
        build_processor().save_pretrained(whole)
        config_file = whole / "config.json"
        settings = json.loads(config_file.read_text())
        # What from_pretrained loads by default: half precision saves disk, but CPUs compute best in float32.
        for part in (settings, settings["text_config"], settings["vision_config"]):
            part["dtype"] = "float32"
        config_file.write_text(json.dumps(settings, indent=2) + "\n")
        for file in whole.iterdir():
            file.chmod(0o644)
    return target
