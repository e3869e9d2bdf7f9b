"""Comparing with a peer: the formulas, what counts as equal, and a run against a library that is not one."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmtoken.errors import InputError, MMTokenError
from mmtoken.evaluation import peers
from mmtoken.evaluation.peer_formulas import DENSE, FORMULAS, Layer, Reference, reference, rotate
from mmtoken.evaluation.peer_subjects import PEERS, PictureSize, Size
from mmtoken.evaluation.peer_visual_formulas import PUBLISHED, Decoder, Prompt, unlike_pivots, without_alikes
from mmtoken.evaluation.peers import BATCHES, OURS, commit_of, cost, equality, main, measure, page, summary_table
from tests.golden.case import GoldenCase
from tests.golden.models import llama

ROOT = Path(__file__).parents[2]
RESULTS = {peer: json.loads((ROOT / "benchmarks" / f"{about.page}.json").read_text()) for peer, about in PEERS.items()}

# ----------------------------------------------------------------------------------------------------------- formulas

GOLDEN = {
    "SnapKV": ("snapkv", {"window_size": "window", "kernel_size": "kernel"}),
    "ExpectedAttention": ("expected_attention", {"n_future_positions": "future", "n_sink": "sinks"}),
    "TOVA": ("tova", {}),
    "KeyDiff": ("keydiff", {}),
    "Knorm": ("knorm", {}),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_keep_what_the_official_code_keeps(name: str) -> None:
    case = GoldenCase.load(ROOT / "tests" / "golden" / "kvpress" / "case1.json")
    press, renamed = GOLDEN[name]
    official = case.settings.get(press, {})
    settings = {ours: official[theirs] for theirs, ours in renamed.items()}
    ids = case.take("input.input_ids")[0]
    kept = reference(llama(case), ids, name, settings, 1 - case.settings["compression_ratio"], 2).kept
    assert torch.equal(kept, torch.stack([case.tensors[f"expected.{press}.layer{i}.kept"] for i in range(len(kept))]))


def test_the_dense_reference_is_generate() -> None:
    case = GoldenCase.load(ROOT / "tests" / "golden" / "kvpress" / "case1.json")
    model, ids = llama(case), case.take("input.input_ids")
    found = reference(model, ids[0], DENSE, {}, 0.5, 6)
    out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=50)
    assert torch.equal(found.tokens, out[0, ids.shape[1] :]) and found.logits.shape == (6, 50)


def test_rotation_by_hand() -> None:
    turned = rotate(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]).double(), torch.tensor([2, 2]), 100.0)
    wanted = [[-0.416147, 0, 0.909297, 0], [0, 0.980067, 0, 0.198669]]
    torch.testing.assert_close(turned.float(), torch.tensor(wanted), rtol=0, atol=1e-6)


def test_attention_of_a_query_stops_at_its_own_key() -> None:
    keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]]).double()
    row = Layer(keys, keys, keys.flip(2), keys, 1e4).attention(0, 1)
    torch.testing.assert_close(row, torch.tensor([0.669762, 0.330238, 0]).double(), rtol=0, atol=1e-6)


class Felt(Decoder):
    """Its attention has keys that were written down."""

    def attention(self, number: int, hidden: torch.Tensor) -> Layer:
        keys = hidden.double()[None]
        return Layer(keys, keys, keys, keys, 1e4)


def seen(visual: int, text: int = 0, **states: torch.Tensor) -> Prompt:
    """A prompt of visual tokens, with text behind them."""
    nothing = torch.zeros(visual + text, 2)
    return Prompt(Felt(None), states.get("embeddings", nothing), torch.arange(visual), nothing, nothing)


def test_divprune_by_hand() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0], [0.6, 0.8]])
    assert PUBLISHED["DivPrune"].choose(seen(5, embeddings=rows), 3) == [3, 0, 2]


def test_look_alikes_by_hand() -> None:
    alike = [[1.0 - abs(i - j) / 40 for j in range(20)] for i in range(20)]
    alike[4][5] = 0.1  # 4 is unlike all that it is compared with
    alike[4] = [min(value, 0.1) for value in alike[4]]
    order = [*range(10), *range(19, 9, -1)]
    # 0, 2, .. 8, 19, 17, .. 11 meet 1, 3, .. 9, 18, 16, .. 10: all but 4 and the last of equal ones go
    assert without_alikes(alike, order, 12, False) == [19, 4, 1, 3, 5, 7, 9, 18, 16, 14, 12, 10]
    assert without_alikes(alike, sorted(order), 12, True) == [1, 3, 4, 5, 7, 9, 11, 13, 15, 17, 18, 19]


def test_pivots_by_hand() -> None:
    """The oracle that DART's own tests have."""
    keys = torch.tensor([[1.0, 1], [3, 0], [0.5, 0.5], [2, 2], [0, 1], [1, 0], [1, 0], [2, 1]])
    states = torch.tensor([[1.0, 0], [1, 1], [0, 1], [1, 0.2], [-1, 0], [0, -1], [1, 0.5], [0, 1]]).double()
    assert unlike_pivots(seen(6, 2), keys, 0, states, [6, 7], 3, 1, 1) == [3, 4, 5]


# ---------------------------------------------------------------------------------------------------------- comparing


def made_up(tokens: list[int], kept: list[int]) -> Reference:
    """Two layers of one head; the logits of a token are one-hot."""
    logits = torch.eye(4)[tokens]
    return Reference(torch.tensor([[kept], [kept]]), torch.tensor(tokens), logits)


def test_outputs_are_held_against_the_formula() -> None:
    rows, even = [made_up([1, 2], [0, 2]), made_up([3, 0], [1])], [made_up([1, 1], [0])] * 2
    dense = {"rows": [made_up([1, 3], [0, 1, 2]), made_up([3, 0], [0, 1])], "even": even}
    logits = torch.stack([row.logits for row in rows])
    logits[1, 1, 0] += 0.5
    tensors = {"X.even.tokens": torch.tensor([[1, 1], [1, 2]]), "X.even.logits": torch.stack([even[0].logits] * 2)}
    for number, row in enumerate(rows):
        tensors |= {f"X.row {number}.tokens": row.tokens[None], f"X.row {number}.logits": logits[None, number]}
    tensors |= {"X.row 0.kept": torch.tensor([[[0, 2]], [[1, 2]]]), "X.row 1.kept": torch.tensor([[[1]], [[0]]])}
    found = equality("X", {"rows": rows, "even": even}, dense, tensors, {"X": {"padded": "OSError: no"}})
    assert found == {
        "dense": 1.0,
        "alone": {"rows": 2, "rows_equal": 2, "logits": 0.5},
        "even": {"rows": 2, "rows_equal": 1, "logits": 0.0},
        "padded": {"error": "OSError: no"},
        "kept": {"equal": 4, "of": 6},
    }


def test_costs_are_ratios_within_a_round() -> None:
    def seconds(dense: float, mine: float) -> dict[str, Any]:
        both = {DENSE: dense, "X": mine}
        return {"padded": {name: {"first_token": s, "each_further_token": s / 2} for name, s in both.items()}}

    found = {"bytes": {"padded": {DENSE: {"peak": 2}, "X": {"peak": 1}}}}
    row = cost({**found, "seconds": [seconds(1, 2), seconds(2, 6), seconds(1, 10)]})["padded"]["X"]
    assert row["bytes"] == {"peak": 1} and row["first_token"]["milliseconds"]["median"] == 6000
    assert row["first_token"]["of_dense"]["median"] == 3 and row["each_further_token"]["milliseconds"]["low"] == 1000
    broken = seconds(1, 2)
    broken["padded"]["X"] = {"error": "OSError: no"}
    assert cost({**found, "seconds": [seconds(1, 2), broken]})["padded"]["X"] == {"error": "OSError: no"}


# ------------------------------------------------------------------------------------------- a run, without a peer


@functools.cache
def run() -> dict[str, Any]:
    return measure(
        "fake",
        Path(sys.executable),
        turns=1,
        rounds=1,
        subject=Size(32, 48, 2, 4, 2, 64),
        methods={"SnapKV": {"window": 4, "kernel": 3}, "Knorm": {}},
        rows=(24, 16, 12),
        keep=0.5,
        probes=("keep nothing", "a prompt shorter than the window", "one prompt"),
        distributions=("safetensors",),
    )


def test_mmtoken_gives_the_formula_alone_and_in_padded_batches() -> None:
    for found in run()["sides"][OURS]["equality"].values():
        assert found["kept"]["equal"] == found["kept"]["of"] == 2 * 2 * (12 + 8 + 6)
        assert found["dense"] > 1e-2
        for batch in BATCHES:
            assert found[batch]["rows_equal"] == found[batch]["rows"] == 3 and found[batch]["logits"] < 1e-4


def test_a_library_that_does_nothing_is_told_apart_and_its_refusals_are_recorded() -> None:
    for found in run()["sides"]["fake"]["equality"].values():
        assert found["alone"]["logits"] == pytest.approx(found["dense"], rel=1e-4)
        assert found["even"] == found["padded"] == {"error": "NotImplementedError: one prompt at a time"}
    assert run()["sides"]["fake"]["cost"]["padded"]["Knorm"] == {"error": "NotImplementedError: one prompt at a time"}
    assert run()["sides"]["fake"]["cost"]["padded"][DENSE]["bytes"]["cache"] == 2 * 2 * 3 * 2 * 24 * 8 * 4


def test_probes_hold_outcomes_and_errors() -> None:
    ours, fake = (run()["sides"][side]["probes"] for side in (OURS, "fake"))
    assert ours["keep nothing"]["error"].startswith("KeepError: keep=0.0")
    assert {name: ours[name] for name in list(ours)[1:]} == dict.fromkeys(list(ours)[1:], "runs")
    assert set(fake.values()) == {"runs"}


def test_both_sides_tell_cost_and_versions() -> None:
    assert json.loads(json.dumps(run())) == run()
    half = run()["sides"][OURS]["cost"]["row 0"]
    assert half["SnapKV"]["bytes"]["cache"] * 2 == half[DENSE]["bytes"]["cache"] == 2 * 2 * 2 * 24 * 8 * 4
    assert half["Knorm"]["first_token"]["milliseconds"]["count"] == run()["rounds"] == 1
    assert half["Knorm"]["bytes"]["peak"] > half["Knorm"]["bytes"]["cache"]
    assert set(run()["sides"]["fake"]["versions"]) == {"torch", "transformers", "safetensors"}


# ----------------------------------------------------------------------------------------------------------- pictures


@functools.cache
def pictures() -> dict[str, Any]:
    return measure(
        "fake",
        Path(sys.executable),
        turns=1,
        rounds=1,
        subject=PictureSize(Size(32, 48, 3, 4, 2, 128), 32, 3, 48, 6),
        methods=PEERS["angelslim"].methods,
        rows=(90, 84, 76),
        keep=0.25,
        probes=("a prompt without a picture", "two pictures in a prompt", "beam search"),
        own=True,
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_mmtoken_gives_the_formulas_of_visual_tokens_alone_and_in_padded_batches(name: str) -> None:
    found = pictures()["sides"][OURS]["equality"][name]
    assert found["kept"]["equal"] == found["kept"]["of"] == 3 * 2 * 16
    assert found["dense"] > 1e-2
    for batch in BATCHES:
        assert found[batch]["rows_equal"] == found[batch]["rows"] == 3 and found[batch]["logits"] < 1e-4


def test_a_peer_is_held_against_its_own_formulas_as_well() -> None:
    assert not pictures()["sides"][OURS]["own"]
    fake = pictures()["sides"]["fake"]
    assert set(fake["own"]) == set(PUBLISHED)
    for name, found in fake["own"].items():
        assert found["padded"] == {"error": "NotImplementedError: one prompt at a time"}
        assert found["alone"]["logits"] == pytest.approx(found["dense"], rel=1e-4)
        assert (found["dense"] == fake["equality"][name]["dense"]) == (name == "DivPrune")  # chooses as published


def test_probes_with_pictures() -> None:
    fake = pictures()["sides"]["fake"]["probes"]
    assert fake == dict.fromkeys(fake, "runs") and len(fake) == 3


PACKAGE = "angelslim/compressor/token_compressor"


def checkout(folder: Path) -> Path:
    """A package that has AngelSlim's names, and tells what it is given."""
    for part in ("", "/compressor", "/compressor/token_compressor", "/compressor/token_compressor/base"):
        (folder / f"angelslim{part}").mkdir(parents=True)
        (folder / f"angelslim{part}" / "__init__.py").touch()
    (folder / PACKAGE / "base" / "config.py").write_text(
        "import yaml\n"
        "class TokenCompressorConfig:\n"
        "    from_yaml = staticmethod(lambda path: yaml.safe_load(open(path)))\n"
    )
    (folder / PACKAGE / "adapter.py").write_text(
        "class UniversalPruningAdapter:\n"
        "    def __init__(self, model, strategy_config, raw_map_data):\n"
        "        self.told = strategy_config, [part['wrapper_class'] for part in raw_map_data]\n"
        "    def wrap_model(self):\n"
        "        raise RuntimeError(self.told)\n"
    )
    return folder


def test_angelslim_is_driven_from_a_checkout_by_its_own_configuration(tmp_path: Path) -> None:
    results = measure(
        "angelslim",
        Path(sys.executable),
        turns=1,
        rounds=1,
        subject=PictureSize(Size(32, 48, 3, 4, 2, 128), 32, 3, 48, 6),
        methods={name: settings for name, settings in PEERS["angelslim"].methods.items() if name != "VisPruner"},
        rows=(70,),
        keep=0.25,
        probes=(),
        source=checkout(tmp_path),
        commit="commit 123",
    )
    assert results["commit"] == "commit 123"
    found = results["sides"]["angelslim"]["equality"]
    told = {name: found[name]["alone"]["error"].removeprefix("RuntimeError: ") for name in found}
    assert "'global': {'params': {'ratio': 0.75}, 'strategy': 'divprune'}" in told["DivPrune"]
    assert "{1: {'params': {'layer_idx': 1," in told["FastV"] and "'llm_q_layers': [1]" in told["FastV"]
    assert "'pivot_image_token': 4, 'pivot_text_token': 4, 'ratio': 0.75" in told["DART"]
    assert told["DART"].endswith("['Prunable_LlavaModel', 'Prunable_CLIPAttention', 'Prunable_LlamaModel', "
                                 "'Prunable_LlamaAttention'])")  # fmt: skip


def test_a_checkout_is_asked_for_only_where_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "make_environment", lambda *_: pytest.fail("went on to install"))
    with pytest.raises(MMTokenError, match=r"source='None' for angelslim; clone https://github.com/Tencent/AngelSlim"):
        main(["--peer", "angelslim"])
    with pytest.raises(MMTokenError, match=r"for kvpress; leave it out"):
        main(["--source", str(tmp_path)])
    with pytest.raises(MMTokenError, match=r"has no folder 'angelslim'"):
        main(["--peer", "angelslim", "--source", str(tmp_path)])


def test_the_commit_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = SimpleNamespace(returncode=0, stdout="abc\n")
    monkeypatch.setattr(peers.subprocess, "run", lambda *_, **__: said)
    assert commit_of(tmp_path) == "commit abc"
    said.returncode = 128
    assert commit_of(tmp_path) == "of no known commit"


# ------------------------------------------------------------------------------------------------------ files, errors


@pytest.mark.parametrize("peer", PEERS)
def test_the_page_is_generated(peer: str) -> None:
    """Out of date? Run `python -m tests.evaluation.test_peers`, which writes it anew from the results file."""
    assert (ROOT / "docs" / f"{PEERS[peer].page}.md").read_text() == page(RESULTS[peer])


@pytest.mark.parametrize("peer", PEERS)
def test_the_committed_results_have_mmtoken_equal_to_the_formulas(peer: str) -> None:
    results, about = RESULTS[peer], PEERS[peer]
    assert results["methods"] == about.methods and results["rows"] == list(about.rows) and results["rounds"] >= 7
    assert results["size"] == json.loads(json.dumps(asdict(about.subject)))  # type: ignore[call-overload]
    for found in results["sides"][OURS]["equality"].values():
        assert found["kept"]["equal"] == found["kept"]["of"]
        assert all(found[batch]["rows_equal"] == 4 and found[batch]["logits"] < 1e-4 for batch in BATCHES)


def test_the_committed_results_have_angelslim_equal_to_its_own_formulas() -> None:
    for found in RESULTS["angelslim"]["sides"]["angelslim"]["own"].values():
        assert found["kept"]["equal"] == found["kept"]["of"]
        assert found["alone"]["rows_equal"] == 4 and found["alone"]["logits"] < 1e-4


def test_the_page_has_the_words_of_an_error() -> None:
    results = json.loads(json.dumps(RESULTS["kvpress"]))
    side = results["sides"][results["peer"]]
    for name in ("TOVA", "Knorm"):
        side["equality"][name]["padded"] = side["cost"]["padded"][name] = {"error": "OSError: a | `b`\nc"}
    side["probes"]["static cache"] = {"error": "OSError: x"}
    text = page(results)
    assert "| `OSError: x` |" in text and "| TOVA, kvpress | error |" in text
    assert "kvpress, TOVA (batch 4, padded), Knorm (batch 4, padded): `OSError: a / 'b' c`" in text


def test_the_summary_counts_rows_and_spans_costs_over_methods() -> None:
    def side(rows: int, ratio: float) -> dict[str, Any]:
        even = {"rows": 2, "rows_equal": 1}
        equal = {"alone": {"rows": 2, "rows_equal": rows}, "even": even, "padded": {"error": "no"}}
        dense, stage = {"bytes": {"peak": 8, "cache": 4}}, {"of_dense": {"median": ratio}}
        one = {"bytes": {"peak": 4, "cache": 1}, "first_token": stage}
        two = {**one, "first_token": {"of_dense": {"median": ratio + 1}}}
        broken = {DENSE: dense, "X": {"error": "no"}}
        return {
            "equality": {"X": equal, "Y": equal},
            "cost": {"row 0": {DENSE: dense, "X": one, "Y": two}, "padded": broken},
        }

    rows = {row[0]: tuple(row[1:]) for row in summary_table({"a": side(2, 1.5), "b": side(1, 0.5)}).rows}
    assert rows["batch 1: rows that are the formula's"] == ("4 of 4", "2 of 4")
    assert rows["batch 4, padded: rows that are the formula's"] == ("error", "error")
    assert rows["batch 1: prefill time over dense"] == ("1.50 to 2.50", "0.50 to 1.50")
    assert rows["batch 1: cache over dense"] == ("0.25 to 0.25",) * 2
    assert rows["batch 4, padded: peak memory over dense"] == ("error", "error")


def test_an_environment_that_is_there_is_used(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.touch()
    assert peers.make_environment(tmp_path, ("nothing",)) == python


def test_a_failing_pip_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def refuse(command: list[str], **_: Any) -> Any:
        calls.append(command[1:])
        return SimpleNamespace(returncode=1, stderr="no such thing")

    monkeypatch.setattr(peers.venv, "create", lambda folder, with_pip: calls.append([folder, with_pip]))
    monkeypatch.setattr(peers.subprocess, "run", refuse)
    with pytest.raises(MMTokenError, match=r"pip install one two failed.*no such thing"):
        peers.make_environment(tmp_path / "new", ("one", "two"))
    assert calls == [[tmp_path / "new", True], ["-m", "pip", "install", "-q", "one", "two"]]


def test_a_side_that_fails_as_a_whole_is_told(tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text('{"library": "fake"}')
    with pytest.raises(MMTokenError, match="library='fake': its run failed"):
        peers.run_side(Path("false"), tmp_path)


def test_arguments_are_checked_before_anything_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "make_environment", lambda *_: pytest.fail("went on to install"))
    with pytest.raises(MMTokenError, match="turns=0"):
        main(["--turns", "0"])
    with pytest.raises(InputError, match=r"page=.*is not a \.md file"):
        main(["--out", str(tmp_path / "peers.json"), "--page", str(tmp_path / "peers.txt")])


if __name__ == "__main__":
    for one, about in PEERS.items():
        (ROOT / "docs" / f"{about.page}.md").write_text(page(RESULTS[one]))
