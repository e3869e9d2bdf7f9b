"""Listens to decoder layers for methods that read what they compute; outputs do not change by a bit."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmtoken.engine import attention
from mmtoken.engine.cache import logical_layer
from mmtoken.engine.compat import CACHE, cache_in
from mmtoken.engine.prefill import Prefill
from mmtoken.engine.recorder import Recorder
from mmtoken.engine.states import LayerStates

if TYPE_CHECKING:
    from mmtoken.engine.session import Session

_ATTENTION_NEEDS = {"text_attention", "next_attention", "decoder_states", "history"}


class Listening:
    """What a compressor reads from the layers of one decoder.

    Under sdpa the layers that are read are tapped. Eager attention cannot be listened to, so such layers are asked for
    their queries and keys once more, right before they run.

    Attributes:
        read: layers whose attention or states are read, or recorded while decoding.
    """

    def __init__(self, session: Session, decoder: Any) -> None:
        self.session = session
        self.decoder = decoder
        self.compressor = session.compressor
        self.thread = session.thread
        depth = len(decoder.layers)
        self.scored = self.compressor.score_layers(depth)
        self.watched = self.compressor.watched_layers(depth)
        self.recording = self.compressor.recording(depth)
        recorded = () if self.recording is None else self.recording.layers
        self.read = tuple(sorted({*self.scored, *recorded}))
        self.tapped: dict[int, int] = {}

    def install(self, undo: ExitStack) -> None:
        """Set everything; `undo` takes it away."""
        for number in self.watched:
            layer = self.decoder.layers[number]
            for name, part in (("attention", layer.self_attn), ("mlp", layer.mlp)):
                note = functools.partial(self._note_transition, number, name)
                undo.callback(part.register_forward_hook(note, with_kwargs=True).remove)
        if not _ATTENTION_NEEDS & self.compressor.needs:
            return
        attention.register()
        if self.read and self.decoder.config._attn_implementation != "eager":
            attention.tap(self.decoder, undo)
            self.tapped = {id(self.decoder.layers[number].self_attn): number for number in self.read}

    def begin(self, call: Prefill) -> None:
        """The decoder is about to run on a prompt."""
        recorder = self.recorder()
        if recorder is not None:
            recorder.begin(call)
        if self.tapped:
            attention.listen(functools.partial(self._note_states, call))

    def begin_step(self, cache: Any) -> None:
        """The decoder is about to run on generated tokens."""
        if self.tapped and self.recording is not None:
            attention.listen(functools.partial(self._note_step, cache))

    def enter_layer(self, call: Prefill, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """A layer is about to run on a prompt."""
        if number not in self.read:
            return
        call.tables[number] = kwargs.get("position_embeddings")
        if not self.tapped:
            self._read(call, self.probe(call, number, hidden, kwargs), number)

    def recorder(self) -> Recorder | None:
        """What this thread has recorded of generated tokens; None for methods that do not ask for it."""
        if self.recording is None:
            return None
        if self.thread.recorder is None:
            self.thread.recorder = Recorder(self.recording)
        return self.thread.recorder

    def past_calls(self) -> list[Tensor]:
        """float32[I, N] of each recorded call, oldest first."""
        recorder = self.recorder()
        return [] if recorder is None else recorder.calls

    def _note_states(
        self,
        call: Prefill,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
    ) -> bool:
        """Listener: keep what the layers that are read computed."""
        number = self.tapped.get(id(module))
        if number is not None:
            stored = logical_layer(call.cache, number)
            past = 0 if stored is None else stored.stored(before=query.shape[2])
            states = LayerStates(
                query.detach(), key.detach(), value.detach(), mask, scaling, past, call.cut, call.tables.get(number)
            )
            self._read(call, states, number)
        return False

    def _read(self, call: Prefill, states: LayerStates, number: int) -> None:
        started = self.session.clock()
        if number in self.scored:
            call.states[number] = states
        if self.recording is not None and number in self.recording.layers:
            recorder = self.recorder()
            assert recorder is not None
            recorder.note_prompt(number, call, states)
        assert self.thread.report is not None
        self.thread.report.listening_seconds += self.session.clock() - started

    def probe(
        self, call: Prefill, number: int, hidden: Tensor, kwargs: dict[str, Any], *, values: bool = True
    ) -> LayerStates:
        """States of a layer that has not run yet; `values` False leaves the values out."""
        call.tables[number] = kwargs.get("position_embeddings")
        found: list[LayerStates] = []
        stored = logical_layer(call.cache, number)

        def listener(
            _: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
        ) -> bool:
            past = 0
            if stored is not None and stored.stored():
                past = stored.stored()
                key, value = (torch.cat(pair, 2) for pair in zip(stored.held(), (key, value), strict=True))
            found.append(LayerStates(query, key, value, mask, scaling, past, call.cut, call.tables.get(number)))
            return True

        self._attend(self.decoder.layers[number], hidden, kwargs, listener, values=values)
        return found[0]

    @staticmethod
    def _attend(
        layer: Any, hidden: Tensor, kwargs: dict[str, Any], listener: attention.Listener, *, values: bool = True
    ) -> None:
        """Run a layer's norm and projections for a listener that skips the attention."""
        with torch.no_grad(), attention.listening(listener):
            attention.tapped_copy(layer.self_attn, values=values)(
                hidden_states=layer.input_layernorm(hidden),
                position_embeddings=kwargs.get("position_embeddings"),
                attention_mask=kwargs.get("attention_mask"),
                position_ids=kwargs.get("position_ids"),
                **{CACHE: None},
            )

    def _note_transition(
        self, number: int, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """How much a module of a watched layer turned and stretched each token."""
        call = self.thread.prefill
        if call is None:
            return
        started = self.session.clock()
        before = (args[0] if args else kwargs["hidden_states"]).detach()
        after = (output[0] if isinstance(output, tuple) else output).detach()
        call.transitions[number, name] = (*transition(before, after), call.cut)
        if self.thread.report is not None:
            self.thread.report.listening_seconds += self.session.clock() - started

    def _note_step(
        self,
        cache: Any,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
    ) -> bool:
        """Listener while decoding: what the newest token looks at in the recorded layers."""
        number = self.tapped.get(id(module))
        recorder, stored = self.recorder(), None if number is None else logical_layer(cache, number)
        if number is not None and recorder is not None and stored is not None and number in recorder.recording.layers:
            newest = torch.full((len(query), 1), query.shape[2] - 1, device=query.device)
            past = stored.stored(before=query.shape[2])
            received = attention.attention_of(query, key, mask, scaling, newest, past, mean="queries")
            recorder.note_step(number, received, stored.all_columns(newest=query.shape[2]))
        return False

    def enter_layer_of_step(self, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """While decoding: eager attention cannot be listened to, so ask the layer before it runs."""
        if self.tapped or self.recording is None or number not in self.recording.layers:
            return
        recorder, stored = self.recorder(), logical_layer(cache_in(kwargs), number)
        if recorder is None or stored is None:
            return
        rows: list[Tensor] = []

        def listener(
            _: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
        ) -> bool:
            past = stored.stored()
            key = torch.cat([stored.held()[0], key], 2)
            newest = torch.full((len(query), 1), query.shape[2] - 1, device=query.device)
            rows.append(attention.attention_of(query, key, mask, scaling, newest, past, mean="queries"))
            return True

        self._attend(self.decoder.layers[number], hidden, kwargs, listener, values=False)
        # The layer has not stored the new tokens yet, and nothing is asked about them.
        recorder.note_step(number, rows[0], stored.all_columns())


def transition(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """(|y| / |x|, cos(x, y)), float32[B, n]: how much a module stretched and turned tokens x to y, float[B, n, D].

    Source: the transition of tokens in TransPrune, arXiv 2507.20630.
    """
    before, after = before.float(), after.float()
    lengths = before.norm(dim=-1), after.norm(dim=-1)
    product = (lengths[0] * lengths[1]).clamp(min=torch.finfo(torch.float32).tiny)
    magnitude = lengths[1] / lengths[0].clamp(min=torch.finfo(torch.float32).tiny)
    return magnitude, (before * after).sum(-1) / product
