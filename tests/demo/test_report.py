"""The page is well-formed, self-contained and escapes what the model wrote; snippets are judged fairly."""

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from foldscan.demo.charts import Level, Series, bar_chart, condense, heatmap, line_chart, nice_ticks, smooth
from foldscan.demo.report import Report, Sample, write_report
from foldscan.demo.snippets import first_block, parses

EVIL = "<script>alert('x')</script> & \"quotes\""


def report(**changes: object) -> Report:
    metrics = [
        {"kind": "train", "step": s, "loss": 5 / s, "tokens": 100 * s, "expert_load": [[0.25, 0.75], [0.5, 0.5]]}
        for s in range(1, 200)
    ] + [{"kind": "eval", "step": s, "bits_per_byte": 3.0 - s / 100} for s in (50, 100)]
    values: dict = {
        "corpus": "Python",
        "about": EVIL,
        "model_line": "A model.",
        "metrics": metrics,
        "bits_per_byte": [("this model", 1.75, "r"), ("byte 6-gram", 2.13, ""), ("lzma", 1.71, "")],
        "speed": [("Training speed", 3000.0, 1000.0), ("Generation speed", 50.0, 20.0)],
        "parsed": (3, 8),
        "samples": [Sample("def ", EVIL, False), Sample("class ", "A: pass", True), Sample("Prose", "x", None)],
        "seconds": 12.3,
        "total_seconds": 45.0,
        "config": {"run_dir": EVIL},
        "environment": {
            "versions": {"torch": "2"},
            "cpus": 2,
            "threads": 2,
            "machine": "x",
            "python": "3",
            "commit": None,
        },
        **changes,
    }
    return Report(**values)


class Balanced(HTMLParser):
    """Fails on a tag that is not closed in order."""

    VOID = frozenset({"meta", "br", "i", "line", "rect", "circle", "polyline"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.mark.parametrize("changes", [{}, {"parsed": None, "samples": []}, {"metrics": []}])
def test_the_page_is_whole_and_needs_nothing(tmp_path: Path, changes: dict) -> None:
    write_report(report(**changes), tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert "script" not in parser.seen and "&lt;script&gt;" in page
    assert not re.search(r"(src|href)\s*=|https?://|@import|url\(", page)
    assert "1.75" in page and "2.13" in page


def test_numbers_on_the_page_are_those_of_the_run(tmp_path: Path) -> None:
    write_report(report(), tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    for text in ("3.0×", "3,000 against 1,000", "38%", "3 of 8", "0.02 M tokens", "18% fewer", "in 12 seconds"):
        assert text in page, text


def coordinates(svg: str) -> list[tuple[float, float]]:
    line = ElementTree.fromstring(svg).find(".//polyline")
    assert line is not None
    return [(float(x), float(y)) for x, y in (p.split(",") for p in line.attrib["points"].split())]


def test_lines_go_where_the_data_goes() -> None:
    points = [(0.0, 1.0), (5.0, 3.0), (10.0, 2.0)]
    svg = line_chart([Series(points, "line-a")], title="t", x_label="x", levels=[Level(0.0, "zero")])
    (x0, y0), (x1, y1), (x2, y2) = coordinates(svg)
    assert x1 - x0 == pytest.approx(x2 - x1) and y1 < y2 < y0
    assert (y0 - y1) == pytest.approx(2 * (y2 - y1), abs=0.2)
    assert ">zero<" in svg


def test_bars_and_cells_are_in_proportion() -> None:
    svg = bar_chart([("g", [("a", 100.0, "bar-a"), ("b", 25.0, "bar-b")])], title="t", unit="u")
    widths = [float(r.attrib["width"]) for r in ElementTree.fromstring(svg).iter("rect")]
    assert widths[0] == pytest.approx(4 * widths[1], rel=0.01)
    svg = heatmap([[0.0, 0.5, 1.0]], title="t", x_end="e", ideal=0.5)
    shades = [float(r.attrib["style"].split(":")[1]) for r in ElementTree.fromstring(svg).iter("rect")]
    assert shades == [0.04, 0.52, 1.0]


def test_small_helpers() -> None:
    assert nice_ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert all(0.13 <= t <= 0.29 for t in nice_ticks(0.13, 0.29)) and len(nice_ticks(0.13, 0.29)) >= 3
    assert smooth([(0, 2.0), (1, 2.0)]) == [(0, 2.0), (1, 2.0)]
    assert condense([[1, 3, 5, 7]], 2) == [[2.0, 6.0]]
    assert condense([[1, 2]], 80) == [[1.0, 2.0]]
    assert "no data" in line_chart([], title="t", x_label="x")


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("def f(x):\n    return x\n\ndef g():\n    pas", "def f(x):\n    return x\n"),
        ("def f(x):\n    if x:\n        return 1\n    retu", "def f(x):\n    if x:\n        return 1\n"),
        ("import os\nimport sys\n\nclass A:\n    x = 1\n\nprint(", "import os\nimport sys\n\nclass A:\n    x = 1\n"),
        ("try:\n    a()\nexcept E:\n    b()\nc = 1\n", "try:\n    a()\nexcept E:\n    b()\n"),
        ("@property\ndef f(self):\n    return 1\nx", "@property\ndef f(self):\n    return 1\n"),
        ("def f(\n    a,\n):\n    pass\nx = 1\n", "def f(\n    a,\n):\n    pass\n"),
        ("x = 1", "x = 1\n"),
    ],
)
def test_the_first_block_ends_where_the_next_begins(text: str, block: str) -> None:
    assert first_block(text) == block
    assert parses(block)


@pytest.mark.parametrize("code", ["def f(:\n", "x = (\n", "a\x00b", "return return", "(" * 100000])
def test_what_is_no_python_does_not_parse(code: str) -> None:
    assert not parses(code)
