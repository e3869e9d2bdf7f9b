"""Which adapter serves which model."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from mmtoken.backbones.bare import BareDecoder, BareTower
from mmtoken.backbones.base import Backbone
from mmtoken.backbones.cohere import CohereVision
from mmtoken.backbones.gemma import Gemma3, PaliGemma
from mmtoken.backbones.idefics3 import Idefics3
from mmtoken.backbones.internvl import InternVL
from mmtoken.backbones.llava import Llava
from mmtoken.backbones.llava_next import LlavaNext, LlavaNextVideo
from mmtoken.backbones.llava_onevision import LlavaOneVision
from mmtoken.backbones.llava_video import LlavaVideo
from mmtoken.backbones.mistral3 import Mistral3
from mmtoken.backbones.open_clip import OpenClipViT
from mmtoken.backbones.openvla import OpenVLA
from mmtoken.backbones.qwen_vl import QwenVL
from mmtoken.backbones.timm_vit import TimmViT
from mmtoken.backbones.video_llava import VideoLlava
from mmtoken.errors import UnsupportedError, near_names

ADAPTERS: tuple[type[Backbone], ...] = (
    Llava,
    LlavaNext,
    LlavaNextVideo,
    VideoLlava,
    LlavaOneVision,
    LlavaVideo,
    QwenVL,
    Idefics3,
    InternVL,
    CohereVision,
    Mistral3,
    OpenVLA,
    Gemma3,
    PaliGemma,
    BareDecoder,
    BareTower,
    TimmViT,
    OpenClipViT,
)

HOLDERS = {
    "open_clip.model.CLIP": "visual",
    "open_clip.model.CustomTextCLIP": "visual",
    "open_clip.timm_model.TimmModel": "trunk",
}
"""Classes around a tower, by their full names, and their attribute that holds it."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel or peft's wrapper, both of which hand every call on to it.

    Raises:
        UnsupportedError: peft puts virtual tokens in front of its prompts (prompt and prefix tuning).
    """
    if isinstance(model, DistributedDataParallel):
        return unwrapped(model.module)
    peft: Any = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise UnsupportedError(
            f"peft_type={model.active_peft_config.peft_type.value!r} puts virtual tokens in front of prompts, where "
            "places of visual tokens no longer hold; use an adapter of the weights, such as LoRA."
        )
    return unwrapped(model.get_base_model())


def adapt(model: nn.Module) -> Backbone:
    """The adapter for `model`.

    Raises:
        UnsupportedError: no adapter serves this `config.model_type`, or this class from outside transformers.
    """
    model = unwrapped(model)
    if isinstance(model, PreTrainedModel):
        return check_model_type(model.config.model_type)(model)
    module: Any = model
    while (names := _full_names(module)) & HOLDERS.keys():
        module = getattr(module, next(HOLDERS[name] for name in HOLDERS if name in names))
    for adapter in ADAPTERS:
        if names & set(adapter.module_types):
            return adapter(module)
    raise UnsupportedError(
        f"model is a {type(model).__name__}; expected a transformers PreTrainedModel, a VisionTransformer or Eva of "
        "timm, or an open_clip model with one of those or its own VisionTransformer."
    )


def _full_names(model: object) -> set[str]:
    """The full names of the classes of an object; what is looked up by them need not be imported."""
    return {f"{kind.__module__}.{kind.__qualname__}" for kind in type(model).__mro__}


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
            "model_types": ", ".join(adapter.model_types or adapter.module_types),
            "modalities": ", ".join(adapter.modalities) or "marked by visual=",
            "resolution": "dynamic" if adapter.dynamic_resolution else "fixed",
        }
        for adapter in ADAPTERS
    ]
