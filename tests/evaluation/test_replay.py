"""The replay page: one file, every step of the episode, what was kept and what the arm did."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gymnasium")

from mmtoken.compressors import VLAPruner
from mmtoken.datasets.pick_place import PickPlace
from mmtoken.errors import InputError
from mmtoken.evaluation import replay
from mmtoken.evaluation.replay import Moment, film, heat, main, page, paint
from tests.control.policies import policy

STATS = {"table": {"action": {"q01": [-1.0] * 3, "q99": [1.0] * 3}}}


def moment(action: list[float], kept: tuple[int, ...] = (0,)) -> Moment:
    grey = np.full((64, 64, 3), 200, np.uint8)
    return Moment(grey, np.float32(action), kept, (4, 4), np.linspace(0, 1, 16, dtype=np.float32))


def test_a_page_holds_every_step_and_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "PickPlace", lambda: PickPlace(limit=5))
    arm = policy(unnorm_key=None, norm_stats=STATS)
    pruned = film(arm, VLAPruner(keep=0.25, layer=1, action_tokens=3), 7, "VLA-Pruner <1>")
    takes = [film(arm, None, 7, "Dense"), pruned]
    assert [len(m.kept) for m in pruned.moments] == [16, 16, 16, 4, 4]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(takes[0].moments[:4], pruned.moments[:4], strict=True))
    text = page(takes, 7)
    assert text.count("<figure>") == 10 and "VLA-Pruner &lt;1&gt;: " in text and "<script" not in text
    assert set(re.findall(r'src="(\w+:\w+/\w+)', text)) == {"data:image/png", "data:image/gif"}
    assert not re.findall(r'(?:src|href)="(?!data:)', text) and "http" not in text
    assert f"{(3 * 16 + 2 * 4) / 5:.1f} of 16 tokens left" in text
    # Maps of attention are there where it was recorded.
    assert text.count('alt="what the action of step') == 5


def test_pictures_show_what_was_kept_and_which_way_the_arm_goes() -> None:
    shown = np.asarray(paint(moment([1.0, 0.0, -1.0], kept=(5,))))
    assert shown[72, 72].min() > 150 and shown[24, 24].max() < 100  # patch 5 is bright, patch 0 is not
    middle = 192 - 19 - 3
    right, left = shown[middle, middle + 8], shown[middle, middle - 8]
    assert right.min() > 200 and left.max() < 60
    gripping = np.asarray(paint(moment([0.0, 0.0, 1.0])))
    rim = (middle - 19, middle)
    assert gripping[rim][0] > 200 > gripping[rim][1] and shown[rim][1] > 200 > shown[rim][0]
    found = heat(moment([0.0] * 3))
    assert found is not None and np.asarray(found)[-1, -1, 0] == 255 and np.asarray(found)[0, 0].max() == 0


def test_a_page_that_could_not_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a \.html file"):
        main(["--out", str(tmp_path / "page.txt")])
