"""Video methods on a trained model: accuracy against tokens, recall against age, streams in a bounded memory.

    python -m mmtoken.evaluation.video --what offline --model tiny-llava-video --clips 200 --out models/tiny_llava_video

Parts (`--what`, several with commas; each writes `video-<part>.json`, whole after every setting, and goes on where an
earlier call stopped):

- offline: clips of 16 frames, every method at several budgets, beside fewer frames, random and evenly spaced tokens,
  and down-scaling.
- streaming: clips of 64 frames watched one by one, then asked; what leaves a memory of so many tokens is gone. Each
  question has an age: frames since its evidence was last visible.
- cacher: what reuse in the tower does to its output, frame by frame, beside frames that are skipped at equal
  multiply-adds; and to the answers.
- quota: QuoTA with scorers from perfect to random.
- videoscan: its settings, in streams.

Clips are those of the test split. Towers are computed once per clip for methods that neither change nor read them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmtoken.compressors.base import Compressor
from mmtoken.compressors.registry import resolve
from mmtoken.datasets.moving_shapes import Clip, ClipQuestion, MovingShapes
from mmtoken.datasets.vqa_mix import split_seed
from mmtoken.engine.session import compress
from mmtoken.errors import InputError, MMTokenError, UnknownNameError, UnsupportedError
from mmtoken.evaluation.benchmarks import begins_with, first_line
from mmtoken.evaluation.timing import environment
from mmtoken.hub import load
from mmtoken.streaming.memory import StreamPositions
from mmtoken.streaming.stream import Stream, stream
from mmtoken.wholefile import whole_file

SCHEMA_VERSION = 1
MAX_NEW_TOKENS = 4

KEEPS = (0.5, 0.25, 0.125)
CONTROLS = ("random", "uniformgrid", "downscale")
VIDEO_METHODS = ("dycoke", "stcpruner", "vidcom2", "evs")
IMAGE_METHODS = ("divprune", "visionzip", "cdpruner", "tome", "fastv", "pyramiddrop", "dart")
MEMORIES = (512, 256, 128)
"""Tokens held in streams: all tokens of 32, 16 and 8 frames."""

_TOWER_SITES = {"frames", "vision_layer", "refresh"}
_TOWER_NEEDS = {"tower_attention", "tower_keys", "tower_states"}


@dataclass(frozen=True)
class Setting:
    """One way to answer the questions.

    Attributes:
        name: key in the results.
        method: name of a compressor, None for none.
        options: its settings.
        frames: only so many of a clip's frames are shown, evenly spaced; None: all.
        memory: tokens that a stream holds; None: all.
        role: "method", "control" or "dense".
        positions: where a stream's held rows stand.
    """

    name: str
    method: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    frames: int | None = None
    memory: int | None = None
    role: str = "method"
    positions: StreamPositions = "contiguous"

    def compressor(self) -> Compressor | None:
        """The compressor of this setting."""
        return None if self.method is None else resolve({"class_path": self.method, "init_args": self.options})

    def to_dict(self) -> dict[str, Any]:
        return vars(self)


def offline_settings() -> list[Setting]:
    """Dense, controls and methods at every budget."""
    found = [Setting("dense", role="dense")]
    found += [Setting(f"fewer frames {n}", frames=n, role="control") for n in (8, 4, 2)]
    for name in (*CONTROLS, *VIDEO_METHODS, *IMAGE_METHODS):
        role = "control" if name in CONTROLS else "method"
        # DyCoke's keep is that of three frames in four; the others' is of the whole.
        keeps = (0.5, 0.25, 0.05) if name == "dycoke" else KEEPS
        found += [Setting(f"{name} {keep:g}", name, {"keep": keep}, role=role) for keep in keeps]
    found.append(Setting("videoscan", "videoscan"))
    return found


def streaming_settings() -> list[Setting]:
    """Everything held; then, at equal memory, the oldest dropped, fewer frames, fewer tokens per frame."""
    found = [Setting("everything", memory=64 * 16 + 16, role="dense")]
    for memory in MEMORIES:
        found.append(Setting(f"oldest leave {memory}", memory=memory, role="control"))
        found.append(Setting(f"fewer frames {memory}", frames=memory // 16, memory=memory, role="control"))
        share = memory / 1024
        for name in (*CONTROLS, "stcpruner", "dycoke", "divprune"):
            role = "control" if name in CONTROLS else "method"
            found.append(Setting(f"{name} {memory}", name, {"keep": share}, memory=memory, role=role))
    found.append(Setting("videoscan 64", "videoscan", memory=64))
    # As many frames come back for a question as the memory holds.
    found += [Setting(f"rekv {m}", "rekv", {"keep": m // 16}, memory=m) for m in MEMORIES[1:]]
    found += [Setting(f"stccacher {keep:g}", "stccacher", {"keep": keep}, memory=1040) for keep in (0.25, 0.5)]
    return found


def videoscan_settings() -> list[Setting]:
    """Its ablations, in streams of 64 frames; carriers stand where they stood in training, but for two settings."""
    whole: dict[str, Any] = {"bank": None}
    found = [Setting("plain", "videoscan", whole, memory=1040, positions="true")]
    found += [Setting(f"bank {n}", "videoscan", {"bank": n}, memory=1040, positions="true") for n in (33, 17)]
    found += [
        Setting(name, "videoscan", {**whole, **options}, memory=1040, positions="true")
        for name, options in (
            ("extra_kv 4", {"extra_kv": 4}),
            ("without kv", {"without": "kv"}),
            ("without embedding", {"without": "embedding"}),
        )
    ]
    found += [
        Setting(f"positions {policy}", "videoscan", whole, memory=1040, positions=policy)
        for policy in ("contiguous", "repo")
    ]
    return found


def held_out(clips: int, frames: int, questions: int | None = None) -> list[Clip]:
    """Clips of the test split, asked at their end; None: one question of each type that a clip can answer."""
    return list(MovingShapes(split_seed(0, "test"), clips, (frames, frames), questions))


def shown(clip: Clip, frames: int | None) -> list[int]:
    """Numbers of the frames that are shown: all, or so many in the middle of equal shares."""
    total = len(clip.frames)
    return (
        list(range(total))
        if frames is None or frames >= total
        else [(2 * i + 1) * total // (2 * frames) for i in range(frames)]
    )


def right(text: str, question: ClipQuestion) -> int:
    """1 where a generated text begins with the answer."""
    return begins_with(first_line(text), question.answer)


def described(clips: Sequence[Clip]) -> list[dict[str, Any]]:
    """What is known of every question, in the order in which all of them are answered."""
    return [
        {"clip": c, "type": q.type, "age": q.age, "answer": q.answer, "motion": round(motion(clip), 3)}
        for c, clip in enumerate(clips)
        for q in clip.questions
    ]


def motion(clip: Clip) -> float:
    """Share of a clip's frames, its first left out, in which the camera pans or cuts."""
    return sum(kind != "static" for kind in clip.camera[1:]) / (len(clip.camera) - 1)


# --- the tower, once per clip -----------------------------------------------------------------------------------------


class Towers:
    """Tower outputs of clips, computed once, and given to the model instead of a run of its tower."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.tower = model.model.vision_tower
        self.known: list[Tensor] = []
        self._now: list[tuple[int, list[int]]] | None = None

    @torch.no_grad()
    def compute(self, clips: Sequence[Clip]) -> None:
        """Run the tower on every frame."""
        self.known = [self.tower(pixels(clip, range(len(clip.frames)), self.model)).last_hidden_state for clip in clips]

    @contextmanager
    def given(self) -> Iterator[None]:
        """The tower answers with what is known of the frames that `set` named."""

        def forward(pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
            assert self._now is not None
            hidden = torch.cat([self.known[clip][frames] for clip, frames in self._now])
            assert len(hidden) == len(pixel_values)
            return BaseModelOutputWithPooling(last_hidden_state=hidden, hidden_states=(hidden,))

        self.tower.__dict__["forward"] = forward
        try:
            yield
        finally:
            del self.tower.__dict__["forward"]

    def set(self, rows: list[tuple[int, list[int]]]) -> None:
        """(clip, frames) of each video of the next call."""
        self._now = rows


def pixels(clip: Clip, frames: Sequence[int], model: Any) -> Tensor:
    """float[n, 3, 96, 96], as the video processor makes them."""
    from mmtoken.models.tiny_llava.processor import MEAN, STD

    picked = torch.from_numpy(clip.frames[list(frames)]).to(model.device).permute(0, 3, 1, 2)
    return ((picked.float() / 255 - MEAN) / STD).to(model.dtype)


def prompts(processor: Any, questions: Sequence[ClipQuestion], frames: int, device: torch.device) -> dict[str, Tensor]:
    """Token ids and masks of questions about clips of so many frames, padded on the left."""
    tokens = frames * 16 + 1
    texts = []
    for question in questions:
        content = [{"type": "video"}, {"type": "text", "text": question.text}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        texts.append(text.replace(processor.video_token, processor.video_token * tokens))
    made = processor.tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    return {name: made[name].to(device) for name in ("input_ids", "attention_mask")}


# --- answers ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def answer_offline(
    model: Any,
    processor: Any,
    clips: Sequence[Clip],
    towers: Towers,
    compressor: Compressor | None,
    frames: int | None = None,
    group: int = 4,
    each: Callable[[list[tuple[Clip, ClipQuestion]]], Compressor] | None = None,
) -> dict[str, Any]:
    """Whether each question is answered right by `generate`, and what the engine measured.

    Args:
        model, processor: tiny-llava-video.
        clips: with questions at their end.
        towers: computed for these clips.
        compressor: or None.
        frames: of each clip; None: all.
        group: clips per call.
        each: makes the compressor for the questions of a call, instead of `compressor`.

    Returns:
        "correct" (0 or 1 per question), "tokens" entering the decoder and "layer_average" per clip, "kv_share",
        "flops_share", "scoring_ms" per question, "exact", "seconds".
    """
    correct: list[int] = []
    exact = 0
    sums = dict.fromkeys(("tokens", "layer_average", "kv_share", "flops_share", "scoring_ms", "scorer_ms"), 0.0)
    started = time.perf_counter()
    whole = compressor is not None and bool(compressor.sites & _TOWER_SITES or compressor.needs & _TOWER_NEEDS)
    for first in range(0, len(clips), group):
        pairs = [(c, q) for c in range(first, min(first + group, len(clips))) for q in clips[c].questions]
        picks = {c: shown(clips[c], frames) for c, _ in pairs}
        count = len(picks[first])
        inputs = prompts(processor, [q for _, q in pairs], count, model.device)
        made = {c: pixels(clips[c], pick, model) for c, pick in picks.items()}
        inputs["pixel_values_videos"] = torch.stack([made[c] for c, _ in pairs])
        towers.set([(c, picks[c]) for c, _ in pairs])
        method = compressor if each is None else each([(clips[c], q) for c, q in pairs])
        attached = nullcontext() if method is None else compress(model, method)
        with nullcontext() if whole else towers.given(), attached as session:
            output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for text, (_, question) in zip(texts, pairs, strict=True):
            correct.append(right(text, question))
            exact += first_line(text) == question.answer
        measured = _measured(session, len(pairs), count * 16.0)
        for name, value in measured.items():
            sums[name] += value * len(pairs)
    total = len(correct)
    means = {name: round(value / total, 4) for name, value in sums.items()}
    return {
        "correct": correct,
        "exact": round(exact / total, 4),
        **means,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _measured(session: Any, rows: int, tokens: float) -> dict[str, float]:
    if session is None:
        return {"tokens": tokens, "layer_average": tokens, "kv_share": 1.0, "flops_share": 1.0}
    report = session.report
    scorer = sum(sum(site.timings.values()) for site in report.sites)
    return {
        "tokens": sum(len(entered) for entered in report.entered) / rows,
        "layer_average": report.layer_average,
        "kv_share": report.kv_bytes / report.kv_bytes_dense,
        "flops_share": report.flops / report.flops_dense,
        "scoring_ms": 1e3 * report.scoring_seconds / rows,
        "scorer_ms": 1e3 * scorer / rows,
    }


@torch.no_grad()
def answer_streaming(model: PreTrainedModel, processor: Any, clips: Sequence[Clip], setting: Setting) -> dict[str, Any]:
    """Whether each question is answered right after the clip has been watched frame by frame.

    Returns:
        "correct" (0 or 1 per question); means over clips of "kv_tokens", "frames_held", "fps" and "ttft_ms"; "seconds".
    """
    correct: list[int] = []
    sums = dict.fromkeys(("kv_tokens", "frames_held", "fps", "ttft_ms"), 0.0)
    started = time.perf_counter()
    live: Stream = stream(
        model, processor, setting.compressor(), memory_tokens=setting.memory, positions=setting.positions
    )
    with live:
        for clip in clips:
            live.reset()
            for t in shown(clip, setting.frames):
                live.push(clip.frames[t], float(clip.times[t]))
            waits = []
            for question in clip.questions:
                correct.append(right(live.ask(question.text, MAX_NEW_TOKENS), question))
                waits.append(live.report.ttft_ms or 0.0)
            report = live.report
            sums["kv_tokens"] += report.kv_tokens
            sums["frames_held"] += report.frames_held
            sums["fps"] += report.fps
            sums["ttft_ms"] += float(np.median(waits))
    means = {name: round(value / len(clips), 2) for name, value in sums.items()}
    return {"correct": correct, **means, "seconds": round(time.perf_counter() - started, 1)}


# --- parts ------------------------------------------------------------------------------------------------------------


class Results:
    """`video-<part>.json`, written whole after every setting; settings that it holds are not run again."""

    def __init__(self, path: Path, head: dict[str, Any], questions: list[dict[str, Any]]) -> None:
        self.path = path
        self.content: dict[str, Any] = {**head, "questions": questions, "results": {}, "refused": {}}
        if path.is_file():
            before = json.loads(path.read_text())
            if before.get("questions") == questions and before.get("weights") == head["weights"]:
                self.content = before

    def has(self, name: str) -> bool:
        return name in self.content["results"]

    def put(self, name: str, found: dict[str, Any]) -> None:
        self.content["results"][name] = found
        self.content["refused"].pop(name, None)
        self.write()

    def refuse(self, name: str, reason: str) -> None:
        self.content["refused"][name] = reason
        self.write()

    def write(self) -> None:
        with whole_file(self.path) as file:
            file.write_text(json.dumps(self.content) + "\n")


def joined(folder: Path, part: str) -> dict[str, Any] | None:
    """The content of `video-<part>.json` and of the shares `video-<part>-<number>.json`, in the order of the settings.

    Returns:
        None if there is no such file.

    Raises:
        InputError: they are about different questions or weights.
    """
    files = [*sorted(folder.glob(f"video-{part}-[0-9]*.json")), *folder.glob(f"video-{part}.json")]
    if not files:
        return None
    contents = [json.loads(file.read_text()) for file in files]
    whole: dict[str, Any] = contents[0]
    if any(c["questions"] != whole["questions"] or c["weights"] != whole["weights"] for c in contents):
        raise InputError(f"out={str(folder)!r}: the files of {part} are about different questions or weights.")
    for kind in ("results", "refused"):
        merged = {name: entry for content in contents for name, entry in content[kind].items()}
        order = [s.name for s in SETTINGS[part]()] if part in SETTINGS else []
        names = [n for n in order if n in merged] + [n for n in merged if n not in order]
        whole[kind] = {name: merged[name] for name in names}
    for name in set(whole["results"]) & set(whole["refused"]):
        del whole["refused"][name]
    return whole


SETTINGS: dict[str, Callable[[], list[Setting]]] = {
    "offline": offline_settings,
    "streaming": streaming_settings,
    "videoscan": videoscan_settings,
}


def run_settings(settings: Sequence[Setting], results: Results, answer: Callable[[Setting], dict[str, Any]]) -> None:
    """Answer with every setting that is not in the results yet; those that do not work are listed with the reason."""
    for number, setting in enumerate(settings, 1):
        if results.has(setting.name):
            continue
        try:
            found = answer(setting)
        except (UnknownNameError, UnsupportedError, InputError) as error:
            results.refuse(setting.name, str(error))
            _say(f"{number}/{len(settings)} {setting.name}: refused: {str(error)[:100]}")
            continue
        results.put(setting.name, {"setting": setting.to_dict(), **found})
        _say(f"{number}/{len(settings)} {setting.name}: {np.mean(found['correct']):.3f} in {found['seconds']} s")


def cacher_part(
    model: Any, processor: Any, clips: Sequence[Clip], results: Results, turn: int = 0, of: int = 1
) -> None:
    """Error of the tower's output per kind of frame, and accuracy, beside skipped frames at equal multiply-adds."""
    towers = Towers(model)
    towers.compute(clips)
    dense = towers.known
    plans: list[tuple[str, Callable[[], tuple[list[Tensor], float]]]] = []
    for interval in (2, 4):
        for keep in (0.0625, 0.125, 0.25, 0.5):
            options = {"keep": keep, "interval": interval}

            def reuse(options: dict[str, Any] = options) -> tuple[list[Tensor], float]:
                return _reused(model, processor, clips, options)

            plans.append((f"stccacher interval={interval} keep={keep:g}", reuse))
    for share in (0.75, 0.625, 0.5625, 0.5, 0.4, 0.3, 0.25):

        def skip(share: float = share) -> tuple[list[Tensor], float]:
            return _skipped(dense, share), share

        plans.append((f"skip {share:g}", skip))
    for name, plan in plans[turn::of]:
        if results.has(name):
            continue
        towers.known, share = plan()
        found = answer_offline(model, processor, clips, towers, None)
        found["multiply_add_share"] = round(share, 4)
        found["error"] = _errors(clips, dense, towers.known)
        results.put(name, found)
        _say(f"{name}: {np.mean(found['correct']):.3f}, share {share:.3f}, error {found['error']}")


def _reused(model: Any, processor: Any, clips: Sequence[Clip], options: dict[str, Any]) -> tuple[list[Tensor], float]:
    seen: list[Tensor] = []
    hook = model.model.vision_tower.register_forward_hook(lambda *call: seen.append(call[2].last_hidden_state))
    done = dense = 0
    try:
        method = resolve({"class_path": "stccacher", "init_args": options})
        with compress(model, method) as session, torch.no_grad():
            for clip in clips:
                # Through the whole model: reports are made by its prefill.
                inputs = prompts(processor, clip.questions[:1], len(clip.frames), model.device)
                video = pixels(clip, range(len(clip.frames)), model)[None]
                model(**inputs, pixel_values_videos=video)
                done += session.report.tower_multiply_adds
                dense += session.report.tower_multiply_adds_dense
    finally:
        hook.remove()
    return seen, done / max(1, dense)


def _skipped(dense: Sequence[Tensor], share: float) -> list[Tensor]:
    """Frames that are not among the evenly spaced share take the output of the last one that is."""
    out = []
    for hidden in dense:
        count = max(1, round(share * len(hidden)))
        computed = np.zeros(len(hidden), dtype=bool)
        computed[np.unique(np.arange(count) * len(hidden) // count)] = True
        computed[0] = True
        last = np.maximum.accumulate(np.where(computed, np.arange(len(hidden)), 0))
        out.append(hidden[torch.from_numpy(last).to(hidden.device)])
    return out


def _errors(clips: Sequence[Clip], dense: Sequence[Tensor], other: Sequence[Tensor]) -> dict[str, float]:
    """Relative error of patch outputs, mean over the frames of each kind, and over all."""
    kinds: dict[str, list[float]] = {}
    for clip, a, b in zip(clips, dense, other, strict=True):
        error = (a[:, 1:] - b[:, 1:]).flatten(1).norm(dim=1) / a[:, 1:].flatten(1).norm(dim=1)
        for kind, value in zip(clip.camera, error.tolist(), strict=True):
            kinds.setdefault(kind, []).append(value)
            kinds.setdefault("all", []).append(value)
    return {kind: round(float(np.mean(values)), 4) for kind, values in kinds.items()}


def quota_part(model: Any, processor: Any, clips: Sequence[Clip], results: Results, turn: int = 0, of: int = 1) -> None:
    """QuoTA at several budgets with scorers of falling quality: evidence known, known with errors, not at all."""
    towers = Towers(model)
    towers.compute(clips)
    scorers = ("oracle", "noisy 0.1", "noisy 0.25", "noisy 0.5", "uniform", "random")
    for keep, scorer in [(keep, scorer) for keep in KEEPS for scorer in scorers][turn::of]:
        name = f"{scorer} keep={keep:g}"
        if results.has(name):
            continue
        rng = np.random.default_rng(17)

        def each(
            pairs: list[tuple[Clip, ClipQuestion]],
            scorer: str = scorer,
            keep: float = keep,
            rng: np.random.Generator = rng,
        ) -> Compressor:
            if scorer in ("uniform", "random"):
                return resolve({"class_path": "quota", "init_args": {"keep": keep, "scorer": scorer}})
            wrong = float(scorer.split()[1]) if " " in scorer else 0.0
            scores = [_evidence_scores(clip, question, wrong, rng) for clip, question in pairs]
            given = {"name": "given", "scores": scores}
            return resolve({"class_path": "quota", "init_args": {"keep": keep, "scorer": given}})

        try:
            found = answer_offline(model, processor, clips, towers, None, each=each)
        except (UnknownNameError, UnsupportedError, InputError) as error:
            results.refuse(name, str(error))
            _say(f"{name}: refused: {str(error)[:100]}")
            continue
        results.put(name, {"scorer": scorer, "keep": keep, **found})
        _say(f"{name}: {np.mean(found['correct']):.3f} in {found['seconds']} s")


def _evidence_scores(clip: Clip, question: ClipQuestion, wrong: float, rng: np.random.Generator) -> list[float]:
    """1 for frames with evidence, .1 for others; each is taken for the other kind with probability `wrong`."""
    hold = {t for t, _ in question.evidence}
    flips = rng.random(len(clip.frames)) < wrong
    return [1.0 if (t in hold) != bool(flip) else 0.1 for t, flip in enumerate(flips)]


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mmtoken.evaluation.video", description=__doc__)
    parser.add_argument("--what", default="offline", help="offline,streaming,cacher,quota,videoscan")
    parser.add_argument("--model", default="tiny-llava-video", help="zoo entry or folder")
    parser.add_argument("--clips", type=int, default=200, help="clips of 16 frames")
    parser.add_argument(
        "--long-clips", type=int, default=50, help="clips of 64 frames with 12 questions each, for streams"
    )
    parser.add_argument("--out", required=True, help="folder of the JSON files")
    parser.add_argument("--share", default=None, metavar="I/N", help="every N-th setting from the I-th, 0 <= I < N")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(options.threads)
    parts = options.what.split(",")
    known = {"offline", "streaming", "cacher", "quota", "videoscan"}
    if not set(parts) <= known:
        raise MMTokenError(f"what={options.what!r}: give some of {', '.join(sorted(known))}, with commas.")
    turn, of = (int(number) for number in (options.share or "0/1").split("/"))
    model, processor = load(options.model)
    model = model.to(options.device).eval()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    short = held_out(options.clips, 16)
    long = held_out(options.long_clips, 64, 12)
    for part in parts:
        clips = long if part in ("streaming", "videoscan") else short
        head = {
            "schema_version": SCHEMA_VERSION,
            "kind": f"video-{part}",
            "model": options.model,
            "weights": _fingerprint(model),
            "environment": environment(torch.device(options.device)),
            "clips": len(clips),
            "frames": len(clips[0].frames),
        }
        suffix = f"-{turn:02d}" if options.share else ""
        results = Results(out / f"video-{part}{suffix}.json", head, described(clips))
        if part == "offline":
            towers = Towers(model)
            towers.compute(clips)

            def offline(setting: Setting, towers: Towers = towers, clips: list[Clip] = clips) -> dict[str, Any]:
                return answer_offline(model, processor, clips, towers, setting.compressor(), setting.frames)

            run_settings(offline_settings()[turn::of], results, offline)
        elif part in ("streaming", "videoscan"):

            def streaming(setting: Setting, clips: list[Clip] = clips) -> dict[str, Any]:
                return answer_streaming(model, processor, clips, setting)

            run_settings(SETTINGS[part]()[turn::of], results, streaming)
        elif part == "cacher":
            cacher_part(model, processor, clips, results, turn, of)
        else:
            quota_part(model, processor, clips, results, turn, of)


def _fingerprint(model: Any) -> str:
    """A number that another set of weights does not have."""
    return f"{sum(float(p.detach().double().abs().sum()) for p in model.parameters()):.6f}"


if __name__ == "__main__":
    main()
