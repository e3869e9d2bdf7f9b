"""Inside a tower: what a compressor leaves is what the same tower gives with the other patches' keys masked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmtoken import compress
from mmtoken.compressors.base import Compressor, Context, Positions
from mmtoken.errors import UnsupportedError
from mmtoken.tokens import VisualTokens
from tests import oracle
from tests.backbones.tiny_models import build, inputs, visual_mask
from tests.engine.agreement import QWEN, assert_close, tiny


@dataclass(frozen=True)
class Thin(Compressor):
    """Leaves every `step`-th token when block `layer` begins."""

    keep: float = 1.0
    positions: Positions = "keep"
    layer: int = 2
    step: int = 2
    offset: int = 0

    def vision_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        return tokens.where(tokens.source % self.step == self.offset) if layer == self.layer else tokens


Hook = Callable[..., Any]


@contextmanager
def hooked(modules: list[nn.Module], hook: Hook, *, before: bool) -> Iterator[None]:
    if before:
        handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    else:
        handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --------------------------------------------------------------------------------------- towers with rows of patches


def hide_patches(keep: Tensor) -> Hook:
    """A pre-hook for blocks that hides the keys where `keep` bool[tiles, sequence] is False."""

    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        length = keep.shape[1]
        own = torch.eye(length, dtype=torch.bool)
        allowed = (keep[:, None, None, :] | own).expand(-1, -1, length, -1)
        if given is not None:
            allowed = allowed & (given if given.dtype == torch.bool else given == 0)
        kind = block.self_attn.config._attn_implementation
        hidden = args[0] if args else kwargs["hidden_states"]
        mask = allowed
        if kind == "eager":
            mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(hidden.dtype).min)
        return (hidden,), {**{k: v for k, v in kwargs.items() if k != "hidden_states"}, "attention_mask": mask}

    return hook


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize(("name", "prefix"), [("clip_vision", 1), ("siglip_vision", 0)])
def test_a_bare_tower_equals_the_one_with_masked_keys(name: str, prefix: int, layer: int, attn: str) -> None:
    model = build(name, attn)
    size = model.config.image_size
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))
    patches = (size // model.config.patch_size) ** 2
    left = torch.arange(patches) % 2 == 0
    keep = torch.cat([torch.ones(prefix, dtype=torch.bool), left]).expand(3, -1)
    # transformers 5.17 nests the encoder in `vision_model`
    blocks = list(model._modules.get("vision_model", model).encoder.layers)
    read = len(blocks) - 1 - prefix  # the block whose output VLMs read; nothing acts behind it
    with torch.no_grad():
        with compress(model, Thin(layer=layer)) as session:
            got = model(pixels, output_hidden_states=True)
        with hooked(blocks[layer:], hide_patches(keep), before=True):
            want = model(pixels, output_hidden_states=True)
    if layer > read:
        assert session.report.tokens_out == [patches] * 3
        assert torch.equal(got.last_hidden_state, model(pixels).last_hidden_state)
    else:
        assert session.report.tokens_out == [int(left.sum())] * 3
        for number, (short, masked) in enumerate(zip(got.hidden_states, want.hidden_states, strict=True)):
            assert short.shape == masked.shape
            assert_close(short[keep] if number > layer else short, masked[keep] if number > layer else masked)
        assert_close(got.last_hidden_state[keep], want.last_hidden_state[keep])
        # a dropped patch holds a copy of the last one left before it
        filled = got.last_hidden_state[:, prefix:]
        assert torch.equal(filled[:, 1::2], filled[:, 0::2][:, : filled[:, 1::2].shape[1]])


def tower_of(model: Any) -> Any:
    base = model.base_model
    return base.vision_model if model.config.model_type in ("idefics3", "smolvlm") else base.vision_tower


def image_features(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    names = ("pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw", "batch_num_images")
    out = model.base_model.get_image_features(**{n: batch[n] for n in names if n in batch}, return_dict=True)
    return [part.reshape(-1, part.shape[-1]) for part in out.pooler_output]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["plain", "padded_ragged", "multi_image"])
@pytest.mark.parametrize("family", ["llava", "idefics3", "smolvlm"])
def test_kept_features_of_a_model_equal_its_tower_with_masked_keys(family: str, case: str, attn: str) -> None:
    """Idefics3 drops squares of patches, because its projector puts squares together; masks of padded tiles hold."""
    model = tiny(family, attn)
    batch = inputs(model, family, "image", case)
    tower = tower_of(model)
    unit = 1 if family == "llava" else model.config.scale_factor
    prefix = int(family == "llava")
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    row, column = torch.arange(side * side) // side, torch.arange(side * side) % side
    token = (row // unit) * (side // unit) + column // unit
    left = torch.cat([torch.ones(prefix, dtype=torch.bool), token % 2 == 0])
    seen: list[Tensor] = []
    with torch.no_grad():
        with compress(model, Thin(layer=1)) as session:
            got = torch.cat(image_features(model, batch))
            model(**oracle.clone(batch))
        with (
            hooked([tower], lambda module, args, kwargs, out: seen.append(out[0]), before=False),
            hooked(list(tower.encoder.layers)[1:], hide_patches(left[None]), before=True),
        ):
            want = torch.cat(image_features(model, batch))
    tiles = len(seen[0])
    kept = torch.arange((side // unit) ** 2).remainder(2).eq(0).repeat(tiles)
    assert_close(got[kept], want[kept])
    assert [k.tolist() for k in session.report.kept] == [list(range(0, (side // unit) ** 2, 2))] * tiles


# ---------------------------------------------------------------------------------------- towers on packed sequences


def packed_attention(keep: Tensor) -> Hook:
    """A forward hook that replaces a packed attention's output by the plain formula, with keys hidden by `keep`.

    Within a window (between two cumulative lengths) a patch sees the patches left, and itself.
    """

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        hidden = args[0] if args else kwargs["hidden_states"]
        bounds, (cosine, sine) = kwargs["cu_seqlens"], kwargs["position_embeddings"]
        query, key, value = module.qkv(hidden).view(len(hidden), 3, module.num_heads, -1).unbind(1)

        def rotate(x: Tensor) -> Tensor:
            half = x.shape[-1] // 2
            turned = torch.cat([-x[..., half:], x[..., :half]], -1)
            return x * cosine[:, None] + turned * sine[:, None]

        window = torch.searchsorted(bounds, torch.arange(len(hidden)), right=True)
        allowed = (window[:, None] == window) & (keep | torch.eye(len(hidden), dtype=torch.bool))
        scores = torch.einsum("qhd,khd->hqk", rotate(query), rotate(key)) * query.shape[-1] ** -0.5
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        return module.proj(torch.einsum("hqk,khd->qhd", weights, value).flatten(1))

    return hook


@pytest.mark.parametrize("modality", ["image", "video"])
@pytest.mark.parametrize("case", ["single", "ragged", "multi_image"])
@pytest.mark.parametrize("family", QWEN)
def test_kept_features_of_packed_towers_equal_masked_keys(family: str, case: str, modality: str) -> None:
    model = tiny(family)
    batch = inputs(model, family, modality, case)
    grids = batch[f"{modality}_grid_thw"]
    pixels = batch["pixel_values" if modality == "image" else "pixel_values_videos"]
    visual = model.base_model.visual
    side = visual.spatial_merge_size
    per_frame = [h * w // side**2 for t, h, w in grids.tolist() for _ in range(t)]
    # tokens are counted per frame, whose patches see each other
    thin = torch.cat([torch.arange(n) % 3 == 1 for n in per_frame])
    counts = [t * h * w // side**2 for t, h, w in grids.tolist()]
    order = packed_order(family, visual, grids)
    assert torch.equal(order.sort().values, torch.arange(sum(counts)))
    rows = thin[order].repeat_interleave(side * side)
    attentions = [block.attn for block in visual.blocks]

    def run(rows: Tensor | None, first: int) -> Any:
        hook = packed_attention(torch.ones(len(pixels), dtype=torch.bool) if rows is None else rows)
        with hooked(attentions[first:], hook, before=False):
            return visual(pixels, grid_thw=grids)

    with torch.no_grad():
        plain, formula = visual(pixels, grid_thw=grids), run(None, 0)
        assert_close(formula.pooler_output, plain.pooler_output)  # the reference is the tower where nothing is hidden
        want = run(rows, 2)
        assert oracle.max_error(want.pooler_output[thin], plain.pooler_output[thin]) > 1e-2
        with compress(model, Thin(layer=2, step=3, offset=1)) as session:
            got = visual(pixels, grid_thw=grids)
            model(**oracle.clone(batch))
    assert got.pooler_output.shape == want.pooler_output.shape
    assert_close(got.pooler_output[thin], want.pooler_output[thin])
    for short, masked in zip(got.get("deepstack_features") or (), want.get("deepstack_features") or (), strict=True):
        assert_close(short[thin], masked[thin])
    assert session.report.tokens_in == counts
    starts = torch.tensor([0, *counts[:-1]]).cumsum(0)
    kept = torch.cat([k + start for k, start in zip(session.report.kept, starts, strict=True)])
    assert torch.equal(kept, thin.nonzero()[:, 0])


def packed_order(family: str, visual: Any, grids: Tensor) -> Tensor:
    """int[U]: which merged token, in the order of the output, each group of patches in the sequence belongs to.

    Found out from the tower itself: a patch of its own is put into each group, and the blocks are watched.
    """
    side, total = visual.spatial_merge_size**2, int(grids.prod(-1).sum())
    if family == "qwen3_vl":
        return torch.arange(total // side)
    seen: list[Tensor] = []

    def numbered(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        return torch.arange(total, dtype=output.dtype)[:, None].expand_as(output).clone()

    def watch(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    with (
        torch.no_grad(),
        hooked([visual.patch_embed], numbered, before=False),
        hooked([visual.blocks[0]], watch, before=True),
    ):
        visual(torch.zeros(total, visual.patch_embed.proj.weight[0].numel()), grid_thw=grids)
    return (seen[0][::side, 0] / side).round().long()


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "idefics3"])
def test_the_model_reads_only_what_the_tower_left(family: str) -> None:
    """End to end: thinning in the tower equals masking its keys and then the decoder's at the same tokens."""
    model = tiny(family)
    batch = inputs(model, family, "image", "padded_ragged")
    with torch.no_grad(), compress(model, Thin(layer=2, step=3)) as session:
        out = model(**oracle.clone(batch))
    assert torch.isfinite(out.logits[batch["attention_mask"].bool()]).all()
    visual = visual_mask(model, batch)
    for row in range(len(visual)):
        mine = [i for i, r in enumerate(session.report.item_rows) if r == row]
        assert sum(len(session.report.places[i]) for i in mine) == int(visual[row].sum())
        assert all(0 < session.report.tokens_out[i] < session.report.tokens_in[i] for i in mine)


@dataclass(frozen=True)
class Uneven(Compressor):
    """Leaves as many tokens of a tile as its number says: rows of different length."""

    keep: float = 1.0
    positions: Positions = "keep"

    def vision_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        rank = torch.arange(len(tokens), device=tokens.source.device)[:, None]
        return tokens.where(tokens.source <= rank + 1)


def test_a_dense_tower_needs_equal_counts_and_a_packed_one_does_not() -> None:
    dense, packed = tiny("llava"), tiny("qwen2_5_vl")
    with compress(dense, Uneven()), pytest.raises(UnsupportedError, match="different numbers of tokens per tile"):
        dense(**inputs(dense, "llava", "image", "plain"))
    with compress(packed, Uneven()) as session, torch.no_grad():
        packed(**inputs(packed, "qwen2_5_vl", "image", "plain"))
    assert session.report.tokens_out == [2, 3]
