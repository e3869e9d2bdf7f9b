"""What all compressors have in common: budgets, batching, separators, dtypes, settings and declared facts."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtoken import MMTokenError
from mmtoken.compressors import Compressor, base
from mmtoken.compressors.base import Budget, Cost, Need, Parity
from mmtoken.compressors.registry import COMPRESSORS
from mmtoken.errors import InputError, KeepError
from tests.compressors.batches import SETTINGS, act, budgets, item, lengths, make, subset

every = pytest.mark.parametrize("name", SETTINGS)
budgeted = pytest.mark.parametrize("name", [name for name in SETTINGS if name not in ("regionmask", "rekv")])
reading = pytest.mark.parametrize(
    "name",
    [
        "bus",
        "cdpruner",
        "divprune",
        "fastv",
        "holov",
        "prumerge",
        "pyramiddrop",
        "stcpruner",
        "tome",
        "trips",
        "vidcom2",
        "visionzip",
        "vispruner",
    ],
)


def with_keep(name: str, keep: int | float) -> Compressor:
    if name == "quecc" and type(keep) is int and keep > 0:
        keep = 1 / keep  # its windows leave a fraction, counts are refused
    if name == "videoscan" and keep != 1.0 and type(keep) in (int, float) and keep > 0 and not 1 < keep < 2:
        keep = 1  # a carrier per frame, or nothing is done
    return dataclasses.replace(SETTINGS[name], keep=keep)  # type: ignore[type-var]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Two items are equal: whole numbers exactly, features up to rounding (batched products add up differently)."""
    for field in a:
        exact = field not in ("features", "size")
        torch.testing.assert_close(a[field], b[field], rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5, msg=field)


def test_every_compressor_is_covered():
    assert {type(method) for method in SETTINGS.values()} == set(COMPRESSORS)


# ----------------------------------------------------------------------------------------------------------- behaviour


@budgeted
@settings(deadline=None, max_examples=25)
@given(sizes=lengths(), keep=budgets(), seed=st.integers(0, 999), separators=st.booleans())
def test_the_budget_is_met_as_declared_and_separators_stay(name, sizes, keep, seed, separators):
    tokens, context = make(sizes, seed, separators=separators)
    method = with_keep(name, keep)
    left = act(method, tokens, context)
    wanted, found = tokens.budget(method.keep), left.counts()
    if method.budget == "exact":
        assert found == wanted
    elif method.budget == "adaptive":
        assert all(1 <= n <= total for n, total in zip(found, tokens.counts(), strict=True))
    else:
        assert method.budget == "at_most" and all(1 <= n <= most for n, most in zip(found, wanted, strict=True))
    for row in range(len(sizes)):
        before, after = item(tokens, row), item(left, row)
        positions = after["source"].tolist()
        assert len(set(positions)) == len(positions) and set(positions) <= set(before["source"].tolist())
        separate = before["source"][before["protected"]]
        assert torch.equal(after["source"][after["protected"]], separate)
        assert torch.equal(after["features"][after["protected"]], before["features"][before["protected"]])


@every
@settings(deadline=None, max_examples=15)
@given(sizes=lengths(), seed=st.integers(0, 999), separators=st.booleans())
def test_an_item_in_a_padded_batch_is_treated_as_it_is_alone(name, sizes, seed, separators):
    tokens, context = make(sizes, seed, separators=separators)
    method = SETTINGS[name]
    together = act(method, tokens, context)
    for row, length in enumerate(sizes):
        fields = {field: getattr(tokens, field)[row : row + 1, :length] for field in ("features", "valid", "protected")}
        alone = type(tokens).from_features(**fields)
        context_alone = context.rows([row], length)
        same(item(together, row), item(act(method, alone, context_alone), 0))


@every
@settings(deadline=None, max_examples=10)
@given(sizes=lengths(), seed=st.integers(0, 999), order=st.randoms(use_true_random=False))
def test_permuting_items_permutes_results(name, sizes, seed, order):
    tokens, context = make(sizes, seed, separators=True)
    index = list(range(len(sizes)))
    order.shuffle(index)
    straight = act(SETTINGS[name], tokens, context)
    shuffled = act(SETTINGS[name], subset(tokens, index), context.rows(index))
    for place, row in enumerate(index):
        same(item(shuffled, place), item(straight, row))


@every
def test_keeping_all_returns_every_token_to_the_bit_where_that_is_declared(name):
    tokens, context = make([12, 7], separators=True)
    method = with_keep(name, 1.0)
    left = act(method, tokens, context)
    if method.identity_at_full is not True:
        assert isinstance(method.identity_at_full, str) and method.identity_at_full
        return
    for row in range(2):
        before, after = item(tokens, row), item(left, row)
        assert all(torch.equal(before[field], after[field]) for field in before)


@every
def test_tokens_that_are_not_merged_come_out_as_they_went_in(name):
    tokens, context = make([16, 9])
    left = act(SETTINGS[name], tokens, context)
    for row in range(2):
        before, after = item(tokens, row), item(left, row)
        alone = after["size"] == 1
        if not SETTINGS[name].merges:
            assert bool(alone.all())
        if name != "downscale" and not SETTINGS[name].trainable:
            assert torch.equal(after["features"][alone], before["features"][after["source"][alone]])


@pytest.mark.parametrize("name", [name for name, method in SETTINGS.items() if not method.merges])
def test_order_is_preserved(name):
    tokens, context = make([16, 9], separators=True)
    left = act(SETTINGS[name], tokens, context)
    for source, valid in zip(left.source, left.valid, strict=True):
        positions = source[valid].tolist()
        assert positions == sorted(positions)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_stay_half_precision(name, dtype):
    tokens, context = make([16, 9], dtype=dtype, separators=True)
    left = act(SETTINGS[name], tokens, context)
    assert left.features.dtype == dtype and left.size.dtype == torch.float32
    assert bool(left.features[left.valid].isfinite().all())


@every
def test_what_is_handed_in_is_not_changed(name):
    tokens, context = make([16, 9], separators=True)
    before = {field: getattr(tokens, field).clone() for field in ("features", "source", "size", "valid", "protected")}
    act(SETTINGS[name], tokens, context)
    for field, value in before.items():
        torch.testing.assert_close(getattr(tokens, field), value, rtol=0, atol=0, equal_nan=True)


@every
def test_only_what_is_declared_is_read(name):
    tokens, context = make([16, 9])
    method = SETTINGS[name]
    act(method, tokens, context)
    # Features of tower blocks are declared by naming the blocks.
    features = {"tower_features"} if method.tower_layers(8, 9) else set()
    assert set(context.asked) - features == method.needs - {"content_seed"}


@reading
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_a_number_in_what_decides_is_an_error_that_names_the_item(name, bad):
    tokens, context = make([16, 16])
    tokens.features[1, 3] = bad
    context.keys[1, 3] = bad
    context.received[1, 3] = math.nan  # a softmax over infinities
    with pytest.raises(InputError, match=r"NaN for item [01]"):
        act(SETTINGS[name], tokens, context)


@pytest.mark.parametrize("name", ["random", "uniformgrid"])
def test_controls_that_read_no_features_do_not_mind_not_a_number(name):
    tokens, context = make([16])
    clean = act(SETTINGS[name], tokens, context).source
    tokens.features[:] = math.nan
    assert torch.equal(act(SETTINGS[name], tokens, context).source, clean)


# ------------------------------------------------------------------------------------------------------------ settings


BAD_SETTINGS = [
    *(("fastv", "layer", value) for value in (0, -1, True, "2", 2.0, None, [2], np.int64(2))),
    *(("cdpruner", "sign_flip", value) for value in (1, None, "yes")),
    *(("cdpruner", "theta", value) for value in (0.0, 1.0, -0.5, math.nan, 1, True, "0.5")),
    *(("dycoke", "variant", value) for value in ("official", None, True)),
    *(("holov", "crops", value) for value in (0, -1, True, "16", 4.0, None)),
    *(("holov", "weight", value) for value in (-0.1, math.nan, math.inf, 1, True, "0.09", None)),
    *(("prumerge", field, value) for field in ("adaptive", "plus") for value in (1, None, "yes")),
    *(("prumerge", "neighbours", value) for value in (-1, True, "32", 4.0, None)),
    *(("prumerge", "variant", value) for value in ("official", None)),
    *(("regionmask", "dilation", value) for value in (-1, True, "1", 1.0, None)),
    *(("regionmask", "mode", value) for value in ("learned", None, True)),
    *(("regionmask", "site", value) for value in ("pixels", None, True)),
    *(("stccacher", "interval", value) for value in (0, -1, True, "2", 2.0, None)),
    *(("stccacher", "chunk", value) for value in (0, True, 1.0, None)),
    *(("stccacher", "share_selection", value) for value in (1, None, "yes")),
    *(("stccacher", "similarity", value) for value in ("euclid", None, 2)),
    *(("vispruner", "important", value) for value in (-0.1, 1.1, math.nan, 1, True, "0.5", None)),
    *(("vispruner", "step", value) for value in (0, True, "8", 8.0, None)),
    *(("visionzip", "contextual", value) for value in (-1, True, "4", 4.0, [4], np.int64(4))),
    *(("visionzip", "variant", value) for value in ("official", None, True, ["repo"])),
    *(("pyramiddrop", "variant", value) for value in ("official", None, 1)),
    *(
        ("pyramiddrop", "layers", value)
        for value in ("246", 2, (), (0, 1), (2, 2), (4, 2), (1, True), (1, "2"), (1.0,))
    ),
    *(
        ("pyramiddrop", "shares", value)
        for value in ("0.5", 0.5, (), (0.0,), (1.5,), (0.4, 0.5), (64,), (True,), (0.5,))
    ),
    *(("random", "seed", value) for value in (-1, True, "0", 1.0, None, np.int64(1))),
    *(("stcpruner", "score", value) for value in ("cosine", None, True)),
    *(("stcpruner", "memory", value) for value in ("list", None, True)),
    *(("stcpruner", "alpha", value) for value in (-0.1, 1.1, math.nan, 1, True, "0.5", None)),
    *(("stcpruner", "channel_ratio", value) for value in (0.0, -0.1, 1.1, math.nan, 1, True, "0.5", None)),
    *(
        (name, field, value)
        for name, field in (("stcpruner", "window"), ("stcpruner", "chunk_frames"))
        for value in (0, -1, True, "4", 4.0, None)
    ),
    *(("vidcom2", "channel_ratio", value) for value in (0.0, -0.1, 1.1, math.nan, 1, True, "0.5", None)),
    *(("vidcom2", "exact", value) for value in (1, None, "yes")),
    *(("vidcom2", "floor", value) for value in (-1, True, "1", 1.0, None)),
    *(("videoscan", "bank", value) for value in (1, 0, True, "64", 64.0)),
    *(("videoscan", "extra_kv", value) for value in (-1, True, "8", 8.0, None)),
    *(("videoscan", "kv_select_layer", value) for value in (-1, True, "8", 8.0)),
    *(("videoscan", "carrier", value) for value in ("mean", None, True)),
    *(("videoscan", "without", value) for value in ("both", True, 1)),
    *(("downscale", "token_pixels", value) for value in (0, -1, True, "784", 784.0, None)),
]


@pytest.mark.parametrize(("name", "field", "value"), BAD_SETTINGS)
def test_a_bad_setting_is_an_error_that_names_it_its_value_and_a_way_out(name, field, value):
    with pytest.raises(MMTokenError) as error:
        dataclasses.replace(SETTINGS[name], **{field: value})
    assert f"{field}=" in str(error.value)
    shown = tuple(value) if isinstance(value, list | tuple) and field in ("layers", "shares") and value else value
    assert any(
        text in str(error.value) for text in (repr(shown), *map(repr, value if isinstance(value, tuple) else ()))
    )
    assert any(word in str(error.value) for word in ("give", "use", "cannot"))


@every
@pytest.mark.parametrize("keep", [0, -1, 1.5, math.nan, True, "0.5", None, np.int64(4)], ids=repr)
def test_a_bad_budget_is_refused_by_every_compressor(name, keep):
    with pytest.raises(KeepError, match="keep="):
        with_keep(name, keep)


@every
@pytest.mark.parametrize("positions", ["drop", None, True, "KEEP"])
def test_unknown_positions_are_refused_by_every_compressor(name, positions):
    with pytest.raises(MMTokenError, match=r"positions=.*use 'keep' or 'renumber'"):
        dataclasses.replace(SETTINGS[name], positions=positions)


@budgeted
def test_settings_cannot_be_changed_and_can_be_hashed_and_compared(name):
    method = SETTINGS[name]
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.keep = 0.9
    assert hash(method) == hash(dataclasses.replace(method)) and method == dataclasses.replace(method)
    if name == "videoscan":  # it has no other budget
        assert method != dataclasses.replace(method, positions="keep")
    else:
        assert method != with_keep(name, 0.9)


# --------------------------------------------------------------------------------------------------------------- facts


@pytest.mark.parametrize("cls", COMPRESSORS, ids=lambda cls: cls.__name__)
def test_facts_are_complete_and_of_the_declared_kinds(cls):
    assert cls.title and cls.paper and cls.licence
    assert cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}(keep")  # written, not made by dataclass
    assert cls.budget in get_args(Budget)
    assert cls.identity_at_full is True or (isinstance(cls.identity_at_full, str) and cls.identity_at_full)
    assert cls.needs <= set(get_args(Need))
    assert cls.parity in get_args(Parity) and cls.cost in get_args(Cost) and 2020 <= cls.year <= 2030
    assert cls.sites and cls.sites <= set(base.SITES)
    for fact in ("merges", "size_bias", "query_agnostic", "causal", "trainable", "patchwise_projector", "control"):
        assert isinstance(getattr(cls, fact), bool), fact
    fields = [field.name for field in dataclasses.fields(cls)]
    assert fields[:2] == ["keep", "positions"]


@pytest.mark.parametrize("cls", COMPRESSORS, ids=lambda cls: cls.__name__)
def test_facts_agree_with_each_other(cls):
    method = SETTINGS[cls.__name__.lower()]
    if {"text_attention", "next_attention", "text", "prompt", "history"} & cls.needs:
        assert not cls.query_agnostic
    if {"text_attention", "next_attention", "history"} & cls.needs:
        assert "llm_layer" in cls.sites
    if "llm_layer" not in cls.sites:
        assert not method.cut_layers(8)
    if "text_attention" in cls.needs:
        assert all(cut - 1 in method.score_layers(8) for cut in method.cut_layers(8))
    assert {"transitions"} & cls.needs == ({"transitions"} if method.watched_layers(8) else set())
    assert ("history" in cls.needs) == (method.recording(8) is not None)
    assert cls.control == (cls.paper == "control")
    assert cls.cost in get_args(base.Cost) and cls.parity in get_args(base.Parity) and 2020 <= cls.year <= 2026
    required = dataclasses.fields(cls)[0].default is dataclasses.MISSING
    assert required == cls.control, "controls have no default budget, methods have the paper's"
    if not cls.control:
        letters = "".join(letter for letter in cls.title.lower() if letter.isalnum())
        assert "arXiv" in cls.paper and letters.endswith(cls.__name__.lower())


@every
def test_settings_survive_json(name):
    method = SETTINGS[name]
    data = json.loads(json.dumps(method.to_dict()))
    assert data["class_path"] == f"mmtoken.compressors.{type(method).__name__}"
    assert type(method)(**data["init_args"]) == method
