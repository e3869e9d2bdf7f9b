"""Does a ratio that follows the content of each crop beat a fixed one? TokenCorr on generated pages, at equal tokens.

Every entrant leaves the thumbnail whole and, on average over the pages, the same number of tokens per crop. TokenCorr's
threshold is set on validation pages so that its mean is that number; the others keep exactly that number of every crop,
except for the one that drops whole crops, whose threshold is set the same way. The test pages are looked at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from mmtoken.compressors import Downscale, Random, TokenCorr, UniformGrid
from mmtoken.compressors.base import Budget, Compressor, Context, Need, Positions
from mmtoken.compressors.tokencorr import density
from mmtoken.datasets.document_pages import DocumentPages, Page
from mmtoken.datasets.vqa_mix import split_seed
from mmtoken.engine.session import compress
from mmtoken.evaluation.benchmarks import TEST_SEED, ask
from mmtoken.evaluation.lineup import Entrant
from mmtoken.evaluation.overlay import overlays
from mmtoken.evaluation.pictures import COLOURS, check_matplotlib
from mmtoken.evaluation.tables import Table
from mmtoken.tokens import VisualTokens
from mmtoken.wholefile import whole_file

BUDGETS = (4, 8, 12)
"""Tokens per crop, of 16."""

ADAPTIVE = "TokenCorr, ratio by density"
FIXED = "TokenCorr's ranking, fixed ratio"
BLANK = "Dropping crops of low density"
"""Roles in the line-up; the others are named after their class."""


@dataclass(frozen=True)
class CropsOnly(Compressor):
    """Another compressor on the crops of a picture, the thumbnail left whole as TokenCorr leaves it.

    Attributes:
        inner: a compressor that acts before the language model.
    """

    keep: int | float
    positions: Positions = "keep"
    inner: Compressor = field(default_factory=lambda: Random(keep=1.0))

    title: ClassVar[str] = "Crops only"
    paper: ClassVar[str] = "control"
    year: ClassVar[int] = 2026
    needs: ClassVar[frozenset[Need]] = frozenset({"tower_attention", "tower_keys", "content_seed"})
    merges: ClassVar[bool] = True
    control: ClassVar[bool] = True
    budget: ClassVar[Budget] = "adaptive"
    identity_at_full: ClassVar[bool | str] = "that depends on the compressor inside"

    def tower_layers(self, depth: int, blocks: int) -> tuple[int, ...]:
        return self.inner.tower_layers(depth, blocks)

    def project(
        self, tokens: VisualTokens, default: Callable[[VisualTokens], VisualTokens], ctx: Context
    ) -> VisualTokens:
        shielded = tokens.replace(protected=tokens.protected | thumbnails(tokens, ctx))
        if "project" in self.inner.sites:
            left = self.inner.project(shielded, default, ctx)
        else:
            left = self.inner.llm_input(default(shielded), ctx)
        return left.replace(protected=tokens.protected.gather(1, left.source))

    def settings(self) -> dict[str, Any]:
        return {"keep": self.keep, "positions": self.positions, "inner": self.inner.to_dict()}


@dataclass(frozen=True)
class WholeCrops(Compressor):
    """Crops whose keys are nearly all alike go, but for one token; the others stay whole.

    Attributes:
        least: density (see TokenCorr) from which a crop stays.
        tau_s: cosine above which two keys are near-duplicates.
        low: tower block of the keys; None: at a quarter of the depth.
    """

    keep: int | float = 1.0
    positions: Positions = "keep"
    least: float = 0.5
    tau_s: float = 0.9
    low: int | None = None

    title: ClassVar[str] = BLANK
    paper: ClassVar[str] = "control"
    year: ClassVar[int] = 2026
    needs: ClassVar[frozenset[Need]] = frozenset({"tower_keys"})
    control: ClassVar[bool] = True
    budget: ClassVar[Budget] = "adaptive"
    identity_at_full: ClassVar[bool | str] = "the density of the crops decides"

    def tower_layers(self, depth: int, blocks: int) -> tuple[int, ...]:
        return (depth // 4 if self.low is None else self.low,)

    def project(
        self, tokens: VisualTokens, default: Callable[[VisualTokens], VisualTokens], ctx: Context
    ) -> VisualTokens:
        keys = ctx.tower_keys(tokens, ctx.depth // 4 if self.low is None else self.low, joint=True)
        kept = thumbnails(tokens, ctx) | (tokens.protected & tokens.valid)
        part = tokens.item.masked_fill(~tokens.eligible | kept, -1)
        for row in range(len(tokens)):
            for number in part[row][part[row] >= 0].unique().tolist():
                where = (part[row] == number).nonzero()[:, 0]
                whole = density(keys[row, where], self.tau_s) >= self.least
                kept[row, where if whole else where[:1]] = True
        return default(tokens).where(kept)


def thumbnails(tokens: VisualTokens, ctx: Context) -> Tensor:
    """bool[B, N]: tokens of thumbnails, that is of whole pictures beside their crops."""
    cut = torch.tensor(ctx.cropped or [False] * len(tokens), device=tokens.item.device)
    return (tokens.item == 0) & cut[:, None] & tokens.valid


# ------------------------------------------------------------------------------------------------------- what is kept


@dataclass(frozen=True)
class Crop:
    """One crop: kind of region, share of ink, tokens kept of it, number of its page."""

    kind: str
    ink: float
    kept: int
    page: int


@torch.no_grad()
def kept_per_crop(
    model: PreTrainedModel, processor: Any, compressor: Compressor, pages: Sequence[Page], batch_size: int = 32
) -> list[Crop]:
    """What a compressor keeps of every crop; the question plays no part."""
    prompt = processor.apply_chat_template(ask("what is the total?"), add_generation_prompt=True)
    found = []
    with compress(model, compressor) as session:
        for start in range(0, len(pages), batch_size):
            some = pages[start : start + batch_size]
            images = [Image.fromarray(page.image) for page in some]
            model(**processor(text=[prompt] * len(some), images=images, return_tensors="pt").to(model.device))
            counts = iter(session.report.tokens_out)
            session.reports.clear()
            for number, page in enumerate(some, start):
                for region, ink in zip(page.regions, page.ink().tolist(), strict=True):
                    found.append(Crop(region.kind, round(ink, 4), next(counts), number))
                next(counts)  # the thumbnail
    return found


def mean_kept(crops: Sequence[Crop]) -> float:
    """Tokens per crop."""
    return sum(crop.kept for crop in crops) / len(crops)


def set_threshold(
    kept: Callable[[float], float], target: float, low: float, high: float, *, rising: bool, steps: int = 14
) -> float:
    """By bisection the threshold in [low, high] at which `kept` comes closest to `target`.

    Args:
        kept: threshold -> mean tokens per crop, monotone.
        target: what is wanted.
        low, high: bounds.
        rising: whether more is kept at higher thresholds.
        steps: halvings.
    """
    best, distance = low, float("inf")
    for _ in range(steps):
        middle = (low + high) / 2
        found = kept(middle)
        if abs(found - target) < distance:
            best, distance = middle, abs(found - target)
        if (found < target) == rising:
            low = middle
        else:
            high = middle
    return best


# -------------------------------------------------------------------------------------------------------- the line-up


def line_up(
    model: PreTrainedModel,
    processor: Any,
    method: TokenCorr,
    budgets: Sequence[int] = BUDGETS,
    *,
    validation_pages: int = 96,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Entrant]:
    """The dense model, then every entrant at every budget, thresholds set on validation pages.

    Args:
        model, processor: trained on pages.
        method: TokenCorr's settings but for `tau_s` and `keep`.
        budgets: tokens per crop.
        validation_pages: how many.
        progress: told about every threshold.
    """
    pages = list(DocumentPages(split_seed(0, "validation"), validation_pages))
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size // model.config.scale_factor
    tokens = side * side

    def mean(compressor: Compressor) -> float:
        return mean_kept(kept_per_crop(model, processor, compressor, pages))

    entrants = [Entrant()]
    for budget in budgets:
        tau_s = set_threshold(lambda tau_s: mean(replace(method, tau_s=tau_s)), budget, -1.0, 1.0, rising=True)
        adaptive, blank = replace(method, tau_s=tau_s), WholeCrops(tau_s=tau_s, low=method.low)

        def mean_without_blanks(least: float, blank: WholeCrops = blank) -> float:
            return mean(replace(blank, least=least))

        least = set_threshold(mean_without_blanks, budget, 0.0, 1.01, rising=False, steps=8)
        blank = replace(blank, least=least)
        share = budget / tokens
        others: list[tuple[str | None, Compressor]] = [
            (FIXED, replace(method, tau_s=1.0, keep=budget)),
            (BLANK, blank),
            (Random.title, CropsOnly(share, inner=Random(keep=share))),
            (UniformGrid.title, CropsOnly(share, inner=UniformGrid(keep=share))),
            (Downscale.title, CropsOnly(share, inner=Downscale(keep=share))),
        ]
        entrants.append(Entrant(adaptive, share, ADAPTIVE))
        entrants += [Entrant(compressor, share, label) for label, compressor in others]
        progress(
            f"documents: {budget} tokens per crop: tau_s={adaptive.tau_s:.4f} keeps {mean(adaptive):.2f}, "
            f"least={blank.least:.3f} keeps {mean(blank):.2f}"
        )
    return entrants


# -------------------------------------------------------------------------------------------------- tables and pictures


def by_kind(crops: Sequence[Crop]) -> Table:
    """Tokens kept per kind of region, with its ink."""
    rows = []
    for kind in sorted({crop.kind for crop in crops}, key=lambda k: sum(c.ink for c in crops if c.kind == k)):
        mine = [crop for crop in crops if crop.kind == kind]
        kept = torch.tensor([float(crop.kept) for crop in mine])
        ink = sum(crop.ink for crop in mine) / len(mine)
        spread = f"{kept.quantile(0.25):.0f}-{kept.quantile(0.75):.0f}"
        rows.append((kind, str(len(mine)), f"{ink:.3f}", f"{kept.mean():.1f}", spread))
    return Table(("region", "crops", "ink", "tokens kept", "q1-q3"), rows)


def rank_correlation(crops: Sequence[Crop]) -> float:
    """Spearman's correlation of ink and tokens kept, ties at their mean rank."""
    ink, kept = (_ranks(torch.tensor([float(getattr(crop, name)) for crop in crops])) for name in ("ink", "kept"))
    return float(torch.corrcoef(torch.stack([ink, kept]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    below = (values[:, None] > values).sum(1)
    equal = (values[:, None] == values).sum(1)
    return below + (equal + 1) / 2


def draw_scatter(crops: Sequence[Crop], title: str, file: Path) -> None:
    """Tokens kept against ink, one dot per crop, jittered so that equal counts can be told apart."""
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.6, 4.2), layout="constrained", facecolor="white")
    panel = figure.subplots()
    shift = (torch.rand(len(crops), generator=torch.Generator().manual_seed(0)) - 0.5) * 0.5
    for colour, kind in zip(COLOURS, sorted({crop.kind for crop in crops}), strict=False):
        mine = [i for i, crop in enumerate(crops) if crop.kind == kind]
        panel.scatter(
            [crops[i].ink for i in mine],
            [crops[i].kept + float(shift[i]) for i in mine],
            s=11,
            alpha=0.6,
            linewidth=0,
            color=colour,
            label=kind,
        )
    panel.set_xlabel("ink: share of dark or coloured pixels in the crop", fontsize=9)
    panel.set_ylabel("visual tokens kept of the crop", fontsize=9)
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.2)
    panel.legend(fontsize=8.5, frameon=False, loc="lower right")
    panel.set_title(title, fontsize=10.5, loc="left")
    with whole_file(file) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


@torch.no_grad()
def draw_pages(
    model: PreTrainedModel, processor: Any, compressor: Compressor, file: Path, indices: Sequence[int] = (0, 3)
) -> None:
    """Test pages with the kept tokens bright."""
    pages = DocumentPages(TEST_SEED, max(indices) + 1)
    prompt = processor.apply_chat_template(ask("what is the total?"), add_generation_prompt=True)
    sheets = []
    for index in indices:
        image = Image.fromarray(pages[index].image)
        with compress(model, compressor) as session:
            model(**processor(text=prompt, images=image, return_tensors="pt").to(model.device))
            sheets.append(overlays(session.report, [image], processor)[0])
    height = max(sheet.height for sheet in sheets)
    whole = Image.new("RGB", (sum(sheet.width for sheet in sheets) + 16 * (len(sheets) - 1), height), "white")
    left = 0
    for sheet in sheets:
        whole.paste(sheet, (left, 0))
        left += sheet.width + 16
    with whole_file(file) as temporary:
        whole.save(temporary, format="PNG", optimize=True)
