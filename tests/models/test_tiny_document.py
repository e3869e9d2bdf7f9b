"""tiny-document: training computes what the exported model computes, and the exported model is upstream's own."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Idefics3ForConditionalGeneration

from mmtoken.datasets.document_pages import CHARACTERS, LABELS, REGION, DocumentPages
from mmtoken.errors import CheckpointError
from mmtoken.evaluation.benchmarks import ask
from mmtoken.models.tiny_document import NetworkConfig, TinyDocument, build_processor, export
from mmtoken.models.tiny_document.objective import TensorBatch
from mmtoken.models.tiny_document.packing import encode, kind_labels, patch_labels, prefix_ids, tiles

PAGES = [DocumentPages(seed=3, size=40)[i] for i in range(6)]
SMALL = NetworkConfig(vision_layers=2, text_layers=2, width=32, heads=2)


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def through_processor(processor, page, question):
    prompt = processor.apply_chat_template(ask(question), add_generation_prompt=True)
    return processor(text=prompt, images=Image.fromarray(page.image), return_tensors="pt")


def test_tiles_and_prompts_are_those_of_the_processor(processor):
    assert {(page.rows, page.columns) for page in PAGES} == {(3, 2), (2, 3)}
    mine = tiles(PAGES)
    for number, page in enumerate(PAGES):
        for question in page.questions:
            inputs = through_processor(processor, page, question.text)
            one = encode(question.text, question.answer, question.type)
            assert inputs["input_ids"][0].tolist() == [*prefix_ids(page.rows, page.columns), *one.ids[: one.prompt]]
            answer = processor.decode(one.ids[one.prompt :], skip_special_tokens=True)
            assert answer == question.answer and processor.tokenizer.unk_token_id not in one.ids
        # The thumbnail is rounded to whole grey levels, one of which is 2 / 255 here.
        torch.testing.assert_close(inputs["pixel_values"][0][:-1], mine[number][:-1], rtol=0, atol=1e-6)
        torch.testing.assert_close(inputs["pixel_values"][0][-1], mine[number][-1], rtol=0, atol=1.01 * 2 / 255)


@torch.no_grad()
def test_packed_training_computes_what_the_model_computes_for_each_question_alone(processor):
    objective = TinyDocument(SMALL).eval()
    batch = TensorBatch.of(PAGES[:3])
    found = objective.answer_logits(objective.states(batch), batch)
    rows = torch.nonzero(batch.packed.labels >= 0)
    for number, page in enumerate(PAGES[:3]):
        for q, question in enumerate(page.questions):
            inputs = through_processor(processor, page, question.text)
            inputs["pixel_values"] = batch.tiles[number : number + 1]
            expected = objective.network(**inputs).logits[0, -1]
            place = (rows[:, 0] == number) & (batch.packed.question[rows[:, 0], rows[:, 1]] == q)
            torch.testing.assert_close(found[place][0], expected, rtol=1e-5, atol=1e-5)


def test_patches_carry_what_is_drawn_on_them():
    labels, kinds = patch_labels(PAGES), kind_labels(PAGES)
    for b, page in enumerate(PAGES):
        for r, region in enumerate(page.regions):
            characters, fields, bars, heights = labels[:, b, r].view(4, 8, 8)
            if region.kind in ("blank", "text"):
                assert not labels[:, b, r].any()
            for c in region.characters:
                x, y = ((low + high) / 2 for low, high in ((c.box[0], c.box[2]), (c.box[1], c.box[3])))
                column, row = int(x - region.box[0]) // 6, int(y - region.box[1]) // 6
                # An "i" covers little of a patch, and a neighbour may cover more.
                if c.box[2] - c.box[0] >= 5 and int(characters[row, column]):
                    around = characters[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
                    assert CHARACTERS.index(c.text) + 1 in around
            shown = {LABELS[int(v) - 1] for v in fields.unique() if v}
            assert shown == {label for label, _, _ in region.fields}
            assert bool((bars > 0).eq(heights > 0).all()) and bool(bars.any()) == (region.kind == "figure")
            assert len(bars.unique()) == 1 + len(region.bars)
            whole = kinds[b].view(8, 8)
            cells = (page.rows, page.columns)
            middle = [int((at + 0.5) / of * 8) for at, of in zip(divmod(r, page.columns), cells, strict=True)]
            assert ("blank", "fields", "table", "figure", "text")[int(whole[middle[0], middle[1]])] == region.kind


def test_every_loss_teaches_the_part_that_it_is_for():
    objective = TinyDocument(SMALL)
    terms = objective.losses(TensorBatch.of(PAGES[:2]))
    assert list(terms) == ["answers", "characters", "fields", "bars", "heights", "kinds"]
    tower = objective.network.model.vision_model.encoder.layers[0].mlp.fc1.weight
    for name, term in terms.items():
        (gradient,) = torch.autograd.grad(term, tower, retain_graph=True)
        assert float(gradient.abs().max()) > 0, name
    without = TinyDocument(SMALL, field_weight=0.0).losses(TensorBatch.of(PAGES[:2]))
    assert float(without["fields"]) == float(without["heights"]) == 0 < float(without["characters"])


def checkpoint(folder, objective):
    file = folder / "last.ckpt"
    torch.save({"state_dict": objective.state_dict()}, file)
    return file


@torch.no_grad()
def test_an_exported_folder_loads_by_itself_and_answers_alike(tmp_path, processor):
    objective = TinyDocument(SMALL, seed=4)
    folder = export(checkpoint(tmp_path, objective), tmp_path / "model", config=SMALL, dtype=torch.float32)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model) is Idefics3ForConditionalGeneration and model.dtype == torch.float32
    inputs = through_processor(AutoProcessor.from_pretrained(folder), PAGES[0], "what is the total?")
    assert inputs["pixel_values"].shape == (1, 7, 3, REGION, REGION)
    torch.testing.assert_close(model(**inputs).logits, objective.network(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_training_can_go_on_from_the_weights_of_another_run(tmp_path):
    first = TinyDocument(SMALL, seed=1)
    file = checkpoint(tmp_path, first)
    second = TinyDocument(SMALL, seed=2, start_from=str(file))
    for a, b in zip(first.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(CheckpointError, match=r"none\.ckpt"):
        TinyDocument(SMALL, start_from=str(tmp_path / "none.ckpt"))


def test_a_checkpoint_of_another_size_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="of this size"):
        export(checkpoint(tmp_path, TinyDocument(SMALL)), tmp_path / "model")
