"""``foldscan train`` under torchrun: one process's curves on any mesh, from its checkpoints, by the same command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchrun
from foldscan.models import load_pretrained
from foldscan.training.checkpoint import checkpoints
from foldscan.training.metrics import read_metrics

# Experts folded over tp and dp; context; two interleaved stages a rank.
FOLDED = ["--tp", "2", "--ep", "4", "--dispatcher", "dedup"]
CONTEXT = ["--cp", "2", "--ep", "2", "--set", "parallel.capacity_factor=0.5"]
PIPELINE = ["--pp", "2", "--tp", "2", "--set", "parallel.stages_per_rank=2"]
CURVES = {
    "train": ("loss", "grad_norm", "load_balancing", "router_z", "expert_load", "lr", "tokens"),
    "eval": ("loss", "bits_per_byte", "tokens"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return torchrun.write_data(tmp_path_factory.mktemp("data"))


def start(config: Path, *arguments: str, ranks: int = torchrun.RANKS) -> None:
    done = torchrun.run(["--threads", "1", "train", "--config", str(config), "--json", *arguments], ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("\n") >= 1 and done.stdout.count('"checkpoint"') == 1  # one process tells


def curves(run_dir: Path) -> dict[tuple[str, int, str], torch.Tensor]:
    return {
        (r["kind"], r["step"], name): torch.tensor(r[name], dtype=torch.float64)
        for r in read_metrics(run_dir / "metrics.jsonl")
        for name in CURVES[r["kind"]]
    }


def assert_close(got_dir: Path, want_dir: Path, tolerance: float) -> None:
    got, want = curves(got_dir), curves(want_dir)
    assert got.keys() == want.keys() and len({step for _, step, _ in want}) == 6
    for key, value in want.items():
        error = float((got[key] - value).abs().max() / value.abs().max())
        assert error <= tolerance, (key, error)


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of one process: dropless, dropping, and with bf16 autocast, by the same command lines."""
    folder = tmp_path_factory.mktemp("alone")
    found = {}
    for name, arguments, changes in (
        ("dropless", FOLDED, {}),
        ("dropping", CONTEXT, {}),
        ("bf16", FOLDED, {"precision": "bf16"}),
    ):
        found[name] = folder / name
        start(torchrun.write_config(data, found[name], **changes), *arguments, ranks=1)
    return found


@pytest.mark.parametrize(
    ("arguments", "reference"), [(FOLDED, "dropless"), (CONTEXT, "dropping")], ids=["folded", "context"]
)
def test_the_curves_of_one_process(
    data: Path, alone: dict[str, Path], tmp_path: Path, arguments: list[str], reference: str
) -> None:
    start(torchrun.write_config(data, tmp_path / "run"), *arguments)
    assert_close(tmp_path / "run", alone[reference], 1e-5)
    want, got = torchrun.final_state(alone[reference]), torchrun.final_state(tmp_path / "run")
    assert want.keys() == got.keys() and any(name.startswith("ema/") for name in got)
    for name, tensor in want.items():
        scale = float(tensor.abs().max().clamp(min=1e-30))
        # Moments hold gradients of six points that have drifted apart, and their squares.
        tolerance = 1e-4 if name.startswith("optimizer/") else 1e-5
        assert float((got[name] - tensor).abs().max()) <= tolerance * scale, name
    dropping, dropless = (curves(alone[name])["train", 6, "grad_norm"] for name in ("dropping", "dropless"))
    assert abs(float(dropping / dropless - 1)) > 1e-4  # ten tolerances, so that capacity is tested


def test_a_pipeline_goes_on_where_a_folded_mesh_stopped(data: Path, alone: dict[str, Path], tmp_path: Path) -> None:
    """Three steps in one process, three on interleaved stages, and one process reads what they wrote."""
    config = torchrun.write_config(data, tmp_path / "run")
    short: list[Any] = ["--set", "steps=3", "--set", "schedule=constant"]
    start(config, *short, ranks=1)
    start(config, "--resume", *PIPELINE, "--set", "schedule=constant")
    whole = torchrun.write_config(data, tmp_path / "whole", schedule="constant")
    start(whole, ranks=1)
    assert_close(tmp_path / "run", tmp_path / "whole", 1e-5)
    last = checkpoints(tmp_path / "run")[-1]
    assert len(list(last.glob("rank_*.safetensors"))) == torchrun.RANKS
    state = torchrun.final_state(tmp_path / "run")
    for average in (False, True):
        model = load_pretrained(last, average=average)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, state[f"ema/{name}" if average else name])


def test_bf16_stays_as_close_as_bf16_is(data: Path, alone: dict[str, Path], tmp_path: Path) -> None:
    """A mesh rounds partial sums to bf16 where one process rounds their sum: both are as far from fp32 as from each
    other. So the difference of two bf16 runs may be twice that of bf16 from fp32, which is what the format costs."""
    start(torchrun.write_config(data, tmp_path / "run", precision="bf16"), *FOLDED)
    got, one, exact = curves(tmp_path / "run"), curves(alone["bf16"]), curves(alone["dropless"])
    assert got.keys() == one.keys() == exact.keys()
    for kind, name in (("train", "loss"), ("train", "grad_norm"), ("eval", "loss")):
        keys = [key for key in exact if key[0] == kind and key[2] == name]
        far = max(float((one[key] - exact[key]).abs() / exact[key]) for key in keys)
        error = max(float((got[key] - one[key]).abs() / exact[key]) for key in keys)
        assert far > 0 and error <= 2 * far + 1e-4, (kind, name, error, far)
