"""Writes the benchmark tables of README.md and docs/benchmarks.md from the JSON lines under benchmarks/results.

python benchmarks/table.py            rewrite the sections between the markers
python benchmarks/table.py --check    exit 1 if they are not what the results say
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md"]
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def rows() -> list[dict[str, Any]]:
    """Rows of the operator benchmark."""
    path = RESULTS / "cpu.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def table() -> str:
    """One line a case: our median, the roofline fraction, and how many times slower each peer was in the same run."""
    measured = [r for r in rows() if "missing" not in r]
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in measured:
        key = (row["op"], tuple(row["shape"].items()), row["dtype"], row["mode"])
        cases.setdefault(key, {})[row["impl"]] = row
    first = measured[0]
    lines = [
        f"{first['device']}, {first['threads']} threads, {first['isa']}, PyTorch {first['versions']['torch']}; "
        f"medians of interleaved calls (`python benchmarks/run.py`, file `benchmarks/results/cpu.jsonl`).",
        "",
        "| op | shape | dtype | mode | ours, ms | of roofline | peers, times slower |",
        "|---|---|---|---|---|---|---|",
    ]
    for (op, shape, dtype, mode), impls in cases.items():
        ours = impls["foldscan"]
        peers = ", ".join(f"{n} {r['p50_ms'] / ours['p50_ms']:.2g}x" for n, r in impls.items() if n != "foldscan")
        sizes = " ".join(f"{k}={v}" for k, v in shape)
        short = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
        ms = f"{ours['p50_ms']:.3g}"
        lines.append(f"| {op} | {sizes} | {short} | {mode} | {ms} | {ours['roofline']:.0%} | {peers} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    stale = []
    for page in PAGES:
        text = page.read_text()
        fresh = re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{table()}\n{END}", text, flags=re.S)
        if fresh != text:
            stale.append(page.name)
            if not options.check:
                page.write_text(fresh)
    print(f"{'stale' if options.check else 'rewritten'}: {stale or 'nothing'}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
