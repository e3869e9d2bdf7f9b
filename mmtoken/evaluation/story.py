"""Everything that the demo page tells, measured: answers, kept patches and costs on the shipped samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel

import mmtoken
from mmtoken.datasets.media.images import read_image
from mmtoken.engine.report import Report
from mmtoken.engine.session import compress
from mmtoken.evaluation import accuracy, speed
from mmtoken.evaluation.accuracy import Batch, first_token_times
from mmtoken.evaluation.benchmarks import ask, begins_with, first_line
from mmtoken.evaluation.lineup import DENSE, Entrant, line_up
from mmtoken.evaluation.overlay import View, draw, overlays
from mmtoken.evaluation.stream_story import StreamStory, tell_stream
from mmtoken.evaluation.timing import environment, one_thread

_PACKAGE = Path(mmtoken.__file__).parent
SAMPLES = _PACKAGE / "assets" / "samples"
COMMITTED = _PACKAGE.parent / "models" / "tiny_llava" / "accuracy-tiny-llava.json"
"""Results of a full accuracy run, where the package is used from a checkout."""

BUDGETS = (32, 16, 8)
_TYPES = ("superlative", "number", "counting", "beside", "number", "number")
"""Which of its questions each sample is shown with."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Sample:
    """A shipped picture with one of its questions."""

    title: str
    source: str
    licence: str
    image: Image.Image
    question: str
    expected: str


@dataclass(frozen=True)
class Told:
    """What one variant of the model did with all samples.

    Attributes:
        entrant: the compressor at its budget, or the dense model.
        answers, correct: per sample.
        overlays: per sample the picture with its kept patches bright; empty for the dense model.
        stages: per cut inside the decoder (layer, overlay of the first sample).
        tokens, layer_average: visual tokens per picture, after the last cut and averaged over layers.
        kv_bytes, flops: per question; cache after the prefill, and the decoder's prefill.
        first_token_ms: per question in a batch of all samples, median.
    """

    entrant: Entrant
    answers: list[str]
    correct: list[bool]
    overlays: list[Image.Image]
    stages: list[tuple[int, Image.Image]]
    tokens: float
    layer_average: float
    kv_bytes: float
    flops: float
    first_token_ms: float


@dataclass(frozen=True)
class Story:
    """All that the page shows.

    Attributes:
        samples: pictures with questions.
        grid: the first sample with all its patches outlined.
        depth: layers of the language model.
        told: the dense model first.
        accuracy: results of `accuracy.evaluate`; `committed` says whether they were read from the repository.
        speed: results of `speed.measure`, measured just now.
        environment: device and versions.
        stream: a clip that tiny-llava-video watched; None without that model.
    """

    samples: list[Sample]
    grid: Image.Image
    depth: int
    told: list[Told]
    accuracy: dict[str, Any]
    committed: bool
    speed: dict[str, Any]
    environment: dict[str, Any]
    stream: StreamStory | None = None


def read_samples(folder: Path = SAMPLES) -> list[Sample]:
    """The shipped pictures, each with one question."""
    listed = json.loads((folder / "samples.json").read_text())["samples"]
    found = []
    for number, entry in enumerate(listed):
        wanted = _TYPES[number % len(_TYPES)]
        question = next((q for q in entry["questions"] if q["type"] == wanted), entry["questions"][0])
        found.append(
            Sample(
                entry["title"],
                entry["source"],
                entry["licence"],
                read_image(folder / entry["file"]),
                question["text"],
                question["answer"],
            )
        )
    return found


def tell(
    model: PreTrainedModel,
    processor: Any,
    *,
    video: tuple[PreTrainedModel, Any] | None = None,
    quick: bool = False,
    progress: Progress = lambda line: None,
) -> Story:
    """Measure everything; about a minute of CPU time, `quick` a few seconds.

    Args:
        model, processor: the shipped tiny LLaVA.
        video: tiny-llava-video and its processor, which then watch a short stream.
        quick: one budget, a handful of pictures, a toy shape for speed: for tests of the page.
        progress: told about every step.
    """
    samples = read_samples()
    entrants = line_up(keeps=BUDGETS[1:2] if quick else BUDGETS)
    texts = [processor.apply_chat_template(ask(s.question), add_generation_prompt=True) for s in samples]
    images = [s.image for s in samples]
    inputs = processor(text=texts, images=images, return_tensors="pt", padding=True, padding_side="left")
    batch = Batch(list(range(len(samples))), dict(inputs), 4)
    progress("demo: asking about the samples")
    with one_thread(model.device):
        times = first_token_times(model, entrants, batch, 1 if quick else 5)
        told = [
            _tell_one(model, processor, entrant, samples, batch, row["first_token_ms"]["median"])
            for entrant, row in zip(entrants, times, strict=True)
        ]
    watched = None
    if video is not None:
        progress("demo: watching a stream")
        watched = tell_stream(*video, frames=8 if quick else 32, memory_tokens=32 if quick else 128)
    committed = COMMITTED.is_file() and not quick
    if committed:
        found = json.loads(COMMITTED.read_text())
    else:
        found = accuracy.evaluate(
            model, processor, entrants, name="tiny-llava", pictures=2 if quick else 12, rounds=0, progress=progress
        )
    return Story(
        samples=samples,
        grid=draw(images[0], [View((0.0, 0.0, 1.0, 1.0), *_side(model), frozenset(range(_side(model)[0] ** 2)))]),
        depth=model.config.text_config.num_hidden_layers,
        told=told,
        accuracy=found,
        committed=committed,
        speed=speed.measure(
            line_up(keeps=(1 / 3, 1 / 9), controls=("uniform_grid",)),
            shape=speed.SMALL if quick else None,
            rounds=1 if quick else 3,
            decode_steps=2,
            thorough=False,
            progress=progress,
        ),
        environment=environment(model.device),
        stream=watched,
    )


def _side(model: Any) -> tuple[int, int]:
    vision = model.config.vision_config
    side: int = vision.image_size // vision.patch_size
    return side, side


@torch.no_grad()
def _tell_one(
    model: Any, processor: Any, entrant: Entrant, samples: Sequence[Sample], batch: Batch, milliseconds: float
) -> Told:
    count, start = len(samples), batch.inputs["input_ids"].shape[1]

    def generate() -> list[str]:
        output = model.generate(**batch.inputs, max_new_tokens=batch.max_new_tokens, do_sample=False)
        return [first_line(text) for text in processor.batch_decode(output[:, start:], skip_special_tokens=True)]

    if entrant.compressor is None:
        answers = generate()
        # A compressor that keeps everything measures the dense model: it is the same to the bit.
        report = _report_of_everything(model, batch)
        marked: list[Image.Image] = []
        stages: list[tuple[int, Image.Image]] = []
    else:
        with compress(model, entrant.compressor) as session:
            answers = generate()
        report = session.report
        marked = overlays(report, [s.image for s in samples], processor)
        rows, columns = _side(model)
        stages = [
            (site.layer, draw(samples[0].image, [View((0, 0, 1, 1), rows, columns, frozenset(site.kept[0].tolist()))]))
            for site in report.sites
            if site.site == "llm_layer" and site.layer is not None
        ]
    return Told(
        entrant=entrant,
        answers=answers,
        correct=[bool(begins_with(a, s.expected)) for a, s in zip(answers, samples, strict=True)],
        overlays=marked,
        stages=stages,
        tokens=sum(report.tokens_out) / count,
        layer_average=report.layer_average,
        kv_bytes=report.kv_bytes / count,
        flops=report.flops / count,
        first_token_ms=milliseconds,
    )


def _report_of_everything(model: Any, batch: Batch) -> Report:
    with compress(model, {"class_path": "UniformGrid", "init_args": {"keep": 1.0}}) as session:
        model.generate(**batch.inputs, max_new_tokens=1, do_sample=False)
    return session.report


def dense(told: Sequence[Told]) -> Told:
    """The variant without a compressor."""
    return next(one for one in told if one.entrant.method == DENSE)
