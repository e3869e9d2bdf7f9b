"""Cuts in several stages inside the decoder: which layers they are before, and how much each of them leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mmtoken.compressors.base import check_layers, check_whole
from mmtoken.errors import MMTokenError, UnsupportedError


def as_tuple(field: str, value: object) -> tuple[object, ...] | None:
    """A setting with an entry per stage as a tuple: YAML and JSON hand in lists, and settings must be hashable.

    Raises:
        MMTokenError: it is no list, or empty.
    """
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise MMTokenError(f"{field}={value!r} is a {type(value).__name__}; give a list with an entry per stage.")
    return tuple(value)


def check_ascending(field: str, layers: Sequence[int], lowest: int) -> None:
    """Refuse layers that are no whole numbers of at least `lowest`, or do not ascend.

    Raises:
        MMTokenError: they are not.
    """
    for layer in layers:
        check_whole(field, layer, lowest)
    if list(layers) != sorted(set(layers)):
        raise MMTokenError(f"{field}={layers} do not ascend; give each layer once, the lowest first.")


def check_shares(shares: Sequence[float], keep: int | float, layers: Sequence[int] | None) -> None:
    """Refuse shares of the original tokens that are no fractions, grow, end elsewhere than `keep` or fit no layers.

    Raises:
        MMTokenError: they do.
    """
    for share in shares:
        if not isinstance(share, float) or not 0 < share <= 1:
            raise MMTokenError(f"shares={shares} holds {share!r}; give fractions in (0, 1], as floats.")
    if list(shares) != sorted(shares, reverse=True):
        raise MMTokenError(f"shares={shares} grow; a later stage cannot keep more than an earlier one.")
    if shares[-1] != keep:
        raise MMTokenError(f"keep={keep!r} but shares={shares} leave {shares[-1]}; give keep={shares[-1]}.")
    if layers is not None:
        check_stages("shares", shares, layers)


def check_stages(field: str, values: Sequence[object], layers: Sequence[int]) -> None:
    """Refuse a setting that does not have an entry per cut.

    Raises:
        MMTokenError: the numbers differ.
    """
    if len(values) != len(layers):
        raise MMTokenError(f"{field}={values} has {len(values)} stages but layers={layers} {len(layers)}.")


def checked_cuts(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """`layers` if a decoder of `depth` layers can cut before each of them.

    Raises:
        UnsupportedError: it has too few layers.
    """
    if not layers:
        raise UnsupportedError(f"layers=() is what a decoder of {depth} layers offers; it needs at least 2 layers.")
    check_layers("layers", layers, depth, lowest=1)
    return tuple(layers)


def scaled_layer(layer: int, of: int, depth: int) -> int:
    """The layer of a decoder of `depth` layers that is as deep as `layer` is in one of `of` layers."""
    return math.floor(layer * depth / of + 0.5)


def scaled_cuts(layers: Sequence[int], of: int, depth: int) -> tuple[int, ...]:
    """The same for cuts: none before the first layer, and each layer once, so small decoders have fewer of them."""
    moved = {scaled_layer(layer, of, depth) for layer in layers}
    return tuple(sorted(moved & set(range(1, depth))))
