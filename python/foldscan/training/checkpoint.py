"""Training checkpoints: model directories that also hold everything a resumed run needs, written atomically."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from foldscan.data.sampler import PackedSampler
from foldscan.data.tokenizer import Tokenizer
from foldscan.models import FormatError, HybridLM
from foldscan.models.files import atomic_directory, read_json, want_field, write_json
from foldscan.models.layouts import LAYOUTS, Native
from foldscan.models.tensors import read_tensors, write_tensors
from foldscan.training.optimizer import optimizer_tensors, restore_optimizer

_NAME = re.compile(r"step_(\d+)")


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps done.
        tokens: tokens trained on.
        seconds: time spent in training steps, over all resumptions.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. Unfinished ones do not exist under their final name."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return [p for _, p in sorted(found)]


def clear_leftovers(run_dir: Path) -> None:
    """Remove what killed runs left of checkpoints that they were writing or removing; they have other names."""
    for path in (run_dir / "checkpoints").glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)


def save_checkpoint(
    run_dir: Path,
    model: HybridLM,
    optimizer: torch.optim.Optimizer,
    sampler: PackedSampler,
    progress: Progress,
    tokenizer: Tokenizer,
    *,
    keep: int,
) -> Path:
    """Write ``checkpoints/step_N``: weights, config and tokenizer (a model directory that `load_pretrained` reads), the
    optimizer's state and torch's random state as safetensors, and the position in the data as JSON; then remove all but
    the last ``keep``."""
    target = run_dir / "checkpoints" / f"step_{progress.step:08d}"
    if not target.exists():
        with atomic_directory(target) as work:
            write_json(work / "config.json", Native().write_config(model.config))
            write_tensors(work, model.state_dict())
            tokenizer.save(work / "tokenizer.json")
            state = {f"optimizer/{n}": t for n, t in optimizer_tensors(model, optimizer).items()}
            state["random/torch"] = torch.get_rng_state()
            save_file(state, work / "training.safetensors")
            write_json(
                work / "training.json",
                {
                    "step": progress.step,
                    "tokens": progress.tokens,
                    "seconds": progress.seconds,
                    "data": sampler.state(),
                },
            )
    for old in checkpoints(run_dir)[:-keep]:
        # Renamed first: a half-removed checkpoint must not look like a whole one.
        doomed = old.with_name("." + old.name + ".removed")
        old.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return target


def load_checkpoint(path: Path, model: HybridLM, optimizer: torch.optim.Optimizer, sampler: PackedSampler) -> Progress:
    """Bring model, optimizer, data position and random state back to where `save_checkpoint` was called.

    Raises:
        FormatError: names the file and the field or tensor.
    """
    file = path / "training.json"
    record = read_json(file)
    progress = Progress(
        want_field(record, "step", int, file),
        want_field(record, "tokens", int, file),
        float(want_field(record, "seconds", (int, float), file)),
    )
    data: dict[str, Any] = want_field(record, "data", dict, file)
    saved = LAYOUTS["foldscan_hybrid"].read_config(read_json(path / "config.json"), path / "config.json")
    if saved != model.config:
        raise FormatError(f"{path / 'config.json'}: describes another model than the run's config")
    weights, _ = read_tensors(path / "model.safetensors")
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in weights or weights[name].shape != tensor.shape:
            raise FormatError(f"{path / 'model.safetensors'}: tensor {name!r} is missing or misshapen")
    state_file = path / "training.safetensors"
    state, _ = read_tensors(state_file)
    if "random/torch" not in state:
        raise FormatError(f"{state_file}: tensor 'random/torch' is missing")
    try:
        sampler.restore(data)
    except (ValueError, KeyError) as error:
        raise FormatError(f"{file}: field 'data': {error}") from None
    prefix = "optimizer/"
    moments = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    restore_optimizer(model, optimizer, moments, state_file)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
    torch.set_rng_state(state["random/torch"])
    return progress
