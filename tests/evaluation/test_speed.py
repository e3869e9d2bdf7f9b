"""What a speed run says: stages, ratios, memory and targets of every entrant, on random weights."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import pytest
import torch

from mmtoken.compressors import UniformGrid
from mmtoken.errors import MMTokenError
from mmtoken.evaluation import speed
from mmtoken.evaluation.lineup import DENSE, Entrant, line_up
from mmtoken.evaluation.speed import SMALL, SpeedShape, build, measure, run_once, targets
from mmtoken.evaluation.tables import scoring_warnings, speed_report
from mmtoken.evaluation.timing import Stopwatch
from mmtoken.tokens import VisualTokens
from tests.evaluation.results import ENTRANTS, NAMES, speed_results

CPU = torch.device("cpu")


def rows() -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in speed_results()["results"]}


def test_results_are_data_with_device_versions_and_sizes() -> None:
    results = speed_results()
    assert json.loads(json.dumps(results)) == results
    assert (results["schema_version"], results["kind"], results["dtype"]) == (1, "speed", "float32")
    assert results["weights"].startswith("random")
    assert results["shape"] == {**dataclasses.asdict(SMALL), "visual_tokens": 16}
    assert (results["rounds"], results["decode_steps"], results["batch"]) == (1, 2, 1)
    assert results["environment"]["clock"] == "process CPU time, one thread"
    assert list(rows()) == NAMES and results["refused"] == {}


def test_the_default_shape_is_that_of_a_llava() -> None:
    shape = SpeedShape()
    assert (shape.hidden, shape.layers, shape.visual_tokens, shape.text_tokens) == (1024, 8, 576, 32)


def test_every_entrant_has_all_stages_as_medians_with_spread() -> None:
    for name, row in rows().items():
        assert set(row["milliseconds"]) == {"vision", "prefill", "scoring", "decode_per_token"}, name
        for summary in row["milliseconds"].values():
            assert set(summary) == {"median", "q1", "q3", "low", "high", "count"} and summary["count"] == 1
        assert row["milliseconds"]["prefill"]["median"] > 0
        assert set(row["speedup"]) == {"prefill_with_scoring", "first_token", "decode"}
    dense = rows()[DENSE]
    assert dense["speedup"]["prefill_with_scoring"]["median"] == 1.0
    assert dense["milliseconds"]["scoring"]["median"] == 0.0
    assert rows()["DivPrune keep=16"]["milliseconds"]["scoring"]["median"] > 0


def test_tokens_ratios_and_cache_follow_from_what_was_kept() -> None:
    found = rows()
    # 16 visual and 9 text tokens; keys and values of 8 layers, 64 wide, in float32.
    for name, kept in ((DENSE, 16), ("Random keep=0.125", 2), ("DivPrune keep=0.125", 2), ("DivPrune keep=16", 16)):
        row = found[name]
        assert (row["tokens_in"], row["tokens_out"], row["layer_average"]) == (16, kept, kept)
        assert row["token_ratio"] == pytest.approx(25 / (9 + kept), abs=1e-4)
        assert row["kv_bytes"] == 2 * 8 * 64 * 4 * (9 + kept)
        assert row["flop_ratio"] == pytest.approx(row["flops_dense"] / row["flops"], abs=1e-4)
        share = row["speedup"]["prefill_with_scoring"]["median"] / row["token_ratio"]
        assert row["share_of_token_ratio"] == pytest.approx(share, abs=1e-3)
        assert row["attainable_speedup"]["count"] == 1 and row["share_of_attainable"] > 0
    fastv = found["FastV keep=0.125"]
    assert fastv["layer_average"] == (2 * 16 + 6 * 2) / 8
    assert fastv["kv_bytes"] == 2 * 64 * 4 * (2 * 25 + 6 * 11)
    assert fastv["attainable_speedup"] is None and fastv["share_of_attainable"] is None
    assert all(row["peak_mib"] > 0 for row in found.values())


def test_the_hooks_are_measured_with_everything_kept() -> None:
    hooks = speed_results()["hook_overhead"]
    assert [row["name"] for row in hooks] == ["UniformGrid keep=1", "FastV keep=1"]
    for row in hooks:
        assert row["layers"] == 8
        assert row["prefill_ms"]["count"] == 5  # 6 x rounds - 1
        assert row["with_scoring_ms"]["median"] >= row["prefill_ms"]["median"]
        assert row["plain_prefill_ms"]["median"] > 0 and row["plain_decode_us_per_layer_and_token"]["median"] > 0
        assert {"decode_us_per_layer_and_token", "vision_ms"} <= row.keys()


def test_targets_are_named_for_those_that_have_one() -> None:
    named = [row["target"] for row in speed_results()["targets"]]
    assert named == [
        "FastV keep=16: prefill speed-up / FLOP ratio",
        "FastV keep=0.125: prefill speed-up / FLOP ratio",
        "DivPrune keep=16: prefill speed-up / token ratio",
        "DivPrune keep=0.125: prefill speed-up / token ratio",
        "UniformGrid keep=1: hooks, ms per prefill",
        "UniformGrid keep=1: hooks, us per layer and decoded token",
        "FastV keep=1: hooks, ms per prefill",
        "FastV keep=1: hooks, us per layer and decoded token",
    ]


def test_a_target_is_met_at_its_bound_and_missed_beyond() -> None:
    def met(method: str, token_share: float, flop_share: float) -> list[bool]:
        row = {"name": method, "method": method, "share_of_token_ratio": token_share, "share_of_flop_ratio": flop_share}
        return [target["met"] for target in targets([row], [])]

    for method in ("DivPrune", "UniformGrid", "VisionZip"):
        assert met(method, 0.85, 0.0) == [True] and met(method, 0.8499, 2.0) == [False]
    assert met("FastV", 0.0, 0.9) == [True] and met("FastV", 2.0, 0.8999) == [False]
    assert met("ToMe", 0.0, 0.0) == []

    def hooks(prefill: float, decode: float) -> list[bool]:
        row = {
            "name": "x",
            "prefill_ms": {"median": prefill},
            "decode_us_per_layer_and_token": {"median": decode},
        }
        return [target["met"] for target in targets([], [row])]

    assert hooks(0.99, 19.9) == [True, True] and hooks(1.0, 20.0) == [False, False] and hooks(-0.1, -1) == [True, True]


def test_without_decoding_and_extras_their_figures_are_left_out() -> None:
    results = measure(ENTRANTS[:2], shape=SMALL, rounds=1, decode_steps=0, thorough=False)
    assert results["hook_overhead"] == [] and results["targets"] == []
    for row in results["results"]:
        assert row["speedup"]["decode"] is None and "decode_per_token" not in row["milliseconds"]
        assert row["attainable_speedup"] is None


def test_the_random_model_is_the_same_every_time_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = build(SMALL, CPU)
    assert torch.equal(torch.rand(1), expected)
    second = build(SMALL, CPU)
    assert torch.equal(first.input_ids, second.input_ids) and first.input_ids.shape == (1, 25)
    assert torch.equal(first.pixel_values, second.pixel_values)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    assert (first.input_ids == first.model.config.image_token_id).sum() == 16


def test_decoding_goes_on_from_the_shortened_cache() -> None:
    request = build(SMALL, CPU)
    watch = Stopwatch()
    run = run_once(request, line_up(["divprune"], keeps=[4], controls=[])[1].compressor, watch, 3, prefills=2)
    assert run.report is not None and run.report.tokens_out == [4]
    assert set(watch.seconds) == {"vision", "prefill", "scoring", "decode"}
    assert run.kv_bytes == run.report.kv_bytes == 2 * 8 * 64 * 4 * (9 + 4)


@pytest.mark.parametrize("change", [{"text_tokens": 1}, {"image": 57}])
def test_impossible_shapes_are_refused(change: dict[str, int]) -> None:
    (field, value), *_ = change.items()
    with pytest.raises(MMTokenError, match=f"{field}={value}"):
        build(dataclasses.replace(SMALL, **change), CPU)


@dataclasses.dataclass(frozen=True)
class Slow(UniformGrid):
    """Scores for longer than anything it could save."""

    def llm_input(self, tokens: VisualTokens, ctx: Any) -> VisualTokens:
        until = time.process_time() + 0.5
        while time.process_time() < until:
            torch.randn(64, 64)
        return super().llm_input(tokens, ctx)


def test_scoring_that_costs_more_than_it_saves_is_named() -> None:
    entrants = [Entrant(), Entrant(Slow(keep=2), keep=2), Entrant(UniformGrid(keep=2), keep=2)]
    shape = dataclasses.replace(SMALL, hidden=256, heads=4, intermediate=1024, image=168)
    results = measure(entrants, shape=shape, rounds=1, decode_steps=0, thorough=False)
    dense, slow, fast = results["results"]
    assert dense["scoring"] is None
    assert slow["scoring"]["costs_more_than_it_saves"] and slow["scoring"]["share_of_prefill"] > 0.5
    assert slow["milliseconds"]["scoring"]["median"] >= 500
    assert not fast["scoring"]["costs_more_than_it_saves"] and fast["scoring"]["share_of_prefill"] < 0.5
    # What is saved does not count the scoring itself.
    saved = dense["milliseconds"]["prefill"]["median"] - fast["milliseconds"]["prefill"]["median"]
    assert fast["scoring"]["saved_ms"]["median"] >= 0.9 * saved
    assert slow["scoring"]["saved_ms"]["median"] > -250
    (line,) = scoring_warnings(results)
    assert line.startswith("Slow keep=2: scoring costs more than it saves here, 5")
    assert f"WARNING: {line}" in speed_report(results)


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(MMTokenError, match="rounds=0"):
        speed.measure(ENTRANTS[:1], shape=SMALL, rounds=0)
