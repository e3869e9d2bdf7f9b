"""BUS: patches selected by the text inside the tower, then summarised by a learned decoder before the projector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy

from mmtoken.compressors.base import Budget, Compressor, Context, Dims, Need, Positions, check_whole
from mmtoken.compressors.trips import marked, select_and_fuse
from mmtoken.errors import InputError, MMTokenError, UnsupportedError
from mmtoken.tokens import VisualTokens, check_keep, grid_places, kept_count, top_mask

MOST_LAYERS = 128
"""Of the decoder: a number that comes in a file must not be able to use up the memory."""


@dataclass(frozen=True)
class BUS(Compressor):
    """Bottom-up patch summarization, reconstructed from the paper's abstract and its sibling COPA (no code exists).

    Before tower block `layer` a small network scores each patch together with the text (text-semantics-aware patch
    selector). The best `share` of the patches stay, the others become one fused token, the sum of their features
    weighted by their scores. Behind the tower a light Transformer decoder (patch abstraction decoder) turns `keep`
    queries, which attend to each other and to all that is left, CLS included, into the tokens that are projected.

    The text is the mean embedding of the prompt's text tokens, mapped to the tower's width. Selection is hard, so
    gradients reach the scores through the fused token only, and through `patch_text_loss`: the scores of a forward with
    their gradient are the output of the `selector` of `BUSParts` (see there).

    Every output stands at the place of the selected patch that its query starts from, or would start from if queries
    are learned vectors; it stands for an equal share of the item. CLS is attended to and not handed to the projector,
    which reads patches only.

    Attributes:
        share: of the patches, kept by the selector (rho); at least as many as `keep`.
        layer: tower block before which patches are selected; None: half of the tower's depth.
        queries: "patches" starts from the selected patches of the highest scores, "learned" from learned vectors, one
            per token of `keep`, which must be a count then.
        decoder_layers: of the decoder (P).
        heads: attention heads of the decoder.
        normalise: divide the fused token by the sum of its weights.
    """

    keep: int | float = 0.25
    positions: Positions = "keep"
    share: float = 0.5
    layer: int | None = None
    queries: Literal["patches", "learned"] = "patches"
    decoder_layers: int = 1
    heads: int = 8
    normalise: bool = False

    title: ClassVar[str] = "BUS"
    paper: ClassVar[str] = (
        "Jiang et al., BUS: Efficient and Effective Vision-language Pre-training with Bottom-Up Patch Summarization, "
        "ICCV 2023, arXiv 2307.08504"
    )
    year: ClassVar[int] = 2023
    needs: ClassVar[frozenset[Need]] = frozenset({"prompt"})
    merges: ClassVar[bool] = True
    query_agnostic: ClassVar[bool] = False
    trainable: ClassVar[bool] = True
    patchwise_projector: ClassVar[bool] = True
    budget: ClassVar[Budget] = "exact"
    identity_at_full: ClassVar[bool | str] = "the learned decoder makes new features, however many are kept"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.share, "share")
        if not isinstance(self.share, float):
            raise MMTokenError(f"share={self.share!r} is a count; give a fraction in (0, 1], as 0.5.")
        if self.layer is not None:
            check_whole("layer", self.layer, lowest=1)
        check_whole("decoder_layers", self.decoder_layers, lowest=1)
        if self.decoder_layers > MOST_LAYERS:
            raise MMTokenError(f"decoder_layers={self.decoder_layers} is too many; give at most {MOST_LAYERS}.")
        check_whole("heads", self.heads, lowest=1)
        if self.queries not in ("patches", "learned"):
            raise MMTokenError(f"queries={self.queries!r} is unknown; use 'patches' or 'learned'.")
        if self.queries == "learned" and not isinstance(self.keep, int):
            raise MMTokenError(
                f"keep={self.keep!r}: give a count with queries='learned', which has a vector per token."
            )
        if not isinstance(self.normalise, bool):
            raise MMTokenError(f"normalise={self.normalise!r}: use True or False.")

    def selecting(self, depth: int) -> int:
        """The block before which patches are selected, in a tower of `depth` blocks.

        Raises:
            UnsupportedError: the tower has fewer blocks.
        """
        layer = max(1, depth // 2) if self.layer is None else self.layer
        if layer >= depth:
            raise UnsupportedError(
                f"layer={layer} but this tower has {depth} blocks before the projector; choose from 1 to {depth - 1}."
            )
        return layer

    def tower_layers(self, depth: int, blocks: int) -> tuple[int, ...]:
        self.selecting(depth)
        return ()

    def build(self, dims: Dims) -> BUSParts:
        learned = self.keep if self.queries == "learned" and isinstance(self.keep, int) else 0
        # A projector that maps patch by patch is handed patches of the tower's width.
        return BUSParts(dims.tokens, dims.llm, self.heads, self.decoder_layers, learned)

    def vision_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        if layer != self.selecting(ctx.depth):
            return tokens
        parts: BUSParts = ctx.learned
        text = ctx.prompt_embedding(tokens)
        features = tokens.features.masked_fill(~tokens.valid[..., None], 0.0)
        scores = parts.selector(*(value.to(parts.dtype) for value in (features, text))).float()
        ctx.scores = scores
        stay = [
            max(kept_count(self.share, total, steps), kept_count(self.keep, total, steps))
            for total, steps in zip(tokens.counts(), tokens.steps, strict=True)
        ]
        left, fused = select_and_fuse(tokens, scores, stay, normalise=self.normalise)
        places = grid_places(tokens)
        known = torch.full((len(tokens), max(ctx.original_counts)), -1.0, device=scores.device)
        rated = scores.detach().masked_fill(~tokens.eligible, -1.0)
        known = known.scatter_reduce(1, places.masked_fill(~tokens.eligible, 0), rated, "amax")
        # No query starts from the fused token.
        fused_at = marked(grid_places(left).masked_fill(~fused, 0), fused, known.shape[1])
        ctx.memory["scores"] = known.masked_fill(fused_at, -1.0)
        return left

    def project(
        self, tokens: VisualTokens, default: Callable[[VisualTokens], VisualTokens], ctx: Context
    ) -> VisualTokens:
        parts: BUSParts = ctx.learned
        # Where the projector reads CLS as well, it comes before the patches and is protected.
        scores = ctx.memory["scores"].gather(1, grid_places(tokens).masked_fill(~tokens.eligible, 0))
        counts = [
            kept_count(self.keep, total, steps) for total, steps in zip(ctx.original_counts, tokens.steps, strict=True)
        ]
        picked = top_mask(scores, counts, tokens.eligible)
        chosen = tokens.where(picked)
        everything, real = tokens.features.masked_fill(~tokens.eligible[..., None], 0.0), tokens.eligible
        cls = ctx.tower_cls(tokens)
        if cls is not None:
            everything = torch.cat([cls[:, None].to(everything.dtype), everything], 1)
            real = torch.cat([torch.ones_like(real[:, :1]), real], 1)
        start = chosen.features.masked_fill(~chosen.valid[..., None], 0.0)
        made = parts.summarise(start.to(parts.dtype), chosen.valid, everything.to(parts.dtype), real)
        left = tokens.where(picked | tokens.protected)
        features, size = left.features.clone(), left.size.clone()
        features[left.eligible] = made[chosen.valid].to(features.dtype)
        share = torch.tensor(ctx.original_counts, device=size.device) / chosen.valid.sum(-1).clamp(min=1)
        size = torch.where(left.eligible, share[:, None].to(size.dtype), size)
        return default(left.replace(features=features, size=size))


class Selector(nn.Module):
    """Scores patches together with a text, after COPA: three linear maps over both, side by side.

    Args:
        width: d, of the patches.
        text_width: of the text.
    """

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.text = nn.Linear(text_width, width)
        self.score = nn.Sequential(
            nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1)
        )

    def forward(self, patches: Tensor, text: Tensor) -> Tensor:
        """float[B, N] in (0, 1] of patches float[B, N, d] under texts float[B, text width]."""
        mapped = self.text(text)[:, None].expand(-1, patches.shape[1], -1)
        scores: Tensor = self.score(torch.cat([patches, mapped], -1))[..., 0].sigmoid()
        return scores


class BUSParts(nn.Module):
    """Selector and patch abstraction decoder.

    A training reads the scores of a forward, with their gradient, from the selector's output:

    ```python
    seen = []
    handle = trained.module.selector.register_forward_hook(lambda module, inputs, scores: seen.append(scores))
    ```

    Args:
        width: d, of the tower.
        text_width: of the decoder's embeddings.
        heads: of the decoder.
        layers: of the decoder.
        learned: number of learned queries; 0: queries start from patches.

    Raises:
        MMTokenError: the heads do not divide the width.
    """

    def __init__(self, width: int, text_width: int, heads: int, layers: int, learned: int) -> None:
        super().__init__()
        if width % heads:
            raise MMTokenError(f"heads={heads} does not divide the tower's width {width}; give a divisor of it.")
        self.selector = Selector(width, text_width)
        layer = nn.TransformerDecoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, layers)
        self.queries = nn.Parameter(torch.randn(learned, width) * width**-0.5) if learned else None

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.selector.text.weight.dtype

    def summarise(self, start: Tensor, valid: Tensor, everything: Tensor, real: Tensor) -> Tensor:
        """float[B, m, d]: the summary.

        Args:
            start: float[B, m, d], what queries start from; replaced by the learned ones if there are any.
            valid: bool[B, m], False on padding.
            everything: float[B, n, d], what is left of the item.
            real: bool[B, n], False on padding.
        """
        if self.queries is not None:
            start = self.queries[: start.shape[1]].expand(len(start), -1, -1)
        summary: Tensor = self.decoder(start, everything, tgt_key_padding_mask=~valid, memory_key_padding_mask=~real)
        return summary


def patch_text_loss(scores: Tensor, overlap: Tensor, annotated: Tensor | None = None) -> Tensor:
    """The patch-text matching loss: mean binary cross-entropy of a patch's score against whether it lies in the box.

    Args:
        scores: float[B, N] in [0, 1], of images under the phrase of a box.
        overlap: bool[B, N], see `patches_in_box`.
        annotated: bool[B], which images have a box; None: all.

    Returns:
        float32: mean over the patches of each annotated image, then over these images; 0 if there is none.

    Raises:
        InputError: the shapes differ.
    """
    if scores.shape != overlap.shape:
        raise InputError(f"overlap has shape {tuple(overlap.shape)}; expected that of scores, {tuple(scores.shape)}.")
    per_image = binary_cross_entropy(scores.float(), overlap.float(), reduction="none").mean(-1)
    counted = torch.ones_like(per_image) if annotated is None else annotated.to(per_image)
    return (per_image * counted).sum() / counted.sum().clamp(min=1)


def patches_in_box(boxes: Tensor, rows: int, columns: int) -> Tensor:
    """bool[B, rows * columns]: which patches overlap a box at all.

    Args:
        boxes: float[B, 4], (left, top, right, bottom) as fractions of the image's width and height.
        rows, columns: of the grid of patches.
    """
    left, top, right, bottom = boxes.float().unbind(-1)
    x = torch.arange(columns, device=boxes.device)
    y = torch.arange(rows, device=boxes.device)
    across = (x < right[:, None] * columns) & (x + 1 > left[:, None] * columns)
    down = (y < bottom[:, None] * rows) & (y + 1 > top[:, None] * rows)
    return (down[:, :, None] & across[:, None]).flatten(1)
