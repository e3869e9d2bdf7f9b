"""Compresses a processor's output instead of a model: shorter inputs for the unmodified model, no hooks left."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from mmtoken.backbones.base import Modality
from mmtoken.backbones.registry import adapt
from mmtoken.compressors.base import Compressor
from mmtoken.compressors.registry import resolve
from mmtoken.compressors.trained import Trained, settings_of
from mmtoken.engine import gather
from mmtoken.engine.compat import takes_encoded_images
from mmtoken.engine.positions import generation_positions, renumber
from mmtoken.engine.prompt import read_prompt
from mmtoken.engine.session import Session
from mmtoken.errors import InputError, UnsupportedError

_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


def compress_inputs(
    model: PreTrainedModel, compressor: Compressor | Trained | str | dict[str, Any], inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """Encode the images of `inputs` and return inputs that hold the kept visual tokens only.

    `model.generate(**compress_inputs(model, DivPrune(keep=64), inputs))` gives what generate gives with the compressor
    attached, as long as the prompt fits into the model's sliding windows, if it has any: in the short prompt they count
    the tokens that are left. `torch.compile(model, fullgraph=True)` works on the result. The prompt in it is short:
    `generate` returns the short prompt followed by the answer.

    Args:
        model: a transformers VLM with an adapter and nothing attached.
        compressor: acts before the language model (sites frames, vision_layer, project, llm_input).
        inputs: what the processor returned: input_ids int[B, L], attention_mask, pixels, grids or sizes.

    Returns:
        input_ids int[B, l], attention_mask, position_ids (the original ones of the kept tokens, or renumbered),
        mm_encoder_outputs, token types, and everything else of `inputs` except the pixels and what encodes them.

    Raises:
        UnsupportedError: the compressor acts inside the language model, or this transformers version has no
            `mm_encoder_outputs`.
        InputError: input_ids or pixels are missing.
    """
    given = resolve(compressor)
    method = settings_of(given)
    backbone = adapt(model)
    if backbone.decoder is None or backbone.tower() is None:
        raise UnsupportedError(
            f"compress_inputs needs a model that encodes images into a prompt; this is a {backbone.name}."
        )
    if method.sites & {"llm_layer", "cache"}:
        raise UnsupportedError(
            f"{type(method).__name__} acts between decoder layers or on their cache, so no shorter prompt exists; use "
            "compress()."
        )
    if not takes_encoded_images(backbone.root):
        raise UnsupportedError(
            "This transformers version takes no mm_encoder_outputs; upgrade transformers, or use compress()."
        )
    with Session(model, given, None) as session:
        return _compress(model, method, session, dict(inputs))


def _compress(model: PreTrainedModel, method: Compressor, session: Session, inputs: dict[str, Any]) -> dict[str, Any]:
    backbone = session.backbone
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor):
        raise InputError("inputs has no input_ids; hand in what the processor returned.")
    assert session.hooks is not None
    positions = generation_positions(model, inputs)
    if "prompt" in method.needs:
        session.thread.asked = read_prompt(session, ids, None, inputs.get("attention_mask"), None)
    outputs, used = _encode(session, inputs)
    if not outputs:
        raise InputError("inputs has no pixel_values or pixel_values_videos; there is nothing to compress.")
    embeds = model.get_input_embeddings()(ids)
    visual: dict[str, Tensor] = {}
    for modality, output in outputs.items():
        mask = visual[modality] = ids == backbone.placeholder_ids(modality)
        features = _flat(output.pooler_output)
        if int(mask.sum()) != len(features):
            raise InputError(
                f"input_ids has {int(mask.sum())} {modality} tokens but the {modality}s give {len(features)} features."
            )
        embeds = embeds.masked_scatter(mask[..., None], features.to(embeds.dtype))
    call, embeds, keep = session.hooks.plan(ids, inputs.get("attention_mask"), positions, embeds, visual, outputs)
    short: dict[str, Any] = {name: value for name, value in inputs.items() if name not in used}
    if method.positions == "renumber":
        positions, _ = renumber(positions, call.dropped, call.items.spans())
    index, valid = gather.right_aligned(keep)
    real = gather.last(call.real, index)
    real = real if valid is None else real & valid
    padding = getattr(model.config.get_text_config(), "pad_token_id", None) or 0
    short["position_ids"] = gather.last(positions, index)
    short["input_ids"] = gather.last(ids, index).masked_fill(~real, padding)
    short["attention_mask"] = real.long()
    for name in _TOKEN_TYPES:
        if isinstance(inputs.get(name), Tensor):
            short[name] = gather.last(inputs[name], index).masked_fill(~real, 0)
    for modality, output in outputs.items():
        missing = _shorten_output(output, embeds, keep, visual[modality])
        if missing is not None:
            _pad_placeholders(short, missing, backbone.placeholder_ids(modality), padding)
    short["mm_encoder_outputs"] = outputs
    return short


def _encode(session: Session, inputs: dict[str, Any]) -> tuple[dict[Modality, Any], set[str]]:
    """Run the model's own encoders; also the names of the inputs that they consumed."""
    outputs: dict[Modality, Any] = {}
    used: set[str] = set()
    root = session.backbone.root
    for modality in session.backbone.modalities:
        encoder = getattr(root, f"get_{modality}_features")
        names = set(inspect.signature(encoder).parameters) & set(inputs)
        pixels = {"pixel_values" if modality == "image" else "pixel_values_videos"} & names
        used |= names
        if pixels and inputs[next(iter(pixels))] is not None:
            outputs[modality] = encoder(**{name: inputs[name] for name in names}, return_dict=True)
    return outputs, used


def _flat(features: Any) -> Tensor:
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in features])


def _shorten_output(output: Any, embeds: Tensor, keep: Tensor, visual: Tensor) -> Tensor | None:
    """Replace the features of an encoder output by the kept ones, one entry per prompt row.

    Entries per row let `generate` repeat them for beams, which it matches by cumulative counts. Models that stack
    their features keep one entry per item if all are left with equal counts; otherwise shorter rows are filled up with
    zeros in front.

    Returns:
        int[B]: how many zeros each row got, None if no row needed any.
    """
    left = keep & visual
    counts = left.sum(-1)
    parts = list(torch.split(embeds[left], [n for n in counts.tolist() if n]))
    deepstack = getattr(output, "deepstack_features", None)
    if deepstack is not None:
        lengths = [len(part) for part in parts]
        output.deepstack_features = [list(torch.split(_flat(layer)[keep[visual]], lengths)) for layer in deepstack]
    if not isinstance(output.pooler_output, Tensor):
        output.pooler_output = parts
        return None
    width, items = embeds.shape[-1], len(output.pooler_output)
    if len(set(keep[visual].view(items, -1).sum(-1).tolist())) == 1:
        output.pooler_output = embeds[left].view(items, -1, width)
        return None
    longest = int(counts.max())
    output.pooler_output = torch.stack([F.pad(part, (0, 0, longest - len(part), 0)) for part in parts])
    missing = torch.where(counts > 0, longest - counts, 0)
    return missing if bool(missing.any()) else None


def _pad_placeholders(short: dict[str, Any], missing: Tensor, placeholder: int, padding: int) -> None:
    """Give each row masked placeholders for the zeros that its features were filled up with."""
    lengths = short["attention_mask"].sum(-1) + missing
    extra = max(0, int(lengths.max()) - short["input_ids"].shape[1])
    for name, value in (
        ("input_ids", padding),
        ("attention_mask", 0),
        ("position_ids", 0),
        *((n, 0) for n in _TOKEN_TYPES),
    ):
        if name in short:
            short[name] = F.pad(short[name], (extra, 0), value=value)
    column = torch.arange(short["input_ids"].shape[1], device=missing.device)
    first = (column.numel() - short["attention_mask"].sum(-1))[:, None]
    masked = (column < first) & (column >= first - missing[:, None])
    short["input_ids"] = short["input_ids"].masked_fill(masked, placeholder)
