"""A run of a few seconds on made-up text, for the tests; as a program, the victim of the kill test."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from foldscan.data import Tokenizer, write_token_file
from foldscan.models import HybridConfig
from foldscan.training import TrainConfig, TrainResult, train

TEXTS = [f"def f{i}(x):\n    return x * {i} + {i * i}\n" * (1 + i % 7) for i in range(60)]


def write_data(folder: Path) -> None:
    """Token files of raw bytes and their tokenizer."""
    tokenizer = Tokenizer.raw_bytes()
    tokenizer.save(folder / "tokenizer.json")
    write_token_file(folder / "train.tokens", TEXTS[:50], tokenizer)
    write_token_file(folder / "valid.tokens", TEXTS[50:], tokenizer)


def run_config(data: Path, run_dir: Path, **changes: Any) -> TrainConfig:
    """All kinds of layers, accumulation, clipping, the router's bias: everything that has a state."""
    model = HybridConfig(
        pattern="M*-E",
        vocab_size=257,
        hidden_size=32,
        mamba_num_heads=2,
        mamba_head_dim=16,
        state_size=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        rope_theta=1e4,
        intermediate_size=48,
        num_experts=4,
        moe_intermediate_size=16,
        router_score="sigmoid",
        router_bias=True,
        router_bias_rate=1e-2,
        router_z_coef=1e-3,
    )
    values: dict[str, Any] = {
        "model": model,
        "run_dir": str(run_dir),
        "train_data": str(data / "train.tokens"),
        "valid_data": str(data / "valid.tokens"),
        "tokenizer": str(data / "tokenizer.json"),
        "steps": 24,
        "batch_tokens": 96,
        "accumulation": 2,
        "seq_length": 64,
        "lr": 5e-3,
        "min_lr": 5e-4,
        "warmup_steps": 4,
        "precision": "bf16",
        "eval_every": 10,
        "eval_tokens": 300,
        "log_every": 3,
        "checkpoint_every": 5,
        "keep_checkpoints": 2,
        "tensorboard": False,
        **changes,
    }
    return TrainConfig(**values)


def run(data: Path, run_dir: Path, *, resume: bool = False, **changes: Any) -> TrainResult:
    return train(run_config(data, run_dir, **changes), resume=resume)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print("started", flush=True)
    run(Path(sys.argv[1]), Path(sys.argv[2]), resume=True, steps=int(sys.argv[4]), checkpoint_every=1)
    print("finished", flush=True)
