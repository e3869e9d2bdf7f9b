"""What one call of a compressed model measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mmtoken.engine.flops import DecoderShape, prefill_flops
from mmtoken.tokens import VisualTokens

SCHEMA_VERSION = 1


@dataclass
class SiteReport:
    """One call of a compressor at one site.

    Attributes:
        site: name of the site ("llm_input", ...).
        layer: tower block or decoder layer, None where the site has none.
        tokens_in, tokens_out: tokens per item before and after, separators not counted. (Inside a tower the items are
            what attends to itself: tiles, or frames. In a cache: entries per head, of the head that has most.)
        kept: per item, int[K] original indices left, separators not counted (in a cache: left in any head).
        seconds: wall time inside the compressor, scores that it asked for included.
        scores: per item, float[N] the attention that the compressor read for each of `tokens_in`; None if it read none.
        timings: seconds of parts of that which the method measures by itself, by name (a scorer's).
        heads: in a cache, per item and key/value head, int[K] original indices left; None elsewhere.
        multiply_adds, multiply_adds_dense: of a tower block that computes some patches only, and of the plain block;
            None elsewhere.
    """

    site: str
    layer: int | None
    tokens_in: list[int]
    tokens_out: list[int]
    kept: list[Tensor] = field(repr=False)
    seconds: float
    scores: list[Tensor] | None = field(default=None, repr=False)
    heads: list[list[Tensor]] | None = field(default=None, repr=False)
    multiply_adds: int | None = None
    multiply_adds_dense: int | None = None
    timings: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        scores = None if self.scores is None else [item.tolist() for item in self.scores]
        heads = None if self.heads is None else [[left.tolist() for left in item] for item in self.heads]
        return {**vars(self), "kept": [indices.tolist() for indices in self.kept], "scores": scores, "heads": heads}


@dataclass
class Report:
    """Measurements of one prefill (or of one call of a bare tower).

    Attributes:
        compressor: class name of the compressor.
        sites: every compressor call, in order.
        item_rows: prompt row (sample) of each item.
        places: per item, int[N] position in the prompt row of each of its tokens, separators included.
        tokens_in: visual tokens per item before any compression, separators not counted.
        entered: per item, int[K] indices into its `places` that entered the decoder, separators not counted.
        prompt_lengths: tokens of each prompt row before compression, padding not counted.
        layer_lengths: per decoder layer, the tokens of each prompt row that the layer processed.
        kept: per item, int[K] indices into its `places` left after the last cut, separators not counted.
        separators: the same of separators, which stay unless a method takes those of a frame along.
        tokens: the surviving tokens after the last site, detached; None in all but a session's last report.
        kv_bytes, kv_bytes_dense: key/value cache after the prefill, and what it would be without compression.
        listening_seconds: wall time spent on attention rows that layers gave away as they ran.
        scoring_seconds, vision_seconds, prefill_seconds: wall time in compressors and listening, in the encoder, and in
            the decoder's prefill.
        peak_memory_bytes: peak of the device's allocator during the prefill; None on a CPU.
        kernels: which implementation of each operation of `mmtoken.kernels` ran for this prefill, {"attention_rows":
            "torch"}; "torch+triton" where both did; empty where the method needs none.
        notes: remarks for people ("keep=64 is above the 36 tokens of item 0: all were kept").
    """

    compressor: str
    sites: list[SiteReport] = field(default_factory=list)
    item_rows: list[int] = field(default_factory=list)
    places: list[Tensor] = field(default_factory=list, repr=False)
    tokens_in: list[int] = field(default_factory=list)
    entered: list[Tensor] = field(default_factory=list, repr=False)
    prompt_lengths: list[int] = field(default_factory=list)
    layer_lengths: list[list[int]] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list, repr=False)
    separators: list[Tensor] = field(default_factory=list, repr=False)
    tokens: VisualTokens | None = field(default=None, repr=False)
    decoder: DecoderShape | None = field(default=None, repr=False)
    kv_bytes: int = 0
    kv_bytes_dense: int = 0
    listening_seconds: float = 0.0
    vision_seconds: float = 0.0
    prefill_seconds: float = 0.0
    peak_memory_bytes: int | None = None
    kernels: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def calls(self) -> int:
        """How often the compressor was called."""
        return len(self.sites)

    @property
    def scoring_seconds(self) -> float:
        return self.listening_seconds + sum(site.seconds for site in self.sites)

    @property
    def tokens_out(self) -> list[int]:
        """Visual tokens per item after the last cut."""
        return [len(indices) for indices in self.kept]

    @property
    def layer_average(self) -> float:
        """Visual tokens per item that a decoder layer processed, averaged over layers and items."""
        if not self.layer_lengths or not self.tokens_in:
            return 0.0
        dropped = sum(sum(self.prompt_lengths) - sum(lengths) for lengths in self.layer_lengths)
        return (sum(self.tokens_in) - dropped / len(self.layer_lengths)) / len(self.tokens_in)

    @property
    def flops(self) -> float:
        """Floating-point operations of the decoder's prefill at the lengths that its layers processed."""
        return 0.0 if self.decoder is None else prefill_flops(self.decoder, self.layer_lengths)

    @property
    def flops_dense(self) -> float:
        """The same without compression."""
        if self.decoder is None:
            return 0.0
        return prefill_flops(self.decoder, [self.prompt_lengths] * self.decoder.layers)

    @property
    def tower_multiply_adds(self) -> int:
        """Multiply-adds of the tower's blocks, where a method computes only some patches of a frame; 0 elsewhere."""
        return sum(site.multiply_adds or 0 for site in self.sites)

    @property
    def tower_multiply_adds_dense(self) -> int:
        """The same of the plain tower."""
        return sum(site.multiply_adds_dense or 0 for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with a schema version."""
        return {
            "schema_version": SCHEMA_VERSION,
            "compressor": self.compressor,
            "calls": self.calls,
            "sites": [site.to_dict() for site in self.sites],
            "item_rows": self.item_rows,
            "tokens_in": self.tokens_in,
            "entered": [indices.tolist() for indices in self.entered],
            "tokens_out": self.tokens_out,
            "prompt_lengths": self.prompt_lengths,
            "layer_lengths": self.layer_lengths,
            "layer_average": self.layer_average,
            "places": [places.tolist() for places in self.places],
            "kept": [indices.tolist() for indices in self.kept],
            "kv_bytes": self.kv_bytes,
            "kv_bytes_dense": self.kv_bytes_dense,
            "flops": self.flops,
            "flops_dense": self.flops_dense,
            "tower_multiply_adds": self.tower_multiply_adds,
            "tower_multiply_adds_dense": self.tower_multiply_adds_dense,
            "scoring_seconds": self.scoring_seconds,
            "vision_seconds": self.vision_seconds,
            "prefill_seconds": self.prefill_seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "kernels": dict(self.kernels),
            "notes": list(self.notes),
        }
