"""Timing of one case: ours and the peers interleaved, checked against each other first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from foldscan import _native
from foldscan.bench.case import OURS, Case, variants

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Relative RMS difference between two implementations beyond which nothing is timed: (forward, gradients).
AGREEMENT = {"float32": (1e-4, 2e-3), "bfloat16": (3e-2, 8e-2)}

# What a peer raises where it lacks the op, the dtype or the device.
LACKING = (RuntimeError, ImportError, AttributeError)


@dataclass(frozen=True)
class Machine:
    """What the machine can do, measured in the same run."""

    device: str
    peak: dict[str, float]  # FLOP/s by dtype name, all threads
    copy: float  # bytes/s read and written


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def copy_bandwidth(device: str) -> float:
    """Bytes per second (read + written) of a copy beyond the caches, best of nine."""
    source = torch.ones((64 if device == "cpu" else 1024) << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(9):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = max(best, 2 * source.numel() / (time.perf_counter() - start))
    return best


def matmul_peak(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a large ``torch.mm``: the peak of devices for which we have no micro-kernel of our own."""
    n = 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def machine(device: str, threads: int) -> Machine:
    """Peaks of this machine. On a CPU: one thread's micro-kernel rate times the threads."""
    if device == "cpu":
        peak = {name: _native.peak_flops(name, 0.5) * threads for name in DTYPES}
    else:
        peak = {name: matmul_peak(dtype, device) for name, dtype in DTYPES.items()}
    return Machine(device, peak, copy_bandwidth(device))


def percentile(values: list[float], p: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(p * (len(ordered) - 1)))]


def make_inputs(case: Case, shape: tuple[int, ...], dtype: str, device: str) -> dict[str, Any]:
    """The case's inputs, the same at every call."""
    torch.manual_seed(0)
    inputs = case.inputs(*shape, dtype=DTYPES[dtype])
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def runner(fn: Callable[..., Any], inputs: dict[str, Any], backward: bool, device: str) -> Callable[[], Any]:
    """A call of ``fn`` that has finished when it returns; with backward, the gradients of its inputs as well."""
    if not backward:

        def forward() -> Any:
            with torch.no_grad():
                out = fn(**inputs)
            synchronize(device)
            return out

        return forward
    leaves = {
        k: v.detach().clone().requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    wanted = [v for v in leaves.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    upstream: list[torch.Tensor] = []  # made at the first call: its memory and time are not the op's

    def both() -> Any:
        out = fn(**leaves)
        if not upstream:
            upstream.append(torch.ones_like(out))
        grads = torch.autograd.grad(out, wanted, upstream[0], allow_unused=True)
        synchronize(device)
        return out, *grads

    return both


def tensors(value: Any) -> list[torch.Tensor | None]:
    """The first tensor of an output, or that and the gradients."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value[0], torch.Tensor):
        return list(value)
    return tensors(value[0])


def disagreement(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative RMS difference."""
    got, want = got.detach().double(), want.detach().double()
    return ((got - want).square().mean().sqrt() / want.square().mean().sqrt().clamp_min(1e-30)).item()


def check(case: Case, name: str, got: Any, want: Any, dtype: str, backward: bool) -> None:
    """Refuses to time what differs."""
    pairs = list(zip(tensors(got), tensors(want)))
    for i, (a, b) in enumerate(pairs if backward else pairs[:1]):
        if a is None or b is None:
            continue
        limit, difference = AGREEMENT[dtype][int(i > 0)], disagreement(a, b)
        if not difference <= limit:
            what = f"gradient {i}" if i else "output"
            raise SystemExit(f"{case.op} {dtype}: {what} of {name} differs from foldscan's by {difference:.2e}")


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def fastest(ways: dict[str, Callable[[], Any]]) -> str:
    """The quickest of several ways: best of three each, or one where a call takes more than a second."""
    best: dict[str, float] = {}
    for name, call in ways.items():
        best[name] = seconds(call)
        for _ in range(2 if best[name] < 1.0 else 0):
            best[name] = min(best[name], seconds(call))
    return min(best, key=lambda name: best[name])


def timing(
    case: Case, shape: tuple[int, ...], dtype: str, mode: str, on: Machine, name: str, way: str, samples: list[float]
) -> dict[str, Any]:
    """A row: percentiles of the seconds that calls of one implementation took, and how far from the roofline they are.

    Args:
        way: how the implementation was written, where it could be in several ways.
    """
    backward = mode == "fwd+bwd"
    share = case.work(name, *shape) if case.work else 1.0
    flops = case.flops(*shape) * share * (case.backward_flops if backward else 1)
    moved = case.bytes(*shape, element=DTYPES[dtype].itemsize) * share * (case.backward_bytes if backward else 1)
    bound = max(flops / on.peak[dtype], moved / on.copy)
    p50 = percentile(samples, 0.5)
    return {
        "op": case.op,
        "shape": dict(zip(case.dims, shape)),
        "dtype": dtype,
        "mode": mode,
        "impl": name,
        "way": way,
        "headline": shape in case.shapes[: case.headline],
        "p20_ms": percentile(samples, 0.2) * 1e3,
        "p50_ms": p50 * 1e3,
        "p80_ms": percentile(samples, 0.8) * 1e3,
        "rounds": len(samples),
        "work": share,
        "gflops": flops / p50 / 1e9,
        "gbytes_s": moved / p50 / 1e9,
        "intensity": flops / moved,
        "roofline": bound / p50,
        "bound": "compute" if flops / on.peak[dtype] > moved / on.copy else "memory",
        "peak_gflops": on.peak[dtype] / 1e9,
        "copy_gbytes_s": on.copy / 1e9,
    }


def measure(
    case: Case,
    shape: tuple[int, ...],
    dtype: str,
    mode: str,
    on: Machine,
    *,
    rounds: int,
    budget: float,
    peers: bool = True,
) -> Iterator[dict[str, Any]]:
    """Rows of one case at one shape: every implementation's percentiles over interleaved rounds.

    Args:
        rounds: at most so many rounds.
        budget: seconds for each implementation; at least three rounds are made.
        peers: whether to run them.
    """
    backward = mode == "fwd+bwd"
    inputs = make_inputs(case, shape, dtype, on.device)
    calls: dict[str, Callable[[], Any]] = {}
    chosen: dict[str, str] = {}
    want: Any = None
    head = {"op": case.op, "shape": dict(zip(case.dims, shape)), "dtype": dtype, "mode": mode}
    for name, peer in case.implementations(*shape).items():
        if not peers and name != OURS:
            continue
        ways = {}
        for way, fn in variants(peer).items():
            own = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
            ways[way] = runner(fn, own if case.updates_inputs else inputs, backward, on.device)
        try:
            for call in ways.values():
                got = call()
                if case.work is None and want is not None:
                    check(case, name, got, want, dtype, backward)
                want = got if want is None else want
        except LACKING as error:
            if name == OURS and on.device == "cpu":  # a peer may lack the op, we may not
                raise
            yield {**head, "impl": name, "missing": str(error).strip().splitlines()[0][:200]}
            continue
        chosen[name] = fastest(ways) if len(ways) > 1 else next(iter(ways))
        calls[name] = ways[chosen[name]]
    times: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + budget * len(calls)
    done = 0
    while calls and done < rounds and (done < 3 or time.perf_counter() < deadline):
        for name, call in calls.items():
            times[name].append(seconds(call))
        done += 1
    for name, samples in times.items():
        yield timing(case, shape, dtype, mode, on, name, chosen[name], samples)
