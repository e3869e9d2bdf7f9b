"""PyramidDrop: drop visual tokens in stages, more the deeper the layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mmtoken.compressors.base import Compressor, Context, Need, Parity, Positions
from mmtoken.compressors.stages import as_tuple, check_ascending, check_shares, check_stages, checked_cuts
from mmtoken.errors import MMTokenError
from mmtoken.tokens import VisualTokens, kept_count


@dataclass(frozen=True)
class PyramidDrop(Compressor):
    """Several cuts inside the decoder, each by the attention that the next layer is about to pay.

    Before each layer in `layers`, a visual token's score is the head-mean attention of the prompt's last token,
    computed with that layer's own norm, query and key projections. `keep` is what is left after the last cut; the
    stages before it follow a geometric series, so keep=0.125 in three stages is the paper's 1/2, 1/4, 1/8.

    Differs from the official code in the default: tokens keep their positions (positions="renumber" compacts them as
    the code does), counts are rounded by `kept_count`, each image has its own budget.

    Attributes:
        layers: layers (0-based) before which tokens are dropped; None: at 1/4, 1/2 and 3/4 of the depth.
        shares: fraction of the original tokens left after each cut, the last one equal to `keep`; None: the geometric
            series.
        variant: "repo" truncates counts, int(N * share), as the official code.
    """

    keep: int | float = 0.125
    positions: Positions = "keep"
    layers: tuple[int, ...] | None = None
    shares: tuple[float, ...] | None = None
    variant: Literal["paper", "repo"] = "paper"

    title: ClassVar[str] = "PyramidDrop"
    paper: ClassVar[str] = (
        "Xing et al., PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy "
        "Reduction, CVPR 2025, arXiv 2410.17247"
    )
    year: ClassVar[int] = 2025
    parity: ClassVar[Parity] = "official code"
    needs: ClassVar[frozenset[Need]] = frozenset({"next_attention"})
    query_agnostic: ClassVar[bool] = False
    causal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("paper", "repo"):
            raise MMTokenError(f"variant={self.variant!r} is unknown; use 'paper' or 'repo'.")
        for field in ("layers", "shares"):
            object.__setattr__(self, field, as_tuple(field, getattr(self, field)))
        if self.layers is not None:
            check_ascending("layers", self.layers, lowest=1)
        if self.shares is not None:
            check_shares(self.shares, self.keep, self.layers)

    def cut_layers(self, depth: int) -> tuple[int, ...]:
        layers = self.layers
        if layers is None:
            layers = tuple(sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3)} & set(range(1, depth))))
        layers = checked_cuts(layers, depth)
        if self.shares is not None:
            check_stages("shares", self.shares, layers)
        return layers

    def llm_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        layers = self.cut_layers(ctx.depth)
        stage = layers.index(layer)
        counts = [
            self._count(total, stage, len(layers), steps)
            for total, steps in zip(ctx.original_counts, tokens.steps, strict=True)
        ]
        return tokens.top(ctx.next_attention(tokens), counts)

    def _count(self, total: int, stage: int, stages: int, steps: int) -> int:
        """Tokens of an item left after a stage."""
        if self.shares is not None:
            share = self.shares[stage]
            return int(total * share) if self.variant == "repo" else kept_count(share, total)
        final = kept_count(self.keep, total, steps)
        if stage == stages - 1 or total == 0:
            return final
        fraction = self.keep if isinstance(self.keep, float) else final / total
        share = fraction ** ((stage + 1) / stages)
        if self.variant == "repo":
            return max(final, int(total * share))
        return max(final, kept_count(float(share), total))
