"""Speed and memory on a model-shaped random network: what every stage costs with each compressor, beside dense.

Weights do not change how long a layer takes, so the network is random and can have the shape of a large one. Accuracy
never comes from here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mmtoken.compressors.base import Compressor
from mmtoken.compressors.registry import resolve
from mmtoken.engine.compat import CACHE, cache_in
from mmtoken.engine.flops import DecoderShape, prefill_flops
from mmtoken.engine.report import Report
from mmtoken.engine.session import compress
from mmtoken.errors import MMTokenError
from mmtoken.evaluation.lineup import DENSE, Entrant, supported
from mmtoken.evaluation.memory import peak_bytes
from mmtoken.evaluation.timing import (
    MIN_ROUNDS,
    Stopwatch,
    Summary,
    Timings,
    differences,
    environment,
    interleave,
    one_thread,
    paired,
)
from mmtoken.tokens import kept_count

SCHEMA_VERSION = 1

_IMAGE_TOKEN, _FIRST_WORD = 5, 10


@dataclass(frozen=True)
class SpeedShape:
    """Sizes of the random LLaVA and of its prompt.

    Attributes:
        hidden, layers, heads, intermediate: of the Llama decoder.
        vision_hidden, vision_layers: of the CLIP tower; tiny, so that the decoder's prefill is what is measured.
        image, patch: pixels; N = (image / patch)^2 visual tokens.
        text_tokens: T, all tokens of the prompt that are not visual, half before and half after the image.
        vocabulary: rows of embedding and head.
    """

    hidden: int = 1024
    layers: int = 8
    heads: int = 16
    intermediate: int = 2816
    vision_hidden: int = 64
    vision_layers: int = 2
    image: int = 336
    patch: int = 14
    text_tokens: int = 32
    vocabulary: int = 2000

    @property
    def visual_tokens(self) -> int:
        """N."""
        return (self.image // self.patch) ** 2


SMALL = SpeedShape(hidden=64, heads=4, intermediate=128, image=56, text_tokens=9, vocabulary=64)
"""For the cost of the hooks themselves: a model so small that little else is left (16 + 9 tokens, 8 layers)."""

SHAPES = {
    "default": SpeedShape(),
    "small": SMALL,
    "7b": SpeedShape(
        hidden=4096,
        layers=32,
        heads=32,
        intermediate=11008,
        vision_hidden=1024,
        vision_layers=24,
        image=756,
        vocabulary=32000,
    ),
}
"""What `mmtoken bench --shape` knows; 7b has the decoder of LLaMA-7B and 2916 visual tokens."""


@dataclass(frozen=True)
class Request:
    """A random model and one prompt for it: input_ids int[1, N + T], pixel_values float[1, 3, S, S]."""

    model: LlavaForConditionalGeneration
    input_ids: Tensor
    pixel_values: Tensor


def build(shape: SpeedShape, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> Request:
    """A LLaVA of `shape` with random weights; neither the global generator nor any file is touched.

    Raises:
        MMTokenError: fewer than 2 text tokens, or a patch that does not divide the image.
    """
    if shape.text_tokens < 2 or shape.image % shape.patch:
        raise MMTokenError(
            f"text_tokens={shape.text_tokens}, image={shape.image}, patch={shape.patch}: at least 2 text tokens are "
            "needed, and a patch that divides the image."
        )
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_hidden,
        intermediate_size=2 * shape.vision_hidden,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=4,
        image_size=shape.image,
        patch_size=shape.patch,
    )
    text = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        vocab_size=shape.vocabulary,
        eos_token_id=None,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=_IMAGE_TOKEN, vision_feature_layer=-1
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).eval().to(device, dtype)
        pixels = torch.randn(1, 3, shape.image, shape.image).to(device, dtype)
        words = torch.randint(_FIRST_WORD, shape.vocabulary, (shape.text_tokens,))
    before = shape.text_tokens // 2
    ids = torch.cat([words[:before], torch.full((shape.visual_tokens,), _IMAGE_TOKEN), words[before:]])
    return Request(model, ids[None].to(device), pixels)


@dataclass
class Run:
    """What one run leaves behind besides times: the report (None when dense) and the bytes of the cache."""

    report: Report | None
    kv_bytes: int


@torch.no_grad()
def run_once(
    request: Request, compressor: Compressor | None, watch: Stopwatch, decode_steps: int, prefills: int = 1
) -> Run:
    """Encode, prefill and decode `decode_steps` tokens, each stage under the stopwatch; attaching is not measured.

    The stages are those of `generate`: the encoder first, then the decoder on its output. Where transformers has no
    such entry (before 5.23) the encoder runs inside the prefill and "vision" is 0.

    Args:
        request: model and prompt.
        compressor: attached while everything runs; None for the dense model.
        watch: gets the stages "vision", "prefill", "scoring" (part of the two before it) and "decode".
        decode_steps: tokens decoded after the last prefill.
        prefills: how often encoder and prefill run; their times add up.
    """
    model: Any = request.model
    apart = "mm_encoder_outputs" in inspect.signature(type(model).forward).parameters
    attached = compress(model, compressor) if compressor is not None else nullcontext()
    with attached as session:
        if session is not None and watch.device is None:
            session.clock = watch.clock
        for _ in range(prefills):
            media: dict[str, Any] = {"pixel_values": request.pixel_values}
            with watch.stage("vision"):
                if apart:
                    media = {"mm_encoder_outputs": {"image": model.base_model.get_image_features(**media)}}
            with watch.stage("prefill"):
                output = model(input_ids=request.input_ids, use_cache=True, logits_to_keep=1, **media)
            watch.add("scoring", 0.0 if session is None else session.report.scoring_seconds)
        cache = cache_in(output)
        stored = sum(int(part.nbytes) for layer in cache.layers for part in (layer.keys, layer.values))
        report = None if session is None else session.report
        token = output.logits[:, -1:].argmax(-1)
        with watch.stage("decode"):
            for _ in range(decode_steps):
                output = model(input_ids=token, use_cache=True, **{CACHE: cache})
                token = output.logits[:, -1:].argmax(-1)
    return Run(report, stored)


@torch.no_grad()
def run_short(request: Request, length: int, watch: Stopwatch) -> None:
    """Prefill of the plain model on a prompt of `length` embedded tokens: what no compressor can be faster than."""
    model = request.model
    width = model.config.get_text_config().hidden_size
    embeds = torch.full((1, length, width), 0.02, device=request.input_ids.device, dtype=model.dtype)
    with watch.stage("prefill"):
        model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)


def measure(
    entrants: Sequence[Entrant],
    *,
    shape: SpeedShape | None = None,
    rounds: int = MIN_ROUNDS,
    decode_steps: int = 8,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    thorough: bool = True,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time every entrant in interleaved rounds on one model-shaped random network.

    Args:
        entrants: the dense model first.
        shape: sizes; the default is LLaVA-shaped (hidden 1024, 8 layers, 576 visual + 32 text tokens).
        rounds: measured rounds; 7 or more for a figure to publish.
        decode_steps: tokens decoded after each prefill.
        device, dtype: where and in what.
        thorough: also time plain prompts of the shortened lengths (what no compressor can be faster than) and the cost
            of the hooks.
        progress: told about every step.

    Returns:
        JSON-ready results, one entry per entrant, with device, versions and sizes beside them.
    """
    shape = shape or SpeedShape()
    device = device or torch.device("cpu")
    with one_thread(device):
        request = build(shape, device, dtype)
        able, refused = supported(request.model, entrants)
        lengths = {kept_count(e.keep, shape.visual_tokens) + shape.text_tokens for e in able if thorough}
        timings = interleave(
            {entrant.key: _variant(request, entrant.compressor, decode_steps) for entrant in able}
            | {_short(length): functools.partial(run_short, request, length) for length in sorted(lengths)},
            rounds,
            stopwatch=lambda: Stopwatch(device=device),
            progress=lambda line: progress(f"speed: {line}"),
        )
        results = []
        for entrant in able:
            run, peak = _untimed(request, entrant.compressor, device)
            results.append(_row(entrant, shape, request, timings, run, peak, decode_steps))
        hooks = []
        if thorough:
            progress("speed: cost of the hooks")
            hooks = hook_overhead(rounds=6 * rounds - 1, device=device)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "speed",
        "weights": "random, LLaVA-shaped; says nothing about accuracy",
        "environment": environment(device),
        "dtype": str(dtype).removeprefix("torch."),
        "shape": {**asdict(shape), "visual_tokens": shape.visual_tokens},
        "rounds": rounds,
        "decode_steps": decode_steps,
        "batch": 1,
        "results": results,
        "refused": refused,
        "hook_overhead": hooks,
        "targets": targets(results, hooks),
    }


def _short(length: int) -> str:
    return f"plain prompt of {length} tokens"


def _variant(request: Request, compressor: Compressor | None, steps: int) -> Callable[[Stopwatch], object]:
    return lambda watch: run_once(request, compressor, watch, steps)


def _untimed(request: Request, compressor: Compressor | None, device: torch.device) -> tuple[Run, int]:
    """One more run for what needs no clock: tokens, cache, and peak memory of encoder and prefill."""
    runs: list[Run] = []
    peak = peak_bytes(lambda: runs.append(run_once(request, compressor, Stopwatch(), 0)), device)
    return runs[0], peak


def _row(
    entrant: Entrant, shape: SpeedShape, request: Request, timings: Timings, run: Run, peak: int, steps: int
) -> dict[str, Any]:
    mine, dense = timings[entrant.key], timings[DENSE]
    visual, text, report = shape.visual_tokens, shape.text_tokens, run.report
    decoder = DecoderShape.from_config(request.model.config.get_text_config())
    flops_dense = prefill_flops(decoder, [[visual + text]] * decoder.layers)
    kept = visual if report is None else report.tokens_out[0]
    average = float(visual) if report is None else report.layer_average
    flops = flops_dense if report is None else report.flops
    # What the encoder needs on top of the plain model (reading attention, say) is part of the price of scoring.
    whole = [p + max(0.0, v - d) for p, v, d in zip(mine["prefill"], mine["vision"], dense["vision"], strict=True)]
    speedup = Summary.of(paired(dense["prefill"], whole))
    saved = [d - (w - s) for d, w, s in zip(dense["prefill"], whole, mine["scoring"], strict=True)]
    first = [v + p for v, p in zip(mine["vision"], mine["prefill"], strict=True)]
    first_dense = [v + p for v, p in zip(dense["vision"], dense["prefill"], strict=True)]
    token_ratio, flop_ratio = (visual + text) / (kept + text), flops_dense / flops
    # Only who cuts once, before the decoder, leaves it a prompt of plain length.
    short = timings.get(_short(kept + text)) if average == kept else None
    attainable = Summary.of(paired(dense["prefill"], short["prefill"])) if short else None
    milliseconds = {
        name: Summary.of(mine[stage]).to_dict(1e3 / (steps if stage.startswith("decode") else 1))
        for stage in mine
        for name in [stage.replace("decode", "decode_per_token")]
        if steps or not stage.startswith("decode")
    }
    return {
        "name": entrant.key,
        "method": entrant.method,
        "title": entrant.title,
        "control": entrant.control,
        "compressor": None if entrant.compressor is None else entrant.compressor.to_dict(),
        "keep": entrant.keep,
        "tokens_in": visual,
        "tokens_out": kept,
        "layer_average": round(average, 3),
        "milliseconds": milliseconds,
        "speedup": {
            "prefill_with_scoring": speedup.to_dict(),
            "first_token": Summary.of(paired(first_dense, first)).to_dict(),
            "decode": Summary.of(paired(dense["decode"], mine["decode"])).to_dict() if steps else None,
        },
        "scoring": None if report is None else _scoring(mine["scoring"], whole, saved),
        "token_ratio": round(token_ratio, 4),
        "share_of_token_ratio": round(speedup.median / token_ratio, 4),
        "flop_ratio": round(flop_ratio, 4),
        "share_of_flop_ratio": round(speedup.median / flop_ratio, 4),
        "attainable_speedup": None if attainable is None else attainable.to_dict(),
        "share_of_attainable": None if attainable is None else round(speedup.median / attainable.median, 4),
        "peak_mib": round(peak / 2**20, 3),
        "kv_bytes": run.kv_bytes,
        "flops": flops,
        "flops_dense": flops_dense,
    }


def _scoring(scoring: Sequence[float], whole: Sequence[float], saved: Sequence[float]) -> dict[str, Any]:
    """What scoring costs beside what it saves: the dense prefill less the compressed one without scoring."""
    cost, gain = Summary.of(scoring).median, Summary.of(saved).median
    return {
        "saved_ms": Summary.of(saved).to_dict(1e3),
        "share_of_prefill": round(cost / Summary.of(whole).median, 4),
        "costs_more_than_it_saves": cost > gain,
    }


def hook_overhead(
    *, rounds: int = 41, decode_steps: int = 16, prefills: int = 5, device: torch.device | None = None
) -> list[dict[str, Any]]:
    """What attached hooks cost when everything is kept, on a model small enough to show it.

    Steady state: every run attaches anew, and measures `prefills` calls after that.

    Returns:
        Per compressor the paired differences against the plain model: ms per prefill, with and without the time that
        the method itself took (scoring), and microseconds per decoder layer and decoded token. UniformGrid sets hooks
        at the decoder's input; FastV also on its layers, and reads attention.
    """
    device = device or torch.device("cpu")
    request = build(SMALL, device)
    entrants = [Entrant()] + [Entrant(resolve(name, keep=1.0)) for name in ("uniform_grid", "fastv")]

    def variant(compressor: Compressor | None) -> Callable[[Stopwatch], object]:
        return lambda watch: run_once(request, compressor, watch, decode_steps, prefills)

    with one_thread(device):
        timings = interleave(
            {entrant.key: variant(entrant.compressor) for entrant in entrants},
            rounds,
            warmup=3,
            stopwatch=lambda: Stopwatch(device=device),
        )
    plain = timings[DENSE]
    per_prefill, per_layer = 1e3 / prefills, 1e6 / SMALL.layers / max(decode_steps, 1)
    found = []
    for entrant in entrants[1:]:
        mine = timings[entrant.key]
        hooks = [m - s for m, s in zip(mine["prefill"], mine["scoring"], strict=True)]
        vision = Summary.of(differences(plain["vision"], mine["vision"]))
        found.append(
            {
                "name": entrant.key,
                "layers": SMALL.layers,
                "prefill_ms": Summary.of(differences(plain["prefill"], hooks)).to_dict(per_prefill),
                "with_scoring_ms": Summary.of(differences(plain["prefill"], mine["prefill"])).to_dict(per_prefill),
                "vision_ms": vision.to_dict(per_prefill),
                "decode_us_per_layer_and_token": Summary.of(differences(plain["decode"], mine["decode"])).to_dict(
                    per_layer
                ),
                "plain_prefill_ms": Summary.of(plain["prefill"]).to_dict(per_prefill),
                "plain_decode_us_per_layer_and_token": Summary.of(plain["decode"]).to_dict(per_layer),
            }
        )
    return found


def targets(results: Sequence[dict[str, Any]], hooks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures this project holds itself to, with what was reached.

    Cutting before the decoder should gain at least .85 of the token ratio (N + T) / (K + T), scoring included; FastV,
    whose first layers run at full length, at least .9 of its FLOP ratio (dense FLOPs over its own, attention
    included, as reports count them); hooks cost under 1 ms per prefill, scoring not counted, and 20 microseconds per
    layer and decoded token.
    """
    found: list[dict[str, Any]] = []

    def add(name: str, value: float, wanted: float, met: bool) -> None:
        found.append({"target": name, "value": round(value, 4), "wanted": wanted, "met": met})

    for row in results:
        if row["method"] in ("DivPrune", "UniformGrid", "VisionZip"):
            share = row["share_of_token_ratio"]
            add(f"{row['name']}: prefill speed-up / token ratio", share, 0.85, share >= 0.85)
        if row["method"] == "FastV":
            share = row["share_of_flop_ratio"]
            add(f"{row['name']}: prefill speed-up / FLOP ratio", share, 0.9, share >= 0.9)
    for row in hooks:
        prefill = row["prefill_ms"]["median"]
        add(f"{row['name']}: hooks, ms per prefill", prefill, 1.0, prefill < 1.0)
        decode = row["decode_us_per_layer_and_token"]["median"]
        add(f"{row['name']}: hooks, us per layer and decoded token", decode, 20.0, decode < 20.0)
    return found
