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
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

DENSE = "dense"
PAD = 0
PICTURES = ("DivPrune", "VisPruner", "FastV", "DART")
"""Methods about visual tokens."""

Run = Callable[..., Any]


class Method(NamedTuple):
    """A method of a library: its name in the task, its settings under mmtoken's names, the share of entries to keep."""

    name: str
    settings: dict[str, Any]
    keep: float


# ------------------------------------------------------------------------------------------------------ the libraries


Batch = dict[str, Tensor]


def through_mmtoken(model: Any, method: Method, batch: Batch) -> AbstractContextManager[Any]:
    """Attach by `compress`; on text alone with the official conventions: the budget is about all tokens of a prompt."""
    compressors = importlib.import_module("mmtoken.compressors")
    text = {} if method.name in PICTURES else {"visual": batch["attention_mask"].bool()}
    settings = method.settings | ({"variant": "repo"} if text else {})
    compressor = getattr(compressors, method.name)(keep=method.keep, **settings)
    session: AbstractContextManager[Any] = importlib.import_module("mmtoken").compress(model, compressor, **text)
    return session


def through_kvpress(model: Any, method: Method, batch: Batch) -> AbstractContextManager[Any]:
    """Attach as kvpress's README says: the press is a context manager around `generate`."""
    del batch  # a press takes none
    names = {"window": "window_size", "kernel": "kernel_size", "future": "n_future_positions", "sinks": "n_sink"}
    press = getattr(importlib.import_module("kvpress"), f"{method.name}Press")
    settings = {names[name]: value for name, value in method.settings.items()}
    attached: AbstractContextManager[Any] = press(compression_ratio=1.0 - method.keep, **settings)(model)
    return attached


@contextmanager
def through_angelslim(model: Any, method: Method, batch: Batch) -> Iterator[None]:
    """Attach as AngelSlim's test script does: a YAML file, an adapter, `wrap_model`; and take off again."""
    del batch  # it takes none
    adapter_module = importlib.import_module("angelslim.compressor.token_compressor.adapter")
    adapter = adapter_module.UniversalPruningAdapter(
        model=model, strategy_config=angelslim_config(method), raw_map_data=ANGELSLIM_PARTS
    )
    adapter.wrap_model()
    try:
        yield
    finally:
        adapter.unwrap_model()


def angelslim_config(method: Method) -> Any:
    """Its own configuration object, from a file in its format; a method in a layer goes by the one before `layer`."""
    yaml = importlib.import_module("yaml")
    base = importlib.import_module("angelslim.compressor.token_compressor.base.config")
    ratio, before = 1.0 - method.keep, method.settings.get("layer", 0) - 1
    strategy, stage, requirements, more = {
        "DivPrune": ("divprune", "global", {"inputs_embeds": True}, {}),
        "VisPruner": (
            "vispruner",
            "global",
            {"vit_q_layers": [-2], "vit_k_layers": [-2], "feature_map": True},
            {"layer_idx": -2, "important_ratio_of_kept": 0.5},
        ),
        "FastV": (
            "special_token_based_attention",
            before,
            {"llm_q_layers": [before], "llm_k_layers": [before]},
            {"layer_idx": before, "query_source": {"strategy": "last_text"}},
        ),
        "DART": (
            "dart",
            before,
            {"feature_map": True, "llm_k_layers": [before]},
            {
                "layer_idx": before,
                "pivot_image_token": method.settings.get("visual_pivots"),
                "pivot_text_token": method.settings.get("text_pivots"),
                "use_post_rope": True,
            },
        ),
    }[method.name]
    strategies = {stage: {"strategy": strategy, "params": {"ratio": ratio, **more}}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "method.yaml"
        path.write_text(yaml.safe_dump({"compressor": {"requirements": requirements, "strategies": strategies}}))
        return base.TokenCompressorConfig.from_yaml(str(path))


ANGELSLIM_PARTS = [
    {"name": name, "path": path, "wrapper_module": ".models.llava", "wrapper_class": f"Prunable_{wrapper}"}
    for name, path, wrapper in (
        ("vl_model", "model", "LlavaModel"),
        ("vision_attn", "model.vision_tower.vision_model.encoder.layers[n].self_attn", "CLIPAttention"),
        ("text_model", "model.language_model", "LlamaModel"),
        ("llm_attn", "model.language_model.layers[n].self_attn", "LlamaAttention"),
    )
]
"""Its `model_mapping` for LLaVA."""


def through_fake(model: Any, method: Method, batch: Batch) -> AbstractContextManager[Any]:
    """Attach nothing, and refuse batches: stands for a library where none is installed."""
    del model, method
    if len(batch["input_ids"]) > 1:
        raise NotImplementedError("one prompt at a time")
    return nullcontext()


LIBRARIES: dict[str, Callable[[Any, Method, Batch], AbstractContextManager[Any]]] = {
    "mmtoken": through_mmtoken,
    "kvpress": through_kvpress,
    "angelslim": through_angelslim,
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
        inputs = load_file(folder / "inputs.safetensors")
        rows = [inputs[f"row{number}"] for number in range(sum(name.startswith("row") for name in inputs))]
        pictures = [inputs[f"pixels{number}"] for number in range(len(rows))] if "pixels0" in inputs else []
        loader = AutoModelForImageTextToText if pictures else AutoModelForCausalLM
        # A pair, which its annotation does not say.
        loaded: Any = loader.from_pretrained(folder / "model", dtype=torch.float32, output_loading_info=True)
        model, told = loaded
        if told["missing_keys"]:
            raise ValueError(f"weights that this version of transformers does not find: {told['missing_keys']}")
        self.model = model.eval()
        shortest = min(map(len, rows))
        self.batches = {
            f"row {number}": padded([row], pictures[number : number + 1]) for number, row in enumerate(rows)
        } | {
            "even": padded([row[:shortest] for row in rows], pictures),
            "padded": padded(rows, pictures),
        }
        self.methods = [Method(name, settings, self.task["keep"]) for name, settings in self.task["methods"].items()]

    def attached(self, method: Method | None, batch: dict[str, Tensor]) -> AbstractContextManager[Any]:
        """The library on the model for one call; nothing for the dense model."""
        if method is None:
            return nullcontext()
        return LIBRARIES[self.library](self.model, method, batch)

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
        """Tokens int[B, T], their logits float[B, T, V], and where the kept entries stood, int[layers, G, K].

        The entries are those of every layer, or of the first that has less than all of them where pictures are: what
        enters this one is what enters it without the library, and so are the keys.
        """
        batch, length = self.batches[name], self.batches[name]["input_ids"].shape[1]
        tokens = self.task["new_tokens"]
        out = self.generate(method, batch, tokens)
        found = {"tokens": out.sequences[:, length:].contiguous(), "logits": torch.stack(out.logits, 1)}
        if len(batch["input_ids"]) == 1:
            dense = cache_of(self.generate(None, batch, 1))
            kept = [layer.keys[0, :, : layer.keys.shape[2] - tokens + 1] for layer in cache_of(out).layers]
            pairs = list(zip(kept, (layer.keys[0] for layer in dense.layers), strict=True))
            if "pixel_values" in batch:
                pairs = [next((pair for pair in pairs if pair[0].shape != pair[1].shape), pairs[0])]
            found["kept"] = torch.stack([places(mine, whole) for mine, whole in pairs])
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
        window = method.settings.get("window", 0)
        plainly: dict[str, tuple[Method, Batch, dict[str, Any]]] = {
            "one prompt": (method, row, {}),
            "keep nothing": (method._replace(keep=0.0), row, {}),
            "a prompt shorter than the window": (method, {key: cut[:, : window // 2] for key, cut in row.items()}, {}),
            "a prompt without a picture": (method, padded([row["input_ids"][0, -window - 8 :]]), {}),
            "two pictures in a prompt": (method, twice(row), {}),
            "beam search": (method, row, {"num_beams": 2}),
        }
        if name in plainly:
            changed, batch, options = plainly[name]
            self.generate(changed, batch, tokens, **options)
            return "runs"
        options = {
            "static cache": {"cache_implementation": "static"},
            "prompt lookup decoding": {
                "prompt_lookup_num_tokens": 3,
                "eos_token_id": self.model.config.get_text_config().vocab_size,
            },
            "prefill in chunks": {"prefill_chunk_size": 2 * window},
        }[name]
        plain = self.generate(method, row, tokens)
        other = self.generate(method, row, tokens, **options)
        same = torch.equal(plain.sequences, other.sequences)
        return "runs, same tokens as without" if same else "runs, other tokens than without"


def padded(rows: list[Tensor], pictures: list[Tensor] | None = None) -> Batch:
    """A batch of prompts int[n], padded on the left, and their pictures float[3, S, S]."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), PAD)
    for number, row in enumerate(rows):
        ids[number, length - len(row) :] = row
    mask = torch.stack([torch.arange(length) >= length - len(row) for row in rows]).long()
    batch = {"input_ids": ids, "attention_mask": mask}
    return batch | {"pixel_values": torch.stack(pictures)} if pictures else batch


def twice(row: Batch) -> Batch:
    """One prompt, said two times in one."""
    return {key: value.repeat(2, *[1] * 3) if value.ndim == 4 else value.repeat(1, 2) for key, value in row.items()}


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
