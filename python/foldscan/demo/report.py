"""The demo's page: one self-contained HTML file, light or dark as the reader's system is."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foldscan.demo.charts import Level, Series, bar_chart, condense, heatmap, line_chart, smooth
from foldscan.models.files import atomic_write_text

_STYLE = """
:root{color-scheme:light dark;--bg:#f6f5f1;--card:#fff;--ink:#1d2130;--soft:#666c7d;--rule:#e4e2da;--a:#2457c5;
--b:#d9622b;--good:#1a7f52;--bad:#b3423a;--code:#f4f3ee}
@media(prefers-color-scheme:dark){:root{--bg:#12141b;--card:#1a1d27;--ink:#e8e9ee;--soft:#9aa0b2;--rule:#2b2f3c;
--a:#7aa5ff;--b:#ff9a66;--good:#5fcf9a;--bad:#f08a80;--code:#141721}
}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:44px 24px 64px}
header .mark{font-weight:700;letter-spacing:.02em;color:var(--a);font-size:15px}
h1{font-size:34px;line-height:1.15;margin:6px 0 10px;letter-spacing:-.02em;text-wrap:balance}
header p{margin:0;color:var(--soft);max-width:76ch}
h2{font-size:18px;margin:0 0 2px;letter-spacing:-.01em}
.note{color:var(--soft);font-size:14px;margin:0 0 14px;max-width:80ch}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:14px;margin:28px 0 14px}
.tile,.card{background:var(--card);border:1px solid var(--rule);border-radius:14px}
.tile{padding:16px 18px}
.tile .name{font-size:13px;color:var(--soft)}
.tile .value{font-size:32px;font-weight:650;letter-spacing:-.02em;font-variant-numeric:tabular-nums;line-height:1.25}
.tile .unit{font-size:14px;margin-bottom:4px}
.tile .more{font-size:13px;color:var(--soft)}
.grid2{display:grid;grid-template-columns:1fr 1fr;gap:14px}
@media(max-width:860px){.grid2{grid-template-columns:1fr}
}
.card{padding:20px 22px;margin-bottom:14px;min-width:0}
.grid2 .card{margin-bottom:0}
.grid2{margin-bottom:14px}
svg{width:100%;height:auto;display:block;overflow:visible;
font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
svg .grid{stroke:var(--rule);stroke-width:1}
svg .tick{fill:var(--soft);font-variant-numeric:tabular-nums}
polyline{fill:none;stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}
.line-a{stroke:var(--a)}
.line-b,polyline.dots-b{stroke:var(--b)}
circle.dots-b{fill:var(--b)}
polyline.faint{stroke:var(--a);stroke-width:1;opacity:.28}
.level{stroke:var(--soft);stroke-width:1.2;stroke-dasharray:5 5}
.level-label{fill:var(--soft)}
rect.bar-a{fill:var(--a)}
rect.bar-b{fill:var(--soft);opacity:.55}
.bar-group{fill:var(--ink);font-weight:600}
.bar-label{fill:var(--soft)}
.bar-value{fill:var(--ink);font-variant-numeric:tabular-nums}
rect.heat{fill:var(--a)}
.samples{display:grid;grid-template-columns:repeat(auto-fit,minmax(330px,1fr));gap:14px}
figure{margin:0;border:1px solid var(--rule);border-radius:10px;overflow:hidden;min-width:0;display:flex;
flex-direction:column;background:var(--code)}
figcaption{font-size:12.5px;padding:6px 12px;border-top:1px solid var(--rule);background:var(--card)}
.yes{color:var(--good)}
.no{color:var(--bad)}
pre{margin:0;flex:1;padding:12px;background:var(--code);overflow:auto;
font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;max-height:330px;
white-space:pre-wrap;overflow-wrap:anywhere}
pre b{font-weight:600;color:var(--a)}
table{border-collapse:collapse;width:100%;font-size:14px}
td,th{text-align:left;padding:6px 10px 6px 0;border-bottom:1px solidvar(--rule);vertical-align:top}
th{color:var(--soft);font-weight:500}
td.n,th.n{text-align:right;white-space:nowrap;padding-left:10px;font-variant-numeric:tabular-nums}
tr.ours td{font-weight:650;color:var(--a)}
tr:last-child td,tr:last-child th{border-bottom:0}
td:first-child{white-space:nowrap}
details{margin-top:12px}
summary{cursor:pointer;color:var(--soft);font-size:14px}
details pre{margin-top:10px;border-radius:10px}
footer{color:var(--soft);font-size:13px;margin-top:20px}
"""


@dataclass
class Sample:
    """A generated text. ``parses`` is None where that is no question (prose)."""

    prompt: str
    text: str
    parses: bool | None


@dataclass
class Report:
    """All that the page shows.

    Attributes:
        corpus: name; about: one line on it.
        model_line: the model in words.
        metrics: records of ``metrics.jsonl``.
        bits_per_byte: rows of (name, value, remark), the model's named ``"this model"``.
        speed: rows of (what, ours, eager) in tokens a second, medians of interleaved runs.
        parsed: (parsing, all) snippets, None for prose.
        samples: generated texts.
        seconds: training time; total_seconds: the whole demo's until the page.
        config, environment: dumped at the end.
    """

    corpus: str
    about: str
    model_line: str
    metrics: list[dict[str, Any]]
    bits_per_byte: list[tuple[str, float, str]]
    speed: list[tuple[str, float, float]]
    parsed: tuple[int, int] | None
    samples: list[Sample]
    seconds: float
    total_seconds: float
    config: dict[str, Any]
    environment: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def _tile(name: str, value: str, small: str, more: str) -> str:
    return (
        f'<div class="tile"><div class="name">{html.escape(name)}</div><div class="value">{html.escape(value)}</div>'
        f'<div class="unit">{html.escape(small)}</div><div class="more">{html.escape(more)}</div></div>'
    )


def _card(title: str, note: str, body: str) -> str:
    return f'<section class="card"><h2>{html.escape(title)}</h2><p class="note">{html.escape(note)}</p>{body}</section>'


def _tiles(report: Report) -> str:
    ours = next(v for n, v, _ in report.bits_per_byte if n == "this model")
    ngram = next((v for n, v, _ in report.bits_per_byte if n.endswith("-gram")), None)
    against = ""
    if ngram is not None:
        against = f"n-gram baseline {ngram:.2f}" + (f": {1 - ours / ngram:.0%} fewer" if ours < ngram else "")
    tiles = [_tile("Held-out text", f"{ours:.2f}", "bits per byte", against)]
    for what, fast, eager in report.speed[:2]:
        tiles.append(
            _tile(what, f"{fast / eager:.1f}×", "eager PyTorch", f"{fast:,.0f} against {eager:,.0f} tokens a second")
        )
    if report.parsed is not None:
        good, total = report.parsed
        tiles.append(
            _tile("Snippets that parse", f"{good / max(1, total):.0%}", f"{good} of {total}", "as Python, by ast.parse")
        )
    last = report.metrics[-1] if report.metrics else {}
    tokens = max((r.get("tokens", 0) for r in report.metrics if r["kind"] == "train"), default=0)
    tiles.append(
        _tile(
            "Trained", f"{report.seconds:.0f}", "seconds", f"{tokens / 1e6:.2f} M tokens, {last.get('step', 0)} steps"
        )
    )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _curves(report: Report) -> str:
    train = [(float(r["step"]), float(r["loss"])) for r in report.metrics if r["kind"] == "train"]
    held = [(float(r["step"]), float(r["bits_per_byte"])) for r in report.metrics if r["kind"] == "eval"]
    loss = line_chart(
        [Series(train, "faint"), Series(smooth(train, 0.8), "line-a")], title="training loss", x_label="step"
    )
    levels = [Level(v, f"{n} {v:.2f}") for n, v, _ in report.bits_per_byte if n != "this model"]
    bits = line_chart([Series(held, "dots-b")], title="held-out bits per byte", x_label="step", levels=levels)
    return (
        '<div class="grid2">'
        + _card("Training loss", "Nats a token; the strong line is a moving average.", loss)
        + _card("Held-out bits per byte", "Files that the model never saw; lower is better.", bits)
        + "</div>"
    )


def _compression(report: Report) -> str:
    rows = "".join(
        f'<tr{" class=ours" if n == "this model" else ""}><td>{html.escape(n)}</td><td class="n">{v:.3f}</td>'
        f"<td>{html.escape(remark)}</td></tr>"
        for n, v, remark in sorted(report.bits_per_byte, key=lambda r: r[1])
    )
    table = f'<table><tr><th>predictor</th><th class="n">bits per byte</th><th></th></tr>{rows}</table>'
    return _card("Against simpler predictors", "The same held-out bytes for all; lower is better.", table)


def _speed(report: Report) -> str:
    groups = [
        (what, [("foldscan", fast, "bar-a"), ("eager PyTorch", eager, "bar-b")]) for what, fast, eager in report.speed
    ]
    note = "The same model and weights; runs alternate, medians are shown."
    return _card("Tokens a second", note, bar_chart(groups, title="tokens per second", unit="tok/s"))


def _experts(report: Report) -> str:
    records = [r for r in report.metrics if r["kind"] == "train" and r.get("expert_load")]
    if not records:
        return ""
    layers, experts = len(records[0]["expert_load"]), len(records[0]["expert_load"][0])
    maps = []
    for layer in range(layers):
        rows = [[r["expert_load"][layer][e] for r in records] for e in range(experts)]
        picture = heatmap(
            condense(rows, 80),
            title=f"expert load, layer {layer}",
            x_end=f"step {records[-1]['step']}",
            ideal=1 / experts,
        )
        maps.append(f'<div><p class="note">expert layer {layer + 1}</p>{picture}</div>')
    note = (
        f"Share of the tokens that each of the {experts} experts takes, over training. An even load is "
        f"{1 / experts:.1%}, half the full colour."
    )
    return _card("Expert load", note, f'<div class="grid2">{"".join(maps)}</div>')


def _samples(report: Report) -> str:
    if not report.samples:
        return ""
    figures = []
    for sample in report.samples:
        verdict = ""
        if sample.parses is not None:
            style, words = ("yes", "parses") if sample.parses else ("no", "does not parse")
            verdict = f'<figcaption class="{style}">{words}</figcaption>'
        figures.append(
            f"<figure><pre><b>{html.escape(sample.prompt)}</b>{html.escape(sample.text)}</pre>{verdict}</figure>"
        )
    note = (
        "The first draw for each prompt (in colour) at temperature 0.6 and top-p 0.95, not chosen. A model of this "
        "size and training writes form, not sense."
    )
    return _card("Samples", note, f'<div class="samples">{"".join(figures)}</div>')


def _facts(report: Report) -> str:
    environment = report.environment
    versions = ", ".join(f"{k} {v}" for k, v in environment.get("versions", {}).items() if v)
    kernels = environment.get("kernels", {})
    rows = [
        ("Model", report.model_line),
        ("Corpus", report.about),
        (
            "Machine",
            f"{environment.get('cpus')} CPUs, {environment.get('threads')} threads, {environment.get('machine')}",
        ),
        ("Kernels", ", ".join(f"{k} {v}" for k, v in kernels.items() if isinstance(v, (str, int)))),
        ("Versions", f"{versions}, Python {environment.get('python')}"),
        ("Commit", str(environment.get("commit") or "unknown")),
        *(("Note", note) for note in report.notes),
    ]
    table = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows if v)
    config = html.escape(json.dumps(report.config, indent=2))
    return (
        f'<section class="card"><h2>This run</h2><table>{table}</table>'
        f"<details><summary>Configuration</summary><pre>{config}</pre></details></section>"
    )


def write_report(report: Report, path: Path) -> None:
    """Write the page, atomically. It loads nothing from anywhere."""
    ours = next(v for n, v, _ in report.bits_per_byte if n == "this model")
    body = "".join(
        [
            '<header><div class="mark">foldscan</div>',
            f"<h1>A hybrid language model learns {html.escape(report.corpus)} in {report.seconds:.0f} seconds</h1>",
            f"<p>{html.escape(report.model_line)} Trained from nothing on {html.escape(report.about)} with foldscan's "
            f"own CPU kernels; it predicts unseen files at {ours:.2f} bits per byte.</p></header>",
            _tiles(report),
            _curves(report),
            '<div class="grid2">',
            _speed(report),
            _compression(report),
            "</div>",
            _experts(report),
            _samples(report),
            _facts(report),
            f"<footer>Written by <code>foldscan demo</code> in {report.total_seconds:.0f} seconds in all.</footer>",
        ]
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,'
        f'initial-scale=1"><title>foldscan demo: {html.escape(report.corpus)}</title><style>{_STYLE}</style></head>'
        f"<body><main>{body}</main></body></html>\n"
    )
    atomic_write_text(path, page)
