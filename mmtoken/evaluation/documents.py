"""Does a ratio that follows the content of each crop beat a fixed one? TokenCorr on generated pages, at equal tokens.

Every entrant leaves the thumbnail whole and, on average over the pages, the same number of tokens per crop. TokenCorr's
threshold is set on validation pages so that its mean is that number; the others keep exactly that number of every crop,
except for the one that drops whole crops, whose threshold is set the same way. The test pages are looked at once.
"""

from __future__ import annotations

import json
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
from mmtoken.evaluation.accuracy import answer, evaluate, prepare
from mmtoken.evaluation.benchmarks import TEST_SEED, ask, find, items_of
from mmtoken.evaluation.lineup import Entrant
from mmtoken.evaluation.overlay import overlays
from mmtoken.evaluation.pictures import AXES, COLOURS, accuracy_figure, check_matplotlib, types_figure
from mmtoken.evaluation.tables import Table, accuracy_table, types_table
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


@dataclass(frozen=True)
class CropFacts:
    """What TokenCorr reads of one crop: attention float[N] of the deep and the low block, keys float[N, d], seed."""

    deep: Tensor
    low: Tensor
    keys: Tensor
    seed: int

    def kept(self, method: TokenCorr) -> int:
        """How many tokens TokenCorr keeps of it."""
        count = len(self.deep)
        chosen = len(method.choose(self.deep, self.low, self.keys, self.seed))
        return chosen + (method.aggregate == "prumerge32" and chosen < count)


@dataclass(frozen=True)
class _Reader(Compressor):
    """Keeps everything and notes what TokenCorr would read."""

    keep: int | float = 1.0
    positions: Positions = "keep"
    method: TokenCorr = field(default_factory=TokenCorr)
    found: list[CropFacts] = field(default_factory=list)

    title: ClassVar[str] = "Reader"
    paper: ClassVar[str] = "control"
    year: ClassVar[int] = 2026
    needs: ClassVar[frozenset[Need]] = TokenCorr.needs

    def tower_layers(self, depth: int, blocks: int) -> tuple[int, ...]:
        return self.method.tower_layers(depth, blocks)

    def project(
        self, tokens: VisualTokens, default: Callable[[VisualTokens], VisualTokens], ctx: Context
    ) -> VisualTokens:
        deep, low, keys, seeds = self.method.read(tokens, ctx)
        for row in range(len(tokens)):
            number = int(tokens.item[row, 0])
            if number or not (ctx.cropped and ctx.cropped[row]):
                where = tokens.eligible[row]
                seed = self.method.crop_seed(seeds[row], number)
                self.found.append(CropFacts(deep[row, where], low[row, where], keys[row, where], seed))
        return default(tokens)


@torch.no_grad()
def read_crops(
    model: PreTrainedModel, processor: Any, method: TokenCorr, pages: Sequence[Page], batch_size: int = 32
) -> list[CropFacts]:
    """What TokenCorr reads of every crop, for models whose crops are items of their own."""
    reader = _Reader(method=method)
    kept_per_crop(model, processor, reader, pages, batch_size)
    return reader.found


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


def set_density(facts: Sequence[CropFacts], method: TokenCorr, budget: float) -> TokenCorr:
    """`method` with the `tau_s` at which it keeps `budget` tokens per crop on average."""

    def mean(tau_s: float) -> float:
        return sum(crop.kept(replace(method, tau_s=tau_s)) for crop in facts) / len(facts)

    return replace(method, tau_s=set_threshold(mean, budget, -1.0, 1.0, rising=True))


def set_whole(facts: Sequence[CropFacts], tau_s: float, low: int | None, budget: float) -> WholeCrops:
    """The `WholeCrops` that keeps about `budget` tokens per crop on average."""
    densities = [(density(crop.keys, tau_s), len(crop.keys)) for crop in facts]

    def mean(least: float) -> float:
        return sum(count if rho >= least else 1 for rho, count in densities) / len(densities)

    return WholeCrops(least=set_threshold(mean, budget, 0.0, 1.01, rising=False), tau_s=tau_s, low=low)


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

    facts = read_crops(model, processor, method, pages)
    entrants = [Entrant()]
    for budget in budgets:
        adaptive = set_density(facts, method, budget)
        blank = set_whole(facts, adaptive.tau_s, method.low, budget)
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
        progress(f"documents: {budget} tokens per crop: tau_s={adaptive.tau_s:.4f}, least={blank.least:.3f}")
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


# ------------------------------------------------------------------------------------------------------------ all of it

_TOKENS = replace(AXES[0], logarithmic=False)

VARIANTS: tuple[TokenCorr, ...] = (
    TokenCorr(low=0, aggregate="none"),
    TokenCorr(low=0),
    TokenCorr(aggregate="none"),
    TokenCorr(),
    TokenCorr(aggregate="prumerge32"),
    TokenCorr(low=0, heads="mean"),
    TokenCorr(low=0, sampling="multinomial"),
)
"""Settings that are tried on validation pages, all at the middle budget."""


def choose(
    model: PreTrainedModel,
    processor: Any,
    budget: int,
    *,
    pages: int,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[TokenCorr, list[dict[str, Any]]]:
    """The variant with the most right answers on validation pages at equal tokens, and what each reached.

    Args:
        model, processor: trained on pages.
        budget: tokens per crop.
        pages: validation pages.
        progress: told about every variant.
    """
    held_out = DocumentPages(split_seed(0, "validation"), pages)
    benchmark = replace(find("document_pages"), load=lambda count: items_of(held_out))
    prepared = prepare(benchmark, processor, pages, 64, model.device)
    tried = []
    for variant in VARIANTS:
        facts = read_crops(model, processor, variant, list(held_out))
        method = set_density(facts, variant, budget)
        tokens = sum(crop.kept(method) for crop in facts) / len(facts)
        answers = answer(model, processor, Entrant(method), prepared)
        right = sum(answers.correct) / len(answers.correct)
        tried.append({"settings": method.settings(), "tokens": round(tokens, 3), "accuracy": round(right, 4)})
        progress(f"documents: validation: {variant} at {tried[-1]['tokens']:.2f} tokens per crop: {right:.3f}")
    best = max(range(len(VARIANTS)), key=lambda i: (tried[i]["accuracy"], -i))
    return VARIANTS[best], tried


def write(
    model: PreTrainedModel,
    processor: Any,
    folder: Path,
    *,
    name: str,
    pages: int = 150,
    rounds: int = 3,
    budgets: Sequence[int] = BUDGETS,
    validation_pages: int = 64,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Choose settings on validation pages, run the line-up on test pages, write `documents.json`, `.md` and pictures.

    Returns:
        The files written.
    """
    middle = budgets[len(budgets) // 2]
    method, tried = choose(model, processor, middle, pages=validation_pages, progress=progress)
    entrants = line_up(model, processor, method, budgets, validation_pages=validation_pages, progress=progress)
    results = evaluate(
        model,
        processor,
        entrants,
        name=name,
        benchmarks=("document_pages",),
        pictures=pages,
        rounds=rounds,
        progress=progress,
    )
    adaptive = next(e.compressor for e in entrants if e.label == ADAPTIVE and e.keep == middle / 16)
    assert adaptive is not None
    test = list(DocumentPages(TEST_SEED, pages))
    crops = kept_per_crop(model, processor, adaptive, test)
    results |= {
        "kind": "documents",
        "validation": {"pages": validation_pages, "tried": tried},
        "crops": {
            "compressor": adaptive.to_dict(),
            "spearman_of_ink_and_tokens": round(rank_correlation(crops), 4),
            "rows": [[crop.page, crop.kind, crop.ink, crop.kept] for crop in crops],
        },
    }
    files = [
        folder / f"documents{end}" for end in (".json", ".md", "-tokens.png", "-types.png", "-ink.png", "-pages.png")
    ]
    with whole_file(files[0]) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")
    for file, figure in (
        (files[2], accuracy_figure(results, _TOKENS)),
        (files[3], types_figure(results, _TOKENS, columns=2)),
    ):
        with whole_file(file) as temporary:
            figure.savefig(temporary, dpi=130, format="png")
    rank = results["crops"]["spearman_of_ink_and_tokens"]
    title = f"{name}: tokens kept against ink, {len(crops)} crops of test pages (Spearman {rank:.2f})"
    draw_scatter(crops, title, files[4])
    draw_pages(model, processor, adaptive, files[5])
    with whole_file(files[1]) as temporary:
        temporary.write_text(report(results, crops, [file.name for file in files[2:]]))
    return files


def report(results: dict[str, Any], crops: Sequence[Crop], pictures: Sequence[str]) -> str:
    """Markdown beside `documents.json`."""
    tried = [
        (
            ", ".join(f"{k}={row['settings'][k]}" for k in ("low", "aggregate", "heads", "sampling")),
            f"{row['tokens']:.2f}",
            f"{row['accuracy']:.3f}",
        )
        for row in results["validation"]["tried"]
    ]
    settings = ("TokenCorr at the middle budget", "tokens per crop", "accuracy")
    return "\n".join(
        [
            "# TokenCorr on document pages",
            "",
            f"Model {results['model']}; {results['split']['questions']['document_pages']} questions about "
            f"{results['split']['pictures']['document_pages']} test pages (generator seed {results['split']['seed']}). "
            "A page is six crops and a thumbnail of 16 tokens each, and every entrant leaves the thumbnail whole. "
            "Entrants of the same keep aim at the same mean number of tokens per crop; the two whose ratio is not "
            f"fixed were set to it on {results['validation']['pages']} validation pages and reach what the table shows "
            "on the test pages. TokenCorr's settings were chosen on the validation pages, too (last table). Times are "
            f"of {results['timing']['rounds']} round(s) and only a rough guide.",
            "",
            *(f"![{name}]({name})" for name in pictures),
            "",
            accuracy_table(results).markdown(),
            "",
            "## By type of question",
            "",
            types_table(results).markdown(),
            "",
            f"## What is kept of a crop ({results['crops']['compressor']['init_args']})",
            "",
            by_kind(crops).markdown(),
            "",
            f"Spearman correlation of ink and tokens kept: {results['crops']['spearman_of_ink_and_tokens']:.3f} over "
            f"{len(crops)} crops.",
            "",
            "## Settings tried on validation pages",
            "",
            Table(settings, tried).markdown(),
            "",
        ]
    )
