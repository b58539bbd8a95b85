"""Writes what docs/planner.md takes from the planner: the calibration table and the two pictures."""

from __future__ import annotations

import re
from pathlib import Path

from foldscan.parallel.planner import load_constants, plan, scale
from foldscan.parallel.planner.calibration import calibration, calibration_table
from foldscan.parallel.planner.plots import plot_mappings, plot_scale

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "planner.md"
MARKED = re.compile(r"(<!-- calibration: [^>]*-->\n).*?(<!-- end -->)", re.S)


def page(text: str) -> str:
    """The page with the calibration table as it is computed now."""
    table = calibration_table(calibration(), calibration(load_constants("hand-set")))
    return MARKED.sub(lambda found: found[1] + table + "\n" + found[2], text)


def main() -> None:
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    model = "mixtral-8x22b-g8t8"
    images = ROOT / "docs" / "images"
    plot_mappings(plan(model, gpus=128), images / "planner_mappings.png")
    counts = [2**n for n in range(7, 15)]
    plot_scale(scale(model, gpus=counts, gbs=1024), images / "planner_scale.png")


if __name__ == "__main__":
    main()
