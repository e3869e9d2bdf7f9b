"""`mmtoken doctor`: what is installed and usable here, and which compressors fit a model."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from mmtoken.cli.parser import Parser

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
    """Run `mmtoken doctor` with the arguments after the sub-command; 0 on success."""
    parser = Parser("mmtoken doctor", __doc__ or "")
    parser.add_argument("--model", metavar="NAME", help="zoo entry, folder or Hugging Face id; default: no model")
    options = parser.parse_args(argv)
    lines = [*_environment(), "", *_attention()]
    if options.model:
        lines += ["", *_fit(options.model)]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _environment() -> list[str]:
    import torch

    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        f"mmtoken {version_of('mmtoken')} on Python {platform.python_version()}, {platform.platform()}",
        f"device: {device}",
        "",
        "packages:",
    ]
    return lines + [f"  {name:<16} {version_of(name):<14} {use}" for name, use in _PACKAGES.items()]


def version_of(package: str) -> str:
    """Installed version of a distribution."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _attention() -> list[str]:
    flash = "installed" if find_spec("flash_attn") is not None else "not installed"
    return [
        "attention implementations:",
        "  sdpa             usable",
        "  eager            usable",
        f"  flash_attention  refused by mmtoken ({flash}); load the model with attn_implementation='sdpa'",
        "  flex_attention   refused by mmtoken; load the model with attn_implementation='sdpa'",
        "",
        "scoring kernels:",
        "  torch            used for everything",
    ]


def _fit(name: str) -> list[str]:
    from mmtoken.backbones.registry import adapt
    from mmtoken.compressors.registry import names, resolve
    from mmtoken.engine.session import attached, check
    from mmtoken.errors import UnsupportedError
    from mmtoken.hub import load

    model, _ = load(name)
    saved = attached(model)
    lines = [f"model {name}: {adapt(model).name}, {model.num_parameters():,} parameters"]
    if saved is not None:
        lines.append(f"  saved with {saved.compressor}")
        saved.detach()
    for key in names():
        try:
            check(model, resolve(key, keep=0.25))
        except UnsupportedError as error:
            lines.append(f"  {key:<16} no: {error}")
        else:
            lines.append(f"  {key:<16} fits")
    return lines
