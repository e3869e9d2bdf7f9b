"""What the compressed model must equal, made without any code of the product.

Dropping tokens from decoder layer k on, with positions kept, is the unmodified model in which layers k, k+1, ... cannot
see the keys of these tokens. `masked_keys` builds that model. The other functions run a model in the ways a user does
and return comparable values, and `fingerprint` says whether anything was left on a model.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import cache_utils, masking_utils, modeling_utils
from transformers.configuration_utils import PreTrainedConfig

Inputs = Mapping[str, Any]

CACHE = "cache" if "cache" in inspect.signature(masking_utils.create_causal_mask).parameters else "past_key_values"
"""What this version of transformers calls the cache."""

ENCODES_APART = hasattr(transformers.GenerationMixin, "_expand_multimodal_outputs")
"""Whether this version's `generate` encodes pixels before and apart from the forward."""


# ------------------------------------------------------------------------------------------------- the masked model


def text_model(model: nn.Module) -> nn.Module:
    """The decoder of a VLM or of a bare causal language model: the module that has `.layers`."""
    base = model.base_model
    for name in ("language_model", "text_model"):
        if hasattr(base, name):
            part = getattr(base, name)
            return getattr(part, "model", part)  # OpenVLA holds its decoder together with the head
    return base


@contextmanager
def masked_keys(
    model: nn.Module, keep_per_layer: Mapping[int, Tensor], *, decode_only: bool = False
) -> Iterator[nn.Module]:
    """Hide prompt keys from the attention of some decoder layers of an otherwise unmodified model.

    Args:
        keep_per_layer: layer to `bool[B, L]` over the prompt (or `bool[B, H, L]`, H key/value heads or query heads);
            False hides that token's key. Layers that are not named are left alone. Everything after the prompt
            (generated tokens, a second turn) is visible, and a token always sees itself, so that no row is empty.
        decode_only: hide only from queries after the prompt, as when the cache is cut after prefill.

    Rows may have been repeated by beam search. Dynamic and static caches, no cache, chunked prefill; sdpa and eager.
    """
    layers = text_model(model).layers
    handles = [
        layers[i].register_forward_pre_hook(
            functools.partial(_hide, index=i, keep=keep, decode_only=decode_only), with_kwargs=True
        )
        for i, keep in keep_per_layer.items()
    ]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def keep_in_layers(keep: Tensor, layers: Iterable[int]) -> dict[int, Tensor]:
    """The same `keep` in each of the layers, as `masked_keys` takes it."""
    return dict.fromkeys(layers, keep)


def _hide(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, index: int, keep: Tensor, decode_only: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    hidden = args[0]
    rows, q = hidden.shape[:2]
    cache, mask = kwargs.get(CACHE), kwargs.get("attention_mask")
    past, width = 0, q
    if cache is not None:
        past = int(cache.get_seq_length(index))
        width, offset = cache.get_mask_sizes(q, index)
        if offset:
            raise NotImplementedError("a cache that forgets its oldest tokens has no masked reference")
    query = torch.arange(past, past + q, device=hidden.device)[:, None]
    key = torch.arange(width, device=hidden.device)[None]
    if mask is None:  # every family here is causal; for a bidirectional text model None would mean "sees all"
        allowed = (key <= query)[None, None]
    elif mask.ndim != 4 or mask.shape[-1] != width:
        raise NotImplementedError(f"expected a 4-D mask over {width} keys, got {tuple(mask.shape)}")
    else:
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if rows % keep.shape[0]:
        raise ValueError(f"{rows} rows are no multiple of the {keep.shape[0]} rows of keep")
    prompt = keep.shape[-1]
    visible = keep.to(hidden.device).repeat_interleave(rows // keep.shape[0], 0)
    visible = nn.functional.pad(visible[..., :width], (0, max(0, width - prompt)), value=True)
    attention = layer.self_attn
    if visible.ndim == 3:
        visible = visible.repeat_interleave(attention.config.num_attention_heads // visible.shape[1], 1)[:, :, None]
    else:
        visible = visible[:, None, None]
    exempt = key == query
    if decode_only:
        exempt = exempt | (query < prompt)
    allowed = allowed & (visible | exempt)
    kind = attention.config._attn_implementation
    if kind == "eager":
        additive = torch.zeros(allowed.shape, dtype=hidden.dtype, device=hidden.device)
        allowed = additive.masked_fill(~allowed, torch.finfo(hidden.dtype).min)
    elif kind != "sdpa":
        raise NotImplementedError(f"the masked reference runs under sdpa and eager, not {kind!r}")
    return args, {**kwargs, "attention_mask": allowed}


# --------------------------------------------------------------------------------------------- ways to run a model


class Generated(NamedTuple):
    """`sequences: int[B, L + T]`, `logits: float[B, T, V]`, the returned cache (None without one)."""

    sequences: Tensor
    logits: Tensor
    cache: Any = None


def clone(inputs: Inputs) -> dict[str, Any]:
    """A copy of the batch with its own tensors, so that no run can disturb the next one."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}


def generate_with_logits(model: nn.Module, inputs: Inputs, *, seed: int = 0, **kwargs: Any) -> Generated:
    """`model.generate` with raw logits; greedy and 8 new tokens unless said otherwise.

    With beams, rows of the logits are beams. Sampling is seeded by `seed`, the caller's random state is kept.
    """
    options = {"max_new_tokens": 8, "do_sample": False, **kwargs}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out = model.generate(**clone(inputs), **options, output_logits=True, return_dict_in_generate=True)
    return Generated(out.sequences, torch.stack(out.logits, 1), out.get(CACHE))


@torch.no_grad()
def manual_loop(model: nn.Module, inputs: Inputs, steps: int = 6) -> Generated:
    """Greedy decoding by plain forward calls: the growing 2-D mask, no position ids.

    Qwen-VL needs the mask to stay away in decode steps (it raises on a 2-D mask longer than its input when no
    `position_ids` are given), so for this family an unpadded batch is required and no mask is passed.
    """
    needs_no_mask = model.config.model_type in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
    mask = inputs["attention_mask"]
    if needs_no_mask and not bool(mask.all()):
        raise NotImplementedError("Qwen-VL cannot decode a padded batch by plain forward calls without position ids")
    out = model(**clone(inputs), use_cache=True)
    tokens, logits = [], [out.logits[:, -1]]
    for _ in range(steps):
        tokens.append(logits[-1].argmax(-1, keepdim=True))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
        extra = {} if needs_no_mask else {"attention_mask": mask}
        out = model(input_ids=tokens[-1], use_cache=True, **{CACHE: out[CACHE]}, **extra)
        logits.append(out.logits[:, -1])
    return Generated(torch.cat([inputs["input_ids"], *tokens], 1), torch.stack(logits, 1), out.get(CACHE))


def second_turn(
    model: nn.Module, inputs: Inputs, question: tuple[int, ...] = (104, 105, 106), **kwargs: Any
) -> Generated:
    """Generate, append a question to everything so far, and generate again on the returned cache."""
    first = generate_with_logits(model, inputs, **kwargs)
    rows = len(first.sequences)
    ids = torch.cat([first.sequences, first.sequences.new_tensor(question).expand(rows, -1)], 1)
    grown = ids.shape[1] - inputs["attention_mask"].shape[1]
    mask = inputs["attention_mask"].repeat_interleave(rows // len(inputs["attention_mask"]), 0)
    again = {"input_ids": ids, "attention_mask": nn.functional.pad(mask, (0, grown), value=1)}
    if "mm_token_type_ids" in inputs:
        again["mm_token_type_ids"] = nn.functional.pad(inputs["mm_token_type_ids"], (0, grown))
    return generate_with_logits(model, again, **{CACHE: first.cache}, **kwargs)


def max_error(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; shapes must agree and NaN counts as infinite."""
    if a.shape != b.shape:
        raise AssertionError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    error = (a.float() - b.float()).abs().nan_to_num(nan=float("inf"))
    return float(error.max()) if error.numel() else 0.0


def score_gap(scores: Tensor, k: int) -> Tensor:
    """`float[...]`: how far the k-th best score lies above the next one (infinite if all are kept).

    A selection is only worth comparing where this is larger than the numerical error of the scores.
    """
    n = scores.shape[-1]
    if k >= n or k <= 0:
        return torch.full(scores.shape[:-1], float("inf"), device=scores.device)
    top = scores.float().topk(k + 1, dim=-1).values
    return top[..., k - 1] - top[..., k]


# ------------------------------------------------------------------------------------------------------- training


def labels_for(model: nn.Module, inputs: Inputs) -> Tensor:
    """`int[B, L]`: next-token labels; -100 on padding, visual placeholders and each row's first token.

    The first token is ignored because, with left padding, transformers lets the last padding token predict it.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    ignore = ~mask
    for name in ("image_token_id", "video_token_id"):
        token = getattr(model.config, name, None)
        if token is not None:
            ignore = ignore | (ids == token)
    first = mask.long().argmax(-1, keepdim=True)
    return ids.masked_fill(ignore.scatter(1, first, True), -100)


def right_padded(inputs: Inputs) -> dict[str, Any]:
    """The same batch with its padding moved from the left to the right, as in training."""
    shift = (1 - inputs["attention_mask"]).sum(-1)
    per_token = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
    out = clone(inputs)
    for name in per_token:
        if name in out:
            out[name] = torch.stack([torch.roll(r, -int(s)) for r, s in zip(out[name], shift, strict=True)])
    return out


class Gradients(NamedTuple):
    """The loss and, by parameter name, the gradients that exist."""

    loss: float
    grads: dict[str, Tensor]


def loss_and_grads(model: nn.Module, inputs: Inputs, labels: Tensor, **kwargs: Any) -> Gradients:
    """One forward and backward pass; the model's gradients are cleared before and after."""
    model.zero_grad(set_to_none=True)
    loss = model(**clone(inputs), labels=labels.clone(), **{"use_cache": False, **kwargs}).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Gradients(loss.item(), grads)


def grad_error(a: Gradients, b: Gradients) -> float:
    """Largest difference of a gradient entry over the largest entry of its parameter; both must have the same names.

    Parameters whose gradient is nowhere above a millionth of the largest gradient are compared against that instead:
    the bias of a key projection, for example, has no gradient but rounding.
    """
    if a.grads.keys() != b.grads.keys():
        raise AssertionError(f"different parameters have gradients: {sorted(a.grads.keys() ^ b.grads.keys())}")
    floor = max(float(g.abs().max()) for g in b.grads.values()) * 1e-6
    return max(max_error(g, b.grads[n]) / max(float(b.grads[n].abs().max()), floor) for n, g in a.grads.items())


# -------------------------------------------------------------------------------------------- what is left behind

_HOOK_DICTS = (
    "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
# Bookkeeping beside the hooks themselves.
_HOOK_FLAGS = (
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
    "_is_full_backward_hook",
)  # fmt: skip
# Written by transformers itself during a call: see `test_a_plain_call_leaves_the_fingerprint`.
_WRITTEN_BY_TRANSFORMERS = ("rope_deltas", "_output_capturing_hooks_installed", "_can_record_outputs")


def _owner(hook: Any) -> str:
    while isinstance(hook, functools.partial):
        hook = hook.func
    hook = inspect.unwrap(hook) if callable(hook) else hook
    return getattr(hook, "__module__", None) or type(hook).__module__


def _hooks(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Hooks of one module, without those that transformers installs lazily to record hidden states."""
    for name in _HOOK_DICTS:
        for hook in (getattr(module, name, None) or {}).values():
            if not _owner(hook).startswith("transformers."):
                yield name, hook


def hook_count(model: nn.Module) -> int:
    """Forward, backward, state-dict and load hooks in all modules, not counting those of transformers itself."""
    return sum(1 for module in model.modules() for _ in _hooks(module))


class _Same:
    """Compares by identity and keeps the object alive, so that its id cannot be reused."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{type(self.value).__name__} {getattr(self.value, '__qualname__', '')} at {id(self.value):#x}>"


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything a compressor could leave on a model or in transformers, as a flat mapping from path to value.

    Per module: its hooks, class, attributes (names; values where these are plain or callable), parameters (identity
    and in-place version), `config`. Configurations are read deeply, sub-configurations included, objects by identity.
    Globally: class attributes of the module, cache and cache-layer classes, attention and mask registries.
    """
    out: dict[str, Any] = {}
    classes: set[type] = set()
    for name, module in model.named_modules():
        path = f"module.{name or '.'}"
        out[f"{path}.class"] = _Same(type(module))
        classes.add(type(module))
        out[f"{path}.hooks"] = [(kind, _Same(hook)) for kind, hook in _hooks(module)]
        for key, value in vars(module).items():
            if key in (*_HOOK_DICTS, *_HOOK_FLAGS, *_WRITTEN_BY_TRANSFORMERS):
                continue
            if key in ("_parameters", "_buffers", "_modules"):
                for child, held in value.items():
                    out[f"{path}.{key}.{child}"] = _Same(held)
                    if key == "_parameters" and held is not None:
                        out[f"{path}.{key}.{child}.version"] = held._version
            elif isinstance(value, PreTrainedConfig):
                out[f"{path}.{key}"] = _Same(value)
                _config(f"{path}.{key}", value, out)
            elif callable(value) and not isinstance(value, Tensor):
                out[f"{path}.{key}"] = _bound(value)
            elif isinstance(value, bool | int | float | str | type(None)):
                out[f"{path}.{key}"] = value
            else:
                out[f"{path}.{key}"] = "present"
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        out["generation_config"] = _Same(generation)
        out["generation_config.values"] = repr(sorted(generation.to_dict().items(), key=lambda kv: kv[0]))
    caches = {c for c in vars(cache_utils).values() if isinstance(c, type) and c.__module__ == cache_utils.__name__}
    for cls in classes | caches | {transformers.GenerationMixin, transformers.PreTrainedModel}:
        for key, value in vars(cls).items():
            if not key.startswith(("__", "_abc")):
                out[f"class.{cls.__module__}.{cls.__qualname__}.{key}"] = _Same(value)
    registries = {
        "attention": modeling_utils.ALL_ATTENTION_FUNCTIONS,
        "mask": masking_utils.ALL_MASK_ATTENTION_FUNCTIONS,
    }
    for kind, registry in registries.items():
        for key in registry.keys():  # noqa: SIM118 - no plain dict
            out[f"registry.{kind}.{key}"] = _bound(registry[key])
    for known in ("DYNAMIC_LAYER_TYPE_MAPPING", "STATIC_LAYER_TYPE_MAPPING"):
        for key, value in getattr(cache_utils, known).items():
            out[f"registry.{known}.{key}"] = _Same(value)
    return out


def _bound(value: Callable[..., Any]) -> Any:
    """A bound method is made anew at each access: compare its two parts."""
    if inspect.ismethod(value):
        return ("method", _Same(value.__func__), _Same(value.__self__))
    return _Same(value)


def _config(path: str, config: PreTrainedConfig, out: dict[str, Any]) -> None:
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            out[f"{path}.{key}"] = _Same(value)
            _config(f"{path}.{key}", value, out)
        else:
            out[f"{path}.{key}"] = repr(value)


def fingerprint_changes(before: Mapping[str, Any], after: Mapping[str, Any], allow: tuple[str, ...] = ()) -> list[str]:
    """One line per path that appeared, vanished or changed, except under the prefixes in `allow`; empty if none."""
    lines = []
    for path in sorted({*before, *after}):
        if allow and path.startswith(allow):
            continue
        if path not in after:
            lines.append(f"gone: {path}")
        elif path not in before:
            lines.append(f"new: {path} = {after[path]!r}")
        elif before[path] != after[path]:
            lines.append(f"changed: {path}: {before[path]!r} -> {after[path]!r}")
    return lines
