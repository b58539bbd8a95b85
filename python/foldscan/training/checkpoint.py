"""Training checkpoints: model directories that also hold everything a resumed run needs, written atomically."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foldscan.data.sampler import PackedSampler
from foldscan.data.tokenizer import Tokenizer
from foldscan.models import FormatError
from foldscan.models.files import fsync_tree, read_json, want_field, write_json
from foldscan.models.layouts import LAYOUTS, Native
from foldscan.parallel.world import World
from foldscan.training.config import TrainConfig
from foldscan.training.engine import Engine

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
    world: World,
    engine: Engine,
    sampler: PackedSampler,
    progress: Progress,
    tokenizer: Tokenizer,
    config: TrainConfig,
) -> Path:
    """Write ``checkpoints/step_N``: weights, config and tokenizer (a model directory that `load_pretrained` reads), the
    optimizer's state as safetensors, and the position in the data as JSON; then remove all but the last few.

    Every process calls it. The folder gets its name when everything in it is on the disk.

    Raises:
        OSError: on every process, when one could not write; what existed is untouched.
    """
    run_dir = Path(config.run_dir)
    target = run_dir / "checkpoints" / f"step_{progress.step:08d}"
    if world.told(target.exists(), bool):
        return target
    work = target.with_name(f".{target.name}.tmp")

    def begin() -> None:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)

    def finish() -> None:
        write_json(work / "config.json", Native().write_config(config.model))
        tokenizer.save(work / "tokenizer.json")
        state = {"step": progress.step, "tokens": progress.tokens, "seconds": progress.seconds}
        write_json(work / "training.json", {**state, "data": sampler.state()})
        fsync_tree(work)
        work.rename(target)
        fsync_tree(target.parent)
        for old in checkpoints(run_dir)[: -config.keep_checkpoints]:
            # Renamed first: a half-removed checkpoint must not look like a whole one.
            doomed = old.with_name("." + old.name + ".removed")
            old.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    try:
        world.together(begin)
        world.everyone(lambda: engine.save(work))
        world.together(finish)
    except BaseException:
        if world.is_main:
            shutil.rmtree(work, ignore_errors=True)
        raise
    return target


def load_checkpoint(path: Path, engine: Engine, sampler: PackedSampler, config: TrainConfig) -> Progress:
    """Bring model, optimizer and data position back to where `save_checkpoint` was called, by whichever engine.

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
    if saved != config.model:
        raise FormatError(f"{path / 'config.json'}: describes another model than the run's config")
    engine.load(path)
    try:
        sampler.restore(data)
    except (ValueError, KeyError) as error:
        raise FormatError(f"{file}: field 'data': {error}") from None
    return progress
