"""The command line. Sub-commands are loaded when they are called, so that `mmtoken --help` needs no torch."""

from __future__ import annotations

import importlib
import sys
import traceback

from mmtoken import __version__
from mmtoken.errors import MMTokenError, near_names

COMMANDS = {
    "run": "answer a question about images with fewer visual tokens",
    "stream": "watch a video, a folder of pictures or a camera, and answer questions on the way",
    "list": "show compressors, backbones or models",
    "bench": "measure speed, memory and accuracy beside the dense model and controls",
    "demo": "write a page that shows what compressors keep and what it costs",
    "doctor": "show what is installed, and which compressors fit a model",
    "fit": "train a zoo model from its recipe",
    "validate": "check a training checkpoint",
}
"""Sub-command -> what it does. Each is the module of its name; `fit` holds validate too."""

_HELP = f"""usage: mmtoken [--debug] COMMAND ...

Visual-token compression for Hugging Face vision-language models.

commands:
{chr(10).join(f"  {name:<10}{what}" for name, what in COMMANDS.items())}

`mmtoken COMMAND --help` shows the options of a command.

options:
  --debug     show the traceback of an error
  --version   show the version
  -h, --help  show this
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; every error is one line on stderr.

    Returns:
        0 on success, 2 for something that was handed in wrong, 130 after Ctrl-C, 1 for a bug.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    caught: BaseException
    words = [word for word in words if word != "--debug"]
    try:
        return _dispatch(words)
    except MMTokenError as error:
        caught, message, code = error, str(error), 2
    except KeyboardInterrupt as error:
        caught, message, code = error, "interrupted", 130
    except BrokenPipeError:  # whoever read the output has gone
        sys.stderr.close()
        return 0
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        message = f"{type(error).__name__}: {first} (a bug in mmtoken; --debug shows the traceback)"
        caught, code = error, 1
    if debug:
        traceback.print_exception(caught)
    sys.stderr.write(f"mmtoken: error: {' '.join(message.split())}\n")
    return code


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_HELP)
        return 0 if words else 2
    if words[0] == "--version":
        sys.stdout.write(f"mmtoken {__version__}\n")
        return 0
    command, rest = words[0], words[1:]
    if command not in COMMANDS:
        raise MMTokenError(f"command={command!r} is unknown{near_names(command, COMMANDS)}")
    try:
        if command in ("fit", "validate"):
            from mmtoken.cli import fit

            return fit.main(rest, command)
        code: int = importlib.import_module(f"mmtoken.cli.{command}").main(rest)
        return code
    except SystemExit as leaving:  # --help of a command
        return leaving.code if isinstance(leaving.code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
