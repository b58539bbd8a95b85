"""Cases of pruned layers."""

from __future__ import annotations

from foldscan.bench.case import Case

CASES: list[Case] = []
