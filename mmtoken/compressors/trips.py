"""TRIPS: keep the patches that the text attends to and fuse the others into one token, inside the vision tower."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmtoken.compressors.base import Compressor, Context, Need, Positions, check_whole
from mmtoken.errors import InputError, MMTokenError, UnsupportedError
from mmtoken.kernels.attention_rows import attention_rows
from mmtoken.kernels.gather_merge import gather_merge
from mmtoken.tokens import VisualTokens, kept_count, top_mask


@dataclass(frozen=True)
class TRIPS(Compressor):
    """Text-relevant patch selection in a few tower blocks, in the style of TRIPS and without its training.

    Before each block of `layers`, patches are scored by the text, the best ones stay, and the others become one fused
    token: the sum of their features weighted by their scores. The fused token counts as one of `keep`, stands at the
    place of the best patch in it, and competes with the patches in the next selection. The last selection leaves
    `keep`; those before it leave geometric steps towards it.

    The paper scores by attention from the text's CLS token, `text_attention` below, which needs a text encoder of the
    tower's width. Vision-language models have none, so here the score is the softmax of the cosine between the mean
    embedding of the prompt's text and each patch as the model's own projector maps it (`joint_attention`). Neither code
    nor numbers of the paper were available: everything but the idea is inferred, and the paper trains with the
    selection while this does not.

    Attributes:
        layers: tower blocks before which patches are selected; None: 5 and 10 of 12, scaled to the tower's depth.
        temperature: of the softmax over cosines.
        normalise: divide the fused token by the sum of its weights.
        protect_fused: keep the fused token of an earlier selection as it is, apart from the next one.
    """

    keep: int | float = 0.49
    positions: Positions = "keep"
    layers: tuple[int, ...] | None = None
    temperature: float = 0.01
    normalise: bool = False
    protect_fused: bool = False

    title: ClassVar[str] = "TRIPS"
    paper: ClassVar[str] = (
        "Jiang et al., TRIPS: Efficient Vision-and-Language Pre-training with Text-Relevant Image Patch Selection, "
        "EMNLP 2022, arXiv 2403.07883"
    )
    year: ClassVar[int] = 2022
    needs: ClassVar[frozenset[Need]] = frozenset({"prompt"})
    merges: ClassVar[bool] = True
    query_agnostic: ClassVar[bool] = False
    patchwise_projector: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            if isinstance(self.layers, str) or not isinstance(self.layers, tuple | list) or not self.layers:
                raise MMTokenError(f"layers={self.layers!r}: give a tuple of tower blocks, as (5, 10).")
            object.__setattr__(self, "layers", tuple(self.layers))
            for layer in self.layers:
                check_whole("layers", layer, lowest=1)
            if list(self.layers) != sorted(set(self.layers)):
                raise MMTokenError(f"layers={self.layers!r} must ascend without repeats; give for example (5, 10).")
        given = self.temperature
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < math.inf:
            raise MMTokenError(f"temperature={given!r}: give a positive number, as 0.01.")
        for name in ("normalise", "protect_fused"):
            if not isinstance(getattr(self, name), bool):
                raise MMTokenError(f"{name}={getattr(self, name)!r}: use True or False.")

    def selecting(self, depth: int) -> tuple[int, ...]:
        """The blocks before which patches are selected, in a tower of `depth` blocks.

        Raises:
            UnsupportedError: the tower has fewer blocks.
        """
        if self.layers is None:
            return tuple(sorted({max(1, math.floor(depth * part / 12 + 0.5)) for part in (5, 10)} & {*range(1, depth)}))
        if self.layers[-1] >= depth:
            raise UnsupportedError(
                f"layers={self.layers[-1]} but this tower has {depth} blocks before the projector; choose from 1 to "
                f"{depth - 1}."
            )
        return self.layers

    def tower_layers(self, depth: int, blocks: int) -> tuple[int, ...]:
        self.selecting(depth)
        return ()

    def vision_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        layers = self.selecting(ctx.depth)
        if layer not in layers:
            return tokens
        stage = layers.index(layer) + 1
        counts = [
            stage_count(self.keep, total, steps, stage / len(layers))
            for total, steps in zip(ctx.original_counts, tokens.steps, strict=True)
        ]
        scores = joint_attention(ctx.prompt_embedding(tokens), ctx.to_llm(tokens), self.temperature, tokens.eligible)
        ctx.scores = scores
        earlier = ctx.memory.get("fused")
        apart = torch.zeros_like(tokens.eligible)
        if self.protect_fused and earlier is not None:
            apart = earlier.gather(1, tokens.source) & tokens.eligible
        stay = [
            total if count >= total else max(0, count - 1 - waiting)
            for count, total, waiting in zip(counts, tokens.counts(), apart.sum(-1).tolist(), strict=True)
        ]
        left, fused = select_and_fuse(tokens, scores, stay, normalise=self.normalise, apart=apart)
        places = marked(left.source, fused, int(tokens.source.max()) + 1 if earlier is None else earlier.shape[1])
        ctx.memory["fused"] = places if earlier is None else places | earlier
        return left


def stage_count(keep: int | float, total: int, steps: int, part: float) -> int:
    """Tokens that are left after `part` of the selections: total * (share kept at the end) ** part."""
    last = kept_count(keep, total, steps)
    if part >= 1 or last == total:
        return last
    return max(last, kept_count((last / total) ** part, total))


def select_and_fuse(
    tokens: VisualTokens, scores: Tensor, stay: list[int], *, normalise: bool = False, apart: Tensor | None = None
) -> tuple[VisualTokens, Tensor]:
    """Keep the best tokens of each item and fuse the others into one more, f = sum of score * feature over them.

    The fused token stands at the place of the best token in it. Gradients reach the scores through it.

    Args:
        tokens: the tokens.
        scores: float[B, N]; ties go to the lower index.
        stay: eligible tokens per item that stay as they are; where that is all of them, nothing is fused.
        normalise: divide f by the sum of the scores in it.
        apart: bool[B, N], tokens that stay anyway and are not scored, or None.

    Returns:
        (the tokens that are left, in original order; bool[B, K] which of them are fused).

    Raises:
        InputError: a score is NaN.
    """
    apart = torch.zeros_like(tokens.eligible) if apart is None else apart & tokens.eligible
    candidates = tokens.eligible & ~apart
    kept = top_mask(scores, stay, candidates)
    rest = candidates & ~kept
    best = top_mask(scores, [1] * len(tokens), rest)
    weights = scores.float().masked_fill(~rest, 0.0)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    slot = rest.long() - 1
    fused = gather_merge(tokens.features, torch.full_like(slot[:, :1], -1), slot, weights)
    size = tokens.size.masked_fill(~rest, 0.0).sum(-1, keepdim=True)
    changed = tokens.replace(
        features=torch.where(best[..., None], fused, tokens.features),
        size=torch.where(best, size, tokens.size),
    )
    mask = kept | best | apart | tokens.protected
    flags = tokens.replace(features=best[..., None]).where(mask)
    return changed.where(mask), flags.features[..., 0] & flags.valid


def marked(places: Tensor, flags: Tensor, length: int) -> Tensor:
    """bool[B, length]: the places int[B, N] for which bool[B, N] holds."""
    # Padding points at a place that a token may have, so a flag once set must stay.
    found = torch.zeros(len(places), length, dtype=torch.long, device=places.device)
    return found.scatter_add(1, places, flags.long()) > 0


def text_attention(query: Tensor, keys: Tensor, valid: Tensor | None = None) -> Tensor:
    """float32[B, N]: softmax over the patches of q . k / sqrt(d), mean over heads.

    Args:
        query: float[B, H, d], the text's CLS token under the block's own query projection (`text_query`).
        keys: float[B, H, N, d], the patches' keys; CLS is not among them.
        valid: bool[B, N], False on padding; None: all.
    """
    mask = None if valid is None else valid[:, None]
    return attention_rows(query[:, :, None], keys, mask=mask, mean="heads")[:, 0]


def text_query(
    text: Tensor, projection: Callable[[Tensor], Tensor], heads: int, norm: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """float[B, H, d]: a text feature as a query of a tower block.

    Args:
        text: float[B, D], of the tower's width.
        projection: the block's query projection.
        heads: H.
        norm: the block's norm before its attention; None skips it.

    Raises:
        InputError: the projection does not take this width.
    """
    width = getattr(projection, "in_features", text.shape[-1])
    if width != text.shape[-1]:
        raise InputError(
            f"text has width {text.shape[-1]} but the block's query projection takes {width}; map it to the tower's "
            "width first, or use joint_attention."
        )
    query = projection(text if norm is None else norm(text))
    return query.view(len(query), heads, -1)


def joint_attention(text: Tensor, patches: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """float32[B, N]: softmax over the patches of cos(text, patch) / temperature in a space that both share.

    Args:
        text: float[B, D].
        patches: float[B, N, D].
        temperature: of the softmax.
        valid: bool[B, N], False on padding; None: all.
    """
    products = torch.einsum("bd,bnd->bn", normalize(text.float(), dim=-1), normalize(patches.float(), dim=-1))
    if valid is not None:
        products = products.masked_fill(~valid, -math.inf)
    return (products / temperature).softmax(-1)
