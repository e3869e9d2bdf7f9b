"""The evaluation of video methods: what is shown, what is counted, and that the tower's shortcut changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mmtoken.compressors.registry import resolve
from mmtoken.datasets.moving_shapes import Clip, MovingShapes
from mmtoken.engine.session import compress
from mmtoken.errors import InputError
from mmtoken.evaluation import video, video_figures, video_results
from mmtoken.evaluation.video import Results, Setting, Towers, answer_offline, answer_streaming, held_out, shown
from mmtoken.models.tiny_llava_video import NetworkConfig, build_network, build_processor

SMALL = NetworkConfig(vision_layers=2, text_layers=3, width=32, heads=2)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(3)
    return build_network(SMALL).eval()


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return list(MovingShapes(31, 3, (8, 8)))


@pytest.fixture(scope="module")
def towers(model: torch.nn.Module, clips: list[Clip]) -> Towers:
    made = Towers(model)
    made.compute(clips)
    return made


def test_frames_that_are_shown_are_evenly_spread(clips: list[Clip]) -> None:
    assert shown(clips[0], None) == list(range(8))
    assert shown(clips[0], 4) == [1, 3, 5, 7]
    assert shown(clips[0], 2) == [2, 6]
    assert shown(clips[0], 99) == list(range(8))


@pytest.mark.parametrize(
    "method", [None, "random", "dycoke", "fastv", "visionzip", {"class_path": "stccacher", "init_args": {"keep": 0.5}}]
)
def test_texts_are_those_of_the_plain_call(
    model: torch.nn.Module, clips: list[Clip], towers: Towers, method: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question by itself, through the processor and the tower, gives the text that is marked here."""
    processor = build_processor()
    if isinstance(method, str):
        method = resolve(method, keep=0.5)
    elif method is not None:
        method = resolve(method)
    seen: list[str] = []

    def mark(text: str, question: object) -> int:
        seen.append(text)
        return 0

    monkeypatch.setattr(video, "right", mark)
    found = answer_offline(model, processor, clips, towers, method, group=2)
    alone = []
    for clip in clips:
        for q in clip.questions:
            content = [{"type": "video"}, {"type": "text", "text": q.text}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            inputs = processor(videos=[clip.frames], text=text, return_tensors="pt", add_special_tokens=False)
            attached = compress(model, method) if method is not None else torch.no_grad()
            with attached:
                out = model.generate(**inputs, max_new_tokens=video.MAX_NEW_TOKENS, do_sample=False)  # type: ignore[operator]
            alone.append(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    same = np.mean([a == b for a, b in zip(seen, alone, strict=True)])
    assert same == 1.0
    assert len(found["correct"]) == len(alone)
    assert found["tokens"] <= 128


def test_fewer_frames_are_fewer_tokens(model: torch.nn.Module, clips: list[Clip], towers: Towers) -> None:
    found = answer_offline(model, build_processor(), clips, towers, None, frames=2)
    assert found["tokens"] == 32


def test_the_tower_is_itself_again_afterwards(towers: Towers) -> None:
    with towers.given():
        assert "forward" in vars(towers.tower)
    assert "forward" not in vars(towers.tower)


def test_streams_hold_what_they_may(model: torch.nn.Module, clips: list[Clip]) -> None:
    processor = build_processor()
    whole = answer_streaming(model, processor, clips[:1], Setting("all", memory=999))
    assert (whole["kv_tokens"], whole["frames_held"]) == (128, 8)
    half = answer_streaming(model, processor, clips[:1], Setting("half", memory=64))
    assert (half["kv_tokens"], half["frames_held"]) == (64, 4)
    thin = answer_streaming(model, processor, clips[:1], Setting("thin", "random", {"keep": 4}, memory=32))
    assert (thin["kv_tokens"], thin["frames_held"]) == (32, 8)
    few = answer_streaming(model, processor, clips[:1], Setting("few", frames=2, memory=32))
    assert (few["kv_tokens"], few["frames_held"]) == (32, 2)


def test_what_acts_in_streams_only_is_asked_there(model: torch.nn.Module, clips: list[Clip], tmp_path: Path) -> None:
    processor, results = build_processor(), Results(tmp_path / "video-streaming.json", {}, [])
    recalled = Setting("recalled", "rekv", {"keep": 2}, memory=32)
    noncausal = Setting("later frames", "evs", {"keep": 0.5}, memory=32)
    video.run_settings(
        [recalled, noncausal], results, lambda setting: answer_streaming(model, processor, clips[:1], setting)
    )
    assert results.content["results"]["recalled"]["kv_tokens"] == 32
    assert "looks at later frames" in results.content["refused"]["later frames"]


def test_settings_have_names_of_their_own_and_real_methods() -> None:
    for settings in (video.offline_settings(), video.streaming_settings(), video.videoscan_settings()):
        assert len({s.name for s in settings}) == len(settings)
        assert settings[0].role == "dense" or settings[0].method == "videoscan"
        for setting in settings:
            assert (setting.compressor() is None) == (setting.method is None)


def test_held_out_clips_are_not_those_of_training() -> None:
    test = held_out(1, 16)[0].frames
    assert not np.array_equal(test, MovingShapes(0, 1)[0].frames)
    assert not np.array_equal(test, MovingShapes(1, 1)[0].frames)
    assert len(held_out(1, 16, 12)[0].questions) == 12


def test_results_are_kept_and_go_on(tmp_path: Path) -> None:
    questions = [{"clip": 0, "type": "count", "age": 1, "answer": "2", "motion": 0.0}]
    head = {"weights": "1"}
    results = Results(tmp_path / "video-offline.json", head, questions)
    results.refuse("b", "no")
    results.put("a", {"correct": [1]})
    results.put("b", {"correct": [0]})
    again = Results(tmp_path / "video-offline.json", head, questions)
    assert again.has("a")
    assert again.content["refused"] == {}
    assert not Results(tmp_path / "video-offline.json", {"weights": "2"}, questions).has("a")
    assert not Results(tmp_path / "video-offline.json", head, []).has("a")


def test_shares_are_joined_in_order(tmp_path: Path) -> None:
    head, questions = {"weights": "1"}, [{"clip": 0}]
    names = [s.name for s in video.offline_settings()[:4]]
    for turn in (0, 1):
        share = Results(tmp_path / f"video-offline-{turn:02d}.json", head, questions)
        for name in names[turn::2]:
            share.put(name, {"correct": [turn]})
    found = video.joined(tmp_path, "offline")
    assert found is not None
    assert list(found["results"]) == names
    assert video.joined(tmp_path, "cacher") is None
    for turn, weights in ((0, "1"), (1, "2")):
        Results(tmp_path / f"video-quota-{turn:02d}.json", {"weights": weights}, questions).put("a", {})
    with pytest.raises(InputError, match="different"):
        video.joined(tmp_path, "quota")


def test_skipped_frames_take_the_last_computed_one() -> None:
    hidden = torch.arange(8.0).view(8, 1, 1)
    assert video._skipped([hidden], 0.5)[0].flatten().tolist() == [0, 0, 2, 2, 4, 4, 6, 6]
    assert video._skipped([hidden], 1.0)[0].flatten().tolist() == list(range(8))
    assert video._skipped([hidden], 0.1)[0].flatten().tolist() == [0] * 8


def test_errors_are_counted_per_kind_of_frame(clips: list[Clip]) -> None:
    dense = [torch.ones(8, 3, 2) for _ in clips]
    other = [value.clone() for value in dense]
    for clip, value in zip(clips, other, strict=True):
        for t, kind in enumerate(clip.camera):
            value[t] *= 1.5 if kind == "panning" else 1.0
    found = video._errors(clips, dense, other)
    assert found["static"] == found["cut"] == 0
    assert found.get("panning", 0.5) == 0.5


def test_scores_mark_the_frames_with_evidence(clips: list[Clip]) -> None:
    question = clips[0].questions[0]
    hold = {t for t, _ in question.evidence}
    rng = np.random.default_rng(0)
    assert video._evidence_scores(clips[0], question, 0.0, rng) == [1.0 if t in hold else 0.1 for t in range(8)]
    assert video._evidence_scores(clips[0], question, 1.0, rng) == [0.1 if t in hold else 1.0 for t in range(8)]


def write(folder: Path, seed: int, part: str, settings: list[tuple[Setting, list[int]]]) -> None:
    questions = [
        {"clip": i // 2, "type": "count" if i % 2 else "left", "age": 3 * i, "answer": "1", "motion": i / 20}
        for i in range(20)
    ]
    entries = {
        s.name: {"setting": s.to_dict(), "correct": marks, "tokens": 32.0, "layer_average": 32.0, "kv_tokens": 9.0,
                 "frames_held": 4.0}
        for s, marks in settings
    }  # fmt: skip
    content = {"kind": f"video-{part}", "model": f"some/seed{seed}", "weights": str(seed), "clips": 10, "frames": 16,
               "environment": {"versions": {}}, "questions": questions, "results": entries, "refused": {}}  # fmt: skip
    place = folder / f"seed{seed}"
    place.mkdir(exist_ok=True)
    (place / f"video-{part}-00.json").write_text(json.dumps(content))


@pytest.fixture
def evidence(tmp_path: Path) -> Path:
    good, bad = [1, 1, 1, 0] * 5, [1, 0, 0, 0] * 5
    names = [Setting("dense", role="dense"), Setting("random 0.125", "random", {"keep": 0.125}, role="control")]
    method = Setting("dycoke 0.05", "dycoke", {"keep": 0.05})
    for seed in (0, 1):
        write(tmp_path, seed, "offline", [(names[0], [1] * 20), (names[1], bad), (method, good if seed else bad)])
        live = [(Setting("everything", memory=1040, role="dense"), [1] * 20)]
        live += [(Setting("oldest leave 128", memory=128, role="control"), bad)]
        write(tmp_path, seed, "streaming", [*live, (Setting("dycoke 128", "dycoke", {"keep": 0.1}, memory=128), good)])
    return tmp_path


def test_seeds_are_averaged_and_compared_question_by_question(evidence: Path) -> None:
    part = video_results.gather(evidence)["offline"]
    assert list(part.runs) == ["seed0", "seed1"]
    found = part.accuracy("dycoke 0.05")
    assert (found.mean, found.low, found.high, found.runs) == (0.5, 0.25, 0.75, 2)
    assert part.accuracy("dycoke 0.05", kind="left").mean == pytest.approx(0.75 * 0.5 + 0.5 * 0.5, abs=0.3)
    ages = [part.accuracy("dense", ages=group).questions for group in video_results.AGES]
    assert ages == [5, 5, 5, 5]
    mean, low, high = part.difference("dycoke 0.05", "random 0.125")
    assert mean == pytest.approx(0.25)
    assert low <= mean <= high
    assert part.difference("dense", "dense") == (0, 0, 0)


def test_readings_say_what_the_numbers_say(evidence: Path) -> None:
    text = " ".join(video_results.reading("dycoke", video_results.gather(evidence)))
    assert "32 of 256 tokens: 0.50 (0.25 to 0.75 over 2 seeds)" in text
    assert "Random draw +0.25" in text
    assert "dycoke 128: 9 tokens of 4 frames held: 0.75" in text
    assert "oldest leave 128 +0.50" in text


def test_pictures_reports_and_cards_are_written(evidence: Path, tmp_path: Path) -> None:
    out, cards = tmp_path / "out", tmp_path / "cards"
    out.mkdir()
    (out / "README.md").write_text("a\n<!-- video -->\nSTALE\n<!-- end -->\nb\n")
    video_figures.main(["--evidence", str(evidence), "--out", str(out), "--cards", str(cards)])
    assert (out / "video-offline.png").stat().st_size > 1000
    assert (out / "video-streaming.png").stat().st_size > 1000
    assert "| dycoke 0.05 |" in (out / "video.md").read_text()
    card = (out / "README.md").read_text()
    assert "STALE" not in card
    assert card.startswith("a\n<!-- video -->\n") and card.endswith("<!-- end -->\nb\n")
    stored = json.loads((out / "video-offline.json").read_text())
    assert "some/" not in json.dumps(stored)
    again = video_results.gather(out)["offline"]
    assert again.accuracy("dycoke 0.05").mean == 0.5
    (folder,) = cards.iterdir()
    assert {file.name for file in folder.iterdir()} == {"video.md", "video.png"}
    assert "32 of 256 tokens" in (folder / "video.md").read_text()
