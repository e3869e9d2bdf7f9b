"""Time of a control step on an OpenVLA-shaped random model, dense and pruned, beside the operations papers print.

    python -m mmtoken.evaluation.closed_loop_latency --out benchmarks/control.json

The decoder has OpenVLA's widths (Llama-2-7B) and 291 prompt tokens, 256 of them visual; seven action tokens follow. All
its layers have the same weights in memory, which do not fit into any cache of a CPU, so that depth costs time and no
memory. The towers are tiny: real ones would take the same time with every method. Methods that look back get the
attention of an earlier step, as they would have after their warm-up. Nothing here says anything about success.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from mmtoken.compressors import DivPrune, FastV, Random, VLAPruner
from mmtoken.compressors.base import Compressor
from mmtoken.engine.compat import CACHE, cache_in
from mmtoken.engine.flops import DecoderShape, multiply_adds
from mmtoken.engine.recorder import EpisodeState
from mmtoken.engine.report import Report
from mmtoken.engine.session import Session, compress
from mmtoken.errors import MMTokenError
from mmtoken.evaluation.tables import Table
from mmtoken.evaluation.timing import (
    MIN_ROUNDS,
    Stopwatch,
    Summary,
    Timings,
    environment,
    interleave,
    one_thread,
    paired,
)
from mmtoken.models.openvla import OpenVLAConfig, OpenVLAForActionPrediction
from mmtoken.wholefile import check_target, whole_file

SCHEMA_VERSION = 1

DENSE = "dense"
KEEPS = (0.5, 0.25, 0.125)
LAYER = 3
"""First layer that sees kept tokens only, of methods that cut inside the decoder."""

PUBLISHED = {1.0: 1.906, 0.5: 1.139, 0.25: 0.758, 0.125: 0.571}
"""Tera-multiply-adds of VLA-Pruner on OpenVLA by the share kept (arXiv 2511.16449), for 32 layers."""

FULL_DEPTH = 32

REMEMBERED = 3
"""Earlier steps that a method may look back on."""


@dataclass(frozen=True)
class ArmShape:
    """Sizes of the random model.

    Attributes:
        layers, hidden, intermediate, heads: of the decoder.
        vocabulary: rows of embedding and head.
        prompt: tokens of the prompt, 256 visual ones among them.
        actions: tokens of an action.
    """

    layers: int = FULL_DEPTH
    hidden: int = 4096
    intermediate: int = 11008
    heads: int = 32
    vocabulary: int = 32064
    prompt: int = 291
    actions: int = 7


@dataclass(frozen=True)
class Step:
    """One control step: the model, input_ids int[1, L], pixel_values float[1, 6, 224, 224], and what it remembers."""

    model: OpenVLAForActionPrediction
    input_ids: Tensor
    pixel_values: Tensor
    remembered: Tensor
    actions: int


def build(shape: ArmShape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Step:
    """A random model of that shape; no global generator is touched."""
    text = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=1,
        num_attention_heads=shape.heads,
        vocab_size=shape.vocabulary,
        pad_token_id=shape.vocabulary - 64,
        eos_token_id=None,
    )
    tower = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    config = OpenVLAConfig(text_config=text, timm_model_args=[tower, tower], pad_token_id=shape.vocabulary - 64)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = OpenVLAForActionPrediction(config).train(False).to(device, dtype)
        pixels = torch.randn(1, 6, 224, 224).to(device, dtype)
        words = torch.randint(10, shape.vocabulary - 400, (1, shape.prompt - model.vision_backbone.patches))
        remembered = torch.rand(1, model.vision_backbone.patches).to(device)
    _deepen(model, shape.layers)
    ids, _, _ = model.with_placeholders(words.to(device))
    return Step(model, ids, pixels, remembered, shape.actions)


def _deepen(model: OpenVLAForActionPrediction, layers: int) -> None:
    """Give the decoder so many layers, all with the weights of its first."""
    decoder: Any = model.language_model.model
    first: Any = decoder.layers[0]
    for number in range(1, layers):
        with torch.device("meta"):
            layer: Any = type(first)(decoder.config, layer_idx=number)
        for name, parameter in first.named_parameters():
            owner, _, last = name.rpartition(".")
            setattr(layer.get_submodule(owner), last, parameter)
        decoder.layers.append(layer.train(False))
    decoder.config.num_hidden_layers = layers


@torch.no_grad()
def act(step: Step, compressor: Compressor | None, watch: Stopwatch) -> Report | None:
    """Attach, look, answer with an action and detach, under the stopwatch.

    Returns:
        What was measured; None when dense.
    """
    model: Any = step.model
    with watch.stage("attach"):
        session: Session | None = None if compressor is None else compress(model, compressor)
    memory = EpisodeState([step.remembered] * REMEMBERED)
    with nullcontext() if session is None else session.resuming(memory):
        with watch.stage("prefill"):
            output = model(input_ids=step.input_ids, pixel_values=step.pixel_values, use_cache=True, logits_to_keep=1)
        cache, token = cache_in(output), output.logits[:, -1:].argmax(-1)
        with watch.stage("decode"):
            for _ in range(step.actions - 1):
                output = model(input_ids=token, use_cache=True, **{CACHE: cache})
                token = output.logits[:, -1:].argmax(-1)
    if session is None:
        return None
    watch.add("scoring", session.report.scoring_seconds)
    report = session.report
    with watch.stage("attach"):
        session.detach()
    return report


def variants() -> dict[str, Compressor | None]:
    """Dense, then four methods at three budgets."""
    found: dict[str, Compressor | None] = {DENSE: None}
    for keep in KEEPS:
        found[f"VLA-Pruner {keep:g}"] = VLAPruner(keep=keep, layer=LAYER)
        found[f"FastV {keep:g}"] = FastV(keep=keep, layer=LAYER)
        found[f"DivPrune {keep:g}"] = DivPrune(keep=keep)
        found[f"Random {keep:g}"] = Random(keep=keep)
    return found


def measure(
    shape: ArmShape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    rounds: int = MIN_ROUNDS,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time all of `variants` in interleaved rounds.

    Args:
        shape: of the model.
        device, dtype: where and in what.
        rounds: measured rounds, after one that is thrown away.
        progress: told about every round.

    Returns:
        JSON-ready results.
    """
    load, plans = [_load()], variants()

    def variant(compressor: Compressor | None) -> Callable[[Stopwatch], object]:
        def go(watch: Stopwatch) -> None:
            report = act(step, compressor, watch)
            if report is None:
                watch.add("scoring", 0.0)
            reports[compressor] = report

        return go

    with one_thread(device):
        step = build(shape, device, dtype)
        reports: dict[Compressor | None, Report | None] = {}
        timings = interleave(
            {name: variant(compressor) for name, compressor in plans.items()},
            rounds,
            stopwatch=lambda: Stopwatch(device=device),
            progress=lambda line: progress(f"control: {line}"),
        )
    load.append(_load())
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "control",
        "weights": "random, OpenVLA-shaped, the same in all layers; says nothing about success",
        "environment": environment(device),
        "load_average": load,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": asdict(shape),
        "cut_before_layer": LAYER,
        "rounds": rounds,
        "results": [_row(name, plans[name], shape, step, timings, reports[plans[name]]) for name in plans],
    }


def _row(
    name: str, compressor: Compressor | None, shape: ArmShape, step: Step, timings: Timings, report: Report | None
) -> dict[str, Any]:
    mine, dense = timings[name], timings[DENSE]
    lengths = [[shape.prompt]] * shape.layers if report is None else report.layer_lengths
    deep = lengths + [lengths[-1]] * (FULL_DEPTH - shape.layers)
    counted = DecoderShape.from_config(step.model.language_model.config)
    keep = 1.0 if compressor is None else float(compressor.keep)
    whole, whole_dense = (
        [p + d for p, d in zip(stages["prefill"], stages["decode"], strict=True)] for stages in (mine, dense)
    )
    ours = compressor is None or isinstance(compressor, VLAPruner)
    return {
        "name": name,
        "compressor": None if compressor is None else compressor.to_dict(),
        "keep": keep,
        "tokens_left": step.remembered.shape[1] if report is None else report.tokens_out[0],
        "milliseconds": {
            **{stage: Summary.of(mine[stage]).to_dict(1e3) for stage in mine},
            "step": Summary.of(whole).to_dict(1e3),
        },
        "speedup": {
            "prefill": Summary.of(paired(dense["prefill"], mine["prefill"])).to_dict(),
            "step": Summary.of(paired(whole_dense, whole)).to_dict(),
        },
        "tera_multiply_adds": round(multiply_adds(counted, lengths) / 1e12, 5),
        "tera_multiply_adds_of_32_layers": round(multiply_adds(counted, deep) / 1e12, 5),
        "published": PUBLISHED[keep] if ours else None,
    }


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def control_table(results: dict[str, Any]) -> Table:
    """Times and operations of every variant."""
    rows = []
    dense = results["results"][0]
    for row in results["results"]:
        ms, gain = row["milliseconds"], row["speedup"]
        rows.append(
            (
                row["name"],
                str(row["tokens_left"]),
                f"{ms['prefill']['median']:.0f} ({ms['prefill']['q1']:.0f}-{ms['prefill']['q3']:.0f})",
                f"{ms['scoring']['median']:.1f}",
                f"{ms['decode']['median']:.0f}",
                f"{ms['step']['median']:.0f} ({ms['step']['q1']:.0f}-{ms['step']['q3']:.0f})",
                f"{gain['prefill']['median']:.2f}",
                f"{gain['step']['median']:.2f} ({gain['step']['q1']:.2f}-{gain['step']['q3']:.2f})",
                f"{dense['tera_multiply_adds'] / row['tera_multiply_adds']:.2f}",
                f"{row['tera_multiply_adds_of_32_layers']:.3f}",
                "" if row["published"] is None else f"{row['published']:.3f}",
            )
        )
    return Table(
        (
            "random weights", "tokens", "prefill ms (q1-q3)", "of it scoring", "decode ms", "step ms (q1-q3)",
            "prefill speed-up", "step speed-up (q1-q3)", "of operations", "TFLOPs of 32 layers", "published",
        ),
        rows,
    )  # fmt: skip


def control_report(results: dict[str, Any]) -> str:
    """The Markdown that is read beside the JSON."""
    shape, where = results["shape"], results["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    return (
        "# A control step of an OpenVLA-shaped model\n\n"
        f"Random weights, the same in all {shape['layers']} layers (width {shape['hidden']}, MLP "
        f"{shape['intermediate']}, {shape['heads']} heads, {results['dtype']}); {shape['prompt']} prompt tokens, 256 "
        f"of them visual, {shape['actions']} action tokens; tiny towers, whose real ones would take the same time with "
        f"every method. VLA-Pruner and FastV cut before layer {results['cut_before_layer']}, the others before the "
        f"decoder. Measured on {where['device']} ({where['clock']}), {versions}, Python {where['python']}; load "
        f"average {' to '.join(map(str, results['load_average']))}. Medians of {results['rounds']} interleaved rounds; "
        "speed-ups are ratios taken within a round, scoring included. `of operations` is the speed-up that counted "
        "multiply-adds of the prefill promise at this depth. TFLOPs are tera-multiply-adds of a 32-layer prefill, as "
        "arXiv 2511.16449 counts them; `published` is what it prints. Nothing here says anything about success.\n\n"
        f"{control_table(results).markdown()}\n"
    )


def main(argv: Sequence[str]) -> int:
    """Measure and write the JSON and, beside it, the Markdown; 0 on success.

    Raises:
        MMTokenError: an argument cannot be used.
    """
    parser = argparse.ArgumentParser("python -m mmtoken.evaluation.closed_loop_latency", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("control.json"), help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=FULL_DEPTH, help="of the decoder; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS, help="default: %(default)s")
    options = parser.parse_args(argv)
    try:
        device = torch.device(options.device)
    except RuntimeError as error:
        raise MMTokenError(f"device={options.device!r} is unknown; give cpu, cuda or cuda:1.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise MMTokenError(f"device={options.device!r}, but torch finds no GPU; give cpu.")
    if not LAYER < options.layers <= FULL_DEPTH:
        raise MMTokenError(f"layers={options.layers}; give {LAYER + 1} to {FULL_DEPTH}, the cut is before {LAYER}.")
    target = check_target(options.out, "out", ".json")
    results = measure(
        ArmShape(layers=options.layers),
        device,
        torch.bfloat16,
        rounds=options.rounds,
        progress=lambda line: print(line, file=sys.stderr, flush=True),  # noqa: T201
    )
    for path, text in (
        (target, json.dumps(results, indent=1) + "\n"),
        (target.with_suffix(".md"), control_report(results)),
    ):
        with whole_file(path) as temporary:
            temporary.write_text(text)
    sys.stdout.write(f"{control_table(results).text()}\n\nwrote {target} and {target.with_suffix('.md')}\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except MMTokenError as error:
        sys.exit(f"error: {error}")
