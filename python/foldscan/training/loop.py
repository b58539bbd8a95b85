"""The training loop."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from foldscan.data import PackedSampler, TokenFile, Tokenizer
from foldscan.models import HybridLM, load_pretrained
from foldscan.parallel.world import World
from foldscan.training.checkpoint import Progress, checkpoints, clear_leftovers, load_checkpoint, save_checkpoint
from foldscan.training.config import TrainConfig
from foldscan.training.corpus import PreparedData, prepare
from foldscan.training.engine import Engine, LocalEngine, StepResult
from foldscan.training.evaluate import Evaluation
from foldscan.training.metrics import MetricsLog, write_environment
from foldscan.training.schedule import fraction_done, is_due, learning_rate


class Listener(Protocol):
    """Someone who watches a run: a terminal display, a test."""

    def start(self, config: TrainConfig, num_parameters: int, progress: Progress) -> None: ...

    def step(self, step: int, record: dict[str, Any]) -> None: ...

    def evaluation(self, step: int, record: dict[str, Any]) -> None: ...

    def stop(self) -> None: ...


@dataclass
class TrainResult:
    """Attributes:
    tokenizer: what the text is made of.
    run_dir: the run's folder.
    checkpoint: the last checkpoint, a model directory.
    progress: steps, tokens, seconds.
    evaluation: the last one, None without held-out data.
    in_memory: the model as trained, where this process has it whole.
    """

    tokenizer: Tokenizer
    run_dir: Path
    checkpoint: Path
    progress: Progress
    evaluation: Evaluation | None
    in_memory: HybridLM | None

    @property
    def model(self) -> HybridLM:
        """The model as trained; read from the checkpoint where it was trained on a mesh."""
        if self.in_memory is None:
            self.in_memory = load_pretrained(self.checkpoint)
        return self.in_memory


@dataclass
class _Interval:
    """What is summed between two log records."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    counts: torch.Tensor | None = None

    def add(self, found: StepResult, tokens: int) -> None:
        self.steps += 1
        self.tokens += tokens
        for name in ("loss", "load_balancing", "router_z", "grad_norm"):
            self.sums[name] = self.sums.get(name, 0.0) + getattr(found, name)
        if found.expert_counts is not None:
            self.counts = found.expert_counts if self.counts is None else self.counts + found.expert_counts

    def record(self, accumulation: int) -> dict[str, Any]:
        micro = self.steps * accumulation
        out: dict[str, Any] = {"loss": self.sums["loss"] / micro}
        if self.counts is not None:
            out["load_balancing"] = self.sums["load_balancing"] / micro
            out["router_z"] = self.sums["router_z"] / micro
            load = self.counts.double() / self.counts.sum(dim=1, keepdim=True).clamp(min=1)
            out["expert_load"] = [[round(v, 5) for v in row] for row in load.tolist()]
        out["grad_norm"] = self.sums["grad_norm"] / self.steps
        out["tokens_per_second"] = self.tokens / max(self.seconds, 1e-9)
        return out


def open_data(config: TrainConfig) -> PreparedData:
    """The tokenizer and token files that a config names, tokenising a corpus on first use."""
    if config.corpus is not None:
        return prepare(Path(config.run_dir) / "data", config.corpus, config.tokenizer_vocab)
    assert config.train_data is not None and config.tokenizer is not None  # TrainConfig.validate
    valid = None if config.valid_data is None else TokenFile(config.valid_data)
    data = PreparedData(Tokenizer.load(config.tokenizer), TokenFile(config.train_data), valid)
    for file in (data.train, data.valid):
        if file is not None and file.vocab_size != data.tokenizer.vocab_size:
            raise ValueError(
                f"tokenizer: {config.tokenizer} has {data.tokenizer.vocab_size} tokens, {file.path} was made with "
                f"{file.vocab_size}"
            )
    return data


def _build_model(config: TrainConfig, tokenizer: Tokenizer) -> HybridLM:
    torch.manual_seed(config.seed)
    if config.init_from is not None:
        model = load_pretrained(config.init_from)
        config.model = model.config
    else:
        if not config.model.vocab_size:
            config.model.vocab_size = tokenizer.vocab_size
        if config.model.eos_token_id is None:
            config.model.eos_token_id = tokenizer.end_of_text
        model = HybridLM(config.model)
    if model.config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size: got {model.config.vocab_size}, want at least the tokenizer's {tokenizer.vocab_size}"
        )
    model.activation_checkpointing = config.activation_checkpointing
    return model.train()


def _make_engine(config: TrainConfig, tokenizer: Tokenizer, world: World) -> Engine:
    """The whole model in this process, or a rank's part of it."""
    model = _build_model(config, tokenizer)
    if world.size == 1 and not config.parallel.capacity_factor:
        return LocalEngine(model, config)
    from foldscan.parallel.engine import MeshEngine  # it imports much of torch.distributed

    if world.size == 1:
        config = dataclasses.replace(config, parallel=config.parallel.alone())
    return MeshEngine(model, config, world)


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    data: PreparedData | None = None,
    listener: Listener | None = None,
) -> TrainResult:
    """Train as ``config`` says; leave checkpoints, metrics and the config in ``config.run_dir``.

    A run that is killed at any moment and called again with ``resume`` ends with the same weights, bit for bit, as one
    that was not.

    Args:
        resume: continue from the last checkpoint; from the start when there is none yet.
        data: instead of what the config names.
        listener: told about progress.

    Raises:
        FileExistsError: the run already has checkpoints and ``resume`` is false.
        ValueError, FormatError: config, data or checkpoint do not fit together.
        OSError: a file could not be read or written; earlier checkpoints are untouched.
        FloatingPointError: a gradient is not finite.
        RuntimeError: another process is gone or stalled; says who waited for whom.
        SystemExit: with status 1, an error that every process has, in those that do not tell of it.
    """
    world = World.join(config.parallel.timeout)
    try:
        return _train(config, world, resume=resume or world.restarts > 0, data=data, listener=listener)
    except Exception as error:
        world.fail(error)
        raise
    finally:
        world.close()


def _open_together(config: TrainConfig, world: World, data: PreparedData | None) -> PreparedData:
    """Make the run's folder and, on first use, its data, in one process; then open the data in all."""
    run_dir = Path(config.run_dir)
    opened = [] if data is None else [data]

    def first() -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        clear_leftovers(run_dir)
        if not opened:
            opened.append(open_data(config))

    world.together(first)
    return world.everyone(lambda: opened[0] if opened else open_data(config))


def _train(
    config: TrainConfig, world: World, *, resume: bool, data: PreparedData | None, listener: Listener | None
) -> TrainResult:
    run_dir = Path(config.run_dir)
    with world.doing("start"):
        existing = world.told(checkpoints(run_dir), list)
        if existing and not resume:
            last_one = existing[-1].name
            raise world.shared(
                FileExistsError(f"{run_dir} already holds checkpoints up to {last_one}; resume it or choose another")
            )
        opened = _open_together(config, world, data)
        engine = world.everyone(lambda: _make_engine(config, opened.tokenizer, world))
        sampler = PackedSampler(
            opened.train, batch_tokens=config.batch_tokens, max_length=config.seq_length, seed=config.seed
        )
        progress = Progress()
        if existing:
            progress = world.everyone(lambda: load_checkpoint(existing[-1], engine, sampler, config))
        reporter = _Reporter(config, progress, engine.num_parameters, listener) if world.is_main else None
    evaluation: Evaluation | None = None

    def run_evaluation() -> Evaluation | None:
        if opened.valid is None:
            return None
        found = engine.evaluate(opened.valid)
        if reporter is not None:
            reporter.evaluation(progress, found)
        return found

    interval = _Interval()
    try:
        done = fraction_done(config, progress.step, progress.seconds)
        while done < 1:
            with world.doing(f"step {progress.step}"):
                started = time.perf_counter()
                rate = learning_rate(config, progress.step, progress.seconds)
                batches = [sampler.next() for _ in range(config.accumulation)]
                try:
                    interval.add(engine.step(batches, rate), config.step_tokens)
                except FloatingPointError as error:
                    raise world.shared(FloatingPointError(f"step {progress.step}: {error}")) from None
                # A schedule may follow the clock, and there is to be one clock.
                elapsed = world.told(time.perf_counter() - started, float)
                interval.seconds += elapsed
                progress.seconds += elapsed
                progress.tokens += config.step_tokens
                progress.step += 1
                before, done = done, fraction_done(config, progress.step, progress.seconds)
                last = done == 1

                def due(every: int, before: float = before, after: float = done, last: bool = last) -> bool:
                    return last or is_due(config, every, progress.step, before, after)

                if due(config.log_every):
                    if reporter is not None:
                        record = {
                            **interval.record(config.accumulation),
                            "lr": rate,
                            "epochs": sampler.epochs,
                            "done": done,
                        }
                        reporter.step(progress, record)
                    interval = _Interval()
                if due(config.eval_every):
                    evaluation = run_evaluation()
                if due(config.checkpoint_every):
                    save_checkpoint(world, engine, sampler, progress, opened.tokenizer, config)
        if evaluation is None:
            with world.doing("evaluation"):
                evaluation = run_evaluation()
    finally:
        if reporter is not None:
            reporter.close()
    model = engine.model()
    if model is not None:
        model.eval()
    return TrainResult(opened.tokenizer, run_dir, checkpoints(run_dir)[-1], progress, evaluation, model)


class _Reporter:
    """What the main process leaves on the disk and tells its listener."""

    def __init__(self, config: TrainConfig, progress: Progress, num_parameters: int, listener: Listener | None) -> None:
        run_dir = Path(config.run_dir)
        config.save(run_dir / "config.yaml")
        write_environment(run_dir)
        self._log = MetricsLog(run_dir, resume_step=progress.step, tensorboard=config.tensorboard)
        self._listener = listener
        if listener is not None:
            listener.start(config, num_parameters, progress)

    def step(self, progress: Progress, record: dict[str, Any]) -> None:
        record |= {"tokens": progress.tokens, "seconds": progress.seconds}
        self._log.write("train", progress.step, record)
        if self._listener is not None:
            self._listener.step(progress.step, record)

    def evaluation(self, progress: Progress, found: Evaluation) -> None:
        record = {"loss": found.loss, "bits_per_byte": found.bits_per_byte, "tokens": found.tokens}
        self._log.write("eval", progress.step, {**record, "seconds": progress.seconds})
        if self._listener is not None:
            self._listener.evaluation(progress.step, record)

    def close(self) -> None:
        self._log.close()
        if self._listener is not None:
            self._listener.stop()
