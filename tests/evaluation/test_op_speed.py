"""`mmtoken bench ops`: no figure beside a failed check, and what a row says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtoken.cli.main import main
from mmtoken.errors import InputError
from mmtoken.evaluation import op_speed
from mmtoken.evaluation.op_speed import Limits, measure
from mmtoken.kernels.cases import Case, Cost, Operation

Output = pytest.CaptureFixture[str]
FEW = Limits(tokens=(64, 128, 256), sizes=1, check_tokens=(1, 5), compiled_tokens=0, rounds=2)


def sums(x: Tensor, *, impl: str = "torch") -> Tensor:
    return x.sum(-1)


def by_matrix(x: Tensor) -> Tensor:
    return (x.new_ones(x.shape[1], x.shape[1]).diag().diag() @ x).sum(-1)


def doubled(x: Tensor) -> Tensor:
    return 2 * by_matrix(x)


def wrong_when_large(x: Tensor) -> Tensor:
    return by_matrix(x) + (x.shape[1] > 100)


def out_of_memory(x: Tensor) -> Tensor:
    if x.shape[1] > 5:
        raise torch.OutOfMemoryError("no room\nfor it")
    return by_matrix(x)


CASES = (
    Case(
        "plain",
        lambda generator, *, n, dtype, batch, width: {"x": torch.randn(batch, n, width, generator=generator).to(dtype)},
        {"width": 4},
        ("x",),
        {"wide": {"width": 32}, "wider": {"width": 64}},
    ),
    Case("small", lambda generator, *, n, dtype, batch: {"x": torch.ones(batch, n, 2, dtype=dtype)}),
)


def operation(naive: Any = by_matrix) -> Operation:
    def cost(inputs: dict[str, Any], outputs: tuple[Tensor, ...]) -> Cost:
        return Cost(inputs["x"].nbytes + outputs[0].nbytes, inputs["x"].numel())

    return Operation("sums", sums, lambda inputs: [], CASES, cost, naive=naive)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, operation())
    monkeypatch.setattr(op_speed, "QUICK", FEW)
    monkeypatch.setattr(op_speed, "can_run", lambda impl, device: False)


def use(monkeypatch: pytest.MonkeyPatch, *all_: Operation) -> None:
    monkeypatch.setattr(op_speed, "operations", lambda: {op.name: op for op in all_})


def test_a_row_says_what_was_moved_how_long_it_took_and_how_much_memory_it_needed() -> None:
    results = measure(limits=FEW)
    assert json.loads(json.dumps(results)) == results
    assert (results["kind"], results["dtype"], results["rounds"]) == ("kernels", "float32", 2)
    assert {"torch", "triton"} <= set(results["environment"]["versions"])
    assert results["checked"] == {"sums": ["plain", "small"]} and results["failed"] == {}
    assert [(row["case"], row["size"], row["n"]) for row in results["results"]] == [
        ("plain", "wide", n) for n in (64, 128, 256)
    ]
    for row in results["results"]:
        n = row["n"]
        assert (row["bytes"], row["flops"]) == (4 * n * 33, n * 32) and row["latency"]
        assert set(row["milliseconds"]) == {"eager", "naive"} and row["milliseconds"]["naive"]["count"] == 2
        assert set(row["speedup_over_eager"]) == {"naive"}
        # Bytes over the median time, beside what a copy reaches.
        seconds = row["milliseconds"]["eager"]["median"] / 1e3
        share = row["bytes"] / seconds / results["rates"]["copy_bytes_per_second"]
        assert row["copy_share"]["eager"] == pytest.approx(share, rel=0.01, abs=1e-3)
        share = row["flops"] / seconds / results["rates"]["matmul_flops_per_second"]
        assert row["matmul_share"]["eager"] == pytest.approx(share, rel=0.01, abs=1e-3)
        assert row["peak_mib"]["eager"] == pytest.approx(4 * n / 2**20, abs=1e-3)
        assert row["peak_mib"]["naive"] > 4 * n * n / 2**20
        assert set(row["missing"]) == {"compiled"}


def test_an_operation_that_fails_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(operation(), name="good")
    use(monkeypatch, operation(doubled), other)
    results = measure(limits=FEW)
    assert {row["operation"] for row in results["results"]} == {"good"} and set(results["checked"]) == {"good"}
    assert results["failed"]["sums"][0].startswith("naive, case plain, N=1, float32: output 0 is ")


def test_nor_has_one_that_fails_at_a_timed_size(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, operation(wrong_when_large))
    results = measure(limits=FEW)
    assert results["results"] == [] and results["checked"] == {}
    assert [line.partition(": ")[0] for line in results["failed"]["sums"]] == [
        f"naive, case plain, wide, N={n}" for n in (128, 256)
    ]


def test_triton_is_checked_where_it_is_interpreted_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def function(x: Tensor, *, impl: str = "torch") -> Tensor:
        called.append(impl)
        return x.sum(-1) * (1 if impl == "torch" or right else 2)

    monkeypatch.setattr(op_speed, "can_run", lambda impl, device: impl == "triton")
    right = True
    use(monkeypatch, replace(operation(), function=function))
    results = measure(limits=FEW)
    assert "triton" in called and results["failed"] == {}
    assert all("interpreted" in row["missing"]["triton"] for row in results["results"])
    assert all("triton" not in row["milliseconds"] for row in results["results"])
    right = False
    assert all(line.startswith("triton, case ") for line in measure(limits=FEW)["failed"]["sums"])


def test_what_gives_up_is_missing_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, operation(out_of_memory))
    for row in measure(limits=FEW)["results"]:
        assert row["missing"]["naive"] == "OutOfMemoryError: no room" and set(row["milliseconds"]) == {"eager"}


def test_the_compiled_reference_is_timed_up_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda call, *, dynamic: call)
    rows = measure(limits=replace(FEW, compiled_tokens=64))["results"]
    assert ["compiled" in row["milliseconds"] for row in rows] == [True, False, False]
    assert rows[1]["missing"]["compiled"].endswith("compiled up to N=64")


def test_shapes_above_the_limits_are_left_out_and_said_to_be() -> None:
    results = measure(limits=replace(FEW, flops=128 * 32 * 2, naive_bytes=4 * 128 * 128))
    assert [row["n"] for row in results["results"]] == [64, 128]
    (left,) = results["left_out"]
    assert left["n"] == 256 and left["reason"] == "up to 1.6e+04 FLOPs for one call, more than 8.2e+03"
    naive = [row["missing"].get("naive") for row in results["results"]]
    assert naive == [None, "would need up to 0.0 GiB"]


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match=r"operations='sum' is unknown.*'sums'"):
        measure(["sum"], limits=FEW)


def test_the_command_writes_both_files_and_ends_with_zero(tmp_path: Path, capsys: Output) -> None:
    assert main(["bench", "ops", "--quick", "--rounds", "1", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert json.loads((tmp_path / "kernels.json").read_text())["rounds"] == 1
    text = (tmp_path / "kernels.md").read_text()
    assert "| sums | plain, wide | 64 |" in text and "has not been measured" in text
    assert "sums  " in shown.out and "wrote " in shown.out and "sums: checking" in shown.err


def test_the_command_ends_with_one_and_no_figure_if_a_check_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    use(monkeypatch, operation(doubled))
    assert main(["bench", "ops", "--quick", "--out", str(tmp_path)]) == 1
    assert "FAILED sums: naive, case plain, N=1" in capsys.readouterr().out
    assert "| sums |" not in (tmp_path / "kernels.md").read_text()
    assert "- sums: naive, case plain" in (tmp_path / "kernels.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "0"], "rounds=0; give"),
        (["--operations", "sum"], "operations='sum' is unknown"),
        (["--operations", "sums,,"], "operations='' is unknown"),
        (["--device", "warp"], "device='warp' cannot be used"),
        (["--out", __file__], "is no folder"),
        (["--what", "speed"], "--what"),
    ],
)
def test_an_argument_that_cannot_be_used_is_refused(words: list[str], message: str, capsys: Output) -> None:
    assert main(["bench", "ops", *words]) == 2
    assert message in capsys.readouterr().err
