"""Attaching a compressor to a model: which hooks are set, and that every one of them is taken away again."""

from __future__ import annotations

import functools
import inspect
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from mmtoken.backbones.base import Backbone, Modality
from mmtoken.backbones.registry import adapt
from mmtoken.compressors.base import Compressor
from mmtoken.compressors.registry import resolve
from mmtoken.engine import attention, gather
from mmtoken.engine.cache import LogicalLayer, cache_bytes, logical_layer, make_logical, new_cache
from mmtoken.engine.encode import Encoded, EncoderCall, choose_frames, fill_frames
from mmtoken.engine.flops import DecoderShape
from mmtoken.engine.positions import renumber
from mmtoken.engine.prefill import CallContext, Cut, Items, Prefill, locate, most_mass
from mmtoken.engine.report import Report, SiteReport
from mmtoken.engine.vision import VisionHooks
from mmtoken.errors import InputError, MMTokenError, UnsupportedError
from mmtoken.tokens import VisualTokens

_ATTACHED = "_mmtoken_session"
_PIXELS = ("pixel_values", "pixel_values_videos", "pixel_values_images")
_RECORD = "mmtoken_encoded"


class _Thread(threading.local):
    """State of the call that is running in this thread."""

    encoder: EncoderCall | None = None
    encoded: dict[str, Encoded] | None = None
    visual: dict[str, Tensor] | None = None
    input_ids: Tensor | None = None
    prefill: Prefill | None = None
    decode_mask: Tensor | None = None
    decode_positions: Tensor | None = None
    report: Report | None = None
    started: float = 0.0


def check(model: PreTrainedModel, compressor: Compressor | str | dict[str, Any], *, visual: Tensor | None = None) -> None:
    """Raise the reason if `compressor` cannot be attached to `model`; do nothing otherwise.

    Raises:
        UnsupportedError: with the reason.
    """
    _check(adapt(model), resolve(compressor), visual)


def _check(backbone: Backbone, method: Compressor, visual: Tensor | None) -> None:
    name = type(method).__name__
    decoder = backbone.decoder
    tower_sites = method.sites & {"vision_layer", "project"}
    if backbone.tower() is None:
        if visual is None:
            raise UnsupportedError(
                "visual=None but this model is a bare decoder; mark the visual positions with visual=bool[B, L]."
            )
        blocked = tower_sites | (method.sites & {"frames"})
        if blocked or {"tower_attention", "tower_keys"} & method.needs:
            raise UnsupportedError(f"{name} acts in or reads from a vision tower, and {backbone.name} has none.")
    if decoder is None:
        if method.sites & {"llm_layer", "frames"}:
            raise UnsupportedError(f"{name} acts inside a language model, and {backbone.name} has none.")
        return
    if method.prepare.__func__ is not Compressor.prepare and backbone.dynamic_resolution:  # type: ignore[attr-defined]
        raise UnsupportedError(
            f"{name} works before the processor on {backbone.name}, whose token count follows the image size: use "
            "images = compressor.prepare(images) and run the model as it is."
        )
    depth = len(decoder.layers)
    method.cut_layers(depth)
    method.score_layers(depth)
    implementation = decoder.config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise UnsupportedError(
            f"attn_implementation={implementation!r} is not supported; load the model with 'sdpa' or 'eager'."
        )
    if getattr(decoder.config, "use_sliding_window", False):
        raise UnsupportedError("use_sliding_window=True: caches with sliding windows cannot be compressed.")


class Session(AbstractContextManager["Session"]):
    """A compressor attached to a model. Made by `attach` or `compress`.

    Attributes:
        model, compressor: as handed in.
        reports: one `Report` per prefill (or call of a bare tower), oldest first.
    """

    def __init__(self, model: PreTrainedModel, compressor: Compressor, visual: Tensor | None) -> None:
        self.model = model
        self.compressor = compressor
        self.backbone = adapt(model)
        _check(self.backbone, compressor, visual)
        if _ATTACHED in model.__dict__:
            raise MMTokenError(
                "model already has a compressor attached; detach it first, or combine methods in one compressor."
            )
        if visual is not None and (visual.dtype != torch.bool or visual.ndim != 2):
            raise InputError(f"visual is {visual.dtype} of shape {tuple(visual.shape)}; expected bool[B, L].")
        self.visual = visual
        self.reports: list[Report] = []
        self._thread = _Thread()
        self._undo = ExitStack()
        self._private: attention.PrivateConfig | None = None
        self._cuts: tuple[int, ...] = ()
        self._scored: tuple[int, ...] = ()
        self._wanted: dict[int, int] = {}
        with ExitStack() as undo:
            self._install(undo)
            self._undo = undo.pop_all()

    # --- public ------------------------------------------------------------------------------------------------------

    @property
    def report(self) -> Report:
        """Measurements of the last prefill.

        Raises:
            MMTokenError: the model has not been called with visual tokens yet.
        """
        if not self.reports:
            raise MMTokenError("report is empty: call the model with an image or video first.")
        return self.reports[-1]

    @property
    def encoder_call(self) -> EncoderCall | None:
        """The `get_*_features` call that is running in this thread."""
        return self._thread.encoder

    def take_report(self) -> Report | None:
        """The report begun by `run_site`, handed over to whoever completes it."""
        report, self._thread.report = self._thread.report, None
        return report

    def detach(self) -> None:
        """Take away every hook and attribute; safe to repeat."""
        self._undo.close()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        raise UnsupportedError("A model with a compressor attached cannot be copied; detach it, copy, attach again.")

    # --- hooks -------------------------------------------------------------------------------------------------------

    def _install(self, undo: ExitStack) -> None:
        model, backbone = self.model, self.backbone
        object.__setattr__(model, _ATTACHED, self)
        undo.callback(model.__dict__.pop, _ATTACHED, None)

        def keep(handle: RemovableHandle) -> None:
            undo.callback(handle.remove)

        tower = backbone.tower()
        if tower is not None:
            vision = VisionHooks(self, tower)
            for handle in vision.install():
                keep(handle)
            for modality in backbone.modalities if backbone.decoder is not None else ():
                self._wrap_encoder(modality, undo)
        decoder = backbone.decoder
        if decoder is None:
            return
        if tower is not None or backbone.root is not decoder:
            keep(backbone.root.register_forward_pre_hook(self._root_pre, with_kwargs=True))
            keep(backbone.root.register_forward_hook(self._root_post, always_call=True))
        keep(decoder.register_forward_pre_hook(self._decoder_pre, with_kwargs=True))
        keep(decoder.register_forward_hook(self._decoder_post, always_call=True))
        self._signature = inspect.signature(type(backbone.root).forward)
        depth = len(decoder.layers)
        self._cuts = self.compressor.cut_layers(depth)
        self._scored = self.compressor.score_layers(depth)
        if self._cuts:
            for number in range(min((*self._cuts, *self._scored)), depth):
                hook = functools.partial(self._layer_pre, number)
                keep(decoder.layers[number].register_forward_pre_hook(hook, with_kwargs=True))
            self._tap(decoder, undo)
            self._follow_deepstack(decoder, undo)

    def _tap(self, decoder: nn.Module, undo: ExitStack) -> None:
        if not ({"text_attention", "next_attention"} & self.compressor.needs):
            return
        attention.register()
        self._private = attention.PrivateConfig(decoder)
        undo.callback(self._private.restore)
        if self._private.config._attn_implementation == "sdpa":
            self._private.config._attn_implementation = attention.TAPPED_SDPA
            self._wanted = {id(decoder.layers[number].self_attn): number for number in self._scored}

    def _follow_deepstack(self, decoder: nn.Module, undo: ExitStack) -> None:
        """Qwen3-VL adds features between layers; after a cut they must go to the tokens that are left."""
        original = getattr(decoder, "_deepstack_process", None)
        if original is None:
            return

        def process(hidden: Tensor, mask: Tensor, embeds: Tensor) -> Tensor:
            call = self._thread.prefill
            if call is not None and call.cut is not call.base:
                assert call.base is not None
                left = torch.zeros_like(call.real).scatter(1, call.cut.index, call.cut.valid_mask())
                left = gather.last(left, call.base.index) & call.base.valid_mask()
                embeds = embeds[left[mask]]
                mask = gather.last(mask, call.base.rank.gather(1, call.cut.index)) & call.cut.valid_mask()
            result: Tensor = original(hidden, mask, embeds)
            return result

        object.__setattr__(decoder, "_deepstack_process", process)
        undo.callback(decoder.__dict__.pop, "_deepstack_process", None)

    def _wrap_encoder(self, modality: Modality, undo: ExitStack) -> None:
        """Listen to `get_image_features` / `get_video_features` of this instance.

        They are public methods, not modules, so there is no hook for them; `generate` calls them before and apart from
        the forward, and only they see the grids and image sizes. The result carries what was learnt as an attribute.
        """
        root = self.backbone.root
        name = f"get_{modality}_features"
        original = getattr(root, name)
        signature = inspect.signature(original)

        @functools.wraps(original)
        def encode(*args: Any, **kwargs: Any) -> Any:
            state = self._thread
            if state.encoder is not None:  # Qwen encodes videos through its image method
                return original(*args, **kwargs)
            bound = signature.bind(*args, **kwargs).arguments
            given = {**bound, **bound.get("kwargs", {})}
            given.pop("kwargs", None)
            started = time.perf_counter()
            arguments, picks = self._pick_frames(modality, given)
            call = state.encoder = EncoderCall(modality, arguments)
            try:
                output = original(**arguments)
            finally:
                state.encoder = None
            acted = "vision_layer" in self.compressor.sites
            seeds = "content_seed" in self.compressor.needs
            record = call.finish(self.backbone, self.compressor.needs, acted, seeds)
            if picks is not None:
                tiles = sum(len(clip) for clip in self.backbone.clips(given))
                record = fill_frames(output, record, self.backbone.layout(modality, given, tiles), picks)
            record.seconds = time.perf_counter() - started
            if hasattr(output, "pooler_output"):
                setattr(output, _RECORD, record)
            if state.encoded is not None:
                state.encoded[modality] = record
            return output

        object.__setattr__(root, name, encode)
        undo.callback(root.__dict__.pop, name, None)

    def _pick_frames(
        self, modality: Modality, given: dict[str, Any]
    ) -> tuple[dict[str, Any], list[Tensor] | None]:
        """Leave whole frames of videos out before they are encoded, if the method does that."""
        if modality != "video" or "frames" not in self.compressor.sites:
            return given, None
        clips = self.backbone.clips(given)
        seeds = None
        if "content_seed" in self.compressor.needs:
            seeds = EncoderCall(modality, given).seeds(self.backbone)
        started = time.perf_counter()
        picks = choose_frames(self.compressor, clips, seeds)
        report = self._thread.report = Report(type(self.compressor).__name__)
        before, after = [len(clip) for clip in clips], [len(pick) for pick in picks]
        report.sites.append(SiteReport("frames", None, before, after, time.perf_counter() - started))
        return self.backbone.with_frames(given, picks), picks

    def _root_pre(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = self._thread
        bound = self._signature.bind_partial(module, *args, **kwargs).arguments
        call = {**bound, **bound.get("kwargs", {})}
        ids = call.get("input_ids")
        outputs = call.get("mm_encoder_outputs") or {}
        state.visual = None
        if not outputs and all(call.get(name) is None for name in _PIXELS):
            return
        state.encoded = {
            name: getattr(output, _RECORD) for name, output in outputs.items() if hasattr(output, _RECORD)
        }
        state.input_ids = ids
        state.visual = {}
        for modality in self.backbone.modalities:
            token = self.backbone.placeholder_ids(modality)
            if ids is not None:
                state.visual[modality] = ids == token
            else:
                embeds = call["inputs_embeds"]
                placeholder = self.model.get_input_embeddings()(torch.tensor(token, device=embeds.device))
                state.visual[modality] = (embeds == placeholder).all(-1)

    def _root_post(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._clear()

    def _clear(self) -> None:
        state = self._thread
        state.visual = state.encoded = state.input_ids = state.prefill = None
        state.decode_mask = state.decode_positions = None

    def _visual_masks(self, rows: int, length: int, past: int) -> dict[str, Tensor] | None:
        """bool[B, L] per modality for this decoder call, None if it holds no visual tokens."""
        state = self._thread
        if state.visual is not None:
            masks = state.visual
        elif self.visual is not None and past == 0:
            given = self.visual
            if given.shape[1] != length or rows % given.shape[0]:
                raise InputError(
                    f"visual has shape {tuple(given.shape)} but the prompt is {rows} rows of {length} tokens; give one "
                    "flag per token."
                )
            masks = {"marked": given.repeat_interleave(rows // given.shape[0], 0)}
        else:
            return None
        return masks if any(bool(mask.any()) for mask in masks.values()) else None

    def _decoder_pre(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        state = self._thread
        if args:
            kwargs = {**dict(zip(("input_ids", "attention_mask", "position_ids", "past_key_values"), args, strict=False)),
                      **kwargs}
        ids = kwargs.get("input_ids")
        source = ids if ids is not None else kwargs["inputs_embeds"]
        rows, length = source.shape[:2]
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        masks = self._visual_masks(rows, length, past)
        if masks is None:
            return self._decode(decoder, kwargs, cache, past)
        if ids is not None:
            state.input_ids = ids
            kwargs = {**kwargs, "input_ids": None, "inputs_embeds": decoder.get_input_embeddings()(ids)}
        return (), self._compress_prompt(decoder, kwargs, masks, past)

    # --- prefill -----------------------------------------------------------------------------------------------------

    def _compress_prompt(
        self, decoder: nn.Module, kwargs: dict[str, Any], masks: dict[str, Tensor], past: int
    ) -> dict[str, Any]:
        state = self._thread
        embeds = kwargs["inputs_embeds"]
        rows, length = embeds.shape[:2]
        cache = self._logical_cache(decoder, kwargs)
        encoded = state.encoded or {}
        items = locate(masks, encoded)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = (torch.arange(length, device=embeds.device) + past)[None]
        given = _full_attention_mask(kwargs.get("attention_mask"))
        mask = self._dense_mask(decoder, embeds, given, cache, positions)
        everything = torch.ones(rows, length, dtype=torch.bool, device=embeds.device)
        real = _real_tokens(given, everything, past)
        cut = Cut.of(0, everything)
        call = Prefill(items, length, past, real, mask, embeds, positions, cut, self._prompt_tokens(items, embeds),
                       ~everything, cache=cache, input_ids=state.input_ids)
        state.prefill = call
        self._start_report(call, decoder, encoded)
        embeds, keep = self._decide(call, decoder)
        call.cut = call.base = Cut.of(0, keep)
        if self._wanted:
            state_listener = functools.partial(self._listen, call)
            attention._listening.listener = state_listener
        call.seconds = time.perf_counter()
        return {**kwargs, **self._shortened(decoder, kwargs, call, embeds, keep)}

    def _decide(self, call: Prefill, decoder: nn.Module) -> tuple[Tensor, Tensor]:
        """Let the compressor act on the prompt: (embeds with merged features float[B, L, D], bool[B, L] left)."""
        tokens = self._select_encoded(call, call.tokens)
        if "llm_input" in self.compressor.sites:
            context = CallContext(call, len(decoder.layers))
            tokens = self.run_site("llm_input", None, tokens, lambda t: self.compressor.llm_input(t, context))
        keep = call.apply(tokens)
        merged = self.compressor.merges and bool(self.compressor.sites & {"llm_input", "project"})
        return call.write(tokens, call.embeds) if merged else call.embeds, keep

    def plan(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor,
        embeds: Tensor,
        visual: dict[str, Tensor],
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
        decoder = self.backbone.decoder
        assert decoder is not None
        encoded = {name: getattr(output, _RECORD) for name, output in outputs.items()}
        for output in outputs.values():
            delattr(output, _RECORD)
        items = locate(visual, encoded)
        everything = torch.ones_like(input_ids, dtype=torch.bool)
        real = _real_tokens(attention_mask, everything, 0)
        tokens = self._prompt_tokens(items, embeds)
        call = Prefill(items, input_ids.shape[1], 0, real, None, embeds, positions, Cut.of(0, everything), tokens,
                       ~everything, input_ids=input_ids)
        embeds, keep = self._decide(call, decoder)
        self.take_report()
        return call, embeds, keep

    def _logical_cache(self, decoder: nn.Module, kwargs: dict[str, Any]) -> Any:
        cache = kwargs.get("past_key_values")
        use_cache = kwargs.get("use_cache")
        use_cache = decoder.config.use_cache if use_cache is None else use_cache
        checkpointing = decoder.training and getattr(decoder, "gradient_checkpointing", False)
        if checkpointing and self._cuts and not _hooks_run_outside_checkpoints(decoder):
            raise UnsupportedError(
                "gradient_checkpointing=True with cuts between layers: this transformers version runs hooks again in "
                "the recomputation; upgrade transformers or disable checkpointing."
            )
        if cache is None and use_cache and not checkpointing:
            # The decoder would create it inside; it must have logical layers before masks are made.
            cache = kwargs["past_key_values"] = new_cache(decoder.config)
        if cache is not None:
            make_logical(cache)
        return cache

    @staticmethod
    def _dense_mask(decoder: nn.Module, embeds: Tensor, given: Any, cache: Any, positions: Tensor) -> Tensor | None:
        """The mask that the uncompressed model would use."""
        if positions.ndim == 2:
            text_positions = positions
        else:
            text_positions = positions[0] if positions.shape[0] == 4 else None
        mask: Tensor | None = create_causal_mask(
            config=decoder.config,
            inputs_embeds=embeds,
            attention_mask=given,
            past_key_values=cache,
            position_ids=text_positions,
        )
        return mask

    def _prompt_tokens(self, items: Items, embeds: Tensor) -> VisualTokens:
        features = embeds[items.row_index[:, None], items.places]
        return VisualTokens.from_features(features, valid=items.valid, protected=items.protected, grid=items.grids)

    def _select_encoded(self, call: Prefill, tokens: VisualTokens) -> VisualTokens:
        """Apply what was decided inside the tower or around the projector."""
        acted = self.compressor.sites & {"vision_layer", "project", "frames"}
        if not acted:
            return tokens
        items = call.items
        if "project" in acted and not self.backbone.tokenwise_projector:
            context = CallContext(call, 0)
            return self.run_site(
                "project", None, tokens, lambda t: self.compressor.project(t, lambda already: already, context)
            )
        if items.mass is None:
            raise UnsupportedError(
                "These visual tokens were encoded outside the attached model, where the compressor could not act; pass "
                "pixels while it is attached."
            )
        if items.size is not None:
            tokens = tokens.replace(size=items.size)
        if acted == {"frames"}:
            return tokens.where((items.mass > 0) | tokens.protected)
        return most_mass(tokens, items.mass, self.compressor.keep)

    def _shortened(
        self, decoder: nn.Module, kwargs: dict[str, Any], call: Prefill, embeds: Tensor, keep: Tensor
    ) -> dict[str, Any]:
        cut = call.cut
        changed: dict[str, Any] = {"inputs_embeds": gather.rows(embeds, cut.index)}
        positions = gather.last(call.position_ids, cut.index)
        if self.compressor.positions == "renumber":
            moved, cut.shift = renumber(call.position_ids, call.dropped, self.spans(call))
            positions = gather.last(moved, cut.index)
        changed["position_ids"] = positions
        mask = self._layer_mask(decoder, call, cut, 0, changed["inputs_embeds"])
        changed["attention_mask"] = _like(kwargs.get("attention_mask"), mask)
        flags = kwargs.get("visual_pos_masks")
        if flags is not None:
            changed["visual_pos_masks"] = gather.last(flags, cut.index) & cut.valid_mask()
            changed["deepstack_visual_embeds"] = [layer[keep[flags]] for layer in kwargs["deepstack_visual_embeds"]]
        return changed

    @staticmethod
    def spans(call: Prefill) -> list[tuple[int, Tensor]]:
        """(row, int[n] positions) of every item."""
        items = call.items
        return [(row, items.places[i][items.valid[i]]) for i, row in enumerate(items.rows)]

    def _layer_mask(
        self, decoder: nn.Module, call: Prefill, cut: Cut, layer: int, hidden: Tensor
    ) -> Tensor | None:
        """The dense mask with the rows and columns that are left."""
        stored = logical_layer(call.cache, layer)
        if call.mask is None:
            if cut.valid is None:
                # A mask of ones says "one sequence per row": without cache and mask, transformers takes gaps in the
                # position ids for borders between packed sequences.
                return None if call.cache is not None else torch.ones_like(cut.index)
            padded: Tensor | None = create_causal_mask(
                config=decoder.config, inputs_embeds=hidden, attention_mask=cut.valid, past_key_values=None
            )
            if padded is None:
                return None
            if call.cache is not None and stored is not None:
                width = stored.get_mask_sizes(hidden.shape[1])[0]  # type: ignore[attr-defined]
                extra = width - padded.shape[-1]
                if isinstance(getattr(stored, "max_cache_len", None), int) and extra > 0:
                    padded = nn.functional.pad(padded, (0, extra), value=gather.hidden_value(padded))
            return gather.let_padding_see_itself(padded, cut.valid, 0)
        columns, past = self._prefill_columns(call, cut, stored)
        mask = gather.mask_columns(gather.mask_rows(call.mask, cut.index), columns)
        return mask if cut.valid is None else gather.let_padding_see_itself(mask, cut.valid, past)

    @staticmethod
    def _prefill_columns(call: Prefill, cut: Cut, stored: LogicalLayer | None) -> tuple[Tensor, int]:
        """int[B, k] logical columns of what the layer will hold, and how many of them precede this call."""
        index = cut.index + call.past
        if cut.valid is not None:
            index = index.masked_fill(~cut.valid, -1)
        if stored is None:
            return index, 0
        past = stored.stored()
        before = stored.columns(0)
        if before is None:
            before = torch.arange(past, device=index.device).expand(index.shape[0], -1)
        columns = torch.cat([before[:, :past], index], -1)
        capacity = getattr(stored, "max_cache_len", None)
        if isinstance(capacity, int):
            columns = nn.functional.pad(columns, (0, capacity - columns.shape[1]), value=-1)
        return columns, past

    def _layer_pre(
        self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = self._thread.prefill
        if call is None:
            return self._decode_layer(number, args, kwargs)
        decoder = self.backbone.decoder
        assert decoder is not None
        hidden = args[0] if args else kwargs["hidden_states"]
        base_kwargs = kwargs
        if call.cut is not call.base:
            kwargs = self._cut_arguments(decoder, call, number, base_kwargs, hidden)
        if number in self._cuts:
            context = CallContext(
                call, len(decoder.layers), functools.partial(self._probe, call, number, layer, hidden, kwargs)
            )
            context.layer = number
            tokens = call.tokens.replace(features=call.hidden(call.tokens, hidden))
            tokens = self.run_site(
                "llm_layer", number, tokens, lambda t: self.compressor.llm_layer(t, number, context)
            )
            keep = call.apply(tokens)
            if self.compressor.merges:
                hidden = call.write(tokens, hidden)
            before, call.cut = call.cut, Cut.of(call.cut.group + 1, keep)
            hidden = gather.rows(hidden, before.rank.gather(1, call.cut.index))
            if self.compressor.positions == "renumber":
                moved, call.cut.shift = renumber(call.position_ids, call.dropped, self.spans(call))
                call.cut.position_ids = gather.last(moved, call.cut.index)
            kwargs = self._cut_arguments(decoder, call, number, base_kwargs, hidden)
        call.layer_cut[number] = call.cut
        if number in self._scored and not self._wanted:
            row = self._probe(call, number, layer, hidden, kwargs)
            call.scores[number] = (row, row.shape[1] - call.cut.index.shape[1], call.cut)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _cut_arguments(
        self, decoder: nn.Module, call: Prefill, number: int, kwargs: dict[str, Any], hidden: Tensor
    ) -> dict[str, Any]:
        """A layer's other arguments after a cut; computed once per cut and argument object."""
        cut = call.cut
        assert call.base is not None
        relative = call.base.rank.gather(1, cut.index)

        def once(name: str, given: Any, make: Callable[[], Any]) -> Any:
            key = (name, id(given))
            if key not in cut.memo:
                cut.memo[key] = (given, make())  # holding `given` keeps its id from being reused
            return cut.memo[key][1]

        changed = dict(kwargs)
        changed["attention_mask"] = once(
            "mask", kwargs.get("attention_mask"), lambda: self._layer_mask_or_none(decoder, call, cut, number, hidden)
        )
        ids = kwargs.get("position_ids")
        if ids is not None:
            changed["position_ids"] = once("ids", ids, lambda: gather.last(ids, relative))
        tables = kwargs.get("position_embeddings")
        if tables is not None:
            if cut.position_ids is None:
                make = lambda: tuple(gather.rows(table, relative) for table in tables)  # noqa: E731
            else:
                axes = cut.position_ids[-3:] if cut.position_ids.ndim == 3 else cut.position_ids
                make = lambda: decoder.rotary_emb(hidden, axes)  # noqa: E731
            changed["position_embeddings"] = once("tables", tables, make)
        return changed

    def _layer_mask_or_none(
        self, decoder: nn.Module, call: Prefill, cut: Cut, layer: int, hidden: Tensor
    ) -> Tensor | None:
        mask = self._layer_mask(decoder, call, cut, layer, hidden)
        # Layers, unlike the decoder, take no two-dimensional mask.
        return mask if mask is not None and mask.ndim == 4 else None

    def _listen(
        self, call: Prefill, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float
    ) -> bool:
        number = self._wanted.get(id(module))
        if number is not None:
            stored = logical_layer(call.cache, number)
            past = 0 if stored is None else stored.stored() - query.shape[2]
            index = call.cut.rank.gather(1, call.last_token[:, None])[:, 0]
            call.scores[number] = (attention.query_row(query, key, mask, scaling, index, past), past, call.cut)
        return False

    def _probe(
        self, call: Prefill, number: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        """float32[B, past + n]: attention of the last prompt token in a layer that has not run yet."""
        rows: list[Tensor] = []
        stored = logical_layer(call.cache, number)

        def listen(_: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> bool:
            past = 0
            if stored is not None and stored.stored():
                past = stored.stored()
                key = torch.cat([stored.keys[:, :, :past], key], 2)  # type: ignore[attr-defined]
            index = call.cut.rank.gather(1, call.last_token[:, None])[:, 0]
            rows.append(attention.query_row(query, key, mask, scaling, index, past)[:, : past + query.shape[2]])
            return True

        assert self._private is not None
        with torch.no_grad(), attention.listening(listen), self._private.tapped():
            layer.self_attn(
                hidden_states=layer.input_layernorm(hidden),
                position_embeddings=kwargs.get("position_embeddings"),
                attention_mask=kwargs.get("attention_mask"),
                position_ids=kwargs.get("position_ids"),
                past_key_values=None,
            )
        return rows[0]

    def _decoder_post(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call = self._thread.prefill
        attention._listening.listener = None
        if call is None:
            if self.backbone.root is decoder:
                self._clear()
            return None
        self._thread.prefill = None
        if output is None:  # the decoder raised
            self._clear()
            return None
        assert call.base is not None
        layers = len(decoder.layers)
        cuts = [call.layer_cut.get(number, call.base) for number in range(layers)]
        if call.cache is not None:
            for number, cut in enumerate(cuts):
                stored = logical_layer(call.cache, number)
                if stored is not None:
                    stored.record(cut.index, cut.valid, call.length, cut.group, cut.shift)
        self._finish_report(call, cuts)
        hidden = output[0]
        if hidden.shape[1] != call.length or call.cut.valid is not None:
            output = _with_hidden(output, gather.rows(hidden, _forward_fill(call)))
        if self.backbone.root is decoder:
            self._clear()
        return output

    # --- decoding ----------------------------------------------------------------------------------------------------

    def _decode(
        self, decoder: nn.Module, kwargs: dict[str, Any], cache: Any, past: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A call without visual tokens: if the cache is compressed, translate masks and positions."""
        state = self._thread
        first = logical_layer(cache, 0)
        if first is None:
            return None
        ids = kwargs.get("input_ids")
        embeds = kwargs.get("inputs_embeds")
        given = _full_attention_mask(kwargs.get("attention_mask"))
        positions = kwargs.get("position_ids")
        shifted = any(layer.shift is not None for layer in cache.layers if isinstance(layer, LogicalLayer))
        if past == 0:
            return None
        source = ids if embeds is None else embeds
        assert source is not None
        length = source.shape[1]
        changed = dict(kwargs)
        if shifted:
            if positions is None:
                positions = (torch.arange(length, device=source.device) + past)[None]
            state.decode_positions = positions
            if first.shift is not None:
                changed["position_ids"] = positions - first.shift[:, None]
        mask = given
        # Only sdpa does without a mask, and only for a single query; any other mask would be made in logical columns.
        if length > 1 or given is not None or decoder.config._attn_implementation == "eager":
            if embeds is None:
                embeds = torch.empty(*source.shape, 0, dtype=decoder.dtype, device=source.device)
            mask = create_causal_mask(
                config=decoder.config, inputs_embeds=embeds, attention_mask=given, past_key_values=cache
            )
        state.decode_mask = mask
        mask = self._decode_mask(first, mask, length, source.shape[0], decoder)
        changed["attention_mask"] = _like(kwargs.get("attention_mask"), mask)
        return (), changed

    @staticmethod
    def _decode_mask(
        stored: LogicalLayer, mask: Tensor | None, length: int, rows: int, decoder: nn.Module
    ) -> Tensor | None:
        """The logical mask with the columns that a layer stores."""
        columns = stored.columns(length) if (mask is not None or stored.ragged) else None
        if columns is None:
            return mask
        if mask is not None:
            return gather.mask_columns(mask, columns)
        seen = (columns >= 0)[:, None, None, :].expand(-1, -1, length, -1)
        if decoder.config._attn_implementation == "eager":
            dtype = decoder.dtype
            return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
        return seen

    def _decode_layer(
        self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        cache = kwargs.get("past_key_values")
        stored = logical_layer(cache, number)
        if stored is None or not stored.group:
            return None
        state = self._thread
        if state.decode_mask is None and not stored.ragged and stored.shift is None:
            return None
        decoder = self.backbone.decoder
        assert decoder is not None
        hidden = args[0] if args else kwargs["hidden_states"]
        changed = dict(kwargs)
        changed["attention_mask"] = self._decode_mask(
            stored, state.decode_mask, hidden.shape[1], hidden.shape[0], decoder
        )
        if stored.shift is not None:
            assert state.decode_positions is not None
            positions = state.decode_positions - stored.shift[:, None]
            axes = positions[-3:] if positions.ndim == 3 else positions
            changed["position_embeddings"] = decoder.rotary_emb(hidden, axes)
        return args, changed

    # --- reports -----------------------------------------------------------------------------------------------------

    def run_site(
        self, site: str, layer: int | None, tokens: VisualTokens, method: Callable[[VisualTokens], VisualTokens]
    ) -> VisualTokens:
        """Call the compressor and note what it did."""
        before = tokens.counts()
        started = time.perf_counter()
        left = method(tokens)
        seconds = time.perf_counter() - started
        report = self._thread.report
        if report is None:
            report = self._thread.report = Report(type(self.compressor).__name__)
        report.sites.append(SiteReport(site, layer, before, left.counts(), seconds))
        return left

    def _start_report(self, call: Prefill, decoder: nn.Module, encoded: dict[str, Encoded]) -> None:
        state = self._thread
        report = state.report or Report(type(self.compressor).__name__)
        state.report = report
        report.item_rows = list(call.items.rows)
        report.tokens_in = call.tokens.counts()
        report.prompt_lengths = [int(n) for n in call.real.sum(-1).tolist()]
        report.decoder = DecoderShape.from_config(decoder.config)
        report.vision_seconds = sum(record.seconds for record in encoded.values())
        keep = self.compressor.keep
        if isinstance(keep, int):
            for item, (count, steps) in enumerate(zip(report.tokens_in, call.tokens.steps, strict=True)):
                if keep * steps > count:
                    report.notes.append(f"keep={keep} is above the {count} tokens of item {item}: all were kept.")
        if call.embeds.is_cuda:
            torch.cuda.reset_peak_memory_stats(call.embeds.device)

    def _finish_report(self, call: Prefill, cuts: list[Cut]) -> None:
        report = self.take_report()
        assert report is not None
        report.prefill_seconds = time.perf_counter() - call.seconds
        lengths: dict[int, list[int]] = {}
        for cut in cuts:
            if cut.group not in lengths:
                whole = cut.index.shape[1] == call.length
                lengths[cut.group] = list(report.prompt_lengths) if whole else cut.lengths()
            report.layer_lengths.append(lengths[cut.group])
        tokens = call.tokens
        report.tokens = tokens
        eligible = tokens.eligible
        report.kept = [tokens.source[i][eligible[i]] for i in range(len(tokens))]
        report.kernels = {"scores": "torch"}
        if call.cache is not None:
            report.kv_bytes = cache_bytes(call.cache)
            report.kv_bytes_dense = _dense_bytes(call)
        if call.embeds.is_cuda:
            report.peak_memory_bytes = torch.cuda.max_memory_allocated(call.embeds.device)
        self.reports.append(report)


def _dense_bytes(call: Prefill) -> int:
    total = 0
    for layer in call.cache.layers:
        for tensor in (layer.keys, layer.values):
            total += tensor.numel() // tensor.shape[-2] * (call.past + call.length) * tensor.element_size()
    return total


def _full_attention_mask(given: Any) -> Any:
    """The mask of full-attention layers, where the caller hands in one per layer type."""
    if not isinstance(given, dict):
        return given
    if set(given) != {"full_attention"}:
        raise UnsupportedError(
            f"attention_mask has entries for {sorted(given)}; only models whose layers all attend fully can be compressed."
        )
    return given["full_attention"]


def _like(given: Any, mask: Tensor | None) -> Any:
    """`mask` in the form in which the caller handed its mask in."""
    return {"full_attention": mask} if isinstance(given, dict) else mask


def _real_tokens(given: Any, everything: Tensor, past: int) -> Tensor:
    """bool[B, L]: which tokens of this call are not padding."""
    rows, length = everything.shape
    if not isinstance(given, Tensor):
        return everything
    if given.ndim == 2:
        return given[:, -length:].bool()
    # generate() hands four-dimensional masks to compilable caches; the last query sees every real key.
    seen = given[:, 0, -1, past : past + length]
    return (seen if seen.dtype == torch.bool else seen == 0).expand(rows, -1)


def _forward_fill(call: Prefill) -> Tensor:
    """int[B, L]: for each position of the call, the row of the last token left at or before it.

    The output keeps the caller's length, so that `logits[:, -1]`, `labels` and `logits_to_keep` mean what they meant.
    """
    cut = call.cut
    left = torch.zeros_like(call.real).scatter(1, cut.index, cut.valid_mask())
    padding = cut.index.shape[1] - left.sum(-1, keepdim=True)
    return (left.long().cumsum(-1) - 1 + padding).clamp(min=0)


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    output["last_hidden_state"] = hidden
    return output


def _hooks_run_outside_checkpoints(decoder: nn.Module) -> bool:
    """Whether checkpointing wraps a layer's forward (later transformers) and not its call with all hooks (5.17)."""
    kind = type(decoder.layers[0])
    return not any("__call__" in base.__dict__ for base in kind.__mro__ if base is not nn.Module and base is not object)


def attach(
    model: PreTrainedModel, compressor: Compressor | str | dict[str, Any], *, visual: Tensor | None = None
) -> Session:
    """Attach a compressor to a model until `.detach()`.

    Args:
        model: a transformers VLM with an adapter, or a bare decoder or tower.
        compressor: an instance, a name ("fastv"), or {"class_path": ..., "init_args": {...}}.
        visual: bool[B, L] marks visual positions of the prompt; needed for bare decoders only.

    Returns:
        The session; `session.report` holds the measurements of the last prefill.

    Raises:
        UnsupportedError: this backbone cannot host the compressor; the message says why.
        MMTokenError: a compressor is attached already.
    """
    return Session(model, resolve(compressor), visual)


def compress(
    model: PreTrainedModel, compressor: Compressor | str | dict[str, Any], *, visual: Tensor | None = None
) -> Session:
    """`attach` for use in a with statement: `with compress(model, FastV(keep=64)): model.generate(**inputs)`."""
    return attach(model, compressor, visual=visual)
