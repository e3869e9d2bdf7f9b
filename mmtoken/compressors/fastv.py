"""FastV: after a few layers the decoder hardly looks at most visual tokens, so drop them there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmtoken.compressors.base import Compressor, Context, Need, Parity, Positions, check_layers, check_whole
from mmtoken.tokens import VisualTokens


@dataclass(frozen=True)
class FastV(Compressor):
    """One cut inside the decoder by the attention of the prompt's last token.

    Score of a visual token: attention that the last prompt token pays to it in layer `layer - 1`, averaged over heads.
    The best `keep` tokens of each item enter layer `layer`; earlier layers see all of them. Kept tokens keep their
    positions, as in the paper and the official code (R = 50 %, K = 2).

    Differs from the paper's text, which averages the attention received from all tokens: as in its code, the last one
    decides. Differs from the official code: several images have a budget each; scores need no square attention matrix.

    Attributes:
        layer: K, the first layer (0-based) that sees the kept tokens only; at least 1.
    """

    keep: int | float = 0.5
    positions: Positions = "keep"
    layer: int = 2

    title: ClassVar[str] = "FastV"
    paper: ClassVar[str] = (
        "Chen et al., An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large "
        "Vision-Language Models, ECCV 2024, arXiv 2403.06764"
    )
    year: ClassVar[int] = 2024
    parity: ClassVar[Parity] = "official code"
    needs: ClassVar[frozenset[Need]] = frozenset({"text_attention"})
    query_agnostic: ClassVar[bool] = False
    causal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("layer", self.layer, lowest=1)

    def cut_layers(self, depth: int) -> tuple[int, ...]:
        check_layers("layer", (self.layer,), depth, lowest=1)
        return (self.layer,)

    def score_layers(self, depth: int) -> tuple[int, ...]:
        return (self.layer - 1,)

    def llm_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        return tokens.top(ctx.text_attention(tokens, layer - 1), self.keep)
