"""Which compressors, and which keep, meet a latency or memory budget: an estimate from shapes and a short measurement.

What is known: FLOPs and cache bytes of the decoder's prefill, from its shape and from where a class says it acts. What
is measured: how fast this machine runs one layer of that shape. What is left out: the tower, scoring, merging and the
first token's head; `mmtoken bench` measures those.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from mmtoken.compressors.base import Compressor
from mmtoken.engine.flops import DecoderShape, prefill_flops
from mmtoken.errors import InputError, MMTokenError
from mmtoken.evaluation.scaling_law import REFITTED
from mmtoken.tokens import kept_count

_TARGET = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ms|s|x|KiB|MiB|GiB)")
_MEMORY = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

_MOST_FLOPS = 2e10
"""FLOPs of one layer in the calibration: a second or so on one core."""

_REPEATS, _SECONDS = 5, 0.3
"""Runs of one layer: at least so many, and on until so much time is spent."""

BEFORE = frozenset({"prepare", "frames", "vision_layer", "project", "llm_input"})
"""Sites in front of the decoder."""


@dataclass(frozen=True)
class Budget:
    """What a prefill may cost; None: no limit.

    Attributes:
        seconds: the decoder's prefill.
        share: the same as a share of the dense model's.
        cache_bytes: keys and values after the prefill.
    """

    seconds: float | None = None
    share: float | None = None
    cache_bytes: float | None = None

    @classmethod
    def parse(cls, words: Sequence[str]) -> Budget:
        """From targets like "50ms", "0.2s", "0.5x" (of the dense prefill), "64MiB", "2GiB" (of the cache).

        Raises:
            InputError: a word is none of these, or a limit is given twice.
        """
        found: dict[str, float] = {}
        for word in words:
            match = _TARGET.fullmatch(word)
            number = float(match[1]) if match else 0.0
            if match is None or number <= 0:
                raise InputError(
                    f"budget={word!r}: give a positive number with its unit: 50ms or 0.2s (prefill), 0.5x (of the "
                    "dense prefill), 512KiB, 64MiB or 2GiB (cache)."
                )
            unit = match[2]
            if unit == "x" and number > 1:
                raise InputError(f"budget={word!r} is above the dense prefill; give a share of it, up to 1x.")
            name = "share" if unit == "x" else "cache_bytes" if unit in _MEMORY else "seconds"
            if name in found:
                raise InputError(f"budget={' '.join(words)!r} limits the same thing twice; leave {word!r} out.")
            found[name] = number * _MEMORY.get(unit, 1e-3 if unit == "ms" else 1.0)
        if not found:
            raise InputError("budget is empty; give for example 50ms, 0.5x or 64MiB.")
        return cls(**found)


@dataclass(frozen=True)
class Pace:
    """How long a decoder of one shape takes: seconds = overhead + FLOPs * per_flop, over all layers.

    Attributes:
        source: where the numbers come from, for people.
    """

    overhead: float
    per_flop: float
    source: str

    def seconds(self, flops: float) -> float:
        """Estimated seconds of a prefill with so many FLOPs."""
        return self.overhead + self.per_flop * flops

    @classmethod
    def of_dense(cls, seconds: float, flops: float) -> Pace:
        """From the dense model's own prefill: everything grows with the FLOPs."""
        return cls(0.0, seconds / flops, "the dense prefill that was given")


def calibrate(
    shape: DecoderShape, length: int, device: torch.device, *, clock: Callable[[], float] = time.perf_counter
) -> Pace:
    """Time one decoder layer with random weights on this machine, at the dense length and at a quarter of it.

    Wall time, the best of a few runs, all threads; float32 on a CPU, bfloat16 on a GPU. Shapes that would take long are
    measured narrower, and lengths shorter: time per FLOP is taken to be the same.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    narrow = shape
    while _layer_flops(narrow, 64) > _MOST_FLOPS:
        sizes = (narrow.width, narrow.mlp_width, narrow.query_width, narrow.key_width)
        narrow = DecoderShape(narrow.layers, *(max(1, size // 2) for size in sizes))
    most = length
    while most > 8 and _layer_flops(narrow, most) > _MOST_FLOPS:
        most //= 2
    lengths = sorted({max(1, most // 4), most})
    times = [_layer_seconds(narrow, n, device, dtype, clock) for n in lengths]
    flops = [_layer_flops(narrow, n) for n in lengths]
    if len(lengths) == 1:
        per_flop, overhead = times[0] / flops[0], 0.0
    else:
        per_flop = max(0.0, times[1] - times[0]) / (flops[1] - flops[0])
        overhead = max(0.0, times[1] - per_flop * flops[1])
        if not per_flop:  # so small that only the overhead is seen
            overhead = min(times)
    scaled = "" if narrow == shape else f" at 1/{shape.width // narrow.width} of the width"
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    source = f"one layer{scaled} with random weights at {lengths[-1]} tokens on {device.type}{threads}, {dtype}"
    return Pace(overhead * shape.layers, per_flop, source.replace("torch.", ""))


def _layer_flops(shape: DecoderShape, length: int) -> float:
    return prefill_flops(shape, [[length]])


@torch.no_grad()
def _layer_seconds(
    shape: DecoderShape, length: int, device: torch.device, dtype: torch.dtype, clock: Callable[[], float]
) -> float:
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        values = torch.randn(*size, generator=generator, device=device, dtype=dtype)
        return values / math.sqrt(size[-1])

    x = random(length, shape.width)
    first = random(2 * shape.key_width + shape.query_width, shape.width)
    back = random(shape.width, shape.query_width)
    up, down = random(2 * shape.mlp_width, shape.width), random(shape.width, shape.mlp_width)

    def layer() -> None:
        q, k, v = (x @ first.T).split([shape.query_width, shape.key_width, shape.key_width], -1)
        repeat = -(-shape.query_width // shape.key_width)
        k, v = (part.repeat(1, repeat)[:, : shape.query_width] for part in (k, v))
        mixed = scaled_dot_product_attention(q[None, None], k[None, None], v[None, None], is_causal=True)[0, 0]
        gate, value = (mixed @ back.T @ up.T).chunk(2, -1)
        (silu(gate) * value @ down.T).sum().item()  # waits for a GPU

    layer()
    times: list[float] = []
    while len(times) < _REPEATS or (sum(times) < _SECONDS and len(times) < 100):
        started = clock()
        layer()
        times.append(clock() - started)
    return min(times)


def layer_lengths(method: Compressor, depth: int, visual: int) -> tuple[list[int], list[int], bool]:
    """Visual tokens that each decoder layer computes, those its cache holds afterwards, and whether some are guesses.

    From what the class declares: methods in front of the decoder leave `keep` everywhere; those inside leave all of
    them up to their first cut. Between several cuts the stages are taken as geometric, which is a guess.
    """
    kept = kept_count(method.keep, visual)
    cuts = method.cut_layers(depth) if "llm_layer" in method.sites else ()
    start = kept if method.sites & BEFORE and not cuts else visual
    computed, passed = [], 0
    for layer in range(depth):
        passed = sum(cut <= layer for cut in cuts)
        computed.append(round(start * (kept / visual) ** (passed / len(cuts))) if cuts else start)
    held = [min(kept, length) for length in computed] if "cache" in method.sites else computed
    return computed, held, len(cuts) > 1 or bool(cuts and method.sites & BEFORE)


@dataclass(frozen=True)
class Setting:
    """What the decoder's shape says about one number of visual tokens.

    Attributes:
        shape: the decoder's sizes.
        visual, text: tokens of the dense prompt.
        item_bytes: bytes of a number in the cache.
        billions: parameters of the decoder.
    """

    shape: DecoderShape
    visual: int
    text: int
    item_bytes: int
    billions: float

    def flops(self, computed: Sequence[int]) -> float:
        return prefill_flops(self.shape, [[length + self.text] for length in computed])

    def cache_bytes(self, held: Sequence[int]) -> float:
        return float(sum(2 * self.shape.key_width * self.item_bytes * (length + self.text) for length in held))


def estimate(method: Compressor | None, setting: Setting, pace: Pace) -> dict[str, Any]:
    """What a compressor (None: the dense model) should cost, JSON-ready."""
    depth, visual = setting.shape.layers, setting.visual
    dense = [visual] * depth
    computed, held, guessed = (dense, dense, False) if method is None else layer_lengths(method, depth, visual)
    average = sum(computed) / depth
    return {
        "keep": visual if method is None else kept_count(method.keep, visual),
        "layer_average": round(average, 1),
        "flops": setting.flops(computed),
        "prefill_ms": 1e3 * pace.seconds(setting.flops(computed)),
        "cache_bytes": setting.cache_bytes(held),
        "relative_error": round(REFITTED.relative_error(setting.billions, max(1.0, average), visual), 4),
        "guessed_stages": guessed,
    }


def fits(found: dict[str, Any], dense: dict[str, Any], budget: Budget) -> bool:
    """Whether an estimate is within the budget."""
    limits = [math.inf if budget.seconds is None else 1e3 * budget.seconds]
    if budget.share is not None:
        limits.append(budget.share * dense["prefill_ms"])
    within = found["prefill_ms"] <= min(limits)
    return within and (budget.cache_bytes is None or found["cache_bytes"] <= budget.cache_bytes)


def largest_keep(
    make: Callable[[int], Compressor], setting: Setting, pace: Pace, budget: Budget
) -> dict[str, Any] | None:
    """The estimate at the most tokens that a compressor may keep within the budget; None if even 1 is too many.

    Args:
        make: the compressor that keeps a number of tokens.

    Raises:
        MMTokenError: the compressor has no such setting.
    """
    dense = estimate(None, setting, pace)
    low, high = 0, setting.visual
    while low < high:
        middle = (low + high + 1) // 2
        if fits(estimate(make(middle), setting, pace), dense, budget):
            low = middle
        else:
            high = middle - 1
    return estimate(make(low), setting, pace) if low else None


def check_counts(visual: int, text: int) -> None:
    """Refuse prompts without visual tokens, or with a negative number of text tokens.

    Raises:
        MMTokenError: one of them is.
    """
    if visual < 1:
        raise MMTokenError(f"visual-tokens={visual}; give at least 1.")
    if text < 0:
        raise MMTokenError(f"text-tokens={text}; give at least 0.")
