"""How much a frame has to do with a question: scorers for QuoTA, and a place for others."""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mmtoken.compressors.base import check_whole
from mmtoken.compressors.framequestion import frame_question
from mmtoken.errors import InputError, MMTokenError, UnknownNameError, near_names

Reads = Literal["pixels", "question", "seed"]


@dataclass(frozen=True)
class Clip:
    """One video as a scorer sees it.

    Attributes:
        frames: T.
        number: of the video among the images and videos of the call.
        pixels: uint8[T, H, W, 3], None for scorers that do not read them.
        question: about the video; "" for scorers that do not read it.
        entities: things to look for that a planner found in the question.
        seed: from the exact bits of the pixels; 0 for scorers that do not read it.
        total: frames of the video before any was left out; 0: none was.
        kept: numbers of the T frames among these.
    """

    frames: int
    number: int = 0
    pixels: Tensor | None = None
    question: str = ""
    entities: tuple[str, ...] = ()
    seed: int = 0
    total: int = 0
    kept: tuple[int, ...] = ()

    def batches(self, size: int) -> Iterator[list[Any]]:
        """The frames as lists of numpy arrays uint8[H, W, 3], at most `size` each."""
        assert self.pixels is not None
        for part in self.pixels.cpu().split(size):
            yield [picture.numpy() for picture in part]


class FrameScorer(ABC):
    """Scores the frames of one video; a subclass is a frozen dataclass.

    Attributes:
        reads: what of a `Clip` it needs.
    """

    reads: ClassVar[frozenset[Reads]] = frozenset({"pixels", "question"})

    @abstractmethod
    def score(self, clip: Clip) -> Tensor:
        """float[T]: at least 0, for a scorer of probabilities at most 1; only ratios between frames matter."""

    def settings(self) -> dict[str, Any]:
        """JSON-ready: {"name": ..., ...}, from which `resolve_scorer` makes an equal one.

        Raises:
            MMTokenError: it holds a model that was handed in as an object, or is no scorer of this library.
        """
        name = next((name for name, kind in SCORERS.items() if kind is type(self)), None)
        if name is None:
            raise MMTokenError(
                f"scorer={type(self).__name__} is not one of {', '.join(SCORERS)}, so no name stands for it; "
                "save the settings without it, and hand it in again after loading."
            )
        values: dict[str, Any] = {"name": name}
        for entry in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, entry.name)
            if value != entry.default or entry.default is dataclasses.MISSING:
                values[entry.name] = _plain(f"scorer.{entry.name}", value)
        return values


def _plain(field: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(field, part) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise MMTokenError(
        f"{field}=<{type(value).__name__}> is a live object and cannot be saved; give the name or folder of a model "
        "instead, which is loaded when it is first needed."
    )


@dataclass(frozen=True)
class Uniform(FrameScorer):
    """Every frame the same: what the method does without a scorer."""

    reads: ClassVar[frozenset[Reads]] = frozenset()

    def score(self, clip: Clip) -> Tensor:
        return torch.ones(clip.frames, dtype=torch.float64)


@dataclass(frozen=True)
class RandomScores(FrameScorer):
    """Numbers between 0 and 1 that depend on the pixels and a seed only: a control.

    Attributes:
        seed: for other numbers.
    """

    seed: int = 0

    reads: ClassVar[frozenset[Reads]] = frozenset({"seed"})

    def __post_init__(self) -> None:
        check_whole("seed", self.seed, lowest=0)

    def score(self, clip: Clip) -> Tensor:
        mixed = (clip.seed * 0x9E3779B97F4A7C15 + self.seed * 0x2545F4914F6CDD1D) & 0x7FFFFFFFFFFFFFFF
        generator = torch.Generator().manual_seed(mixed)
        return torch.rand(clip.frames, dtype=torch.float64, generator=generator)


@dataclass(frozen=True)
class GivenScores(FrameScorer):
    """Scores that are known already: an oracle, or another program's.

    Attributes:
        scores: one number per frame for every video, or a list of such lists, one per image and video of the call.
    """

    scores: tuple[Any, ...]

    reads: ClassVar[frozenset[Reads]] = frozenset()

    def __post_init__(self) -> None:
        given = self.scores.tolist() if isinstance(self.scores, Tensor) else self.scores
        if isinstance(given, str) or not isinstance(given, Sequence) or not given:
            raise MMTokenError(f"scores={self.scores!r} is no list of numbers; give for example [0.2, 0.9].")
        nested = [not isinstance(part, str) and isinstance(part, Sequence) for part in given]
        rows = given if all(nested) else [given]
        for value in [value for row in rows for value in row]:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise MMTokenError(f"scores={given!r}: {value!r} is no score; give finite numbers of at least 0.")
        kept = tuple(tuple(map(float, row)) for row in rows)
        object.__setattr__(self, "scores", kept if all(nested) else kept[0])

    def score(self, clip: Clip) -> Tensor:
        per_video = isinstance(self.scores[0], tuple)
        if per_video and clip.number >= len(self.scores):
            raise InputError(
                f"scores has {len(self.scores)} lists but there is a video {clip.number}; give one list per video."
            )
        given = self.scores[clip.number] if per_video else self.scores
        total = clip.total or clip.frames
        if len(given) != total:
            raise InputError(
                f"scores has {len(given)} numbers but video {clip.number} has {total} frames; give one per frame."
            )
        return torch.tensor([given[frame] for frame in clip.kept or range(total)], dtype=torch.float64)


@dataclass(frozen=True)
class VLM(FrameScorer):
    """A vision-language model that is asked about each frame: the probability of "A" (yes) over its whole vocabulary.

    Read from the logits of the last real position, one forward pass per batch of frames, nothing generated. The
    probability is not divided by those of "A" and "B" (QuoTA's official code does not, either).

    Attributes:
        model: has a `forward` that gives logits; or the name or folder of one, loaded when it is first needed.
        processor: the model's; a model by name brings its own.
        batch: frames per forward pass.
        letter: the answer whose probability counts.
    """

    model: Any = "Qwen/Qwen2-VL-2B-Instruct"
    processor: Any = None
    batch: int = 64
    letter: str = "A"

    def __post_init__(self) -> None:
        check_whole("batch", self.batch, lowest=1)
        if not isinstance(self.model, str) and self.processor is None:
            raise MMTokenError("processor=None: hand in the model's processor too, or give the model by name.")

    @torch.no_grad()
    def score(self, clip: Clip) -> Tensor:
        model, processor = _loaded_vlm(self.model) if isinstance(self.model, str) else (self.model, self.processor)
        letter = _token(getattr(processor, "tokenizer", processor), self.letter)
        text = self._prompt(processor, frame_question(clip.question, clip.entities))
        scores = []
        for pictures in clip.batches(self.batch):
            inputs = processor(
                text=[text] * len(pictures),
                images=[[picture] for picture in pictures],
                return_tensors="pt",
                padding=True,
            )
            inputs = {name: _at(value, model) for name, value in inputs.items()}
            logits = model(**inputs).logits
            real = inputs["attention_mask"] if "attention_mask" in inputs else torch.ones_like(inputs["input_ids"])
            last = (real * torch.arange(real.shape[1], device=real.device)).argmax(-1)
            answers = logits[torch.arange(len(last), device=logits.device), last.to(logits.device)]
            scores.append(answers.float().softmax(-1)[:, letter].cpu())
        return torch.cat(scores)

    @staticmethod
    def _prompt(processor: Any, question: str) -> str:
        if getattr(processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            prompt: str = processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            return prompt
        return f"{getattr(processor, 'image_token', '<image>')}\n{question}\n"


def _at(value: Any, model: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.to(model.device)
    return value.to(model.dtype) if value.is_floating_point() else value


def _token(tokenizer: Any, letter: str) -> int:
    ids = tokenizer(letter, add_special_tokens=False)["input_ids"]
    if not ids:
        raise MMTokenError(f"letter={letter!r} is no token of the scorer's vocabulary; give another letter.")
    return int(ids[-1])  # some tokenizers put a space of its own before a word


@functools.lru_cache(maxsize=1)
def _loaded_vlm(name: str) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", use_safetensors=True).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device), AutoProcessor.from_pretrained(name)


@dataclass(frozen=True)
class CLIP(FrameScorer):
    """Similarity of a frame and the text in a model of the CLIP family, as (1 + cosine) / 2: between 0 and 1.

    No softmax: a frame's score does not depend on the other frames. The text is the list of entities, or the question
    where there is none, cut to what the text encoder reads.

    Attributes:
        model: of transformers (`get_image_features`, `get_text_features`), of open_clip (`encode_image`,
            `encode_text`); or the name or folder of one for transformers, loaded when it is first needed.
        processor: transformers: the processor, a model by name brings its own. open_clip: the transform of pictures.
        tokenizer: open_clip: the tokenizer; transformers needs none.
        batch: frames per forward pass.
    """

    model: Any = "openai/clip-vit-base-patch32"
    processor: Any = None
    tokenizer: Any = None
    batch: int = 64

    def __post_init__(self) -> None:
        check_whole("batch", self.batch, lowest=1)
        if not isinstance(self.model, str):
            if self.processor is None:
                raise MMTokenError("processor=None: hand in the model's processor too, or give the model by name.")
            if not hasattr(self.model, "get_text_features") and self.tokenizer is None:
                raise MMTokenError("tokenizer=None: an open_clip model needs its tokenizer (open_clip.get_tokenizer).")

    @torch.no_grad()
    def score(self, clip: Clip) -> Tensor:
        model, processor = _loaded_clip(self.model) if isinstance(self.model, str) else (self.model, self.processor)
        text = ", ".join(clip.entities) or clip.question
        words: Tensor | None = None
        scores = []
        for pictures in clip.batches(self.batch):
            if hasattr(model, "get_text_features"):
                if words is None:
                    inputs = processor(text=[text], return_tensors="pt", padding=True, truncation=True)
                    names = ("input_ids", "attention_mask")
                    found = {name: inputs[name].to(model.device) for name in names if name in inputs}
                    words = _pooled(model.get_text_features(**found))
                pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
                seen = _pooled(model.get_image_features(pixel_values=_at(pixels, model)))
            else:
                where = next(model.parameters())
                if words is None:
                    words = model.encode_text(self.tokenizer([text]).to(where.device))
                seen = model.encode_image(_open_clip_pixels(processor, pictures).to(where.device, where.dtype))
            scores.append((1 + cosine_similarity(seen.float(), words.float(), dim=-1)).cpu() / 2)
        return torch.cat(scores).clamp(0, 1)


def _pooled(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return found


def _open_clip_pixels(transform: Any, pictures: list[Any]) -> Tensor:
    from PIL import Image

    return torch.stack([transform(Image.fromarray(picture)) for picture in pictures])


@functools.lru_cache(maxsize=1)
def _loaded_clip(name: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(name, use_safetensors=True).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device), AutoProcessor.from_pretrained(name)


SCORERS: dict[str, type[FrameScorer]] = {
    "vlm": VLM,
    "clip": CLIP,
    "given": GivenScores,
    "random": RandomScores,
    "uniform": Uniform,
}
"""Scorers by name."""


def resolve_scorer(scorer: FrameScorer | str | Mapping[str, Any]) -> FrameScorer:
    """A scorer from an instance, a name of `SCORERS`, or {"name": ..., settings}.

    Raises:
        UnknownNameError: no scorer has this name.
        MMTokenError: a setting is unknown, missing or out of range.
    """
    if isinstance(scorer, FrameScorer):
        return scorer
    given = {"name": scorer} if isinstance(scorer, str) else scorer
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise MMTokenError(f"scorer={scorer!r}: give a FrameScorer, a name, or a dict with 'name' and its settings.")
    name = given["name"]
    if name not in SCORERS:
        raise UnknownNameError(f"scorer={name!r} is unknown{near_names(name, SCORERS)}")
    kind = SCORERS[name]
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    settings = {key: value for key, value in given.items() if key != "name"}
    for key in settings:
        if key not in fields:
            raise MMTokenError(
                f"{key}={settings[key]!r} is no setting of scorer {name!r}{near_names(str(key), fields)}"
            )
    for key, field in fields.items():
        if field.default is dataclasses.MISSING and key not in settings:
            raise MMTokenError(f"{key} is missing: scorer {name!r} has no default for it.")
    return kind(**settings)
