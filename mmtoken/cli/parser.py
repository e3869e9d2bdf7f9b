"""What the sub-commands' parsers share: one-line errors, and the options that name a compressor."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from logging import CRITICAL
from pathlib import Path
from typing import Any, NoReturn

import yaml

from mmtoken.compressors.base import Compressor
from mmtoken.compressors.pretrained import find
from mmtoken.compressors.trained import Trained
from mmtoken.errors import InputError, MMTokenError, UnsupportedError


class Parser(argparse.ArgumentParser):
    """Raises instead of printing its usage and leaving, and takes no abbreviated options."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise MMTokenError(f"{message}; see {self.prog} --help")


def add_compressor(parser: Parser) -> None:
    """The options --compressor and --keep; `take_compressor` reads them and --compressor.SETTING."""
    parser.add_argument(
        "--compressor",
        metavar="NAME",
        help="a name of `mmtoken list compressors`, a folder or Hugging Face id of a saved one, or class_path and "
        "init_args as a dict or in a YAML or JSON file; its settings follow as --compressor.SETTING VALUE",
    )
    parser.add_argument(
        "--keep", metavar="K", help="visual tokens to keep: a fraction (0.25) or a count per image (64)"
    )


def take_compressor(parser: Parser, argv: list[str]) -> tuple[argparse.Namespace, Compressor | Trained | None]:
    """Parse `argv`; also the compressor that its options name, None without one.

    Raises:
        MMTokenError: an option is unknown, or the compressor or one of its settings is, or it cannot be loaded.
    """
    options, rest = parser.parse_known_args(argv)
    settings = _settings(parser, rest)
    if options.keep is not None:
        settings["keep"] = read_value(options.keep)
    if options.compressor is None:
        if settings:
            raise MMTokenError(f"{next(iter(settings))} is a setting of a compressor; name one with --compressor.")
        return options, None
    return options, find(_spec(options.compressor), {}, **settings)


def _settings(parser: Parser, rest: list[str]) -> dict[str, Any]:
    """From ["--compressor.layer", "2", "--compressor.variant=repo"]."""
    settings: dict[str, Any] = {}
    words = iter(rest)
    for word in words:
        name, equals, value = word.partition("=")
        prefix, dot, setting = name.partition(".")
        if prefix != "--compressor" or not dot or not setting:
            parser.error(f"unrecognized argument {word!r}")
        if not equals:
            following = next(words, None)
            if following is None:
                parser.error(f"argument {name} expects a value")
            value = following
        # jsonargparse writes --compressor.init_args.layer as well.
        settings[setting.removeprefix("init_args.")] = read_value(value)
    return settings


def read_value(text: str) -> Any:
    """A number as Python reads it ("-.5", "1e-3") or as a fraction ("1/3"), or a word or list as YAML does."""
    for number in (int, float, lambda given: float(Fraction(given))):
        with suppress(ValueError, ZeroDivisionError):
            return number(text)
    try:
        return yaml.safe_load(text) if text.strip() else text
    except yaml.YAMLError:
        return text


def _spec(text: str) -> str | dict[str, Any]:
    """The name, the dict that is written out, or what the file of that name holds."""
    if text.startswith("{"):
        written = read_value(text)
        return written if isinstance(written, dict) else text
    if not text.endswith((".yaml", ".yml", ".json")):
        return text
    file = Path(text)
    try:
        spec: Any = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"compressor={text!r} cannot be read ({reason}); give a YAML or JSON file.") from error
    if isinstance(spec, dict) and set(spec) == {"compressor"}:
        spec = spec["compressor"]
    if not isinstance(spec, str | dict):
        raise InputError(f"compressor={text!r} holds a {type(spec).__name__}; it needs class_path and init_args.")
    return spec


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from writing to stderr: what goes wrong is said once, in one line.

    Progress bars of loading and downloading stay where somebody looks at a terminal.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def find_device(name: str) -> Any:
    """The torch device of that name; "auto" is a GPU if there is one.

    Raises:
        UnsupportedError: there is no such device here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).tolist()  # the meta device makes tensors, but they hold nothing
    except (RuntimeError, AssertionError) as error:
        raise UnsupportedError(f"device={name!r} cannot be used here; give cpu, or cuda where there is one.") from error
    return device
