"""Four methods that drop visual tokens as plain formulas over one picture and prompt, in float64.

The reference of a comparison with a peer, as `peer_formulas` is for keys in the cache: without a line of the
compressors or of the engine. Each method is written once as published, and once as AngelSlim has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from mmtoken.engine.compat import CACHE
from mmtoken.evaluation.peer_formulas import DENSE, Layer, Reference, rotate


@dataclass(frozen=True)
class Decoder:
    """The Llama inside a LLaVA, layer by layer.

    Args:
        model: an unmodified LlavaForConditionalGeneration.
    """

    model: Any

    @property
    def layers(self) -> Any:
        return self.model.model.language_model.layers

    def norm(self, hidden: Tensor) -> Tensor:
        """float[n, D]: the decoder's last norm."""
        normed: Tensor = self.model.model.language_model.norm(hidden)
        return normed

    def run(
        self, hidden: Tensor, places: Tensor, cache: Any, cut: int = -1, stay: Tensor | None = None
    ) -> list[Tensor]:
        """float[n, D] entering each layer, and leaving the last; fills the cache.

        Args:
            hidden: float[n, D], the tokens of a prompt, or one further token.
            places: int[n], their positions.
            cut: the first layer that sees only the tokens int[K] `stay`.
        """
        states = []
        for number, layer in enumerate(self.layers):
            if number == cut and stay is not None:
                hidden, places = hidden[stay], places[stay]
            states.append(hidden)
            count = len(hidden)
            later = torch.full((count, count), -math.inf).triu(1)[None, None] if count > 1 else None
            turn = self.model.model.language_model.rotary_emb(hidden[None], places[None])
            hidden = layer(
                hidden[None], attention_mask=later, position_embeddings=turn, use_cache=True, **{CACHE: cache}
            )[0]
        return [*states, hidden]

    def attention(self, number: int, hidden: Tensor) -> Layer:
        """Queries and keys of a layer for the float[n, D] that enter it."""
        layer, config = self.layers[number], self.model.config.text_config
        normed, theta = layer.input_layernorm(hidden), float(config.rope_parameters["rope_theta"])

        def heads(projection: Any) -> Tensor:
            split: Tensor = projection(normed).double().unflatten(1, (-1, layer.self_attn.head_dim)).transpose(0, 1)
            return split

        queries, keys, values = (heads(getattr(layer.self_attn, name)) for name in ("q_proj", "k_proj", "v_proj"))
        places = torch.arange(len(hidden))
        return Layer(rotate(keys, places, theta), values, rotate(queries, places, theta), queries, theta)


@dataclass(frozen=True)
class Prompt:
    """One prompt with one picture, before anything is dropped.

    Attributes:
        decoder: to compute states with.
        embeddings: float[n, D], as they enter the decoder.
        visual: int[N], where the visual tokens stand.
        patches: float64[N, C], what the projector reads.
        cls: float64[H, 1 + N], attention of the class token in the block that they come from, itself first.
    """

    decoder: Decoder
    embeddings: Tensor
    visual: Tensor
    patches: Tensor
    cls: Tensor

    @classmethod
    def of(cls, model: Any, ids: Tensor, pixels: Tensor) -> Prompt:
        """From int[n] and float[3, S, S]."""
        inner = model.model
        tower = getattr(inner.vision_tower, "vision_model", inner.vision_tower)
        states = inner.vision_tower(pixels[None], output_hidden_states=True).hidden_states
        block = model.config.vision_config.num_hidden_layers + model.config.vision_feature_layer
        attention = tower.encoder.layers[block].self_attn
        normed = tower.encoder.layers[block].layer_norm1(states[block])[0]
        queries, keys = (
            projection(normed).double().unflatten(1, (attention.num_heads, -1)).transpose(0, 1)
            for projection in (attention.q_proj, attention.k_proj)
        )
        looks = (queries[:, 0, None] @ keys.transpose(1, 2))[:, 0] / math.sqrt(keys.shape[2])
        patches = states[block + 1][0, 1:]
        embeddings = inner.get_input_embeddings()(ids).clone()
        visual = (ids == model.config.image_token_id).nonzero()[:, 0]
        embeddings[visual] = inner.multi_modal_projector(patches)
        return cls(Decoder(model), embeddings, visual, patches.double(), looks.softmax(-1))

    @property
    def projected(self) -> Tensor:
        """float64[N, D]"""
        return self.embeddings[self.visual].double()

    @property
    def text(self) -> list[int]:
        """Where the other tokens stand."""
        seen = set(self.visual.tolist())
        return [place for place in range(len(self.embeddings)) if place not in seen]

    def states(self) -> list[Tensor]:
        """float[n, D] entering each layer, and leaving the last, when all tokens stay."""
        return self.decoder.run(self.embeddings, torch.arange(len(self.embeddings)), DynamicCache())


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1."""
    return torch.nn.functional.normalize(rows, dim=-1)


def first_of(scores: Mapping[int, float], count: int) -> list[int]:
    """The `count` keys of the highest scores, highest first; of equal ones the lower key."""
    return sorted(scores, key=lambda index: (-scores[index], index))[:count]


# ----------------------------------------------------------------------------------------------- published


def divprune(prompt: Prompt, count: int) -> list[int]:
    """The token whose nearest other is farthest, then always the one farthest from all chosen."""
    rows = unit(prompt.projected)
    apart = (1 - rows @ rows.T).tolist()
    everyone = range(len(apart))
    chosen = first_of({i: min(apart[i][j] for j in everyone if j != i) for i in everyone}, 1)
    while len(chosen) < count:
        chosen += first_of({i: min(apart[i][j] for j in chosen) for i in everyone if i not in chosen}, 1)
    return chosen


def vispruner(prompt: Prompt, count: int) -> list[int]:
    """Half of them by attention of the class token; of the others, dealt in its order, look-alikes go eight a time."""
    received = prompt.cls.mean(0)[1:].tolist()
    order = first_of(dict(enumerate(received)), len(received))
    rows = unit(prompt.patches)
    return order[: count // 2] + without_alikes(
        (rows @ rows.T).tolist(), order[count // 2 :], count - count // 2, False
    )


def without_alikes(alike: list[list[float]], rest: list[int], count: int, in_place: bool) -> list[int]:
    """What stays of `rest`: round by round every second token competes by its likeness to those between.

    Args:
        alike: of all pairs.
        in_place: deal the survivors in raster order again, instead of most alike first.
    """
    while len(rest) > count:
        first, second = rest[::2], rest[1::2]
        gone = min(8, len(rest) - count, len(second) if in_place else len(first))
        first = first_of({i: max(alike[i][j] for j in second) for i in first}, len(first))[gone:]
        rest = sorted(first + second) if in_place else first + second
    return rest


def fastv(prompt: Prompt, count: int, layer: int) -> list[int]:
    """What the last token attends to before layer `layer`, the mean of all heads."""
    last = len(prompt.embeddings) - 1
    before = prompt.decoder.attention(layer - 1, prompt.states()[layer - 1])
    row = torch.stack([before.attention(head, last) for head in range(len(before.queries))]).mean(0)
    return first_of(dict(enumerate(row[prompt.visual].tolist())), count)


def dart(prompt: Prompt, count: int, layer: int, visual_pivots: int, text_pivots: int) -> list[int]:
    """Strong keys are pivots; each takes the tokens least like it, by the states under the decoder's last norm."""
    states = prompt.states()
    after = [place for place in prompt.text if place > int(prompt.visual[-1])]
    features = prompt.decoder.norm(states[layer]).double()
    return unlike_pivots(prompt, states[layer - 1], layer - 1, features, after, count, visual_pivots, text_pivots)


def unlike_pivots(
    prompt: Prompt, entering: Tensor, layer: int, features: Tensor, text: list[int], count: int, visual: int, asked: int
) -> list[int]:
    """`visual` tokens with the strongest keys of a layer, and what they and the strongest `asked` of `text` take."""
    keys = prompt.decoder.attention(layer, entering).keys
    strength = [float(keys[:, place].abs().sum()) for place in range(keys.shape[1])]
    places, rows = prompt.visual.tolist(), unit(features)
    chosen = first_of({index: strength[place] for index, place in enumerate(places)}, visual)
    pivots = [places[index] for index in chosen] + first_of({place: strength[place] for place in text}, asked)
    share = math.ceil((count - visual) / len(pivots))
    for pivot in pivots:
        unlike = {i: -float(rows[pivot] @ rows[place]) for i, place in enumerate(places) if i not in chosen}
        chosen += first_of(unlike, min(share, count - len(chosen)))
    return chosen


# ---------------------------------------------------------------------------------------- as AngelSlim has them


def vispruner_angelslim(prompt: Prompt, count: int) -> list[int]:
    """Attention shared among patches only, projected features, and raster order from the first round on."""
    patches = prompt.cls[:, 1:]
    received = (patches / patches.sum(1, keepdim=True)).mean(0).tolist()
    important = first_of(dict(enumerate(received)), round(count / 2))
    rest = [index for index in range(len(received)) if index not in important]
    rows = unit(prompt.projected)
    return important + without_alikes((rows @ rows.T).tolist(), rest, count - len(important), True)


def fastv_angelslim(prompt: Prompt, count: int, layer: int) -> list[int]:
    """Each head's attention is shared among the visual tokens only."""
    last = len(prompt.embeddings) - 1
    before = prompt.decoder.attention(layer - 1, prompt.states()[layer - 1])
    rows = [before.attention(head, last)[prompt.visual] for head in range(len(before.queries))]
    mean = torch.stack([row / row.sum() for row in rows]).mean(0)
    return first_of(dict(enumerate(mean.tolist())), count)


def dart_angelslim(prompt: Prompt, count: int, layer: int, visual_pivots: int, text_pivots: int) -> list[int]:
    """By what the attention of the layer before reads; text in front of the picture may be a pivot too."""
    entering = prompt.states()[layer - 1]
    features = prompt.decoder.layers[layer - 1].input_layernorm(entering).double()
    return unlike_pivots(prompt, entering, layer - 1, features, prompt.text, count, visual_pivots, text_pivots)


class Formula(NamedTuple):
    """How a method chooses visual tokens, and whether positions of the answer count the tokens that are left only."""

    choose: Callable[..., list[int]]
    recounts: bool = False


PUBLISHED: Mapping[str, Formula] = {
    "DivPrune": Formula(divprune),
    "VisPruner": Formula(vispruner),
    "FastV": Formula(fastv),
    "DART": Formula(dart),
}

ANGELSLIM: Mapping[str, Formula] = {
    "DivPrune": Formula(divprune, recounts=True),
    "VisPruner": Formula(vispruner_angelslim, recounts=True),
    "FastV": Formula(fastv_angelslim),
    "DART": Formula(dart_angelslim),
}
"""What its source does; its prompt keeps positions, also where the answer does not go on from them."""


@torch.no_grad()
def visual_reference(
    model: Any,
    ids: Tensor,
    pixels: Tensor,
    name: str,
    settings: Mapping[str, Any],
    keep: float,
    tokens: int,
    formulas: Mapping[str, Formula] = PUBLISHED,
) -> Reference:
    """The formula on one prompt int[n] with the picture float[3, S, S]: int(N * keep) of N visual tokens stay.

    Args:
        model: an unmodified LlavaForConditionalGeneration; its decoder layers are run one by one.
        name: one of the formulas, or `DENSE`.
        settings: of the formula; with a "layer" the tokens go before this one, else before the decoder.

    Returns:
        kept int[1, G, K]: where the visual tokens that stay stood, the same for every head; tokens and logits.
    """
    prompt, count = Prompt.of(model, ids, pixels), len(ids)
    formula = formulas.get(name, Formula(lambda whole, _: list(range(len(whole.visual)))))
    budget = 0 if name == DENSE else max(1, int(len(prompt.visual) * keep))
    chosen = prompt.visual[formula.choose(prompt, budget, **settings)]
    stay = torch.tensor(sorted([*prompt.text, *chosen.tolist()]))
    cache = DynamicCache()
    states = prompt.decoder.run(prompt.embeddings, torch.arange(count), cache, settings.get("layer", 0), stay)
    logits = [model.lm_head(prompt.decoder.norm(states[-1][-1]))]
    start = len(stay) if formula.recounts else count
    for place in range(start, start + tokens - 1):
        row = model.model.get_input_embeddings()(logits[-1].argmax()[None])
        logits.append(model.lm_head(prompt.decoder.norm(prompt.decoder.run(row, torch.tensor([place]), cache)[-1][0])))
    found = torch.stack(logits)
    groups = model.config.text_config.num_key_value_heads
    return Reference(chosen.sort().values.expand(1, groups, -1), found.argmax(-1), found)
