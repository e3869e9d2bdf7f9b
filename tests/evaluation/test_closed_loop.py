"""The closed-loop evidence on a random policy: episodes, overlaps, results that go on, tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gymnasium")

from mmtoken import Episode, Policy
from mmtoken.compressors import FastV, VLAPruner
from mmtoken.datasets.pick_place import PickPlace
from mmtoken.errors import ActionError, InputError
from mmtoken.evaluation import closed_loop, closed_loop_figures
from mmtoken.evaluation.closed_loop import Results, cells, overlap, run, shared, tasks, times
from mmtoken.evaluation.closed_loop_figures import complete, joined
from tests.control.policies import ACTION, policy

PRUNER = VLAPruner(keep=0.25, layer=1, action_tokens=ACTION)


@pytest.fixture(scope="module")
def arm() -> Policy:
    return policy(unnorm_key=None, norm_stats={"table": {"action": {"q01": [-1.0] * 3, "q99": [1.0] * 3}}})


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Episodes of five steps."""
    monkeypatch.setattr(closed_loop, "PickPlace", lambda: PickPlace(limit=5))


def alone(arm: Policy, compressor: Any, seed: int) -> tuple[list[list[float]], list[float]]:
    """Actions and layer-average tokens of one episode."""
    world, actions, tokens = PickPlace(limit=5), [], []
    seen, _ = world.reset(seed=seed)
    episode, over = Episode(arm, compressor), False
    while not over:
        action = episode.act(seen["image"], seen["instruction"])
        actions.append(action.tolist())
        tokens.append(episode.report.layer_average)
        seen, _, done, cut, _ = world.step(action)
        over = done or cut
    return actions, tokens


@pytest.mark.parametrize("batch", [2, 3])
def test_episodes_in_lockstep_are_those_that_run_alone(arm: Policy, batch: int) -> None:
    seeds, heard = [7, 8, 9], {7: [], 8: [], 9: []}

    def each(episode: Episode, alive: list[int], actions: Any) -> None:
        for seed, action in zip(alive, actions, strict=True):
            heard[seed].append(action.tolist())

    found = run(arm, PRUNER, seeds, batch, each)
    singles = {seed: alone(arm, PRUNER, seed) for seed in seeds}
    assert heard == {seed: actions for seed, (actions, _) in singles.items()}
    assert found["length"] == [len(heard[seed]) for seed in seeds] and set(found["success"]) <= {0, 1}
    averages = [value for _, tokens in singles.values() for value in tokens]
    assert found["tokens"]["steps"] == len(averages)
    assert found["tokens"]["layer_average"] == pytest.approx(np.mean(averages), abs=1e-4)
    # Three steps of each five warm up; after them 4 of 16 tokens are left in 3 of 4 layers.
    assert averages[:5] == [16, 16, 16, 7, 7]
    assert found["tokens"]["pruned_steps"] == pytest.approx(0.4)


class Scripted(PickPlace):
    """Each seed ends after another number of steps, some with success."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.last = seed or 0
        return super().reset(seed=seed)

    def step(self, action: Any) -> Any:
        seen, reward, _, _, info = super().step(action)
        over = info["steps"] >= self.last
        success = over and self.last % 2 == 0
        return seen, reward, success, over and not success, {**info, "success": success}


def test_episodes_that_have_ended_leave_and_the_others_go_on(arm: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_loop, "PickPlace", Scripted)
    rows: list[list[int]] = []
    found = run(arm, PRUNER, [4, 1, 2, 5], 3, lambda episode, alive, actions: rows.append(alive))
    assert rows == [[4, 1, 2], [4, 2], [4], [4], [5], [5], [5], [5], [5]]
    assert found["length"] == [4, 1, 2, 5] and found["success"] == [1, 0, 1, 0]


def test_an_answer_that_is_no_action_fails_its_episode_and_no_other(
    arm: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closed_loop, "PickPlace", Scripted)
    predict, calls = Policy.predict, []

    def faulty(self: Policy, images: Any, instructions: Any) -> Any:
        calls.append(len(images))
        if len(calls) in (1, 3):  # the first row answers with a word, before the first step and later
            raise ActionError("token 5 at [0, 0] is no action", (0,))
        return predict(self, images, instructions)

    monkeypatch.setattr(Policy, "predict", faulty)
    found = run(arm, PRUNER, [4, 1, 2, 6], 4)
    assert calls == [4, 3, 2, 1, 1, 1, 1, 1]
    assert found["success"] == [0, 0, 0, 1] and found["without_action"] == 2


def test_shares_of_best_tokens() -> None:
    one, other = np.float32([0.9, 0.1, 0.8, 0.3]), np.float32([0.5, 0.5, 0.5, 0.9])
    assert shared(one, other, 0.5) == 0.5  # {0, 2} and {3, 0}: of equal ones the lower index
    assert shared(one, other, 0.25) == 0.0
    assert shared(one, one, 0.5) == shared(one, other, 1.0) == 1.0


def test_overlaps_are_those_of_dense_episodes(arm: Policy) -> None:
    found = overlap(arm, [7, 8], 2, ACTION)
    plain = run(arm, None, [7, 8], 2)
    assert {k: found[k] for k in ("success", "length")} == {k: plain[k] for k in ("success", "length")}
    watcher = VLAPruner(keep=1.0, layer=1, action_tokens=ACTION, window=1)
    pairs: dict[str, list[tuple[Any, Any]]] = {"prefill and action": [], "consecutive actions": []}
    for seed in (7, 8):
        world, episode, before = PickPlace(limit=5), Episode(arm, watcher), None
        seen, _ = world.reset(seed=seed)
        for _ in range(5):
            action = episode.act(seen["image"], seen["instruction"])
            now = episode.history[-1][0]
            if before is not None:
                (site,) = episode.report.sites
                pairs["prefill and action"].append((site.scores[0].numpy(), now))
                pairs["consecutive actions"].append((before, now))
            before, (seen, *_) = now, world.step(action)
    for name, both in pairs.items():
        assert found["overlap"][name]["steps"] == len(both) == 8
        for keep in (0.5, 0.25, 0.125):
            want = 100 * np.mean([shared(a, b, keep) for a, b in both])
            assert found["overlap"][name]["percent"][f"{keep:g}"] == pytest.approx(want, abs=0.006)


def test_cells_differ_in_what_they_say_they_do() -> None:
    plans = {cell.name: cell.compressor() for cell in cells(ACTION)}
    assert len(plans) == 28 and plans["Dense"] is None
    for keep in (0.5, 0.25, 0.125):
        ours = VLAPruner(keep=keep, layer=1, action_tokens=ACTION)
        assert plans[f"VLA-Pruner {keep:g}"] == ours
        changes = {
            "old steps count most": {"gamma": 1.25},
            "no action branch": {"branches": "semantic"},
            "no diversity filter": {"diversity": False},
            "last action only": {"window": 1},
        }
        for title, change in changes.items():
            assert plans[f"VLA-Pruner, {title} {keep:g}"] == VLAPruner(**{**vars(ours), **change})
        assert plans[f"FastV {keep:g}"] == FastV(keep=keep, layer=1)


HEAD: dict[str, Any] = {
    "schema_version": 1, "weights": {"a": "1", "b": "2"}, "visual_tokens": 16, "token_count": "tokens",
    "environment": {"device": "CPU", "clock": "CPU time", "versions": {"mmtoken": "0"}},
    "seeds": {"a": [1, 2], "b": [3, 4]}, "cells": {cell.name: cell.to_dict() for cell in cells(ACTION)},
}  # fmt: skip


def test_results_go_on_where_they_stopped_unless_they_are_about_something_else(tmp_path: Path) -> None:
    file = tmp_path / "control.json"
    Results(file, HEAD).put("a", "Dense", {"success": [1, 0]})
    again = Results(file, HEAD)
    assert again.has("a", "Dense") and not again.has("b", "Dense") and not again.has("a", "FastV 0.5")
    for other in ({"weights": {"a": "1", "b": "3"}}, {"seeds": {"a": [1]}}, {"cells": {}}):
        assert not Results(file, {**HEAD, **other}).has("a", "Dense")
    Results(tmp_path / "control-01.json", {**HEAD, "seeds": {}}).put("a", "x", {})
    with pytest.raises(InputError, match="different policies, episodes or cells"):
        joined(tmp_path)
    with pytest.raises(InputError, match=r"holds no control\.json"):
        joined(tmp_path.parent)


def fill(folder: Path) -> None:
    """Made-up results in two shares."""
    rng = np.random.default_rng(0)
    shares = [Results(folder / f"control-{i:02d}.json", HEAD) for i in range(2)]
    for number, (name, entry) in enumerate(tasks(["a", "b"], cells(ACTION))):
        found: dict[str, Any] = {"cpu_seconds": 1.0, "success": rng.integers(0, 2, 2).tolist(), "length": [3, 5]}
        if entry == "time":
            summary = {"median": 2.0, "q1": 1.0, "q3": 3.0, "low": 1.0, "high": 3.0, "count": 3}
            found = {"cpu_seconds": 1.0, "milliseconds": dict.fromkeys(HEAD["cells"], summary)}
        elif entry == "overlap":
            percent = {"percent": {"0.5": 60.0, "0.25": 50.0, "0.125": 40.0 + number % 2}, "steps": 4}
            found["overlap"] = {"prefill and action": percent, "consecutive actions": percent}
        elif entry != "Dense":
            steps = 10 if name == "a" else 30
            found["tokens"] = {
                "steps": steps, "layer_average": float(steps), "tokens_left": 4.0, "pruned_steps": 0.5,
                "flops_share": 0.5,
            }  # fmt: skip
        shares[number % 2].content["runs"].setdefault(name, {})[entry] = found
    for share in shares:
        share.write()


def test_shares_join_to_one_file_with_tables_and_a_picture(tmp_path: Path) -> None:
    fill(tmp_path)
    content = joined(tmp_path)
    assert complete(content)
    del content["runs"]["b"]["FastV 0.5"]
    assert not complete(content)
    closed_loop_figures.main(["--out", str(tmp_path)])
    whole = json.loads((tmp_path / "control.json").read_text())
    assert [row["name"] for row in whole["summary"]] == list(HEAD["cells"])
    fastv, runs = next(row for row in whole["summary"] if row["name"] == "FastV 0.5"), whole["runs"]
    marks = runs["a"]["FastV 0.5"]["success"] + runs["b"]["FastV 0.5"]["success"]
    dense = runs["a"]["Dense"]["success"] + runs["b"]["Dense"]["success"]
    assert fastv["successes"] == sum(marks) and fastv["episodes"] == 4
    assert fastv["ahead_of_dense"]["difference"] == (sum(marks) - sum(dense)) / 4
    assert fastv["layer_average"] == (10 * 10 + 30 * 30) / 40
    assert whole["summary"][0]["layer_average"] == 16 and whole["summary"][0]["flops_share"] == 1
    assert whole["overlap"]["prefill and action"]["paper"] == {"0.5": 72, "0.25": 59, "0.125": 52}
    text = (tmp_path / "control.md").read_text()
    assert text.count("\n| ") == 2 + 28 + 2 + 2 and (tmp_path / "control.png").read_bytes().startswith(b"\x89PNG")
    # What was joined once can be drawn again without the shares.
    for file in tmp_path.glob("control-*"):
        file.unlink()
    before = (tmp_path / "control.json").read_text()
    closed_loop_figures.main(["--out", str(tmp_path)])
    assert (tmp_path / "control.json").read_text() == before


def test_times_are_there_for_every_cell(arm: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_loop, "PickPlace", lambda: PickPlace(limit=6))
    plans = [cell for cell in cells(ACTION) if cell.name in ("Dense", "VLA-Pruner 0.5")]
    found = times(arm, plans, 7, rounds=1)["milliseconds"]
    assert set(found) == {"Dense", "VLA-Pruner 0.5"} and all(one["median"] > 0 for one in found.values())
