"""Expected attention: score keys by the attention that tokens to come are expected to pay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmtoken.compressors.base import Parity, Positions, check_whole
from mmtoken.compressors.presses import Press, PromptCache, Scope, over_groups
from mmtoken.errors import InputError, MMTokenError, UnsupportedError


@dataclass(frozen=True)
class ExpectedAttention(Press):
    """Score of a cached entry: expected attention of the next tokens, times the length of its value.

    Queries before the rotary embedding are taken as normally distributed, with the prompt's own mean and covariance,
    and turned by the mean rotation of the next `future` positions. The attention that such a query is expected to pay
    is, up to its normalisation, exp(mean . k + k C k / 2). The first `sinks` tokens are left out of the statistics and
    stay. In a prompt of no more tokens than that, all but the last token are sinks.

    Acts once per layer, after the prefill. Differs from the paper and the official code in the default scope, visual
    tokens only.

    Attributes:
        future: positions that the rotation is averaged over.
        sinks: first tokens of the prompt that stay.
        covariance: whether the covariance counts.
        value_norm: whether the length of the value counts.
        epsilon: added to the expected attention before it is multiplied with that.
        scope: "visual" evicts visual tokens, each item with its own budget; "all" entries of the whole prompt.
        variant: "repo" has the official conventions: scope "all", and int(n * keep) entries.
    """

    keep: int | float = 0.5
    positions: Positions = "keep"
    future: int = 512
    sinks: int = 4
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = 0.0
    scope: Scope = "visual"
    variant: Literal["paper", "repo"] = "paper"

    title: ClassVar[str] = "Expected Attention"
    paper: ClassVar[str] = (
        "Devoto et al., Expected Attention: KV Cache Compression by Estimating Attention from Future Queries "
        "Distribution, 2025, arXiv 2510.00636"
    )
    year: ClassVar[int] = 2025
    parity: ClassVar[Parity] = "official code"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("future", self.future, lowest=1)
        check_whole("sinks", self.sinks, lowest=0)
        for name in ("covariance", "value_norm"):
            if not isinstance(getattr(self, name), bool):
                raise MMTokenError(f"{name}={getattr(self, name)!r} is no bool; give true or false.")
        number = isinstance(self.epsilon, int | float) and not isinstance(self.epsilon, bool)
        if not number or not math.isfinite(self.epsilon) or self.epsilon < 0:
            raise MMTokenError(f"epsilon={self.epsilon!r} is no number of at least 0; give for example 0.0.")

    def score(self, prompt: PromptCache) -> Tensor:
        length = prompt.keys.shape[1]
        sinks = min(self.sinks, length - 1)
        queries = prompt.unrotated.float()
        mean, spread = query_statistics(queries[:, max(0, sinks - (length - queries.shape[1])) :], self.covariance)
        places = torch.arange(prompt.length, prompt.length + self.future, device=queries.device)
        rotation = average_rotation(*prompt.rotary(places))
        if len(rotation) != len(mean[0]):
            raise UnsupportedError(
                f"this decoder rotates {len(rotation)} of {len(mean[0])} features of a head; ExpectedAttention knows "
                "heads that are rotated as a whole."
            )
        return expected_attention_scores(
            mean @ rotation.T,
            None if spread is None else rotation @ spread @ rotation.T,
            prompt.keys,
            prompt.values if self.value_norm else None,
            prompt.scaling,
            sinks,
            self.epsilon,
        )


def query_statistics(queries: Tensor, covariance: bool = True) -> tuple[Tensor, Tensor | None]:
    """(mean float32[H, d], biased covariance float32[H, d, d] or None) of queries float[H, s, d] over tokens."""
    queries = queries.float()
    mean = queries.mean(1)
    if not covariance:
        return mean, None
    centred = queries - mean[:, None]
    return mean, centred.transpose(1, 2) @ centred / queries.shape[1]


def average_rotation(cosine: Tensor, sine: Tensor) -> Tensor:
    """float32[d, d]: the mean over positions of the matrix that rotates a query, from the tables float[p, d] each.

    Features are rotated in pairs: half a head apart where the tables hold the angles of one half twice, neighbours
    where they hold each angle twice in a row (Cohere).
    """
    width = cosine.shape[-1]
    order = torch.arange(width, device=cosine.device)
    halves, neighbours = order.tensor_split(2), (order[::2], order[1::2])
    apart = all(torch.equal(table[:, halves[0]], table[:, halves[1]]) for table in (cosine, sine))
    first, second = halves if apart else neighbours
    swap = torch.zeros(width, width, device=cosine.device)
    swap[second, first] = 1.0
    swap[first, second] = -1.0
    return torch.diag(cosine.float().mean(0)) + sine.float().mean(0)[:, None] * swap


def expected_attention_scores(
    mean: Tensor,
    covariance: Tensor | None,
    keys: Tensor,
    values: Tensor | None,
    scaling: float,
    sinks: int = 0,
    epsilon: float = 0.0,
) -> Tensor:
    """float32[G, n]: expected attention times value length; the first `sinks` entries hold the maximum + 1.

    Args:
        mean: float[H, d] of rotated queries.
        covariance: float[H, d, d] of rotated queries, or None.
        keys: float[G, n, d], rotated.
        values: float[G, n, d], or None to leave their length out.
        scaling: factor on the dot products.
        sinks: entries that are not scored.
        epsilon: added to the expected attention.

    Raises:
        InputError: all entries are sinks.
    """
    groups, length = keys.shape[:2]
    if sinks >= length:
        raise InputError(f"sinks={sinks} leaves none of {length} entries to score; give a longer prompt or fewer.")
    scored = keys[:, sinks:].float().repeat_interleave(len(mean) // groups, 0)
    logits = (scored @ mean[..., None])[..., 0] * scaling
    if covariance is not None:
        logits = logits + (scored @ covariance * scored).sum(-1) * (scaling**2 / 2)
    scores = over_groups(logits.softmax(-1), groups)
    if values is not None:
        scores = (scores + epsilon) * values[:, sinks:].float().norm(dim=-1)
    return torch.cat([(scores.max() + 1).expand(groups, sinks), scores], 1)
