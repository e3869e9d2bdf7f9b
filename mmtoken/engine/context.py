"""What methods at and inside the decoder may ask of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mmtoken.compressors.base import Context, Rows, States, TextTokens, Transition
from mmtoken.engine import gather
from mmtoken.engine.encode import bit_hash
from mmtoken.engine.prefill import Prefill
from mmtoken.engine.states import LayerStates, text_places
from mmtoken.errors import InputError, UnsupportedError
from mmtoken.tokens import VisualTokens


class CallContext(Context):
    """The context of sites at and inside the decoder.

    Args:
        call: the prefill.
        decoder: the text model.
        hidden: float[B, n, D], the current sequence at the site.
        past: recorded attention of earlier calls, see `Context.history`.
        probe: gives the states of the layer that is about to run.
    """

    def __init__(
        self,
        call: Prefill,
        decoder: Any,
        hidden: Tensor,
        past: Callable[[], list[Tensor]],
        probe: Callable[[], LayerStates] | None = None,
    ) -> None:
        self.call = call
        self.depth = len(decoder.layers)
        eligible = call.items.valid & ~call.items.protected
        self.encoded_counts = [int(n) for n in eligible.sum(-1).tolist()]
        self.original_counts = call.entered or self.encoded_counts
        self.steps = list(call.tokens.steps)
        self.memory = call.memory
        self.cropped = call.items.cropped or None
        self._decoder = decoder
        self._hidden = hidden
        self._past = past
        self._probe = probe

    # --- what the tower left behind -----------------------------------------------------------------------------------

    def _tower_fact(
        self,
        name: Literal["attention", "keys", "features"],
        tokens: VisualTokens,
        block: int | None,
        joint: bool = False,
    ) -> Tensor:
        if self.call.items.tower is None:
            raise UnsupportedError(
                f"tower_{name} is not known for these visual tokens: they were encoded outside the attached model, or "
                "this model has no tower. Pass pixels, or use a method that reads features only."
            )
        return gather.rows(self.call.items.tower(name, block, joint), tokens.source)

    def tower_attention(self, tokens: VisualTokens, block: int | None = None, *, joint: bool = False) -> Tensor:
        self.scores = self._tower_fact("attention", tokens, block, joint)[..., 0]
        return self.scores

    def tower_keys(self, tokens: VisualTokens, block: int | None = None, *, joint: bool = False) -> Tensor:
        return self._tower_fact("keys", tokens, block, joint)

    def tower_features(self, tokens: VisualTokens, blocks: Sequence[int]) -> Tensor:
        return torch.cat([self._tower_fact("features", tokens, block) for block in blocks], -1)

    def prompt_embedding(self, tokens: VisualTokens) -> Tensor:
        mean: Tensor = self._prompt("prompt_embedding").mean(self.call.items.row_index)
        return mean

    def question_state(self, tokens: VisualTokens) -> Tensor:
        state: Tensor = self._prompt("question_state").state(self.call.items.row_index)
        return state

    def prompt_ids(self, tokens: VisualTokens) -> list[Tensor]:
        ids: list[Tensor] = self._prompt("prompt_ids").ids_of(self.call.items.row_index)
        return ids

    def _prompt(self, name: str) -> Any:
        if self.call.prompt is None:
            raise self._missing(name)
        return self.call.prompt

    def unpooled(self, tokens: VisualTokens) -> list[Tensor | None]:
        items = self.call.items
        places = torch.arange(items.places.shape[1], device=items.places.device)
        found: list[Tensor | None] = []
        for number, (row, grid) in enumerate(zip(items.rows, items.grids, strict=True)):
            given = None if items.frames is None else items.frames(number, "unpooled")
            if given is None and grid is not None:
                mine = places[items.valid[number] & ~items.protected[number]]
                given = self.call.embeds[row, items.places[number, mine]].view(*grid, -1)
            found.append(given)
        return found

    def pixels(self, tokens: VisualTokens) -> list[Tensor | None]:
        items = self.call.items
        if not items.known or items.frames is None:
            raise UnsupportedError(
                "pixels are not known for these visual tokens: they were encoded outside the attached model, or the "
                "method did not declare them. Pass pixels while it is attached."
            )
        return [items.frames(number, "pixels") for number in range(len(items.rows))]

    def content_seed(self, tokens: VisualTokens) -> list[int]:
        items = self.call.items
        if items.seeds is not None:
            return items.seeds
        # Without pixels: the row's own token ids (or embeddings, which are plain table rows), and which item it is.
        call = self.call
        source = call.input_ids if call.input_ids is not None else call.embeds
        seeds, ordinal, row_before = [], 0, -1
        for row in items.rows:
            ordinal = ordinal + 1 if row == row_before else 0
            row_before = row
            seeds.append((bit_hash(source[row][call.real[row]]) + ordinal * 0x9E3779B9) & 0x7FFFFFFFFFFFFFFF)
        return seeds

    # --- the prompt ---------------------------------------------------------------------------------------------------

    def text(self, tokens: VisualTokens) -> TextTokens:
        call = self.call
        places, valid, after = text_places(call)
        rows = call.items.row_index[:, None]
        now = self._hidden[rows, call.cut.rank[rows, places]]
        return TextTokens(now, call.embeds[rows, places], valid, after)

    def embeddings(self, tokens: VisualTokens) -> Tensor:
        return self.call.embeds[self.call.items.row_index[:, None], self.call.places(tokens)]

    def final_norm(self, features: Tensor) -> Tensor:
        normed: Tensor = self._decoder.norm(features)
        return normed

    # --- layers that have run, and the next one -----------------------------------------------------------------------

    def text_attention(self, tokens: VisualTokens, layer: int, rows: Rows = "last") -> Tensor:
        self.scores = self._attention(tokens, self._states(layer, "text_attention"), rows)
        return self.scores

    def next_attention(self, tokens: VisualTokens, rows: Rows = "last") -> Tensor:
        if self._probe is None:
            raise self._missing("next_attention")
        self.scores = self._attention(tokens, self._probe(), rows)
        return self.scores

    def head_attention(self, tokens: VisualTokens, layer: int, rows: Tensor) -> Tensor:
        call, states = self.call, self._states(layer, "head_attention")
        places, valid, _ = text_places(call)
        chosen = self._chosen(rows, valid)
        most = int(chosen.sum(-1).max()) if len(chosen) else 0
        columns = self._columns(tokens, states)
        shape = (len(tokens), states.query.shape[1], most, columns.shape[1])
        result = torch.zeros(shape, device=columns.device)
        for item, row in enumerate(call.items.rows):
            index = states.cut.rank[row, places[item, chosen[item]]]
            if len(index):
                result[item, :, : len(index)] = states.head_attention(index, row)[:, :, columns[item]]
        return result

    def decoder_states(self, tokens: VisualTokens, layer: int) -> States:
        states = self._states(layer, "decoder_states")
        return states.pick(self.call.items.row_index, self.call.places(tokens))

    def text_states(self, tokens: VisualTokens, layer: int) -> States:
        states = self._states(layer, "text_states")
        return states.pick(self.call.items.row_index, text_places(self.call)[0])

    def _states(self, layer: int, name: str) -> LayerStates:
        if layer not in self.call.states:
            raise UnsupportedError(f"{name} of layer {layer} was not declared by score_layers().")
        return self.call.states[layer]

    def _columns(self, tokens: VisualTokens, states: LayerStates) -> Tensor:
        """int[I, N]: where the keys of tokens are."""
        rows = self.call.items.row_index[:, None]
        return states.past + states.cut.rank[rows, self.call.places(tokens)]

    def _attention(self, tokens: VisualTokens, states: LayerStates, rows: Rows) -> Tensor:
        call, cut = self.call, states.cut
        columns = self._columns(tokens, states)
        if isinstance(rows, str) and rows not in ("last", "after", "text", "all"):
            raise InputError(f"rows={rows!r} is unknown; use 'last', 'after', 'text', 'all' or bool[B, T].")
        if rows == "last":
            received = states.row_attention(call.last_row()[:, None])
        elif rows == "all":
            everything = torch.arange(cut.index.shape[1], device=columns.device).expand_as(cut.index)
            received = states.row_attention(everything, call.said.gather(1, cut.index) & cut.valid_mask())
        else:
            return self._attention_per_item(columns, states, rows)
        return received[call.items.row_index[:, None], columns]

    def _attention_per_item(self, columns: Tensor, states: LayerStates, rows: Rows) -> Tensor:
        """Rows that differ between the items of a prompt."""
        call = self.call
        places, valid, after = text_places(call)
        chosen = valid if rows == "text" else after if rows == "after" else self._chosen(rows, valid)
        received = torch.zeros(columns.shape, device=columns.device)
        for item, row in enumerate(call.items.rows):
            index = states.cut.rank[row, places[item, chosen[item]]]
            if not len(index):  # no such text: the prompt's last token stands for it
                index = states.cut.rank[row, call.last_token[row]][None]
            received[item] = states.row_attention(index[None], row=row)[0, columns[item]]
        return received

    @staticmethod
    def _chosen(rows: Rows, valid: Tensor) -> Tensor:
        if not isinstance(rows, Tensor) or rows.dtype != torch.bool or rows.shape != valid.shape:
            found = tuple(rows.shape) if isinstance(rows, Tensor) else repr(rows)
            raise InputError(f"rows is {found}; expected bool{list(valid.shape)}, one flag per token of text().")
        return rows & valid

    def transition(self, tokens: VisualTokens, layer: int, module: Literal["attention", "mlp"]) -> Transition:
        found = self.call.transitions.get((layer, module))
        if found is None:
            raise UnsupportedError(f"transition of layer {layer} was not declared by watched_layers().")
        magnitude, cosine, cut = found
        rows = self.call.items.row_index
        valid = self.call.real.gather(1, cut.index) & cut.valid_mask()
        index = cut.rank[rows[:, None], self.call.places(tokens)]
        return Transition(magnitude[rows], cosine[rows], valid[rows], index)

    def history(self, tokens: VisualTokens) -> Tensor:
        calls = self._past()
        items, length = self.call.items.places.shape
        for call in calls:
            if call.shape != (items, length):
                raise InputError(
                    f"history holds {tuple(call.shape)} (items, tokens) but this prompt has {(items, length)}; call "
                    "session.reset() when an episode begins."
                )
        if not calls:
            return torch.zeros(0, *tokens.source.shape, device=tokens.source.device)
        return torch.stack([call.gather(1, tokens.source) for call in calls])
