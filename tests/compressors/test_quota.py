"""QuoTA on tokens made by hand: which frames are left at which size, where they are put, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import interpolate

from mmtoken.compressors import Context, QuoTA
from mmtoken.compressors.framebudget import assign_tokens, capped_shares, frame_budgets, frame_grid, frame_shares
from mmtoken.compressors.framescorer import Clip, FrameScorer
from mmtoken.compressors.quota import frame_places
from mmtoken.compressors.registry import resolve
from mmtoken.errors import InputError, MMTokenError, UnsupportedError
from mmtoken.tokens import VisualTokens

WIDTH = 5


class Facts(Context):
    """A context with patches of `patches` before pooling, frames, and a question in letters."""

    def __init__(self, patches: list[Tensor | None], question: str = "") -> None:
        self.patches, self.question = patches, question

    def unpooled(self, tokens: VisualTokens) -> list[Tensor | None]:
        return self.patches

    def pixels(self, tokens: VisualTokens) -> list[Tensor | None]:
        return [
            None if p is None else torch.arange(len(p), dtype=torch.uint8)[:, None, None, None].expand(-1, 2, 2, 3)
            for p in self.patches
        ]

    def prompt_ids(self, tokens: VisualTokens) -> list[Tensor]:
        return [torch.tensor([ord(c) for c in f"{self.question}{i}"]) for i in range(len(tokens))]

    def content_seed(self, tokens: VisualTokens) -> list[int]:
        return [3 * i for i in range(len(tokens))]


def video(
    frames: int, side: int, patches: int | None = None, *, rows: int | None = None, newline: str = "none", seed: int = 0
) -> tuple[VisualTokens, Facts]:
    """A video whose model pools `patches` x `patches` to rows x side by bilinear resizing.

    `newline`: "none", "end" (one at the end of all) or "rows" (one at the end of each row).
    """
    rows = side if rows is None else rows
    patches = 2 * side if patches is None else patches
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(frames, patches, patches, WIDTH, generator=generator)
    pooled = interpolate(whole.permute(0, 3, 1, 2), size=(rows, side), mode="bilinear").permute(0, 2, 3, 1)
    line = torch.full((WIDTH,), 100.0)
    if newline == "rows":
        features = torch.cat([pooled, line.expand(frames, rows, 1, WIDTH)], 2).reshape(-1, WIDTH)
        protected = (torch.arange(len(features)) % (side + 1)) == side
    else:
        features = pooled.reshape(-1, WIDTH)
        if newline == "end":
            features = torch.cat([features, line[None]])
        protected = torch.arange(len(features)) >= frames * rows * side
    tokens = VisualTokens.from_features(features[None], protected=protected[None], grid=((frames, rows, side),))
    return tokens, Facts([whole])


def given_scores(*scores: float) -> dict[str, Any]:
    return {"name": "given", "scores": list(scores)}


def out(tokens: VisualTokens, row: int = 0) -> Tensor:
    return tokens.features[row, tokens.valid[row]]


# --------------------------------------------------------------------------------------------------- what comes out


@settings(deadline=None, max_examples=60)
@given(
    frames=st.integers(2, 6),
    side=st.integers(1, 5),
    keep=st.one_of(st.floats(0.05, 1.0), st.integers(1, 30)),
    newline=st.sampled_from(["none", "end", "rows"]),
    assigner=st.sampled_from(["bilinear", "adaptive_pool", "linspace", "merge", "merge_rows_cols"]),
    scores=st.lists(st.floats(0, 1), min_size=6, max_size=6),
    seed=st.integers(0, 99),
)
def test_frames_come_out_in_order_at_their_budgets(frames, side, keep, newline, assigner, scores, seed):
    tokens, facts = video(frames, side, newline=newline, seed=seed)
    scores = scores[:frames]
    method = QuoTA(keep=keep, assigner=assigner, scorer=given_scores(*scores))
    left = method.llm_input(tokens, facts)
    (budget,) = tokens.budget(keep)
    pooled = out(tokens)[~tokens.protected[0]].view(frames, side, side, WIDTH)
    start = pooled if assigner == "merge" else facts.patches[0]
    shares = frame_shares(torch.tensor(scores, dtype=torch.float64))
    if assigner != "bilinear":
        shares = capped_shares(shares, start.shape[1] * start.shape[2] / budget)
    counts = frame_budgets(shares, budget)
    want, separators = [], 0
    for frame, count in zip(start, counts, strict=True):
        if not count:
            continue
        part = assign_tokens(frame, count, assigner)
        lines = list(part) if part.ndim == 3 else [part]
        for line in lines:
            want.append(line)
            if newline == "rows":
                want.append(torch.full((1, WIDTH), 100.0))
                separators += 1
    if newline == "end":
        want.append(torch.full((1, WIDTH), 100.0))
        separators = 1
    expected = torch.cat(want)
    assert 1 <= left.counts()[0] <= budget
    if newline == "rows" and len(expected) > tokens.features.shape[1]:
        # No place is left for some newline tokens: the tokens of frames are all there.
        assert torch.equal(left.features[0][left.eligible[0]], expected[expected[:, 0] != 100])
        assert left.features.shape[1] == tokens.features.shape[1]
    else:
        assert torch.equal(out(left), expected)
        assert int(left.protected.sum()) == separators
    source = left.source[0, left.valid[0]].tolist()
    assert source == sorted(set(source))
    # A frame that is not there weighs nothing, every other as much as before.
    weight = left.size[0][left.eligible[0]].sum()
    assert float(weight) == pytest.approx(side * side * sum(count > 0 for count in counts), rel=1e-5)
    assert left.item[0][left.eligible[0]].unique().tolist() == [f for f, count in enumerate(counts) if count]


@pytest.mark.parametrize("newline", ["none", "end", "rows"])
@pytest.mark.parametrize("patches", [6, 5])
def test_equal_scores_at_full_budget_are_what_the_model_pools(newline, patches):
    tokens, facts = video(4, 3, patches, newline=newline)
    left = QuoTA(keep=1.0, most=None, scorer="uniform").llm_input(tokens, facts)
    assert torch.equal(left.features, tokens.features)
    assert torch.equal(left.source, tokens.source) and torch.equal(left.protected, tokens.protected)
    assert torch.equal(left.size, tokens.size) and torch.equal(left.item, tokens.item)


@pytest.mark.parametrize("assigner", ["bilinear", "adaptive_pool", "linspace", "merge", "merge_rows_cols"])
def test_where_nothing_is_pooled_equal_scores_at_full_budget_change_nothing(assigner):
    tokens, _ = video(3, 4, rows=2)
    whole = tokens.features[0].view(3, 2, 4, WIDTH)
    left = QuoTA(keep=1.0, assigner=assigner, scorer="uniform").llm_input(tokens, Facts([whole]))
    assert torch.equal(left.features, tokens.features) and torch.equal(left.source, tokens.source)


def test_the_papers_budget_is_that_of_64_frames():
    features = torch.zeros(1, 96 * 196, 1)
    tokens = VisualTokens.from_features(features, grid=((96, 14, 14),))
    whole = torch.zeros(96, 27, 27, 1)
    left = QuoTA(scorer="uniform").llm_input(tokens, Facts([whole]))
    assert left.counts() == [96 * 121]  # 12544 / 96 = 130 tokens each, as 11 x 11
    few = VisualTokens.from_features(features[:, : 64 * 196], grid=((64, 14, 14),))
    assert QuoTA(scorer="uniform").llm_input(few, Facts([whole[:64]])).counts() == [12544]
    one = QuoTA(scorer=given_scores(*[0.0] * 63, 1.0)).llm_input(few, Facts([whole[:64]]))
    assert one.counts() == [112 * 112]  # a frame that has it all is enlarged
    assert one.item.unique().tolist() == [63]
    capped = QuoTA(scorer=given_scores(*[0.0] * 63, 1.0), cap=True).llm_input(few, Facts([whole[:64]]))
    assert capped.counts() == [27 * 27]


def test_most_limits_the_whole_video_and_null_does_not():
    tokens, facts = video(4, 4)
    for most, wanted in ((36, 36), (None, 64), (1000, 64)):
        method = QuoTA(keep=1.0, most=most, scorer="uniform")
        assert method.llm_input(tokens, facts).counts() == [wanted]


def test_items_of_a_batch_do_not_touch_each_other():
    parts = [video(4, 3, newline="end", seed=1), video(2, 3, newline="end", seed=2)]
    longest = max(part.features.shape[1] for part, _ in parts)

    def wide(values: Tensor, fill: Any) -> Tensor:
        extra = longest - values.shape[1]
        return torch.cat([values, torch.full((1, extra, *values.shape[2:]), fill, dtype=values.dtype)], 1)

    batch = VisualTokens.from_features(
        torch.cat([wide(part.features, math.nan) for part, _ in parts]),
        valid=torch.cat([wide(part.valid, False) for part, _ in parts]),
        protected=torch.cat([wide(part.protected, False) for part, _ in parts]),
        grid=tuple(part.grid[0] for part, _ in parts),
    )
    facts = Facts([fact.patches[0] for _, fact in parts])
    scores = ([0.1, 0.9, 0.0, 0.4], [0.2, 0.3])
    left = QuoTA(keep=0.7, scorer={"name": "given", "scores": scores}).llm_input(batch, facts)
    for row, (part, fact) in enumerate(parts):
        alone = QuoTA(keep=0.7, scorer=given_scores(*scores[row])).llm_input(part, fact)
        assert torch.equal(out(left, row), out(alone))
        assert torch.equal(left.source[row, left.valid[row]], alone.source[0])


def test_a_picture_on_a_grid_is_resized_and_one_in_crops_is_thinned_without_a_look_at_the_frames():
    picture, facts = video(1, 4, newline="end")
    method = QuoTA(keep=9, question="?")  # the default scorer would need a model
    left = method.llm_input(picture, facts)
    assert torch.equal(out(left)[:-1], assign_tokens(facts.patches[0][0], 9).flatten(0, 1))
    crops = VisualTokens.from_features(picture.features)
    left = method.llm_input(crops, Facts([None]))
    assert left.source.tolist() == [[0, 2, 4, 6, 8, 10, 12, 14, 16]]
    assert torch.equal(left.features, crops.features[:, ::2])


def test_frames_that_were_left_out_before_have_no_share():
    tokens, facts = video(4, 3, newline="rows")
    fewer = tokens.where((tokens.item != 1) | tokens.protected)
    scores = [0.3, 0.9, 0.5, 0.2]
    left = QuoTA(keep=1.0, scorer=given_scores(*scores)).llm_input(fewer, facts)
    counts = frame_budgets(frame_shares(torch.tensor([0.3, 0.5, 0.2])), 27)
    grids = [frame_grid(count) for count in counts]
    parts = [assign_tokens(facts.patches[0][f], n).flatten(0, 1) for f, n in zip((0, 2, 3), counts, strict=True)]
    assert torch.equal(left.features[0][left.eligible[0]], torch.cat(parts))
    assert left.counts() == [sum(h * w for h, w in grids)]
    assert int(left.protected.sum()) == sum(h for h, _ in grids)
    assert sorted(set(left.item[0].tolist())) == [0, 2, 3]
    seen = Notes()
    left = QuoTA(keep=0.5, power=0.0, scorer=Noting(seen), question="?").llm_input(fewer, facts)
    assert torch.equal(left.source // 12, left.item) and sorted(set(left.item[0].tolist())) == [0, 2, 3]
    assert seen[0].pixels[:, 0, 0, 0].tolist() == [0, 2, 3]


def test_without_a_place_left_the_last_rows_go_without_a_newline():
    # Two frames of 2 x 2 tokens and a newline per row: 12 places. 6 tokens as 3 x 2 and 2 as 2 x 1 would need 13.
    tokens, facts = video(2, 2, newline="rows")
    left = QuoTA(keep=1.0, scorer=given_scores(3**0.5, 1.0)).llm_input(tokens, facts)
    assert left.source[0].tolist() == list(range(12)) and left.counts() == [8]
    assert left.protected[0].nonzero()[:, 0].tolist() == [2, 5, 8, 10]


def test_gradients_reach_the_patches_that_are_left():
    tokens, facts = video(2, 3)
    facts.patches[0].requires_grad_()
    left = QuoTA(keep=1.0, scorer=given_scores(0.0, 1.0)).llm_input(tokens, facts)
    left.features.sum().backward()
    grad = facts.patches[0].grad
    assert not bool(grad[0].any()) and bool(grad[1].any())


# ------------------------------------------------------------------------------------------------------------- places


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=8),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    data=st.data(),
)
def test_places_rise_and_stay_in_the_video(lengths, rows, columns, data):
    block = rows * columns
    total = len(lengths) * block
    while sum(lengths) > total:
        lengths[lengths.index(max(lengths))] //= 2
    shapes = []
    for length in lengths:
        on_grid = length and data.draw(st.booleans()) and math.prod(frame_grid(length)) == length
        shapes.append(frame_grid(length) if on_grid else None)
    places = frame_places(lengths, shapes, (rows, columns), block)
    assert [len(p) for p in places] == lengths
    flat = torch.cat(places).tolist()
    assert flat == sorted(set(flat)) and (not flat or (flat[0] >= 0 and flat[-1] < total))
    if max(lengths) <= block:
        for number, p in enumerate(places):
            assert bool((p // block == number).all())


def test_a_small_frame_takes_the_places_nearest_to_its_cells():
    (places,) = frame_places([4], [(2, 2)], (4, 4), 16)
    assert places.tolist() == [5, 7, 13, 15]
    (places,) = frame_places([3], [None], (4, 4), 16)
    assert places.tolist() == [0, 5, 10]
    for rows, columns, h, w in ((5, 7, 3, 2), (3, 3, 3, 3), (14, 14, 11, 10)):
        (places,) = frame_places([h * w], [(h, w)], (rows, columns), rows * columns)
        for cell, place in enumerate(places.tolist()):
            y, x = (cell // w + 0.5) * rows / h, (cell % w + 0.5) * columns / w
            assert abs(place // columns + 0.5 - y) <= 0.5 and abs(place % columns + 0.5 - x) <= 0.5


def test_a_large_frame_pushes_later_ones_back_and_starts_early_enough():
    first, second, third = frame_places([6, 2, 0], [None] * 3, (2, 2), 4)
    assert (first.tolist(), second.tolist(), third.tolist()) == ([0, 1, 2, 3, 4, 5], [6, 7], [])
    first, second = frame_places([1, 7], [None] * 2, (2, 2), 4)
    assert (first.tolist(), second.tolist()) == ([0], [1, 2, 3, 4, 5, 6, 7])


# ------------------------------------------------------------------------------------------------ questions and scores


@dataclasses.dataclass(frozen=True)
class Noting(FrameScorer):
    """Scores frames by their pixels, and notes what it was asked."""

    seen: Any = None

    def score(self, clip: Clip) -> Tensor:
        self.seen.append(clip)
        return 1.0 + clip.pixels[:, 0, 0, 0]


class Letters:
    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(map(chr, ids)) + " "


class Notes(list):
    __hash__ = object.__hash__  # type: ignore[assignment]


def test_the_scorer_is_asked_about_the_frames_and_the_question_of_its_row():
    seen, planned = Notes(), []
    tokens, facts = video(3, 2)
    both = VisualTokens.from_features(tokens.features.expand(2, -1, -1), grid=tokens.grid * 2)
    facts = Facts(facts.patches * 2, "Who?")

    def planner(text: str) -> str:
        planned.append(text)
        return "step 1: yes\nstep 3: [dog]"

    method = QuoTA(keep=1.0, scorer=Noting(seen), tokenizer=Letters(), planner=planner)
    assert method.needs == {"unpooled", "pixels", "prompt"}
    left = method.llm_input(both, facts)
    assert [clip.question for clip in seen] == ["Who?0", "Who?1"]
    assert [clip.entities for clip in seen] == [("dog",)] * 2
    assert [clip.pixels[:, 0, 0, 0].tolist() for clip in seen] == [[0, 1, 2]] * 2
    assert planned[0].endswith("Question: Who?0") and planned[1].endswith("Question: Who?1")
    assert facts.scores.tolist() == [[1.0] * 4 + [2.0] * 4 + [3.0] * 4] * 2
    assert set(facts.timings) == {"planner", "scorer"} and min(facts.timings.values()) >= 0
    counts = frame_budgets(frame_shares(torch.tensor([1.0, 2.0, 3.0])), 12)
    assert left.counts() == [sum(math.prod(frame_grid(n)) for n in counts if n)] * 2
    seen.clear()
    method = QuoTA(keep=1.0, scorer=Noting(seen), question="What?")
    assert method.needs == {"unpooled", "pixels"}
    method.llm_input(both, facts)
    assert [(clip.question, clip.entities) for clip in seen] == [("What?", ())] * 2


def test_a_question_that_cannot_be_read_names_both_ways_out():
    tokens, facts = video(3, 2)
    with pytest.raises(
        UnsupportedError, match=r"question=None and tokenizer=None.*give the question, or the tokenizer"
    ):
        QuoTA(scorer=Noting(Notes())).llm_input(tokens, facts)


def test_scores_of_another_number_of_frames_are_refused():
    @dataclasses.dataclass(frozen=True)
    class Short(FrameScorer):
        reads = frozenset()

        def score(self, clip: Clip) -> Tensor:
            return torch.ones(clip.frames - 1)

    tokens, facts = video(3, 2)
    with pytest.raises(InputError, match=r"scorer Short gave scores of shape \(2,\) for 3 frames of item 0"):
        QuoTA(scorer=Short()).llm_input(tokens, facts)
    with pytest.raises(InputError, match=r"scores\[1\]=nan"):
        QuoTA(scorer=NotANumber()).llm_input(tokens, facts)


@dataclasses.dataclass(frozen=True)
class NotANumber(FrameScorer):
    reads = frozenset()

    def score(self, clip: Clip) -> Tensor:
        return torch.tensor([0.5, math.nan, 0.5])


# ------------------------------------------------------------------------------------------------------------ refusals


def test_frames_with_holes_and_patches_that_are_no_numbers_are_refused():
    tokens, facts = video(3, 2)
    holed = tokens.where(torch.arange(12)[None] != 5)
    with pytest.raises(InputError, match=r"grid=\(3, 2, 2\) of item 0 has 4 tokens per frame but \[4, 3, 4\] came"):
        QuoTA(scorer="uniform").llm_input(holed, facts)
    with pytest.raises(UnsupportedError, match="item 0 has no patches before pooling"):
        QuoTA(scorer="uniform").llm_input(tokens, Facts([None]))
    facts.patches[0][1, 0, 0, 0] = math.inf
    with pytest.raises(InputError, match="patches before pooling contain NaN for item 0"):
        QuoTA(scorer="uniform").llm_input(tokens, facts)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("assigner", value) for value in ("v1", None, True)),
        *(("cap", value) for value in (1, "yes", 0.5)),
        *(("power", value) for value in (-1.0, math.nan, math.inf, True, "2", None)),
        *(("most", value) for value in (0, -1, True, 1.5, "196")),
        *(("planner", value) for value in (3, True)),
        *(("question", value) for value in (3, b"?")),
        *(("scorer", value) for value in (3, None, "nothing")),
    ],
)
def test_a_bad_setting_is_an_error_that_names_it(field, value):
    with pytest.raises(MMTokenError, match=f"{field}="):
        QuoTA(**{field: value})


def test_it_is_no_method_for_streams():
    assert not QuoTA.causal and not QuoTA.query_agnostic


# ------------------------------------------------------------------------------------------------------------- as data


@pytest.mark.parametrize(
    "method",
    [
        QuoTA(),
        QuoTA(keep=0.5, assigner="merge", cap=False, power=1.0, most=None, question="Who?", tokenizer="a/model"),
        QuoTA(scorer={"name": "vlm", "model": "a/model", "batch": 8}, planner="a/model"),
        QuoTA(scorer=given_scores(0.5, 0.25)),
    ],
)
def test_settings_survive_json(method):
    assert resolve(json.loads(json.dumps(method.to_dict()))) == method
    assert hash(resolve(method.to_dict())) == hash(method)


def test_live_objects_can_be_used_but_not_saved():
    for field, value in (("planner", str.upper), ("tokenizer", Letters())):
        method = QuoTA(**{field: value})
        with pytest.raises(MMTokenError, match=rf"{field}=<.*live object and cannot be saved; give the name or folder"):
            method.to_dict()
        assert getattr(resolve(method, keep=0.5), field) is value
    with pytest.raises(MMTokenError, match="scorer=Noting is not one of"):
        QuoTA(scorer=Noting(Notes())).to_dict()
