"""The presses: hand-computed numbers, plain-loop copies of the formulas, budgets, and prompts without padding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtoken import MMTokenError
from mmtoken.compressors import TOVA, ExpectedAttention, KeyDiff, Knorm, SnapKV
from mmtoken.compressors.base import CacheEntry, Context
from mmtoken.compressors.expectedattention import (
    average_rotation,
    expected_attention_scores,
    query_statistics,
)
from mmtoken.compressors.keydiff import choose_in_blocks, keydiff_scores
from mmtoken.compressors.knorm import knorm_scores
from mmtoken.compressors.presses import Press, Share, keep_best
from mmtoken.compressors.snapkv import pool_rows, snapkv_scores
from mmtoken.compressors.tova import average_row, tova_scores
from mmtoken.errors import InputError, UnsupportedError

PRESSES = {"snapkv": SnapKV, "knorm": Knorm, "expectedattention": ExpectedAttention, "keydiff": KeyDiff, "tova": TOVA}
KEYS = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]])


def best(scores: Tensor, count: int) -> list[list[int]]:
    stay = keep_best(scores, [Share(torch.arange(scores.shape[1]), count)])
    return [row.nonzero()[:, 0].tolist() for row in stay]


def close(got: Tensor, want: Any) -> None:
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), rtol=0, atol=2e-6)


# ---------------------------------------------------------------------------------------------- computed by hand


def test_snapkv_by_hand() -> None:
    rows = torch.tensor([[[0.1, 0.4, 0.1, 0.1, 0.3, 0.0], [0.3, 0.2, 0.1, 0.1, 0.2, 0.1]]])
    scores = pool_rows(rows, window=2, kernel=3, groups=1)
    close(scores, [[0.166667, 0.2, 0.166667, 0.066667, 1.2, 1.2]])
    assert best(scores, 3) == [[1, 4, 5]]


def test_snapkv_pools_maxima_too() -> None:
    rows = torch.tensor([[[0.1, 0.4, 0.1, 0.1, 0.3, 0.0], [0.3, 0.2, 0.1, 0.1, 0.2, 0.1]]])
    close(pool_rows(rows, 2, 3, 1, "max"), [[0.3, 0.3, 0.3, 0.1, 1.3, 1.3]])


def test_knorm_by_hand() -> None:
    scores = knorm_scores(KEYS)
    close(scores, [[-5, -1, -2, -1.414214]])
    assert best(scores, 2) == [[1, 3]]


def test_expected_attention_by_hand() -> None:
    mean, covariance = torch.tensor([[1.0, 0.0]]), torch.diag(torch.tensor([0.5, 2.0]))[None]
    keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    values = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [0.6, 0.8]]])
    scaling = 2**-0.5
    close(expected_attention_scores(mean, covariance, keys, None, scaling), [[0.297077, 0.213126, 0.489797]])
    close(expected_attention_scores(mean, covariance, keys, values, scaling), [[0.297077, 0.426252, 0.489797]])
    close(
        expected_attention_scores(mean, None, keys, None, scaling), torch.tensor([[1, 0, 1]]).mul(scaling).softmax(-1)
    )
    plus = expected_attention_scores(mean, covariance, keys, values, scaling, epsilon=0.5)
    close(plus, [[0.797077, 1.426252, 0.989797]])
    with pytest.raises(InputError, match="sinks=3 leaves none of 3"):
        expected_attention_scores(mean, covariance, keys, values, scaling, sinks=3)


def test_the_rotation_is_averaged_over_future_positions() -> None:
    angle = torch.tensor([2.0, 3.0])[:, None].expand(-1, 2)
    rotation = average_rotation(angle.cos(), angle.sin())
    close(rotation, [[-0.703070, -0.525209], [0.525209, -0.703070]])


def test_neighbours_are_rotated_where_tables_hold_each_angle_twice_in_a_row() -> None:
    angle = torch.tensor([[0.5, 0.5, 1.0, 1.0], [1.5, 1.5, 2.0, 2.0]])
    rotation = average_rotation(angle.cos(), angle.sin())
    want = torch.zeros(4, 4)
    for pair, angles in ((0, (0.5, 1.5)), (2, (1.0, 2.0))):
        cosine, sine = (sum(f(a) for a in angles) / 2 for f in (math.cos, math.sin))
        want[pair : pair + 2, pair : pair + 2] = torch.tensor([[cosine, -sine], [sine, cosine]])
    close(rotation, want)
    close(average_rotation(torch.ones(2, 4), torch.zeros(2, 4)), torch.eye(4))


def test_statistics_of_queries_by_hand() -> None:
    mean, covariance = query_statistics(torch.tensor([[[1.0, 0.0], [3.0, 2.0]]]))
    assert covariance is not None
    close(mean, [[2, 1]])
    close(covariance, [[[1, 1], [1, 1]]])
    assert query_statistics(torch.ones(1, 2, 2), covariance=False)[1] is None


def test_keydiff_by_hand() -> None:
    scores = keydiff_scores(KEYS)
    close(scores, [[-0.994966, -0.677147, -0.735848, -0.999138]])
    assert best(scores, 2) == [[1, 2]]


def test_tova_by_hand() -> None:
    scores = average_row(torch.tensor([[0.2, 0.5, 0.1, 0.2], [0.6, 0.1, 0.1, 0.2]]), groups=2)
    close(scores, [[0.4, 0.3, 0.1, 1.4]] * 2)
    assert best(scores, 2) == [[0, 3]] * 2


# ----------------------------------------------------------------------------------------------- by plain loops


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loop_attention(queries: Tensor, keys: Tensor, head: int, query: int, scaling: float) -> list[float]:
    """What one query pays to each key of its group; later keys get nothing."""
    (heads, fed, _), (groups, length, _) = queries.shape, keys.shape
    group, place = head // (heads // groups), length - fed + query
    weights = [math.exp(scaling * float(queries[head, query] @ keys[group, j])) for j in range(place + 1)]
    return [w / sum(weights) for w in weights] + [0.0] * (length - place - 1)


@pytest.mark.parametrize(("groups", "pooling"), [(1, "mean"), (2, "mean"), (4, "max")])
def test_snapkv_equals_a_loop(groups: int, pooling: Any) -> None:
    heads, length, fed, window, kernel, scaling = 4, 11, 7, 3, 5, 0.4
    queries, keys = random(heads, fed, 6), random(groups, length, 6, seed=1)
    old = length - window
    table = torch.zeros(groups, old)
    for head in range(heads):
        rows = [loop_attention(queries, keys, head, fed - window + r, scaling) for r in range(window)]
        mean = [sum(row[j] for row in rows) / window for j in range(old)]
        for j in range(old):
            near = [mean[i] for i in range(j - kernel // 2, j + kernel // 2 + 1) if 0 <= i < old]
            pooled = sum(near) / kernel if pooling == "mean" else max(near)
            table[head // (heads // groups), j] += pooled / (heads // groups)
    want = torch.cat([table, (table.max() + 1).expand(groups, window)], 1)
    close(snapkv_scores(queries, keys, window, kernel, scaling, pooling), want)


@pytest.mark.parametrize("groups", [1, 2])
def test_tova_equals_a_loop(groups: int) -> None:
    queries, keys = random(4, 5, 6), random(groups, 9, 6, seed=1)
    rows = [loop_attention(queries, keys, head, 4, 0.4) for head in range(4)]
    mean = [sum(row[j] for row in rows) / 4 for j in range(8)]
    close(tova_scores(queries, keys, 0.4), [[*mean, max(mean) + 1]] * groups)


def test_keydiff_equals_a_loop() -> None:
    keys = random(2, 7, 4)
    for group in range(2):
        unit = [key / key.norm() for key in keys[group]]
        anchor = sum(unit[1:], unit[0]) / 7
        want = [-float(key @ anchor / (key.norm() * anchor.norm())) for key in keys[group]]
        close(keydiff_scores(keys)[group], want)


def test_keydiff_in_blocks_equals_evicting_after_every_block() -> None:
    keys, block = random(2, 17, 4), 5
    shares = [Share(torch.tensor([1, 2, 3, 4, 5, 6, 7]), 3), Share(torch.tensor([9, 10, 12, 13, 14, 15, 16]), 2)]
    got = choose_in_blocks(keys, shares, block)
    for group in range(2):
        there: list[int] = []
        for start in range(0, 17, block):
            there += range(start, min(17, start + block))
            unit = {i: keys[group, i] / keys[group, i].norm() for i in there}
            anchor = sum(unit.values(), torch.zeros(4)) / len(there)
            score = {i: -float(unit[i] @ anchor / anchor.norm()) for i in there}
            for share in shares:
                mine = sorted((i for i in there if i in share.entries.tolist()), key=lambda i: -score[i])
                there = [i for i in there if i not in mine[share.keep :]]
        assert got[group].nonzero()[:, 0].tolist() == there
    assert not torch.equal(got, keep_best(keydiff_scores(keys), shares))  # or blocks would not matter
    assert torch.equal(choose_in_blocks(keys, shares, 17), keep_best(keydiff_scores(keys), shares))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_expected_attention_equals_a_loop(groups: int) -> None:
    """The whole of it: statistics, rotation by rotation, scores; against sums over tokens and positions."""
    heads, length, width, sinks, future = 4, 9, 4, 2, 3
    entry = cache(length, heads=heads, groups=groups, width=width)
    method = ExpectedAttention(keep=0.5, sinks=sinks, future=future, epsilon=0.1)
    got = scores_of(method, entry)
    half, per = width // 2, heads // groups
    table = torch.zeros(groups, length - sinks)
    for head in range(heads):
        tokens = [entry.unrotated[0, head, s] for s in range(sinks, length)]
        mu = sum(tokens[1:], tokens[0]) / len(tokens)
        spread = sum((torch.outer(t - mu, t - mu) for t in tokens), torch.zeros(width, width)) / len(tokens)
        rotation = torch.zeros(width, width)
        for position in range(int(entry.length), int(entry.length) + future):
            for column in range(width):
                e = torch.zeros(width)
                e[column] = 1.0
                angle = torch.full((width,), 0.3 * position)
                turned = e * angle.cos() + torch.cat([-e[half:], e[:half]]) * angle.sin()
                rotation[:, column] += turned / future
        mu, spread = rotation @ mu, rotation @ spread @ rotation.T
        logits = [
            float(mu @ key) * entry.scaling + float(key @ spread @ key) * entry.scaling**2 / 2
            for key in entry.keys[0, head // per, sinks:]
        ]
        weights = [math.exp(logit) for logit in logits]
        for i, weight in enumerate(weights):
            table[head // per, i] += weight / sum(weights) / per
    table = (table + 0.1) * entry.values[0, :, sinks:].norm(dim=-1)
    close(got, torch.cat([(table.max() + 1).expand(groups, sinks), table], 1))


# ------------------------------------------------------------------------------------------- prompts and budgets


class Told(Context):
    def __init__(self, counts: list[int], steps: list[int] | None = None) -> None:
        self.original_counts = counts
        self.steps = steps or [1] * len(counts)


def cache(
    length: int, *, heads: int = 4, groups: int = 2, width: int = 4, seed: int = 0, item: list[int] | None = None
) -> CacheEntry:
    """One prompt, all of it fed in this call; the rotary tables turn by 0.3 per position."""

    def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
        angle = positions[..., None] * 0.3 * torch.ones(width)
        return angle.cos(), angle.sin()

    return CacheEntry(
        keys=random(1, groups, length, width, seed=seed),
        values=random(1, groups, length, width, seed=seed + 1),
        queries=random(1, heads, length, width, seed=seed + 2),
        unrotated=random(1, heads, length, width, seed=seed + 3),
        valid=torch.ones(1, length, dtype=torch.bool),
        item=torch.tensor([item or [0] * length]),
        length=torch.tensor([length]),
        scaling=0.7,
        rotary=rotary,
    )


def batch_of(entries: list[CacheEntry], padding: str) -> CacheEntry:
    """Prompts of several lengths as one batch, padded in front or behind with NaN."""
    longest = max(entry.keys.shape[2] for entry in entries)

    def pad(name: str, value: float) -> Tensor:
        rows = []
        for entry in entries:
            given = getattr(entry, name)
            axis = 2 if given.ndim == 4 else 1
            more = longest - given.shape[axis]
            filled = given.new_full((*given.shape[:axis], more, *given.shape[axis + 1 :]), value)
            rows.append(torch.cat([filled, given] if padding == "front" else [given, filled], axis))
        return torch.cat(rows)

    return CacheEntry(
        **{name: pad(name, math.nan) for name in ("keys", "values", "queries", "unrotated")},
        valid=pad("valid", 0),
        item=pad("item", -1),
        length=torch.cat([entry.length for entry in entries]),
        scaling=entries[0].scaling,
        rotary=entries[0].rotary,
    )


def scores_of(method: Press, entry: CacheEntry) -> Tensor:
    from mmtoken.compressors.presses import prompt_cache

    return method.score(prompt_cache(entry, 0, torch.arange(entry.keys.shape[2])))


def setting(name: str, **more: Any) -> Press:
    small = {"snapkv": {"window": 3, "kernel": 3}, "expectedattention": {"future": 8, "sinks": 2}}
    return PRESSES[name](**{**small.get(name, {}), **more})  # type: ignore[no-any-return, operator]


presses = pytest.mark.parametrize("name", PRESSES)
ITEMS = [-1, -1, 0, 0, 0, 0, -1, 1, 1, 1, 1, 1, 1, -1, -1]


@presses
@pytest.mark.parametrize(("keep", "left"), [(0.5, (2, 3)), (3, (3, 3)), (5, (4, 5)), (0.01, (1, 1)), (1.0, (4, 6))])
def test_visual_scope_leaves_text_alone_and_gives_every_item_its_budget(name: str, keep: Any, left: Any) -> None:
    entry = cache(15, item=ITEMS)
    stay = setting(name, keep=keep).cache(entry, 0, Told([4, 6]))
    assert bool(stay[0][:, entry.item[0] == -1].all())
    for head in stay[0]:
        assert (int(head[2:6].sum()), int(head[7:13].sum())) == left


@presses
def test_what_was_cut_before_counts_and_videos_pool_an_int_over_their_steps(name: str) -> None:
    entry = cache(15, item=ITEMS)
    stay = setting(name, keep=0.25).cache(entry, 0, Told([12, 40]))  # tokens that entered the decoder
    assert [int(head[2:6].sum()) for head in stay[0]] == [3, 3]
    assert [int(head[7:13].sum()) for head in stay[0]] == [6, 6]
    stay = setting(name, keep=2).cache(entry, 0, Told([4, 6], [1, 2]))
    assert [(int(head[2:6].sum()), int(head[7:13].sum())) for head in stay[0]] == [(2, 4)] * 2


@presses
@pytest.mark.parametrize(("variant", "keep", "left"), [("paper", 0.7, 11), ("repo", 0.7, 10), ("repo", 6, 6)])
def test_all_scope_counts_whole_prompts(name: str, variant: Any, keep: Any, left: int) -> None:
    entry = cache(15, item=ITEMS)
    scope: Any = {} if variant == "repo" else {"scope": "all"}
    stay = setting(name, keep=keep, variant=variant, **scope).cache(entry, 0, Told([4, 6]))
    assert stay.sum(-1).tolist() == [[left, left]]
    want = keep_best(scores_of(setting(name, keep=keep), entry), [Share(torch.arange(15), left)])
    assert torch.equal(stay[0], want)


@presses
def test_visual_scope_ranks_by_the_same_scores_as_all(name: str) -> None:
    entry = cache(15, item=ITEMS)
    method = setting(name, keep=0.5)
    shares = [Share(torch.arange(2, 6), 2), Share(torch.arange(7, 13), 3)]
    assert torch.equal(method.cache(entry, 0, Told([4, 6]))[0], keep_best(scores_of(method, entry), shares))


@presses
@pytest.mark.parametrize("padding", ["front", "behind"])
@pytest.mark.parametrize("scope", ["visual", "all"])
def test_a_prompt_in_a_batch_is_treated_as_it_is_alone(name: str, padding: str, scope: Any) -> None:
    items = [ITEMS, [-1, 0, 0, 0, 0, 0, -1], [-1] * 9, [0, 0, -1, 1, 1, 1, -1, -1, 2, 2, 2, 2]]
    entries = [cache(len(item), seed=9 * i, item=item) for i, item in enumerate(items)]
    method = setting(name, keep=0.5, scope=scope)
    together = method.cache(batch_of(entries, padding), 0, Told([4, 6, 5, 2, 3, 4]))
    valid = batch_of(entries, padding).valid
    counts = [[4, 6], [5], [], [2, 3, 4]]
    for row, entry in enumerate(entries):
        alone = method.cache(entry, 0, Told(counts[row]))[0]
        assert torch.equal(together[row][:, valid[row]], alone)
    assert bool(together[2][:, valid[2]].all())  # a prompt without visual tokens loses nothing


@presses
def test_only_the_tokens_of_this_call_have_queries(name: str) -> None:
    entry = cache(15, item=ITEMS)
    late = CacheEntry(**{**vars(entry), "queries": entry.queries[:, :, 7:], "unrotated": entry.unrotated[:, :, 7:]})
    got, whole = scores_of(setting(name), late), scores_of(setting(name), entry)
    if name == "expectedattention":
        # sinks lie in the earlier turn, so all fed queries count
        mean, spread = query_statistics(entry.unrotated[0, :, 7:])
        rotation = average_rotation(*(t[0] for t in entry.rotary(torch.arange(15, 23)[None])))
        assert spread is not None
        turned = rotation @ spread @ rotation.T
        whole = expected_attention_scores(mean @ rotation.T, turned, entry.keys[0], entry.values[0], entry.scaling, 2)
    close(got, whole)


def test_snapkv_keeps_its_window_and_of_a_window_that_is_too_large_the_latest() -> None:
    entry = cache(12)
    stay = SnapKV(keep=5, window=4, kernel=3, scope="all").cache(entry, 0, Told([12]))
    assert bool(stay[0, :, 8:].all())
    stay = SnapKV(keep=3, window=6, kernel=3, scope="all").cache(entry, 0, Told([12]))
    assert [head.nonzero()[:, 0].tolist() for head in stay[0]] == [[9, 10, 11]] * 2


@pytest.mark.parametrize("length", [1, 2, 3])
@presses
def test_prompts_shorter_than_windows_and_sinks_work(name: str, length: int) -> None:
    entry = cache(length)
    stay = PRESSES[name](keep=1).cache(entry, 0, Told([length]))
    assert stay.sum(-1).tolist() == [[1, 1]]


def test_ties_go_to_the_lower_position() -> None:
    entry = cache(6)
    entry.keys[:] = 1.0
    assert Knorm(keep=2).cache(entry, 0, Told([6]))[0].nonzero()[:, 1].tolist() == [0, 1, 0, 1]


@presses
def test_half_precision_is_scored_in_float32(name: str) -> None:
    entry = cache(15, item=ITEMS)
    names = ("keys", "values", "queries", "unrotated")
    half = CacheEntry(**{**vars(entry), **{field: getattr(entry, field).bfloat16() for field in names}})
    back = CacheEntry(**{**vars(entry), **{field: getattr(half, field).float() for field in names}})
    got = scores_of(setting(name), half)
    assert got.dtype == torch.float32
    close(got, scores_of(setting(name), back))


@presses
def test_not_a_number_in_what_decides_is_an_error(name: str) -> None:
    entry = cache(15, item=ITEMS)
    entry.keys[0, 1, 4, 2] = math.nan
    with pytest.raises(InputError, match="contain NaN"):
        setting(name).cache(entry, 0, Told([4, 6]))


def test_heads_that_are_rotated_in_part_are_refused() -> None:
    entry = cache(8)
    tables = CacheEntry(**{**vars(entry), "rotary": lambda p: (torch.ones(1, p.shape[1], 2),) * 2})
    with pytest.raises(UnsupportedError, match="rotates 2 of 4 features"):
        ExpectedAttention(future=4).cache(tables, 0, Told([8]))


BAD: list[tuple[Any, str, Any, str]] = [
    *((cls, "scope", value, "use 'visual' or 'all'") for cls in PRESSES.values() for value in ("text", None, True)),
    *((cls, "variant", "official", "use 'paper' or 'repo'") for cls in PRESSES.values()),
    *((cls, "positions", "renumber", "rotated to their positions; use 'keep'") for cls in PRESSES.values()),
    *((SnapKV, "window", value, "give an int of at least 1") for value in (0, True, 2.0, "4", None)),
    *((SnapKV, "kernel", value, "give an int") for value in (0, -1, 5.0)),
    (SnapKV, "kernel", 4, "give an odd width"),
    (SnapKV, "pooling", "avg", "use 'mean' or 'max'"),
    *((KeyDiff, "block_size", value, "give an int of at least 1") for value in (0, True, 2.0)),
    *((ExpectedAttention, "future", value, "give an int of at least 1") for value in (0, 1.0, True)),
    (ExpectedAttention, "sinks", -1, "give an int of at least 0"),
    (ExpectedAttention, "covariance", 1, "give true or false"),
    (ExpectedAttention, "value_norm", None, "give true or false"),
    *((ExpectedAttention, "epsilon", value, "at least 0") for value in (-0.1, math.nan, True, "0")),
]


@pytest.mark.parametrize(("cls", "field", "value", "words"), BAD)
def test_a_bad_setting_is_named(cls: Any, field: str, value: Any, words: str) -> None:
    with pytest.raises(MMTokenError, match=f"{field}=") as error:
        cls(**{field: value})
    assert words in str(error.value)
