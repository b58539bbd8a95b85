"""The benchmark driver: ours and the peers interleaved in one process, one JSON line a row.

Before timing, all implementations of a case must agree. Rounds are interleaved (one call of each implementation a
round), so that a noisy machine disturbs all alike; p20 / p50 / p80 are over rounds. The bound of a row is
max(FLOPs / peak, bytes / copy bandwidth), both measured in the same run; `roofline` is that bound over the median.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

import foldscan
from foldscan import info
from foldscan.bench.case import Case
from foldscan.bench.cases import CASES
from foldscan.bench.measure import machine, measure
from foldscan.bench.memory import extra_memory
from foldscan.bench.options import add_arguments

PEERS = ("torch", "transformers")


def commit() -> str:
    """The commit of the checkout that this package lies in, marked if there are changes; "" outside of one."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def device_name(device: str) -> str:
    """Model of the CPU (where the system tells it) or the GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of this library and the peers; a peer that is not installed is named as missing."""
    found = {"foldscan": foldscan.__version__}
    for name in PEERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def circumstances(device: str = "cpu") -> dict[str, Any]:
    """Where and with what a run was made; part of every row."""
    facts = info.report()
    isa = facts["isa"] + (", tiles in software" if facts["software_tiles"] else "")
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "isa": isa if device == "cpu" else "",
        "versions": versions(),
        "commit": commit(),
    }


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is about; a newer run's rows take the place of an older run's of the same key."""
    return row["op"], tuple(row["shape"].values()), row["dtype"], row["mode"], row.get("device")


def keep(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the rows of one case into the file, in place of older ones of the same case."""
    old = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    fresh = {key(r) for r in rows}
    first = next((i for i, r in enumerate(old) if key(r) in fresh), len(old))
    rest = [(i, r) for i, r in enumerate(old) if key(r) not in fresh]
    merged = [r for i, r in rest if i < first] + rows + [r for i, r in rest if i > first]
    temporary = path.with_suffix(".part")
    temporary.write_text("".join(json.dumps(r) + "\n" for r in merged))
    temporary.replace(path)


def tasks(options: argparse.Namespace) -> list[tuple[Case, tuple[int, ...], str, str]]:
    """What to run: case, shape, dtype, mode."""
    chosen = [c for c in CASES if not options.op or c.op in options.op]
    unknown = set(options.op or []) - {c.op for c in CASES}
    if unknown or (options.shape and len(chosen) != 1):
        have = ", ".join(dict.fromkeys(c.op for c in CASES))
        raise ValueError(f"--op: got {options.op}, want one or more of {have} (exactly one with --shape)")
    found = []
    for case in chosen:
        shapes = case.shapes
        if options.shape:
            shapes = [tuple(int(s) for s in options.shape.split(","))]
            if len(shapes[0]) != len(case.dims):
                raise ValueError(f"--shape: got {options.shape}, want {','.join(case.dims)}")
        found += [
            (case, shape, dtype, mode)
            for shape in shapes
            for dtype in case.dtypes
            if not options.dtype or dtype in options.dtype
            for mode in case.modes
            if not options.mode or mode in options.mode
        ]
    return found


def run(options: argparse.Namespace) -> None:
    """Measures and prints; raises ValueError for options that make no sense."""
    if options.list:
        for case in CASES:
            print(f"{case.op:24} {', '.join(case.dims)}: {case.shapes}")
        return
    todo = tasks(options)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got cuda, but this PyTorch sees no CUDA device")
    threads = torch.get_num_threads()
    with Progress(
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    ) as progress:
        bar = progress.add_task("machine", total=len(todo))
        on = machine(options.device, threads)
        about = circumstances(options.device)
        for case, shape, dtype, mode in todo:
            progress.update(bar, description=f"{case.op} {dtype} {mode}")
            rows = []
            limits = {"rounds": options.rounds, "budget": options.seconds, "peers": options.against == "peers"}
            for row in measure(case, shape, dtype, mode, on, **limits):
                if options.memory and "missing" not in row:
                    extra = extra_memory(row, threads)
                    row["extra_mb"] = None if extra is None else extra / 2**20
                rows.append({**row, **about, "load": os.getloadavg()[0]})
                print(json.dumps(rows[-1]), flush=True)
            if options.out:
                keep(options.out, rows)
            progress.advance(bar)


def main(argv: list[str] | None = None) -> int:
    """``benchmarks/run.py``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads to use (default: torch's choice)")
    add_arguments(parser)
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        run(options)
    except ValueError as error:
        parser.error(str(error))
    return 0


__all__ = ["main", "run"]
