"""Merged features and the tokens that hold them, computed again in the plainest way from the unmodified model."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmtoken.engine.report import Report
from tests import oracle
from tests.backbones.tiny_models import CELLS, QWEN, TOKENWISE
from tests.contract.matrix import (
    COMPRESSORS,
    TILED,
    Cell,
    assert_close,
    batch,
    compress,
    logits,
    pairs,
    protected,
    tiny,
)
from tests.contract.reference import CLIP, CLS, attention_in, read_blocks, recording, unit_of
from tests.contract.test_selections import GAP, best, count_of, steps_of


def report_of(name: str, cell: Cell, case: str, seed: int = 1) -> Report:
    with compress(tiny(cell[0]), COMPRESSORS[name]) as session:
        logits(tiny(cell[0]), batch(cell, case, seed))
    return session.report


def projected(cell: Cell, case: str, seed: int = 1) -> Tensor:
    """float[B, L, D]: what the unmodified decoder gets."""
    with recording(tiny(cell[0])) as calls:
        logits(tiny(cell[0]), batch(cell, case, seed))
    embeds: Tensor = calls[0]["inputs_embeds"]
    return embeds


def features_left(report: Report, item: int) -> dict[int, Tensor]:
    """Features by index into the item's places."""
    tokens = report.tokens
    assert tokens is not None
    where = tokens.eligible[item].nonzero()[:, 0]
    return {int(tokens.source[item, i]): tokens.features[item, i] for i in where}


def assert_same_features(got: dict[int, Tensor], want: dict[int, Tensor]) -> None:
    assert sorted(got) == sorted(want)
    assert_close(torch.stack([got[i] for i in sorted(got)]), torch.stack([want[i] for i in sorted(want)]))


# ------------------------------------------------------------------------------------------------------ down-scaling

# (rows, columns) that 0.4 of each grid is pooled to; a grid of None is a sequence without a shape.
SMALLER = {(1, 4, 4): (2, 3), (1, 3, 3): (2, 2), (4, 2, 2): (1, 1), (4, 4, 4): (2, 3)}


def window(i: int, parts: int, total: int) -> range:
    """The i-th of `parts` windows that cover `total` cells."""
    return range(i * total // parts, -(-(i + 1) * total // parts))


@pairs(["downscale"])
@pytest.mark.parametrize("case", ["plain", "padded_ragged", "multi_image"])
def test_downscaling_averages_windows_of_the_grid(name: str, cell: Cell, case: str) -> None:
    report, embeds, separators = report_of(name, cell, case), projected(cell, case), protected(cell, case)
    assert report.tokens is not None
    for item, (row, places) in enumerate(zip(report.item_rows, report.places, strict=True)):
        mine = [place for place in places.tolist() if not separators[row, place]]
        indices = [i for i, place in enumerate(places.tolist()) if not separators[row, place]]
        grid = report.tokens.grid[item]
        if grid is None or math.prod(grid) != len(mine):
            count = count_of(COMPRESSORS[name].keep, len(mine), 1)
            cells = [[mine[i] for i in window(c, count, len(mine))] for c in range(count)]
            middles = [(2 * c + 1) * len(mine) // (2 * count) for c in range(count)]
        else:
            frames, height, width = grid
            rows, columns = SMALLER[grid]
            cells, middles = [], []
            for frame, r, c in itertools.product(range(frames), range(rows), range(columns)):
                inside = itertools.product(window(r, rows, height), window(c, columns, width))
                cells.append([mine[(frame * height + y) * width + x] for y, x in inside])
                y, x = (2 * r + 1) * height // (2 * rows), (2 * c + 1) * width // (2 * columns)
                middles.append((frame * height + y) * width + x)
        want = {indices[middle]: embeds[row, members].mean(0) for middle, members in zip(middles, cells, strict=True)}
        assert_same_features(features_left(report, item), want)


# --------------------------------------------------------------------------------------------------------- VisionZip


@torch.no_grad()
def tower_facts(cell: Cell, case: str, seed: int = 1) -> tuple[Tensor, Tensor]:
    """(attention received float[tokens], head-averaged keys float[tokens, d]) of the feature block, in prompt order."""
    family, inputs = cell[0], batch(cell, case, seed)
    model = tiny(family, "eager")
    if family in QWEN:
        return _qwen_facts(model, cell, inputs)
    if family == "openvla":
        query, keys = openvla_states(model, inputs)
        weights = torch.einsum("thqd,thkd->thqk", query[:, :, :1], keys) * keys.shape[-1] ** -0.5
        # What CLS pays to the patches behind the registers.
        return weights.softmax(-1)[:, :, 0, 5:].sum(1).flatten(), keys.mean(1)[:, 5:].flatten(0, 1)
    block = attention_in(read_blocks(model, cell[1])[-1])
    seen: dict[str, Any] = {}

    def note(key: str) -> Any:
        return lambda module, args, output: seen.__setitem__(key, output)

    handles = [block.k_proj.register_forward_hook(note("keys")), block.register_forward_hook(note("attention"))]
    logits(model, inputs)
    for handle in handles:
        handle.remove()
    weights, keys = seen["attention"][1], seen["keys"]
    heads = weights.shape[1]
    keys = keys.unflatten(-1, (heads, -1)).mean(-2)
    if family in CLIP:  # what CLS pays
        paid, keys = weights[:, :, 0, 1:].sum(1), keys[:, 1:]
        if cell == ("video_llava", "video"):  # the CLS of each frame is in the prompt
            paid, keys = nn.functional.pad(paid, (1, 0)), nn.functional.pad(keys, (0, 0, 1, 0))
        if cell == ("llava_next_video", "video"):  # squares of 2 x 2 patches
            squares = [[4 * y + x, 4 * y + x + 1, 4 * y + x + 4, 4 * y + x + 5] for y in (0, 2) for x in (0, 2)]
            paid = torch.stack([paid[:, square].mean(1) for square in squares], 1)
            keys = torch.stack([keys[:, square].mean(1) for square in squares], 1)
        return paid.flatten(), keys.flatten(0, 1)
    if family in CLS:
        received, keys = weights[:, :, 0, 1:].sum(1), keys[:, 1:]
    else:
        real = weights.sum((1, 2)) > 0  # padding is looked at by nobody, and does not count among those who look
        received = (weights.sum(1) * real[..., None]).sum(1) / real.sum(-1, keepdim=True)
    if family == "llava_onevision":
        pool = model.base_model.apply_pooling
        videos = inputs["pixel_values_videos"].shape[0]
        received = nn.functional.pad(pool(received[..., None]).reshape(videos, -1), (0, 1))  # the newline comes last
        pooled = pool(keys)
        return received.flatten(), nn.functional.pad(pooled.reshape(videos, -1, keys.shape[-1]), (0, 0, 0, 1)).flatten(
            0, 1
        )
    if family == "llava_video":  # a newline after each row of two
        pool = model.base_model.apply_pooling
        pooled = pool(torch.cat([received[..., None], keys], -1))
        pooled = nn.functional.pad(pooled.reshape(-1, 2, pooled.shape[-1]), (0, 0, 0, 1)).flatten(0, 1)
        return pooled[:, 0], pooled[:, 1:]
    side = math.isqrt(received.shape[1])
    unit = unit_of(model)
    squares = [
        [(y + dy) * side + x + dx for dy in range(unit) for dx in range(unit)]
        for y in range(0, side, unit)
        for x in range(0, side, unit)
    ]
    return (
        torch.stack([received[:, square].mean(1) for square in squares], 1).flatten(),
        torch.stack([keys[:, square].mean(1) for square in squares], 1).flatten(0, 1),
    )


def openvla_states(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Queries and keys float[images, H, S, d] of the block of DINOv2 that the projector reads."""
    found: list[Tensor] = []
    attention = model.vision_backbone.featurizer.blocks[-2].attn
    handle = attention.qkv.register_forward_hook(lambda module, args, output: found.append(output))
    logits(model, inputs)
    handle.remove()
    query, key, _ = found[0].unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return query, key


def _qwen_facts(model: nn.Module, cell: Cell, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    visual = model.base_model.visual
    attention = visual.blocks[-1].attn
    seen: dict[str, Any] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs, hidden=args[0] if args else kwargs["hidden_states"])

    handle = attention.register_forward_pre_hook(note, with_kwargs=True)
    logits(model, inputs)
    handle.remove()
    length, heads = len(seen["hidden"]), model.config.vision_config.num_heads
    query, key, _ = attention.qkv(seen["hidden"]).reshape(length, 3, heads, -1).unbind(1)
    cosine, sine = (table[:, None] for table in seen["position_embeddings"])

    def rotate(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * cosine + torch.cat([-x[..., half:], x[..., :half]], -1) * sine

    grids = inputs[f"{cell[1]}_grid_thw"]
    received = torch.zeros(length)
    start = 0
    for frames, height, width in grids.tolist():
        for _ in range(frames):
            frame = slice(start, start + height * width)
            scores = torch.einsum("qhd,khd->hqk", rotate(query)[frame], rotate(key)[frame]) * key.shape[-1] ** -0.5
            received[frame] = scores.softmax(-1).mean(1).sum(0)
            start += height * width
    per_unit, keys = received.view(-1, 4).mean(1), key.mean(1).view(length // 4, 4, -1).mean(1)
    if cell[0] == "qwen2_5_vl":  # this tower holds windows together
        order = torch.cat(_windows(grids.tolist()))
        back = order.argsort()
        per_unit, keys = per_unit[back], keys[back]
    return per_unit, keys


def _windows(grids: list[list[int]]) -> list[Tensor]:
    """Units in the order of windows of 2 x 2 units, per frame."""
    parts, start = [], 0
    for frames, height, width in grids:
        rows, columns = height // 2, width // 2
        for _ in range(frames):
            corners = itertools.product(range(0, rows, 2), range(0, columns, 2))
            order = [
                start + y * columns + x
                for top, left in corners
                for y in range(top, min(top + 2, rows))
                for x in range(left, min(left + 2, columns))
            ]
            parts.append(torch.tensor(order))
            start += rows * columns
    return parts


ZIPPED = [cell for cell in CELLS if cell not in TILED]
"""Cells whose tokens are not re-sampled from several tiles at once."""


def zipped(name: str, cell: Cell, case: str, seed: int, report: Report) -> tuple[list[dict[int, Tensor]], float]:
    """Per item the features that are left, by index into its places; and how far any decision was from another."""
    method, family = COMPRESSORS[name], cell[0]
    separators = protected(cell, case, seed)
    attention, keys = tower_facts(cell, case, seed)
    embeds = projected(cell, case, seed)
    patches = _clip_patches(cell, case, seed) if family in TOKENWISE else None
    start, gap = 0, math.inf
    left = []
    for item, (row, places) in enumerate(zip(report.item_rows, report.places, strict=True)):
        indices = [i for i, place in enumerate(places.tolist()) if not separators[row, place]]
        key = nn.functional.normalize(keys[start : start + len(places)], dim=-1)
        budget = count_of(method.keep, len(indices), steps_of(report, item))
        contextual = math.floor(budget * 10 / 64 + 0.5) if method.contextual is None else method.contextual
        dominant = best({i: float(attention[start + i]) for i in indices}, budget - contextual)
        gap = min(gap, dominant.gap)
        rest = [i for i in indices if i not in dominant.kept]
        anchors = [rest[a * (len(rest) // contextual)] for a in range(contextual)]
        members: dict[int, list[int]] = {anchor: [] for anchor in anchors}
        for i in rest:
            if i not in anchors:
                owner = best({anchor: float(key[i] @ key[anchor]) for anchor in anchors}, 1)
                members[owner.kept[0]].append(i)
                gap = min(gap, owner.gap)
        values = embeds[row, places] if patches is None else patches[start : start + len(places)]
        want = {i: values[i] for i in dominant.kept}
        for anchor, mine in members.items():
            want[anchor] = values[anchor] + values[mine].mean(0) if mine else values[anchor]
        if patches is not None:
            root = tiny(family).base_model
            projector = root.projector if family == "openvla" else root.multi_modal_projector
            with torch.no_grad():
                want = {i: projector(value) for i, value in want.items()}
        left.append(want)
        start += len(places)
    return left, gap


@pairs(["visionzip", "visionzip-count"], ZIPPED)
@pytest.mark.parametrize("case", ["plain", "multi_image"])
def test_visionzip_keeps_and_merges_what_its_formulas_say(name: str, cell: Cell, case: str) -> None:
    for seed in range(1, 100):
        report = report_of(name, cell, case, seed)
        want, gap = zipped(name, cell, case, seed, report)
        if gap >= GAP:
            break
    assert gap >= GAP
    for item, features in enumerate(want):
        assert_same_features(features_left(report, item), features)


@torch.no_grad()
def _clip_patches(cell: Cell, case: str, seed: int = 1) -> Tensor:
    """float[images * patches, D]: what the projector of the unmodified model gets, where it maps patch by patch."""
    if cell[0] == "openvla":
        return tiny(cell[0]).vision_backbone(batch(cell, case, seed)["pixel_values"]).flatten(0, 1)
    output = tiny(cell[0]).base_model.vision_tower(batch(cell, case, seed)["pixel_values"], output_hidden_states=True)
    states = output.last_hidden_state if cell[0] == "paligemma" else output.hidden_states[-2][:, 1:]
    return states.flatten(0, 1)


# -------------------------------------------------------------------------------------------------------------- ToMe

DENSE = [cell for cell in CELLS if cell[0] not in QWEN]


def merge_plainly(
    ids: list[int],
    values: dict[int, Tensor],
    keys: dict[int, Tensor],
    sizes: dict[int, float],
    target: int,
    rounds: int,
) -> list[int]:
    """Merge tokens of one tile in place until `target` are left, half of them a round at most; returns which."""
    while len(ids) > target and rounds:
        rounds -= 1
        even, odd = ids[::2], ids[1::2]
        unit = {i: nn.functional.normalize(keys[i], dim=0) for i in ids}
        pairs_of = {e: best({o: float(unit[e] @ unit[o]) for o in odd}, 1).kept[0] for e in even}
        merges = min(len(ids) - target, len(even), len(odd))
        similarity = {e: float(unit[e] @ unit[pairs_of[e]]) for e in even}
        sources = best(similarity, merges).kept
        total = {i: values[i] * sizes[i] for i in ids}
        total_keys = {i: keys[i] * sizes[i] for i in ids}
        for source in sources:
            into = pairs_of[source]
            total[into] = total[into] + total[source]
            total_keys[into] = total_keys[into] + total_keys[source]
            sizes[into] += sizes[source]
        ids = [i for i in ids if i not in sources]
        for i in ids:
            values[i], keys[i] = total[i] / sizes[i], total_keys[i] / sizes[i]
    return ids


@torch.no_grad()
def behind_attention(block: Any, entered: Tensor, attention: Tensor) -> Tensor:
    """What a block of a dense tower holds behind its attention, which InternVL scales."""
    return entered + getattr(block, "lambda_1", 1.0) * attention


@torch.no_grad()
def through_mlp(block: Any, hidden: Tensor) -> Tensor:
    """What a block puts out for float[n, D] behind its attention."""
    norm = getattr(block, "layernorm_after", None) or block.layer_norm2
    return hidden + getattr(block, "lambda_2", 1.0) * block.mlp(norm(hidden))


@pairs(["tome", "tome-count"], DENSE)
def test_tome_merges_between_attention_and_mlp_as_its_formulas_say(name: str, cell: Cell) -> None:
    family, method = cell[0], COMPRESSORS[name]
    model, inputs = tiny(family), batch(cell, "plain")
    blocks, prefix, unit = read_blocks(model, cell[1]), int(family in CLS), unit_of(model)
    entered: list[Tensor] = []
    attended: list[Tensor] = []
    left: list[Tensor] = []
    keys: list[Tensor] = []
    masks: list[Any] = []

    def first(output: Any) -> Tensor:
        return output if isinstance(output, Tensor) else output[0]

    def masking(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        masks.append(kwargs.get("attention_mask"))

    with compress(model, method) as session:
        handles = []
        for block in blocks:
            attention = attention_in(block)
            handles += [
                # A copy: what is merged is written into the sequence that holds the residual.
                block.register_forward_pre_hook(lambda m, args: entered.append(args[0].clone())),
                block.register_forward_hook(lambda m, args, out: left.append(first(out))),
                attention.register_forward_pre_hook(masking, with_kwargs=True),
                attention.register_forward_hook(lambda m, args, out: attended.append(first(out).clone())),
                attention.k_proj.register_forward_hook(lambda m, args, out: keys.append(out)),
            ]
        logits(model, inputs)
        for handle in handles:
            handle.remove()
    side = math.isqrt(entered[0].shape[1] - prefix)
    tokens = (side // unit) ** 2
    members = {
        ty * (side // unit) + tx: [(ty * unit + dy) * side + tx * unit + dx for dy in range(unit) for dx in range(unit)]
        for ty in range(side // unit)
        for tx in range(side // unit)
    }
    final = count_of(method.keep, tokens, 1)
    depth, heads = len(blocks), model.config.vision_config.num_attention_heads
    for tile in range(entered[0].shape[0]):
        ids, sizes = list(range(tokens)), dict.fromkeys(range(tokens), 1.0)
        for number, block in enumerate(blocks):
            # equation 1: attention to a merged token weighs as much as the tokens it stands for
            of_patch = {patch: sizes[i] for i in ids for patch in members[i]}
            bias = torch.tensor([0.0] * prefix + [math.log(of_patch[patch]) for patch in sorted(of_patch)])
            if len(ids) < tokens:
                assert_close(masks[number][tile, 0], bias.expand(len(bias), -1))
            target = tokens - math.floor((tokens - final) * (number + 1) / depth + 0.5)
            target = max(final, min(target, final * 2 ** (depth - 1 - number)))
            # patches lie in raster order
            at = {patch: prefix + i for i, patch in enumerate(sorted(of_patch))}
            mean = keys[number][tile].unflatten(-1, (heads, -1)).mean(-2)
            hidden = behind_attention(block, entered[number][tile], attended[number][tile])
            values = {i: torch.cat([hidden[at[patch]] for patch in members[i]]) for i in ids}
            metric = {i: torch.cat([mean[at[patch]] for patch in members[i]]) for i in ids}
            ids = merge_plainly(ids, values, metric, sizes, target, rounds=9 if number == depth - 1 else 1)
            patches = {}
            for i in ids:
                patches |= dict(zip(members[i], values[i].chunk(unit * unit), strict=True))
            short = torch.cat([hidden[:prefix], torch.stack([patches[patch] for patch in sorted(patches)])])
            assert_close(left[number][tile], through_mlp(block, short))
        assert len(ids) == final
    assert all(out == final for out in session.report.sites[-1].tokens_out)
    assert oracle.hook_count(model) == 0
