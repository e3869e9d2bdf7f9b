"""Which adapter serves which Hugging Face model type."""

from __future__ import annotations

from transformers import PreTrainedModel

from mmtoken.backbones.bare import BareDecoder, BareTower
from mmtoken.backbones.base import Backbone
from mmtoken.backbones.idefics3 import Idefics3
from mmtoken.backbones.internvl import InternVL
from mmtoken.backbones.llava import Llava
from mmtoken.backbones.llava_onevision import LlavaOneVision
from mmtoken.backbones.llava_video import LlavaVideo
from mmtoken.backbones.openvla import OpenVLA
from mmtoken.backbones.qwen_vl import QwenVL
from mmtoken.errors import UnsupportedError, near_names

ADAPTERS: tuple[type[Backbone], ...] = (
    Llava,
    LlavaOneVision,
    LlavaVideo,
    QwenVL,
    Idefics3,
    InternVL,
    OpenVLA,
    BareDecoder,
    BareTower,
)


def adapt(model: PreTrainedModel) -> Backbone:
    """The adapter for `model`.

    Raises:
        UnsupportedError: no adapter serves this `config.model_type`.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(f"model is a {type(model).__name__}; expected a transformers PreTrainedModel.")
    return check_model_type(model.config.model_type)(model)


def check_model_type(model_type: str) -> type[Backbone]:
    """The adapter class of a `config.model_type`.

    Raises:
        UnsupportedError: there is none; the message lists the families that have one.
    """
    known = {name: adapter for adapter in ADAPTERS for name in adapter.model_types}
    if model_type not in known:
        raise UnsupportedError(f"model_type={model_type!r} has no adapter{near_names(model_type, known)}.")
    return known[model_type]


def facts() -> list[dict[str, str]]:
    """One row per adapter, for lists and tables."""
    return [
        {
            "name": adapter.name,
            "model_types": ", ".join(adapter.model_types),
            "modalities": ", ".join(adapter.modalities) or "marked by visual=",
            "resolution": "dynamic" if adapter.dynamic_resolution else "fixed",
        }
        for adapter in ADAPTERS
    ]
