"""A compressor with the weights of its learned parts."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmtoken.compressors.base import Compressor, Dims
from mmtoken.compressors.pretrained import Pretrained
from mmtoken.errors import MMTokenError


class Trained(Pretrained, nn.Module):
    """A compressor and its learned parts; accepted wherever a compressor is.

    It owns the weights: optimizers, `state_dict` and safetensors see the parts through it, and a model that it is
    attached to neither lists nor changes them. `mmtoken.learnable` makes one with fresh weights for a model.

    Attributes:
        compressor: the settings.
        module: what `Compressor.build` made.
        dims: the sizes that it was built for; None where they are not known: such parts are saved only with a model.
    """

    def __init__(self, compressor: Compressor, module: nn.Module, dims: Dims | None = None) -> None:
        super().__init__()
        if not isinstance(compressor, Compressor) or not compressor.trainable:
            raise MMTokenError(
                f"compressor={compressor!r} has no learned parts; use it as it is, without Trained around it."
            )
        if not isinstance(module, nn.Module):
            raise MMTokenError(f"module={module!r} is a {type(module).__name__}; give what compressor.build() made.")
        self.compressor = compressor
        self.module = module
        self.dims = dims

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the learned parts compute."""
        return self.module(*args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The compressor's settings as data; weights are apart from them."""
        return self.compressor.to_dict()


def settings_of(given: Compressor | Trained) -> Compressor:
    """The compressor itself."""
    return given.compressor if isinstance(given, Trained) else given
