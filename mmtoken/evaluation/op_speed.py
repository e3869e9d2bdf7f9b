"""Speed and memory of the scoring operations: first whether they are right, then what they cost.

Of each operation every implementation that runs here is held against the float32 reference, values and gradients, at
small odd sizes and again at each timed size. An operation that fails gets no figures. What passes is timed in
interleaved rounds: the torch reference as it is (eager), compiled by torch.compile, the straightforward version that
holds all of the N x N matrix (naive), and Triton where there is a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from mmtoken.errors import InputError, near_names
from mmtoken.evaluation.memory import peak_bytes
from mmtoken.evaluation.tables import Table
from mmtoken.evaluation.timing import (
    MIN_ROUNDS,
    Stopwatch,
    Summary,
    Variant,
    environment,
    interleave,
    one_thread,
    paired,
)
from mmtoken.kernels.agreement import Call, disagreement
from mmtoken.kernels.cases import Inputs, Operation, changed, made, operations
from mmtoken.kernels.dispatch import can_run

SCHEMA_VERSION = 1
KIND = "kernels"
EAGER, COMPILED, NAIVE, TRITON = "eager", "compiled", "naive", "triton"
LATENCY_BYTES = 256 * 2**20
"""What moves less is bound by launching, not by bandwidth, and is reported as latency."""
NEAR_TIES = 1e-3
"""Share of an integer output that may differ at timed sizes, where some of so many random inputs nearly tie."""


@dataclass(frozen=True)
class Limits:
    """What is left out, because it would take too long or not fit.

    Attributes:
        tokens: N of the timed shapes.
        sizes: most of a case's real sizes.
        check_tokens: N at which values and gradients are checked first.
        flops: most of one call, estimated as the square of N from the N before.
        compiled_tokens: largest N of the compiled reference, whose loops over tiles unroll.
        naive_bytes: most memory for the naive version, estimated from what it needs at the smallest N.
        rounds: measured rounds.
    """

    tokens: tuple[int, ...] = (576, 2880, 8192, 32768)
    sizes: int = 2
    check_tokens: tuple[int, ...] = (1, 63, 577)
    flops: float = 1e11
    compiled_tokens: int = 576
    naive_bytes: int = 2 * 2**30
    rounds: int = MIN_ROUNDS


CPU = Limits()
QUICK = Limits(tokens=(576, 2880), sizes=1, check_tokens=(1, 63), flops=1e10, compiled_tokens=0, rounds=3)
GPU = Limits(flops=1e14, compiled_tokens=8192, naive_bytes=32 * 2**30, rounds=25)


def measure(
    names: Sequence[str] = (),
    *,
    device: torch.device | None = None,
    limits: Limits = CPU,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Check, then time operations.

    Args:
        names: of operations; none: all of them.
        device: float32 on a CPU, with one thread; bfloat16 on a GPU.
        limits: what is timed and what is left out.
        progress: told about every step.

    Returns:
        JSON-ready results: a row for every shape that was timed, what each operation failed, what was left out.

    Raises:
        InputError: no operation has such a name.
    """
    device = device or torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = find(names)
    failed: dict[str, list[str]] = {}
    results: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    with one_thread(device):
        rates = measured_rates(device, dtype)
        for operation in chosen:
            progress(f"{operation.name}: checking")
            wrong = faults(operation, device, limits.check_tokens)
            if not wrong:
                rows, missing, wrong = _time(operation, device, dtype, limits, rates, progress)
            if wrong:
                failed[operation.name] = wrong
                continue
            results += rows
            left_out += missing
    found = environment(device)
    found["versions"]["triton"] = _triton()
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "environment": found,
        "dtype": str(dtype).removeprefix("torch."),
        "rounds": limits.rounds,
        "rates": rates,
        "checked": {op.name: [case.name for case in op.cases] for op in chosen if op.name not in failed},
        "failed": failed,
        "results": results,
        "left_out": left_out,
    }


def find(names: Sequence[str]) -> list[Operation]:
    """Operations by name, all of them for no name.

    Raises:
        InputError: a name is unknown.
    """
    known = operations()
    for name in names:
        if name not in known:
            raise InputError(f"operations={name!r} is unknown{near_names(name, known)}")
    return [known[name] for name in names or known]


def implementations(operation: Operation, device: torch.device) -> dict[str, Call]:
    """What can be called here, the torch reference left out."""
    found: dict[str, Call] = {}
    if can_run("triton", device):
        found[TRITON] = partial(operation.function, impl="triton")
    if operation.naive is not None:
        found[NAIVE] = operation.naive
    return found


def faults(operation: Operation, device: torch.device, tokens: Sequence[int]) -> list[str]:
    """What tells the implementations of an operation apart from its reference: all cases, at every N of `tokens`."""
    found = []
    for case in operation.cases:
        for n in tokens:
            for dtype in (torch.float32, torch.bfloat16):
                inputs = changed(made(case, n, dtype, batch=2 if n < 100 else 1), lambda x: x.to(device))
                for name, call in implementations(operation, device).items():
                    if name == NAIVE and dtype != torch.float32:
                        continue  # of the precision of the dtype where the reference is of float32
                    said, _ = _said(disagreement, operation, case, inputs, call, gradients=name != NAIVE)
                    if said:
                        found.append(f"{name}, case {case.name}, N={n}, {str(dtype).removeprefix('torch.')}: {said}")
    return found


def _said(check: Callable[..., str | None], *arguments: Any, **settings: Any) -> tuple[str, bool]:
    """(what a check said, "" for nothing; whether it raised instead)."""
    try:
        return check(*arguments, **settings) or "", False
    except Exception as error:
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}", True


@torch.no_grad()
def _time(
    operation: Operation,
    device: torch.device,
    dtype: torch.dtype,
    limits: Limits,
    rates: dict[str, float],
    progress: Callable[[str], None],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """(rows, shapes left out, faults at the timed sizes)."""
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    wrong: list[str] = []
    shapes = [
        (case, size, n) for case in operation.cases for size in list(case.real)[: limits.sizes] for n in limits.tokens
    ]
    for case, size, n in shapes:
        where = {"operation": operation.name, "case": case.name, "size": size, "n": n}
        smaller = [row for row in rows if row["case"] == case.name and row["size"] == size]
        flops = max((row["flops"] * (n / row["n"]) ** 2 for row in smaller[-1:]), default=0.0)
        if flops > limits.flops:
            left_out.append(where | {"reason": f"up to {flops:.2g} FLOPs for one call, more than {limits.flops:.2g}"})
            continue
        progress(f"{operation.name}: {case.name}, {size}, N={n}")
        inputs = changed(made(case, n, dtype, size=size), lambda x: x.to(device))
        calls, missing = _calls(operation, device, limits, n, smaller)
        for name in [name for name in calls if name != EAGER]:
            said, raised = _said(
                disagreement, operation, case, inputs, calls[name], gradients=False, near_ties=NEAR_TIES
            )
            if raised and name != TRITON:  # the compiler or the memory gave up, which is no fault of ours
                missing[name] = said
                del calls[name]
            elif said:
                wrong.append(f"{name}, case {case.name}, {size}, N={n}: {said}")
        if not wrong:
            rows.append({**where, **_row(operation, inputs, calls, device, limits.rounds, rates), "missing": missing})
    return rows, left_out, wrong


def _calls(
    operation: Operation, device: torch.device, limits: Limits, n: int, smaller: Sequence[dict[str, Any]]
) -> tuple[dict[str, Call], dict[str, str]]:
    """(what is timed at N, why what is not is not); `smaller` are the rows of the same shape at other N."""
    eager: Call = partial(operation.function, impl="torch")
    calls: dict[str, Call] = {EAGER: eager, **implementations(operation, device)}
    missing: dict[str, str] = {}
    if TRITON in calls and device.type != "cuda":
        del calls[TRITON]
        missing[TRITON] = "interpreted here, which says nothing about speed"
    known = next((row for row in smaller if NAIVE in row["peak_mib"]), None)
    if NAIVE in calls and known is not None:
        needed = known["peak_mib"][NAIVE] * 2**20 * (n / known["n"]) ** 2
        if needed > limits.naive_bytes:
            missing[NAIVE] = f"would need up to {needed / 2**30:.1f} GiB"
            del calls[NAIVE]
    if n <= limits.compiled_tokens:
        torch._dynamo.reset()
        calls[COMPILED] = torch.compile(eager, dynamic=False)
    else:
        missing[COMPILED] = f"its loops over tiles are unrolled; compiled up to N={limits.compiled_tokens}"
    return calls, missing


def _row(
    operation: Operation,
    inputs: Inputs,
    calls: dict[str, Call],
    device: torch.device,
    rounds: int,
    rates: dict[str, float],
) -> dict[str, Any]:
    outputs: list[Tensor] = []

    def first() -> None:
        found = calls[EAGER](**inputs)
        outputs.extend([found] if isinstance(found, Tensor) else found)

    peaks = {EAGER: peak_bytes(first, device)}
    cost = operation.cost(inputs, tuple(outputs))
    outputs.clear()
    for name, call in calls.items():
        # Without an allocator that counts, memory is counted operator by operator, of which compiled code has none.
        if name != EAGER and (name != COMPILED or device.type == "cuda"):
            peaks[name] = peak_bytes(partial(call, **inputs), device)
    variants = {name: _variant(partial(call, **inputs), device) for name, call in calls.items()}
    timings = interleave(variants, rounds, stopwatch=lambda: Stopwatch(device=device))
    seconds = {name: stages["call"] for name, stages in timings.items()}
    medians = {name: Summary.of(values).median for name, values in seconds.items()}
    return {
        "bytes": cost.bytes,
        "flops": cost.flops,
        "latency": cost.bytes < LATENCY_BYTES,
        "milliseconds": {name: Summary.of(values).to_dict(1e3, digits=6) for name, values in seconds.items()},
        "speedup_over_eager": {
            name: Summary.of(paired(seconds[EAGER], values)).to_dict()
            for name, values in seconds.items()
            if name != EAGER
        },
        "copy_share": {name: round(cost.bytes / s / rates["copy_bytes_per_second"], 4) for name, s in medians.items()},
        "matmul_share": {
            name: round(cost.flops / s / rates["matmul_flops_per_second"], 4) for name, s in medians.items()
        },
        "peak_mib": {name: round(peak / 2**20, 3) for name, peak in peaks.items()},
    }


def _variant(call: Callable[[], object], device: torch.device) -> Variant:
    """Runs with a level-2 cache that holds nothing of the inputs (GPU)."""
    flush = torch.empty(LATENCY_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)

    def run(watch: Stopwatch) -> None:
        flush.zero_()
        with watch.stage("call"):
            call()

    return run


def measured_rates(device: torch.device, dtype: torch.dtype, rounds: int = 7) -> dict[str, float]:
    """What this device reaches: bytes per second of a copy (read and written), FLOPs per second of a matrix product."""
    cuda = device.type == "cuda"
    source = torch.ones((512 if cuda else 64) * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    width = 8192 if cuda else 1024
    square = torch.ones(width, width, dtype=dtype, device=device)
    timings = interleave(
        {
            "copy": _variant(lambda: target.copy_(source), device),
            "matmul": _variant(lambda: square @ square, device),
        },
        rounds,
        warmup=2,
        stopwatch=lambda: Stopwatch(device=device),
    )
    copy, product = (Summary.of(timings[name]["call"]).median for name in ("copy", "matmul"))
    return {
        "copy_bytes_per_second": round(2 * source.nbytes / copy),
        "matmul_flops_per_second": round(2 * width**3 / product),
    }


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "not installed"


def speed_table(results: dict[str, Any]) -> Table:
    """A line for every shape, with every implementation's time."""
    kinds = [
        name for name in (EAGER, COMPILED, NAIVE, TRITON) if any(name in r["milliseconds"] for r in results["results"])
    ]
    header = ["operation", "shape", "N", "MiB", "GFLOPs"]
    header += [f"{name} ms" for name in kinds] + ["(q1-q3)", "of copy", "of matmul", *(f"{name} MiB" for name in kinds)]
    rows = []
    for row in results["results"]:
        best = TRITON if TRITON in row["milliseconds"] else EAGER
        ms = row["milliseconds"]
        rows.append(
            [
                row["operation"],
                f"{row['case']}, {row['size']}",
                str(row["n"]),
                f"{row['bytes'] / 2**20:.1f}",
                f"{row['flops'] / 1e9:.2f}",
                *(f"{ms[name]['median']:.2f}" if name in ms else "" for name in kinds),
                f"{ms[best]['q1']:.2f}-{ms[best]['q3']:.2f}",
                "latency" if row["latency"] and best == TRITON else f"{row['copy_share'][best]:.2f}",
                f"{row['matmul_share'][best]:.2f}",
                *(f"{row['peak_mib'][name]:.1f}" if name in row["peak_mib"] else "" for name in kinds),
            ]
        )
    return Table(header, rows)


def report(results: dict[str, Any]) -> str:
    """Markdown beside `kernels.json`."""
    where = results["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    rates = results["rates"]
    lines = [
        "# Speed and memory of the scoring operations",
        "",
        f"Measured on {where['device']} ({where['clock']}), {versions}, {results['dtype']}, batch 1. Medians of "
        f"{results['rounds']} interleaved rounds, after every operation agreed with its float32 reference. "
        f"A copy reaches {rates['copy_bytes_per_second'] / 1e9:.1f} GB/s here, a matrix product "
        f"{rates['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s; the shares are of these, for what one call must read, "
        "write and multiply at least (Triton's where it ran, else the eager reference's; the quartiles too). naive is "
        "the straightforward version with the whole N x N matrix. Memory is the peak beyond the inputs.",
        "",
        speed_table(results).markdown(),
        "",
    ]
    if where["clock"].startswith("process"):
        lines += ["No GPU: how fast the Triton kernels are has not been measured.", ""]
    if results["failed"]:
        lines += [
            "## Failed",
            "",
            *(f"- {name}: {said}" for name, all_ in results["failed"].items() for said in all_),
            "",
        ]
    if results["left_out"]:
        lines += ["## Left out", ""]
        lines += [
            f"- {r['operation']}, {r['case']}, {r['size']}, N={r['n']}: {r['reason']}." for r in results["left_out"]
        ]
        lines += [""]
    return "\n".join(lines)
