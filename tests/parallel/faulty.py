"""``foldscan`` in which one rank meets with one fault: arguments FAULT RANK CALL MARK, then the command's own.

FAULT names a place; at its CALL-th call on RANK the fault happens, once in all restarts: the file MARK says so.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foldscan.parallel.checkpoint
import foldscan.training.checkpoint
import foldscan.training.loop
from foldscan.cli import main
from foldscan.data import PackedSampler
from foldscan.parallel.pipeline import Pipeline


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stall(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die_writing(folder: Path, rank: int, *_: Any) -> None:
    (folder / f"rank_{rank:05d}.safetensors").write_bytes(b"half a file")
    die()


def cannot_read(*_: Any) -> None:
    raise OSError(5, "Input/output error", "train.tokens")


FAULTS: dict[str, tuple[Any, str, Callable[..., None]]] = {
    "kill in a step": (Pipeline, "forward_stage", die),
    "stall in a step": (Pipeline, "forward_stage", stall),
    "kill in a file": (foldscan.parallel.checkpoint, "write_pieces", die_writing),
    "kill before the name": (foldscan.training.checkpoint, "fsync_tree", die),
    "no data at first": (foldscan.training.loop, "open_data", cannot_read),
    "no data later": (PackedSampler, "next", cannot_read),
}


def plant(fault: str, rank: int, call: int, mark: Path) -> None:
    if int(os.environ["RANK"]) != rank or mark.exists():
        return
    owner, name, happen = FAULTS[fault]
    original, calls = getattr(owner, name), 0

    def hooked(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            mark.touch()
            happen(*arguments)
        return original(*arguments, **options)

    setattr(owner, name, hooked)


if __name__ == "__main__":
    plant(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    code = main(sys.argv[5:])
    print(f"threads at the end: {len(list(Path('/proc/self/task').iterdir()))}", file=sys.stderr, flush=True)
    sys.exit(code)
