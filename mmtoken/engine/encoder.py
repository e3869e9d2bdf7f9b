"""Listens to a model's image and video encoders."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mmtoken.backbones.base import Modality
from mmtoken.engine.encode import Encoded, EncoderCall, FrameContext, choose_frames, fill_frames, pictures
from mmtoken.engine.prefill import check_placeholders
from mmtoken.engine.prompt import known
from mmtoken.engine.report import Report, SiteReport
from mmtoken.errors import UnsupportedError
from mmtoken.kernels.dispatch import ran

if TYPE_CHECKING:
    from mmtoken.engine.session import Session

_RECORD = "mmtoken_encoded"


def wrap_encoder(session: Session, modality: Modality, undo: ExitStack) -> None:
    """Listen to `get_image_features` / `get_video_features` of this instance until `undo` closes.

    They are public methods, not modules, so there is no hook for them; `generate` calls them before and apart from the
    forward, and only they see the grids and image sizes. The result carries what was learnt as an attribute.
    """
    root = session.backbone.root
    name = f"get_{modality}_features"
    original = getattr(root, name)
    signature = inspect.signature(original)

    @functools.wraps(original)
    def encode(*args: Any, **kwargs: Any) -> Any:
        state = session.thread
        if state.encoder is not None:  # Qwen encodes videos through its image method
            return original(*args, **kwargs)
        bound = signature.bind(*args, **kwargs).arguments
        given = {**bound, **bound.get("kwargs", {})}
        given.pop("kwargs", None)
        state.report = Report(type(session.compressor).__name__)
        started, before = session.clock(), ran()
        arguments, picks = _pick_frames(session, modality, given)
        call = state.encoder = EncoderCall(modality, arguments)
        try:
            output = original(**arguments)
        finally:
            state.encoder = None
        method, backbone = session.compressor, session.backbone
        record = call.finish(backbone, method.needs, "vision_layer" in method.sites)
        if picks is not None:
            tiles = sum(len(clip) for clip in backbone.clips(given))
            record = fill_frames(output, record, backbone.layout(modality, given, tiles), picks)
        report = session.take_report()
        record.sites = [] if report is None else report.sites
        record.seconds, record.ran = session.clock() - started, ran() - before
        if hasattr(output, "pooler_output"):
            setattr(output, _RECORD, record)
            state.made[modality] = output
        if state.encoded is not None:  # inside a forward
            state.encoded[modality] = record
            if state.visual is not None and modality in state.visual:
                check_placeholders(state.visual[modality], record)
        return output

    object.__setattr__(root, name, encode)
    undo.callback(root.__dict__.pop, name, None)


def _pick_frames(
    session: Session, modality: Modality, given: dict[str, Any]
) -> tuple[dict[str, Any], list[Tensor] | None]:
    """Leave whole frames of videos out before they are encoded, if the method does that."""
    method, backbone = session.compressor, session.backbone
    if modality != "video" or "frames" not in method.sites:
        return given, None
    clips = backbone.clips(given)
    started = session.clock()
    picks = choose_frames(method, clips, _frame_contexts(session, given, clips))
    before, after = [len(clip) for clip in clips], [len(pick) for pick in picks]
    session.note(SiteReport("frames", None, before, after, picks, session.clock() - started))
    return backbone.with_frames(given, picks), picks


def _frame_contexts(session: Session, given: dict[str, Any], clips: list[Tensor]) -> list[FrameContext]:
    """What the method may ask of each video before it is encoded."""
    needs, backbone = session.compressor.needs, session.backbone
    seeds = EncoderCall("video", given).seeds(backbone) if "content_seed" in needs else None
    prompt, rows = None, None
    if "prompt" in needs:
        prompt = known(session.thread)
        rows = prompt.item_rows("video", backbone.layout("video", given, sum(len(clip) for clip in clips)))
    shown = functools.cache(functools.partial(pictures, backbone, given))
    contexts = []
    for number, clip in enumerate(clips):
        asked = None if prompt is None or rows is None else (prompt, rows[number : number + 1])
        show = (lambda number=number: shown()[number]) if "pixels" in needs else None
        contexts.append(FrameContext([len(clip)], None if seeds is None else seeds[number], asked, show))
    return contexts


def encoded_by(
    outputs: Any, made: Collection[str] = (), carried: Mapping[str, Encoded] | None = None
) -> dict[str, Encoded]:
    """What the encoders left behind in their outputs, per modality; outputs of others are passed over.

    Args:
        outputs: per modality.
        made: modalities that this session has encoded for a call that is still running.
        carried: what they had left behind in outputs that were copied since.

    Raises:
        UnsupportedError: instead of a whole output of this session, a part of it came.
    """
    records = {name: getattr(output, _RECORD) for name, output in outputs.items() if hasattr(output, _RECORD)}
    records = {name: record for name, record in (carried or {}).items() if name in outputs} | records
    for name in outputs:
        if name in made and name not in records:
            raise UnsupportedError(
                f"the {name} features come in parts, but a compressor must see all visual tokens of a prompt at once; "
                "leave prefill_chunk_size unset, or use compress_inputs()."
            )
    return records


def forget(output: Any) -> None:
    """Take the record off an encoder output that leaves the session."""
    output.__dict__.pop(_RECORD, None)
