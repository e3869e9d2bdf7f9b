"""The masked model that hides exactly what a report says was dropped, and the decoder inputs it starts from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmtoken.engine.report import Report
from tests import oracle
from tests.backbones.tiny_models import visual_mask

KeepPerLayer = Mapping[int, Tensor]


def kept_by_layer(report: Report, rows: int, length: int, depth: int) -> dict[int, Tensor]:
    """bool[B, L] for every decoder layer: the tokens that it sees.

    Cuts between layers count from their layer on; every other site counts from the first layer on, and of those the
    last one has the say. Separators are never dropped.
    """
    keep = torch.ones(rows, length, dtype=torch.bool)
    protected = _separators(report)
    between = [site for site in report.sites if site.site == "llm_layer"]
    if not between:
        _drop(keep, report, report.kept, protected)
        return dict.fromkeys(range(depth), keep)
    masks: dict[int, Tensor] = {}
    cuts = {site.layer: site.kept for site in between}
    assert len(cuts) == len(between)
    for layer in range(depth):
        if layer in cuts:
            keep = keep.clone()
            _drop(keep, report, cuts[layer], protected)
        masks[layer] = keep
    return masks


def _drop(keep: Tensor, report: Report, kept: Sequence[Tensor], protected: Sequence[Tensor]) -> None:
    assert len(kept) == len(report.places) == len(report.item_rows)
    for row, places, left, separators in zip(report.item_rows, report.places, kept, protected, strict=True):
        keep[row, places] = False
        keep[row, places[left]] = True
        keep[row, places[separators]] = True


def _separators(report: Report) -> list[Tensor]:
    """Per item, indices into its places of the tokens that are never dropped."""
    tokens = report.tokens
    assert tokens is not None
    flags = tokens.valid & tokens.protected
    return [source[row] for source, row in zip(tokens.source, flags, strict=True)]


def keeps(report: Report, model: nn.Module, length: int) -> dict[int, Tensor]:
    """`kept_by_layer` for a call of this model on prompts of `length` tokens."""
    return kept_by_layer(report, len(report.prompt_lengths), length, len(oracle.text_model(model).layers))


def assert_items_are_the_placeholders(report: Report, model: nn.Module, inputs: oracle.Inputs) -> None:
    """The report's items are exactly the visual tokens of the prompt, each once, in order."""
    found = torch.zeros_like(inputs["input_ids"])
    for row, places in zip(report.item_rows, report.places, strict=True):
        assert bool((places.diff() > 0).all())
        found[row, places] += 1
    assert torch.equal(found, visual_mask(model, inputs).long())


@contextmanager
def masked_per_call(model: nn.Module, calls: Sequence[KeepPerLayer]) -> Iterator[nn.Module]:
    """`oracle.masked_keys`, with masks of its own for every call of the decoder; later calls use the last ones."""
    decoder = oracle.text_model(model)
    open_mask = ExitStack()
    number = iter(range(1 << 30))

    def before(*_: Any) -> None:
        keep = calls[min(next(number), len(calls) - 1)]
        open_mask.enter_context(oracle.masked_keys(model, keep))

    def after(*_: Any) -> None:
        open_mask.close()

    handles = [
        decoder.register_forward_pre_hook(before),
        decoder.register_forward_hook(after, always_call=True),
    ]
    try:
        yield model
    finally:
        open_mask.close()
        for handle in handles:
            handle.remove()


@contextmanager
def recording(model: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """The arguments of every call of the decoder, as they are before hooks that are set later act."""
    calls: list[dict[str, Any]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(dict(kwargs))

    handle = oracle.text_model(model).register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def given_embeddings(model: nn.Module, embeds: Tensor, deepstack: Any = None) -> Iterator[nn.Module]:
    """Put these embeddings (and DeepStack features) in the place of the prompt's own.

    Args:
        model: the unmodified model.
        embeds: float[B, L, D]; only calls of this length are changed, those that hold the prompt.
        deepstack: `deepstack_visual_embeds` of such a call.
    """

    def change(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs["inputs_embeds"].shape != embeds.shape:
            return None
        changed = {**kwargs, "inputs_embeds": embeds}
        return args, changed if deepstack is None else {**changed, "deepstack_visual_embeds": deepstack}

    handle = oracle.text_model(model).register_forward_pre_hook(change, with_kwargs=True)
    try:
        yield model
    finally:
        handle.remove()


def with_merged(report: Report, call: Mapping[str, Any]) -> Tensor:
    """float[B, L, D]: the decoder's input with the features of the surviving tokens at their places."""
    embeds: Tensor = call["inputs_embeds"].clone()
    tokens = report.tokens
    assert tokens is not None
    for item, (row, places) in enumerate(zip(report.item_rows, report.places, strict=True)):
        valid = tokens.valid[item]
        embeds[row, places[tokens.source[item, valid]]] = tokens.features[item, valid]
    return embeds


def alone(model: nn.Module, cell: tuple[str, str], inputs: oracle.Inputs, row: int) -> dict[str, Tensor]:
    """One row of a batch as a batch of its own: no padding, its own pixels only."""
    family, modality = cell
    real = inputs["attention_mask"][row].bool()
    single = {
        name: inputs[name][row : row + 1, real]
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
        if name in inputs
    }
    visual = visual_mask(model, inputs)
    if not visual[row].any():
        return single
    if family in ("smolvlm", "idefics3"):
        # Rows are padded with empty tiles.
        tiles = inputs["pixel_values"][row].flatten(1).ne(0).any(-1)
        return single | {name: inputs[name][row : row + 1, tiles] for name in ("pixel_values", "pixel_attention_mask")}
    first, last = _items(cell, inputs, visual, row)
    if family in ("qwen2_5_vl", "qwen3_vl"):
        grid = f"{modality}_grid_thw"
        pixels = "pixel_values" if modality == "image" else "pixel_values_videos"
        patches = inputs[grid].prod(-1)
        start, stop = int(patches[:first].sum()), int(patches[:last].sum())
        single |= {pixels: inputs[pixels][start:stop], grid: inputs[grid][first:last]}
        if "second_per_grid_ts" in inputs:
            single["second_per_grid_ts"] = inputs["second_per_grid_ts"][first:last]
        return single
    names = ("pixel_values", "pixel_values_videos", "image_sizes")
    single |= {name: inputs[name][first:last] for name in names if name in inputs}
    if "batch_num_images" in inputs:
        single["batch_num_images"] = torch.tensor([last - first])
    return single


def _items(cell: tuple[str, str], inputs: oracle.Inputs, visual: Tensor, row: int) -> tuple[int, int]:
    """Which images or videos of the batch belong to a row."""
    counts = [int(n) for n in visual.sum(-1)]
    if "batch_num_images" in inputs:
        numbers = iter(inputs["batch_num_images"].tolist())
        per_row = [next(numbers) if n else 0 for n in counts]
    elif cell == ("llava", "image"):
        per_row = [n // 16 for n in counts]
    elif cell == ("llava_onevision", "video"):
        per_row = [n // 17 for n in counts]
    else:
        sizes = iter((inputs[f"{cell[1]}_grid_thw"].prod(-1) // 4).tolist())
        per_row = []
        for n in counts:
            items = 0
            while n:
                n -= next(sizes)
                items += 1
            per_row.append(items)
    first = sum(per_row[:row])
    return first, first + per_row[row]
