"""Inside a tower: what a compressor leaves is what the same tower gives with the other patches' keys masked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import SiglipVisionModel

from mmtoken import compress
from mmtoken.compressors.base import Compressor, Context, Need, Positions, TowerCut
from mmtoken.errors import UnsupportedError
from mmtoken.tokens import VisualTokens
from tests import oracle
from tests.backbones.tiny_models import QWEN, build, config, inputs, visual_mask
from tests.contract.reference import CLS, attention_in, tower_blocks, unit_of
from tests.engine.agreement import assert_close, tiny


@dataclass(frozen=True)
class Thin(Compressor):
    """Leaves every `step`-th token when block `layer` begins, or behind its attention (`ThinBetween`)."""

    keep: float = 1.0
    positions: Positions = "keep"
    layer: int = 2
    step: int = 2
    offset: int = 0

    def vision_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        return tokens.where(tokens.source % self.step == self.offset) if layer == self.layer else tokens


class ThinBetween(Thin):
    tower_cut: ClassVar[TowerCut] = "mlp"


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
        kind = getattr(block, "self_attn", block).config._attn_implementation
        hidden = args[0] if args else kwargs["hidden_states"]
        mask = allowed
        if kind == "eager":
            mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(hidden.dtype).min)
        return (hidden,), {**{k: v for k, v in kwargs.items() if k != "hidden_states"}, "attention_mask": mask}

    return hook


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("thin", "layer"), [*((Thin, layer) for layer in (1, 2, 3)), *((ThinBetween, layer) for layer in (0, 1, 2, 3))]
)
@pytest.mark.parametrize(("name", "prefix"), [("clip_vision", 1), ("siglip_vision", 0)])
def test_a_bare_tower_equals_the_one_with_masked_keys(
    name: str, prefix: int, thin: type[Thin], layer: int, attn: str
) -> None:
    """What leaves behind the attention of a block is hidden from the next block on, and gone from its own output."""
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
        with compress(model, thin(layer=layer)) as session:
            got = model(pixels, output_hidden_states=True)
        with hooked(blocks[layer + (thin is ThinBetween) :], hide_patches(keep), before=True):
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


def masked_in(model: Any) -> list[nn.Module]:
    """Per block of a dense tower the module that takes a mask: the block, or its attention where the block does not."""
    blocks = tower_blocks(model)
    return [attention_in(block) for block in blocks] if model.config.model_type == "internvl" else blocks


def image_features(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    names = ("pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw", "batch_num_images")
    out = model.base_model.get_image_features(**{n: batch[n] for n in names if n in batch}, return_dict=True)
    return [part.reshape(-1, part.shape[-1]) for part in out.pooler_output]


@pytest.mark.parametrize("thin", [Thin, ThinBetween])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["plain", "padded_ragged", "multi_image"])
@pytest.mark.parametrize("family", ["llava", "idefics3", "smolvlm", "internvl"])
def test_kept_features_of_a_model_equal_its_tower_with_masked_keys(
    family: str, case: str, attn: str, thin: type[Thin]
) -> None:
    """Idefics3 drops squares of patches, because its projector puts squares together; masks of padded tiles hold."""
    model = tiny(family, attn)
    batch = inputs(model, family, "image", case)
    tower = tower_of(model)
    unit, prefix = unit_of(model), int(family in CLS)
    side = 4 if family == "llava" else 12 if family == "smolvlm" else 8
    row, column = torch.arange(side * side) // side, torch.arange(side * side) % side
    token = (row // unit) * (side // unit) + column // unit
    left = torch.cat([torch.ones(prefix, dtype=torch.bool), token % 2 == 0])
    seen: list[Tensor] = []
    with torch.no_grad():
        with compress(model, thin(layer=int(thin is Thin))) as session:
            got = torch.cat(image_features(model, batch))
            model(**oracle.clone(batch))
        with (
            hooked([tower], lambda module, args, kwargs, out: seen.append(out[0]), before=False),
            hooked(masked_in(model)[1:], hide_patches(left[None]), before=True),
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


@pytest.mark.parametrize("method", [Thin, ThinBetween])
@pytest.mark.parametrize("modality", ["image", "video"])
@pytest.mark.parametrize("case", ["single", "ragged", "multi_image"])
@pytest.mark.parametrize("family", QWEN)
def test_kept_features_of_packed_towers_equal_masked_keys(
    family: str, case: str, modality: str, method: type[Thin]
) -> None:
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
        with compress(model, method(layer=1 + (method is Thin), step=3, offset=1)) as session:
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
    if family != "qwen2_5_vl":
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


@pytest.mark.parametrize(
    "family", ["llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "internvl"]
)
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


# ------------------------------------------------------------------------------- rows of which different numbers stay


@dataclass(frozen=True)
class Uneven(Compressor):
    """Leaves `cuts[layer - 1][row]` tokens of a row when block `layer` begins, in a scattered but nested order."""

    keep: float = 1.0
    positions: Positions = "keep"
    cuts: tuple[tuple[int, ...], ...] = ()

    def vision_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        if layer > len(self.cuts):
            return tokens
        return tokens.top(-(tokens.source * 5 % 16).float(), list(self.cuts[layer - 1]))


def scattered(count: int) -> Tensor:
    """bool[16]: what `Uneven` leaves of 16 tokens."""
    return torch.arange(16) * 5 % 16 < count


CUTS = ((16, 5, 9), (16, 3, 9), (4, 3, 9))
"""Counts of three rows entering blocks 1 to 3: the longest row hides at block 2 that another one gets shorter."""


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "prefix"), [("clip_vision", 1), ("siglip_vision", 0)])
def test_uneven_rows_equal_masked_keys_and_the_row_by_itself(name: str, prefix: int, attn: str) -> None:
    model = build(name, attn)
    size = model.config.image_size
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))
    blocks = list(model._modules.get("vision_model", model).encoder.layers)
    read = len(blocks) - 1 - prefix
    cuts = CUTS[:read]
    keeps = [torch.stack([scattered(count) for count in counts]) for counts in cuts]
    with torch.no_grad():
        with compress(model, Uneven(cuts=cuts)) as session:
            got = model(pixels, output_hidden_states=True)
            assert session.report.tokens_out == list(cuts[-1])
            assert [k.tolist() for k in session.report.kept] == [k.nonzero()[:, 0].tolist() for k in keeps[-1]]
        with ExitStack() as stack:
            for number in range(1, len(blocks)):
                keep = keeps[min(number, read) - 1]
                keep = torch.cat([torch.ones(3, prefix, dtype=torch.bool), keep], 1)
                stack.enter_context(hooked([blocks[number]], hide_patches(keep), before=True))
            want = model(pixels, output_hidden_states=True)
        for row in range(3):
            with compress(model, Uneven(cuts=tuple((counts[row],) for counts in cuts))):
                alone = model(pixels[row : row + 1], output_hidden_states=True)
            for number, state in enumerate(alone.hidden_states):
                assert_close(got.hidden_states[number][row], state[0])
            assert_close(got.last_hidden_state[row], alone.last_hidden_state[0])
    for number, (short, masked) in enumerate(zip(got.hidden_states, want.hidden_states, strict=True)):
        assert short.shape == masked.shape
        keep = torch.ones(3, 16, dtype=torch.bool) if number < 2 else keeps[min(number - 1, read) - 1]
        seen = torch.cat([torch.ones(3, prefix, dtype=torch.bool), keep], 1)
        assert_close(short[seen], masked[seen])
        for row in range(3):
            places = keep[row].nonzero()[:, 0].tolist()
            for patch in range(16):  # a dropped patch holds a copy of the last one left before it
                last = max([p for p in places if p <= patch], default=places[0])
                assert torch.equal(short[row, prefix + patch], short[row, prefix + last])


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "idefics3", "internvl"])
def test_uneven_tiles_of_a_model_equal_its_tower_with_masked_keys(family: str, attn: str) -> None:
    """Idefics3: squares of patches, and the smallest image is a tile with padded pixels, so that blocks get a mask."""
    model = tiny(family, attn)
    batch = inputs(model, family, "image", "padded_ragged")
    tower = tower_of(model)
    unit, prefix = unit_of(model), int(family in CLS)
    side = 4 if family == "llava" else 12 if family == "smolvlm" else 8
    row, column = torch.arange(side * side) // side, torch.arange(side * side) % side
    token = (row // unit) * (side // unit) + column // unit
    seen: list[Tensor] = []
    with torch.no_grad():
        with hooked([tower], lambda module, args, kwargs, out: seen.append(out[0]), before=False):
            image_features(model, batch)
        counts = tuple(3 + (7 * tile) % 11 for tile in range(len(seen[0])))
        left = torch.stack([scattered(count) for count in counts])
        keep = torch.cat([torch.ones(len(left), prefix, dtype=torch.bool), left[:, token]], 1)
        with compress(model, Uneven(cuts=(counts,))) as session:
            got = torch.cat(image_features(model, batch))
            model(**oracle.clone(batch))
        with hooked(masked_in(model)[1:], hide_patches(keep), before=True):
            want = torch.cat(image_features(model, batch))
    assert_close(got[left.flatten()], want[left.flatten()])
    assert session.report.tokens_out == list(counts)


@dataclass(frozen=True)
class Pairs(Compressor):
    """Merges neighbours into means, the first `merges[row]` pairs of a row, and lets their size weigh."""

    keep: float = 1.0
    positions: Positions = "keep"
    merges: tuple[int, ...] = ()
    size_bias: ClassVar[bool] = True

    def vision_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        if layer > 1:
            return tokens
        joined = torch.arange(8) < torch.tensor(self.merges)[:, None]
        pairs = tokens.features.unflatten(1, (8, 2))
        mean = torch.where(joined[..., None], pairs.mean(2), pairs[:, :, 0])
        features = torch.stack([mean, pairs[:, :, 1]], 2).flatten(1, 2)
        size = torch.stack([1.0 + joined, torch.ones(joined.shape)], 2).flatten(1)
        stays = torch.stack([torch.ones_like(joined), ~joined], 2).flatten(1)
        return tokens.replace(features=features, size=size).where(stays)


@pytest.mark.parametrize("name", ["clip_vision", "siglip_vision"])
def test_sizes_weigh_in_uneven_rows_as_in_a_row_by_itself(name: str) -> None:
    model = build(name)
    size = model.config.image_size
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        with compress(model, Pairs(merges=(0, 5, 8))):
            got = model(pixels).last_hidden_state
        for row, merges in enumerate((0, 5, 8)):
            with compress(model, Pairs(merges=(merges,))):
                assert_close(got[row], model(pixels[row : row + 1]).last_hidden_state[0])


def test_a_pooling_head_does_not_see_the_padding_of_short_rows() -> None:
    settings = config("siglip_vision")
    settings.vision_use_head = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SiglipVisionModel(settings).eval()
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(2)) * 3
    with torch.no_grad():
        with compress(model, Uneven(cuts=((16, 3),))):
            got = model(pixels).pooler_output
        with compress(model, Uneven(cuts=((3,),))):
            alone = model(pixels[1:]).pooler_output
        assert oracle.max_error(model(pixels).pooler_output[1], alone[0]) > 1e-4
    assert_close(got[1], alone[0])


def test_packed_rows_may_be_uneven() -> None:
    packed = tiny("qwen2_5_vl")
    with compress(packed, Uneven(cuts=((2, 3),))) as session, torch.no_grad():
        packed(**inputs(packed, "qwen2_5_vl", "image", "plain"))
    assert session.report.tokens_out == [2, 3]


def test_flash_attention_in_the_tower_is_refused_where_rows_are_uneven() -> None:
    model = build("clip_vision")
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    layers = model._modules.get("vision_model", model).encoder.layers

    def switch(*_: Any) -> None:  # it is not installed, so the model must not reach its masks under this name
        model.config._attn_implementation = "flash_attention_2"

    with (
        hooked([layers[0]], switch, before=False),
        compress(model, Uneven(cuts=((4, 7),))),
        pytest.raises(UnsupportedError, match="different numbers"),
    ):
        model(pixels)


# ----------------------------------------------------------------------------------- what methods may read in the tower


@dataclass(frozen=True)
class Reader(Thin):
    """`Thin`, and notes everything that it may read of the tower."""

    log: ClassVar[list[Any]] = []
    read: tuple[int, ...] = ()
    needs: ClassVar[frozenset[Need]] = frozenset({"tower_attention", "tower_keys", "tower_states"})

    def tower_layers(self, depth: int, blocks: int) -> tuple[int, ...]:
        return self.read

    def vision_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        ctx.memory.setdefault("layers", []).append(layer)
        states, keys, joint = ctx.tower_states(tokens), ctx.tower_keys(tokens), ctx.tower_keys(tokens, joint=True)
        self.log.append((layer, tokens, states, keys, joint, ctx.tower_cls(tokens), ctx.memory, ctx.blocks))
        return super().vision_layer(tokens, layer, ctx)


@pytest.mark.parametrize(
    ("name", "prefix", "unit"), [("clip_vision", 1, 1), ("siglip_vision", 0, 1), ("idefics3", 0, 2)]
)
def test_states_of_dense_blocks_are_what_their_projections_put_out(name: str, prefix: int, unit: int) -> None:
    """Also behind a cut, where the tower with masked keys gives the same at the tokens that are left."""
    model = build(name) if unit == 1 else tiny(name)
    tower = model if unit == 1 else model.base_model.vision_model
    size, patch = tower.config.image_size, tower.config.patch_size
    side = size // patch
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    blocks = list(tower._modules.get("vision_model", tower).encoder.layers)
    last = len(blocks) - 1 - prefix
    squares = [
        [(r * unit + i) * side + c * unit + j for i in range(unit) for j in range(unit)]
        for r in range(side // unit)
        for c in range(side // unit)
    ]
    left = torch.ones(side * side, dtype=torch.bool)
    for token, square in enumerate(squares):
        left[square] = token % 2 == 0
    keep = torch.cat([torch.ones(prefix, dtype=torch.bool), left]).expand(2, -1)
    seen: dict[tuple[int, str], Tensor] = {}
    arguments = {"patch_attention_mask": torch.ones(2, side, side, dtype=torch.bool)} if unit > 1 else {}
    Reader.log.clear()
    with torch.no_grad(), ExitStack() as stack:
        with compress(model, Reader(layer=2)):
            tower(pixels, **arguments)
        for number, block in enumerate(blocks):
            for part in ("q_proj", "k_proj", "v_proj"):

                def note(module: nn.Module, args: Any, kwargs: Any, out: Tensor, key: Any = (number, part)) -> None:
                    seen[key] = out

                stack.enter_context(hooked([getattr(block.self_attn, part)], note, before=False))
        stack.enter_context(hooked(blocks[2:], hide_patches(keep), before=True))
        tower(pixels, **arguments)
    # a model with a projector has a context of its own for what its projector reads
    assert [layer for layer, *_ in Reader.log] == list(range(1, last + 1))
    heads = tower.config.num_attention_heads
    for layer, tokens, states, keys, joint, *_ in Reader.log:
        assert tokens.source.shape[1] == (len(squares) if layer <= 2 else (len(squares) + 1) // 2)
        for name, part in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            plain = seen[layer - 1, part].unflatten(-1, (heads, -1))
            want = torch.stack(
                [
                    torch.stack([plain[row, [prefix + p for p in squares[int(u)]]] for u in tokens.source[row]])
                    for row in range(2)
                ]
            )  # [rows, U, M, H, d]
            assert_close(getattr(states, name), want.permute(0, 3, 1, 2, 4))
            assert getattr(states, f"prefix_{name}").shape[2] == prefix
            if prefix:
                assert_close(getattr(states, f"prefix_{name}"), plain[:, :prefix].transpose(1, 2))
            if name == "key":
                assert_close(keys, want.mean(3).flatten(2))
                assert_close(joint, want.flatten(3).flatten(2))


@pytest.mark.parametrize("modality", ["image", "video"])
@pytest.mark.parametrize("family", QWEN)
def test_states_of_packed_blocks_are_rotated_and_in_rows_of_frames(family: str, modality: str) -> None:
    model = tiny(family)
    batch = inputs(model, family, modality, "ragged")
    grids = batch[f"{modality}_grid_thw"]
    pixels = batch["pixel_values" if modality == "image" else "pixel_values_videos"]
    visual = model.base_model.visual
    square = visual.spatial_merge_size**2
    per_frame = [h * w // square for t, h, w in grids.tolist() for _ in range(t)]
    thin = torch.cat([torch.arange(n) % 3 == 1 for n in per_frame])
    order = packed_order(family, visual, grids)
    place = {int(unit): slot for slot, unit in enumerate(order)}
    seen: dict[int, tuple[Tensor, Any]] = {}

    def note(number: int) -> Hook:
        def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            seen[number] = (module.qkv(hidden), kwargs["position_embeddings"])

        return hook

    Reader.log.clear()
    attentions = [block.attn for block in visual.blocks]
    with torch.no_grad(), ExitStack() as stack:
        with compress(model, Reader(layer=2, step=3, offset=1)):
            visual(pixels, grid_thw=grids)
        hide = packed_attention(thin[order].repeat_interleave(square))
        stack.enter_context(hooked(attentions[2:], hide, before=False))
        for number, attention in enumerate(attentions):
            stack.enter_context(hooked([attention], note(number), before=False))
        visual(pixels, grid_thw=grids)
    assert [layer for layer, *_ in Reader.log] == list(range(1, len(visual.blocks)))
    for layer, tokens, states, *_ in Reader.log:
        fused, (cosine, sine) = seen[layer - 1]
        heads = visual.blocks[0].attn.num_heads
        parts = fused.view(len(fused), 3, heads, -1)
        assert tokens.counts() == (per_frame if layer <= 2 else [len(range(1, n, 3)) for n in per_frame])
        starts = [sum(per_frame[:frame]) for frame in range(len(per_frame))]
        assert states.prefix_query.shape == (len(per_frame), heads, 0, parts.shape[-1])
        for frame, start in enumerate(starts):
            for slot in tokens.valid[frame].nonzero()[:, 0].tolist():
                first = place[start + int(tokens.source[frame, slot])] * square
                for member in range(square):
                    for head in range(heads):
                        row = first + member
                        got = [getattr(states, n)[frame, head, slot, member] for n in ("query", "key", "value")]
                        half = parts.shape[-1] // 2
                        for which in range(3):
                            x = parts[row, which, head]
                            turned = torch.cat([-x[half:], x[:half]])
                            want = x if which == 2 else x * cosine[row] + turned * sine[row]
                            assert_close(got[which], want)


@dataclass(frozen=True)
class AtProjector(Compressor):
    """Reads blocks of the tower where their facts come together: around the projector, or behind it."""

    log: ClassVar[list[Any]] = []
    keep: float = 1.0
    positions: Positions = "keep"
    read: tuple[int, ...] = ()
    needs: ClassVar[frozenset[Need]] = frozenset({"tower_attention", "tower_keys"})

    def tower_layers(self, depth: int, blocks: int) -> tuple[int, ...]:
        return self.read

    def project(self, tokens: VisualTokens, default: Any, ctx: Context) -> VisualTokens:
        facts = {
            (block, joint): (
                ctx.tower_attention(tokens, block, joint=joint),
                ctx.tower_keys(tokens, block, joint=joint),
            )
            for block in (None, *self.read)
            for joint in (False, True)
        }
        self.log.append((tokens, facts, ctx.tower_features(tokens, self.read), ctx.depth, ctx.blocks))
        return default(tokens)


def test_attention_keys_and_features_of_any_block_of_a_tower_with_cls() -> None:
    """Also of blocks behind the one that is projected; eager attention of the plain model is the oracle."""
    model = build("clip_vision", "eager")
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    read = (3, 0, 1)
    AtProjector.log.clear()
    with torch.no_grad():
        with compress(model, AtProjector(read=read)):
            model(pixels)
        plain = model(pixels, output_hidden_states=True, output_attentions=True)
    ((_, facts, features, depth, blocks),) = AtProjector.log
    assert (depth, blocks) == (3, 4)
    for block in (None, *read):
        received, _ = facts[block, False]
        assert_close(received, plain.attentions[2 if block is None else block][:, :, 0, 1:].sum(1))
    assert_close(features, torch.cat([plain.hidden_states[block + 1][:, 1:] for block in read], -1))
    layers = list(model._modules.get("vision_model", model).encoder.layers)
    for block in (None, *read):
        layer = layers[2 if block is None else block]
        normed = layer.layer_norm1(plain.hidden_states[2 if block is None else block])
        query, key = layer.self_attn.q_proj(normed), layer.self_attn.k_proj(normed)
        assert_close(facts[block, False][1], key[:, 1:].unflatten(-1, (4, -1)).mean(2))
        assert_close(facts[block, True][1], key[:, 1:])
        for row in range(2):
            scores = torch.stack([query[row, 0] @ k for k in key[row]]) / key.shape[-1] ** 0.5
            assert_close(facts[block, True][0][row], scores.softmax(0)[1:])


@pytest.mark.parametrize("family", ["llava_onevision", "idefics3", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_facts_of_blocks_travel_to_the_prompt_like_features(family: str) -> None:
    """Where the projector is not token-wise: averaged over the patches of a token, re-sampled as the model does."""
    model = tiny(family, "eager")
    batch = inputs(model, family, "image", "padded_ragged")
    read = (0, 1)
    AtProjector.log.clear()
    with torch.no_grad():
        with compress(model, AtProjector(read=read)):
            model(**oracle.clone(batch))
        ((tokens, facts, features, depth, blocks),) = AtProjector.log
        got = {key: (a[tokens.valid], k[tokens.valid]) for key, (a, k) in facts.items()}
        outputs, attentions, keys, joint = plain_blocks(model, family, batch)
        assert blocks == len(outputs) == depth
        carry = carrier(model, family, batch)
        for block in (None, *read):
            number = depth - 1 if block is None else block
            assert_close(got[block, False][0], carry(attentions[number][..., None])[:, 0])
            assert_close(got[block, False][1], carry(keys[number].mean(-2)))
            assert_close(got[block, True][0], carry(joint[number][..., None])[:, 0])
            assert_close(got[block, True][1], carry(keys[number].flatten(-2)))
        assert_close(features[tokens.valid], torch.cat([carry(outputs[number]) for number in read], -1))


def plain_blocks(model: Any, family: str, batch: dict[str, Tensor]) -> tuple[list[Tensor], ...]:
    """Per block of the plain tower: outputs, attention received (mean over patches, sum over heads), keys, and joint.

    Dense towers give [tiles, patches, ...], packed ones [patches, ...]; keys have heads apart and are not rotated.
    """
    visual = getattr(model.base_model, "visual", None)
    blocks = list(visual.blocks) if visual is not None else tower_blocks(model)
    outputs, attentions, keys, joint = [], [], [], []

    def attention_seen(query: Tensor, key: Tensor, hidden: Tensor, asking: Tensor) -> Tensor:
        """[H, n, d] twice, bool[n, n] pairs that do not see each other, bool[n] queries that count: [n]."""
        total = torch.zeros(key.shape[1])
        for head in range(len(query)):
            for i in asking.nonzero()[:, 0].tolist():
                scores = (key[head] @ query[head, i]) / key.shape[-1] ** 0.5
                total += scores.masked_fill(hidden[i], -torch.inf).softmax(0)
        return total / asking.sum()

    def dense(block: Any, args: Any, kwargs: Any, out: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        normed = getattr(block, "layernorm_before", None) or block.layer_norm1
        query, key = (getattr(attention_in(block), name)(normed(hidden)) for name in ("q_proj", "k_proj"))
        heads = attention_in(block).num_heads
        received, full = [], []
        for tile in range(len(hidden)):
            away = torch.zeros(hidden.shape[1], hidden.shape[1], dtype=torch.bool)
            if mask is not None:
                away = ~mask[tile, 0] if mask.dtype == torch.bool else mask[tile, 0] < 0
            split = [x[tile].unflatten(-1, (heads, -1)).transpose(0, 1) for x in (query, key)]
            asking = ~away[0]
            if family in CLS:
                asking[1:] = False
            received.append(attention_seen(*split, away, asking))
            full.append(attention_seen(query[tile][None], key[tile][None], away, asking))
        outputs.append(out if isinstance(out, Tensor) else out[0])
        attentions.append(torch.stack(received))
        joint.append(torch.stack(full))
        keys.append(key.unflatten(-1, (heads, -1)))

    def packed(block: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        cosine, sine = kwargs["position_embeddings"]
        query, key, _ = block.attn.qkv(block.norm1(hidden)).view(len(hidden), 3, block.attn.num_heads, -1).unbind(1)

        def rotate(x: Tensor) -> Tensor:
            half = x.shape[-1] // 2
            return x * cosine[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sine[:, None]

        frames = torch.cat([torch.full((h * w,), i) for i, (t, h, w) in enumerate(batch["image_grid_thw"].tolist())])
        away = frames[:, None] != frames
        received, full = torch.zeros(len(hidden)), torch.zeros(len(hidden))
        turned = rotate(query).transpose(0, 1), rotate(key).transpose(0, 1)
        flat = rotate(query).flatten(1)[None], rotate(key).flatten(1)[None]
        for frame in frames.unique():
            received += attention_seen(*turned, away, frames == frame) * (frames == frame)
            full += attention_seen(*flat, away, frames == frame) * (frames == frame)
        outputs.append(out)
        attentions.append(received)
        joint.append(full)
        keys.append(key)

    with hooked(blocks, dense if visual is None else packed, before=False):
        image_features(model, batch)
    return outputs, attentions, keys, joint


def carrier(model: Any, family: str, batch: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Values per patch to values per token of the prompt, as the model treats features (separators get 0)."""
    if family == "llava_onevision":

        def pack(values: Tensor) -> Tensor:
            seen: list[Any] = []
            original = model.base_model.pack_image_features

            def spy(features: Any, *args: Any, **kwargs: Any) -> Any:
                seen.append(([len(f) for f in features], args, kwargs))
                return original(features, *args, **kwargs)

            object.__setattr__(model.base_model, "pack_image_features", spy)
            try:
                image_features(model, batch)
            finally:
                model.base_model.__dict__.pop("pack_image_features")
            ((tiles, args, kwargs),) = seen
            kwargs = {**kwargs, "image_newline": torch.zeros(values.shape[-1])}
            return torch.cat(list(original(torch.split(values, tiles), *args, **kwargs)[0]))

        return pack
    if family in ("idefics3", "internvl"):
        unit, side = unit_of(model), 8

        def squares(values: Tensor) -> Tensor:
            rows = []
            for tile in values[:, int(family in CLS) :]:
                for r in range(0, side, unit):
                    for c in range(0, side, unit):
                        inside = [(r + i) * side + c + j for i in range(unit) for j in range(unit)]
                        rows.append(tile[inside].mean(0))
            return torch.stack(rows)

        return squares
    visual = model.base_model.visual
    order = packed_order(family, visual, batch["image_grid_thw"])

    def units(values: Tensor) -> Tensor:
        square = visual.spatial_merge_size**2
        out = torch.zeros(len(order), values.shape[-1])
        for slot, unit in enumerate(order.tolist()):
            out[unit] = values[slot * square : (slot + 1) * square].mean(0)
        return out

    return units


def test_memory_lives_for_one_pass_of_the_tower() -> None:
    model = build("clip_vision")
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    Reader.log.clear()
    with torch.no_grad(), compress(model, Reader(layer=1)):
        model(pixels)
        model(pixels)
    first, second = Reader.log[0][-2], Reader.log[-1][-2]
    assert first is not second
    assert first == second == {"layers": [1, 2]}
    assert Reader.log[0][-1] == 4


def test_cls_between_blocks_is_the_one_of_that_place() -> None:
    model = build("clip_vision")
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    Reader.log.clear()
    with torch.no_grad():
        with compress(model, Reader(layer=9)):
            model(pixels)
        plain = model(pixels, output_hidden_states=True).hidden_states
    assert Reader.log
    for layer, *_, cls, _, _ in Reader.log:
        assert torch.equal(cls, plain[layer][:, 0])


@dataclass(frozen=True)
class Asks(Compressor):
    """Asks for one thing at one site."""

    keep: float = 1.0
    positions: Positions = "keep"
    block: int | None = None
    declared: tuple[int, ...] = ()
    thing: str = "tower_attention"

    def tower_layers(self, depth: int, blocks: int) -> tuple[int, ...]:
        return self.declared

    def project(self, tokens: VisualTokens, default: Any, ctx: Context) -> VisualTokens:
        if self.thing == "tower_features":
            ctx.tower_features(tokens, (0 if self.block is None else self.block,))
        elif self.thing == "tower_states":
            ctx.tower_states(tokens)
        else:
            getattr(ctx, self.thing)(tokens, self.block)
        return default(tokens)


@pytest.mark.parametrize("family", ["clip_vision", "idefics3"])
@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Asks(), "block"),
        (Asks(block=0), "block 0"),
        (Asks(block=0, declared=(0,)), "declare tower_attention"),
        (Asks(block=0, declared=(0,), thing="tower_keys"), "declare tower_attention, tower_keys"),
        (Asks(thing="tower_features"), "block 0"),
        (Asks(thing="tower_states"), "tower_states"),
    ],
)
def test_what_was_not_declared_is_refused(family: str, method: Asks, words: str) -> None:
    model = build(family) if family == "clip_vision" else tiny(family)
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    batch = {"pixel_values": pixels} if family == "clip_vision" else inputs(model, family, "image", "single")
    with compress(model, method), pytest.raises(UnsupportedError, match=words):
        model(**batch)


@pytest.mark.parametrize("block", [-1, 4])
def test_a_block_that_the_tower_does_not_have_is_refused_when_attached(block: int) -> None:
    with pytest.raises(UnsupportedError, match=f"names block {block}"):
        compress(build("clip_vision"), Asks(declared=(block,)))
