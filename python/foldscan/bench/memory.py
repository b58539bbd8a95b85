"""Extra memory of one call, measured in a fresh process: the peak of resident memory over what the inputs took.

    python -m foldscan.bench.memory '{"op": "scan", "shape": [2048, 128, 64, 128, 8], ...}'

A process of its own, because an allocator and our scratch buffers keep what earlier calls took.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")


def _resident(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {field}")


def measure_here(op: str, shape: list[int], dtype: str, mode: str, impl: str, way: str, threads: int) -> int:
    """Bytes that one call takes at most beyond its inputs; what it returns counts. Linux only."""
    import torch

    from foldscan.bench.case import OURS, variants
    from foldscan.bench.cases import CASES
    from foldscan.bench.measure import make_inputs, runner

    torch.set_num_threads(threads)
    case = next(c for c in CASES if c.op == op)
    # Thread pools, autograd's engine and what Python imports at the first call of grad (35 MB) come before the count.
    tiny = torch.ones(64, 64, requires_grad=True)
    torch.autograd.grad(tiny @ tiny, tiny, torch.ones(64, 64))
    call = runner(
        variants(case.implementations(*shape)[impl])[way],
        make_inputs(case, tuple(shape), dtype, "cpu"),
        mode == "fwd+bwd",
        "cpu",
    )
    if "compile" in impl and impl != OURS:
        call()  # compilation takes memory once, which is not the op's
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak (VmHWM) starts anew
    call()
    return _resident("VmHWM") - before


def extra_memory(row: dict[str, Any], threads: int) -> int | None:
    """`measure_here` for a row of the driver, in a fresh process; None where this system cannot tell."""
    if not STATUS.exists():
        return None
    task = {k: row[k] for k in ("op", "dtype", "mode", "impl", "way")}
    task |= {"shape": list(row["shape"].values()), "threads": threads}
    command = [sys.executable, "-m", "foldscan.bench.memory", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


if __name__ == "__main__":
    print(measure_here(**json.loads(sys.argv[1])))
