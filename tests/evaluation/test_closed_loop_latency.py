"""Time of a control step, on a small model: what is measured, and that operations are counted as the paper does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mmtoken.compressors import VLAPruner
from mmtoken.engine.compat import cache_in
from mmtoken.engine.flops import DecoderShape, multiply_adds
from mmtoken.errors import MMTokenError
from mmtoken.evaluation import closed_loop_latency
from mmtoken.evaluation.closed_loop_latency import PUBLISHED, ArmShape, act, build, main, variants
from mmtoken.evaluation.timing import Stopwatch

SMALL = ArmShape(layers=5, hidden=32, intermediate=48, heads=4, vocabulary=900)
CPU = torch.device("cpu")


def test_layers_share_their_weights_and_have_caches_of_their_own() -> None:
    step = build(SMALL, CPU, torch.float32)
    decoder = step.model.language_model.model
    assert len(decoder.layers) == decoder.config.num_hidden_layers == 5
    assert [layer.self_attn.layer_idx for layer in decoder.layers] == list(range(5))
    pointers = {layer.mlp.up_proj.weight.data_ptr() for layer in decoder.layers}
    assert len(pointers) == 1 and step.input_ids.shape == (1, 291)
    # Not the same layer five times over the same keys.
    output = step.model(input_ids=step.input_ids, pixel_values=step.pixel_values, use_cache=True)
    keys = [layer.keys for layer in cache_in(output).layers]
    assert len(keys) == 5 and not torch.equal(keys[0], keys[1])


def test_methods_that_look_back_prune_at_once() -> None:
    step = build(SMALL, CPU, torch.float32)
    watch = Stopwatch()
    report = act(step, VLAPruner(keep=0.125, layer=3), watch)
    assert report is not None and report.tokens_out == [32]
    assert report.layer_lengths == [[291]] * 3 + [[67]] * 2
    assert set(watch.seconds) == {"attach", "prefill", "decode", "scoring"}
    assert act(step, None, Stopwatch()) is None


def test_the_command_writes_times_and_the_papers_operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_loop_latency, "ArmShape", lambda layers: SMALL)
    plans = {name: plan for name, plan in variants().items() if name in ("dense", "VLA-Pruner 0.25", "Random 0.25")}
    monkeypatch.setattr(closed_loop_latency, "variants", lambda: plans)
    assert main(["--out", str(tmp_path / "control.json"), "--layers", "5", "--rounds", "1"]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "control.json").read_text())["results"]}
    assert list(rows) == list(plans)
    shape = DecoderShape(layers=5, width=32, mlp_width=48, query_width=32, key_width=32)
    want = multiply_adds(shape, [[291]] * 3 + [[35 + 64]] * 29) / 1e12
    assert rows["VLA-Pruner 0.25"]["tera_multiply_adds_of_32_layers"] == round(want, 5)
    assert [row["published"] for row in rows.values()] == [1.906, 0.758, None]
    assert rows["dense"]["speedup"]["step"]["median"] == 1.0
    assert (tmp_path / "control.md").read_text().count("\n| ") == 2 + 3


def test_at_openvlas_size_the_count_is_the_published_one() -> None:
    shape = DecoderShape(layers=32, width=4096, mlp_width=11008, query_width=4096, key_width=4096)
    for keep, published in PUBLISHED.items():
        left = 35 + round(256 * keep)
        assert multiply_adds(shape, [[291]] * 3 + [[left]] * 29) / 1e12 == pytest.approx(published, rel=6e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--layers", "3"], "layers=3; give 4 to 32"), (["--device", "abacus"], "device='abacus' is unknown")],
)
def test_arguments_that_cannot_be_used(words: list[str], message: str) -> None:
    with pytest.raises(MMTokenError, match=message):
        main(words)
