"""FlowCut: cut inside the tower, a little every other block, by how much information flows through each patch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mmtoken.compressors.base import (
    Compressor,
    Context,
    Need,
    Parity,
    Positions,
    TowerStates,
    check_layers,
    check_whole,
)
from mmtoken.errors import MMTokenError
from mmtoken.kernels.attention_rows import attention_rows
from mmtoken.tokens import VisualTokens, kept_count, refuse_nan

Variant = Literal["paper", "repo"]


@dataclass(frozen=True)
class FlowCut(Compressor):
    """Adaptive cuts between tower blocks, down to exactly `keep` tokens before the block that the projector reads.

    Score of a patch in a block: (attention that CLS pays to it + similarity of its value to that of CLS, each divided
    by its sum over the patches) * L1 norm of its head-averaged value. Scores are averaged over blocks, half for the
    past and half for the block that has just run. At every `interval`-th place, counted back from the last one, an
    image of n tokens loses (n - keep) / sqrt(remaining blocks) * (1 - (H / ln n)^2) of them, H the entropy of the
    attention: images whose attention is peaked lose tokens early. The last place cuts to `keep` whatever is left.

    Towers without CLS: the mean query and mean value of the patches stand for it. A token of several patches (2x2
    mergers, pixel shuffle) has the sum of their scores and attention, and leaves as a whole.

    Differs from the paper: the similarity without CLS and whole tokens are our reading. Differs from the official code
    in the default: similarities are scaled by sqrt(d) and taken over patches only, each image has counts of its own
    (the code takes the largest of a batch), and a patch without attention adds nothing to the entropy. The variant
    "repo" has similarities unscaled and with CLS among the candidates, and without CLS none, and 1e-7 in the logarithm.

    Attributes:
        interval: blocks between two places where tokens are dropped.
        history: weight of the past in the running score, in [0, 1).
        variant: "paper" or "repo".
    """

    keep: int | float = 64
    positions: Positions = "keep"
    interval: int = 2
    history: float = 0.5
    variant: Variant = "paper"

    title: ClassVar[str] = "FlowCut"
    paper: ClassVar[str] = (
        "Tong et al., FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models, "
        "NeurIPS 2025, arXiv 2505.19536"
    )
    year: ClassVar[int] = 2025
    parity: ClassVar[Parity] = "official code"
    needs: ClassVar[frozenset[Need]] = frozenset({"tower_states"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("interval", self.interval, lowest=1)
        if isinstance(self.history, bool) or not isinstance(self.history, int | float) or not 0 <= self.history < 1:
            raise MMTokenError(f"history={self.history!r} is no weight of the past; give a number in [0, 1).")
        if self.variant not in ("paper", "repo"):
            raise MMTokenError(f"variant={self.variant!r} is unknown; use 'paper' or 'repo'.")

    def vision_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        states = ctx.tower_states(tokens)
        flow = tower_flow(states, tokens.eligible, self.variant)
        scores = self.remember(flow.scores, tokens, ctx)
        refuse_nan(scores, tokens.eligible, "the flow score")
        ctx.scores = scores
        epsilon = 1e-7 if self.variant == "repo" and not states.prefix_key.shape[2] else 0.0
        entropy = attention_entropy(flow.attention, tokens.eligible, epsilon).tolist()
        remaining = ctx.depth - 1 - layer
        counts = []
        for now, total, mixed in zip(tokens.counts(), ctx.original_counts, entropy, strict=True):
            target = kept_count(self.encoder_keep(), total)
            if remaining % self.interval:
                counts.append(now)
            else:
                counts.append(max(min(now, target), now - removed(now, target, remaining, mixed)))
        return tokens.top(scores, counts)

    def remember(self, scores: Tensor, tokens: VisualTokens, ctx: Context) -> Tensor:
        """float32[B, N]: the running score of the tokens, with this block's in it."""
        past = ctx.memory.get("flow")
        running = scores
        if past is None:
            past = scores.new_zeros(len(tokens), int(tokens.source.max()) + 1)
        else:
            running = self.history * past.gather(1, tokens.source) + (1 - self.history) * scores
        # By original position: who is left changes from block to block. Padding goes to a place of its own.
        width = past.shape[1]
        places = tokens.source.masked_fill(~tokens.eligible, width)
        ctx.memory["flow"] = pad(past, (0, 1)).scatter(1, places, running)[:, :width]
        return running


@dataclass(frozen=True)
class FlowCutHR(FlowCut):
    """FlowCut for high-resolution models: `spread` times the budget leaves the tower, the decoder cuts to the budget.

    Score of a visual token when layer `layer` of the decoder begins, from the layer before it: (softmax over the item's
    tokens of what the last text token's query gives with their keys + the same with values instead of queries and
    keys, both over sqrt(d) and averaged over heads) * L1 norm of the token's head-averaged value. In the tower as
    `FlowCut`.

    Differs from the paper and the official code: each item has its own budget, and several images of a prompt their
    own softmax.

    Attributes:
        layer: the first decoder layer (0-based) that sees `keep` tokens only; at least 1.
        spread: how many times the budget leaves the tower, at least 1.
    """

    layer: int = 2
    spread: float = 2.0

    title: ClassVar[str] = "FlowCut-HR"
    parity: ClassVar[Parity] = "oracle only"
    needs: ClassVar[frozenset[Need]] = frozenset({"tower_states", "decoder_states", "text"})
    query_agnostic: ClassVar[bool] = False
    causal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("layer", self.layer, lowest=1)
        number = isinstance(self.spread, int | float) and not isinstance(self.spread, bool)
        if not number or not 1 <= self.spread < math.inf:
            raise MMTokenError(f"spread={self.spread!r} cannot be; give a number of at least 1.")

    def encoder_keep(self) -> int | float:
        if isinstance(self.keep, int):
            return math.floor(self.keep * self.spread + 0.5)
        return min(1.0, self.keep * self.spread)

    def cut_layers(self, depth: int) -> tuple[int, ...]:
        check_layers("layer", (self.layer,), depth, lowest=1)
        return (self.layer,)

    def score_layers(self, depth: int) -> tuple[int, ...]:
        return (self.layer - 1,)

    def llm_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        text, words = ctx.text(tokens), ctx.text_states(tokens, layer - 1)
        states = ctx.decoder_states(tokens, layer - 1)
        last = (text.valid * torch.arange(text.valid.shape[1], device=text.valid.device)).amax(-1)

        def of_last(values: Tensor) -> Tensor:
            index = last[:, None, None, None].expand(-1, values.shape[1], 1, values.shape[3])
            return values.gather(2, index)[:, :, 0]

        scores = text_flow(of_last(words.query), of_last(words.value), states.key, states.value, tokens.eligible)
        ctx.scores = scores
        counts = [
            kept_count(self.keep, total, steps) for total, steps in zip(ctx.encoded_counts, tokens.steps, strict=True)
        ]
        return tokens.top(scores, counts)


@dataclass(frozen=True)
class Flow:
    """What flows through patches in a tower block.

    Attributes:
        attention: float32[B, N, M], what CLS pays to each patch, mean over heads.
        similarity: float32[B, N, M], softmax of value products with CLS, mean over heads; None where it does not count.
        density: float32[B, N, M], L1 norm of the head-averaged value.
        scores: float32[B, N], of whole tokens.
    """

    attention: Tensor
    similarity: Tensor | None
    density: Tensor
    scores: Tensor


def tower_flow(states: TowerStates, eligible: Tensor, variant: Variant) -> Flow:
    """Attention, similarity and density of the patches in a block.

    Args:
        states: of the block, tokens of M patches.
        eligible: bool[B, N], the tokens that count.
        variant: see `FlowCut`.
    """
    real = eligible[..., None].expand(-1, -1, states.value.shape[3])
    hidden = ~real.flatten(1)[:, None]

    def flat(values: Tensor) -> Tensor:
        return values.detach().float().flatten(2, 3).masked_fill(hidden[..., None], 0.0)

    query, key, value = flat(states.query), flat(states.key), flat(states.value)
    scale = key.shape[-1] ** -0.5
    prefix = states.prefix_key.shape[2]
    # CLS is the first of the prefix; without one the mean over patches stands for it.
    count = real.flatten(1).sum(-1).clamp(min=1)[:, None, None]
    asking = states.prefix_query[:, :, 0].float() if prefix else query.sum(2) / count
    centre = states.prefix_value[:, :, 0].float() if prefix else value.sum(2) / count

    def received(one: Tensor, many: Tensor, first: Tensor | None, factor: float) -> Tensor:
        before = 0 if first is None else first.shape[2]
        every = many if first is None else torch.cat([first.float(), many], 2)
        seen = nn.functional.pad(~hidden, (before, 0), value=True)
        weights = attention_rows(one[:, :, None], every, scale=factor, mask=seen, mean="heads")
        return weights[:, 0, before:].view(real.shape)

    attention = received(asking, key, states.prefix_key if prefix else None, scale)
    similarity = None
    if variant == "paper":
        similarity = received(centre, value, None, scale)
    elif prefix:
        similarity = received(centre, value, states.prefix_value, 1.0)
    density = value.mean(1).abs().sum(-1).view(real.shape)
    return Flow(attention, similarity, density, flow_scores(attention, similarity, density, real).sum(-1))


def flow_scores(attention: Tensor, similarity: Tensor | None, density: Tensor, real: Tensor) -> Tensor:
    """(attention / its sum + similarity / its sum) * density over the patches where bool `real` holds; else 0.

    Without similarities the attention counts as it is: its sum is the same for all patches.
    """

    def share(values: Tensor) -> Tensor:
        values = values.masked_fill(~real, 0.0)
        return values / values.flatten(1).sum(-1).view(-1, *[1] * (values.ndim - 1))

    total = attention if similarity is None else share(attention) + share(similarity)
    scores: Tensor = total * density
    return scores.masked_fill(~real, 0.0)


def attention_entropy(attention: Tensor, eligible: Tensor, epsilon: float = 0.0) -> Tensor:
    """float32[B]: entropy of the attention float[B, N, M] of the eligible tokens over its highest, ln n; 1 for n = 1.

    Args:
        attention: summed over the M patches of a token.
        eligible: bool[B, N].
        epsilon: added in the logarithm; 0: what has no attention adds nothing.
    """
    mass = attention.sum(-1).masked_fill(~eligible, 0.0)
    share = mass / mass.sum(-1, keepdim=True)
    terms: Tensor = share * (share + epsilon).log() if epsilon else torch.special.xlogy(share, share)
    count = eligible.sum(-1)
    highest = count.clamp(min=1).float().log()
    return torch.where(count > 1, -terms.masked_fill(~eligible, 0.0).sum(-1) / highest.clamp(min=1e-9), 1.0)


def removed(now: int, target: int, remaining: int, entropy: float) -> int:
    """How many of `now` tokens leave at a place with `remaining` blocks behind it; may be more than down to `target`.

    Args:
        now, target: tokens now and at the end.
        remaining: blocks between this place and the last one; at 0 all leave that have to.
        entropy: of the attention, over its highest possible value.
    """
    if remaining == 0:
        return max(0, now - target)
    # Python rounds halves to the even number, as the official code does.
    return max(0, round((now - target) / math.sqrt(remaining) * (1 - entropy**2)))


def text_flow(query: Tensor, value: Tensor, keys: Tensor, values: Tensor, eligible: Tensor) -> Tensor:
    """float32[B, N]: score of visual tokens in a decoder layer.

    Args:
        query: float[B, H, d], of the last text token, rotated.
        value: float[B, G, d], of the same.
        keys, values: float[B, G, N, d] of the visual tokens; H / G heads share one.
        eligible: bool[B, N].
    """
    hidden = ~eligible[:, None]
    keys, values = (x.detach().float().masked_fill(hidden[..., None], 0.0) for x in (keys, values))

    def share(one: Tensor, many: Tensor) -> Tensor:
        return attention_rows(one[:, :, None], many, mask=~hidden, mean="heads")[:, 0]

    # Values are alike for heads that share them, so their mean over all heads is that over the shared ones.
    relevance = share(query, keys)
    density = values.mean(1).abs().sum(-1)
    return flow_scores(relevance, share(value, values), density, eligible)
