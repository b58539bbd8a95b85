"""All cases of the benchmark."""

from __future__ import annotations

from foldscan.bench import attention, linear, losses, moe, overhead, pruning, ssm
from foldscan.bench.case import Case

CASES: list[Case] = [
    *linear.CASES,
    *ssm.CASES,
    *attention.CASES,
    *moe.CASES,
    *losses.CASES,
    *pruning.CASES,
    *overhead.CASES,
]
