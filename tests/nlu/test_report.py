"""The report: one page that needs nothing else, holds every table and figure, and can be read without seeing it."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.request import urlopen
from xml.etree import ElementTree

import pytest

from nlu import report
from nlu.experiments.figures import draw
from nlu.experiments.measured import load_measured
from nlu.experiments.published import PAPER_TABLES
from nlu.plots import image
from nlu.tables import build_pages
from tests.nlu.records import write_record

PUBLISHED = Path(__file__).resolve().parents[2] / "results/published"
VOID = {"meta", "img", "link", "br", "hr"}


class Page(HTMLParser):
    """Collects elements, and checks that they nest."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    for method in ("lora", "lora2"):
        for seed in (1, 2):
            axes = {"method": method, "odd <label>": "a & b", "task_name": "rte", "seed": seed}
            write_record(folder / "trial", method, "rte", seed, [0.5, 0.6 + seed / 100], axes)
    return folder


@pytest.fixture(scope="module")
def page(measured, tmp_path_factory):
    output = tmp_path_factory.mktemp("page") / "report.html"
    assert report.main(["--measured_dir", str(measured), "--output", str(output)]) == 0
    return Page(output.read_text(encoding="utf-8"))


def test_the_page_needs_no_other_file(page):
    assert not page.all("script") and not page.all("link")
    for tag, attributes in page.elements:
        for name in ("src", "href"):
            if name in attributes:
                assert attributes[name].startswith("data:" if tag == "img" else "#")


def test_every_figure_is_a_whole_image(page, measured):
    (experiment,) = load_measured(measured)
    for shown, drawing in zip(page.all("img"), draw(experiment), strict=True):
        read = urlopen(shown["src"]).read()
        assert read == image(drawing, "svg") and ElementTree.fromstring(read).tag.endswith("svg")
        assert "#" not in shown["src"]  # a browser would end the image there


def test_every_table_and_figure_is_there_once(page, measured):
    tables = [table for _, _, found in build_pages(measured, PUBLISHED) for table in found]
    assert len(page.all("table")) == len(page.all("caption")) == len(tables) > len(PAPER_TABLES)
    (experiment,) = load_measured(measured)
    assert len(page.all("img")) == len(draw(experiment)) > 3
    text = "".join(page.text)
    for table in tables:
        assert table.title in text
        assert all(cell in text for row in table.rows for cell in row)


def test_the_page_can_be_read_without_seeing_it(page):
    assert page.all("html")[0]["lang"] == "en" and len(page.all("h1")) == 1 and len(page.all("main")) == 1
    assert all(len(image["alt"]) > 40 for image in page.all("img"))
    assert all(cell.get("scope") in ("row", "col") for cell in page.all("th"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link["href"][1:] for link in page.all("a")} <= set(ids)
    assert {a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a} <= set(ids)


def test_labels_are_text_never_markup(page):
    assert "lora2, a & b" in page.text and not any(tag == "label" for tag, _ in page.elements)


def test_the_same_records_give_the_same_page(measured):
    assert report.build_report(measured, PUBLISHED) == report.build_report(measured, PUBLISHED)


def test_faulty_input_leaves_the_old_page(measured, tmp_path, capsys):
    output = tmp_path / "report.html"
    output.write_text("old")
    assert report.main(["--published_dir", str(tmp_path), "--output", str(output)]) == 2
    assert output.read_text() == "old" and capsys.readouterr().err.count("error: ") == 1
