"""Hooks on the decoder: shorten the prompt at its input and between layers, and translate masks while decoding."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmtoken.backbones.base import Modality
from mmtoken.engine import attention, calibration, gather, masks
from mmtoken.engine.cache import SLIDING, LogicalLayer, attention_kinds, logical_layer, make_logical, new_cache
from mmtoken.engine.compat import CACHE, cache_in, check_checkpointing, with_cache
from mmtoken.engine.context import CallContext
from mmtoken.engine.crops import number_crops, split_crops
from mmtoken.engine.encode import Encoded, without_tail
from mmtoken.engine.encoder import encoded_by, forget
from mmtoken.engine.eviction import Eviction
from mmtoken.engine.flops import DecoderShape
from mmtoken.engine.listening import Listening
from mmtoken.engine.measure import finish_report, start_report
from mmtoken.engine.positions import renumber, rotary_tables
from mmtoken.engine.prefill import Cut, Items, Prefill, check_placeholders, locate, most_mass
from mmtoken.engine.prompt import placeholders, prompt_of
from mmtoken.errors import InputError, UnsupportedError
from mmtoken.tokens import VisualTokens

if TYPE_CHECKING:
    from mmtoken.engine.session import Session

_PIXELS = ("pixel_values", "pixel_values_videos", "pixel_values_images")
_BEFORE_DECODER = {"frames", "vision_layer", "project", "llm_input"}
_DECODER_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", CACHE)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class DecoderHooks:
    """Sets the hooks that a compressor needs on one decoder, and on the module that splices features into its input.

    `decoder` and what hangs below it are transformers modules reached by attribute, hence typed `Any`.
    """

    def __init__(self, session: Session, decoder: Any) -> None:
        self.session = session
        self.decoder = decoder
        self.backbone = session.backbone
        self.compressor = session.compressor
        self.thread = session.thread
        self.calibrates = session.compressor.calibrates()
        self.hides = session.mode == "mask" or session.compressor.hides()
        depth = len(decoder.layers)
        self.depth = depth
        self.kinds = attention_kinds(decoder.config)
        self.shape = DecoderShape.from_config(decoder.config)
        self.cuts = self.compressor.cut_layers(depth)
        self.listening = Listening(session, decoder)
        self.eviction = Eviction(session, decoder, self._context)
        root = self.backbone.root
        self.separate_root = root is not decoder
        self.signature = inspect.signature(type(root).forward)

    def install(self, undo: ExitStack) -> None:
        """Set everything; `undo` takes it away."""

        def keep(handle: RemovableHandle) -> None:
            undo.callback(handle.remove)

        root, decoder = self.backbone.root, self.decoder
        if decoder.config._attn_implementation == "flex_attention":
            attention.tap(decoder, undo)  # masks are made and cut in the form that sdpa takes
        if self.session.model is not root:
            keep(self.session.model.register_forward_pre_hook(self._model_pre, with_kwargs=True))
            keep(self.session.model.register_forward_hook(self._model_post, always_call=True))
        if self.separate_root:
            keep(root.register_forward_pre_hook(self._root_pre, with_kwargs=True))
            keep(root.register_forward_hook(self._root_post, always_call=True))
        keep(decoder.register_forward_pre_hook(self._decoder_pre, with_kwargs=True))
        keep(decoder.register_forward_hook(self._decoder_post, always_call=True))
        touched = (*self.cuts, *self.listening.read, *((0,) if self.eviction.acts or self.calibrates else ()))
        if touched:
            for number in range(min(touched), self.depth):
                hook = functools.partial(self._layer_pre, number)
                keep(decoder.layers[number].register_forward_pre_hook(hook, with_kwargs=True))
            self._follow_deepstack(undo)
        self.listening.install(undo)
        self.eviction.install(undo)

    def _follow_deepstack(self, undo: ExitStack) -> None:
        """Qwen3-VL adds features between layers; after a cut they must go to the tokens that are left."""
        original = getattr(self.decoder, "_deepstack_process", None)
        if original is None:
            return

        def process(hidden: Tensor, flags: Tensor, embeds: Tensor) -> Tensor:
            call = self.thread.prefill
            if call is not None and call.base is not None and call.cut is not call.base:
                left = torch.zeros_like(call.real).scatter(1, call.cut.index, call.cut.valid_mask())
                left = gather.last(left, call.base.index) & call.base.valid_mask()
                embeds = embeds[left[flags]]
                flags = gather.last(flags, call.base.rank.gather(1, call.cut.index)) & call.cut.valid_mask()
            result: Tensor = original(hidden, flags, embeds)
            return result

        object.__setattr__(self.decoder, "_deepstack_process", process)
        undo.callback(self.decoder.__dict__.pop, "_deepstack_process", None)

    # --- where visual tokens are ------------------------------------------------------------------------------------

    def _model_pre(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """accelerate copies outputs of encoders on their way into a forward, without what they carry."""
        self.thread.carried = encoded_by(kwargs.get("mm_encoder_outputs") or {})

    def _model_post(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.thread.carried = {}

    def _root_pre(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = self.thread
        bound = self.signature.bind_partial(module, *args, **kwargs).arguments
        call = {**bound, **bound.get("kwargs", {})}
        outputs = call.get("mm_encoder_outputs") or {}
        self._clear()
        # Without pixels or features there are no visual tokens, even if a generated id equals the placeholder's.
        if not outputs and all(call.get(name) is None for name in _PIXELS):
            return
        state.encoded = encoded_by(outputs, state.made, state.carried)
        state.input_ids = ids = call.get("input_ids")
        state.visual = placeholders(self.session, ids, call.get("inputs_embeds"))
        for modality in self.backbone.modalities:
            if modality in state.encoded:
                check_placeholders(state.visual[modality], state.encoded[modality])

    def _root_post(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._clear()

    def _clear(self) -> None:
        state = self.thread
        state.visual = state.encoded = state.input_ids = state.prefill = None
        state.decode_masks = state.decode_positions = None
        attention.listen(None)

    def _visual_masks(self, rows: int, length: int, past: int) -> Mapping[str, Tensor] | None:
        """bool[B, L] per modality for this decoder call, None if it holds no visual tokens."""
        found: Mapping[str, Tensor] | None = self.thread.visual
        given = self.session.visual
        if found is None and given is not None and past == 0:
            if given.shape[1] != length or rows % given.shape[0]:
                raise InputError(
                    f"visual has shape {tuple(given.shape)} but the prompt is {rows} rows of {length} tokens; give one "
                    "flag per token."
                )
            found = {"marked": given.repeat_interleave(rows // given.shape[0], 0)}
        return found if found is not None and any(bool(mask.any()) for mask in found.values()) else None

    def _decoder_pre(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if self.thread.aside:
            return None
        # Hooks do not run after a KeyboardInterrupt, so what an aborted call left is taken away here.
        self.thread.prefill = self.thread.decode_masks = self.thread.decode_positions = None
        attention.listen(None)
        kwargs = {**dict(zip(_DECODER_ARGUMENTS, args, strict=False)), **kwargs}
        ids = kwargs.get("input_ids")
        rows, length = (ids if ids is not None else kwargs["inputs_embeds"]).shape[:2]
        cache = cache_in(kwargs)
        past = int(cache.get_seq_length()) if cache is not None else 0
        visual = self._visual_masks(rows, length, past)
        if visual is None:
            return self._decode(kwargs, cache, past)
        if ids is not None:
            self.thread.input_ids = ids
            kwargs = {**kwargs, "input_ids": None, "inputs_embeds": self.decoder.get_input_embeddings()(ids)}
        return (), self._compress_prompt(kwargs, visual, past)

    # --- prefill ----------------------------------------------------------------------------------------------------

    def _compress_prompt(self, kwargs: dict[str, Any], visual: Mapping[str, Tensor], past: int) -> dict[str, Any]:
        """The decoder's arguments for the shortened prompt."""
        state = self.thread
        embeds = kwargs["inputs_embeds"]
        rows, length = embeds.shape[:2]
        cache = self._logical_cache(kwargs)
        encoded = state.encoded or {}
        items = self._items(visual, encoded, state.input_ids)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = (torch.arange(length, device=embeds.device) + past)[None]
        given = kwargs.get("attention_mask")
        everything = torch.ones(rows, length, dtype=torch.bool, device=embeds.device)
        call = Prefill(
            items=items,
            length=length,
            past=past,
            real=masks.real_tokens(given, everything, past),
            masks=masks.dense_masks(self.decoder, self.kinds, embeds, given, cache, positions, past),
            embeds=embeds,
            position_ids=positions,
            cut=Cut.of(0, everything),
            tokens=_prompt_tokens(items, embeds),
            dropped=~everything,
            cache=cache,
            input_ids=state.input_ids,
            queries=self.backbone.action_queries,
        )
        state.prefill = call
        call.prompt = prompt_of(self.session, call)
        start_report(self.session, call, self.shape, encoded)
        call.embeds, keep = self._decide(call)
        call.entered = call.tokens.counts()
        if self.calibrates:
            calibration.note_sizes(call)
        if self.thread.report is not None:
            self.thread.report.entered = call.tokens.kept()
        call.cut = call.base = Cut.of(0, keep, hides=self.hides)
        self.listening.begin(call)
        call.started = self.session.clock()
        return {**with_cache(kwargs, cache), **self._shortened(kwargs, call, call.embeds, keep)}

    def _items(self, visual: Mapping[str, Tensor], encoded: Mapping[str, Encoded], ids: Tensor | None) -> Items:
        """The items of a prompt, as the session counts them."""
        items = locate(visual, encoded)
        number_crops(items, self.backbone, ids)
        return split_crops(items) if self.session.per == "crop" else items

    def _logical_cache(self, kwargs: dict[str, Any]) -> Any:
        cache = cache_in(kwargs)
        use_cache = kwargs.get("use_cache")
        use_cache = self.decoder.config.use_cache if use_cache is None else use_cache
        checkpointing = self.decoder.training and getattr(self.decoder, "gradient_checkpointing", False)
        if checkpointing and self.cuts:
            check_checkpointing(self.decoder.layers[0], "decoder layers")
        if cache is None and use_cache and not checkpointing:
            # The decoder would create it inside; it must have logical layers before masks are made.
            cache = new_cache(self.decoder.config)
        if cache is not None:
            make_logical(cache)
        self.eviction.check_cache(cache)
        return cache

    def _decide(self, call: Prefill) -> tuple[Tensor, Tensor]:
        """Let the compressor act on the prompt: (embeds with merged features float[B, L, D], bool[B, L] left)."""
        if not self.compressor.sites & _BEFORE_DECODER:
            return call.embeds, ~call.dropped
        tokens = self._before_decoder(call)
        keep = call.apply(tokens)
        merged = self.compressor.merges and bool(self.compressor.sites & {"llm_input", "project"})
        return call.write(tokens, call.embeds) if merged else call.embeds, keep

    def _before_decoder(self, call: Prefill, *, streaming: bool = False) -> VisualTokens:
        """What the compressor lets into the decoder."""
        tokens = self._select_encoded(call)
        if "llm_input" in self.compressor.sites:
            context = self._context(call, call.embeds)
            context.streaming = streaming
            tokens = self.session.run_site(
                "llm_input", None, tokens, context, lambda t: self.compressor.llm_input(t, context)
            )
        return tokens

    def step_tokens(
        self, output: Any, features: Tensor, tail: int, memory: dict[str, Any]
    ) -> tuple[VisualTokens, VisualTokens]:
        """One temporal step of a stream: its tokens as encoded, and those that enter the decoder.

        Args:
            output: what the video encoder returned for this step alone, while the session was attached.
            features: float[n, D], the step's tokens in it.
            tail: tokens at its end that come once per video and belong to no step (a newline).
            memory: what the compressor remembers from step to step.
        """
        record = without_tail(encoded_by({"video": output})["video"], tail)
        forget(output)
        embeds = features[None]
        everything = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        items = locate({"video": everything}, {"video": record})
        call = Prefill(
            items=items,
            length=embeds.shape[1],
            past=0,
            real=everything,
            masks=[None] * self.depth,
            embeds=embeds,
            position_ids=torch.arange(embeds.shape[1], device=embeds.device)[None],
            cut=Cut.of(0, everything),
            tokens=_prompt_tokens(items, embeds),
            dropped=~everything,
            memory=memory,
        )
        before = call.tokens
        tokens = self._before_decoder(call, streaming=True)
        self.session.take_report()
        return before, tokens

    def _context(self, call: Prefill, hidden: Tensor, probe: Any = None) -> CallContext:
        return CallContext(call, self.decoder, hidden, self.listening.past_calls, probe)

    def _select_encoded(self, call: Prefill) -> VisualTokens:
        """Apply what was decided before the tower, inside it or around the projector."""
        tokens, items = call.tokens, call.items
        acted = self.compressor.sites & {"vision_layer", "project", "frames"}
        if not acted:
            return tokens
        if "project" in acted and not self.backbone.tokenwise_projector:
            tower = self.backbone.tower()
            assert tower is not None
            context = self._context(call, call.embeds)
            context.depth, context.blocks = tower.feature_block + 1, len(tower.blocks)
            if items.mass is not None:
                tokens = most_mass(tokens, items.mass, self.compressor.vision_keep())
            return self.session.run_site(
                "project", None, tokens, context, lambda t: self.compressor.project(t, lambda already: already, context)
            )
        if items.mass is None:
            if acted == {"frames"}:  # images have no frames to leave out
                return tokens
            raise UnsupportedError(
                "These visual tokens were encoded outside the attached model, where the compressor could not act; pass "
                "pixels while it is attached."
            )
        if items.size is not None:
            tokens = tokens.replace(size=items.size)
        if acted == {"frames"}:
            left = tokens.where((items.mass > 0) | tokens.protected)
        else:
            left = most_mass(tokens, items.mass, self.compressor.encoder_keep())
        if "frames" not in acted:
            return left
        return left.where(items.mass.gather(1, left.source) >= 0)

    def plan(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor,
        embeds: Tensor,
        visual: Mapping[str, Tensor],
        outputs: Mapping[Modality, Any],
    ) -> tuple[Prefill, Tensor, Tensor]:
        """What is left of a prompt, without running the decoder.

        Args:
            input_ids: int[B, L].
            attention_mask: int[B, L] or None.
            positions: position ids of the whole prompt.
            embeds: float[B, L, D], visual features in place.
            visual: bool[B, L] per modality.
            outputs: encoder outputs made while this session was attached.

        Returns:
            (call state, embeds with merged features, bool[B, L] of the positions that are left).
        """
        encoded = encoded_by(outputs)
        for output in outputs.values():
            forget(output)
        items = self._items(visual, encoded, input_ids)
        everything = torch.ones_like(input_ids, dtype=torch.bool)
        call = Prefill(
            items=items,
            length=input_ids.shape[1],
            past=0,
            real=masks.real_tokens(attention_mask, everything, 0),
            masks=[None] * self.depth,
            embeds=embeds,
            position_ids=positions,
            cut=Cut.of(0, everything),
            tokens=_prompt_tokens(items, embeds),
            dropped=~everything,
            input_ids=input_ids,
            queries=self.backbone.action_queries,
        )
        call.prompt = prompt_of(self.session, call)
        embeds, keep = self._decide(call)
        self.session.take_report()
        return call, embeds, keep

    def _shortened(self, kwargs: dict[str, Any], call: Prefill, embeds: Tensor, keep: Tensor) -> dict[str, Any]:
        cut = call.cut
        changed: dict[str, Any] = {"inputs_embeds": gather.rows(embeds, cut.index)}
        positions = call.position_ids
        if self.compressor.positions == "renumber":
            positions, cut.shift = renumber(positions, call.dropped, call.items.spans())
        changed["position_ids"] = gather.last(positions, cut.index)
        changed["attention_mask"] = masks.like(
            kwargs.get("attention_mask"),
            self.kinds,
            lambda number: masks.prefill_mask(self.decoder, call, cut, number, changed["inputs_embeds"]),
        )
        flags = kwargs.get("visual_pos_masks")
        if flags is not None:
            changed["visual_pos_masks"] = gather.last(flags, cut.index) & cut.valid_mask()
            changed["deepstack_visual_embeds"] = [layer[keep[flags]] for layer in kwargs["deepstack_visual_embeds"]]
        return changed

    def _layer_pre(
        self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        call = self.thread.prefill
        hidden = args[0] if args else kwargs["hidden_states"]
        if call is None:
            changed = self._decode_layer(number, args, kwargs)
            if self.calibrates:
                changed = self._weigh_step(number, hidden, *(changed or (args, kwargs)))
            self.listening.enter_layer_of_step(number, hidden, kwargs if changed is None else changed[1])
            return changed
        given = kwargs
        if call.cut is not call.base or self._stores_otherwise(call, number):
            kwargs = self._cut_arguments(call, number, given, hidden)
        if number in self.cuts:
            hidden = self._cut_here(call, number, hidden, kwargs)
            kwargs = self._cut_arguments(call, number, given, hidden)
        kwargs = self.eviction.hide_earlier(call, number, kwargs)
        kwargs = calibration.enter_layer(self.decoder, call, number, kwargs) if self.calibrates else kwargs
        call.layer_cut[number] = call.cut
        self.listening.enter_layer(call, number, hidden, kwargs)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _stores_otherwise(self, call: Prefill, number: int) -> bool:
        """Whether earlier calls left a layer other entries than the first of its kind, whose mask the decoder made."""
        first = logical_layer(call.cache, self.kinds.index(self.kinds[number]))
        stored = logical_layer(call.cache, number)
        return first is not None and stored is not None and first.group != stored.group

    def _cut_here(self, call: Prefill, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Let the compressor act on what enters a layer; the shortened hidden states."""
        probe = functools.partial(self.listening.probe, call, number, hidden, kwargs, values=False)
        context = self._context(call, hidden, probe)
        tokens = call.tokens.replace(features=call.hidden(call.tokens, hidden))
        tokens = self.session.run_site(
            "llm_layer", number, tokens, context, lambda t: self.compressor.llm_layer(t, number, context)
        )
        keep = call.apply(tokens)
        if self.calibrates:
            calibration.note_sizes(call)
        if self.compressor.merges:
            hidden = call.write(tokens, hidden)
        before, call.cut = call.cut, Cut.of(call.cut.group + 1, keep, hides=self.hides)
        if self.compressor.positions == "renumber":
            moved, call.cut.shift = renumber(call.position_ids, call.dropped, call.items.spans())
            call.cut.position_ids = gather.last(moved, call.cut.index)
        return gather.rows(hidden, before.rank.gather(1, call.cut.index))

    def _cut_arguments(self, call: Prefill, number: int, given: dict[str, Any], hidden: Tensor) -> dict[str, Any]:
        """A layer's other arguments after a cut; layers that are given the same ones share the result."""
        ids, tables = given.get("position_ids"), given.get("position_embeddings")
        values = (given.get("attention_mask"), ids, tables, self.kinds[number])
        stored = logical_layer(call.cache, number)
        key = (*map(id, values), 0 if stored is None else stored.group)
        memo = call.cut.memo
        if key not in memo:
            # Holding the values keeps their ids from being used again.
            memo[key] = (values, self._shorten_arguments(call, number, ids, tables, hidden))
        return {**given, **memo[key][1]}

    def _shorten_arguments(self, call: Prefill, number: int, ids: Any, tables: Any, hidden: Tensor) -> dict[str, Any]:
        cut = call.cut
        assert call.base is not None
        relative = call.base.rank.gather(1, cut.index)
        mask = masks.prefill_mask(self.decoder, call, cut, number, hidden)
        # Layers, unlike the decoder, take no two-dimensional mask.
        changed: dict[str, Any] = {"attention_mask": mask if mask is not None and mask.ndim == 4 else None}
        moved = cut.position_ids
        if ids is not None and moved is None:
            changed["position_ids"] = gather.last(ids, relative)
        elif ids is not None and moved is not None:
            # Of several axes layers get the text's.
            changed["position_ids"] = moved[0] if moved.ndim > ids.ndim else moved
        if tables is not None and moved is None:
            changed["position_embeddings"] = tuple(gather.rows(table, relative) for table in tables)
        elif tables is not None and moved is not None:
            axes = moved[-3:] if moved.ndim == 3 else moved
            changed["position_embeddings"] = rotary_tables(self.decoder, hidden, axes, self.kinds[number])
        return changed

    def _decoder_post(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.thread.aside:
            return None
        call = self.thread.prefill
        attention.listen(None)
        self.thread.prefill = None
        if call is None or output is None:  # no output: the decoder raised
            self._clear()
            return None
        assert call.base is not None
        cuts = [call.layer_cut.get(number, call.base) for number in range(self.depth)]
        for number, cut in enumerate(cuts):
            stored = logical_layer(call.cache, number)
            if stored is not None and number not in call.recorded:
                stored.record(cut.index, cut.valid, call.length, cut.group, cut.shift)
                calibration.record(call, number, stored)
        finish_report(self.session, call, cuts)
        if not self.separate_root:
            self._clear()
        hidden = output[0]
        if hidden.shape[1] == call.length and call.cut.valid is None:
            return None
        return _with_hidden(output, gather.rows(hidden, call.forward_fill()))

    # --- decoding ---------------------------------------------------------------------------------------------------

    def _decode(self, kwargs: dict[str, Any], cache: Any, past: int) -> Arguments | None:
        """A call without visual tokens: if the cache is compressed, translate masks and positions."""
        first = logical_layer(cache, 0)
        if first is None or past == 0:
            return None
        state, decoder = self.thread, self.decoder
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        source = ids if embeds is None else embeds
        assert source is not None
        length = source.shape[1]
        changed = dict(kwargs)
        if any(layer.shift is not None for layer in cache.layers if isinstance(layer, LogicalLayer)):
            positions = kwargs.get("position_ids")
            if positions is None:
                positions = (torch.arange(length, device=source.device) + past)[None]
            state.decode_positions = positions
            if first.shift is not None:
                changed["position_ids"] = positions - first.shift[:, None]
        given = kwargs.get("attention_mask")
        dense: list[Tensor | None] = [None] * self.depth
        # Only sdpa does without a mask, and only for a single query and without a window; any other mask would be made
        # in logical columns.
        needed = length > 1 or given is not None or decoder.config._attn_implementation == "eager"
        if needed or SLIDING in self.kinds:
            if embeds is None:
                embeds = torch.empty(*source.shape, 0, dtype=decoder.dtype, device=source.device)
            dense = masks.dense_masks(decoder, self.kinds, embeds, given, cache, None, past)
        state.decode_masks = dense
        self.listening.begin_step(cache)

        def translated(number: int) -> Tensor | None:
            stored = logical_layer(cache, number)
            return dense[number] if stored is None else masks.decode_mask(decoder, stored, dense[number], length)

        changed["attention_mask"] = masks.like(given, self.kinds, translated)
        return (), changed

    def _decode_layer(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """The same for a layer behind a cut, which stores fewer entries than the first one of its kind."""
        stored = logical_layer(cache_in(kwargs), number)
        if stored is None or not stored.group:
            return None
        state = self.thread
        mask = None if state.decode_masks is None else state.decode_masks[number]
        first = logical_layer(cache_in(kwargs), self.kinds.index(self.kinds[number]))
        same = first is not None and not first.ragged and first.hidden is None
        if mask is None and not stored.ragged and stored.shift is None and stored.hidden is None and same:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        changed = dict(kwargs)
        changed["attention_mask"] = masks.decode_mask(self.decoder, stored, mask, hidden.shape[1])
        if stored.shift is not None and state.decode_positions is not None:
            positions = state.decode_positions - stored.shift[:, None]
            axes = positions[-3:] if positions.ndim == 3 else positions
            changed["position_embeddings"] = rotary_tables(self.decoder, hidden, axes, self.kinds[number])
        return args, changed

    def _weigh_step(self, number: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        stored = logical_layer(cache_in(kwargs), number)
        if stored is None or stored.weight is None:
            return args, kwargs
        given = kwargs.get("attention_mask")
        mask = calibration.decode_mask(self.decoder, stored, given, hidden.shape[1], hidden.dtype)
        return args, {**kwargs, "attention_mask": mask}


def _prompt_tokens(items: Items, embeds: Tensor) -> VisualTokens:
    features = embeds[items.row_index[:, None], items.places]
    tokens = VisualTokens.from_features(features, valid=items.valid, protected=items.protected, grid=items.grids)
    return (
        tokens if items.crops is None else tokens.replace(item=torch.where(items.crops > 0, items.crops, tokens.item))
    )


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    output["last_hidden_state"] = hidden
    return output
