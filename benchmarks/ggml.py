"""Single ops of ggml, the tensor library of llama.cpp, beside ours: decode step and scan of Mamba-2, decode attention.

    python benchmarks/ggml.py --python llama-env/bin/python        (the environment: see llamacpp.py)

Inputs, shapes, FLOPs and bytes are those of `foldscan bench`; outputs must agree before anything is timed. ggml runs in
a process of its own (ggml_worker.py), which sleeps while we run, and we while it does; its graph holds nothing but the
op. The rows go to benchmarks/results/ggml.jsonl.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import torch
from foldscan import ops
from foldscan.bench.case import OURS, Case
from foldscan.bench.cases import CASES
from foldscan.bench.driver import circumstances, keep
from foldscan.bench.measure import AGREEMENT, disagreement, machine, make_inputs, timing
from llamacpp import Worker

Arrays = dict[str, np.ndarray]

# ggml has the scan in fp32 only, and attention on fp32 queries with keys and values in any dtype.
PLAN = [
    ("selective_state_update", (1, 128, 64, 128, 8), "float32"),
    ("selective_state_update", (16, 128, 64, 128, 8), "float32"),
    ("selective_state_update", (64, 24, 64, 128, 1), "float32"),
    ("scan", (512, 128, 64, 128, 8), "float32"),
    *(
        ("attention_decode", shape, dtype)
        for shape in ((1, 16384, 32, 8, 128), (4, 4096, 32, 8, 128), (16, 1024, 32, 8, 128), (1, 1024, 32, 8, 128))
        for dtype in ("float32", "bfloat16")
    ),
]


def array(x: torch.Tensor) -> np.ndarray:
    """numpy has no bf16: its bits."""
    return x.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else x.numpy()


def step(state: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, **_: Any) -> tuple[Callable[[], torch.Tensor], Arrays]:
    """Ours and ggml's inputs. Neither adds D, which is an op of its own there."""
    batch, _, channels, n = state.shape
    own = state.clone()
    wide = (dt[..., None].expand(-1, -1, channels), A[:, None, None].expand(-1, channels, n))
    theirs = {"s": state, "x": x[:, None], "dt": dt[:, None], "A": A[:, None], "B": B[:, None], "C": C[:, None]}
    return (
        lambda: ops.selective_state_update(own, x, wide[0], wide[1], B, C, dt_softplus=True),
        {k: array(v) for k, v in theirs.items()} | {"ids": np.arange(batch, dtype=np.int32)},
    )


def scan(x: Any, dt: Any, A: Any, B: Any, C: Any, **_: Any) -> tuple[Callable[[], torch.Tensor], Arrays]:
    """As `step`, for a whole sequence from a state of zeros."""
    batch, _, heads, channels = x.shape
    state = torch.zeros(batch, heads, channels, B.shape[-1])
    theirs = {"s": state, "x": x, "dt": dt, "A": A[:, None], "B": B, "C": C}
    return (
        lambda: ops.mamba_chunk_scan_combined(x, dt, A, B, C, dt_softplus=True),
        {k: array(v) for k, v in theirs.items()} | {"ids": np.arange(batch, dtype=np.int32)},
    )


def attention(q: Any, k: Any, v: Any, heads_k: Any, heads_v: Any) -> tuple[Callable[[], torch.Tensor], Arrays]:
    """ggml gets the cache with heads first, each head's keys in one piece."""
    theirs = {"q": array(q.float().transpose(1, 2).contiguous()), "k": array(heads_k), "v": array(heads_v)}
    return lambda: ops.flash_attn_with_kvcache(q, k, v), theirs


PREPARE = {
    "selective_state_update": ("ssm_scan", step),
    "scan": ("ssm_scan", scan),
    "attention_decode": ("flash_attn", attention),
}


def burst(call: Callable[[], torch.Tensor], seconds: float) -> list[float]:
    """Times of calls, one after the other, for so long; the first wakes the threads and does not count."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return times


def compare(case: Case, shape: tuple[int, ...], dtype: str, options: argparse.Namespace, worker: Worker) -> None:
    """One op at one shape."""
    name, prepare = PREPARE[case.op]
    call, arrays = prepare(**make_inputs(case, shape, dtype, "cpu"))
    with tempfile.TemporaryDirectory() as scratch:
        inputs, out = Path(scratch) / "inputs.npz", Path(scratch) / "out.npy"
        np.savez(inputs, **arrays)
        ready = worker.ask(
            op=name,
            shape=dict(zip(case.dims, shape)),
            dtype={"float32": "f32", "bfloat16": "bf16"}[dtype],
            inputs=str(inputs),
            threads=torch.get_num_threads(),
            out=str(out),
        )
        got = call()
        want = torch.from_numpy(np.load(out))[: got.numel()].view(got.shape)  # the state follows the output
    difference = disagreement(got, want)
    if difference > AGREEMENT[dtype][0]:
        raise RuntimeError(f"{case.op} {shape} {dtype}: differs from ggml by {difference:.2e}")
    times: dict[str, list[float]] = {OURS: [], "ggml": []}
    for _ in range(options.rounds):
        times[OURS] += burst(call, options.seconds)
        times["ggml"] += worker.ask(seconds=options.seconds)["times_s"]
    on = machine("cpu", torch.get_num_threads())
    about = {**circumstances(), "load": os.getloadavg()[0]}
    about["versions"]["ggml"] = ready["ready"]
    rows = [
        {**timing(case, shape, dtype, "fwd", on, who, "", samples), **about, "headline": False}
        for who, samples in times.items()
    ]
    keep(options.out, rows)
    print(f"{case.op} {shape} {dtype}: {rows[0]['p50_ms']:.3f} ms, ggml {rows[1]['p50_ms'] / rows[0]['p50_ms']:.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="interpreter of an environment with llama-cpp-python")
    parser.add_argument("--rounds", type=int, default=7, help="turns that each takes")
    parser.add_argument("--seconds", type=float, default=0.15, help="length of a turn")
    parser.add_argument("--out", type=Path, default=models.RESULTS.with_name("ggml.jsonl"))
    options = parser.parse_args()
    worker = Worker(options.python, "ggml_worker.py")
    cases = {case.op: case for case in CASES}
    with torch.no_grad():
        for op, shape, dtype in PLAN:
            compare(cases[op], shape, dtype, options, worker)
    worker.close()


if __name__ == "__main__":
    main()
