"""tiny-openvla: packed instructions equal instructions given alone; what is exported acts as what was trained."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import mmtoken
from mmtoken.cli.main import main
from mmtoken.datasets.demonstrations import Demonstration, DemonstrationBatches
from mmtoken.datasets.tabletop import BASE_SIZE, ITEM_SIZE, SIZE, TEMPLATES, Thing
from mmtoken.errors import CheckpointError
from mmtoken.models.tiny_openvla import NetworkConfig, TinyOpenVLA, build_network, build_processor, export
from mmtoken.models.tiny_openvla.objective import GUIDED_HEADS
from mmtoken.models.tiny_openvla.packing import ActionBatch, encode, pack, pixels, soft_targets
from mmtoken.models.tiny_openvla.processor import BINS, IMAGE_ID, SPACE_ID, UNK_ID, VISUAL_TOKENS, VOCABULARY, WORDS

SMALL = NetworkConfig(vision_layers=3, vision_width=32, text_layers=2, width=32, heads=2)


@pytest.fixture(scope="module")
def objective() -> TinyOpenVLA:
    return TinyOpenVLA(SMALL, word_layer=1, goal_layer=1).eval()


@pytest.fixture(scope="module")
def demonstrations() -> list[Demonstration]:
    return DemonstrationBatches(seed=31, size=6)[0]


@pytest.fixture(scope="module")
def batch(demonstrations: list[Demonstration]) -> ActionBatch:
    return pack(demonstrations)


def test_the_processor_makes_the_pixels_and_the_prompt_of_training(demonstrations: list[Demonstration]) -> None:
    processor = build_processor()
    d = demonstrations[0]
    for text in d.instructions:
        made = processor(text=processor.prompt(text), images=d.image)
        ids = made["input_ids"][0].tolist()
        assert ids.count(IMAGE_ID) == VISUAL_TOKENS and ids[-1] == SPACE_ID and UNK_ID not in ids
        one = encode(text, d.actions[0])
        assert ids[-one.prompt :] == list(one.ids[: one.prompt])
        torch.testing.assert_close(made["pixel_values"], pixels(d.image[None]), rtol=1e-5, atol=1e-5)


def test_instructions_differ_in_length_and_words_have_ids_of_their_own() -> None:
    lengths = {len(t.format(item="red ring", base="blue tray").split()) for t in TEMPLATES}
    assert len(lengths) == len(TEMPLATES)
    assert len(set(VOCABULARY)) == len(VOCABULARY) < WORDS - BINS


def test_packed_instructions_equal_instructions_given_alone(
    objective: TinyOpenVLA, demonstrations: list[Demonstration], batch: ActionBatch
) -> None:
    processor = build_processor()
    with torch.no_grad():
        found, *_ = objective.decode(objective.network.vision_backbone(batch.pixels), batch)
    at = 0
    for d in demonstrations[:2]:
        for text, action in zip(d.instructions, d.actions, strict=True):
            made = processor(text=processor.prompt(text), images=d.image)
            one = encode(text, action)
            ids = torch.cat([made["input_ids"], torch.tensor([one.ids[one.prompt : -1]])], dim=1)
            with torch.no_grad():
                logits = objective.network(input_ids=ids, pixel_values=made["pixel_values"]).logits[0, -3:]
            alone = logits.log_softmax(-1)[:, WORDS - 1 - torch.arange(BINS)]
            torch.testing.assert_close(found[at : at + 3], alone, rtol=1e-4, atol=1e-4)
            at += 3


def test_tokens_of_actions_are_those_of_the_models_codec(objective: TinyOpenVLA) -> None:
    codec = objective.network.codec
    numbers = torch.linspace(-1, 1, 401)[:-1]
    ours = torch.tensor([encode("put red ring on blue tray", np.array([n], np.float32)).ids[-1] for n in numbers])
    # Edges in float64 and float32 may round to either side.
    assert (ours - codec.encode(numbers)).abs().max() <= 1
    assert (codec.decode(ours) - numbers).abs().max() <= 1 / BINS + 1e-6
    assert encode("", np.array([1.0], np.float32)).ids[-1] == WORDS - BINS  # the last bin, no token beyond it


def test_soft_targets_have_their_top_and_their_mean_at_the_number() -> None:
    numbers = torch.tensor([-1.0, -0.313, 0.0, 0.5, 1.0])
    targets = soft_targets(numbers, 6.0)
    centres = (torch.arange(BINS) + 0.5) * 2 / BINS - 1
    torch.testing.assert_close(targets.sum(1), torch.ones(5))
    assert (centres[targets.argmax(1)] - numbers).abs().max() <= 1 / BINS + 1e-6
    torch.testing.assert_close((targets * centres).sum(1)[1:4], numbers[1:4], rtol=0, atol=1e-4)


def test_patch_labels_by_counting_pixels(demonstrations: list[Demonstration], batch: ActionBatch) -> None:
    def covered(thing: Thing, size: int, shift: tuple[int, int], patch: int) -> float:
        """Share of a patch under the square of a thing, on a grid of tenths of a pixel."""
        fine = np.arange(0, 8, 0.1) + 0.05
        row, column = divmod(patch, 8)
        x, y = thing.at[0] + shift[0], thing.at[1] + shift[1]
        across, down = (abs(fine + 8 * k - c) <= size / 2 for k, c in ((column, x), (row, y)))
        return float(across.mean() * down.mean())

    for b, d in enumerate(demonstrations):
        for things, size, first in ((d.scene.items, ITEM_SIZE, 0), (d.scene.bases, BASE_SIZE, 2)):
            for patch in range(VISUAL_TOKENS):
                shares = [covered(t, size, d.camera, patch) for t in things]
                if abs(max(shares) - 0.2) < 0.03 or (len(shares) > 1 and np.ptp(sorted(shares)[-2:]) < 0.03):
                    continue  # too close to tell on this grid
                there = max(shares) >= 0.2
                assert (batch.classes[first, b, patch] > 0) == (batch.classes[first + 1, b, patch] > 0) == there
                if there:
                    best = things[int(np.argmax(shares))]
                    expected = [(a + s) / 32 - 1 for a, s in zip(best.at, d.camera, strict=True)]
                    np.testing.assert_allclose(batch.places[b, patch, first : first + 2], expected, atol=1e-5)


def test_pointers_stand_where_the_words_are(demonstrations: list[Demonstration], batch: ActionBatch) -> None:
    for b, d in enumerate(demonstrations):
        for q, order in enumerate(d.orders):
            item, base, last = (int(batch.packed.text[b, i]) for i in batch.readers[b, q])
            assert VOCABULARY[item] == d.scene.items[order.item].color
            assert VOCABULARY[base] == d.scene.bases[order.base].color
            assert last == SPACE_ID
            assert (batch.packed.question[b, batch.readers[b, q]] == q).all()
            where = batch.points[b, q].numpy() * 8 - np.array(d.camera)
            carrying = d.scene.held == order.item
            goal = (d.scene.bases[order.base] if carrying else d.scene.items[order.item]).at
            expected = [d.scene.items[order.item].at, d.scene.bases[order.base].at, goal, d.scene.gripper]
            np.testing.assert_allclose(where, expected, atol=1e-4)
            assert ((batch.points >= 0) & (batch.points <= SIZE / 8)).all()


def test_attention_is_guided_to_what_is_named(objective: TinyOpenVLA, batch: ActionBatch) -> None:
    """Loops over pictures, instructions and heads, with a Gaussian written out."""
    with torch.no_grad():
        _, _, attention = objective.decode(objective.network.vision_backbone(batch.pixels), batch)
        found = float(objective.guide_loss(attention, batch))
    total = 0.0
    for number, layer in enumerate((objective.word_layer, objective.word_layer, objective.goal_layer)):
        losses = []
        for b in range(len(batch.pixels)):
            for q in range(6):
                x, y = batch.points[b, q, number].tolist()
                weights = [math.exp(-((x - k % 8 - 0.5) ** 2 + (y - k // 8 - 0.5) ** 2) / 0.5) for k in range(64)]
                for head in range(GUIDED_HEADS):
                    paid = attention[layer - 1][b, head, int(batch.readers[b, q, number])].tolist()
                    losses.append(
                        -sum(w * math.log(a + 1e-6) for w, a in zip(weights, paid, strict=True)) / sum(weights)
                    )
        total += sum(losses) / len(losses)
    assert found == pytest.approx(total, rel=1e-4)


def test_the_tower_is_trained_first(objective: TinyOpenVLA, batch: ActionBatch) -> None:
    assert set(objective.losses(batch, objective.tower_steps - 1)) == {"patches"}
    assert set(objective.losses(batch, objective.tower_steps)) == {"patches", "actions", "pointing", "guiding"}
    assert all(torch.isfinite(v) for v in objective.losses(batch).values())


def test_fit_trains_and_what_is_exported_acts_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path(__file__).parents[2] / "models/tiny_openvla/recipe.yaml"
    small = [f"--model.network.{name}={value}" for name, value in vars(SMALL).items()]
    checkpoints = tmp_path / "checkpoints"
    settings = [
        f"--trainer.default_root_dir={tmp_path}",
        f"--trainer.logger.init_args.save_dir={tmp_path}",
        f"--trainer.callbacks.dirpath={checkpoints}",
        "--trainer.callbacks.every_n_train_steps=3",
        "--trainer.max_steps=3",
        "--trainer.log_every_n_steps=1",
        "--trainer.val_check_interval=3",
        "--model.tower_steps=1",
        "--model.word_layer=1",
        "--model.goal_layer=1",
        "--data.size=4",
        "--data.validation_batches=1",
    ]
    assert main(["fit", "--config", str(recipe), *settings, *small]) == 0
    log = next(tmp_path.rglob("metrics.csv")).read_text()
    assert "train/actions" in log and "val/dx_off" in log
    folder = export(checkpoints / "last.ckpt", tmp_path / "model", config=SMALL, dtype=torch.float32)
    model, processor = mmtoken.load(folder)
    d = DemonstrationBatches(seed=32, size=1)[0][0]
    prompts = [processor.prompt(text) for text in d.instructions[:3]]
    inputs = processor(text=prompts, images=[d.image] * 3)
    tokens = model.predict_tokens(**inputs)
    assert tokens.shape == (3, 1, 3)
    trained = build_network(SMALL)
    state = torch.load(checkpoints / "last.ckpt", weights_only=True)["state_dict"]
    trained.load_state_dict({k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")})
    with torch.no_grad():
        expected, found = trained.eval()(**inputs).logits, model(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"none\.ckpt"):
        export(tmp_path / "none.ckpt", tmp_path / "other")
    capsys.readouterr()
