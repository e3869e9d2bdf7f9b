"""`mmtoken stream`: watch a video, a folder of pictures or a camera, and answer questions on the way.

A question is asked once every frame up to its time has been watched; one behind the last frame is asked at the end. A
frame that cannot be used is named on stderr and passed over. A camera is watched until the last question is answered.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import time
from typing import Any, TextIO

from mmtoken.cli.parser import Parser, add_compressor, find_device, quiet, take_compressor
from mmtoken.compressors.trained import Trained
from mmtoken.errors import InputError
from mmtoken.wholefile import check_target, whole_file

DEFAULT_MODEL = "tiny-llava-video"

_SECONDS = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}

_IN_A_ROW = 16
"""Frames that the model may refuse one after the other before the fault is not in the frames."""

_SHOWN = 5
"""Refused frames whose reason is written out; the rest is counted."""


def main(argv: list[str]) -> int:
    """Run `mmtoken stream` with the arguments after the sub-command; 0 on success.

    Raises:
        MMTokenError: an argument, the video or the model cannot be used.
    """
    parser = Parser("mmtoken stream", __doc__ or "")
    parser.add_argument("--video", required=True, metavar="SOURCE", help="a file, a folder of pictures, /dev/videoN")
    parser.add_argument(
        "--ask-at",
        nargs=2,
        action="append",
        required=True,
        metavar=("TIME", "TEXT"),
        help="a question and when to ask it: 5s, 2.5, 300ms, 2m; repeatable",
    )
    parser.add_argument(
        "--model", metavar="NAME", help=f"zoo entry, folder or Hugging Face id; default: {DEFAULT_MODEL}"
    )
    add_compressor(parser)
    parser.add_argument(
        "--fps", type=float, metavar="F", help="frames per second that are watched; default: all, of a folder 1"
    )
    parser.add_argument(
        "--memory-tokens", type=int, metavar="N", help="most positions held of frames; default: 32 times the first step"
    )
    parser.add_argument("--backend", default="pyav", help="pyav, torchcodec, or decord with --trusted; default: pyav")
    parser.add_argument("--trusted", action="store_true", help="read the file without the limits of docs/media.md")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="per answer; default: %(default)s")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    parser.add_argument("--json", metavar="FILE", help="write answers and measurements")
    options, compressor = take_compressor(parser, argv)
    # Whatever can be refused is refused before a model is loaded.
    if options.max_new_tokens < 1:
        raise InputError(f"max-new-tokens={options.max_new_tokens}; give at least 1.")
    if options.memory_tokens is not None and options.memory_tokens < 1:
        raise InputError(f"memory-tokens={options.memory_tokens}; give at least 1.")
    questions = sorted((_question(*asked) for asked in options.ask_at), key=lambda one: one[0])
    if options.json:
        check_target(options.json, "json", ".json")
    from mmtoken.datasets.media.sources import open_frames

    with (
        open_frames(
            options.video, options.fps, backend=options.backend, trusted=options.trusted, field="--video"
        ) as source,
        quiet(),
    ):
        result = _watch(options, compressor, source, questions)
    if options.json:
        with whole_file(options.json) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write("\n".join(_lines(result)) + "\n")
    return 0


def _question(when: str, text: str) -> tuple[float, str]:
    """Seconds and the question of one --ask-at."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([a-z]*)", when.strip())
    if match is None or match[2] not in _SECONDS:
        raise InputError(f"ask-at={when!r} is no time; give seconds (5, 2.5s), or a number with ms, m or h.")
    if not text.strip():
        raise InputError(f"ask-at={when!r} has an empty question; give one.")
    seconds = float(match[1]) * _SECONDS[match[2]]
    if not math.isfinite(seconds):
        raise InputError(f"ask-at={when!r} is no time; give seconds.")
    return seconds, text


def _watch(options: Any, compressor: Any, source: Any, questions: list[tuple[float, str]]) -> dict[str, Any]:
    from mmtoken.engine.session import attached
    from mmtoken.hub import load
    from mmtoken.streaming.stream import stream

    name = DEFAULT_MODEL if options.model is None else options.model
    model, processor = load(name)
    device = find_device(options.device)
    model.to(device)
    saved = attached(model)
    if saved is not None:  # a stream attaches what it needs; what is named here goes before what was saved
        compressor = (saved.trained or saved.compressor) if compressor is None else compressor
        saved.detach()
    if isinstance(compressor, Trained):
        compressor.to(device)
    answers: list[dict[str, Any]] = []
    waiting = list(questions)
    refusals = _Refusals(sys.stderr)
    progress = _Progress(sys.stderr)
    in_a_row, last = 0, -math.inf
    with stream(model, processor, compressor, memory_tokens=options.memory_tokens) as live:

        def answer_until(moment: float) -> None:
            while waiting and waiting[0][0] < moment:
                when, question = waiting.pop(0)
                if live.report.frames_seen == 0:
                    reason = refusals.first or f"the first frame comes at {moment:.2f} s; ask later"
                    raise InputError(f"ask-at={when:g}s: there is no frame yet to ask about: {reason}")
                answer = live.ask(question, options.max_new_tokens)
                report = live.report
                progress.clear()
                sys.stdout.write(f"[{when:g} s] {question} -> {answer}\n")
                sys.stdout.flush()
                answers.append(
                    {
                        "time": when,
                        "question": question,
                        "answer": answer,
                        "last_frame": last,
                        "frames_seen": report.frames_seen,
                        "kv_tokens": report.kv_tokens,
                        "ttft_ms": report.ttft_ms,
                    }
                )

        while waiting or source.kind != "camera":
            try:
                frame, seconds = next(source)
            except StopIteration:
                break
            except InputError as error:
                refusals.add(error, progress)
                continue
            answer_until(seconds)
            try:
                live.push(frame, seconds)
            except InputError as error:
                refusals.add(error, progress)
                in_a_row += 1
                if in_a_row == _IN_A_ROW:
                    raise
                continue
            in_a_row, last = 0, seconds
            progress.show(seconds, source.end, live)
        if live.report.frames_seen == 0:
            raise InputError(
                f"--video={options.video!r} holds no frame that can be used ({refusals.first or 'it is empty'}); give "
                "another one."
            )
        answer_until(math.inf)
        progress.clear()
        report = dataclasses.asdict(live.report)
    return {
        "video": options.video,
        "model": name,
        "compressor": None if compressor is None else _settings(compressor),
        "answers": answers,
        "frames_refused": refusals.count,
        "report": report,
    }


def _settings(compressor: Any) -> Any:
    from mmtoken.compressors.trained import settings_of

    return settings_of(compressor).to_dict()


def _lines(result: dict[str, Any]) -> list[str]:
    report = result["report"]
    compressor = result["compressor"]
    refused = f", {result['frames_refused']} refused" if result["frames_refused"] else ""
    return [
        "",
        f"compressor     {'none' if compressor is None else compressor['class_path'].rpartition('.')[2]}",
        f"frames         {report['frames_seen']} seen, {report['frames_held']} held{refused}",
        f"memory         {report['kv_tokens']} tokens, {report['kv_bytes'] / 1024:.1f} KiB",
        *([f"stored         {report['stored_tokens']} tokens"] if report["stored_tokens"] else []),
        f"speed          {report['fps']:.1f} frames per second",
        f"first token    {report['ttft_ms']:.1f} ms after the last question",
    ]


class _Refusals:
    """Frames that were passed over."""

    def __init__(self, out: TextIO) -> None:
        self.count, self.first = 0, ""
        self._out = out

    def add(self, error: InputError, progress: _Progress) -> None:
        self.count += 1
        self.first = self.first or str(error)
        if self.count > _SHOWN:
            return
        progress.clear()
        more = "; further ones are only counted" if self.count == _SHOWN else ""
        self._out.write(f"mmtoken: frame passed over: {' '.join(str(error).split())}{more}\n")


class _Progress:
    """One line that is written over where somebody looks at a terminal, else a line now and then."""

    def __init__(self, out: TextIO) -> None:
        self._out, self._live = out, out.isatty()
        self._every = 0.2 if self._live else 10.0
        self._next = time.monotonic() + (0.0 if self._live else self._every)
        self._width = 0

    def show(self, seconds: float, end: float | None, live: Any) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._every
        report = live.report
        whole = "" if end is None else f" of {end:.1f}"
        text = (
            f"{seconds:.1f}{whole} s  {report.frames_seen} frames  {report.fps:.1f} per second  "
            f"{report.kv_tokens} tokens held"
        )
        if not self._live:
            self._out.write(f"mmtoken: {text}\n")
            return
        self._out.write(f"\r{text:<{self._width}}")
        self._out.flush()
        self._width = len(text)

    def clear(self) -> None:
        """Make room for another line."""
        if self._width:
            self._out.write(f"\r{'':<{self._width}}\r")
            self._out.flush()
            self._width = 0
