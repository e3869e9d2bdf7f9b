"""One side of a comparison: run a model through one library and write down what came out.

A script of its own, `python -P peer_side.py FOLDER`, for interpreters that do not have mmtoken: it needs torch,
transformers, safetensors and the library that is asked for. FOLDER holds the task (task.json, inputs.safetensors and
the model); found.json and found.safetensors are added.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

DENSE = "dense"
PAD = 0

Run = Callable[..., Any]


class Method(NamedTuple):
    """A method of a library: its name in the task, its settings under mmtoken's names, the share of entries to keep."""

    name: str
    settings: dict[str, Any]
    keep: float


# ------------------------------------------------------------------------------------------------------ the libraries


def through_mmtoken(model: Any, method: Method, mask: Tensor) -> AbstractContextManager[Any]:
    """Attach by `compress`, with the official conventions: the budget is about all tokens of a prompt."""
    compressors = importlib.import_module("mmtoken.compressors")
    compressor = getattr(compressors, method.name)(keep=method.keep, variant="repo", **method.settings)
    session: AbstractContextManager[Any] = importlib.import_module("mmtoken").compress(
        model, compressor, visual=mask.bool()
    )
    return session


def through_kvpress(model: Any, method: Method, mask: Tensor) -> AbstractContextManager[Any]:
    """Attach as kvpress's README says: the press is a context manager around `generate`."""
    del mask  # a press takes none
    names = {"window": "window_size", "kernel": "kernel_size", "future": "n_future_positions", "sinks": "n_sink"}
    press = getattr(importlib.import_module("kvpress"), f"{method.name}Press")
    settings = {names[name]: value for name, value in method.settings.items()}
    attached: AbstractContextManager[Any] = press(compression_ratio=1.0 - method.keep, **settings)(model)
    return attached


def through_fake(model: Any, method: Method, mask: Tensor) -> AbstractContextManager[Any]:
    """Attach nothing, and refuse batches: stands for a library where none is installed."""
    del model, method
    if len(mask) > 1:
        raise NotImplementedError("one prompt at a time")
    return nullcontext()


LIBRARIES: dict[str, Callable[[Any, Method, Tensor], AbstractContextManager[Any]]] = {
    "mmtoken": through_mmtoken,
    "kvpress": through_kvpress,
    "fake": through_fake,
}


# -------------------------------------------------------------------------------------------------------- one library


class Side:
    """A model, the inputs, and a library to run them through.

    Args:
        folder: of the task.
    """

    def __init__(self, folder: Path) -> None:
        self.task: dict[str, Any] = json.loads((folder / "task.json").read_text())
        self.library: str = self.task["library"]
        self.model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
        inputs = load_file(folder / "inputs.safetensors")
        rows = [inputs[f"row{number}"] for number in range(len(inputs))]
        shortest = min(map(len, rows))
        self.batches = {f"row {number}": padded([row]) for number, row in enumerate(rows)} | {
            "even": padded([row[:shortest] for row in rows]),
            "padded": padded(rows),
        }
        self.methods = [Method(name, settings, self.task["keep"]) for name, settings in self.task["methods"].items()]

    def attached(self, method: Method | None, batch: dict[str, Tensor]) -> AbstractContextManager[Any]:
        """The library on the model for one call; nothing for the dense model."""
        if method is None:
            return nullcontext()
        return LIBRARIES[self.library](self.model, method, batch["attention_mask"])

    def generate(self, method: Method | None, batch: dict[str, Tensor], tokens: int, **options: Any) -> Any:
        """`model.generate`, greedy, of exactly so many tokens; the output as transformers gives it."""
        with self.attached(method, batch):
            return self.model.generate(
                **batch,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=PAD,
                return_dict_in_generate=True,
                output_logits=True,
                **options,
            )

    # ------------------------------------------------------------------------------------------------------ equality

    def outputs(self, method: Method, name: str) -> dict[str, Tensor]:
        """Tokens int[B, T], their logits float[B, T, V], and where the kept entries stood, int[B, layers, G, K]."""
        batch, length = self.batches[name], self.batches[name]["input_ids"].shape[1]
        tokens = self.task["new_tokens"]
        out = self.generate(method, batch, tokens)
        found = {"tokens": out.sequences[:, length:].contiguous(), "logits": torch.stack(out.logits, 1)}
        if len(batch["input_ids"]) == 1:
            dense = cache_of(self.generate(None, batch, 1))
            found["kept"] = torch.stack(
                [
                    places(layer.keys[0, :, : layer.keys.shape[2] - tokens + 1], whole.keys[0])
                    for layer, whole in zip(cache_of(out).layers, dense.layers, strict=True)
                ]
            )
        return found

    # ---------------------------------------------------------------------------------------------- cost

    def seconds(self, method: Method | None, name: str) -> dict[str, float]:
        """CPU seconds of a prefill with one token, attaching included, and of each further token."""
        more = self.task["timed_tokens"]
        first = cpu_seconds(lambda: self.generate(method, self.batches[name], 1))
        whole = cpu_seconds(lambda: self.generate(method, self.batches[name], 1 + more))
        return {"first_token": first, "each_further_token": (whole - first) / more}

    def bytes(self, method: Method | None, name: str) -> dict[str, int]:
        """Most bytes of tensors alive in two tokens, besides weights and inputs; those of the cache after one."""
        cache = cache_of(self.generate(method, self.batches[name], 1))
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        del cache
        with memory().LivePeak() as counter:
            self.generate(method, self.batches[name], 2)
        return {"peak": counter.peak, "cache": held}

    # ------------------------------------------------------------------------------------------------------- refusals

    def probe(self, name: str) -> str:
        """What happens to the first method in a case that the table of equality does not have."""
        method = self.methods[0]
        row, tokens = self.batches["row 0"], self.task["new_tokens"]
        if name == "one prompt":
            self.generate(method, row, tokens)
            return "runs"
        if name == "keep nothing":
            self.generate(method._replace(keep=0.0), row, tokens)
            return "runs"
        if name == "a prompt shorter than the window":
            short = {key: value[:, : method.settings["window"] // 2] for key, value in row.items()}
            self.generate(method, short, tokens)
            return "runs"
        options = {
            "static cache": {"cache_implementation": "static"},
            "prompt lookup decoding": {"prompt_lookup_num_tokens": 3, "eos_token_id": self.model.config.vocab_size},
            "prefill in chunks": {"prefill_chunk_size": 2 * method.settings["window"]},
        }[name]
        plain = self.generate(method, row, tokens)
        other = self.generate(method, row, tokens, **options)
        same = torch.equal(plain.sequences, other.sequences)
        return "runs, same tokens as without" if same else "runs, other tokens than without"


def padded(rows: list[Tensor]) -> dict[str, Tensor]:
    """A batch of prompts int[n], padded on the left."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), PAD)
    for number, row in enumerate(rows):
        ids[number, length - len(row) :] = row
    mask = torch.stack([torch.arange(length) >= length - len(row) for row in rows]).long()
    return {"input_ids": ids, "attention_mask": mask}


def places(kept: Tensor, dense: Tensor) -> Tensor:
    """int[G, K], ascending: which of the keys float[G, n, d] those in float[G, K, d] are."""
    return torch.cdist(kept, dense).argmin(-1).sort(-1).values


def cache_of(out: Any) -> Any:
    """The cache that `generate` returned; transformers has had two names for it."""
    return out["cache"] if "cache" in out else out["past_key_values"]


def cpu_seconds(run: Callable[[], object]) -> float:
    """Of this process, with the torch threads that are set."""
    started = time.process_time()
    run()
    return time.process_time() - started


def memory() -> Any:
    """The module that counts tensors, from the file beside this one: the interpreter may not have mmtoken."""
    spec = importlib.util.spec_from_file_location("peer_memory", Path(__file__).with_name("memory.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def attempt(run: Callable[[], Any]) -> Any:
    """What `run` returns, or the error it raised, as the library's user would read it."""
    try:
        return run()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


@torch.no_grad()
def main(folder: Path) -> None:
    """Do the task in `folder`."""
    torch.set_num_threads(1)
    side = Side(folder)
    task, everyone = side.task, [None, *side.methods]
    errors: dict[str, dict[str, str]] = {}
    tensors: dict[str, Tensor] = {}
    found: dict[str, Any] = {
        "library": side.library,
        "versions": {name: version(name) for name in ("torch", "transformers", *task["distributions"])},
        "python": ".".join(map(str, sys.version_info[:3])),
    }
    if task["compare"]:
        for method in side.methods:
            for name in side.batches if task["equality"] else ():
                out = attempt(lambda method=method, name=name: side.outputs(method, name))  # type: ignore[misc]
                if "error" in out:
                    errors.setdefault(method.name, {})[name] = out["error"]
                else:
                    tensors |= {f"{method.name}.{name}.{key}": value for key, value in out.items()}
        found["errors"] = errors
        found["probes"] = {name: attempt(lambda name=name: side.probe(name)) for name in task["probes"]}  # type: ignore[misc]
        found["bytes"] = {
            name: {label(one): attempt(lambda one=one, name=name: side.bytes(one, name)) for one in everyone}  # type: ignore[misc]
            for name in task["timed"]
        }
    found["seconds"] = []
    for number in range(-1, task["rounds"]):  # the first one is thrown away
        start = number % len(everyone)
        seconds = {
            name: {
                label(one): attempt(lambda one=one, name=name: side.seconds(one, name))  # type: ignore[misc]
                for one in everyone[start:] + everyone[:start]
            }
            for name in task["timed"]
        }
        if number >= 0:
            found["seconds"].append(seconds)
    save_file(tensors, folder / "found.safetensors")
    (folder / "found.json").write_text(json.dumps(found, indent=1))


def label(method: Method | None) -> str:
    """A method's name in the results."""
    return DENSE if method is None else method.name


if __name__ == "__main__":
    main(Path(sys.argv[1]))
