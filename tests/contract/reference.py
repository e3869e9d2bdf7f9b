"""The masked model that hides exactly what a report says was dropped, and the decoder inputs it starts from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmtoken import attached
from mmtoken.compressors import Compressor, Context
from mmtoken.engine.report import Report
from mmtoken.tokens import VisualTokens
from tests import oracle
from tests.backbones.tiny_models import COHERE, NEXT, NEXT_SIZES, QWEN, STACKED, TILES, visual_mask

IDEFICS = ("smolvlm", "idefics3")
CLIP = ("llava", "llava_next", "llava_next_video", "video_llava")
"""Families whose tower has a CLS token, and whose projector reads the output of its last block but one."""
CLS = (*CLIP, "internvl")
"""Families whose tower is dense and has a CLS token."""

KeepPerLayer = Mapping[int, Tensor]


def kept_by_layer(report: Report, separators: Tensor, depth: int) -> dict[int, Tensor]:
    """bool[B, L] for every decoder layer: the tokens that it sees.

    Cuts between layers count from their layer on; what was decided at other sites counts from the first layer on.

    Args:
        report: of one prefill.
        separators: bool[b, L], see `separators`; beams repeat its rows.
        depth: layers of the decoder.
    """
    rows = len(report.prompt_lengths)
    never = separators.repeat_interleave(rows // len(separators), 0)
    if report.compressor in ("QuoTA", "VideoScan"):  # what leaves of a frame takes separators along; others keep them
        never = torch.zeros_like(never)
        for row, places, left in zip(report.item_rows, report.places, report.separators, strict=True):
            never[row, places[left]] = True

    def mask(kept: Sequence[Tensor]) -> Tensor:
        keep = torch.ones_like(never)
        for row, places, left in zip(report.item_rows, report.places, kept, strict=True):
            keep[row, places] = False
            keep[row, places[left]] = True
        return keep | never

    cuts = {site.layer: mask(site.kept) for site in report.sites if site.site == "llm_layer"}
    if not cuts:
        return dict.fromkeys(range(depth), mask(report.kept))
    keep = mask(report.entered)
    masks = {}
    for layer in range(depth):
        keep = masks[layer] = cuts.get(layer, keep)
    return masks


def evicted_by_layer(report: Report, keep: KeepPerLayer) -> dict[int, Tensor]:
    """bool[B, G, L] for every layer that the cache site acted on: the keys that tokens after the prompt see per head.

    Only visual tokens may have been evicted.

    Args:
        report: of one prefill.
        keep: what the layers see during the prefill, from `kept_by_layer`.
    """
    masks = {}
    for site in report.sites:
        if site.site != "cache" or site.heads is None or site.layer is None:
            continue
        groups = len(site.heads[0])
        seen = keep[site.layer][:, None].repeat(1, groups, 1)
        for item, (row, places) in enumerate(zip(report.item_rows, report.places, strict=True)):
            for head, left in enumerate(site.heads[item]):
                gone = torch.ones(len(places), dtype=torch.bool)
                gone[left] = False
                assert report.tokens is not None
                where = report.tokens.valid[item] & report.tokens.protected[item]
                gone[report.tokens.source[item, where].cpu()] = False
                seen[row, head, places[gone]] = False
        masks[site.layer] = seen
    return masks


def tower_of(model: nn.Module, modality: str = "image") -> nn.Module:
    """The dense tower that encodes images, or videos."""
    names = {"video_llava": f"{modality}_tower", **dict.fromkeys(IDEFICS, "vision_model")}
    tower: nn.Module = getattr(model.base_model, names.get(model.config.model_type, "vision_tower"))
    return tower


def tower_blocks(model: nn.Module, modality: str = "image") -> list[nn.Module]:
    """The blocks of a dense tower."""
    encoder = tower_of(model, modality).encoder
    return list(encoder.layer if model.config.model_type == "internvl" else encoder.layers)


def read_blocks(model: nn.Module, modality: str = "image") -> list[nn.Module]:
    """The blocks of a dense tower, up to the one that the projector reads."""
    return tower_blocks(model, modality)[: -1 if model.config.model_type in CLIP else None]


def attention_in(block: nn.Module) -> nn.Module:
    """The attention of a block of a dense tower."""
    attention: nn.Module = block.attention if hasattr(block, "attention") else block.self_attn
    return attention


def unit_of(model: nn.Module) -> int:
    """The side of the square of patches that a dense tower's projector turns into one token."""
    config = model.config
    if config.model_type == "internvl":
        return round(1 / config.downsample_ratio)
    if config.model_type in COHERE:
        return config.downsample_factor
    if config.model_type == "gemma3":
        vision = config.vision_config
        return vision.image_size // vision.patch_size // math.isqrt(config.mm_tokens_per_image)
    return config.scale_factor if config.model_type in IDEFICS else 1


def separators(model: nn.Module, inputs: oracle.Inputs) -> Tensor:
    """bool[B, L]: newline tokens among the visual ones, found as those whose embedding is the model's newline.

    In Video-LLaVA the first token of each frame, its CLS.
    """
    visual = visual_mask(model, inputs)
    if model.config.model_type == "video_llava":
        video = inputs["input_ids"] == model.config.video_token_id
        return video & (video.cumsum(-1) % 17 == 1)
    newline = getattr(model.base_model, "image_newline", None)
    if newline is None:
        return torch.zeros_like(visual)
    with recording(model) as calls, torch.no_grad():
        model(**oracle.clone(inputs))
    return visual & (calls[0]["inputs_embeds"] == newline).all(-1)


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
        session = attached(module)  # type: ignore[arg-type]
        if session is not None and session.thread.aside:
            return  # the compressor reads the question, which is no call of the model's
        calls.append(dict(kwargs))

    handle = oracle.text_model(model).register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def given_prompts(model: nn.Module, prompts: Sequence[Mapping[str, Any]]) -> Iterator[nn.Module]:
    """Put other embeddings (and DeepStack features) in the place of the prompts' own.

    Args:
        model: the unmodified model.
        prompts: arguments of decoder calls; a call of the shape of one of them gets its features.
    """
    by_shape = {prompt["inputs_embeds"].shape[:2]: prompt for prompt in prompts}

    def change(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        prompt = by_shape.get((ids if embeds is None else embeds).shape[:2])
        if prompt is None:
            return None
        names = ("inputs_embeds", "deepstack_visual_embeds")
        return args, {**kwargs, "input_ids": None, **{name: prompt[name] for name in names if name in prompt}}

    handle = oracle.text_model(model).register_forward_pre_hook(change, with_kwargs=True)
    try:
        yield model
    finally:
        handle.remove()


def prompts_of(method: Compressor, reports: Sequence[Report], calls: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Calls of the decoder as a method that merges before it leaves them; none for others."""
    if not method.merges or "llm_layer" in method.sites:
        return []
    return [with_merged(reports[-1], call) for call in calls[: len(reports)]]


def as_entered(call: Mapping[str, Any], short: Mapping[str, Any], keep: Tensor) -> dict[str, Any]:
    """A call of the decoder with the features that the compressed one got.

    Args:
        call: the uncompressed call.
        short: the same call as the compressed decoder got it.
        keep: bool[B, L], the tokens that are left in it, padding not among them.
    """
    embeds: Tensor = call["inputs_embeds"].clone()
    for row, left in zip(range(len(keep)), keep, strict=True):
        embeds[row, left] = short["inputs_embeds"][row, -int(left.sum()) :]
    return {**call, "inputs_embeds": embeds}


def with_merged(report: Report, call: Mapping[str, Any]) -> dict[str, Any]:
    """A call of the decoder with the features of the surviving tokens at their places."""
    embeds: Tensor = call["inputs_embeds"].clone()
    tokens = report.tokens
    assert tokens is not None
    for item, (row, places) in enumerate(zip(report.item_rows, report.places, strict=True)):
        valid = tokens.valid[item]
        embeds[row, places[tokens.source[item, valid]]] = tokens.features[item, valid]
    return {**call, "inputs_embeds": embeds}


@contextmanager
def noting_merged(method: Compressor) -> Iterator[list[tuple[int, VisualTokens]]]:
    """What a method that merges between decoder layers leaves: (layer, tokens) of every cut, call after call."""
    notes: list[tuple[int, VisualTokens]] = []
    cls: Any = type(method)
    if not method.merges or "llm_layer" not in method.sites:
        yield notes
        return
    original = cls.llm_layer

    def noting(self: Compressor, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        left: VisualTokens = original(self, tokens, layer, ctx)
        notes.append((layer, left))
        return left

    cls.llm_layer = noting
    try:
        yield notes
    finally:
        cls.llm_layer = original


@contextmanager
def given_merged(
    model: nn.Module, notes: Sequence[tuple[int, VisualTokens]], reports: Sequence[Report], beams: int = 1
) -> Iterator[nn.Module]:
    """Put merged features in the place of what enters decoder layers.

    Args:
        model: the unmodified model.
        notes: see `noting_merged`.
        reports: of the same calls; the last one stands for later prompts.
        beams: how often each row was repeated in these calls and is not now.
    """
    by_layer: dict[int, list[VisualTokens]] = {}
    for layer, tokens in notes:
        by_layer.setdefault(layer, []).append(tokens)

    def hook(left: list[VisualTokens]) -> Any:
        number = iter(range(1 << 30))

        def change(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0]
            if hidden.shape[1] <= max(int(places.max()) for places in reports[0].places):
                return None  # no prompt
            call = min(next(number), len(left) - 1)
            hidden, report = hidden.clone(), reports[min(call, len(reports) - 1)]
            for item, (row, places) in enumerate(zip(report.item_rows, report.places, strict=True)):
                if row % beams:
                    continue
                where = left[call].valid[item]
                hidden[row // beams, places[left[call].source[item, where]]] = left[call].features[item, where]
            return (hidden, *args[1:]), kwargs

        return change

    layers = oracle.text_model(model).layers
    handles = [
        layers[layer].register_forward_pre_hook(hook(left), with_kwargs=True) for layer, left in by_layer.items()
    ]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def alone(model: nn.Module, cell: tuple[str, str], inputs: oracle.Inputs, row: int) -> dict[str, Tensor]:
    """One row of a batch as a batch of its own: no padding, its own pixels only."""
    family, modality = cell
    real = inputs["attention_mask"][row].bool()
    single = {
        name: inputs[name][row : row + 1, real]
        for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
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
    if family in QWEN:
        grid = f"{modality}_grid_thw"
        pixels = "pixel_values" if modality == "image" else "pixel_values_videos"
        patches = inputs[grid].prod(-1)
        start, stop = int(patches[:first].sum()), int(patches[:last].sum())
        single |= {pixels: inputs[pixels][start:stop], grid: inputs[grid][first:last]}
        if "second_per_grid_ts" in inputs:
            single["second_per_grid_ts"] = inputs["second_per_grid_ts"][first:last]
        return single
    names = ("pixel_values", "pixel_values_images", "pixel_values_videos", "image_sizes")
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
    elif cell in STACKED:
        per_row = [n // STACKED[cell] for n in counts]
    elif cell[0] in TILES:
        per_row = [n // 16 for n in counts]
    else:
        if cell[0] in NEXT:
            tokens = {size: number for size, _, number in NEXT_SIZES}
            sizes = iter([tokens[height, width] for height, width in inputs["image_sizes"].tolist()])
        elif cell[0] == "mistral3":
            sizes = iter((inputs["image_sizes"] // 28).prod(-1).tolist())
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
