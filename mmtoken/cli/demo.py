"""`mmtoken demo`: the whole story on the shipped samples, as one HTML page that needs no network."""

from __future__ import annotations

import sys
from pathlib import Path

from mmtoken.cli.parser import Parser, quiet
from mmtoken.errors import InputError
from mmtoken.evaluation.demo_page import render
from mmtoken.evaluation.story import tell
from mmtoken.hub import load
from mmtoken.wholefile import whole_file


def main(argv: list[str]) -> int:
    """Run `mmtoken demo` with the arguments after the sub-command; 0 on success.

    Raises:
        MMTokenError: an argument cannot be used.
    """
    parser = Parser("mmtoken demo", __doc__ or "")
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="one budget and toy sizes, in seconds: to try the page")
    options = parser.parse_args(argv)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"out={str(options.out)!r} is no folder and none can be made there: {error.strerror}."
        ) from error
    with quiet():
        model, processor = load("tiny-llava")
        video = load("tiny-llava-video")
    story = tell(model, processor, video=video, quick=options.quick, progress=_progress)
    page = options.out / "index.html"
    with whole_file(page) as temporary:
        temporary.write_text(render(story), encoding="utf-8")
    sys.stdout.write(f"wrote {page.resolve()}: open it in a browser\n")
    return 0


def _progress(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
