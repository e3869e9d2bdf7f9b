"""One golden case: numbers made by a method's official code, and a ledger of what a test read and compared.

A case is a `.safetensors` file with a `.json` beside it. `GoldenCase` hands out inputs and weights, compares what the
product gives with what the file expects, and `settle` fails as long as any tensor of the file was neither read nor
compared.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

HOME = Path(__file__).parent
METHODS = (
    "dycoke",
    "fastv",
    "flowcut",
    "kvpress",
    "prumerge",
    "pyramiddrop",
    "quecc",
    "quota",
    "sparsevlm",
    "stc_cacher",
    "stc_pruner",
    "tca",
    "tome",
    "transprune",
    "videoscan",
    "visionzip",
    "vla_pruner",
)
FOLDER = Path(os.environ.get("MMTOKEN_GOLDEN", HOME)).resolve()
"""Where cases are looked for: MMTOKEN_GOLDEN, or the folder of this file."""

EXPECTED = ("expected.", "paper_abs.")
OUTPUTS: dict[str, frozenset[str]] = {
    "quecc": frozenset({"output", "grad_features", "grad_multi_level", "grad_text"}),
    "stc_pruner": frozenset(
        f"chunk[0-9]*_{part}"
        for part in (
            "kept_index",
            "output",
            "channels_rising_variance",
            "frame_score",
            "memory_score",
            "total_score",
        )
    ),
    "stc_cacher": frozenset({"hidden_out", "layer_out", "update_indices", "key_cosine", "is_reference_frame"}),
    "quota": frozenset(
        {
            "sampled_frame_index",
            "sampled_frame_count",
            "emphasised_weight",
            "capped_weight",
            "tokens_uncapped",
            "tokens_capped",
            "linspace_index",
        }
    )
    | {
        f"{assigner}_{part}"
        for assigner in ("bilinear", "adaptive_pool", "linspace", "merge", "merge_rows_cols")
        for part in ("tokens", "shape_per_frame", "frame_id", "sequence_with_newline")
    },
    "tca": frozenset({"output", "kept_index", "stream_final_logits", "stream_reservoir_sizes"}),
    "videoscan": frozenset({"frame[0-9]*_*", "final_query_embeds", "surviving_frames_flag", "cache_source_frames"}),
}
"""Expected values of methods whose files name them without a prefix; patterns as in file names."""

WEIGHTS = "weights."


def find_cases(folder: Path, method: str) -> list[Path]:
    """Cases of a method, without suffix; a case of which one file is missing is found and fails when it is loaded."""
    return sorted(
        {path.with_suffix("") for suffix in ("json", "safetensors") for path in folder.glob(f"{method}/*.{suffix}")}
    )


@dataclass
class GoldenCase:
    """A case and its ledger.

    Attributes:
        description: the JSON file.
        tensors: the safetensors file.
        read: names of the tensors that a test has taken as inputs.
        compared: name to kind of tolerance of those that it has held the product against.
        unused: names of those that it has left out, for a reason.
    """

    description: dict[str, Any]
    tensors: dict[str, Tensor]
    read: set[str] = field(default_factory=set)
    compared: dict[str, str] = field(default_factory=dict)
    unused: set[str] = field(default_factory=set)

    @classmethod
    def load(cls, path: Path) -> GoldenCase:
        """From `path`.json and `path`.safetensors."""
        description, tensors = path.with_suffix(".json"), path.with_suffix(".safetensors")
        for file in (description, tensors):
            assert file.is_file(), f"{file} is missing; MMTOKEN_GOLDEN names the folder that holds the cases"
        return cls(json.loads(description.read_text()), load_file(tensors))

    @property
    def settings(self) -> dict[str, Any]:
        """Hyper-parameters of the method."""
        settings: dict[str, Any] = self.description["hyper_parameters"]
        return settings

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the model's Hugging Face config."""
        config: dict[str, Any] = self.description["hf_config"]
        return config

    def is_expected(self, name: str) -> bool:
        """Whether a tensor is a number to compare with, and no input."""
        patterns = OUTPUTS.get(self.description.get("method", ""), ())
        return name.startswith(EXPECTED) or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    def take(self, name: str) -> Tensor:
        """An input; expected values are not handed out, so that nothing the product does can depend on them."""
        assert not self.is_expected(name), f"{name} is an expected value; compare it"
        self.read.add(name)
        return self.tensors[name]

    def weights(self) -> dict[str, Tensor]:
        """All model weights, under their Hugging Face names."""
        names = [name for name in self.tensors if name.startswith(WEIGHTS)]
        return {name.removeprefix(WEIGHTS): self.take(name) for name in names}

    def expects(self, name: str) -> bool:
        """Whether the file holds such a value."""
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an expected value."""
        return tuple(self.tensors[name].shape)

    def tolerance(self, kind: str, expected: Tensor) -> Tensor:
        """Allowed difference from each number, as the case's JSON states it ("atol 2e-4 rtol 1e-4", or "exact").

        The relative part is capped, so that ten times the absolute tolerance is too much at any size of number; where
        only a relative tolerance is stated ("bf16: rtol 4e-3"), it is all there is.
        """
        stated = self.description["tolerance"]
        if kind:  # several, as text
            if stated[kind].startswith("exact"):
                return torch.zeros_like(expected, dtype=torch.float64)
            stated = dict(re.findall(r"(atol|rtol) ([0-9.e+-]+)", stated[kind]))
        relative = float(stated.get("rtol", 0.0)) * expected.double().abs()
        if "atol" not in stated:
            return relative
        absolute = float(stated["atol"])
        return (absolute + relative).clamp(max=9 * absolute)

    def compare(self, name: str, value: Tensor, kind: str = "") -> None:
        """Hold `value` against an expected tensor: integers exactly, floats within the tolerance called `kind`."""
        expected = self.tensors[name]
        self.compared[name] = kind
        assert tuple(value.shape) == tuple(expected.shape), (
            f"{name}: shape {tuple(value.shape)}, not {tuple(expected.shape)}"
        )
        value = value.detach()
        if not expected.is_floating_point():
            assert not value.is_floating_point(), f"{name}: floats where whole numbers are expected"
            assert torch.equal(value, expected), f"{name}: {value.tolist()}, not {expected.tolist()}"
            return
        excess = (value.double() - expected.double()).abs() - self.tolerance(kind, expected)
        # A NaN on either side is no number at all, and compares as False.
        assert bool((excess <= 0).all()), f"{name}: off by up to {float(excess.max()):.3g} more than tolerated"

    def settle(self, unused: dict[str, str] | None = None) -> None:
        """Fail unless every tensor was read or compared, or is named in `unused` with the reason."""
        left = set(self.tensors) - self.read - set(self.compared)
        reasons = unused or {}
        self.unused = set(reasons)
        assert left == set(reasons), f"neither read nor compared: {sorted(left ^ set(reasons))}"
        assert all(reasons.values()), "every unused tensor needs a reason"
        described = self.description["tensors"].keys()
        described |= {WEIGHTS + name for name in self.description.get("weights", {}).get("shapes", {})}
        assert described == set(self.tensors), f"JSON and file differ: {sorted(described ^ set(self.tensors))}"
