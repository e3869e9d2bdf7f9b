"""Zero-shot classification: images against the text features of class names."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmtoken.errors import InputError, UnsupportedError


def zero_shot_logits(model: Any, images: Tensor, weights: Tensor) -> Tensor:
    """Logits float[n, C] of images, as open_clip's `get_logits` gives them.

    Inside `mmtoken.compress(model, compressor)` the tower is compressed, and nothing else changes.

    Args:
        model: an open_clip `CLIP` or `CustomTextCLIP`.
        images: float[n, 3, H, W], as the model's transform makes them.
        weights: float[D, C], a unit vector per class, of `open_clip.build_zero_shot_classifier`.

    Raises:
        UnsupportedError: the model is no such one.
        InputError: images or weights have another shape.
    """
    check_classifier(model, weights)
    if images.ndim != 4:
        raise InputError(f"images has shape {tuple(images.shape)}; expected float[n, 3, H, W].")
    features = model.encode_image(images, normalize=True)
    if features.shape[-1] != weights.shape[0]:
        raise InputError(
            f"weights has shape {tuple(weights.shape)}, but image features are {features.shape[-1]} wide; give "
            "float[D, C] of the same model."
        )
    logits: Tensor = model.logit_scale.exp() * features @ weights
    return logits if model.logit_bias is None else logits + model.logit_bias


def check_classifier(model: object, weights: Tensor) -> None:
    """Refuse what is no open_clip model, or no class per column.

    Raises:
        UnsupportedError, InputError: as `zero_shot_logits`.
    """
    from open_clip.model import CLIP, CustomTextCLIP

    if not isinstance(model, CLIP | CustomTextCLIP):
        raise UnsupportedError(f"model is a {type(model).__name__}; expected an open_clip CLIP or CustomTextCLIP.")
    if weights.ndim != 2:
        raise InputError(f"weights has shape {tuple(weights.shape)}; expected float[D, C], a column per class.")
