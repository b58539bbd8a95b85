"""Copies the figures of a finished run into results/ and writes the README's tables from them.

python recipes/moe_folding/publish.py runs/moe_folding
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

from foldscan.models.files import read_json, write_json

HERE = Path(__file__).resolve().parent
PICTURES = ("losses.png", "bytes.png", "load.png")
MARKED = re.compile(r"(<!-- figures: [^>]*-->\n).*?(<!-- end -->)", re.S)
Values = dict[str, Any]


def tables(summary: Values) -> str:
    """Thresholds, runs, and bytes, in Markdown."""
    lines = ["| Threshold | Found | Limit | |", "|---|---|---|---|"]
    for name, outcome in summary["thresholds"].items():
        limit = f"<= {outcome['most']:g}" if "most" in outcome else f">= {outcome['least']:g}"
        lines.append(f"| {name} | {outcome['found']:.3g} | {limit} | {'met' if outcome['passed'] else 'not met'} |")
    lines += [
        "",
        "| Run | Mapping | Dispatcher | Steps routed alike | Turned then | Last loss | Held-out bits/byte |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in summary["runs"]:
        routed = f"{run['same_routing_steps']} | {run['turned']}"
        lines.append(
            f"| {run['name']} | {run['mapping']} | {run['dispatcher']} | {routed} | {run['last_loss']:.5f} | "
            f"{run['bits_per_byte']:.5f} |"
        )
    lines += [
        "",
        "| KB a rank sends in a step | All, measured | Planned | EP + ETP, measured | Planned | Of it off the node | "
        "Planned |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in summary["runs"]:
        if run["ranks"] > 1:
            scale = 1e3 * run["ranks"] * run["num_steps"]
            exchange = [line for line in run["bytes"] if line["name"] in ("EP tokens", "ETP tokens")]
            sums = [sum(line[key] for line in run["bytes"]) for key in ("measured", "even")]
            sums += [sum(line[key] for line in exchange) for key in ("measured", "even", "measured_inter")]
            sums += [sum(line["even_inter"] or 0 for line in exchange)]
            lines.append(f"| {run['name']} | " + " | ".join(f"{size / scale:.1f}" for size in sums) + " |")
    return "\n".join(lines)


def main(folder: Path) -> None:
    summary = read_json(folder / "summary.json")
    (HERE / "results").mkdir(exist_ok=True)
    write_json(HERE / "results" / "summary.json", summary)
    for name in PICTURES:
        shutil.copyfile(folder / name, HERE / "results" / name)
    page = HERE / "README.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(MARKED.sub(lambda m: f"{m[1]}{tables(summary)}\n{m[2]}", text), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
