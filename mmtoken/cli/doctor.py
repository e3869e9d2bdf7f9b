"""`mmtoken doctor`: what is installed and usable here, and which compressors fit a model."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from mmtoken import __version__
from mmtoken.cli.parser import Parser, quiet

_PACKAGES = {
    "torch": "models",
    "transformers": "models",
    "timm": "vision towers",
    "open_clip_torch": "vision towers",
    "lightning": "fit, validate",
    "pillow": "reading images",
    "av": "reading videos",
    "decord": "reading videos (Linux on x86-64 only)",
    "scikit-learn": "training data of the tiny models (extra: train)",
    "scikit-image": "training data of the tiny models (extra: train)",
    "matplotlib": "pictures of bench and demo (extra: plot)",
    "triton": "kernels of scoring operations on CUDA devices",
}


_TEXT_TOKENS = 50

_CAVEATS = [
    "Times are estimates from FLOPs and the pace above; tower, scoring and merging are not in them (mmtoken bench).",
    "Cache is that of one prompt; weights and activations come on top.",
    "Error is what the scaling law of arXiv 2411.03312 expects of models trained with as many tokens (layer average), "
    "relative to the dense one; it knows no method.",
]


def main(argv: list[str]) -> int:
    """Run `mmtoken doctor` with the arguments after the sub-command; 0 on success.

    Raises:
        MMTokenError: the model is unknown, or its config is unusable.
    """
    parser = Parser("mmtoken doctor", __doc__ or "")
    parser.add_argument("--model", metavar="NAME", help="zoo entry, folder or Hugging Face id; default: no model")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.add_argument(
        "--budget",
        nargs="+",
        metavar="LIMIT",
        help="which compressors and how many tokens meet it: 50ms or 0.2s of prefill, 0.5x of the dense prefill, 64MiB "
        "or 2GiB of cache, or a time and a memory",
    )
    parser.add_argument(
        "--dense", metavar="TIME", help="for --budget: the dense prefill, 120ms or 0.2s; default: measured in short"
    )
    parser.add_argument(
        "--visual-tokens",
        type=int,
        metavar="N",
        help="for --budget: in the dense prompt; default: those of one picture of 448 x 448",
    )
    parser.add_argument(
        "--text-tokens", type=int, metavar="T", help=f"for --budget: beside them; default: {_TEXT_TOKENS}"
    )
    options = parser.parse_args(argv)
    budget = _budget(options)
    findings = _environment()
    if options.model is not None:
        with quiet():
            findings["model"] = _model(options.model)
            if budget is not None:
                findings["budget"] = _within(options, budget, findings["model"]["compressors"])
    sys.stdout.write((json.dumps(findings, indent=2) if options.json else "\n".join(_lines(findings))) + "\n")
    return 0


def _budget(options: Any) -> Any:
    """The parsed limits, None without any; whatever can be refused is refused before a model is looked at."""
    from mmtoken.errors import MMTokenError
    from mmtoken.evaluation.budget import Budget, check_counts

    if options.budget is None:
        for name in ("dense", "visual_tokens", "text_tokens"):
            if getattr(options, name) is not None:
                shown = f"{name.replace('_', '-')}={getattr(options, name)!r}"
                raise MMTokenError(f"{shown} is for a budget; give one with --budget.")
        return None
    budget = Budget.parse(options.budget)
    if options.model is None:
        raise MMTokenError(f"budget={' '.join(options.budget)!r} needs a model; name one with --model.")
    if options.dense is not None and Budget.parse([options.dense]).seconds is None:
        raise MMTokenError(f"dense={options.dense!r} is no time; give the dense prefill as 120ms or 0.2s.")
    check_counts(
        1 if options.visual_tokens is None else options.visual_tokens,
        _TEXT_TOKENS if options.text_tokens is None else options.text_tokens,
    )
    return budget


def _within(options: Any, budget: Any, compressors: dict[str, str | None]) -> dict[str, Any]:
    """The most tokens that each compressor may keep within a budget."""
    from dataclasses import asdict

    from mmtoken.backbones.registry import adapt
    from mmtoken.cli.parser import find_device
    from mmtoken.compressors.registry import names, resolve
    from mmtoken.engine.flops import DecoderShape
    from mmtoken.errors import MMTokenError
    from mmtoken.evaluation.budget import Budget, Pace, Setting, calibrate, estimate, fits, largest_keep
    from mmtoken.hub import skeleton

    model, _ = skeleton(options.model)
    backbone = adapt(model)
    visual = _visual_tokens(options.model, backbone) if options.visual_tokens is None else options.visual_tokens
    parameters = list(backbone.decoder.parameters())
    setting = Setting(
        DecoderShape.from_config(backbone.decoder.config),
        visual,
        _TEXT_TOKENS if options.text_tokens is None else options.text_tokens,
        parameters[0].element_size(),
        sum(parameter.numel() for parameter in parameters) / 1e9,
    )
    if options.dense is None:
        pace = calibrate(setting.shape, setting.visual + setting.text, find_device("auto"))
    else:
        pace = Pace.of_dense(
            Budget.parse([options.dense]).seconds or 0.0, setting.flops([visual] * setting.shape.layers)
        )
    dense = estimate(None, setting, pace)
    rows: dict[str, Any] = {}
    for name, reason in compressors.items():
        if reason is not None:
            rows[name] = {"reason": "does not fit the model"}
            continue
        try:
            row = largest_keep(lambda keep, name=name: resolve(name, keep=keep), setting, pace, budget)  # type: ignore[misc]
        except MMTokenError as error:
            rows[name] = {"reason": str(error)}
            continue
        rows[name] = {"reason": "not even 1 token fits"} if row is None else {"reason": None, **row}
        cls = names()[name]
        rows[name]["notes"] = [
            note
            for note, holds in (
                ("control", cls.control),
                ("must be trained", cls.trainable),
                ("keep is a guide", cls.budget == "adaptive"),
                ("stages guessed", bool(row and row["guessed_stages"])),
                ("the prefill itself stays dense", cls.sites == {"cache"}),
            )
            if holds
        ]
    return {
        "limits": asdict(budget),
        "visual_tokens": setting.visual,
        "text_tokens": setting.text,
        "pace": pace.source,
        "weight_bytes": sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        "dense": {**dense, "within": fits(dense, dense, budget)},
        "compressors": rows,
        "caveats": _CAVEATS,
    }


def _visual_tokens(name: str, backbone: Any) -> int:
    """Visual tokens of one picture of 448 x 448."""
    from PIL import Image

    from mmtoken.errors import InputError
    from mmtoken.hub import load_processor

    processor: Any = load_processor(name)
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    try:
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        ids = processor(text=[text], images=[[Image.new("RGB", (448, 448))]], return_tensors="pt")["input_ids"]
    except Exception as error:  # templates are programs of the checkpoint's makers
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"visual-tokens cannot be counted with this model's processor ({reason}); give --visual-tokens."
        ) from error
    return int((ids == backbone.placeholder_ids("image")).sum())


def version_of(package: str) -> str | None:
    """Installed version of a distribution, None without it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _environment() -> dict[str, Any]:
    import torch

    from mmtoken.kernels.cases import operation_names
    from mmtoken.kernels.dispatch import default_impl

    cuda = torch.cuda.is_available()
    flash = "installed" if find_spec("flash_attn") is not None else "not installed"
    return {
        "mmtoken": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "packages": {name: version_of(name) for name in _PACKAGES},
        "attention": {
            "sdpa": "usable",
            "eager": "usable",
            "flash_attention": f"refused by mmtoken ({flash}); load the model with attn_implementation='sdpa'",
            "flex_attention": "refused by mmtoken; load the model with attn_implementation='sdpa'",
        },
        "kernels": dict.fromkeys(operation_names(), default_impl(cuda)),
    }


def _model(name: str) -> dict[str, Any]:
    """Which compressors fit the model; None means that one does, otherwise the reason."""
    from mmtoken.backbones.registry import adapt
    from mmtoken.compressors.registry import names, resolve
    from mmtoken.engine.learned import empty
    from mmtoken.engine.session import check
    from mmtoken.errors import MMTokenError
    from mmtoken.hub import skeleton

    model, saved = skeleton(name)
    fits: dict[str, str | None] = {}
    for key in names():
        try:
            method = resolve(key, keep=0.25)
            check(model, empty(model, method) if method.trainable else method)
        except MMTokenError as error:
            fits[key] = str(error)
        else:
            fits[key] = None
    return {
        "name": name,
        "family": adapt(model).name,
        "parameters": model.num_parameters(),
        "saved_compressor": None if saved is None else saved.to_dict(),
        "compressors": fits,
    }


def _lines(findings: dict[str, Any]) -> list[str]:
    lines = [
        f"mmtoken {findings['mmtoken']} on Python {findings['python']}, {findings['platform']}",
        f"device: {findings['device']}",
        "",
        "packages:",
        *(f"  {name:<17}{findings['packages'][name] or 'not installed':<15}{use}" for name, use in _PACKAGES.items()),
        "",
        "attention implementations:",
        *(f"  {name:<17}{state}" for name, state in findings["attention"].items()),
        "",
        "kernels:",
        *(f"  {name:<17}{state}" for name, state in findings["kernels"].items()),
    ]
    model = findings.get("model")
    if model is None:
        return lines
    lines += ["", f"model {model['name']}: {model['family']}, {model['parameters']:,} parameters"]
    if model["saved_compressor"] is not None:
        lines.append(f"  saved with {json.dumps(model['saved_compressor'])}")
    lines += [
        f"  {name:<17}{'fits' if reason is None else f'no: {reason}'}" for name, reason in model["compressors"].items()
    ]
    return lines + (_budget_lines(findings["budget"]) if "budget" in findings else [])


def _budget_lines(found: dict[str, Any]) -> list[str]:
    limits, dense = found["limits"], found["dense"]
    asked = [
        *([] if limits["seconds"] is None else [f"prefill {1e3 * limits['seconds']:g} ms"]),
        *([] if limits["share"] is None else [f"prefill {limits['share']:g} of dense"]),
        *([] if limits["cache_bytes"] is None else [f"cache {limits['cache_bytes'] / 2**20:.4g} MiB"]),
    ]
    head = f"  {'':<18}{'keep':>5}{'of N':>7}{'average':>9}{'prefill':>13}{'cache':>13}{'error':>8}"

    def line(name: str, row: dict[str, Any], notes: str) -> str:
        return (
            f"  {name:<18}{row['keep']:>5}{row['keep'] / found['visual_tokens']:>7.0%}{row['layer_average']:>9.1f}"
            f"{row['prefill_ms']:>10.2f} ms{row['cache_bytes'] / 2**20:>9.3f} MiB{row['relative_error']:>7.3f}x{notes}"
        ).rstrip()

    lines = [
        "",
        f"budget: {', '.join(asked)}; {found['visual_tokens']} visual + {found['text_tokens']} text tokens",
        f"  pace from {found['pace']}; weights take {found['weight_bytes'] / 2**20:.1f} MiB",
        head,
        line("dense", dense, "  within the budget" if dense["within"] else "  over the budget"),
    ]
    for name, row in found["compressors"].items():
        if row["reason"] is None:
            lines.append(line(name, row, f"  {', '.join(row['notes'])}"))
        else:
            lines.append(f"  {name:<18}no: {row['reason']}")
    return [*lines, *(f"  {caveat}" for caveat in found["caveats"])]
