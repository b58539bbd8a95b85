"""One driver for all benchmarks: ours and the peers interleaved in one process, one JSON line a row.

    python benchmarks/run.py                                   every op at its standard shapes
    python benchmarks/run.py --op scan --dtype bfloat16 --mode fwd+bwd --out results.jsonl
    python benchmarks/run.py --list

Before timing, all implementations of a case must agree. Rounds are interleaved (one call of each implementation per
round), so that a noisy machine disturbs all alike; p20 / p50 / p80 are over rounds. The roofline bound of a row is
max(FLOPs / peak, bytes / copy bandwidth), both measured in the same run; `roofline` is that bound over the median.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import foldscan
from cases import CASES, Case
from foldscan import _native, info

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def copy_bandwidth() -> float:
    """Bytes per second (read + written) of a copy beyond the caches, best of five."""
    source = torch.ones(64 << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = max(best, 2 * source.numel() / (time.perf_counter() - start))
    return best


def commit() -> str:
    """The commit of this checkout, marked if there are changes."""
    try:
        root = Path(__file__).parent
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True)
        return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
    except OSError:
        return "unknown"


def percentile(values: list[float], p: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(p * (len(ordered) - 1)))]


def runner(fn: Callable[..., Any], inputs: dict[str, Any], backward: bool) -> Callable[[], Any]:
    """A call of ``fn``; with backward, the gradients of its float inputs for a fixed upstream gradient as well."""
    if not backward:

        def forward() -> Any:
            with torch.no_grad():
                return fn(**inputs)

        return forward
    leaves = {
        k: v.detach().clone().requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    wanted = [v for v in leaves.values() if isinstance(v, torch.Tensor) and v.requires_grad]

    def both() -> Any:
        out = fn(**leaves)
        return out, torch.autograd.grad(out, wanted, torch.ones_like(out), allow_unused=True)

    return both


def first_tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else first_tensor(value[0])


def disagreement(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative RMS difference."""
    got, want = got.detach().double(), want.detach().double()
    return ((got - want).square().mean().sqrt() / want.square().mean().sqrt().clamp_min(1e-30)).item()


def measure(case: Case, shape: tuple[int, ...], dtype_name: str, mode: str, options: argparse.Namespace) -> list[dict]:
    """All rows of one case at one shape."""
    dtype = DTYPES[dtype_name]
    torch.manual_seed(0)
    inputs = case.inputs(*shape, dtype=dtype)
    calls, rows, memory = {}, [], {}
    want = None
    for name, fn in case.implementations(*shape).items():
        if options.against == "none" and name != "foldscan":
            continue
        try:
            calls[name] = runner(fn, inputs, mode == "fwd+bwd")
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            got = first_tensor(calls[name]())
            memory[name] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        except (RuntimeError, NotImplementedError, ImportError) as error:
            if name == "foldscan":  # a peer may lack the op, we may not
                raise
            calls.pop(name, None)
            rows.append({"op": case.op, "impl": name, "shape": shape, "dtype": dtype_name, "missing": str(error)[:200]})
            continue
        want = got if want is None else want
        limit = 1e-4 if dtype == torch.float32 else 3e-2
        if disagreement(got, want) > limit:
            raise SystemExit(f"{case.op} {shape}: {name} differs from foldscan by {disagreement(got, want):.2e}")
    times: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + options.seconds * len(calls)
    while len(next(iter(times.values()))) < options.rounds and (
        time.perf_counter() < deadline or len(next(iter(times.values()))) < 3
    ):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    flops, moved = case.flops(*shape), case.bytes(*shape, element=dtype.itemsize)
    if mode == "fwd+bwd":
        flops, moved = flops * case.backward_flops, moved * 3
    bound = max(flops / options.peak[dtype_name], moved / options.copy)
    for name, samples in times.items():
        p50 = percentile(samples, 0.5)
        rows.append(
            {
                "op": case.op,
                "impl": name,
                "shape": dict(zip(case.dims, shape)),
                "dtype": dtype_name,
                "mode": mode,
                "device": options.device_name,
                "threads": torch.get_num_threads(),
                "isa": options.isa,
                "p20_ms": percentile(samples, 0.2) * 1e3,
                "p50_ms": p50 * 1e3,
                "p80_ms": percentile(samples, 0.8) * 1e3,
                "rounds": len(samples),
                "gflops": flops / p50 / 1e9,
                "gbytes_s": moved / p50 / 1e9,
                "roofline": bound / p50,
                "peak_gflops": options.peak[dtype_name] / 1e9,
                "copy_gbytes_s": options.copy / 1e9,
                "first_call_rss_mb": memory[name] / 2**20,
                "agrees": True,
                "versions": {"foldscan": foldscan.__version__, "torch": torch.__version__},
                "commit": options.commit,
                "load": os.getloadavg()[0],
            }
        )
    return rows


def device_name() -> str:
    """CPU model where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="only these ops (repeatable)")
    parser.add_argument("--shape", help="comma-separated sizes instead of the standard shapes (with one --op)")
    parser.add_argument("--dtype", choices=list(DTYPES), action="append")
    parser.add_argument("--mode", choices=["fwd", "fwd+bwd"], action="append")
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--against", choices=["peers", "none"], default="peers")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=25, help="at most this many rounds")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each implementation of a row")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file as well")
    parser.add_argument("--list", action="store_true", help="list ops and shapes")
    options = parser.parse_args()
    if options.list:
        for case in CASES:
            print(f"{case.op:24} {', '.join(case.dims)}: {case.shapes}")
        return 0
    chosen = [c for c in CASES if not options.op or c.op in options.op]
    if not chosen or (options.shape and len(chosen) != 1):
        parser.error(f"--op: got {options.op}, want one or more of {[c.op for c in CASES]} (exactly one with --shape)")
    torch.set_num_threads(options.threads)
    # One thread's rate times the threads: what all of them could do if nothing else slowed them down.
    options.peak = {name: _native.peak_flops(name, 0.5) * options.threads for name in DTYPES}
    options.copy = copy_bandwidth()
    options.device_name, options.isa, options.commit = device_name(), info.report()["isa"], commit()
    for case in chosen:
        shapes = [tuple(int(s) for s in options.shape.split(","))] if options.shape else case.shapes
        for shape in shapes:
            for dtype in options.dtype or list(DTYPES):
                for mode in options.mode or case.modes:
                    for row in measure(case, shape, dtype, mode, options):
                        line = json.dumps(row)
                        print(line, flush=True)
                        if options.out:
                            with options.out.open("a") as f:
                                f.write(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
