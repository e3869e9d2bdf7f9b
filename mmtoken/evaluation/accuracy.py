"""Accuracy of a trained model with every compressor, beside dense, controls and majority baselines.

The runner knows no compressor: it attaches what it is given and calls `model.generate`. Tokens and FLOPs are those that
the engine measured, not those that were asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from mmtoken.engine.flops import DecoderShape, prefill_flops
from mmtoken.engine.session import compress
from mmtoken.errors import MMTokenError
from mmtoken.evaluation.benchmarks import TEST_SEED, Benchmark, Item, exact_match, find
from mmtoken.evaluation.lineup import DENSE, Entrant, supported
from mmtoken.evaluation.metrics import majority, wilson
from mmtoken.evaluation.timing import Stopwatch, Summary, environment, interleave, one_thread, paired

SCHEMA_VERSION = 1

_MEASURED = ("tokens_in", "tokens_out", "layer_average", "flops", "flops_dense", "kv_share", "scoring_ms")

ALL = "all"
"""Key of the accuracy over all questions of a benchmark, beside the question types."""


@dataclass(frozen=True)
class Batch:
    """Questions that are answered together.

    Attributes:
        index: their places in the list of items.
        inputs: what the processor made of them, prompts padded on the left.
        max_new_tokens: longest answer.
    """

    index: list[int]
    inputs: dict[str, Tensor]
    max_new_tokens: int


@dataclass(frozen=True)
class Prepared:
    """A benchmark's items with the batches that hold them, made once and used for every compressor."""

    benchmark: Benchmark
    items: list[Item]
    batches: list[Batch]


def prepare(benchmark: Benchmark, processor: Any, pictures: int, batch_size: int, device: torch.device) -> Prepared:
    """Load `pictures` pictures with all their questions and put them through the processor.

    Questions of a type share batches: their answers have about the same length, so few rows wait for others.
    """
    items = benchmark.load(pictures)
    order = sorted(range(len(items)), key=lambda i: (items[i].type, len(items[i].question), i))
    batches = []
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        texts = [
            processor.apply_chat_template(benchmark.prompt(items[i].question), add_generation_prompt=True)
            for i in index
        ]
        images = [Image.fromarray(items[i].image) for i in index]
        inputs = processor(text=texts, images=images, return_tensors="pt", padding=True, padding_side="left")
        moved = {name: value.to(device) for name, value in inputs.items()}
        batches.append(Batch(index, moved, benchmark.max_new_tokens))
    return Prepared(benchmark, items, batches)


@dataclass(frozen=True)
class Answers:
    """What one entrant did on one benchmark.

    Attributes:
        correct: per item 1 or 0.
        exact: share of answers that equal the expected one as they stand.
        tokens_in, tokens_out, layer_average: visual tokens per picture, means over the questions.
        flops, flops_dense: decoder prefill per question, means.
        kv_share: bytes of the key/value cache after the prefill, of those without compression.
        scoring_ms: wall time in the compressor per question, scores that it read included.
        seconds: CPU seconds (GPU: wall seconds) of the whole pass.
    """

    correct: list[int]
    exact: float
    tokens_in: float
    tokens_out: float
    layer_average: float
    flops: float
    flops_dense: float
    kv_share: float
    scoring_ms: float
    seconds: float


@torch.no_grad()
def answer(model: PreTrainedModel, processor: Any, entrant: Entrant, prepared: Prepared) -> Answers:
    """Ask every question of a benchmark once, greedily."""
    benchmark, items = prepared.benchmark, prepared.items
    correct, exact = [0] * len(items), 0
    sums = dict.fromkeys(_MEASURED, 0.0)
    clock = time.perf_counter if model.device.type == "cuda" else time.process_time
    started = clock()
    attached = compress(model, entrant.compressor) if entrant.compressor is not None else nullcontext()
    with attached as session:
        for batch in prepared.batches:
            output = _generate(model, batch, batch.max_new_tokens)
            start = batch.inputs["input_ids"].shape[1]
            texts = processor.batch_decode(output[:, start:], skip_special_tokens=True)
            for i, text in zip(batch.index, texts, strict=True):
                parsed = benchmark.parse(text)
                correct[i] = benchmark.score(parsed, items[i].answer)
                exact += exact_match(parsed, items[i].answer)
            if session is None:
                measured = _dense_measures(model, batch)
            else:
                report = session.report
                # One picture per question; where crops are items of their own, it is several items.
                questions = len(batch.index)
                measured = {
                    "tokens_in": sum(report.tokens_in) / questions,
                    "tokens_out": sum(report.tokens_out) / questions,
                    "layer_average": report.layer_average * len(report.tokens_in) / questions,
                    "flops": report.flops / len(batch.index),
                    "flops_dense": report.flops_dense / len(batch.index),
                    "kv_share": report.kv_bytes / report.kv_bytes_dense,
                    "scoring_ms": 1e3 * report.scoring_seconds / len(batch.index),
                }
                session.reports.clear()
            for name, value in measured.items():
                sums[name] += value * len(batch.index)
    means = {name: value / len(items) for name, value in sums.items()}
    return Answers(correct=correct, exact=exact / len(items), seconds=clock() - started, **means)


def _generate(model: Any, batch: Batch, new_tokens: int) -> Tensor:
    output: Tensor = model.generate(**batch.inputs, max_new_tokens=new_tokens, do_sample=False)
    return output


def _dense_measures(model: Any, batch: Batch) -> dict[str, float]:
    ids, rows = batch.inputs["input_ids"], len(batch.index)
    visual = float((ids == model.config.image_token_id).sum()) / rows
    shape = DecoderShape.from_config(model.config.get_text_config())
    flops = prefill_flops(shape, [batch.inputs["attention_mask"].sum(-1).tolist()] * shape.layers) / rows
    measured = dict.fromkeys(("tokens_in", "tokens_out", "layer_average"), visual)
    return {**measured, "flops": flops, "flops_dense": flops, "kv_share": 1.0, "scoring_ms": 0.0}


def scores(items: Sequence[Item], correct: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Correct answers, accuracy and its 95 % Wilson interval, per question type and over all (`ALL`)."""
    table: dict[str, dict[str, Any]] = {}
    for kind in (ALL, *sorted({item.type for item in items})):
        marks = [mark for item, mark in zip(items, correct, strict=True) if kind in (ALL, item.type)]
        low, high = wilson(sum(marks), len(marks))
        table[kind] = {
            "correct": sum(marks),
            "total": len(marks),
            "accuracy": round(sum(marks) / len(marks), 4) if marks else 0.0,
            "low": round(low, 4),
            "high": round(high, 4),
        }
    return table


def baselines(items: Sequence[Item]) -> dict[str, float]:
    """Accuracy of the most frequent answer of each type, and of knowing only the type (`ALL`)."""
    answers = {kind: [item.answer for item in items if item.type == kind] for kind in {item.type for item in items}}
    table = {kind: majority(answers[kind]) for kind in sorted(answers)}
    whole = sum(table[kind] * len(answers[kind]) for kind in table) / len(items) if items else 0.0
    return {name: round(value, 4) for name, value in {ALL: whole, **table}.items()}


def evaluate(
    model: PreTrainedModel,
    processor: Any,
    entrants: Sequence[Entrant],
    *,
    name: str,
    benchmarks: Sequence[str] = ("shapes_qa", "photo_digits"),
    pictures: Mapping[str, int] | int = 100,
    batch_size: int = 64,
    rounds: int = 7,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Accuracy, measured tokens and FLOPs of every entrant, and its time on this same model.

    Args:
        model, processor: a trained model.
        entrants: the dense model first.
        name: of the model, for the record.
        benchmarks: names of benchmarks.
        pictures: held-out pictures per benchmark, each with all its questions.
        batch_size: questions per call.
        rounds: interleaved rounds of the timing; 0 leaves it out.
        progress: told about every step.

    Returns:
        JSON-ready results, one entry per entrant.

    Raises:
        MMTokenError: no picture is asked for.
    """
    counts = {key: pictures if isinstance(pictures, int) else pictures[key] for key in benchmarks}
    if min(counts.values(), default=0) < 1:
        raise MMTokenError(f"pictures={min(counts.values(), default=0)}; ask about at least 1 picture.")
    device = model.device
    able, refused = supported(model, entrants)
    with one_thread(device):
        prepared = [prepare(find(key), processor, counts[key], batch_size, device) for key in benchmarks]
        results = []
        for number, entrant in enumerate(able, 1):
            row = _row(model, processor, entrant, prepared)
            marks = ", ".join(f"{key} {row['accuracy'][key][ALL]['accuracy']:.3f}" for key in benchmarks)
            progress(f"accuracy: {number} of {len(able)}: {entrant.key}: {marks}")
            results.append(row)
        if rounds:
            progress("accuracy: timing the same model")
            batch = prepared[0].batches[0]
            for row, times in zip(results, first_token_times(model, able, batch, rounds), strict=True):
                row.update(times)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "accuracy",
        "model": name,
        "weights": "trained",
        "environment": environment(device),
        "split": {
            "seed": TEST_SEED,
            "pictures": counts,
            "questions": {p.benchmark.name: len(p.items) for p in prepared},
        },
        "titles": {p.benchmark.name: p.benchmark.title for p in prepared},
        "batch_size": batch_size,
        "timing": {
            "rounds": rounds,
            "batch": len(prepared[0].batches[0].index),
            "what": "generate() up to the first token, per question, on the trained model",
        },
        "baselines": {p.benchmark.name: baselines(p.items) for p in prepared},
        "results": results,
        "refused": refused,
    }


def _row(model: PreTrainedModel, processor: Any, entrant: Entrant, prepared: Sequence[Prepared]) -> dict[str, Any]:
    answers = {p.benchmark.name: answer(model, processor, entrant, p) for p in prepared}

    def each(field: str, digits: int = 3) -> dict[str, float]:
        return {key: round(getattr(value, field), digits) for key, value in answers.items()}

    return {
        "name": entrant.key,
        "method": entrant.method,
        "title": entrant.title,
        "control": entrant.control,
        "compressor": None if entrant.compressor is None else entrant.compressor.to_dict(),
        "keep": entrant.keep,
        "tokens_in": each("tokens_in"),
        "tokens_out": each("tokens_out"),
        "layer_average": each("layer_average"),
        "flops": each("flops", 0),
        "flops_dense": each("flops_dense", 0),
        "kv_share": each("kv_share"),
        "scoring_ms": each("scoring_ms"),
        "seconds": each("seconds"),
        "exact_match": each("exact"),
        "accuracy": {p.benchmark.name: scores(p.items, answers[p.benchmark.name].correct) for p in prepared},
    }


@torch.no_grad()
def first_token_times(
    model: PreTrainedModel, entrants: Sequence[Entrant], batch: Batch, rounds: int
) -> list[dict[str, Any]]:
    """Time to the first token per question, in ms, interleaved over all entrants; paired speed-up over dense."""

    def variant(entrant: Entrant) -> Callable[[Stopwatch], object]:
        def run(watch: Stopwatch) -> None:
            attached = compress(model, entrant.compressor) if entrant.compressor is not None else nullcontext()
            with attached, watch.stage("first_token"):
                _generate(model, batch, 1)

        return run

    device = model.device
    timings = interleave(
        {entrant.key: variant(entrant) for entrant in entrants}, rounds, stopwatch=lambda: Stopwatch(device=device)
    )
    dense, questions = timings[DENSE]["first_token"], len(batch.index)
    found = []
    for entrant in entrants:
        mine = timings[entrant.key]["first_token"]
        found.append(
            {
                "first_token_ms": Summary.of(mine).to_dict(1e3 / questions),
                "first_token_speedup": Summary.of(paired(dense, mine)).to_dict(),
            }
        )
    return found
