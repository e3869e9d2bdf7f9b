"""BUS by hand, and against plain loops."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mmtoken import MMTokenError, VisualTokens
from mmtoken.compressors import BUS, Context
from mmtoken.compressors.base import Dims
from mmtoken.compressors.bus import BUSParts, Selector, patch_text_loss, patches_in_box
from mmtoken.compressors.trips import select_and_fuse
from mmtoken.errors import InputError, UnsupportedError
from tests.compressors.batches import item

DIMS = Dims(tower=8, tokens=8, llm=6, blocks=4)


def parts_of(method: BUS, seed: int = 0) -> BUSParts:
    torch.manual_seed(seed)
    return method.build(DIMS)


class Tower(Context):
    """A tower whose blocks change nothing."""

    tokenwise_projector = True

    def __init__(self, text: Tensor, counts: list[int], cls: Tensor | None, parts: BUSParts) -> None:
        self.text_vector, self.original_counts, self.cls, self.learned = text, counts, cls, parts
        self.depth, self.memory = 4, {}

    def prompt_embedding(self, tokens: VisualTokens) -> Tensor:
        return self.text_vector

    def tower_cls(self, tokens: VisualTokens) -> Tensor | None:
        return self.cls


def batch(lengths: list[int], seed: int = 0) -> tuple[VisualTokens, Tensor, Tensor]:
    """Patches with NaN as padding, texts, CLS."""
    generator = torch.Generator().manual_seed(seed)
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    features = torch.randn(len(lengths), max(lengths), 8, generator=generator)
    tokens = VisualTokens.from_features(features.masked_fill(~valid[..., None], torch.nan), valid=valid)
    return tokens, torch.randn(len(lengths), 6, generator=generator), torch.randn(len(lengths), 8, generator=generator)


def test_the_selection_of_the_specification_s_example() -> None:
    tokens = VisualTokens.from_features(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 4.0]]]))
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.4]])
    for normalise, wanted in ((False, 1.7), (True, 3.4)):
        left, fused = select_and_fuse(tokens, scores, [2], normalise=normalise)
        assert left.source[0][~fused[0]].tolist() == [0, 2]
        torch.testing.assert_close(left.features[fused], torch.tensor([[0.0, wanted]]), rtol=0, atol=1e-6)
        assert left.source[fused].tolist() == [3]  # the best of the others


def test_the_loss_of_the_specification_s_example() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.4], [0.2, 0.3, 0.4, 0.5]])
    overlap = torch.tensor([[True, False, True, False], [True, True, True, True]])
    loss = patch_text_loss(scores, overlap, torch.tensor([True, False]))
    assert float(loss) == pytest.approx(0.308093, abs=1e-6)
    second = -sum(math.log(a) for a in (0.2, 0.3, 0.4, 0.5)) / 4
    assert float(patch_text_loss(scores, overlap)) == pytest.approx((0.308093 + second) / 2, abs=1e-6)
    assert float(patch_text_loss(scores, overlap, torch.tensor([False, False]))) == 0.0
    with pytest.raises(InputError, match="overlap has shape"):
        patch_text_loss(scores, overlap[:, :2])


def test_patches_that_overlap_a_box_at_all_count() -> None:
    boxes = torch.tensor([[0.3, 0.0, 0.5, 0.3], [0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.5001, 0.5001]])
    got = patches_in_box(boxes, rows=2, columns=4).view(3, 2, 4)
    assert got[0].int().tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]  # up to 0.5, where the third column begins
    assert bool(got[1].all())
    assert got[2].int().tolist() == [[0, 0, 0, 0], [0, 0, 1, 0]]


@pytest.mark.parametrize(("patches", "share", "kept"), [(256, 0.7, 179), (256, 0.5, 128), (16, 1.0, 16)])
def test_shapes_of_the_selection(patches: int, share: float, kept: int) -> None:
    tokens, text, cls = batch([patches])
    method = BUS(keep=8, share=share)
    context = Tower(text, tokens.counts(), cls, parts_of(method))
    left = method.vision_layer(tokens, 2, context)
    # CLS, the kept patches, the fused one
    assert 1 + left.counts()[0] == (1 + kept + 1 if kept < patches else 1 + patches)
    assert method.project(left, lambda same: same, context).counts() == [8]
    if kept == patches:
        assert torch.equal(left.features, tokens.features)


def by_hand(method: BUS, parts: BUSParts, features: Tensor, text: Tensor, cls: Tensor) -> dict[int, Tensor]:
    """Place -> summary of one item, from the weights."""
    n = len(features)
    mapped = parts.selector.text.weight @ text + parts.selector.text.bias
    scores = []
    for patch in features:
        hidden = torch.cat([patch, mapped])
        for number in (0, 2, 4):
            layer = parts.selector.score[number]
            hidden = layer.weight @ hidden + layer.bias
            hidden = functional.gelu(hidden) if number < 4 else hidden
        scores.append(1 / (1 + math.exp(-float(hidden))))
    order = sorted(range(n), key=lambda i: (-scores[i], i))
    budget = min(n, max(1, math.floor(method.keep * n + 0.5)))
    stay = max(budget, min(n, max(1, math.floor(method.share * n + 0.5))))
    rest = order[stay:]
    memory = [cls] + [features[i] for i in sorted(order[:stay])]
    if rest:
        fused = sum(scores[i] * features[i] for i in rest)
        memory.append(fused / sum(scores[i] for i in rest) if method.normalise else fused)
    places = sorted(order[:budget])
    query = torch.stack([features[i] for i in places])
    for layer in parts.decoder.layers:
        normed = layer.norm1(query)
        query = query + attend(layer.self_attn, normed, normed)
        query = query + attend(layer.multihead_attn, layer.norm2(query), torch.stack(memory))
        query = query + layer.linear2(functional.gelu(layer.linear1(layer.norm3(query))))
    return dict(zip(places, query, strict=True))


def attend(attention: Any, query: Tensor, memory: Tensor) -> Tensor:
    """Multi-head attention, head by head."""
    width, heads = query.shape[-1], attention.num_heads
    weights, biases = attention.in_proj_weight.split(width), attention.in_proj_bias.split(width)
    q, k, v = (x @ w.T + b for x, w, b in zip((query, memory, memory), weights, biases, strict=True))
    size = width // heads
    found = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        found.append((q[:, part] @ k[:, part].T / math.sqrt(size)).softmax(-1) @ v[:, part])
    return attention.out_proj(torch.cat(found, -1))


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(("heads", "layers"), [(1, 1), (2, 2)])
@torch.no_grad()
def test_selector_and_decoder_are_those_of_plain_loops(heads: int, layers: int, normalise: bool) -> None:
    lengths = [13, 1, 6, 2]
    tokens, text, cls = batch(lengths, seed=4)
    method = BUS(keep=0.3, share=0.6, heads=heads, decoder_layers=layers, normalise=normalise)
    parts = parts_of(method, seed=2)
    context = Tower(text, tokens.counts(), cls, parts)
    left = tokens
    for block in range(1, 4):
        left = method.vision_layer(left, block, context)
    made = method.project(left, lambda same: same.replace(features=same.features * 2), context)
    for row, length in enumerate(lengths):
        wanted = by_hand(method, parts, tokens.features[row, :length], text[row], cls[row])
        got = item(made, row)
        assert got["source"].tolist() == sorted(wanted)
        for place, feature in zip(got["source"].tolist(), got["features"], strict=True):
            torch.testing.assert_close(feature, 2 * wanted[place], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got["size"], torch.full_like(got["size"], length / len(wanted)))


def test_other_texts_change_the_selection_and_permuted_patches_permute_the_scores() -> None:
    torch.manual_seed(0)
    selector = Selector(8, 6)
    patches, text = torch.randn(1, 9, 8), torch.randn(2, 6)
    order = torch.randperm(9)
    scores = selector(patches, text[:1])
    torch.testing.assert_close(selector(patches[:, order], text[:1]), scores[:, order])
    assert bool(((scores > 0) & (scores < 1)).all())
    assert not torch.allclose(selector(patches, text[1:]), scores)


@torch.no_grad()
def test_the_decoder_ignores_the_order_of_what_it_reads_and_follows_that_of_its_queries() -> None:
    parts = parts_of(BUS(heads=2, decoder_layers=2))
    start, memory = torch.randn(1, 4, 8), torch.randn(1, 7, 8)
    valid, real = torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 7, dtype=torch.bool)
    made = parts.summarise(start, valid, memory, real)
    order, other = torch.randperm(4), torch.randperm(7)
    torch.testing.assert_close(parts.summarise(start, valid, memory[:, other], real), made, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        parts.summarise(start[:, order], valid, memory, real), made[:, order], rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_learned_queries_read_the_item_and_not_the_selected_patches_directly() -> None:
    method = BUS(keep=3, share=0.5, queries="learned", heads=2)
    parts = parts_of(method)
    assert parts.queries is not None and tuple(parts.queries.shape) == (3, 8)
    tokens, text, cls = batch([12, 2], seed=1)
    context = Tower(text, tokens.counts(), cls, parts)
    left = method.vision_layer(tokens, 2, context)
    made = method.project(left, lambda same: same, context)
    assert made.counts() == [3, 2]
    start = parts.queries[None]
    memory = torch.cat([cls[:1, None], item(left, 0)["features"][None]], 1)
    ones = torch.ones(1, memory.shape[1], dtype=torch.bool)
    wanted = parts.summarise(torch.zeros_like(start), ones[:, :3], memory, ones)
    torch.testing.assert_close(made.features[0], wanted[0], rtol=1e-5, atol=1e-5)
    assert parts_of(BUS()).queries is None


def test_gradients_reach_the_selector_through_the_fused_token_and_the_loss() -> None:
    tokens, text, cls = batch([12])
    for share, reached in ((0.5, True), (1.0, False)):
        method = BUS(keep=0.25, share=share, heads=2)
        parts = parts_of(method)
        seen: list[Tensor] = []
        parts.selector.register_forward_hook(lambda module, inputs, scores, seen=seen: seen.append(scores))
        context = Tower(text, tokens.counts(), cls, parts)
        made = method.project(method.vision_layer(tokens, 2, context), lambda same: same, context)
        made.features.sum().backward(retain_graph=True)
        found = parts.selector.text.weight.grad
        assert (found is not None and bool((found != 0).any())) == reached
        attention = parts.decoder.layers[0].multihead_attn
        assert bool((attention.in_proj_weight.grad != 0).any()) and bool((attention.out_proj.weight.grad != 0).any())
    assert parts.selector.text.weight.grad is None or not bool(parts.selector.text.weight.grad.any())
    patch_text_loss(seen[0], torch.arange(12)[None] < 4).backward()
    assert parts.selector.text.weight.grad is not None and bool((parts.selector.text.weight.grad != 0).any())


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_the_work_saved_in_the_tower(share: float) -> None:
    """The ratio of multiplications of a ViT-B/16 at 256 px with a cut before block 6, against sums over its blocks."""
    width, patches, cut, depth = 768, 256, 6, 12

    def block(length: int) -> int:
        projections = 4 * length * width * width
        attention = 2 * length * length * width
        feed_forward = 2 * length * width * 4 * width
        return projections + attention + feed_forward

    tokens, text, cls = batch([patches])
    method = BUS(keep=8, share=share, layer=cut)
    context = Tower(text, [patches], cls, parts_of(method))
    context.depth = depth
    lengths, left = [], tokens
    lengths.append(1 + patches)
    for layer in range(1, depth):
        left = method.vision_layer(left, layer, context)
        lengths.append(1 + left.counts()[0])
    kept = math.floor(share * patches + 0.5)

    def f(length: int) -> int:
        return 12 * length * width**2 + 2 * length**2 * width

    wanted = (cut * f(patches + 1) + (depth - cut) * f(kept + 2)) / (depth * f(patches + 1))
    assert sum(map(block, lengths)) / (depth * block(patches + 1)) == pytest.approx(wanted, rel=1e-12)


def test_the_block_is_half_of_the_depth_or_as_given() -> None:
    assert BUS().selecting(12) == 6 and BUS().selecting(3) == 1 and BUS(layer=2).selecting(3) == 2
    with pytest.raises(UnsupportedError, match=r"layer=3 but this tower has 3 blocks .* from 1 to 2"):
        BUS(layer=3).tower_layers(3, 4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("share", value) for value in (0, 1.5, 64, True, "0.5", None, math.nan)),
        *(("layer", value) for value in (0, -1, True, 2.0, "2")),
        *(("decoder_layers", value) for value in (0, True, 1.0, None, 129, 10**9)),
        *(("heads", value) for value in (0, 2.0, None)),
        *(("queries", value) for value in ("tokens", None, 1)),
        ("normalise", 1),
    ],
)
def test_a_bad_setting_names_itself_and_a_way_out(field: str, value: Any) -> None:
    with pytest.raises(MMTokenError, match=rf"{field}=.*(give|use|goes up to)"):
        dataclasses.replace(BUS(), **{field: value})


def test_learned_queries_need_a_count_and_heads_must_divide_the_width() -> None:
    with pytest.raises(MMTokenError, match=r"keep=0.25: give a count with queries='learned'"):
        BUS(queries="learned")
    with pytest.raises(MMTokenError, match="heads=3 does not divide the tower's width 8; give"):
        BUS(heads=3).build(DIMS)
