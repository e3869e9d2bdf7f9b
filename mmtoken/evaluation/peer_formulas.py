"""Five methods that evict cached keys as plain formulas over one prompt: the reference of a comparison with a peer.

In float64, head by head, without a line of the compressors: what both sides are measured against.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from mmtoken.engine.compat import CACHE

DENSE = "dense"
"""Stands for a method that keeps all."""


@dataclass(frozen=True)
class Layer:
    """What a decoder layer holds after the prefill of one prompt.

    Attributes:
        keys, values: float64[G, n, d], keys rotated.
        queries: float64[H, n, d], rotated.
        unrotated: float64[H, n, d].
        theta: base of the rotary embedding.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    unrotated: Tensor
    theta: float

    def attention(self, head: int, query: int) -> Tensor:
        """float64[n]: softmax of one query over the keys up to its own position."""
        group = head // (len(self.queries) // len(self.keys))
        logits = self.keys[group] @ self.queries[head, query] / math.sqrt(self.keys.shape[2])
        logits[query + 1 :] = -math.inf
        row: Tensor = logits.softmax(0)
        return row

    def heads(self, group: int) -> range:
        """Query heads that share a key head."""
        size = len(self.queries) // len(self.keys)
        return range(group * size, (group + 1) * size)


def rotate(vectors: Tensor, places: Tensor, theta: float) -> Tensor:
    """float64[..., p, d]: vectors turned to positions int[p]; pairs are (i, i + d/2), angles place * theta^(-2i/d)."""
    half = vectors.shape[-1] // 2
    angle = places.double()[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    first, second = vectors[..., :half], vectors[..., half:]
    turned = [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()]
    return torch.cat(turned, -1)


def knorm(layer: Layer) -> Tensor:
    """float64[G, n]: short keys first."""
    lengths: Tensor = layer.keys.norm(dim=-1)
    return -lengths


def keydiff(layer: Layer) -> Tensor:
    """float64[G, n]: minus the cosine to the mean of the unit keys."""
    scores = []
    for keys in layer.keys:
        unit = keys / keys.norm(dim=-1, keepdim=True)
        anchor = unit.mean(0)
        scores.append(-(unit @ anchor) / anchor.norm())
    return torch.stack(scores)


def tova(layer: Layer) -> Tensor:
    """float64[G, n]: what the last token attends to, the mean of all heads; the last token stays."""
    last = layer.keys.shape[1] - 1
    row = torch.stack([layer.attention(head, last) for head in range(len(layer.queries))]).mean(0)
    row[last] = math.inf
    return row.expand(len(layer.keys), -1)


def snapkv(layer: Layer, window: int, kernel: int) -> Tensor:
    """float64[G, n]: what the last `window` tokens attend to, each entry the mean of its `kernel` neighbours."""
    length = layer.keys.shape[1]
    old = length - window
    scores = torch.full((len(layer.keys), length), math.inf, dtype=torch.float64)
    for group in range(len(layer.keys)):
        rows = [layer.attention(head, query) for head in layer.heads(group) for query in range(old, length)]
        received = torch.stack(rows).mean(0)[:old]
        for place in range(old):
            low, high = max(0, place - kernel // 2), place + kernel // 2 + 1
            scores[group, place] = received[low:high].sum() / kernel
    return scores


def expected_attention(layer: Layer, future: int, sinks: int) -> Tensor:
    """float64[G, n]: attention expected of the next `future` queries, if normal, times the value's length."""
    length, width = layer.keys.shape[1:]
    places = torch.arange(length, length + future)
    basis = torch.eye(width, dtype=torch.float64)
    turn = rotate(basis[:, None].expand(-1, future, -1), places, layer.theta).mean(1).T
    scores = torch.full((len(layer.keys), length), math.inf, dtype=torch.float64)
    for group, keys in enumerate(layer.keys):
        shares = []
        for head in layer.heads(group):
            queries = layer.unrotated[head, sinks:]
            mean = turn @ queries.mean(0)
            spread = turn @ torch.cov(queries.T, correction=0) @ turn.T
            logits = [key @ mean / math.sqrt(width) + key @ spread @ key / (2 * width) for key in keys[sinks:]]
            shares.append(torch.stack(logits).softmax(0))
        scores[group, sinks:] = torch.stack(shares).mean(0) * layer.values[group, sinks:].norm(dim=-1)
    return scores


FORMULAS: Mapping[str, Callable[..., Tensor]] = {
    "SnapKV": snapkv,
    "ExpectedAttention": expected_attention,
    "TOVA": tova,
    "KeyDiff": keydiff,
    "Knorm": knorm,
}
"""Name -> scores of a layer's entries; the highest stay, inf always does."""


@dataclass(frozen=True)
class Reference:
    """What the formula gives for one prompt.

    Attributes:
        kept: int[layers, G, K], ascending.
        tokens: int[T], greedy.
        logits: float[T, V]; the first are those of the prefill.
    """

    kept: Tensor
    tokens: Tensor
    logits: Tensor


def layers(model: Any, ids: Tensor) -> tuple[list[Layer], Any]:
    """All layers of an unmodified Llama after the prefill of `ids` int[n], and its cache and logits."""
    out = model(ids[None], output_hidden_states=True, use_cache=True)
    theta = float(model.config.rope_parameters["rope_theta"])
    found = []
    for number, layer in enumerate(model.model.layers):
        held = out[CACHE].layers[number]
        attention = layer.self_attn
        queries = attention.q_proj(layer.input_layernorm(out.hidden_states[number]))[0].double()
        unrotated = queries.unflatten(1, (-1, held.keys.shape[-1])).transpose(0, 1)
        rotated = rotate(unrotated, torch.arange(len(ids)), theta)
        found.append(Layer(held.keys[0].double(), held.values[0].double(), rotated, unrotated, theta))
    return found, out


@torch.no_grad()
def reference(model: Any, ids: Tensor, name: str, settings: Mapping[str, Any], keep: float, tokens: int) -> Reference:
    """The formula on one prompt int[n]: int(n * keep) entries of every head stay, then `tokens` greedy tokens.

    Args:
        model: an unmodified Llama; it decodes from a cache that was filled by hand.
        name: one of `FORMULAS`, or `DENSE`.
        settings: of the formula.
    """
    parts, out = layers(model, ids)
    cache, kept = DynamicCache(), []
    for number, part in enumerate(parts):
        groups, length = part.keys.shape[:2]
        scores = torch.zeros(groups, length) if name == DENSE else FORMULAS[name](part, **settings)
        count = length if name == DENSE else max(1, int(length * keep))
        stay = scores.argsort(dim=1, descending=True, stable=True)[:, :count].sort(1).values
        index = stay[None, :, :, None].expand(-1, -1, -1, part.keys.shape[2])
        held = out[CACHE].layers[number]
        cache.update(held.keys.gather(2, index), held.values.gather(2, index), number)
        kept.append(stay)
    logits = [out.logits[0, -1]]
    for place in range(len(ids), len(ids) + tokens - 1):
        last, position = logits[-1].argmax()[None, None], torch.tensor([[place]])
        step = model(last, position_ids=position, use_cache=True, **{CACHE: cache})
        logits.append(step.logits[0, -1])
    found = torch.stack(logits)
    return Reference(torch.stack(kept), found.argmax(-1), found)
