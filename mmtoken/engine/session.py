"""Attaching a compressor to a model, and taking every trace of it away again."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import Any, Literal, get_args
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from mmtoken.backbones.base import Backbone, Tower
from mmtoken.backbones.registry import adapt, unwrapped
from mmtoken.compressors.base import STREAM_SITES, Compressor, Context
from mmtoken.compressors.registry import resolve
from mmtoken.compressors.trained import Trained, settings_of
from mmtoken.engine.cache import attention_kinds
from mmtoken.engine.crops import Per
from mmtoken.engine.decoder import DecoderHooks
from mmtoken.engine.encode import Encoded, EncoderCall
from mmtoken.engine.encoder import wrap_encoder
from mmtoken.engine.eviction import query_module
from mmtoken.engine.learned import check_parts
from mmtoken.engine.prefill import Prefill
from mmtoken.engine.prompt import Prompt, listen
from mmtoken.engine.recorder import EpisodeState, Recorder
from mmtoken.engine.report import Report, SiteReport
from mmtoken.engine.reuse import VideoState
from mmtoken.engine.selective import ReuseHooks
from mmtoken.engine.vision import VisionHooks
from mmtoken.errors import InputError, MMTokenError, UnsupportedError
from mmtoken.kernels.dispatch import ran_since
from mmtoken.tokens import VisualTokens

_ATTACHED = "_mmtoken_session"
_ATTENTIONS = ("sdpa", "eager", "flex_attention")
_OF_TOWER = {"tower_attention", "tower_keys", "tower_states"}
_CAPPED = {"text_attention", "next_attention", "history"}

MAX_REPORTS = 1000
"""Most reports that a session holds; each has indices and scores of every visual token."""

Mode = Literal["drop", "mask"]
"""What becomes of visual tokens that a compressor lets go: they leave the sequence and the cache, or they stay and no
other token sees them. The answers are the same, and only dropping saves anything; masking keeps every length and is
the reference to compare with."""


class ThreadState(threading.local):
    """State of the calls that run in this thread; other threads may use the same model at the same time.

    Attributes:
        encoder: the `get_*_features` call in progress.
        made: outputs of encoders that are still in use, per modality.
        carried: what outputs of encoders carried when they were handed to the model's forward in progress.
        encoded: what encoders left behind for the forward in progress, per modality.
        visual: bool[B, L] visual positions of the forward in progress, per modality.
        input_ids: int[B, L] of that forward.
        prefill: the decoder call in progress, if it holds visual tokens.
        decode_masks, decode_positions: logical masks per layer and position ids of the decoder call in progress, if it
            does not.
        report: the report being filled.
        ran: what had run in this thread, as `dispatch.ran` counts it, before what the report is about.
        latest: the last report filed.
        recorder: what generated tokens of earlier calls looked at, if the method asks for it.
        prompt: the prompt of the forward in progress, `asked` that of the `generate` in progress; only for methods that
            read it before anything is encoded.
        labels: what the forward in progress is to predict.
        videos: where the videos of the next calls of the tower go on, None where each call begins its own.
        memory: what the method remembers of earlier calls of the tower, None where each call begins anew.
        aside: whether the decoder runs in the middle of another call, and no hook acts.
    """

    made: WeakValueDictionary[str, Any]
    encoder: EncoderCall | None = None
    carried: dict[str, Encoded]
    encoded: dict[str, Encoded] | None = None
    visual: dict[str, Tensor] | None = None
    input_ids: Tensor | None = None
    prefill: Prefill | None = None
    decode_masks: list[Tensor | None] | None = None
    decode_positions: Tensor | None = None
    report: Report | None = None
    ran: Counter[tuple[str, str]]
    latest: Report | None = None
    recorder: Recorder | None = None
    prompt: Prompt | None = None
    asked: Prompt | None = None
    labels: Tensor | None = None
    videos: tuple[VideoState, ...] | None = None
    memory: dict[str, Any] | None = None
    aside: bool = False

    def __init__(self) -> None:
        self.made = WeakValueDictionary()
        self.carried = {}
        self.ran = Counter()


def check(
    model: nn.Module, compressor: Compressor | Trained | str | dict[str, Any], *, visual: Tensor | None = None
) -> None:
    """Do nothing if `compressor` can be attached to `model`.

    Raises:
        UnsupportedError: it cannot; the message says why.
    """
    _check(adapt(model), resolve(compressor), visual)


def _check(backbone: Backbone, given: Compressor | Trained, visual: Tensor | None) -> None:
    _check_place(backbone, settings_of(given), visual)
    check_parts(backbone, given)


def _check_place(backbone: Backbone, method: Compressor, visual: Tensor | None) -> None:
    name = type(method).__name__
    if method.sites and method.sites <= set(STREAM_SITES):
        raise UnsupportedError(f"{name} acts in streams only; use mmtoken.stream(model, processor, {name}(...)).")
    decoder: Any = backbone.decoder
    if method.needs & {"prompt", "text"} and decoder is None:
        raise UnsupportedError(f"{name} reads the prompt, and a {backbone.name} has none.")
    if backbone.tower() is None:
        if visual is None:
            raise UnsupportedError(
                "visual=None but this model is a bare decoder; mark the visual positions with visual=bool[B, L]."
            )
        if (
            method.sites & {"refresh", "vision_layer", "project", "frames"}
            or {"tower_attention", "tower_keys", "tower_states", "pixels"} & method.needs
        ):
            raise UnsupportedError(f"{name} acts in or reads from a vision tower, and a {backbone.name} has none.")
    tower = backbone.tower()
    if tower is not None and tower.opaque and _in_tower(method, tower):
        raise UnsupportedError(
            f"{name} acts in a vision tower or reads from it, and that of {backbone.name} holds all images in one "
            "masked sequence, which cannot be followed; use a method that reads projected tokens, such as DivPrune."
        )
    if "refresh" in method.sites:
        _check_reuse(backbone, method)
    if "vision_layer" in method.sites and method.tower_cut == "mlp" and tower is not None and not tower.sequential:
        raise UnsupportedError(
            f"{name} acts between attention and MLP of a block, and those of this {backbone.name} run side by side, or "
            "are normalised behind; use a method that acts as a block begins."
        )
    if "vision_layer" in method.sites and not backbone.plain_tower:
        raise UnsupportedError(
            f"{name} drops patches inside a tower, and {backbone.name} joins what two towers make of "
            "the same patches; use a method that acts after the towers."
        )
    _check_tower_attention(backbone, method)
    if decoder is None:
        if method.sites & {"llm_layer", "frames", "cache"}:
            raise UnsupportedError(f"{name} acts inside or before a whole model, and this is a {backbone.name}.")
        return
    if method.patchwise_projector and not (backbone.tokenwise_projector and backbone.feature_layers == 1):
        raise UnsupportedError(
            f"{name} needs a projector that maps every patch by itself, and {backbone.name} merges, re-samples or "
            "un-pads patches, projects a video frame by frame, or reads several tower layers."
        )
    if "prepare" in method.sites and backbone.dynamic_resolution:
        raise UnsupportedError(
            f"{name} works before the processor on {backbone.name}, whose token count follows the image size: use "
            "images = compressor.prepare(images) and run the model as it is."
        )
    if "frames" in method.sites and "video" not in backbone.modalities:
        raise UnsupportedError(f"{name} leaves out frames of videos, and {backbone.name} reads images only.")
    method.cut_layers(len(decoder.layers))
    method.score_layers(len(decoder.layers))
    method.watched_layers(len(decoder.layers))
    method.recording(len(decoder.layers))
    _check_attention(method, decoder.config._attn_implementation)
    attention_kinds(decoder.config)
    if getattr(decoder.config, "attn_logit_softcapping", None) is not None and method.needs & _CAPPED:
        raise UnsupportedError(
            f"{name} reads attention of the decoder, whose scores this model caps (attn_logit_softcapping), which the "
            "rows that are read would not show; use a method that acts before the decoder."
        )
    if "cache" in method.sites:
        if method.recording(len(decoder.layers)) is not None:
            raise UnsupportedError(
                f"{name} records what generated tokens look at, which a cache that loses entries per head cannot tell; "
                "leave the part out that acts on the cache."
            )
        for number, layer in enumerate(decoder.layers):
            query_module(layer.self_attn, number)


def _in_tower(method: Compressor, tower: Tower) -> bool:
    """Whether a method acts between the blocks of a tower, or reads what they compute."""
    read = method.needs & _OF_TOWER or method.tower_layers(tower.feature_block + 1, len(tower.blocks))
    return bool(read or method.sites & {"refresh", "vision_layer"})


def _check_attention(method: Compressor, implementation: str) -> None:
    """Refuse attention of a decoder whose masks are not known to be right: an unknown name would get none at all."""
    if implementation not in _ATTENTIONS:
        why = "takes no mask per query, which cuts of a prompt need" if "flash" in implementation else "is unknown"
        raise UnsupportedError(
            f"attn_implementation={implementation!r} {why}; load the model with 'sdpa', 'eager' or 'flex_attention'."
        )
    if implementation == "flex_attention" and method.calibrates():
        raise UnsupportedError(
            f"{type(method).__name__} adds log(size) to attention scores, which masks of attn_implementation="
            "'flex_attention' cannot; load the model with 'sdpa' or 'eager'."
        )


def _check_tower_attention(backbone: Backbone, method: Compressor) -> None:
    """Refuse to act inside a tower of which no mask could hide padding or weigh merged patches."""
    tower = backbone.tower()
    if tower is None or tower.packed or tower.any_mask or not method.sites & {"vision_layer", "refresh"}:
        return
    implementation = tower.module.config._attn_implementation  # type: ignore[union-attr]
    if implementation not in ("sdpa", "eager"):
        raise UnsupportedError(
            f"attn_implementation={implementation!r} of the vision tower is not supported by {type(method).__name__}, "
            "which acts inside it; load the model with attn_implementation={'vision_config': 'sdpa'}."
        )


def _check_reuse(backbone: Backbone, method: Compressor) -> None:
    name = type(method).__name__
    if backbone.whole and "video" not in backbone.modalities:
        raise UnsupportedError(
            f"{name} takes patches of a frame from an earlier one of its video, and {backbone.name} reads images only."
        )
    tower = backbone.tower()
    if tower is not None and tower.split is not None:
        raise UnsupportedError(
            f"{name} computes some patches of a block only, which needs projections that are modules of their own as "
            f"in transformers' towers; those of a {backbone.name} are not."
        )
    if "vision_layer" in method.sites:
        raise UnsupportedError(
            f"{name} takes patches from an earlier frame and drops others inside the same tower, so that "
            "places no longer agree; leave one of the two out."
        )
    read = method.needs & {"tower_attention", "tower_keys", "tower_states"}
    if read:
        raise UnsupportedError(
            f"{name} reads {', '.join(sorted(read))} of tower blocks that compute some patches of a frame only; use a "
            "method that scores projected tokens."
        )


class Session(AbstractContextManager["Session"]):
    """A compressor attached to a model. Made by `attach` or `compress`.

    The model holds its session: it stays attached until `detach`, also when no variable refers to the session any more
    (`attached(model)` finds it again). A model may run in several threads; each sees its own `report`.

    Attributes:
        model: as handed in, without the wrapper of peft or DDP.
        visual, mode, per: as handed in.
        compressor: the settings of what was handed in.
        trained: the compressor with its learned parts, None if it has none.
        backbone: the model's adapter.
        reports: one `Report` per prefill (or call of a bare tower), oldest first. Only a thread's last one holds
            `tokens`, and of a long run only the last `MAX_REPORTS` stay, so that memory does not grow with training;
            clear the list to keep nothing.
        thread: state of running calls; the engine's own.
        hooks: hooks on the decoder, None for a bare tower; the engine's own.
        clock: seconds, what reports measure time with; wall time unless a benchmark sets another one.
    """

    def __init__(
        self,
        model: nn.Module,
        compressor: Compressor | Trained,
        visual: Tensor | None,
        mode: Mode = "drop",
        per: Per = "item",
    ) -> None:
        if mode not in get_args(Mode):
            raise MMTokenError(f"mode={mode!r} is unknown; use 'drop' or 'mask'.")
        if per not in get_args(Per):
            raise MMTokenError(f"per={per!r} is unknown; use 'item' or 'crop'.")
        self.model: Any = unwrapped(model)
        self.mode = mode
        self.per = per
        self.compressor = settings_of(compressor)
        self.trained = compressor if isinstance(compressor, Trained) else None
        self.backbone = adapt(self.model)
        if any(_ATTACHED in module.__dict__ for module in self._parts()):
            raise MMTokenError(
                "model already has a compressor attached; detach it first (the session that attach() returned, or "
                "mmtoken.engine.session.attached(model)), or combine methods in one compressor."
            )
        if visual is not None and (visual.dtype != torch.bool or visual.ndim != 2):
            raise InputError(f"visual is {visual.dtype} of shape {tuple(visual.shape)}; expected bool[B, L].")
        _check(self.backbone, compressor, visual)
        self.visual = visual
        self.reports: list[Report] = []
        self.clock: Callable[[], float] = time.perf_counter
        self.thread = ThreadState()
        self.hooks: DecoderHooks | None = None
        with ExitStack() as undo:
            self._install(undo)
            self._undo = undo.pop_all()

    def _parts(self) -> list[Any]:
        """The modules that a session has for itself: another one on a part would compress twice."""
        towers = [tower.module for tower in self.backbone.towers()]
        parts = [self.model, self.backbone.root, self.backbone.decoder, *towers]
        return [part for part in parts if part is not None]

    def _install(self, undo: ExitStack) -> None:
        for module in self._parts():
            object.__setattr__(module, _ATTACHED, self)
            undo.callback(module.__dict__.pop, _ATTACHED, None)
        for tower in self.backbone.towers():
            for handle in VisionHooks(self, tower).install():
                undo.callback(handle.remove)
            if "refresh" in self.compressor.sites:
                ReuseHooks(self, tower).install(undo)
        if self.backbone.decoder is not None:
            for modality in self.backbone.modalities:
                wrap_encoder(self, modality, undo)
            self.hooks = DecoderHooks(self, self.backbone.decoder)
            self.hooks.install(undo)
            if "prompt" in self.compressor.needs:
                listen(self, undo)

    @property
    def report(self) -> Report:
        """Measurements of this thread's last prefill (of the last one of all, if this thread has run none).

        Raises:
            MMTokenError: the model has not been called with visual tokens yet.
        """
        if not self.reports:
            raise MMTokenError("report is empty: call the model with an image or video first.")
        return self.thread.latest or self.reports[-1]

    def reset(self) -> None:
        """Forget earlier calls of this thread: a new episode or stream begins. Safe to repeat."""
        if self.thread.recorder is not None:
            self.thread.recorder.reset()

    @contextmanager
    def continuing(self, *videos: VideoState) -> Iterator[None]:
        """Go on with videos that earlier calls began: a stream encodes its frames inside this block.

        Without it every call of the encoder begins its videos anew. Methods that reuse nothing from earlier frames
        (without the site `refresh`) do not look at it. A tower by itself takes its batch as images, and inside this
        block as the frames of these videos, one after the other and equally long. Holds for this thread only.

        Args:
            videos: where each video of a call stands, in the order of the call; they move on when the call has ended
                well. A new `VideoState()` is the beginning of a video.
        """
        before, self.thread.videos = self.thread.videos, videos
        try:
            yield
        finally:
            self.thread.videos = before

    @contextmanager
    def remembering(self, memory: dict[str, Any]) -> Iterator[None]:
        """Let the method find `memory` as `Context.memory` in the tower, and change it: for state across calls.

        Without it every call of a tower begins with an empty one. Holds for this thread only.
        """
        before, self.thread.memory = self.thread.memory, memory
        try:
            yield
        finally:
            self.thread.memory = before

    @contextmanager
    def resuming(self, episode: EpisodeState) -> Iterator[None]:
        """Go on with an episode that earlier calls began, maybe under another session: one control step in this block.

        Without it the calls of a thread are one episode until `reset`. Methods that remember no earlier calls do not
        look at it. Holds for this thread only, and leaves the thread's own episode as it is.

        Args:
            episode: where it stands; moves on when the block has ended well. A new `EpisodeState()` is the beginning of
                an episode.
        """
        before, recording = self.thread.recorder, None if self.hooks is None else self.hooks.listening.recording
        recorder = None if recording is None else Recorder(recording, episode.calls)
        self.thread.recorder = recorder
        try:
            yield
            if recorder is not None:
                recorder.finish()
                episode.calls = recorder.calls
        finally:
            self.thread.recorder = before

    def detach(self) -> None:
        """Take away every hook and attribute; safe to repeat."""
        self._undo.close()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        raise UnsupportedError("A model with a compressor attached cannot be copied; detach it, copy, attach again.")

    def __reduce__(self) -> Any:
        raise UnsupportedError("A model with a compressor attached cannot be pickled; detach it first.")

    def parts(self, device: torch.device) -> nn.Module | None:
        """The learned parts, for a call on that device; None for compressors without any.

        Raises:
            InputError: they are elsewhere: `model.to()` does not move them, for they are no part of the model.
        """
        if self.trained is None:
            return None
        where = {weight.device for weight in self.trained.module.parameters()} - {device}
        if where:
            raise InputError(
                f"the learned parts of {type(self.compressor).__name__} are on {where.pop()} and what they read is on "
                f"{device}; move them too: mmtoken.attached(model).trained.to({str(device)!r})."
            )
        return self.trained.module

    def run_site(
        self,
        site: str,
        layer: int | None,
        tokens: VisualTokens,
        context: Context,
        method: Callable[[VisualTokens], VisualTokens],
    ) -> VisualTokens:
        """Call the compressor at a site and note what it read and did."""
        before = tokens.counts()
        context.scores = context.timings = None
        context.learned = self.parts(tokens.features.device)
        started = self.clock()
        left = method(tokens)
        seconds = self.clock() - started
        kept = left.kept()
        scores = None if context.scores is None else tokens.per_item(context.scores.detach())
        made = SiteReport(site, layer, before, [len(k) for k in kept], kept, seconds, scores)
        made.timings.update(context.timings or {})
        self.note(made)
        return left

    def note(self, site: SiteReport) -> None:
        """Add a compressor call to the report being filled."""
        if self.thread.report is None:
            self.thread.report = Report(type(self.compressor).__name__)
        self.thread.report.sites.append(site)

    def take_report(self) -> Report | None:
        """The report being filled, handed over to whoever files it."""
        report, self.thread.report = self.thread.report, None
        return report

    def file(self, report: Report) -> None:
        """Add a finished report; features stay with the last one of each thread only."""
        report.kernels = ran_since(self.thread.ran)
        if self.thread.latest is not None:
            self.thread.latest.tokens = None
        self.reports.append(report)
        del self.reports[:-MAX_REPORTS]
        self.thread.latest = report


def attached(model: nn.Module) -> Session | None:
    """The session of a model that has a compressor attached, None for a plain model."""
    session: Session | None = unwrapped(model).__dict__.get(_ATTACHED)
    return session


def attach(
    model: nn.Module,
    compressor: Compressor | Trained | str | dict[str, Any],
    *,
    visual: Tensor | None = None,
    mode: Mode = "drop",
    per: Per = "item",
) -> Session:
    """Attach a compressor to a model until `.detach()`.

    Args:
        model: a transformers VLM with an adapter, a bare decoder or tower, or a tower of timm or open_clip; also inside
            peft's or DDP's wrapper.
        compressor: an instance, a name ("fastv"), or {"class_path": ..., "init_args": {...}}; one with learned parts
            comes as a `Trained`, which `learnable` makes.
        visual: bool[B, L] marks visual positions of the prompt; needed for bare decoders only.
        mode: "drop" takes tokens out of the decoder, "mask" only hides them from the others.
        per: what `keep` counts by: "item" (an image or a video), or "crop" (the thumbnail and every crop of an image
            by themselves; see docs/any-resolution.md).

    Returns:
        The session; `session.report` holds the measurements of the last prefill.

    Raises:
        UnsupportedError: this backbone cannot host the compressor; the message says why.
        MMTokenError: a compressor is attached already.
    """
    return Session(model, resolve(compressor), visual, mode, per)


def compress(
    model: nn.Module,
    compressor: Compressor | Trained | str | dict[str, Any],
    *,
    visual: Tensor | None = None,
    mode: Mode = "drop",
    per: Per = "item",
) -> Session:
    """`attach` for a with statement: `with compress(model, FastV(keep=64)) as session: model.generate(**inputs)`."""
    return attach(model, compressor, visual=visual, mode=mode, per=per)
