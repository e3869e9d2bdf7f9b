"""From a training checkpoint to a folder that transformers loads by itself."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mmtoken.errors import CheckpointError
from mmtoken.wholefile import whole_folder

_PREFIX = "network."


def network_state(checkpoint: str | Path) -> dict[str, Tensor]:
    """The weights of the network in a Lightning checkpoint, read with `weights_only=True`.

    Raises:
        CheckpointError: there is no checkpoint at that path.
    """
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        weights: dict[str, Tensor] = saved["state_dict"]
    except (OSError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise _refusal(checkpoint, "training", error) from error
    return {name.removeprefix(_PREFIX): value for name, value in weights.items() if name.startswith(_PREFIX)}


def _refusal(checkpoint: str | Path, name: str, error: Exception) -> CheckpointError:
    reason = str(error).splitlines()[0]
    return CheckpointError(
        f"checkpoint={str(checkpoint)!r} is not a {name} checkpoint of this size ({reason}); "
        "give the last.ckpt of an `mmtoken fit` run and the `config` it was trained with."
    )


def export_network(
    network: PreTrainedModel,
    processor: Any,
    checkpoint: str | Path,
    folder: str | Path,
    *,
    name: str,
    dtype: torch.dtype,
    read: Callable[[str | Path], Mapping[str, Tensor]] = network_state,
) -> Path:
    """Fill `network` from a Lightning checkpoint and write it with its processor to `folder`, replacing what is there.

    The weights are read with `weights_only=True` and stored as safetensors in `dtype`, to be loaded as float32; what is
    not part of the network (auxiliary heads) stays behind. The folder appears whole or not at all.

    Args:
        network: of the size that was trained; its generation config is written too.
        processor: a transformers processor.
        checkpoint: a last.ckpt.
        folder: where to.
        name: of the objective, for the message.
        dtype: of the stored weights.
        read: gives the network's weights in the checkpoint.

    Returns:
        The folder.

    Raises:
        CheckpointError: no checkpoint of this network at that path.
    """
    target = Path(folder)
    try:
        network.load_state_dict(read(checkpoint))
    except RuntimeError as error:
        raise _refusal(checkpoint, name, error) from error
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    with whole_folder(target) as whole:
        network.save_pretrained(whole)
        processor.save_pretrained(whole)
        config_file = whole / "config.json"
        settings = json.loads(config_file.read_text())
        # What from_pretrained loads by default: half precision saves disk, but CPUs compute best in float32.
        for part in (settings, *(settings[name] for name in ("text_config", "vision_config") if name in settings)):
            part["dtype"] = "float32"
        config_file.write_text(json.dumps(settings, indent=2) + "\n")
        for file in whole.iterdir():
            file.chmod(0o644)
    return target
