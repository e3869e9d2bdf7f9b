"""Towers of timm and open_clip: the plain one at keep=1.0, the masked one below, plain compositions for what merges."""

from __future__ import annotations

import dataclasses
import inspect
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmtoken
from mmtoken import attach, compress
from mmtoken import compressors as shelf
from mmtoken.compressors.base import Compressor, Context, Positions
from mmtoken.compressors.tca import condense, split_to
from mmtoken.errors import UnsupportedError
from mmtoken.tokens import VisualTokens
from tests import oracle
from tests.backbones.tiny_towers import (
    OPEN_CLIP,
    PATCHES,
    TIMM,
    TOWERS,
    WIDTH,
    blocks_of,
    last_of,
    make_clip,
    make_timm,
    pictures,
    prefix_of,
    tower,
)
from tests.compressors.test_tome import match

pytestmark = pytest.mark.lowest

PRUNERS: dict[str, Compressor] = {
    "flowcut": shelf.FlowCut(keep=0.4),
    "flowcut-count": shelf.FlowCut(keep=3, interval=1),
    "zerotprune": shelf.ZeroTPrune(keep=0.4, similar=2),
    "zerotprune-count": shelf.ZeroTPrune(keep=3, layers=(1,), order="I-S"),
}
MERGERS: dict[str, Compressor] = {
    "tome": shelf.ToMe(keep=0.4),
    "tca": shelf.TCA(keep=0.5),
    "tca-repo": shelf.TCA(drop=0.2, variant="repo", layers=(0, 2)),
}
BEHIND: dict[str, Compressor] = {
    "visionzip": shelf.VisionZip(keep=0.4),
    "vispruner": shelf.VisPruner(keep=0.4),
    "holov": shelf.HoloV(keep=0.4, crops=4),
    "divprune": shelf.DivPrune(keep=0.4),
    "random": shelf.Random(keep=0.4),
    "uniformgrid": shelf.UniformGrid(keep=0.4),
    "downscale": shelf.Downscale(keep=0.4),
}
METHODS = {**PRUNERS, **MERGERS, **BEHIND}


def assert_close(got: Tensor, want: Tensor) -> None:
    """The project's one tolerance: 1e-5 x max(1, largest magnitude) in float32."""
    limit = 1e-5 * max(1.0, float(want.abs().max()))
    error = oracle.max_error(got, want)
    assert error <= limit, f"differs by {error:.3g}, allowed are {limit:.3g}"


@contextmanager
def ends(model: Any, name: str) -> Iterator[list[Tensor]]:
    """The sequences that a tower ends with, as they are."""
    noted: list[Tensor] = []
    handle = last_of(model, name).register_forward_hook(lambda *given: noted.append(given[-1]))
    try:
        yield noted
    finally:
        handle.remove()


@contextmanager
def masked(model: Any, name: str, keep: dict[int, Tensor]) -> Iterator[None]:
    """The unmodified tower, whose blocks do not see other keys than these: bool[tiles, patches] per block."""

    def hide(number: int, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        seen = nn.functional.pad(keep[number], (prefix_of(name), 0), value=True)
        mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[:, None, None, :]
        mask = mask.expand(-1, 1, seen.shape[1], -1)
        if name in OPEN_CLIP:
            mask = mask.expand(-1, 2, -1, -1).flatten(0, 1)
        return args, {**kwargs, "attn_mask": mask}

    handles = [
        block.register_forward_pre_hook(lambda *given, n=number: hide(n, *given), with_kwargs=True)
        for number, block in enumerate(blocks_of(model, name))
        if number in keep
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def attended() -> Iterator[list[tuple[Tensor, Tensor, Tensor | None]]]:
    """(queries, keys, mask) of every attention, as they reach the kernel: rotated, and normalised if they are."""
    noted: list[tuple[Tensor, Tensor, Tensor | None]] = []
    original = nn.functional.scaled_dot_product_attention

    def note(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **kw: Any) -> Any:
        noted.append((query.detach(), key.detach(), attn_mask))
        return original(query, key, value, attn_mask, *rest, **kw)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", note)
        # What nn.MultiheadAttention would otherwise do by one fused call.
        patch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
        yield noted


# ------------------------------------------------------------------------------------------------- the whole tower


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("method", METHODS)
def test_keeping_everything_is_the_plain_tower_to_the_bit(name: str, method: str) -> None:
    model, images = tower(name), pictures()
    whole = dataclasses.replace(METHODS[method], keep=1.0)  # type: ignore[type-var]
    if method == "tca-repo":
        whole = dataclasses.replace(whole, drop=None)  # type: ignore[type-var]
    attributes, hooks = set(model.__dict__), oracle.hook_count(model)
    with torch.no_grad():
        want = model(images)
        with ends(model, name) as states, compress(model, whole) as session:
            got = model(images)
            assert session.report.tokens_out == session.report.tokens_in == [PATCHES] * 2
            if name in TIMM:
                features = model.forward_features(images)
        assert torch.equal(got, want)
        if name in TIMM:
            assert torch.equal(features, model.forward_features(images))
            assert torch.equal(features, states[0])
    assert set(model.__dict__) == attributes and oracle.hook_count(model) == hooks


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_compressed_tower_is_a_drop_in_and_images_do_not_know_each_other(name: str, method: str) -> None:
    model, images = tower(name), pictures(3)
    with torch.no_grad():
        want = model(images)
        with compress(model, METHODS[method]) as session:
            got = model(images)
            report = session.report
            alone = model(images[1:2])
            assert session.report.kept[0].tolist() == report.kept[1].tolist()
            if name in TIMM:
                whole = model.forward_features(images)
    assert got.shape == want.shape and report.tokens_in == [PATCHES] * 3
    assert all(0 < left < PATCHES for left in report.tokens_out)
    assert_close(alone[0], got[1])
    if name in TIMM:
        assert whole.shape == (3, prefix_of(name) + PATCHES, WIDTH)
        if METHODS[method].sites == {"vision_layer"}:
            assert session.report.tokens is not None
            for row, kept in enumerate(report.kept):
                places = prefix_of(name) + kept
                assert torch.equal(whole[row, places], session.report.tokens.features[row])
                # a place of which nothing is left holds what is left before it
                for place in range(PATCHES):
                    before = [k for k in kept.tolist() if k <= place] or [int(kept[0])]
                    filled = whole[row, prefix_of(name) + place]
                    assert place < int(kept[0]) or torch.equal(filled, whole[row, prefix_of(name) + before[-1]])
    if METHODS[method].sites != {"vision_layer"}:  # such methods change nothing in the tower itself
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("method", PRUNERS)
def test_dropping_patches_equals_masking_their_keys(name: str, method: str) -> None:
    model, images = tower(name), pictures()
    with torch.no_grad():
        with compress(model, PRUNERS[method]) as session:
            got = model(images)
        report = session.report
        keep: dict[int, Tensor] = {}
        for site in report.sites:
            assert site.layer is not None
            # What leaves behind the attention of a block was seen by that block.
            first = site.layer + (PRUNERS[method].tower_cut == "mlp")
            keep[first] = torch.zeros(2, PATCHES, dtype=torch.bool)
            for row, left in enumerate(site.kept):
                keep[first][row, left] = True
        assert int(keep[max(keep)].sum()) == sum(report.tokens_out) < 2 * PATCHES
        assert {1, 2} <= set(keep) and not keep[2].all()
        with masked(model, name, keep), ends(model, name) as states:
            plain = model(images)
    assert report.tokens is not None
    for row, kept in enumerate(report.kept):
        assert_close(report.tokens.features[row], states[0][row, prefix_of(name) + kept])
    if name == "clip-mean":
        patches = torch.stack([states[0][row, 1 + kept] for row, kept in enumerate(report.kept)])
        plain = (model.ln_post(patches).mean(1) @ model.proj).detach()
    elif name in TIMM and (model.global_pool == "avg" or model.attn_pool is not None):
        prefix = torch.arange(prefix_of(name))
        left = [states[0][row, torch.cat([prefix, len(prefix) + kept])] for row, kept in enumerate(report.kept)]
        plain = model.forward_head(torch.stack(left)).detach()
    assert_close(got, plain)


@pytest.mark.parametrize("name", TOWERS)
def test_scores_are_what_the_tower_computes(name: str) -> None:
    """VisionZip's: attention of CLS, without one of all patches, summed over heads in the last block."""
    model, images = tower(name), pictures()
    with torch.no_grad():
        with attended() as noted:
            model(images)
        with compress(model, shelf.VisionZip(keep=0.4)) as session:
            model(images)
    prefix = prefix_of(name)
    # A head that pools attends once more.
    query, key, _ = noted[2]
    assert query.shape[2] == prefix + PATCHES
    weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
    want = (weights[:, :, 0] if prefix else weights.mean(2)).sum(1)[:, prefix:]
    scores = session.report.sites[0].scores
    assert scores is not None
    assert_close(torch.stack(scores), want)


# --------------------------------------------------------------------- between attention and MLP, composed by hand


@dataclasses.dataclass
class Between:
    """One image in one block, after its attention.

    Attributes:
        number: of the block.
        body: float[n, D], patches with the attention added.
        query, key: float[H, prefix + n, d] as they reach the kernel, rotated if the tower rotates.
        plain: float[H, n, d], keys of patches before they are rotated.
        prefix: tokens before the patches.
    """

    number: int
    body: Tensor
    query: Tensor
    key: Tensor
    plain: Tensor
    prefix: int


Act = Callable[[Between], dict[int, Tensor]]
"""What is left of a block's patches: features by place."""


def composed_by_hand(model: Any, name: str, image: Tensor, act: Act, sizes: Sequence[float] = ()) -> Tensor:
    """float[M, D]: one image through the blocks of a tower, `act` between attention and MLP of each.

    Attention comes from the queries and keys at the kernel, rotary tables are cut by hand; log(size) of patches is
    added to the scores where a size is not 1. `act` may change the sizes.
    """
    prefix, timms = prefix_of(name), name in TIMM
    with ends_of_embedding(model, name) as start:
        model(image)
    hidden, rope = start[0]
    alive = torch.arange(PATCHES)
    for number, block in enumerate(blocks_of(model, name)):
        first, second = (block.norm1, block.norm2) if timms else (block.ln_1, block.ln_2)
        entering, options = first(hidden), {}
        if any(size != 1 for size in sizes):
            bias = torch.tensor([0.0] * prefix + [math.log(size) for size in sizes])
            options["attn_mask"] = bias.expand(*([1, 1] if timms else [2]), len(bias), -1)
        with attended() as noted:
            if rope is not None:
                table = (rope[number] if rope.ndim == 4 else rope)[..., alive, :]
                attention = block.attn(entering, rope=table, **options)
                sine, cosine = table.chunk(2, -1)
                block.attn(entering, rope=torch.cat([sine * 0, cosine * 0 + 1], -1))
            elif timms:
                attention = block.attn(entering, **options)
            else:
                attention = block.attn(entering, entering, entering, need_weights=False, **options)[0]
        hidden = hidden + scale(block, "1", attention)
        query, key = (states[0] for states in noted[0][:2])
        left = act(Between(number, hidden[0, prefix:], query, key, noted[-1][1][0, :, prefix:], prefix))
        places = sorted(left)
        hidden = torch.cat([hidden[:, :prefix], torch.stack([left[i] for i in places])[None]], 1)
        alive = alive[places]
        hidden = hidden + scale(block, "2", block.mlp(second(hidden)))
    return (model.norm(hidden) if timms else hidden)[0]


def tca_by_hand(layers: tuple[int, ...], keep: int) -> Act:
    """TCA's condensation in some blocks, by mean attention, down to `keep`."""

    def act(at: Between) -> dict[int, Tensor]:
        if at.number not in layers:
            return dict(enumerate(at.body))
        asking = at.query[:, 0] if at.prefix else at.query[:, at.prefix :].mean(1)
        weights = (asking[:, None] @ at.key.transpose(-1, -2) * at.query.shape[-1] ** -0.5).softmax(-1)
        mean = weights[:, 0, at.prefix :].mean(0)
        order = sorted(range(len(at.body)), key=lambda i: (-float(mean[i]), i))
        stage = layers.index(at.number)
        target = [round(PATCHES * (keep / PATCHES) ** ((stage + 1) / len(layers))), keep][stage == len(layers) - 1]
        stay, middle_count, _, clusters = split_to(len(at.body), target)
        middle, rest = order[stay : stay + middle_count], order[stay + middle_count :]
        centres, _, merged = condense(at.body[middle], clusters)
        left = {i: at.body[i] for i in order[:stay]}
        left |= {middle[int(c)]: m for c, m in zip(centres, merged, strict=True)}
        left[rest[0]] = sum(mean[i].detach() * at.body[i] for i in rest)  # type: ignore[assignment]
        return left

    return act


def tome_by_hand(sizes: list[float], keep: int, blocks: int) -> Act:
    """ToMe's merging in every block, down to `keep` behind the last one; `sizes` follow."""

    def act(at: Between) -> dict[int, Tensor]:
        target = PATCHES - math.floor((PATCHES - keep) * (at.number + 1) / blocks + 0.5)
        _, source, destination = match(at.plain.mean(0), len(at.body) - target, cls=False, distill=False)
        groups = {i: [i] for i in range(len(at.body)) if i not in [2 * s for s in source]}
        for s, d in zip(source, destination, strict=True):
            groups[2 * d + 1].append(2 * s)
        total = {i: sum(sizes[j] for j in group) for i, group in groups.items()}
        left = {i: sum(sizes[j] * at.body[j] for j in group) / total[i] for i, group in groups.items()}
        sizes[:] = [total[i] for i in sorted(total)]
        return left

    return act


def scale(block: Any, which: str, branch: Tensor) -> Tensor:
    """A branch of a block times its layer scale, under the name that the library gives it."""
    for found in (f"ls{which}", f"ls_{which}", f"gamma_{which}"):
        part = getattr(block, found, None)
        if part is not None:
            scaled: Tensor = part * branch if isinstance(part, Tensor) else part(branch)
            return scaled
    return branch


@contextmanager
def ends_of_embedding(model: Any, name: str) -> Iterator[list[tuple[Tensor, Tensor | None]]]:
    """What enters the first block: hidden states and, of rotary towers, the tables of all patches (of all blocks)."""
    noted: list[tuple[Tensor, Tensor | None]] = []
    tables: list[Tensor] = []

    def note(block: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("rope") is not None:
            tables.append(kwargs["rope"])
        if block is blocks_of(model, name)[0]:
            noted.append((args[0], None))

    handles = [b.register_forward_pre_hook(note, with_kwargs=True) for b in blocks_of(model, name)]
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()
        if tables:
            noted[0] = (noted[0][0], torch.stack(tables) if tables[0].ndim == 3 else tables[0])


def assert_same_with_gradients(model: Any, name: str, method: Compressor, want: Tensor) -> None:
    """What a tower ends with under a method is `want`, float[B, M, D] composed by hand, and so are its gradients."""
    weights = [w for w in model.parameters() if w.requires_grad]
    with ends(model, name) as states, compress(model, method):
        model(pictures())
    assert states[0].shape == want.shape
    assert_close(states[0].detach(), want.detach())
    seed = torch.randn(want.shape, generator=torch.Generator().manual_seed(5))
    got = torch.autograd.grad((states[0] * seed).sum(), weights, allow_unused=True)
    for mine, plain in zip(got, torch.autograd.grad((want * seed).sum(), weights, allow_unused=True), strict=True):
        assert (mine is None) == (plain is None)
        if mine is not None and plain is not None:
            assert_close(mine, plain)


@pytest.mark.parametrize("name", TOWERS)
def test_tca_condenses_between_attention_and_mlp_as_a_plain_composition_with_gradients(name: str) -> None:
    model, layers, keep = tower(name), (0, 2), 7
    act = tca_by_hand(layers, keep)
    want = torch.stack([composed_by_hand(model, name, image[None], act) for image in pictures()])
    assert want.shape[1] == prefix_of(name) + keep
    assert_same_with_gradients(model, name, shelf.TCA(keep=keep, layers=layers, variant="repo"), want)


@pytest.mark.parametrize("name", TOWERS)
def test_tome_merges_between_attention_and_mlp_as_a_plain_composition_with_gradients(name: str) -> None:
    """Tokens go by sizes in the means, and by equation 1 in the attention of the blocks behind."""
    model, keep, found = tower(name), 7, []
    for image in pictures():
        sizes = [1.0] * PATCHES
        found.append(composed_by_hand(model, name, image[None], tome_by_hand(sizes, keep, blocks=3), sizes))
        assert len(sizes) == keep and max(sizes) > 1 and sum(sizes) == PATCHES
    assert_same_with_gradients(model, name, shelf.ToMe(keep=keep), torch.stack(found))


@pytest.mark.parametrize(
    ("method", "attention", "mlp"),
    [
        (shelf.TCA(keep=7, layers=(0, 2)), [17, 12, 12], [12, 12, 8]),
        (shelf.ToMe(keep=7), [17, 14, 11], [14, 11, 8]),
        (shelf.ZeroTPrune(keep=4, layers=(0, 1)), [17, 9, 5], [9, 5, 5]),
    ],
    ids=["tca", "tome", "zerotprune"],
)
def test_a_patch_that_leaves_between_attention_and_mlp_is_in_neither_from_there_on(
    method: Compressor, attention: list[int], mlp: list[int]
) -> None:
    model, images = tower("vit_tiny_patch16_224"), pictures()
    lengths: dict[str, list[int]] = {"mlp": [], "attn": []}
    handles = [
        getattr(block, part).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].shape[1]))
        for block in model.blocks
        for part, seen in lengths.items()
    ]
    with torch.no_grad(), compress(model, method):
        model(images)
    for handle in handles:
        handle.remove()
    assert lengths == {"attn": attention, "mlp": mlp}


# ------------------------------------------------------------------------------------------- one tower, two libraries


def siglip_pair() -> tuple[Any, Any]:
    """The same weights in transformers' SigLIP and in timm's."""
    import transformers as tf

    ours = make_timm("vit_base_patch16_siglip_224", act_layer="gelu_tanh")
    config = tf.SiglipVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=3, num_attention_heads=2, image_size=32,
        patch_size=8, vision_use_head=False,
    )  # fmt: skip
    theirs = tf.SiglipVisionModel(config).eval()
    inner: Any = theirs._modules.get("vision_model", theirs)
    with torch.no_grad():
        inner.embeddings.patch_embedding.load_state_dict(ours.patch_embed.proj.state_dict())
        inner.embeddings.position_embedding.weight.copy_(ours.pos_embed[0])
        inner.post_layernorm.load_state_dict(ours.norm.state_dict())
        for block, layer in zip(ours.blocks, inner.encoder.layers, strict=True):
            pairs = (("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"),
                     ("attn.proj", "self_attn.out_proj"))  # fmt: skip
            for one, other in pairs:
                layer.get_submodule(other).load_state_dict(block.get_submodule(one).state_dict())
            parts = zip(block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True)
            for part, (weight, bias) in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                layer.self_attn.get_submodule(part).load_state_dict({"weight": weight, "bias": bias})
    return ours, theirs


@pytest.mark.parametrize("method", METHODS)
def test_a_tower_loses_the_same_in_timm_as_in_transformers(method: str) -> None:
    ours, theirs = siglip_pair()
    images = pictures(3)
    with torch.no_grad():
        assert_close(ours.forward_features(images), theirs(images).last_hidden_state)
        with compress(ours, METHODS[method]) as mine:
            got = ours.forward_features(images)
        with compress(theirs, METHODS[method]) as session:
            want = theirs(images).last_hidden_state
    assert [kept.tolist() for kept in mine.report.kept] == [kept.tolist() for kept in session.report.kept]
    assert_close(got, want)


# ---------------------------------------------------------------------------------------------- holders and refusals


def test_a_whole_clip_model_is_compressed_in_its_tower() -> None:
    model, images = make_clip(), pictures()
    with torch.no_grad():
        with compress(model, shelf.TCA(keep=7)) as session:
            got = model.encode_image(images)
            with pytest.raises(mmtoken.MMTokenError, match="already"):
                attach(model.visual, shelf.TCA(keep=7))
        assert session.report.tokens_out == [7, 7]
        with compress(model.visual, shelf.TCA(keep=7)):
            assert torch.equal(model.visual(images), got)
        assert not torch.equal(model.encode_image(images), got)


def test_a_timm_tower_inside_open_clip_is_timms() -> None:
    import open_clip

    text = {"context_length": 8, "vocab_size": 60, "width": 16, "heads": 2, "layers": 1}
    vision = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 224}
    model = open_clip.model.CustomTextCLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval()
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with compress(model, shelf.ToMe(keep=3)) as session:
            got = model.encode_image(images)
        with compress(model.visual.trunk, shelf.ToMe(keep=3)):
            assert torch.equal(model.encode_image(images), got)
    assert session.report.tokens_out == [3, 3]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "clip"])
@pytest.mark.parametrize(
    ("method", "why"),
    [
        (shelf.FastV(), "inside or before a whole model"),
        (shelf.SnapKV(), "inside or before a whole model"),
        (shelf.CDPruner(), "reads the prompt"),
        (shelf.TRIPS(), "reads the prompt"),
        (shelf.SparseVLM(), "reads the prompt"),
        (shelf.STCCacher(), "projections that are modules"),
        (shelf.QueCC(), "reads the prompt"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Compressor) else "",
)
def test_what_a_tower_cannot_host_is_refused_with_its_reason(name: str, method: Compressor, why: str) -> None:
    with pytest.raises(UnsupportedError, match=why):
        attach(tower(name), method)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: make_timm("beit_base_patch16_224"), "expected a transformers"),
        (lambda: make_timm("vit_medium_patch16_rope_reg1_gap_256"), "registers but no class token"),
        (lambda: make_clip(attentional_pool=True), "attentional_pool"),
        (lambda: make_clip(block_type="custom", qk_norm=True), "only its default blocks"),
    ],
    ids=["beit", "registers alone", "coca", "custom blocks"],
)
def test_other_towers_are_refused_by_name(make: Any, why: str) -> None:
    with pytest.raises(UnsupportedError, match=why):
        attach(make(), shelf.Random(keep=3))


def test_other_blocks_are_refused_or_have_no_place_between_attention_and_mlp() -> None:
    from timm.models.vision_transformer import ParallelScalingBlock

    model = make_timm("vit_tiny_patch16_224", block_fn=ParallelScalingBlock)
    with pytest.raises(UnsupportedError, match="attends by NoneType"):
        attach(model, shelf.TCA())
    model = make_timm("vit_tiny_patch16_224", block_fn=_post_norm())
    for method in (shelf.TCA(), shelf.ToMe(), shelf.ZeroTPrune()):
        with pytest.raises(UnsupportedError, match="normalised behind"):
            attach(model, method)
    with torch.no_grad(), compress(model, shelf.FlowCut(keep=0.4)) as session:
        model(pictures())
    assert session.report.tokens_out == [6, 6]


def _post_norm() -> Any:
    from timm.models.vision_transformer import ResPostBlock

    return ResPostBlock


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "clip"])
def test_calls_that_nothing_can_be_restored_for_are_refused(name: str) -> None:
    model, images = tower(name), pictures()
    plain = model(images).detach()
    with compress(model, shelf.ToMe(keep=3)):
        with pytest.raises(UnsupportedError, match="between the blocks"):
            model.forward_intermediates(images)
        if (
            name in TIMM and "attn_mask" in inspect.signature(type(model).forward).parameters
        ):  # not in Eva of timm 1.0.22
            with pytest.raises(UnsupportedError, match="attn_mask was given"):
                model(images, attn_mask=torch.zeros(1, 1, 1, 1))
        model.set_grad_checkpointing(True)
        try:
            with pytest.raises(UnsupportedError, match="grad_checkpointing"):
                model(images)
        finally:
            model.set_grad_checkpointing(False)
        model(images)  # an error leaves nothing behind
    assert torch.equal(model(images), plain)


@pytest.mark.parametrize(
    "make",
    [lambda: make_timm("vit_tiny_patch16_224", patch_drop_rate=0.5), lambda: make_clip(patch_dropout=0.5).visual],
    ids=["timm", "open_clip"],
)
def test_patch_dropout_is_refused_while_training(make: Any) -> None:
    model = make()
    with compress(model, shelf.ToMe(keep=3)) as session:
        model(pictures())
        assert session.report.tokens_out == [3, 3]
        with pytest.raises(UnsupportedError, match="patch dropout"):
            model.train()(pictures())


def test_heads_that_pool_over_patches_refuse_rows_of_different_length() -> None:
    """Padding of a short row would count in the mean."""
    images, ragged = pictures(), _Ragged()
    for model in (tower("vit_small_patch16_dinov3"), tower("clip-mean")):
        with torch.no_grad(), compress(model, ragged) as session:
            with pytest.raises(UnsupportedError, match="pools over all places"):
                model(images)
            assert model(images[:1]).shape[0] == 1
            assert session.report.tokens_out == [PATCHES - 1]
    for name in ("vit_tiny_patch16_224", "clip"):
        with torch.no_grad(), compress(tower(name), ragged) as session:
            got = tower(name)(images)
            assert session.report.tokens_out == [PATCHES - 1, PATCHES - 2]
        with torch.no_grad():
            assert_close(got[1:], _dropped(tower(name), name, images[1:], 2))


@dataclasses.dataclass(frozen=True)
class _Ragged(Compressor):
    """Drops the last patch of the first image of a batch, the last two of the second one, before block 1."""

    keep: int | float = 1.0
    positions: Positions = "keep"

    def vision_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        if layer != 1:
            return tokens
        left = torch.arange(tokens.source.shape[1]) < PATCHES - 1 - torch.arange(len(tokens))[:, None]
        return tokens.where(left)


def _dropped(model: Any, name: str, images: Tensor, count: int) -> Tensor:
    keep = torch.arange(PATCHES).expand(len(images), -1) < PATCHES - count
    with masked(model, name, {1: keep, 2: keep}):
        out: Tensor = model(images)
    return out


def test_parts_that_cut_at_two_places_of_a_block_cannot_be_combined() -> None:
    with pytest.raises(mmtoken.MMTokenError, match="at two places"):
        shelf.Sequential(parts=(shelf.FlowCut(keep=0.5), shelf.ToMe(keep=0.5)))
    both = shelf.Sequential(parts=(shelf.TCA(keep=0.5), shelf.DivPrune(keep=0.5)))
    with torch.no_grad(), compress(tower("clip"), both) as session:
        tower("clip")(pictures())
    assert both.tower_cut == "mlp" and session.report.tokens_out == [4, 4]


def test_towers_are_found_without_importing_their_libraries() -> None:
    code = (
        "import sys, torch, mmtoken\nfrom mmtoken.backbones.registry import adapt\n"
        "try: adapt(torch.nn.Linear(1, 1))\nexcept mmtoken.MMTokenError: pass\n"
        "print(sorted({'timm', 'open_clip'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
