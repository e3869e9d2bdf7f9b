"""Learned parts for a model: their sizes, and fresh ones."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from transformers import PreTrainedModel

from mmtoken.backbones.base import Backbone
from mmtoken.backbones.registry import adapt
from mmtoken.compressors.base import Compressor, Dims
from mmtoken.compressors.registry import resolve
from mmtoken.compressors.trained import Trained, settings_of
from mmtoken.errors import MMTokenError, UnsupportedError


def dims_of(backbone: Backbone) -> Dims:
    """The sizes that learned parts depend on.

    Raises:
        UnsupportedError: the model has no tower or no decoder.
    """
    tower = backbone.tower()
    if tower is None or backbone.decoder is None:
        raise UnsupportedError(f"Learned parts need a model with a tower and a decoder; this is a {backbone.name}.")
    width, read = backbone.widths()
    llm = int(backbone.decoder.config.hidden_size)
    tokens = read if backbone.tokenwise_projector else llm
    return Dims(tower=width, tokens=tokens, llm=llm, blocks=tower.feature_block + 1)


def learnable(
    model: PreTrainedModel, compressor: Compressor | str | dict[str, object] | Trained, *, seed: int = 0
) -> Trained:
    """A compressor with fresh learned parts of the model's sizes, on its device and in its dtype, ready to be trained.

    ```python
    trained = learnable(model, QueCC(), seed=0)
    optimizer = torch.optim.AdamW(trained.parameters())
    with compress(model, trained):
        model(**batch, labels=labels).loss.backward()
    ```

    Args:
        model: a transformers VLM with an adapter.
        compressor: one with learned parts.
        seed: of the weights; the global generators are left as they were.

    Raises:
        MMTokenError: the compressor has no learned parts.
        UnsupportedError: the model has no tower or no decoder.
    """
    method = settings_of(resolve(compressor))
    if not method.trainable:
        raise MMTokenError(f"compressor={method!r} has no learned parts; attach it as it is.")
    sample = next(iter(_tower(adapt(model)).parameters()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Drawn on the CPU, so that a seed means the same weights everywhere.
        dims = dims_of(adapt(model))
        module = method.build(dims)
    return Trained(method, module.to(device=sample.device, dtype=sample.dtype), dims)


def check_parts(backbone: Backbone, given: Compressor | Trained) -> None:
    """Do nothing if a compressor has the learned parts that it needs, of the model's sizes.

    Raises:
        UnsupportedError: it lacks them, or they were made for another model or other settings.
    """
    method = settings_of(given)
    if not method.trainable:
        return
    name = type(method).__name__
    if not isinstance(given, Trained):
        raise UnsupportedError(
            f"{name} has learned parts: attach mmtoken.learnable(model, compressor), which makes fresh ones to train, "
            "or the Trained that load() or a training returned."
        )
    sizes = dims_of(backbone)
    for field in dataclasses.fields(sizes) if given.dims is not None else ():
        found_size, size = getattr(given.dims, field.name), getattr(sizes, field.name)
        if found_size != size:
            raise UnsupportedError(
                f"the learned parts of {name} do not fit: they were built for {field.name}={found_size} and this model "
                f"has {field.name}={size}; train them for this model."
            )
    wanted = {key: tuple(value.shape) for key, value in empty(backbone.model, method).module.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in given.module.state_dict().items()}
    for key in wanted.keys() | found.keys():
        if wanted.get(key) != found.get(key):
            raise UnsupportedError(
                f"the learned parts of {name} do not fit: {key} is {found.get(key)} and this model with these settings "
                f"asks for {wanted.get(key)}; train them for this model."
            )


def empty(model: PreTrainedModel, method: Compressor) -> Trained:
    """The same on the meta device, without weights."""
    dims = dims_of(adapt(model))
    with torch.device("meta"):
        return Trained(method, method.build(dims), dims)


def _tower(backbone: Backbone) -> nn.Module:
    tower = backbone.tower()
    return backbone.model if tower is None else tower.module
