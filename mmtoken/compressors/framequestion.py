"""From a question about a video to one that can be asked of each of its frames (QuoTA, section 3.2)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmtoken.errors import InputError

Planner = Callable[[str], str]
"""Text in, text out: what answers `decoupling_prompt`."""

_EXAMPLES = (
    (
        "How many dogs run past the red car? (A) one (B) two (C) three",
        "yes",
        "[dogs, red car]",
        "[dog, red car]",
    ),
    (
        "What does the woman do after she has put the kettle on the stove?",
        "yes",
        "[woman, kettle, stove, what she does]",
        "[woman, kettle, stove]",
    ),
    ("What is the mood of the film, and what is it about?", "no", "null", "null"),
)


def decoupling_prompt(question: str) -> str:
    """The text that asks a language model which things to look for, in three steps and with three examples.

    The wording is ours. Its answer is read by `parsed_entities`.
    """
    parts = [
        "You are given a question about a video. Say which things one must find in its frames to answer it. Do not "
        "answer the question itself. Work in three steps, one line each:",
        "Step 1: does the answer depend on finding physical things (people, animals, objects, places, written words)? "
        "Write yes or no.",
        "Step 2: list all things that the question and its options name, in square brackets; null if step 1 is no.",
        "Step 3: of that list keep only physical things that a single picture can show, in square brackets; null if "
        "none is left.",
    ]
    for asked, needed, things, physical in _EXAMPLES:
        parts.append(f"Question: {asked}\nStep 1: {needed}\nStep 2: {things}\nStep 3: {physical}")
    parts.append(f"Question: {question.strip()}")
    return "\n\n".join(parts)


def parsed_entities(answer: str) -> tuple[str, ...]:
    """The things to look for in an answer to `decoupling_prompt`; none where it says so or cannot be read.

    Read in lower case: "step 1: yes" and the list in brackets after "step 3:". Only then there are any.
    """
    text = answer.lower()
    needed = re.search(r"step 1:\s*(yes|no)\b", text)
    if needed is None or needed[1] == "no":
        return ()
    found = re.search(r"step 3:[^\[\]]*\[([^\[\]]*)\]", text)
    if found is None:
        return ()
    things = (part.strip(" \t\n'\"") for part in found[1].split(","))
    return tuple(dict.fromkeys(thing for thing in things if thing and thing not in ("null", "none")))


def frame_question(question: str, entities: Sequence[str] = ()) -> str:
    """What a vision-language model is asked about one frame; "A" means yes. The wording is ours.

    Args:
        question: the one about the video.
        entities: things to look for; none: whether the frame is enough to answer the question.
    """
    if entities:
        asked = f"Does the image show at least one of these: {', '.join(entities)}?"
    else:
        asked = f"{question.strip()}\nDoes the image hold enough information to answer this question?"
    return f"{asked}\nA. yes\nB. no\nAnswer with the letter of the right option only."


def timestamps_text(seconds: float, times: Sequence[float]) -> str:
    """What a prompt says of a video's frames, also of those that are left out later: its length and their times.

    Args:
        seconds: how long the video lasts.
        times: seconds of each frame that was sampled.

    Raises:
        InputError: there is no frame.
    """
    if not times:
        raise InputError("times is empty; give the time of each sampled frame.")
    listed = ", ".join(f"{time:.2f}s" for time in times)
    return f"The video lasts {seconds:.2f} seconds, and {len(times)} frames were taken of it, at {listed}."


@dataclass(frozen=True, eq=False)
class TextPlanner:
    """A Hugging Face language or vision-language model as a planner: text only, greedy.

    Attributes:
        model: has `generate`.
        tokenizer: the model's tokenizer, or a processor that has one; a chat template is used if it has one.
        max_new_tokens: longest answer.
    """

    model: Any
    tokenizer: Any
    max_new_tokens: int = 4096

    @torch.no_grad()
    def __call__(self, text: str) -> str:
        """The model's answer to a text, special tokens left out."""
        tokenizer = getattr(self.tokenizer, "tokenizer", self.tokenizer)
        templated = bool(getattr(tokenizer, "chat_template", None))
        if templated:
            turns = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not templated).to(self.model.device)
        output = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        answer: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answer

    @classmethod
    def load(cls, name: str, **options: Any) -> TextPlanner:
        """From the hub or a folder."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True).eval()
        return cls(model, AutoTokenizer.from_pretrained(name), **options)
