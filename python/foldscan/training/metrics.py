"""What a run leaves behind: JSON lines, TensorBoard events, and a record of what it ran with."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from foldscan.models.files import atomic_write_text, write_json

METRICS_FILE = "metrics.jsonl"


def environment() -> dict[str, Any]:
    """Versions, commit and machine, for the record."""
    versions: dict[str, str | None] = {}
    for package in ("foldscan", "torch", "numpy", "tokenizers", "safetensors"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    try:
        from foldscan.info import report

        kernels = report()
    except ImportError:
        kernels = {}
    return {
        "versions": versions,
        "python": platform.python_version(),
        "commit": _commit(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": kernels,
    }


def _commit() -> str | None:
    """The commit of the checkout this package lies in, with a + when files differ from it; None outside of one."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        if not git("ls-files", "--", Path(__file__).name):
            return None  # installed below some other project's checkout
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


class MetricsLog:
    """Appends records to ``metrics.jsonl`` (and TensorBoard, where wanted and installed).

    Args:
        run_dir: the run's folder.
        resume_step: forget records after this step, which a killed run wrote past its last checkpoint.
    """

    def __init__(self, run_dir: Path, *, resume_step: int, tensorboard: bool) -> None:
        self.path = run_dir / METRICS_FILE
        kept = [r for r in read_metrics(self.path) if r.get("step", 0) <= resume_step] if resume_step else []
        atomic_write_text(self.path, "".join(json.dumps(r) + "\n" for r in kept))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the log
        self._board = _summary_writer(run_dir / "tensorboard", resume_step) if tensorboard else None

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append one record; scalars also go to TensorBoard under ``kind/``."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _summary_writer(folder: Path, resume_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=resume_step or None)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line cut short by a kill is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def write_environment(run_dir: Path) -> dict[str, Any]:
    """Write and return `environment` as ``environment.json``."""
    record = environment()
    write_json(run_dir / "environment.json", record)
    return record
