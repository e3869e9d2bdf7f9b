"""What scoring costs beside a prefill: what is counted, and the shares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmtoken.compressors import zerotprune
from mmtoken.errors import MMTokenError
from mmtoken.evaluation import scoring_share
from mmtoken.evaluation.scoring_share import main, measure, prefill_operations, rounds_of_pagerank

OPERATIONS = {"transition_score", "anchor_score", "pagerank"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HIDDEN": 16, "INTERMEDIATE": 24, "TOWER_HEADS": 2, "HEAD_WIDTH": 8, "EDGE": 64}.items():
        monkeypatch.setattr(scoring_share, name, value)


def test_a_prefill_has_the_operations_of_its_matrices() -> None:
    """Of each layer: four square projections, three of the MLP, queries by keys, and weights by values."""
    tokens, layers = 5, 32
    by_matrix = 4 * 2 * tokens * 16 * 16 + 3 * 2 * tokens * 16 * 24 + 2 * 2 * tokens * tokens * 16
    assert prefill_operations(tokens) == layers * by_matrix


def test_rounds_are_those_of_the_defaults_at_their_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rounds_of_pagerank(2880) == {2880: 30, 2507: 5, 2183: 5, 1900: 5, 1654: 1}
    called: list[tuple[int, int]] = []
    monkeypatch.setattr(scoring_share, "pagerank", lambda q, k, seen, start, n: called.append((q.shape[2], n)))
    for name, piece in scoring_share.pieces(2880).items():
        if name.startswith("page rank"):
            piece()
    assert called == [(c, n) for c, rounds in rounds_of_pagerank(2880).items() for n in (1, rounds)]
    assert zerotprune.ZeroTPrune().order == "I'-S-I"  # which is why there is a first round


def test_shares_are_paired_with_the_prefill_of_their_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of a product and of every piece in the first round, two and four in the second."""
    monkeypatch.setattr(
        scoring_share,
        "interleave",
        lambda variants, rounds, progress: {
            name: {"run": [1.0, 2.0] if name == "product" else [1.0, 4.0]} for name in variants
        },
    )
    found = measure(64, 2, lambda line: None)
    prefill = prefill_operations(64) / (2 * 64**3)
    assert found["prefill_s"]["low"] == pytest.approx(prefill, rel=1e-3)
    pieces = {"transition_score": 12, "anchor_score": 1, "pagerank": 5}
    for name, number in pieces.items():
        share = found["share_of_prefill"][name]
        assert (share["low"], share["high"]) == pytest.approx((number / prefill, number * 2 / prefill), rel=1e-3)
        assert found["seconds"][name]["high"] == 4 * number


def test_the_command_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "share.json"
    assert main(["--tokens", "48", "--rounds", "2", "--out", str(file)]) == 0
    found = json.loads(file.read_text())
    assert (found["kind"], found["tokens"], found["rounds"]) == ("scoring share", 48, 2)
    assert set(found["share_of_prefill"]) == set(found["counted"]) == OPERATIONS
    assert all(share["count"] == 2 and share["low"] > 0 for share in found["share_of_prefill"].values())
    assert "of a prefill of 48 tokens: transition_score" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "0"], "rounds=0, tokens=2880; give at least 1 round and 16 tokens"),
        (["--tokens", "15"], "rounds=7, tokens=15; give at least"),
        (["--out", "share.txt"], "out='share.txt'"),
    ],
)
def test_an_argument_that_cannot_be_used_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(MMTokenError, match=message):
        main(words)
