"""The recipe's page: one self-contained HTML file."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

import yaml
from foldscan.models.files import atomic_write_text
from plots import per_rank

Values = dict[str, Any]

_STYLE = """
:root{color-scheme:light dark;--bg:#f6f5f1;--card:#fff;--ink:#1d2130;--soft:#666c7d;--rule:#e4e2da;--good:#1a7f52;
--bad:#b3423a}
@media(prefers-color-scheme:dark){:root{--bg:#12141b;--card:#1a1d27;--ink:#e8e9ee;--soft:#9aa0b2;--rule:#2b2f3c;
--good:#5fcf9a;--bad:#f08a80}
}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:32px;line-height:1.15;margin:6px 0 10px;text-wrap:balance}
h2{font-size:18px;margin:0 0 4px}
p{color:var(--soft);max-width:84ch;margin:0 0 14px}
section{background:var(--card);border:1px solid var(--rule);border-radius:14px;padding:20px 22px;margin:14px 0}
img{width:100%;height:auto;background:#fff;border-radius:8px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px}
td,th{text-align:left;padding:5px 12px 5px 0;border-bottom:1px solid var(--rule);vertical-align:top}
th{color:var(--soft);font-weight:500}
td.n,th.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.yes{color:var(--good);font-weight:600}
.no{color:var(--bad);font-weight:600}
summary{cursor:pointer;color:var(--soft)}
pre{overflow:auto;font-size:12.5px}
"""
_MEANING = {
    "loss_first_steps": "largest difference of the training loss from one process's, first steps, nats",
    "loss_same_routing": "the same, as long as every expert gets as many tokens as in one process, nats",
    "dispatchers": "largest difference of the loss between runs that differ in the dispatcher only, nats",
    "loss": "largest difference of the training loss from one process's, all steps, nats",
    "held_out": "largest difference of held-out bits per byte",
    "bytes": "largest difference of measured bytes from the formula on the counted routing",
    "bytes_without_formula": "bytes sent by collectives without a formula",
    "folded_exchange_off_node": "expert-parallel bytes off the node where experts are folded into one",
    "calibration_pairs_hand_set": "pairs of methods in the published order, hand-set constants, of 33",
    "calibration_pairs_fitted": "the same with the constants fitted on that table",
}


def write_report(runs: list[Values], summary: Values, values: Values, out: Path) -> None:
    """Write ``report.html`` with the pictures that lie in ``out``; it loads nothing from anywhere."""
    passed = sum(outcome["passed"] for outcome in summary["thresholds"].values())
    title = f"One model, {sum(run['ranks'] > 1 for run in runs)} mappings, one learning curve"
    steps, pattern = len(runs[0]["steps"]), values["train"]["model"]["pattern"]
    intro = (
        f"A hybrid language model of {summary['parameters']:,} parameters ({pattern}: M Mamba-2, E mixture of experts, "
        f"* attention, - MLP) learns {summary['corpus']} for {steps} steps in fp32, in one process and divided over "
        f"{values['world']} in several ways (gloo, CPU). A node is made up: {values['node']} ranks. {passed} of "
        f"{len(summary['thresholds'])} thresholds, set before the run, are met."
    )
    if values["train"]["steps"] < 10:
        intro += " This is the smoke test: it shows that the parts work, and proves nothing else."
    body = [
        f"<header><h1>{html.escape(title)}</h1><p>{html.escape(intro)}</p></header>",
        _section("Thresholds", "Set in thresholds.yaml before the run.", _thresholds(summary)),
        _section(
            "Loss",
            "The same batches everywhere. What differs is the order of sums: partial products over tensor-parallel "
            "ranks, the parts of a ring, the states between context ranks. Where two experts are nearly equal, a "
            "rounding changes a router's choice, and from there on the runs are two. The control is one process with a "
            "learning rate that is 1e-7 larger: what rounding alone does.",
            _image(out / "losses.png") + _runs(summary["runs"]),
        ),
        _section(
            "Bytes",
            "Counted by every rank in every collective of training (pipeline stages talk through "
            "torch.distributed.pipelining and are not counted), beside the planner's formulas: with even routing and "
            "every cut inside a document, and on the routing and the documents of this run. The last must be equal to "
            "the byte. Off the node: a gathered shard counts once a node.",
            _image(out / "bytes.png") + "".join(_bytes(run) for run in runs if run["ranks"] > 1),
        ),
        _section(
            "Expert load",
            "Tokens of each expert over training, one process; other runs have the same but for turned choices.",
            _image(out / "load.png"),
        ),
        _section(
            "The planner beside published figures",
            "Table 3 of arXiv:2504.14960. Nothing here was measured by this run: published MFU on H100 clusters, and "
            "the planner's. The hand-set constants were set by hand; the fitted ones were fitted on this table, and "
            "show only that the model can express it. Stars are folded mappings.",
            _image(out / "calibration.png") + _calibration(summary["calibration"]),
        ),
        _section("This run", "", _facts(summary, values)),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,'
        f'initial-scale=1"><title>MoE Parallel Folding</title><style>{_STYLE}</style></head><body><main>{"".join(body)}'
        "</main></body></html>\n"
    )
    atomic_write_text(out / "report.html", page)


def _section(title: str, note: str, body: str) -> str:
    about = f"<p>{html.escape(note)}</p>" if note else ""
    return f"<section><h2>{html.escape(title)}</h2>{about}{body}</section>"


def _image(file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="{file.stem}" src="data:image/png;base64,{data}">'


def _table(head: list[str], rows: list[list[str]], texts: int = 1) -> str:
    """Cells are HTML; the first ``texts`` columns are text, the rest numbers."""
    kinds = ["" if i < texts else ' class="n"' for i in range(len(head))]
    lines = ["".join(f"<th{kind}>{cell}</th>" for kind, cell in zip(kinds, head))]
    lines += ["".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row)) for row in rows]
    return '<div class="scroll"><table>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def _thresholds(summary: Values) -> str:
    rows = []
    for name, outcome in summary["thresholds"].items():
        limit = f"&le; {outcome['most']:g}" if "most" in outcome else f"&ge; {outcome['least']:g}"
        verdict = '<span class="yes">met</span>' if outcome["passed"] else '<span class="no">not met</span>'
        rows.append([html.escape(_MEANING[name]), f"{outcome['found']:.3g}", limit, verdict])
    return _table(["", "found", "limit", ""], rows)


def _runs(runs: list[Values]) -> str:
    rows = [
        [
            html.escape(run["name"]),
            html.escape(run["mapping"]),
            run["dispatcher"],
            str(run["same_routing_steps"]),
            str(run["turned"]),
            f"{run['last_loss']:.6f}",
            f"{run['bits_per_byte']:.6f}",
            f"{run['seconds']:.0f}",
        ]
        for run in runs
    ]
    note = (
        "<p>Seconds are for information only: many gloo processes on few CPU cores take longer than one, and say "
        "nothing of GPUs.</p>"
    )
    return (
        _table(
            [
                "run",
                "mapping",
                "dispatcher",
                "steps routed alike",
                "turned then",
                "last loss",
                "held-out bits/byte",
                "seconds in steps",
            ],
            rows,
            texts=3,
        )
        + note
    )


def _bytes(run: Values) -> str:
    def shown(size: float | None) -> str:
        return "" if size is None else f"{per_rank(run, size):,.2f}"

    rows = []
    for line in run["bytes"]:
        equal = line["measured"] == line["counted"]
        verdict = '<span class="yes">equal</span>' if equal else '<span class="no">differs</span>'
        figures = [line[key] for key in ("even", "counted", "measured", "measured_inter", "even_inter")]
        rows.append([html.escape(line["name"]), *map(shown, figures), verdict])
    head = ["KB a rank and step", "planned, even", "on counted routing", "measured", "off the node", "planned off", ""]
    name = f"{run['name']}: {run['mapping']}, {run['dispatcher']}"
    return f"<details open><summary>{html.escape(name)}</summary>{_table(head, rows)}</details>"


def _calibration(rows: list[Values]) -> str:
    def percent(value: float | None) -> str:
        return "out of memory" if value is None else f"{100 * value:.1f}"

    cells = [
        [
            html.escape(r["model"]),
            html.escape(r["mapping"]),
            *(percent(r[k]) for k in ("published", "hand_set", "fitted")),
        ]
        for r in rows
    ]
    head = ["model", "mapping", "published MFU %", "hand-set", "fitted"]
    return f"<details><summary>Every line</summary>{_table(head, cells, texts=2)}</details>"


def _facts(summary: Values, values: Values) -> str:
    environment = summary["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    rows = [
        ["Machine", f"{environment['cpus']} CPUs, {environment['machine']}, gloo"],
        ["Versions", html.escape(f"{versions}, Python {environment['python']}")],
        ["Commit", html.escape(str(environment["commit"] or "unknown"))],
    ]
    config = html.escape(yaml.safe_dump(values, sort_keys=False))
    errors = ", ".join(f"{name} {100 * value:.1f} %" for name, value in summary["calibration_rms_log_error"].items())
    return (
        _table(["", ""], rows, texts=2)
        + f"<p>RMS log error of the calibration: {html.escape(errors)}.</p>"
        + f"<details><summary>Configuration</summary><pre>{config}</pre></details>"
    )
