"""Regression numbers of the kernels, for pytest-benchmark and by instruction counts.

    make bench-regression                                     time and count; fails where a count grew by 2 %
    pytest benchmarks/test_regression.py --benchmark-compare  against a saved run of pytest-benchmark
    FOLDSCAN_UPDATE_COUNTS=1 make bench-regression            the counts of this commit become the baseline

Times swing with the machine; instruction counts (valgrind's callgrind, AVX2 copies of the kernels, one thread) are the
same on every machine with the same compiler, so they can be compared with a committed file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from foldscan.bench.case import OURS, variants
from foldscan.bench.cases import CASES
from foldscan.bench.measure import make_inputs, runner

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "build" / "cpp" / "benchmarks" / "cpp" / "bench_kernels"
BASELINE = ROOT / "benchmarks" / "results" / "instructions.json"
ALLOWED = 1.02

# Small enough for a round in milliseconds.
SHAPES = {
    "linear": (64, 1024, 1024),
    "scan": (256, 8, 64, 64, 1),
    "causal_conv1d": (256, 1024),
    "selective_state_update": (4, 16, 64, 64, 1),
    "rmsnorm_gated": (256, 1024, 8),
    "attention_causal": (256, 8, 2, 64),
    "moe_mlp": (64, 256, 128, 8, 2),
    "linear_cross_entropy": (128, 256, 4096),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", SHAPES)
def test_time(op: str, dtype: str, benchmark: Any) -> None:
    case = next(c for c in CASES if c.op == op)
    torch.set_num_threads(1)
    ours = next(iter(variants(case.implementations(*SHAPES[op])[OURS]).values()))
    benchmark(runner(ours, make_inputs(case, SHAPES[op], dtype, "cpu"), False, "cpu"))


def kernels() -> list[str]:
    """Names that the C++ program knows; none before `make test-cpp` has built it."""
    if not PROGRAM.exists():
        return []
    return subprocess.run([PROGRAM, "--list"], capture_output=True, text=True, check=True).stdout.split()


def count(kernel: str) -> int:
    """Instructions of one call and of making its inputs."""
    environment = {**os.environ, "FOLDSCAN_ISA": "avx2"}
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", str(PROGRAM), "--once", kernel]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    collected = re.search(r"Collected\s*:\s*(\d+)", done.stderr)
    assert collected, done.stderr
    return int(collected[1])


@pytest.mark.skipif(not shutil.which("valgrind"), reason="valgrind is not installed")
@pytest.mark.skipif(not PROGRAM.exists(), reason=f"{PROGRAM.relative_to(ROOT)} is not built (make test-cpp)")
@pytest.mark.parametrize("kernel", kernels())
def test_instructions(kernel: str) -> None:
    compiler = subprocess.run(["c++", "-dumpfullversion"], capture_output=True, text=True).stdout.strip()
    known = json.loads(BASELINE.read_text()) if BASELINE.exists() else {"compiler": compiler, "counts": {}}
    got = count(kernel)
    if os.environ.get("FOLDSCAN_UPDATE_COUNTS"):
        counts = known["counts"] if known["compiler"] == compiler else {}
        BASELINE.write_text(json.dumps({"compiler": compiler, "counts": {**counts, kernel: got}}, indent=1) + "\n")
        return
    if known["compiler"] != compiler:
        pytest.skip(f"the baseline is of g++ {known['compiler']}, this is {compiler}")
    assert kernel in known["counts"], f"{kernel} has no baseline: run with FOLDSCAN_UPDATE_COUNTS=1"
    limit = known["counts"][kernel] * ALLOWED
    assert got <= limit, f"{kernel}: {got:,} instructions, baseline {known['counts'][kernel]:,}"
