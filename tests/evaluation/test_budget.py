"""Budgets: the grammar, lengths per layer against runs of a model, the search against trying everything."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from PIL import Image

import mmtoken
from mmtoken import MMTokenError
from mmtoken.backbones.registry import adapt
from mmtoken.cli.main import main
from mmtoken.compressors import Compressor, DivPrune, FastV, PyramidDrop, SnapKV, VisionZip
from mmtoken.compressors.registry import resolve
from mmtoken.engine.flops import DecoderShape
from mmtoken.errors import InputError
from mmtoken.evaluation import budget
from mmtoken.evaluation.budget import Budget, Pace, Setting, calibrate, estimate, fits, largest_keep, layer_lengths

Output = pytest.CaptureFixture[str]

SHAPE = DecoderShape(layers=4, width=64, mlp_width=128, query_width=64, key_width=32)
SETTING = Setting(SHAPE, visual=64, text=10, item_bytes=2, billions=0.5)
PACE = Pace(0.001, 1e-9, "made up")


@pytest.mark.parametrize(
    ("words", "parsed"),
    [
        (["50ms"], Budget(seconds=0.05)),
        (["0.2s"], Budget(seconds=0.2)),
        ([".5x"], Budget(share=0.5)),
        (["1x", "3.s"], Budget(share=1.0, seconds=3.0)),
        (["2GiB"], Budget(cache_bytes=2 * 2**30)),
        (["64MiB", "50ms"], Budget(cache_bytes=2**26, seconds=0.05)),
        (["1.5KiB"], Budget(cache_bytes=1536)),
    ],
)
def test_limits_are_read(words: list[str], parsed: Budget) -> None:
    assert Budget.parse(words) == parsed


@pytest.mark.parametrize(
    "word",
    ["50", "ms", "", "-5ms", "0ms", "0.0x", "5 ms", "50MS", "2GB", "2gib", "1e3ms", "nanms", "infs", "½x", "5ms,1x"],
)
def test_other_limits_are_refused_with_the_grammar(word: str) -> None:
    with pytest.raises(InputError, match="give a positive number with its unit: 50ms") as error:
        Budget.parse([word])
    assert f"budget={word!r}" in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["1.5x"], "above the dense prefill"),
        (["5ms", "0.2s"], "twice"),
        (["5MiB", "1GiB"], "twice"),
        ([], "budget is empty"),
    ],
)
def test_limits_that_cannot_be_meant_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Budget.parse(words)


@pytest.mark.parametrize(
    ("method", "computed", "held", "guessed"),
    [
        (DivPrune(keep=16), [16] * 4, [16] * 4, False),
        (VisionZip(keep=0.25), [16] * 4, [16] * 4, False),
        (FastV(keep=16, layer=3), [64, 64, 64, 16], [64, 64, 64, 16], False),
        (PyramidDrop(keep=8, layers=(1, 2, 3)), [64, 32, 16, 8], [64, 32, 16, 8], True),
        (SnapKV(keep=16), [64] * 4, [16] * 4, False),
    ],
)
def test_lengths_follow_from_where_a_class_acts(
    method: Compressor, computed: list[int], held: list[int], guessed: bool
) -> None:
    assert layer_lengths(method, 4, 64) == (computed, held, guessed)


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, dict[str, torch.Tensor]]:
    model, processor = mmtoken.load("tiny-llava")
    content = [{"type": "image"}, {"type": "text", "text": "read the number."}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    picture = Image.effect_noise((64, 64), 80).convert("RGB")
    return model, processor(text=[text], images=[[picture]], return_tensors="pt")


@pytest.mark.parametrize(
    "method", [DivPrune(keep=16), VisionZip(keep=16), FastV(keep=16), PyramidDrop(keep=8), SnapKV(keep=16)], ids=repr
)
def test_an_estimate_is_what_a_run_reports(method: Compressor, tiny: tuple[Any, dict[str, torch.Tensor]]) -> None:
    model, inputs = tiny
    with mmtoken.compress(model, method) as session, torch.no_grad():
        model(**inputs)
    report = session.report
    config = adapt(model).decoder.config
    text = inputs["input_ids"].shape[1] - report.tokens_in[0]
    setting = Setting(DecoderShape.from_config(config), report.tokens_in[0], text, 4, 0.002)
    found, dense = estimate(method, setting, PACE), estimate(None, setting, PACE)
    assert found["flops"] == report.flops and dense["flops"] == report.flops_dense
    assert found["cache_bytes"] == report.kv_bytes and dense["cache_bytes"] == report.kv_bytes_dense
    assert found["prefill_ms"] == pytest.approx(1e3 * PACE.seconds(report.flops))
    assert found["layer_average"] == pytest.approx(report.layer_average, abs=0.05)


@pytest.mark.parametrize("name", ["divprune", "fastv", "pyramiddrop", "snapkv"])
@pytest.mark.parametrize("limits", [["0.5x"], ["0.9x", "10KiB"], ["14KiB"], ["0.1x"], ["1x"], ["1000s"]])
def test_the_largest_keep_is_the_one_that_trying_all_finds(name: str, limits: list[str]) -> None:
    wanted = Budget.parse(limits)
    dense = estimate(None, SETTING, PACE)

    def make(keep: int) -> Compressor:
        return resolve(name, keep=keep)

    able = [keep for keep in range(1, 65) if fits(estimate(make(keep), SETTING, PACE), dense, wanted)]
    found = largest_keep(make, SETTING, PACE, wanted)
    assert (found["keep"] if found else None) == max(able, default=None)


def test_every_limit_counts() -> None:
    dense = {"prefill_ms": 100.0, "cache_bytes": 1000.0}
    found = {"prefill_ms": 40.0, "cache_bytes": 300.0}
    for words, within in (
        ("40ms", True),
        ("39ms", False),
        ("0.4x", True),
        ("0.39x", False),
        ("1KiB", True),
        ("0.2KiB", False),
    ):
        assert fits(found, dense, Budget.parse([words])) is within
    assert not fits(found, dense, Budget.parse(["50ms", "0.2KiB"])) and not fits(
        found, dense, Budget.parse(["5ms", "1KiB"])
    )
    assert not fits(found, dense, Budget.parse(["50ms", "0.3x"]))


def test_the_error_grows_as_tokens_leave() -> None:
    errors = [estimate(DivPrune(keep=keep), SETTING, PACE)["relative_error"] for keep in (64, 16, 1)]
    assert errors[0] == 1.0 < errors[1] < errors[2] == pytest.approx(64**0.015102, abs=1e-4)


def test_calibration_separates_overhead_from_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(shape: DecoderShape, length: int, *rest: Any) -> float:
        return 0.002 + 3e-9 * budget._layer_flops(shape, length)

    monkeypatch.setattr(budget, "_layer_seconds", seconds)
    pace = calibrate(SHAPE, 74, torch.device("cpu"))
    assert pace.overhead == pytest.approx(4 * 0.002) and pace.per_flop == pytest.approx(3e-9)
    assert "one layer with random weights at 74 tokens on cpu" in pace.source
    # a layer of a 70B model is measured narrower and shorter, and counted as a whole
    large = DecoderShape(layers=80, width=8192, mlp_width=28672, query_width=8192, key_width=1024)
    pace = calibrate(large, 3000, torch.device("cpu"))
    assert pace.overhead == pytest.approx(80 * 0.002) and pace.per_flop == pytest.approx(3e-9)
    assert "of the width" in pace.source
    # a machine on which only the overhead shows
    monkeypatch.setattr(budget, "_layer_seconds", lambda *_: 0.01)
    pace = calibrate(SHAPE, 74, torch.device("cpu"))
    assert (pace.overhead, pace.per_flop) == (0.04, 0.0)


def test_calibration_runs_a_layer_of_the_shape() -> None:
    ticks = iter(float(number) for number in range(10**6))
    pace = calibrate(SHAPE, 8, torch.device("cpu"), clock=lambda: next(ticks))
    assert pace.overhead == 4.0  # a tick per run at both lengths
    assert calibrate(SHAPE, 1, torch.device("cpu")).per_flop > 0


def test_a_given_dense_prefill_scales_with_flops() -> None:
    pace = Pace.of_dense(0.2, SETTING.flops([64] * 4))
    assert estimate(None, SETTING, pace)["prefill_ms"] == pytest.approx(200)
    assert estimate(FastV(keep=1, layer=2), SETTING, pace)["prefill_ms"] < 150


def test_doctor_says_which_compressors_and_which_keep_fit(capsys: Output) -> None:
    words = ["doctor", "--model", "tiny-llava", "--budget", "8ms", "1MiB", "--dense", "10ms", "--text-tokens", "40"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["budget"]
    assert (found["visual_tokens"], found["text_tokens"]) == (64, 40)
    assert found["dense"]["prefill_ms"] == pytest.approx(10) and found["dense"]["within"] is False
    rows = found["compressors"]
    assert rows["divprune"]["reason"] is None and 1 <= rows["divprune"]["keep"] < 64
    assert rows["divprune"]["prefill_ms"] <= 8 and rows["divprune"]["keep"] > rows["fastv"]["keep"]
    assert "stages guessed" in rows["pyramiddrop"]["notes"] and "control" in rows["random"]["notes"]
    assert rows["snapkv"]["reason"] == "not even 1 token fits"  # it shortens no prefill
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "budget: prefill 8 ms, cache 1 MiB; 64 visual + 40 text tokens" in shown
    assert "over the budget" in shown and "estimates" in shown and "arXiv 2411.03312" in shown


def test_doctor_measures_this_machine_without_a_dense_figure(capsys: Output) -> None:
    assert main(["doctor", "--model", "tiny-llava", "--budget", "1x", "--visual-tokens", "100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["budget"]
    assert found["pace"].startswith("one layer with random weights at 150 tokens")
    assert found["dense"]["within"] is True and found["compressors"]["divprune"]["keep"] == 100


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "50ms"], "needs a model; name one with --model"),
        (["--budget", "50"], "give a positive number with its unit"),
        (["--budget", "50ms", "--model", "nothing"], "'nothing'"),
        (["--dense", "50ms"], "dense='50ms' is for a budget"),
        (["--text-tokens", "5"], "text-tokens=5 is for a budget"),
        (["--model", "tiny-llava", "--budget", "1x", "--dense", "2MiB"], "dense='2MiB' is no time"),
        (["--model", "tiny-llava", "--budget", "1x", "--dense", "fast"], "budget='fast'"),
        (["--model", "tiny-llava", "--budget", "1x", "--visual-tokens", "0"], "visual-tokens=0"),
        (["--model", "tiny-llava", "--budget", "1x", "--text-tokens", "-1"], "text-tokens=-1"),
        (["--budget"], "expected at least one argument"),
    ],
)
def test_doctor_refuses_what_it_cannot_answer(words: list[str], message: str, capsys: Output) -> None:
    assert main(["doctor", *words]) == 2
    assert message in capsys.readouterr().err


def test_counts_are_checked() -> None:
    with pytest.raises(MMTokenError, match="visual-tokens=0"):
        budget.check_counts(0, 5)
