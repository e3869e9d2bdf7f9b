"""Page rank over attention graphs: tokens vote for what they attend to, with the weight that they have themselves."""

from __future__ import annotations

from torch import Tensor

from mmtoken.errors import InputError
from mmtoken.kernels.dispatch import Impl, choose
from mmtoken.kernels.pagerank import reference

NAME = "pagerank"


def pagerank(
    query: Tensor,
    key: Tensor,
    seen: Tensor,
    start: Tensor,
    rounds: int,
    *,
    tolerance: float = 0.0,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Weighted page rank: s <- A^T s in every head, A = softmax(scale * q k^T) among the tokens seen.

    Memory is linear in n: of attention no more than a fixed number of entries is held at a time. Scores have no
    gradient.

    Args:
        query, key: float[B, H, n, d]; those of tokens seen finite. Products are added up in float32.
        seen: bool[B, n], the tokens of the graph.
        start: float[B, n], first scores of every head, none below 0, and 0 for tokens that are not seen.
        rounds: most rounds.
        tolerance: an item stands still once its scores change by less than this, mean over tokens seen and heads.
        scale: factor on the dot products; None: d ** -0.5.
        impl: see `mmtoken.kernels.dispatch`.

    Returns:
        float32[B, H, n] with the sum of `start` over the tokens seen; 0 for the others.

    Raises:
        InputError: shapes do not fit, or `rounds` is negative.

    Source: Wang et al., Zero-TPrune, CVPR 2024, arXiv 2305.17328, section 3.2.
    """
    if query.ndim != 4 or query.shape != key.shape:
        raise InputError(
            f"query {list(query.shape)}, key {list(key.shape)}: both must be [items, heads, tokens, width], alike."
        )
    batch, _, length, width = query.shape
    for name, value in (("seen", seen), ("start", start)):
        if tuple(value.shape) != (batch, length):
            raise InputError(f"{name} {list(value.shape)} must be [items, tokens] = [{batch}, {length}].")
    if rounds < 0:
        raise InputError(f"rounds={rounds} is negative; give the most rounds.")
    scale = width**-0.5 if scale is None else float(scale)
    arguments = (query.detach(), key.detach(), seen, start.detach(), rounds, scale, float(tolerance))
    if choose(NAME, query, key, seen, start, impl=impl) == "torch":
        return reference.pagerank(*arguments)
    from mmtoken.kernels.pagerank import triton

    scores: Tensor = triton.operator(*arguments)
    return scores
