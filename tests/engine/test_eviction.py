"""The cache site: decoding without evicted entries is decoding with their keys hidden per head, and nothing else.

The reference is the unmodified model whose decode steps cannot see, per layer and key/value head, the keys that the
method let go (`oracle.masked_keys`, `decode_only`). What was let go is taken from the method itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from mmtoken import MMTokenError, attach, compress, compress_inputs
from mmtoken.compressors import DivPrune, FastV, KeyDiff, Schedule
from mmtoken.compressors.base import CacheEntry, Compressor, Context, Positions, Recording
from mmtoken.engine.cache import LogicalDynamicLayer, cache_bytes
from mmtoken.engine.eviction import check_choice, per_head
from mmtoken.errors import UnsupportedError
from mmtoken.tokens import kept_count
from tests import oracle
from tests.backbones.tiny_models import CELLS, COHERE, build, visual_mask
from tests.contract.matrix import Cell, assert_close, batch, dense, dense_logits, keeps, logits, tiny
from tests.contract.reference import alone, evicted_by_layer, recording
from tests.contract.test_modes import options
from tests.contract.test_renumber import reference

LLAVA = ("llava", "image")
cells = pytest.mark.parametrize("cell", CELLS, ids="-".join)


@dataclass(frozen=True)
class Hashed(Compressor):
    """Per head, the entries whose keys have the largest value in one feature: content only, and heads disagree."""

    keep: int | float = 0.5
    positions: Positions = "keep"
    everything: bool = False
    chosen: ClassVar[list[tuple[int, CacheEntry, Tensor]]] = []

    def cache(self, entry: CacheEntry, layer: int, ctx: Context) -> Tensor:
        score = entry.keys[..., layer].float()
        stay = entry.valid[:, None].expand(score.shape[:3]).clone()
        ordinal = 0
        for row in range(len(score)):
            items = entry.item[row].unique().tolist() if not self.everything else [None]
            for item in items:
                if item == -1:
                    continue
                mine = entry.valid[row] if item is None else entry.item[row] == item
                total = int(mine.sum()) if item is None else ctx.original_counts[ordinal]
                steps = 1 if item is None else ctx.steps[ordinal]
                ordinal += 1
                places = mine.nonzero()[:, 0]
                for head in range(score.shape[1]):
                    order = score[row, head, places].argsort(descending=True, stable=True)
                    stay[row, head, places[order[kept_count(self.keep, total, steps) :]]] = False
        self.chosen.append((layer, entry, stay))
        return stay


@pytest.fixture(autouse=True)
def nothing_chosen() -> Iterator[None]:
    Hashed.chosen.clear()
    yield
    Hashed.chosen.clear()


def kept_per_head(length: int) -> dict[int, Tensor]:
    """bool[B, G, L] per layer, from what the method chose at its last call for each layer."""
    masks = {}
    for layer, entry, stay in Hashed.chosen:
        keep = torch.ones(*stay.shape[:2], length, dtype=torch.bool)
        keep[:, :, : stay.shape[2]] = stay | ~entry.valid[:, None]
        masks[layer] = keep
    return masks


@cells
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["plain", "left_padded", "ragged", "padded_ragged", "multi_image", "text_row"])
def test_decoding_without_entries_is_decoding_with_their_keys_hidden_per_head(cell: Cell, case: str, attn: str) -> None:
    model, inputs = tiny(cell[0], attn), batch(cell, case)
    with compress(model, Hashed(keep=0.4)) as session:
        got = oracle.generate_with_logits(model, inputs, max_new_tokens=5)
    masks = kept_per_head(inputs["input_ids"].shape[1])
    assert sorted(masks) == [0, 1, 2, 3]
    assert any(bool((mask[:, 0] != mask[:, 1]).any()) for mask in masks.values())
    with oracle.masked_keys(model, masks, decode_only=True):
        want = oracle.generate_with_logits(model, inputs, max_new_tokens=5)
    assert_close(got.logits, want.logits)
    assert torch.equal(got.sequences, want.sequences)
    # the prompt itself is untouched: its logits are those of the uncompressed model to the bit
    assert torch.equal(got.logits[:, 0], dense(cell, case, attn).logits[:, 0])
    assert session.report.tokens_out == session.report.tokens_in
    assert [site.site for site in session.report.sites] == ["cache"] * 4


@cells
@pytest.mark.parametrize("everything", [False, True], ids=["visual", "all"])
def test_mask_mode_hides_what_drop_mode_evicts(cell: Cell, everything: bool) -> None:
    for case in ("left_padded", "padded_ragged"):
        model, inputs, method = tiny(cell[0]), batch(cell, case), Hashed(keep=0.4, everything=everything)
        with compress(model, method) as session:
            want = oracle.generate_with_logits(model, inputs, max_new_tokens=4)
            report = session.report
        with compress(model, method, mode="mask") as session:
            got = oracle.generate_with_logits(model, inputs, max_new_tokens=4)
        assert_close(got.logits, want.logits)
        assert torch.equal(got.sequences, want.sequences)
        assert session.report.kv_bytes == session.report.kv_bytes_dense > report.kv_bytes


@cells
@pytest.mark.parametrize("everything", [False, True], ids=["visual", "all"])
@pytest.mark.parametrize("case", ["padded_ragged", "multi_image", "text_row"])
def test_a_row_in_a_batch_loses_what_it_loses_alone(cell: Cell, case: str, everything: bool) -> None:
    model, inputs = tiny(cell[0]), batch(cell, case)
    length = inputs["input_ids"].shape[1]
    visual = visual_mask(model, inputs)
    with compress(model, Hashed(keep=0.4, everything=everything)):
        together = oracle.generate_with_logits(model, inputs)
        whole = kept_per_head(length)
        for row in range(len(inputs["input_ids"])):
            if not bool(visual[row].any()):
                continue  # a prompt without visual tokens is none of ours; in the batch it loses nothing visual
            single = alone(model, cell, inputs, row)
            Hashed.chosen.clear()
            by_itself = oracle.generate_with_logits(model, single)
            start = single["input_ids"].shape[1]
            mine = kept_per_head(start)
            assert all(torch.equal(mine[layer][0], whole[layer][row, :, length - start :]) for layer in mine)
            assert torch.equal(together.sequences[row, length:], by_itself.sequences[0, start:])
            assert_close(by_itself.logits[0], together.logits[row])


MODES: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "temperature": 0.8},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("cell", [LLAVA, ("qwen3_vl", "image"), ("smolvlm", "image")], ids="-".join)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("drop", ["drop", "mask"])
def test_beams_and_samples_agree_with_the_reference(cell: Cell, mode: str, drop: Any) -> None:
    if cell == LLAVA and not oracle.ENCODES_APART:
        pytest.skip("this version of transformers mixes the images of beams")
    model, inputs = tiny(cell[0]), batch(cell, "padded_ragged")
    with compress(model, Hashed(keep=0.4), mode=drop):
        got = oracle.generate_with_logits(model, inputs, max_new_tokens=6, **MODES[mode])
    with oracle.masked_keys(model, kept_per_head(inputs["input_ids"].shape[1]), decode_only=True):
        want = oracle.generate_with_logits(model, inputs, max_new_tokens=6, **MODES[mode])
    assert torch.equal(got.sequences, want.sequences)
    assert_close(got.logits, want.logits)


@cells
@pytest.mark.parametrize("case", ["plain", "padded_ragged"])
@pytest.mark.parametrize("drop", ["drop", "mask"])
def test_a_second_turn_on_the_returned_cache_agrees(cell: Cell, case: str, drop: Any) -> None:
    model, inputs = tiny(cell[0]), batch(cell, case)
    with compress(model, Hashed(keep=0.4), mode=drop) as session:
        got = oracle.second_turn(model, inputs, max_new_tokens=4)
    assert len(session.reports) == 1  # the second turn brings no pixels and loses nothing
    with oracle.masked_keys(model, kept_per_head(inputs["input_ids"].shape[1]), decode_only=True):
        want = oracle.second_turn(model, inputs, max_new_tokens=4)
    assert torch.equal(got.sequences, want.sequences)
    assert_close(got.logits, want.logits)


@pytest.mark.parametrize("drop", ["drop", "mask"])
def test_a_second_image_on_a_compressed_cache_loses_only_tokens_of_its_own(drop: Any) -> None:
    model, inputs = tiny("llava"), batch(LLAVA, "padded_ragged")
    length = inputs["input_ids"].shape[1]
    ids, mask = inputs["input_ids"], inputs["attention_mask"]

    def run() -> Tensor:
        first = model(**oracle.clone(inputs), use_cache=True)
        out = model(
            input_ids=ids,
            attention_mask=torch.cat([mask, torch.ones_like(mask)], 1),
            pixel_values=inputs["pixel_values"].flip(-1),
            use_cache=True,
            **{oracle.CACHE: first[oracle.CACHE]},
        )
        return model(
            input_ids=ids[:, -1:],
            attention_mask=torch.cat([mask, torch.ones_like(mask), mask[:, -1:]], 1),
            use_cache=True,
            **{oracle.CACHE: out[oracle.CACHE]},
        ).logits

    with torch.no_grad(), compress(model, Hashed(keep=0.4), mode=drop) as session:
        got = run()
    assert len(session.reports) == 2
    first, second = Hashed.chosen[:4], Hashed.chosen[4:]
    masks: dict[int, Tensor] = {}
    for (layer, before, stay), (_, after, later) in zip(first, second, strict=True):
        both = torch.ones(*stay.shape[:2], 2 * length, dtype=torch.bool)
        both[:, :, :length] = stay | ~before.valid[:, None]
        n = later.shape[2]
        both[:, :, length:] = later[:, :, n - length :]
        # entries of the first turn are nobody's visual tokens any more
        assert bool((after.item[:, : n - length] == -1).all()) and bool(
            later[:, :, : n - length][after.valid[:, None, : n - length].expand(-1, 2, -1)].all()
        )
        masks[layer] = both
    with torch.no_grad(), _hidden_after(model, masks, [length, 2 * length]):
        want = run()
    assert_close(got, want)


@contextmanager
def _hidden_after(model: nn.Module, masks: dict[int, Tensor], ends: list[int]) -> Iterator[None]:
    """Hide the first turn's keys from the second turn on, and the second turn's from what follows."""
    length = ends[0]
    early = {k: torch.cat([m[..., :length], torch.ones_like(m[..., length:])], -1) for k, m in masks.items()}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        past = int(kwargs[oracle.CACHE].get_seq_length()) if kwargs.get(oracle.CACHE) is not None else 0
        stack.append(
            oracle.masked_keys(model, {k: m[..., :length] for k, m in early.items()}, decode_only=True)
            if past < ends[1]
            else oracle.masked_keys(model, masks, decode_only=True)
        )
        stack[-1].__enter__()

    def after(*_: Any) -> None:
        stack.pop().__exit__(None, None, None)

    stack: list[Any] = []
    decoder = oracle.text_model(model)
    handles = [
        decoder.register_forward_pre_hook(before, with_kwargs=True),
        decoder.register_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@cells
@pytest.mark.parametrize("drop", ["drop", "mask"])
def test_speculative_decoding_is_refused_once_a_guess_is_taken_back(cell: Cell, drop: Any) -> None:
    model, inputs = tiny(cell[0]), batch(cell, "single")
    how = {"assistant_model": build(cell[0], seed=3, layers=2), **options(cell[0])}
    with compress(model, Hashed(keep=0.4), mode=drop), pytest.raises(UnsupportedError, match="speculative decoding"):
        oracle.generate_with_logits(model, inputs, max_new_tokens=12, **how)


@pytest.mark.parametrize("drop", ["drop", "mask"])
def test_only_what_came_after_the_prompt_can_be_cropped(drop: Any) -> None:
    model, inputs = tiny("llava"), batch(LLAVA, "padded_ragged")
    length, mask = inputs["input_ids"].shape[1], inputs["attention_mask"]
    more = inputs["input_ids"][:, -3:]

    def run() -> Tensor:
        cache = model(**oracle.clone(inputs), use_cache=True)[oracle.CACHE]
        seen = torch.cat([mask, torch.ones_like(more)], 1)
        model(input_ids=more, attention_mask=seen, use_cache=True, **{oracle.CACHE: cache})
        cache.crop(-2)
        assert cache.get_seq_length() == length + 1
        again = model(input_ids=more[:, 1:], attention_mask=seen, use_cache=True, **{oracle.CACHE: cache}).logits
        caches.append(cache)
        return again

    caches: list[Any] = []
    with torch.no_grad(), compress(model, Hashed(keep=0.4), mode=drop):
        got = run()
        caches[0].crop(-3)
        with pytest.raises(UnsupportedError, match="speculative decoding"):
            caches[0].crop(-1)
    with torch.no_grad(), oracle.masked_keys(model, kept_per_head(length), decode_only=True):
        want = run()
    assert_close(got, want)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["plain", "padded_ragged"])
def test_keeping_every_entry_is_the_plain_model_to_the_bit(attn: str, case: str) -> None:
    for cell in CELLS:
        model, inputs = tiny(cell[0], attn), batch(cell, case)
        with compress(model, Hashed(keep=1.0)) as session:
            forward = logits(model, inputs)
            got = oracle.generate_with_logits(model, inputs, max_new_tokens=4)
        want = dense(cell, case, attn)
        assert torch.equal(forward, dense_logits(cell, case, attn))
        assert torch.equal(got.logits, want.logits) and torch.equal(got.sequences, want.sequences)
        assert session.report.kv_bytes == session.report.kv_bytes_dense
        assert all(site.tokens_in == site.tokens_out for site in session.report.sites)


@pytest.mark.parametrize("case", ["plain", "padded_ragged"])
def test_the_cache_is_smaller_and_the_report_says_by_how_much(case: str) -> None:
    model, inputs = tiny("llava"), batch(LLAVA, case)
    with torch.no_grad(), compress(model, Hashed(keep=4)) as session:
        cache = model(**oracle.clone(inputs), use_cache=True)[oracle.CACHE]
    report = session.report
    real, visual = inputs["attention_mask"].sum(-1), visual_mask(model, inputs).sum(-1)
    items = torch.bincount(torch.tensor(report.item_rows), minlength=len(real))
    longest = int((real - visual + 4 * items).max())
    layer = cache.layers[2]
    assert layer.keys.shape[2] == layer.values.shape[2] == longest
    assert layer.keys.untyped_storage().nbytes() == layer.keys.numel() * 4  # nothing bigger is held on to
    assert layer.get_seq_length() == inputs["input_ids"].shape[1]
    per_entry = 2 * 2 * 16 * 4  # keys and values, heads, width, bytes
    assert report.kv_bytes == cache_bytes(cache) == 4 * len(real) * longest * per_entry < report.kv_bytes_dense
    for number, site in enumerate(report.sites):
        assert (site.site, site.layer) == ("cache", number)
        assert site.tokens_in == report.tokens_in and site.tokens_out == [4] * len(report.tokens_in)
        assert site.heads is not None
        for kept, heads in zip(site.kept, site.heads, strict=True):
            assert [len(head) for head in heads] == [4, 4]
            assert kept.tolist() == sorted({i for head in heads for i in head.tolist()})
    assert report.to_dict()["sites"][0]["heads"][0][0] == report.sites[0].heads[0][0].tolist()
    stay = Hashed.chosen[1][2]
    row, places = report.item_rows[0], report.places[0]
    for head in range(2):
        assert report.sites[1].heads[0][head].tolist() == stay[row, head, places].nonzero()[:, 0].tolist()


@dataclass(frozen=True)
class Both(Hashed):
    """A cut before the decoder, one between its layers, and eviction."""

    def llm_input(self, tokens: Any, ctx: Context) -> Any:
        return tokens.top(tokens.features[..., 0], 0.75)

    def llm_layer(self, tokens: Any, layer: int, ctx: Context) -> Any:
        return tokens.top(tokens.features[..., 0], 0.5)

    def cut_layers(self, depth: int) -> tuple[int, ...]:
        return (2,)


@cells
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["plain", "padded_ragged"])
@pytest.mark.parametrize("drop", ["drop", "mask"])
def test_eviction_after_cuts_agrees(cell: Cell, case: str, attn: str, drop: Any) -> None:
    model, inputs = tiny(cell[0], attn), batch(cell, case)
    length = inputs["input_ids"].shape[1]
    with compress(model, Both(keep=0.6), mode=drop) as session:
        got = oracle.generate_with_logits(model, inputs, max_new_tokens=5)
    report = session.report
    cuts = {site.layer: site for site in report.sites if site.site != "cache"}
    chosen = {layer: (entry, stay) for layer, entry, stay in Hashed.chosen}
    prefill, decode = {}, {}
    for layer in range(4):
        site = cuts[2 if layer >= 2 else None]
        seen = inputs["attention_mask"].bool().clone()
        separators = visual_mask(model, inputs).clone()
        for row, places in zip(report.item_rows, report.places, strict=True):
            separators[row, places] = report.tokens.protected.new_zeros(len(places))
        for item, (row, places) in enumerate(zip(report.item_rows, report.places, strict=True)):
            gone = torch.ones(len(places), dtype=torch.bool)
            gone[site.kept[item]] = False
            tokens = report.tokens
            gone[tokens.source[item][tokens.valid[item] & tokens.protected[item]]] = False
            seen[row, places[gone]] = False
        prefill[layer] = seen
        entry, stay = chosen[layer]
        per_head = torch.zeros(len(seen), 2, length, dtype=torch.bool)
        for row in range(len(seen)):
            # what the method saw of a row are, in order, the tokens that were left
            assert int(entry.valid[row].sum()) == int(seen[row].sum())
            per_head[row][:, seen[row]] = stay[row][:, entry.valid[row]]
        decode[layer] = per_head
    counts = [[len(kept) for kept in site.kept] for site in report.sites if site.site == "cache"]
    assert counts[0] and any(bool((mask[:, 0] != mask[:, 1]).any()) for mask in decode.values())
    with oracle.masked_keys(model, decode, decode_only=True), oracle.masked_keys(model, prefill):
        want = oracle.generate_with_logits(model, inputs, max_new_tokens=5)
    assert_close(got.logits, want.logits)
    assert torch.equal(got.sequences, want.sequences)


@cells
@pytest.mark.parametrize("case", ["plain", "padded_ragged"])
def test_eviction_after_renumbering_cuts_agrees(cell: Cell, case: str) -> None:
    model, inputs = tiny(cell[0]), batch(cell, case)
    parts = (DivPrune(), FastV(layer=2), KeyDiff())
    method = Schedule(keep=0.25, positions="renumber", parts=parts, ratios=(3.0, 2.0, 1.0))
    with recording(model) as calls, compress(model, method) as session:
        got = oracle.generate_with_logits(model, inputs, max_new_tokens=5)
    keep = keeps(session.report, cell, case)
    evicted = evicted_by_layer(session.report, keep)
    assert sorted(evicted) == [0, 1, 2, 3]
    with oracle.masked_keys(model, evicted, decode_only=True):
        want = reference(model, inputs, calls[0], keep, got.sequences)
    assert_close(got.logits, want[:, inputs["input_ids"].shape[1] - 1 : -1])


# ------------------------------------------------------------------------------------------- what the method is told


@pytest.mark.parametrize("cell", [LLAVA, ("qwen3_vl", "image"), ("qwen2_5_vl", "video")], ids="-".join)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_the_method_is_told_what_the_eager_model_computes(cell: Cell, attn: str) -> None:
    model, inputs = tiny(cell[0], attn), batch(cell, "padded_ragged")
    eager = tiny(cell[0], "eager")
    with torch.no_grad():
        weights = eager(**oracle.clone(inputs), output_attentions=True).attentions
    with compress(model, Hashed(keep=1.0)):
        logits(model, inputs)
    real = inputs["attention_mask"].bool()
    assert len(Hashed.chosen) == 4
    for layer, entry, _ in Hashed.chosen:
        assert torch.equal(entry.valid, real)
        assert torch.equal(entry.item >= 0, visual_mask(model, inputs))
        # queries, keys and scaling give the attention
        groups = entry.keys.repeat_interleave(entry.queries.shape[1] // entry.keys.shape[1], 1)
        scores = entry.queries @ groups.transpose(-1, -2) * entry.scaling
        n = scores.shape[-1]
        allowed = torch.ones(n, n, dtype=torch.bool).tril() & entry.valid[:, None, None]
        got = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        where = real[:, None, :, None].expand_as(got)
        assert_close(got[where], weights[layer][where])


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_the_last_query_rotated_by_hand_is_the_rotated_one(cell: Cell) -> None:
    model = tiny(cell[0])
    with compress(model, Hashed(keep=1.0)):
        logits(model, batch(cell, "padded_ragged"))
    assert len(Hashed.chosen) == 4
    for layer, entry, _ in Hashed.chosen:
        # The next position follows the last token's.
        cosine, sine = (table[:, None] for table in entry.rotary((entry.length - 1)[:, None]))
        query = entry.unrotated[:, :, -1:]
        half = query.shape[-1] // 2
        turned = query * cosine + torch.cat([-query[..., half:], query[..., :half]], -1) * sine
        if cell[0] in COHERE:
            turned = query * cosine + torch.stack([-query[..., 1::2], query[..., ::2]], -1).flatten(-2) * sine
            if layer % 2:  # sees everything, and rotates nothing
                turned = query
                assert torch.equal(cosine, torch.ones_like(cosine)) and not sine.any()
        assert_close(turned, entry.queries[:, :, -1:])


@pytest.mark.parametrize("length", [3, 4])
def test_queries_are_per_head_however_a_module_puts_them_out(length: int) -> None:
    queries = torch.randn(2, 4, length, 6, generator=torch.Generator().manual_seed(length))
    rotated = queries.roll(1, -1)  # lengths stay, as in a rotation
    for put_out in (queries, queries.transpose(1, 2), queries.transpose(1, 2).flatten(2)):
        assert torch.equal(per_head(put_out, rotated), queries)


def test_items_are_numbered_within_their_row() -> None:
    model, inputs = tiny("llava"), batch(LLAVA, "multi_image")
    with compress(model, Hashed(keep=1.0)) as session:
        logits(model, inputs)
    _, entry, _ = Hashed.chosen[0]
    ordinal: dict[int, int] = {}
    for row, places in zip(session.report.item_rows, session.report.places, strict=True):
        assert bool((entry.item[row, places] == ordinal.setdefault(row, 0)).all())
        ordinal[row] += 1
    assert max(ordinal.values()) > 1


def test_separators_are_not_offered() -> None:
    cell = ("llava_onevision", "image")
    model, inputs = tiny(cell[0]), batch(cell, "plain")
    with compress(model, Hashed(keep=2)) as session:
        oracle.generate_with_logits(model, inputs, max_new_tokens=2)
    from tests.contract.matrix import protected

    newline = protected(cell, "plain")
    assert bool(newline.any())
    for _, entry, stay in Hashed.chosen:
        assert bool((entry.item[newline] == -1).all())
        assert bool(stay[newline[:, None].expand_as(stay)].all())
    assert session.report.sites[0].tokens_out == [2] * len(session.report.tokens_in)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_a_call_without_a_cache_is_refused() -> None:
    model, inputs = tiny("llava"), batch(LLAVA, "plain")
    with compress(model, Hashed()) as session:
        with pytest.raises(UnsupportedError, match="use_cache=False: Hashed takes entries out of the cache"):
            logits(model, inputs, use_cache=False)
        with pytest.raises(UnsupportedError, match="use_cache"):
            oracle.generate_with_logits(model, inputs, use_cache=False)
        assert session.reports == []
        logits(model, inputs)  # the refusal left nothing behind
        assert len(session.reports) == 1


def test_training_without_a_cache_trains_what_acts_elsewhere() -> None:
    model, inputs = build("llava").train(), batch(LLAVA, "plain")
    with compress(model, Hashed()), pytest.raises(UnsupportedError, match="use_cache=False"):
        model(**oracle.clone(inputs), use_cache=False)
    with compress(model, Both()) as session:
        model(**oracle.clone(inputs), use_cache=False)
    assert [site.site for site in session.report.sites] == ["llm_input", "llm_layer"]
    with compress(model.eval(), Both()), pytest.raises(UnsupportedError, match="use_cache=False"):
        model(**oracle.clone(inputs), use_cache=False)


@pytest.mark.parametrize("drop", ["drop", "mask"])
def test_a_static_cache_is_refused(drop: Any) -> None:
    model, inputs = tiny("llava"), batch(LLAVA, "plain")
    with (
        compress(model, Hashed(), mode=drop),
        pytest.raises(UnsupportedError, match="allocated in advance and cannot shrink"),
    ):
        oracle.generate_with_logits(model, inputs, cache_implementation="static")


@pytest.mark.parametrize("kind", ["quantised", "offloaded"])
def test_other_caches_are_refused(kind: str) -> None:
    from tests.contract.test_refusals import CACHES

    make, words = CACHES[kind]
    with compress(tiny("llava"), Hashed()) as session:
        with pytest.raises(UnsupportedError, match=words):
            logits(tiny("llava"), batch(LLAVA, "plain"), use_cache=True, **{oracle.CACHE: make("llava")})
        assert session.reports == []


def test_where_there_is_no_decoder_or_no_query_it_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="this is a bare tower"):
        attach(tiny("clip_vision"), Hashed())
    with pytest.raises(UnsupportedError, match="on their cache"):
        compress_inputs(tiny("llava"), Hashed(), batch(LLAVA, "plain"))
    model = build("llama")
    del model.model.layers[2].self_attn.q_proj
    with pytest.raises(UnsupportedError, match="decoder layer 2 has neither q_norm nor q_proj"):
        attach(model, Hashed(), visual=torch.ones(1, 4, dtype=torch.bool))
    assert oracle.hook_count(model) == 0


@dataclass(frozen=True)
class Remembers(Hashed):
    def recording(self, depth: int) -> Recording:
        return Recording(layers=(1,), tokens=2, calls=2)


def test_history_cannot_be_recorded_from_such_a_cache() -> None:
    with pytest.raises(UnsupportedError, match="Remembers records what generated tokens look at"):
        attach(tiny("llava"), Remembers())


@dataclass(frozen=True)
class Wrong(Hashed):
    how: str = "uneven"

    def cache(self, entry: CacheEntry, layer: int, ctx: Context) -> Tensor:
        stay = super().cache(entry, layer, ctx)
        if self.how == "uneven":
            stay[:, 0, -1] = False
            stay[:, 1, -1] = True
            return stay | entry.valid[:, None].expand_as(stay) & torch.tensor([True, False])[None, :, None]
        return stay.float() if self.how == "floats" else stay[:, 0]


@pytest.mark.parametrize(
    ("how", "words"), [("uneven", "heads must keep the same"), ("floats", "float32"), ("flat", "expected bool")]
)
def test_a_wrong_answer_of_the_method_is_named(how: str, words: str) -> None:
    with compress(tiny("llava"), Wrong(how=how)), pytest.raises(MMTokenError, match=words):
        logits(tiny("llava"), batch(LLAVA, "plain"))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("drop", ["drop", "mask"])
def test_rows_that_lose_different_numbers_need_no_mask_of_the_caller(attn: str, drop: Any) -> None:
    model = tiny("llama", attn)
    ids = torch.arange(24).view(2, 12) + 5
    visual = torch.zeros(2, 12, dtype=torch.bool)
    visual[0, 1:10] = visual[1, 3:6] = True

    def run() -> Tensor:
        cache = model(input_ids=ids, use_cache=True)[oracle.CACHE]
        steps = [model(input_ids=ids[:, i : i + 1], use_cache=True, **{oracle.CACHE: cache}).logits for i in (3, 7)]
        return torch.cat(steps, 1)

    with torch.no_grad(), compress(model, Hashed(keep=2), visual=visual, mode=drop) as session:
        got = run()
    assert session.report.sites[0].tokens_out == [2, 2] and session.report.tokens_in == [9, 3]
    with torch.no_grad(), oracle.masked_keys(model, kept_per_head(12), decode_only=True):
        want = run()
    assert_close(got, want)


def test_padding_is_never_kept() -> None:
    with compress(tiny("llava"), Hashed()):
        logits(tiny("llava"), batch(LLAVA, "padded_ragged"))
    _, entry, _ = Hashed.chosen[0]
    everything = torch.ones(entry.keys.shape[:3], dtype=torch.bool)
    assert not bool(entry.valid.all())
    assert torch.equal(check_choice(everything, entry, "x"), entry.valid[:, None].expand_as(everything))


def test_rows_of_a_hidden_or_evicted_layer_can_be_picked_and_repeated() -> None:
    for mode in ("hide", "evict"):
        layer = LogicalDynamicLayer()
        keys = torch.arange(2 * 2 * 4.0).view(2, 2, 4, 1)
        layer.update(keys, keys)
        keep = torch.tensor([[[1, 1, 0, 1], [0, 1, 1, 1]], [[1, 0, 0, 0], [0, 0, 1, 0]]]).bool()
        getattr(layer, mode)(keep)
        names = ("keys", "values", "slots", "hidden")
        before = {name: getattr(layer, name) for name in names if getattr(layer, name) is not None}
        layer.batch_repeat_interleave(2)
        layer.batch_select_indices(torch.tensor([3, 0]))
        assert ("hidden" if mode == "hide" else "slots") in before
        for name, value in before.items():
            assert torch.equal(getattr(layer, name), value[[1, 0]])


def test_what_heads_hold_at_a_place_stands_at_the_lowest_of_its_columns() -> None:
    layer = LogicalDynamicLayer()
    keys = torch.arange(2 * 5.0).view(1, 2, 5, 1)
    layer.update(keys, keys)
    layer.evict(torch.tensor([[[1, 0, 1, 0, 1], [0, 1, 1, 1, 0]]]).bool())
    assert layer.held()[0][0, :, :, 0].tolist() == [[0, 2, 4], [6, 7, 8]]
    assert layer.all_columns().tolist() == [[0, 2, 3]]
    assert (layer.dropped, layer.get_seq_length()) == (2, 5)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_nothing_is_left_on_the_model(attn: str) -> None:
    model, inputs = build("llava", attn), batch(LLAVA, "plain")
    logits(model, inputs)
    with compress(model, Hashed()):
        pass  # registries keep the tapped attention
    before = oracle.fingerprint(model)
    with compress(model, Hashed()):
        oracle.generate_with_logits(model, inputs, max_new_tokens=2)
    assert oracle.fingerprint_changes(before, oracle.fingerprint(model)) == []
