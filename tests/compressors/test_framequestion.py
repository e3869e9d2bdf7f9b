"""From a question about a video to one about a frame."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mmtoken.compressors.framequestion import (
    TextPlanner,
    decoupling_prompt,
    frame_question,
    parsed_entities,
    timestamps_text,
)
from mmtoken.errors import InputError


@pytest.mark.parametrize(
    ("answer", "entities"),
    [
        ("Step 1: Yes\nStep 2: [dog, red car, mood]\nStep 3: [Dog, red car]", ("dog", "red car")),
        ("STEP 1:yes. step 3: the list is ['a cat', \"hat\"]", ("a cat", "hat")),
        ("step 1: yes\nstep 2: [dog]\nstep 3: null", ()),
        ("step 1: yes\nstep 2: [dog]\nstep 3: [null]", ()),
        ("step 1: yes\nstep 2: [dog]\nstep 3: []", ()),
        ("step 1: yes\nstep 2: [dog]\nstep 3: [dog, , dog, none]", ("dog",)),
        ("step 1: no\nstep 3: [dog]", ()),
        ("step 1: yesterday\nstep 3: [dog]", ()),
        ("step 3: [dog]", ()),
        ("step 1: yes\nstep 2: [dog]", ()),
        ("", ()),
    ],
)
def test_answers_are_read_by_their_first_and_third_step(answer, entities):
    assert parsed_entities(answer) == entities


def test_the_examples_of_the_prompt_can_be_read_themselves():
    prompt = decoupling_prompt("  Which bird sings? ")
    assert prompt.endswith("Question: Which bird sings?")
    examples = prompt.split("Question: ")[1:-1]
    assert [parsed_entities(example) for example in examples] == [
        ("dog", "red car"),
        ("woman", "kettle", "stove"),
        (),
    ]


def test_a_frame_is_asked_for_entities_or_for_enough_to_answer():
    with_entities = frame_question("How many dogs?", ("dog", "red car"))
    assert "dog, red car" in with_entities and "How many dogs?" not in with_entities
    without = frame_question(" How many dogs? ")
    assert without.startswith("How many dogs?\n") and "enough" in without
    for text in (with_entities, without):
        assert "A. yes" in text and "B. no" in text


def test_times_of_all_sampled_frames_are_named():
    text = timestamps_text(12.5, [0, 4.25, 12.5])
    assert text == "The video lasts 12.50 seconds, and 3 frames were taken of it, at 0.00s, 4.25s, 12.50s."
    with pytest.raises(InputError, match="times is empty"):
        timestamps_text(1.0, [])


class Letters:
    """A tokenizer of characters, with a template if asked for."""

    def __init__(self, template: str | None = None) -> None:
        self.chat_template = template

    def __call__(self, text: str, return_tensors: str, add_special_tokens: bool) -> Batch:
        self.special = add_special_tokens
        return Batch(input_ids=torch.tensor([[ord(c) for c in text]]))

    def apply_chat_template(self, turns: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize and add_generation_prompt
        return f"<{turns[0]['role']}>{turns[0]['content']}"

    def decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(map(chr, ids.tolist()))


class Batch(dict):
    def to(self, device: object) -> Batch:
        return self


@pytest.mark.parametrize("template", [None, "x"])
def test_a_text_planner_returns_the_answer_alone(template):
    asked = {}

    def generate(input_ids: torch.Tensor, **options: object) -> torch.Tensor:
        asked.update(options, text="".join(map(chr, input_ids[0].tolist())))
        return torch.cat([input_ids, torch.tensor([[ord(c) for c in "step 1: no"]])], 1)

    tokenizer = Letters(template)
    planner = TextPlanner(SimpleNamespace(generate=generate, device="cpu"), SimpleNamespace(tokenizer=tokenizer), 7)
    assert planner("hello") == "step 1: no"
    assert asked == {"max_new_tokens": 7, "do_sample": False, "text": "<user>hello" if template else "hello"}
    assert tokenizer.special == (template is None)
