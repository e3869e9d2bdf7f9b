"""The demo page is one file that loads nothing, with pictures that say what they show and measured figures."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmtoken.cli import demo
from mmtoken.cli.main import main
from mmtoken.errors import MMTokenError
from mmtoken.evaluation import demo_page, story
from mmtoken.evaluation.demo_page import render
from mmtoken.evaluation.lineup import CONTROLS, METHODS
from mmtoken.evaluation.story import Story, dense, read_samples, tell
from tests.evaluation.results import shipped

VOID = {"meta", "img", "input", "br", "link", "line", "circle", "polyline", "hr"}


@dataclass
class Page(HTMLParser):
    """Elements, text and broken nesting of a page."""

    elements: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    stack: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self.stack or self.stack.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def parse(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    return page


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `mmtoken demo --quick` writes."""
    folder = tmp_path_factory.mktemp("demo") / "deep" / "page"
    assert main(["demo", "--out", str(folder), "--quick"]) == 0
    return folder


@pytest.fixture(scope="module")
def html(written: Path) -> str:
    return (written / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def told() -> Story:
    return tell(*shipped(), quick=True)


def test_the_page_is_the_only_file(written: Path) -> None:
    assert [path.name for path in written.iterdir()] == ["index.html"]


def test_the_page_loads_nothing_from_anywhere(html: str) -> None:
    page = parse(html)
    assert not {"script", "iframe", "object", "embed", "base", "audio", "video", "source"} & {
        t for t, _ in page.elements
    }
    loads = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "srcset", "href", "xlink:href", "data", "poster", "background", "action")
    ]
    assert loads and all(value.startswith("data:") for value in loads)
    # An empty icon, which keeps browsers from asking for one, is all that is linked.
    assert page.all("link") in ([], [{"rel": "icon", "href": "data:,"}])
    assert not re.search(r"https?://|//\w+\.\w|@import|url\(", html)
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_the_page_is_well_formed(html: str) -> None:
    page = parse(html)
    assert not page.wrong and not page.stack
    assert html.startswith("<!doctype html>") and page.all("html") == [{"lang": "en"}]
    identities = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(identities)) == len(identities)
    labels = [a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a]
    assert labels and set(labels) <= set(identities)


def test_every_picture_is_inside_and_says_what_it_shows(html: str) -> None:
    images = parse(html).all("img")
    for image in images:
        assert image["alt"].strip(), image["src"][:60]
        kind, _, data = image["src"].partition(",")
        film = kind == "data:image/gif;base64"
        assert film or kind == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            picture.load()
            assert picture.width == (1 if film else 2) * int(image["width"])
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in parse(html).all("svg"))


def test_there_is_an_overlay_of_every_compressor_on_every_sample(html: str) -> None:
    overlays = [image for image in parse(html).all("img") if image["class"] == "overlay"]
    compressors, samples = len(CONTROLS) + len(METHODS), len(read_samples())
    assert len([image for image in overlays if "kept, answer" in image["alt"]]) == compressors * samples >= 4
    assert len({image["src"] for image in overlays}) > len(overlays) // 2


def test_text_from_outside_is_escaped(told: Story) -> None:
    where = {**told.environment, "device": "<script>alert(1)</script>"}
    first, second, *rest = told.told
    second = replace(second, answers=['"><img src=x>', *second.answers[1:]])
    page = parse(
        render(
            replace(told, told=[first, second, *rest], environment=where, speed={**told.speed, "environment": where})
        )
    )
    assert not page.all("script") and "x" not in [image["src"] for image in page.all("img")]
    assert "".join(page.words).count("<script>alert(1)</script>") == 2
    assert '"><img src=x>' in "".join(page.words)


def test_a_quick_story_measures_everything_on_all_samples(told: Story) -> None:
    samples = read_samples()
    assert [sample.question for sample in told.samples] == [sample.question for sample in samples]
    assert not told.committed and told.accuracy["kind"] == "accuracy" and told.speed["kind"] == "speed"
    assert told.depth == 8
    plain = dense(told.told)
    assert told.told[0] is plain and plain.overlays == [] and plain.tokens == plain.layer_average == 64
    assert len(told.told) == 1 + len(CONTROLS) + len(METHODS)
    for one in told.told:
        assert len(one.answers) == len(one.correct) == len(samples)
        assert one.first_token_ms > 0 and one.kv_bytes > 0
        if one is not plain:
            assert len(one.overlays) == len(samples) and one.tokens <= 16 and one.kv_bytes < plain.kv_bytes
            assert one.flops < plain.flops
    staged = {one.entrant.method: [layer for layer, _ in one.stages] for one in told.told if one.stages}
    assert set(staged) == {"FastV", "PyramidDrop"} and staged["FastV"] == [2] and len(staged["PyramidDrop"]) > 1


def test_each_sample_asks_one_of_its_own_questions() -> None:
    samples = read_samples()
    assert len(samples) >= 4 and len({sample.image.tobytes() for sample in samples}) == len(samples)
    for sample in samples:
        assert sample.question and sample.expected and sample.source and sample.licence
        assert sample.image.size == (96, 96)


def test_a_page_that_cannot_be_finished_leaves_the_old_one(
    told: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "index.html").write_text("old")

    def fail(given: Any) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(demo, "tell", lambda *args, **kwargs: told)
    monkeypatch.setattr(demo, "render", fail)
    with pytest.raises(ZeroDivisionError):
        demo.main(["--out", str(tmp_path), "--quick"])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("index.html", "old")]
    monkeypatch.setattr(demo, "render", demo_page.render)
    assert demo.main(["--out", str(tmp_path), "--quick"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
    assert (tmp_path / "index.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "load", lambda name: pytest.fail("loaded a model"))
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "page"):
        with pytest.raises(MMTokenError, match=r"out=.* is no folder"):
            demo.main(["--out", str(place), "--quick"])
    with pytest.raises(MMTokenError, match="--fast"):
        demo.main(["--out", str(tmp_path), "--fast"])


def test_the_page_shows_a_stream_as_a_film(html: str) -> None:
    sources = [attributes.get("src") or "" for tag, attributes in parse(html).elements if tag == "img"]
    (film,) = [source for source in sources if source.startswith("data:image/gif")]
    with Image.open(io.BytesIO(base64.b64decode(film.partition(",")[2]))) as pictures:
        assert pictures.n_frames == 8
    assert "8 frames pass one by one" in html


def test_results_in_the_repository_are_read_only_for_the_full_page(
    told: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "accuracy.json"
    file.write_text(json.dumps({**told.accuracy, "model": "from the file"}))
    monkeypatch.setattr(story, "COMMITTED", file)
    monkeypatch.setattr(story.speed, "measure", lambda *args, **kwargs: told.speed)
    monkeypatch.setattr(story, "BUDGETS", (16,))
    whole = tell(*shipped())
    assert whole.committed and whole.accuracy["model"] == "from the file"
    assert "Committed results" in render(whole) and "Committed results" not in render(told)
