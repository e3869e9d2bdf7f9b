"""What an overlay shows as kept is the part of the picture that the kept token was made from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmtoken import compress
from mmtoken.compressors.base import Compressor, Context, Positions
from mmtoken.engine.report import Report
from mmtoken.errors import InputError, UnsupportedError
from mmtoken.evaluation.overlay import View, draw, overlays, side_by_side
from mmtoken.tokens import VisualTokens
from tests.backbones.processors import conversation, photograph, processor, video
from tests.backbones.tiny_models import build

GAP = 8


@dataclass(frozen=True)
class Pick(Compressor):
    """Keeps token `index` of the first item, `index + 1` of the second and so on (modulo N), separators not counted."""

    keep: int | float = 1
    positions: Positions = "keep"
    index: int = 0

    title: ClassVar[str] = "Pick"
    paper: ClassVar[str] = "for these tests"

    def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        eligible = tokens.eligible
        wanted = (self.index + torch.arange(len(eligible))) % eligible.sum(-1)
        return tokens.where(tokens.protected | eligible & (eligible.cumsum(-1) - 1 == wanted[:, None]))


@dataclass(frozen=True)
class Setup:
    """A model with its processor, and how to read the brightness of each token's patch from processed pixels."""

    family: str
    processor: Any
    model: Any

    def encode(self, *media: Any) -> dict[str, Tensor]:
        turns = [conversation("What is shown?", *media)]
        inputs = self.processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")
        return dict(inputs)

    def report(self, index: int, *media: Any) -> Report:
        with compress(self.model, Pick(index=index)) as session, torch.no_grad():
            self.model(**self.encode(*media))
        return session.report

    def lit(self, picture: Image.Image) -> list[Tensor]:
        """Per view of the picture float[N]: how much of what each token is made from is white, the rest being black."""
        black, white, given = (
            self.brightness(shown)
            for shown in (*(Image.new("RGB", picture.size, c) for c in ("black", "white")), picture)
        )
        return [(g - b) / (w - b) for b, w, g in zip(black, white, given, strict=True)]

    def brightness(self, picture: Image.Image) -> list[Tensor]:
        """Per view of the picture float[N]: mean of the pixels that each token is made from."""
        inputs = self.encode(picture)
        pixels = inputs["pixel_values"]
        if "image_grid_thw" in inputs:  # patches of a merged token follow each other
            return [pixels.view(-1, 4 * pixels.shape[1]).mean(-1)]
        if self.family == "llava":
            return [_cells(pixels[0], 14)]
        if self.family == "llava_onevision":
            overview, *tiles = pixels[0]
            return [_cells(overview, 14), _cells(torch.cat(tiles, -1), 14)]
        return [_cells(tile, 14 if self.family == "idefics3" else 16) for tile in pixels[0]]


def _cells(pixels: Tensor, side: int) -> Tensor:
    """float[N]: means over square cells of a picture float[3, H, W]."""
    return torch.nn.functional.avg_pool2d(pixels.mean(0)[None], side).flatten()


@pytest.fixture(scope="module")
def setups(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Setup]:
    families = ("llava", "llava_onevision", "qwen2_5_vl", "idefics3")
    return {
        family: Setup(family, processor(family, tmp_path_factory.mktemp(family)), build(family, layers=1))
        for family in families
    }


def outlined(panel: NDArray[np.uint8]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of what is outlined in a panel uint8[H, W, 3]."""
    rows, columns = np.nonzero((panel == (255, 214, 64)).all(-1))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def only(seen: Tensor, index: int) -> bool:
    """Whether token `index`, and no other one, lies under the lamp; edges are blurred where pictures are resized."""
    others = torch.cat([seen[:index], seen[index + 1 :]])
    return bool(seen[index] > 0.8 and others.max() < 0.2)


def panels(overlay: Image.Image, count: int) -> list[NDArray[np.uint8]]:
    width = (overlay.width - GAP * (count - 1)) // count
    return [np.asarray(overlay)[:, i * (width + GAP) : i * (width + GAP) + width] for i in range(count)]


def lamp(size: tuple[int, int], cell: tuple[int, int, int, int], panel: NDArray[np.uint8]) -> Image.Image:
    """A black picture of `size`, white where the panel has its cell."""
    picture = np.zeros((size[1], size[0], 3), np.uint8)
    left, top, right, bottom = (
        round(edge * full / shown)
        for edge, full, shown in zip(cell, (*size, *size), (*panel.shape[1::-1], *panel.shape[1::-1]), strict=True)
    )
    picture[top:bottom, left:right] = 255
    return Image.fromarray(picture)


@pytest.mark.parametrize("size", [(192, 128), (128, 192), (160, 160)])
@pytest.mark.parametrize("index", [0, 2, 5, 11, 15])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_kept_token_comes_from_where_the_overlay_shows_it(
    setups: dict[str, Setup], family: str, index: int, size: tuple[int, int]
) -> None:
    setup, picture = setups[family], photograph(1, size)
    (overlay,) = overlays(setup.report(index, picture), [picture], setup.processor)
    panel = np.asarray(overlay)
    assert max(overlay.size) == 384 and overlay.width * size[1] == pytest.approx(overlay.height * size[0], rel=0.01)
    (seen,) = setup.lit(lamp(size, outlined(panel), panel))
    assert only(seen, index)


@pytest.mark.parametrize("index", [0, 3, 6, 15])
def test_tiles_and_the_whole_image_are_two_panels(setups: dict[str, Setup], index: int) -> None:
    setup, size = setups["idefics3"], (192, 128)
    picture = photograph(1, size)
    report = setup.report(index, picture)
    assert report.tokens_in == [16] * 5 and report.tokens_out == [1] * 5
    (overlay,) = overlays(report, [picture], setup.processor)
    tiles, whole = panels(overlay, 2)
    assert only(setup.lit(lamp(size, outlined(whole), whole))[4], (index + 4) % 16)
    half_height, half_width = tiles.shape[0] // 2, tiles.shape[1] // 2
    for number in range(4):
        row, column = divmod(number, 2)
        alone = np.zeros_like(tiles)
        place = np.s_[row * half_height : (row + 1) * half_height, column * half_width : (column + 1) * half_width]
        alone[place] = tiles[place]
        seen = setup.lit(lamp(size, outlined(alone), tiles))
        assert only(torch.cat(seen[:4]), number * 16 + (index + number) % 16)


@pytest.mark.parametrize("index", [0, 4, 9, 14, 15, 26])
def test_any_resolution_views_are_two_panels_and_newlines_do_not_count(setups: dict[str, Setup], index: int) -> None:
    """9 tokens of the whole image, then 3 rows of 6 that each end in a newline."""
    setup, size = setups["llava_onevision"], (168, 84)
    picture = photograph(1, size)
    report = setup.report(index, picture)
    assert report.tokens_in == [9 + 18] and report.tokens_out == [1]
    (overlay,) = overlays(report, [picture], setup.processor)
    both = panels(overlay, 2)
    view = int(index >= 9)
    assert not (both[1 - view] == (255, 214, 64)).all(-1).any()
    seen = setup.lit(lamp(size, outlined(both[view]), both[view]))
    assert only(seen[view], index - 9 * view)


@pytest.mark.parametrize("step", [0, 1])
def test_a_video_is_one_panel_per_temporal_step(setups: dict[str, Setup], step: int) -> None:
    setup, clip = setups["qwen2_5_vl"], video(1)
    steps, rows, columns = (int(n) for n in setup.encode(clip)["video_grid_thw"][0])
    rows, columns = rows // 2, columns // 2
    row, column = 1, 2
    report = setup.report((step * rows + row) * columns + column, clip)
    (overlay,) = overlays(report, [[Image.fromarray(frame) for frame in clip]], setup.processor)
    found = panels(overlay, steps)
    assert steps == 2 and not (found[1 - step] == (255, 214, 64)).all(-1).any()
    height, width = found[step].shape[:2]
    expected = (
        width * column / columns,
        height * row / rows,
        width * (column + 1) / columns,
        height * (row + 1) / rows,
    )
    assert outlined(found[step]) == pytest.approx(expected, abs=1)


def test_what_is_kept_is_bright_what_is_dropped_dim_and_what_is_cropped_nearly_black(setups: dict[str, Setup]) -> None:
    setup = setups["llava"]
    white = Image.new("RGB", (192, 128), "white")
    (overlay,) = overlays(setup.report(5, white), [white], setup.processor)
    panel = np.asarray(overlay)
    left, top, right, bottom = outlined(panel)
    assert (panel[top + 1 : bottom - 1, left + 1 : right - 1] == 255).all()
    outside = np.ones(panel.shape[:2], bool)
    outside[top:bottom, left:right] = False
    assert panel[outside].max() < 100
    # The processor crops the middle 128 of 192 columns: a sixth is lost on each side.
    assert panel[:, : 384 // 6 - 1].max() < 30 and panel[:, -384 // 6 + 1 :].max() < 30
    assert panel[:, 384 // 6 + 1 : -384 // 6 - 1].min() > 60


def test_two_pictures_give_two_overlays_in_order(setups: dict[str, Setup]) -> None:
    setup = setups["llava"]
    white, black = Image.new("RGB", (64, 64), "white"), Image.new("RGB", (96, 64), "black")
    first, second = overlays(setup.report(3, white, black), [white, black], setup.processor)
    assert (first.size, second.size) == ((384, 384), (384, 256))
    assert np.asarray(first).min() > 60 and np.median(np.asarray(second)) == 0
    assert outlined(np.asarray(first)) == (288, 0, 384, 96)  # token 3 ends the first of four rows
    assert outlined(np.asarray(second)) == (64, 64, 128, 128)  # token 4 begins the second, cropped at the sides


def test_the_tiles_of_a_second_picture_come_after_all_views_of_the_first(setups: dict[str, Setup]) -> None:
    setup, first, second = setups["idefics3"], photograph(1, (192, 128)), photograph(2, (128, 192))
    drawn = overlays(setup.report(0, first, second), [first, second], setup.processor)
    for overlay, picture, item in zip(drawn, (first, second), (4, 9), strict=True):
        whole = panels(overlay, 2)[1]
        assert only(setup.lit(lamp(picture.size, outlined(whole), whole))[4], item)


def test_pictures_that_were_not_in_the_call_are_refused(setups: dict[str, Setup]) -> None:
    picture = photograph(1)
    for family in ("llava", "idefics3"):
        setup = setups[family]
        report = setup.report(0, picture)
        for pictures in ([], [picture] * 2):
            with pytest.raises(InputError, match=f"pictures are {len(pictures)}, .* give the pictures of the call"):
                overlays(report, pictures, setup.processor)


def test_a_report_without_tokens_is_refused(setups: dict[str, Setup]) -> None:
    setup, picture = setups["llava"], photograph(1)
    report = dataclasses.replace(setup.report(0, picture), tokens=None)
    with pytest.raises(InputError, match="report has no tokens"):
        overlays(report, [picture], setup.processor)


def test_tokens_on_no_known_grid_are_refused(setups: dict[str, Setup]) -> None:
    setup, picture = setups["llava"], photograph(1)
    report = setup.report(0, picture)
    assert report.tokens is not None
    report.tokens = dataclasses.replace(report.tokens, grid=(None,))
    with pytest.raises(UnsupportedError, match="tokens of item 0 lie on no grid"):
        overlays(report, [picture], setup.processor)


# The drawing itself


def test_cells_cover_the_box_without_gaps_or_overlaps() -> None:
    white = Image.new("RGB", (100, 70), "white")
    everything = draw(white, [View((0, 0, 1, 1), 3, 7, frozenset(range(21)))])
    assert everything.size == (384, 269)
    pixels = np.asarray(everything)
    outline = (pixels == (255, 214, 64)).all(-1)
    assert (outline | (pixels == 255).all(-1)).all()
    assert outline[0].all() and outline[-1].all() and outline[:, 0].all() and outline[:, -1].all()
    nothing = np.asarray(draw(white, [View((0, 0, 1, 1), 3, 7, frozenset())]))
    assert nothing.max() < 100


@pytest.mark.parametrize(
    ("size", "expected"), [((10, 5), (384, 192)), ((500, 400), (500, 400)), ((4096, 2), (1024, 1))]
)
def test_pictures_are_shown_at_a_size_that_can_be_looked_at(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert draw(Image.new("RGB", size), [View((0, 0, 1, 1), 2, 2, frozenset({0}))]).size == expected


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_pictures_of_any_mode_are_drawn(mode: str) -> None:
    assert draw(Image.new(mode, (20, 20)), [View((0, 0, 1, 1), 2, 2, frozenset({3}))]).mode == "RGB"


def test_pictures_of_different_heights_stand_side_by_side_on_white() -> None:
    sheet = side_by_side([Image.new("RGB", (10, 20)), Image.new("RGB", (30, 5))], gap=4)
    assert sheet.size == (44, 20)
    pixels = np.asarray(sheet)
    assert (pixels[:, 10:14] == 255).all() and (pixels[5:, 14:] == 255).all() and (pixels[:5, 14:] == 0).all()
