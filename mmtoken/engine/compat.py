"""What differs between the supported versions of transformers, in one place.

5.24 renamed the argument and output `past_key_values` to `cache`. Callers may still use the old name, which
transformers translates inside the forward, so after our hooks. 5.17 takes no encoded images, and its gradient
checkpointing runs a layer's hooks again in the recomputation.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.masking_utils import create_causal_mask

from mmtoken.errors import UnsupportedError

_OLD = "past_key_values"
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else _OLD
"""Name of the cache among arguments and outputs."""


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments (or a model's output), under either name; None without one."""
    return arguments.get(CACHE, arguments.get(_OLD))


def with_cache(arguments: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """The arguments with another cache, under the name that this version uses."""
    return {**{name: value for name, value in arguments.items() if name != _OLD}, CACHE: cache}


def takes_encoded_images(root: Any) -> bool:
    """Whether a model's forward takes what its encoders returned (`mm_encoder_outputs`) instead of pixels."""
    return "mm_encoder_outputs" in inspect.signature(type(root).forward).parameters


def check_checkpointing(layer: nn.Module, where: str) -> None:
    """Refuse cuts between checkpointed layers where the recomputation runs hooks again.

    Args:
        layer: one of the layers.
        where: what they are, for the message.

    Raises:
        UnsupportedError: checkpointing wraps a layer's call with all hooks (5.17), not its forward.
    """
    if any("__call__" in kind.__dict__ for kind in type(layer).__mro__ if kind not in (nn.Module, object)):
        raise UnsupportedError(
            f"gradient_checkpointing=True with cuts between {where}: this transformers version runs hooks again in the "
            "recomputation; upgrade transformers or disable checkpointing."
        )
