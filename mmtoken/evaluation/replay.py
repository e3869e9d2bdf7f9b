"""A page that replays episodes: what the camera saw, which tokens were kept, what the arm did.

    python -m mmtoken.evaluation.replay --seed 7 --keep 0.25 --out replay.html

runs the same episode of `PickPlace` dense and with some compressors, and writes one HTML file that loads nothing and
works without a script. Bright patches were kept; the dial in the corner shows the way of the action, and its rim is
red when the arm grips.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

import mmtoken
from mmtoken.compressors.base import Compressor
from mmtoken.compressors.registry import resolve
from mmtoken.compressors.vlapruner import VLAPruner
from mmtoken.control.episode import Episode
from mmtoken.control.policy import Policy
from mmtoken.datasets.pick_place import PickPlace
from mmtoken.errors import MMTokenError
from mmtoken.evaluation.film import encode
from mmtoken.evaluation.overlay import View, draw
from mmtoken.hub import load
from mmtoken.wholefile import check_target, whole_file

SIDE = 192
"""Pixels of a frame on the page."""

_STYLE = Path(mmtoken.__file__).parent / "assets" / "demo" / "style.css"
_DIAL, _MOVE, _GRIP, _OPEN = (20, 20, 20), (255, 255, 255), (235, 60, 60), (90, 220, 120)


@dataclass(frozen=True)
class Moment:
    """One step.

    Attributes:
        image: uint8[H, W, 3], what the camera saw.
        action: float32[3], dx, dy and grip.
        kept: raster indices of the tokens that the last layers saw; all when nothing is pruned.
        grid: rows and columns of tokens.
        attention: float32[N] that the action paid to the tokens, or None where no one recorded it.
    """

    image: NDArray[np.uint8]
    action: NDArray[np.float32]
    kept: tuple[int, ...]
    grid: tuple[int, int]
    attention: NDArray[np.float32] | None


@dataclass
class Take:
    """One episode with one compressor.

    Attributes:
        title: of the compressor.
        instruction: in words.
        success: whether the item ended where it should.
        moments: its steps.
    """

    title: str
    instruction: str
    success: bool = False
    moments: list[Moment] = field(default_factory=list)


def film(policy: Policy, compressor: Compressor | None, seed: int, title: str) -> Take:
    """Run the episode of a seed and note what happened."""
    world = PickPlace()
    seen, _ = world.reset(seed=seed)
    take = Take(title, seen["instruction"])
    side = round(policy.processor.num_image_tokens**0.5)
    everything = tuple(range(side * side))
    with Episode(policy, compressor) as episode:
        over = False
        while not over:
            action = episode.act(seen["image"], seen["instruction"])
            kept = everything if compressor is None else tuple(episode.report.kept[0].tolist())
            looked = episode.history[-1, 0] if len(episode.history) else None
            take.moments.append(Moment(seen["image"], action, kept, (side, side), looked))
            seen, _, done, late, info = world.step(action)
            take.success, over = bool(info["success"]), bool(done or late)
    return take


def paint(moment: Moment, side: int = SIDE) -> Image.Image:
    """The picture with kept tokens bright, and in its corner a dial: the way of the action, its rim for the grip."""
    rows, columns = moment.grid
    shown = draw(Image.fromarray(moment.image), [View((0.0, 0.0, 1.0, 1.0), rows, columns, frozenset(moment.kept))])
    shown = shown.resize((side, side), Image.Resampling.LANCZOS)
    dx, dy, grip = (float(value) for value in moment.action)
    radius, middle, pen = side / 10, side - side / 10 - 3, ImageDraw.Draw(shown)
    box = (middle - radius, middle - radius, middle + radius, middle + radius)
    pen.ellipse(box, fill=_DIAL, outline=_GRIP if grip > 0 else _OPEN, width=2)
    # The rim is reached by an action of length one along an axis.
    end = middle + dx * radius * 0.8, middle + dy * radius * 0.8
    pen.line((middle, middle, *end), fill=_MOVE, width=2)
    pen.ellipse((end[0] - 2, end[1] - 2, end[0] + 2, end[1] + 2), fill=_MOVE)
    return shown


def heat(moment: Moment, side: int = SIDE) -> Image.Image | None:
    """What the action looked at, the brighter the more; None where no one recorded it."""
    if moment.attention is None:
        return None
    grid = moment.attention.reshape(moment.grid)
    values = (255 * np.sqrt(grid / max(float(grid.max()), 1e-12))).astype(np.uint8)
    cells = np.stack([values, (values * 0.75).astype(np.uint8), (values * 0.2).astype(np.uint8)], -1)
    return Image.fromarray(cells).resize((side, side), Image.Resampling.NEAREST)


def page(takes: Sequence[Take], seed: int) -> str:
    """The whole page."""
    parts = [_take(number, take) for number, take in enumerate(takes)]
    style = (
        ".strip{display:grid;grid-template-columns:repeat(auto-fill,minmax(9rem,1fr));gap:.8rem;margin:.8rem 0}"
        ".strip img{width:100%;image-rendering:pixelated}.film{float:right;margin:0 0 1rem 1.5rem}"
        ".strip figcaption{font-variant-numeric:tabular-nums}section{clear:both}"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n<title>mmtoken: an episode with fewer visual tokens</title>\n'
        f"<style>\n{_STYLE.read_text()}{style}\n</style>\n</head>\n<body>\n<header>\n<h1>{escape(takes[0].instruction)}</h1>\n"
        f'<p class="lead">The same episode of PickPlace (seed {seed}) by one policy: the same scene, camera and '
        "instruction; what differs is how much of each picture the policy's decoder sees in its last layers. Bright "
        "patches were kept. The dial in the corner shows which way the arm goes in this step; its rim is red when it "
        "grips and green when it opens. Where a method records what the action looked at, that is the small map "
        "below.</p>\n</header>\n"
        f"<main>\n{''.join(parts)}</main>\n</body>\n</html>\n"
    )


def _take(number: int, take: Take) -> str:
    pictures = [paint(moment) for moment in take.moments]
    total = take.moments[0].grid[0] * take.moments[0].grid[1]
    mean = sum(len(moment.kept) for moment in take.moments) / len(take.moments)
    figures = []
    for step, (moment, picture) in enumerate(zip(take.moments, pictures, strict=True)):
        dx, dy, grip = (float(value) for value in moment.action)
        state = "closes" if grip > 0 else "opens"
        looked = heat(moment)
        below = "" if looked is None else _image(looked, f"what the action of step {step + 1} looked at", 64)
        figures.append(
            f"<figure>{_image(picture, f'step {step + 1}, {len(moment.kept)} of {total} tokens kept', SIDE)}"
            f"<figcaption>{step + 1}: {len(moment.kept)} tokens<br>dx {dx:+.2f} dy {dy:+.2f}, {state}</figcaption>"
            f"{below}</figure>"
        )
    verdict = '<span class="right">success</span>' if take.success else '<span class="wrong">no success</span>'
    gif = base64.b64encode(encode(pictures, 350, 1500)).decode()
    return (
        f'<section aria-labelledby="take{number}">\n<h2 id="take{number}">{escape(take.title)}: {verdict} after '
        f"{len(take.moments)} steps</h2>\n"
        f'<img class="film" src="data:image/gif;base64,{gif}" alt="the whole episode" width="{SIDE}" height="{SIDE}">'
        f"<p>{mean:.1f} of {total} tokens left after the last cut, averaged over its steps.</p>\n"
        f'<div class="strip">{"".join(figures)}</div>\n</section>\n'
    )


def _image(picture: Image.Image, alt: str, width: int) -> str:
    buffer = io.BytesIO()
    picture.quantize(64, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}" width="{width}" loading="lazy">'


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mmtoken.evaluation.replay", description=__doc__)
    parser.add_argument("--model", default="tiny-openvla", help="zoo entry or folder")
    parser.add_argument("--seed", type=int, default=0, help="of the episode")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--compressors", default="vlapruner,random", help="names, with commas; dense comes first")
    parser.add_argument("--layer", type=int, default=1, help="where VLA-Pruner cuts")
    parser.add_argument("--out", default="replay.html", help="the file")
    options = parser.parse_args(argv)
    target = check_target(options.out, "out", ".html")
    policy = Policy(*load(options.model))
    plans: list[tuple[str, Compressor | None]] = [("Dense", None)]
    for name in options.compressors.split(","):
        compressor = resolve({"class_path": name, "init_args": {"keep": options.keep}})
        if name == "vlapruner":
            compressor = VLAPruner(keep=options.keep, layer=options.layer, action_tokens=policy.action_length)
        plans.append((f"{compressor.title}, {100 * options.keep:g} % kept", compressor))
    takes = [film(policy, compressor, options.seed, title) for title, compressor in plans]
    with whole_file(target) as file:
        file.write_text(page(takes, options.seed))
    sys.stdout.write(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB)\n")


if __name__ == "__main__":
    try:
        main()
    except MMTokenError as error:
        sys.exit(f"error: {error}")
