"""``foldscan train`` under torchrun on a small run, for the tests: data, config, start, and what is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from foldscan.models import HybridConfig
from foldscan.models.pieces import PieceFolder
from foldscan.training import TrainConfig
from foldscan.training.checkpoint import checkpoints
from training import small_run  # tests/ is on the path: see tests/conftest.py

RANKS = 4


def write_data(folder: Path) -> Path:
    """The made-up text of the tests of one process."""
    small_run.write_data(folder)
    return folder


def write_config(data: Path, run_dir: Path, **changes: Any) -> Path:
    """The YAML file of a run with every kind of layer, accumulation, clipping, router bias and averages."""
    model = HybridConfig(
        pattern="M*-E",
        vocab_size=257,
        hidden_size=32,
        mamba_num_heads=4,
        mamba_head_dim=8,
        mamba_num_groups=2,
        state_size=8,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope_theta=1e4,
        intermediate_size=48,
        num_experts=4,
        moe_intermediate_size=16,
        router_score="sigmoid",
        router_bias=True,
        router_bias_rate=1e-2,
        load_balancing_coef=1e-2,
        router_z_coef=1e-3,
    )
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "train_data": str(data / "train.tokens"),
        "valid_data": str(data / "valid.tokens"),
        "tokenizer": str(data / "tokenizer.json"),
        "steps": 6,
        "batch_tokens": 96,
        "accumulation": 4,
        "seq_length": 64,
        "lr": 1e-2,
        "min_lr": 1e-3,
        "warmup_steps": 2,
        "adam_eps": 1e-3,  # Adam's first updates are the gradient's sign, uncertain where that is rounding noise
        "precision": "fp32",
        "ema_decay": 0.9,
        "eval_every": 3,
        "eval_tokens": 300,
        "log_every": 1,
        "checkpoint_every": 3,
        "keep_checkpoints": 2,
        "tensorboard": False,
        **changes,
    }
    file = run_dir.with_suffix(".yaml")
    TrainConfig(model=model, **values).save(file)
    return file


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def command(arguments: list[str], *, program: str | None = None, restarts: int = 0, ranks: int = RANKS) -> list[str]:
    """A torchrun command line for ``foldscan`` (or a program file that stands for it); of one rank, plain Python."""
    what = ["-m", "foldscan"] if program is None else [program]
    if ranks == 1:
        return [sys.executable, *what, *arguments]
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
    # A store on any free port, so that runs do not meet.
    return [sys.executable, *launch, "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", *what, *arguments]


def run(
    arguments: list[str],
    *,
    program: str | None = None,
    restarts: int = 0,
    ranks: int = RANKS,
    timeout: float = 150,
) -> subprocess.CompletedProcess[str]:
    """Run to the end; nobody is left behind when that takes too long."""
    process = subprocess.Popen(
        command(arguments, program=program, restarts=restarts, ranks=ranks),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        process.communicate()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def told(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the ranks said of their errors: the lines that foldscan wrote."""
    return [line for line in done.stderr.splitlines() if line.startswith("foldscan: ")]


def final_state(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint, whoever wrote it."""
    files = PieceFolder(checkpoints(run_dir)[-1])
    return {name: files.read(name) for name in files.pieces}


def assert_same_bits(a: Path, b: Path) -> None:
    first, second = final_state(a), final_state(b)
    assert checkpoints(a)[-1].name == checkpoints(b)[-1].name
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]
