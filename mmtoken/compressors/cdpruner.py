"""CDPruner: a diverse set of tokens, in which those that matter to the question weigh more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmtoken.compressors.base import Compressor, Context, Need, Positions
from mmtoken.errors import MMTokenError
from mmtoken.tokens import VisualTokens, refuse_nan


@dataclass(frozen=True)
class CDPruner(Compressor):
    """Greedy search for the most probable set of a determinantal point process conditioned on the question.

    The kernel of two projected tokens is their cosine similarity times the relevance of both. Each step adds the token
    that enlarges the set's determinant most.

    Relevance needs a space that patches and text share. Models without CLIP's text tower have one where the language
    model reads both: relevance is the cosine between a token as it enters there and the mean embedding of the prompt's
    text, scaled to (0, 1] over the item. `relevance` and `conditional_map` take CLIP's joint space as well, where the
    paper's code flips the sign.

    Differs from the official code: each item is scaled by itself (the code: all tiles of a batch together); where no
    independent token is left, the most relevant ones fill the budget; tokens keep their positions.

    Attributes:
        sign_flip: the least similar tokens count as the most relevant, as with CLIP's patch features.
        theta: weight of relevance against diversity in (0, 1), used as exp(theta / (2 (1 - theta)) * relevance); None:
            relevance itself, as in the official code.
    """

    keep: int | float = 64
    positions: Positions = "keep"
    sign_flip: bool = False
    theta: float | None = None

    title: ClassVar[str] = "CDPruner"
    paper: ClassVar[str] = (
        "Zhang et al., Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs, "
        "NeurIPS 2025, arXiv 2506.10967"
    )
    year: ClassVar[int] = 2025
    needs: ClassVar[frozenset[Need]] = frozenset({"text"})
    query_agnostic: ClassVar[bool] = False
    causal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.sign_flip, bool):
            raise MMTokenError(f"sign_flip={self.sign_flip!r} is no bool; give True or False.")
        if self.theta is not None and (not isinstance(self.theta, float) or not 0 < self.theta < 1):
            raise MMTokenError(f"theta={self.theta!r} is no weight; give a float between 0.0 and 1.0, or None.")

    def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        text = ctx.text(tokens)
        features = tokens.features.detach().float()
        refuse_nan(features - features, tokens.eligible, "features")  # infinities become NaN
        words = text.embeddings.detach().float()
        refuse_nan(words - words, text.valid, "text embeddings")
        mask = tokens.protected.clone()
        for row, budget in enumerate(tokens.budget(self.keep)):
            places = tokens.eligible[row].nonzero()[:, 0]
            question = words[row, text.valid[row]]
            question = question.mean(0, keepdim=True) if len(question) else question
            weights = relevance(features[row, places], question, self.sign_flip)
            if self.theta is not None:
                # One below the largest exponent is the same choice: it scales the whole kernel, and cannot overflow.
                weights = torch.exp(self.theta / (2 * (1 - self.theta)) * (weights - 1))
            mask[row, places[conditional_map(features[row, places], weights, budget)]] = True
        return tokens.where(mask)


def relevance(patches: Tensor, text: Tensor, sign_flip: bool = False) -> Tensor:
    """float32[N]: how much each patch has to do with the text, scaled to (0, 1]; all 1 where they do not differ.

    Args:
        patches: float[N, c] and
        text: float[M, c] in a shared space; cosines are averaged over the M texts.
        sign_flip: low cosines mean relevance (CLIP's patch features).
    """
    cosine = normalize(patches.detach().float(), dim=-1) @ normalize(text.detach().float(), dim=-1).T
    if not cosine.numel():
        return torch.ones(len(patches), device=patches.device)
    raw = -cosine.mean(-1) if sign_flip else cosine.mean(-1)
    low, high = raw.min(), raw.max()
    # Identical rows of a product may differ in their last digits, which would be stretched to the whole range.
    same = high - low <= 1e-6
    return torch.where(
        same, torch.ones_like(raw), (raw - low + 1e-6) / torch.where(same, torch.ones_like(low), high - low)
    )


def conditional_map(features: Tensor, weights: Tensor, count: int) -> Tensor:
    """int[count]: tokens in the order in which a greedy search for the largest determinant picks them.

    The kernel is weights[i] * cos(i, j) * weights[j]. It is never formed: the Cholesky rows of the search are products
    with an orthonormal basis of what has been picked, so that memory grows with N * D only.

    Args:
        features: float[N, D].
        weights: float[N], positive.
        count: tokens to pick, at most N. Where every token depends on the picked ones, the largest weights come next,
            of equal ones the lower index.
    """
    # float64: when the rank is used up, what is left must be told from rounding errors.
    exact = torch.float32 if features.device.type == "mps" else torch.float64
    rest = normalize(features.detach().to(exact), dim=-1) * weights.to(exact)[:, None]
    gain = rest.square().sum(-1)
    floor = 1e-10 if exact == torch.float64 else 1e-6
    left = torch.ones(len(rest), dtype=torch.bool, device=rest.device)
    basis = rest.new_zeros(count, rest.shape[-1])
    picks = torch.zeros(count, dtype=torch.long, device=rest.device)
    for step in range(count):
        independent = left & (gain > floor)
        found = independent.any()
        best = torch.where(
            found, gain.where(independent, -torch.inf), weights.to(exact).where(left, -torch.inf)
        ).argmax()
        picks[step] = best
        left = left.index_fill(0, best, False)
        known = basis[:step]
        direction = rest[best] - (known @ rest[best]) @ known
        direction = direction / gain[best].clamp(min=floor).sqrt() * found
        basis[step] = direction
        gain = gain - (rest @ direction).square()
    return picks
