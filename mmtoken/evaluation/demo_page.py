"""The demo page: a `Story` as one HTML file that loads nothing, works from a folder and without a script."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

import mmtoken
from mmtoken.evaluation.accuracy import ALL
from mmtoken.evaluation.lineup import DENSE
from mmtoken.evaluation.story import Story, Told, dense
from mmtoken.evaluation.stream_story import StreamStory

_STYLE = Path(mmtoken.__file__).parent / "assets" / "demo" / "style.css"
_DASHES = ("2 4", "7 4", "9 3 2 3")
"""Lines of the controls, which are grey."""


def render(story: Story) -> str:
    """The whole page."""
    keeps = list(dict.fromkeys(int(one.entrant.keep) for one in story.told if one.entrant.compressor))
    shown = keeps[len(keeps) // 2]
    # The budget switch is plain CSS: a checked radio button shows what carries its class.
    switch = "".join(f"body:has(#keep{k}:checked) .k{k}{{display:block}}" for k in keeps)
    switch += "".join(f"body:has(#keep{k}:checked) tr.k{k}{{display:table-row}}" for k in keeps)
    body = "\n".join(
        [
            _header(story, shown),
            "<main>",
            _tokens(story),
            _samples(story, keeps, shown),
            _costs(story, keeps),
            _stages(story, shown),
            _stream(story.stream) if story.stream else "",
            _accuracy(story),
            _speed(story),
            _limits(story),
            "</main>",
            _footer(story),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # An empty icon keeps browsers from asking for one.
        '<link rel="icon" href="data:,">\n<title>mmtoken: fewer visual tokens</title>\n'
        f"<style>\n{_STYLE.read_text()}{switch}\n</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _header(story: Story, shown: int) -> str:
    at = [one for one in story.told if one.entrant.compressor and one.entrant.keep == shown]
    plain = dense(story.told)
    total = len(story.samples)
    methods = [one for one in at if not one.entrant.control]
    best = max(methods, key=lambda one: sum(one.correct))
    controls = [one for one in at if one.entrant.control]
    best_control = max(controls, key=lambda one: sum(one.correct))
    fastest = max(
        (row for row in story.speed["results"] if not row["control"]),
        key=lambda row: row["speedup"]["prefill_with_scoring"]["median"],
    )
    facts = [
        (f"{sum(plain.correct)} of {total}", f"samples answered right with all {plain.tokens:.0f} visual tokens"),
        (f"{sum(best.correct)} of {total}", f"with {shown} tokens, by {best.entrant.title}, the best method here"),
        (
            f"{sum(best_control.correct)} of {total}",
            f"with {shown} tokens, by {best_control.entrant.title}, the best control",
        ),
        (
            f"{fastest['speedup']['prefill_with_scoring']['median']:.1f}x",
            f"faster prefill on a LLaVA-shaped model, {fastest['title']} at {fastest['tokens_out']} of "
            f"{fastest['tokens_in']} tokens, scoring included",
        ),
    ]
    rows = "".join(f"<div><dd>{value}</dd><dt>{escape(text)}</dt></div>" for value, text in facts)
    return (
        "<header>\n<h1>A picture is worth sixty-four tokens. How many does the answer need?</h1>\n"
        '<p class="lead">mmtoken runs unmodified Hugging Face vision-language models on fewer visual tokens. Everything '
        "on this page was computed on this machine a moment ago, by a tiny LLaVA that ships inside the package, unless "
        f'it says otherwise.</p>\n<dl class="facts">{rows}</dl>\n</header>'
    )


def _tokens(story: Story) -> str:
    return f"""<section aria-labelledby="what">
<h2 id="what">What visual tokens are</h2>
<div class="split">
<figure>{_image(story.grid, "The first sample, divided into eight by eight patches", 272)}
<figcaption>96 x 96 pixels, 64 patches of 12 x 12.</figcaption></figure>
<div>
<p>A vision-language model cuts a picture into patches. A vision tower turns every patch into one vector, a projector
brings the vectors to the language model's width, and there they stand in the prompt between words: <em>visual
tokens</em>. Here they are 64 of about 75; LLaVA-1.5 reads 576 per picture, newer models several thousand.</p>
<p>The language model spends its work on them in every layer and keeps keys and values of each one as long as it writes.
Most of a picture is background. A <em>compressor</em> decides which tokens are worth that, in the tower, before the
language model, or between its layers.</p>
</div>
</div>
</section>"""


def _samples(story: Story, keeps: Sequence[int], shown: int) -> str:
    radios = "".join(
        f'<label><input type="radio" name="keep" id="keep{k}"{" checked" if k == shown else ""}>{k} of '
        f"{dense(story.told).tokens:.0f} tokens</label>"
        for k in keeps
    )
    parts = [
        '<section aria-labelledby="samples">\n<h2 id="samples">Six pictures, one question each</h2>',
        "<p>Bright patches were kept, the rest was dropped. Names in italics are controls: a method that does not beat "
        "a random draw, a regular grid and a smaller picture has shown nothing. An answer counts when it begins with the "
        "expected one: with little picture left, this small model may not stop after it.</p>",
        f'<fieldset class="budget"><legend>Keep</legend>{radios}</fieldset>',
    ]
    plain = dense(story.told)
    for i, sample in enumerate(story.samples):
        groups = []
        for keep in keeps:
            cards = "".join(
                _card(one, i, sample.expected) for one in story.told if one.overlays and one.entrant.keep == keep
            )
            groups.append(f'<div class="k k{keep}"><div class="cards">{cards}</div></div>')
        parts.append(
            f'<article class="sample">\n<div class="ask">{_image(sample.image, f"Sample {i + 1}: {sample.title}", 128)}'
            f"<div><h3>{escape(sample.question)}</h3><p>Expected <strong>{escape(sample.expected)}</strong>. With all "
            f"tokens: {_answer(plain, i, sample.expected)}.</p>"
            f"<small>{escape(sample.source)}; {escape(sample.licence)}</small></div></div>"
            f"{''.join(groups)}</article>"
        )
    parts.append(
        '<p class="note">Merging methods are drawn where their tokens sit: VisionZip adds the rest of the picture to a few '
        "of them, ToMe merges in the tower, Down-scaling averages neighbours. FastV and PyramidDrop drop inside the "
        "language model: drawn is what is left after their last cut.</p></section>"
    )
    return "\n".join(parts)


def _card(one: Told, sample: int, expected: str) -> str:
    title = one.entrant.title
    alt = f"{title}: {round(one.tokens)} patches kept, answer {one.answers[sample] or 'empty'}"
    return (
        f'<figure class="{"control" if one.entrant.control else "method"}">'
        f"{_image(one.overlays[sample], alt, 144, 'overlay')}"
        f'<figcaption><span class="name">{escape(title)}</span>{_answer(one, sample, expected)}</figcaption></figure>'
    )


def _answer(one: Told, sample: int, expected: str) -> str:
    """The answer and whether it is right; what follows a right answer did not count and is pale."""
    answer = one.answers[sample]
    if not one.correct[sample]:
        return f'<span class="verdict wrong">{escape(answer) or "(nothing)"} ✗ wrong</span>'
    rest = answer[len(expected) :]
    more = f'<span class="rest">{escape(rest)}</span>' if rest else ""
    return f'<span class="verdict right">{escape(answer[: len(expected)])}{more} ✓ right</span>'


def _stages(story: Story, shown: int) -> str:
    rows = []
    for one in story.told:
        if not one.stages or one.entrant.keep != shown:
            continue
        depth = story.depth
        first = one.stages[0][0]
        figures = [_stage(story.grid, f"layers 0 to {first - 1}", f"{one.entrant.title}, first layers: all patches")]
        ends = [layer for layer, _ in one.stages[1:]] + [depth]
        for (layer, picture), end in zip(one.stages, ends, strict=True):
            span = f"layers {layer} to {end - 1}" if end - 1 > layer else f"layer {layer}"
            figures.append(_stage(picture, span, f"{one.entrant.title}: patches left in {span}"))
        rows.append(f'<h3>{escape(one.entrant.title)}</h3><div class="stages">{"".join(figures)}</div>')
    return (
        '<section aria-labelledby="layers">\n<h2 id="layers">Layer by layer</h2>\n<p>Two methods let the language model '
        f"read all tokens first and drop by what it attends to. The first sample at {shown} tokens; the layers before a "
        f"cut still pay for everything, which is why the table counts layer averages.</p>\n{''.join(rows)}</section>"
    )


def _stage(picture: Image.Image, caption: str, alt: str) -> str:
    return f"<figure>{_image(picture, alt, 136, 'overlay')}<figcaption>{escape(caption)}</figcaption></figure>"


def _costs(story: Story, keeps: Sequence[int]) -> str:
    plain = dense(story.told)
    rows = []
    for one in story.told:
        cells = [
            f"{sum(one.correct)} of {len(one.correct)}",
            f"{one.tokens:.0f}",
            f"{one.layer_average:.0f}",
            f"{one.kv_bytes / 1024:.0f}",
            f"{one.flops / 1e6:.0f}",
            f"{one.first_token_ms:.1f}",
        ]
        hidden = f" k k{int(one.entrant.keep)}" if one is not plain else ""
        kind = "control" if one.entrant.control and one is not plain else "method"
        rows.append(_row(one.entrant.title, cells, f"{kind}{hidden}"))
    return (
        '<section aria-labelledby="costs">\n<h2 id="costs">What it costs</h2>\n'
        "<p>The same six questions at the budget chosen above, measured, not nominal.</p>\n"
        + _table(
            "Per question, in a batch of six. FLOPs: prefill of the language model. Time: picture to first token.",
            ("", "right", "tokens", "layer average", "KV cache, KiB", "MFLOPs", "ms"),
            rows,
        )
        + "</section>"
    )


def _stream(told: StreamStory) -> str:
    rows = [
        _row(
            one.question,
            [one.expected, *(f"{said} {'✓' if said == one.expected else '✗'}" for said in (one.answer, one.dense))],
            "method",
        )
        for one in told.asked
    ]
    right = sum(one.answer == one.expected for one in told.asked)
    plain = sum(one.dense == one.expected for one in told.asked)
    header = ("question", "truth", told.compressor.title, "no compressor")
    data = base64.b64encode(told.film).decode()
    return f"""<section aria-labelledby="stream">
<h2 id="stream">A stream in a bounded memory</h2>
<div class="split">
<figure><img class="picture" src="data:image/gif;base64,{data}" alt="The clip with the tokens that enter the decoder
bright, and a bar for every frame that is still held" width="240">
<figcaption>Bright: what enters the language model. Bars: what is held of each second.</figcaption></figure>
<div>
<p>{told.frames} frames pass one by one. The memory takes {told.memory_tokens} tokens, whatever comes: without a
compressor that is {told.dense.frames_held} frames of 16 tokens, and what was before is gone. {told.compressor.title}
keeps {told.compressor.keep} tokens of each, so {told.report.frames_held} frames are still there when the questions
come. It answers {right} of {len(told.asked)} right, the model that holds whole frames {plain}. One clip is an example,
not a figure; those over many clips are in models/tiny_llava_video.</p>
{_table("Questions about the clip", header, rows)}
</div>
</div>
</section>"""


def _accuracy(story: Story) -> str:
    found = story.accuracy
    asked = " and ".join(
        f"{found['split']['questions'][name]} ({title.lower()})" for name, title in found["titles"].items()
    )
    origin = (
        f"Committed results, measured on {found['environment']['device']}"
        if story.committed
        else "A small run, made just now; intervals are wide. For the full one: mmtoken bench --what accuracy"
    )
    styles = _styles(found["results"])
    key = "".join(
        f'<li><svg viewBox="0 0 34 10" aria-hidden="true"><line x1="1" x2="33" y1="5" y2="5" stroke-width="2.4" '
        f'stroke="{colour}" stroke-dasharray="{dash}"/></svg>{escape(title)}</li>'
        for title, (colour, dash) in styles.items()
    )
    charts = "".join(
        f"<figure>{_chart(found, name, styles)}<figcaption>{escape(title)}</figcaption></figure>"
        for name, title in found["titles"].items()
    )
    return (
        '<section aria-labelledby="accuracy">\n<h2 id="accuracy">Accuracy against tokens</h2>\n<p>Six pictures prove '
        f"nothing, so here are held-out ones: {asked} questions. The black line is the model with all its tokens, the "
        "dotted one always gives the most frequent answer; bars are 95 % intervals.</p>\n"
        f'<ul class="key sans">{key}</ul><div class="chart">{charts}</div>\n<p class="note">{escape(origin)}.</p></section>'
    )


def _styles(rows: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """(colour, dashes) per title, methods first."""
    methods: dict[str, None] = {}
    controls: dict[str, None] = {}
    for row in rows:
        if row["method"] != DENSE:
            (controls if row["control"] else methods)[row["title"]] = None
    found = {title: (f"var(--c{i % 5})", "none") for i, title in enumerate(methods)}
    return found | {title: ("var(--grey)", _DASHES[i % 3]) for i, title in enumerate(controls)}


def _chart(found: Mapping[str, Any], benchmark: str, styles: Mapping[str, tuple[str, str]]) -> str:
    """Accuracy over the layer average (log scale) as an inline SVG that follows the page's colours."""
    rows = found["results"]
    values = [row["layer_average"][benchmark] for row in rows]
    low, high = math.log2(min(values)) - 0.15, math.log2(max(values)) + 0.15
    width, height, left, bottom, top = 480, 330, 38, 40, 10

    def x(tokens: float) -> float:
        return left + (math.log2(tokens) - low) / (high - low) * (width - left - 12)

    def y(accuracy: float) -> float:
        return top + (1 - accuracy) * (height - top - bottom)

    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 12}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{left - 7}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for power in range(math.ceil(low), math.floor(high) + 1):
        parts.append(f'<text x="{x(2**power):.1f}" y="{height - bottom + 18}" text-anchor="middle">{2**power}</text>')
    parts.append(
        f'<text x="{(left + width) / 2:.0f}" y="{height - 4}" text-anchor="middle">visual tokens, average over layers</text>'
    )
    plain = next(row for row in rows if row["method"] == DENSE)["accuracy"][benchmark][ALL]["accuracy"]
    for level, name in ((plain, "dense"), (found["baselines"][benchmark][ALL], "base")):
        at = y(level)
        parts.append(
            f'<line class="{name}" x1="{left}" x2="{width - 12}" y1="{at:.1f}" y2="{at:.1f}" stroke-width="1.4"/>'
        )
    summary = []
    for title, (colour, dash) in styles.items():
        points = sorted(
            (row["layer_average"][benchmark], row["accuracy"][benchmark][ALL]) for row in rows if row["title"] == title
        )
        line = " ".join(f"{x(tokens):.1f},{y(score['accuracy']):.1f}" for tokens, score in points)
        for tokens, score in points:
            across = f"{x(tokens):.1f}"
            parts.append(
                f'<line x1="{across}" x2="{across}" y1="{y(score["low"]):.1f}" y2="{y(score["high"]):.1f}" stroke="{colour}" '
                'stroke-opacity=".3" stroke-width="1.6"/>'
                f'<circle cx="{across}" cy="{y(score["accuracy"]):.1f}" r="3.6" fill="{colour}"/>'
            )
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2.2" stroke-dasharray="{dash}"/>'
        )
        summary.append(f"{title} {points[0][1]['accuracy']:.2f} at {points[0][0]:.0f} tokens")
    label = f"{found['titles'][benchmark]}: dense {plain:.2f}; " + "; ".join(summary)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _speed(story: Story) -> str:
    found = story.speed
    shape = found["shape"]
    rows = []
    for row in found["results"]:
        ms, gain = row["milliseconds"], row["speedup"]["prefill_with_scoring"]
        cells = [
            f"{row['tokens_out']} of {row['tokens_in']}",
            f"{ms['scoring']['median']:.1f}",
            f"{ms['prefill']['median']:.0f}",
            f"{gain['median']:.2f}x",
            f"{ms['decode_per_token']['median']:.1f}",
            f"{row['peak_mib']:.0f}",
            f"{row['kv_bytes'] / 2**20:.1f}",
        ]
        rows.append(_row(row["title"], cells, "control" if row["control"] and row["method"] != DENSE else "method"))
    where = found["environment"]
    return (
        '<section aria-labelledby="speed">\n<h2 id="speed">Speed at a real size</h2>\n'
        f"<p>The tiny model is too small to show what tokens cost. This one has the shape of a LLaVA (hidden "
        f"{shape['hidden']}, {shape['layers']} layers, {shape['visual_tokens']} visual and {shape['text_tokens']} text "
        "tokens) and random weights: weights change the answers, not the time.</p>\n"
        + _table(
            f"Measured just now on this machine: {where['device']}, {where['clock']}, torch "
            f"{where['versions']['torch']}; medians of {found['rounds']} interleaved rounds. Prefill includes scoring.",
            (
                "",
                "tokens",
                "scoring, ms",
                "prefill, ms",
                "speed-up",
                "decode, ms per token",
                "peak, MiB",
                "KV cache, MiB",
            ),
            rows,
        )
        + '<p class="note">FastV reads all tokens in its first two layers, so its bound is lower. VisionZip pays a part of '
        "its scoring in the vision tower. The figures with more rounds and their spread: mmtoken bench.</p></section>"
    )


def _limits(story: Story) -> str:
    return """<section aria-labelledby="limits">
<h2 id="limits">What this does not show</h2>
<ul>
<li>The model has three million parameters and knows eight kinds of question about generated scenes and one about digits on
photographs. How methods rank here need not be how they rank on large models and natural pictures.</li>
<li>One of its question types, left or right of, it hardly learned; no compressor can lower that by much.</li>
<li>Its pictures are mostly background, and its tower was trained to tell content from background, which favours methods
that look for salient or diverse patches. The card compares a second checkpoint, which had that loss briefly.</li>
<li>Speed is that of one CPU thread; nothing here was measured on a GPU. The savings in the cache are the same there.</li>
<li>"Equal budgets" are equal after the last cut. Methods that cut inside the language model have read more tokens by then:
compare layer averages.</li>
</ul>
</section>"""


def _footer(story: Story) -> str:
    where = story.environment
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    return f"""<footer>
<h2>Try it</h2>
<pre><code>mmtoken run --image photo.png --ask "read the number." --compressor divprune --keep 16 --save-overlay kept.png
mmtoken bench --out bench     # the full comparison, with pictures and JSON
mmtoken list compressors</code></pre>
<p class="note">Made by mmtoken demo on {escape(where["platform"])}, {escape(where["device"])}; {escape(versions)}, Python
{escape(where["python"])}. One file, no requests, no scripts.</p>
</footer>"""


def _table(caption: str, header: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(caption)}"><table><caption>{escape(caption)}'
        f"</caption><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _row(name: str, cells: Sequence[str], kind: str) -> str:
    inner = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'<tr class="{kind}"><th scope="row">{escape(name)}</th>{inner}</tr>'


def _image(image: Image.Image, alt: str, side: int, kind: str = "picture") -> str:
    """An `<img>` that holds its picture, twice as fine as it is shown."""
    picture = image.convert("RGB").resize((2 * side, 2 * side * image.height // image.width), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img class="{kind}" src="data:image/jpeg;base64,{data}" alt="{escape(alt)}" width="{side}" '
        f'height="{side * image.height // image.width}">'
    )
