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
    "triton": "kernels; none is needed yet",
}


def main(argv: list[str]) -> int:
    """Run `mmtoken doctor` with the arguments after the sub-command; 0 on success.

    Raises:
        MMTokenError: the model is unknown, or its config is unusable.
    """
    parser = Parser("mmtoken doctor", __doc__ or "")
    parser.add_argument("--model", metavar="NAME", help="zoo entry, folder or Hugging Face id; default: no model")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    options = parser.parse_args(argv)
    findings = _environment()
    if options.model is not None:
        with quiet():
            findings["model"] = _model(options.model)
    sys.stdout.write((json.dumps(findings, indent=2) if options.json else "\n".join(_lines(findings))) + "\n")
    return 0


def version_of(package: str) -> str | None:
    """Installed version of a distribution, None without it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _environment() -> dict[str, Any]:
    import torch

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
        "kernels": {"scores": "torch (the reference; there are no others yet)"},
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
    return lines + [
        f"  {name:<17}{'fits' if reason is None else f'no: {reason}'}" for name, reason in model["compressors"].items()
    ]
