"""The training loop."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from foldscan.data import PackedSampler, TokenFile, Tokenizer
from foldscan.models import HybridLM, load_pretrained
from foldscan.training.checkpoint import Progress, checkpoints, clear_leftovers, load_checkpoint, save_checkpoint
from foldscan.training.config import TrainConfig
from foldscan.training.corpus import PreparedData, prepare
from foldscan.training.evaluate import Evaluation, autocast, evaluate
from foldscan.training.metrics import MetricsLog, write_environment
from foldscan.training.optimizer import make_optimizer
from foldscan.training.schedule import fraction_done, is_due, learning_rate


class Listener(Protocol):
    """Someone who watches a run: a terminal display, a test."""

    def start(self, config: TrainConfig, model: HybridLM, progress: Progress) -> None: ...

    def step(self, step: int, record: dict[str, Any]) -> None: ...

    def evaluation(self, step: int, record: dict[str, Any]) -> None: ...

    def stop(self) -> None: ...


@dataclass
class TrainResult:
    """Attributes:
    model, tokenizer: as trained, and what its text is made of.
    run_dir: the run's folder.
    checkpoint: the last checkpoint, a model directory.
    progress: steps, tokens, seconds.
    evaluation: the last one, None without held-out data.
    """

    model: HybridLM
    tokenizer: Tokenizer
    run_dir: Path
    checkpoint: Path
    progress: Progress
    evaluation: Evaluation | None


@dataclass
class _Interval:
    """What is summed between two log records."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    counts: torch.Tensor | None = None

    def add(self, name: str, value: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value

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


def _train_step(
    model: HybridLM,
    optimizer: torch.optim.Optimizer,
    sampler: PackedSampler,
    config: TrainConfig,
    progress: Progress,
    interval: _Interval,
) -> float:
    """One optimizer step: `accumulation` forwards and backwards, clipping, the update, the routers' biases.

    Returns:
        The learning rate.
    """
    rate = learning_rate(config, progress.step, progress.seconds)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    counts: torch.Tensor | None = None
    for _ in range(config.accumulation):
        batch = sampler.next()
        with autocast(config.precision):
            parts = model.loss_parts(batch.input_ids, batch.labels, cu_seqlens=batch.cu_seqlens)
        (parts.total / config.accumulation).backward()
        interval.add("loss", float(parts.cross_entropy))
        interval.tokens += batch.num_tokens
        if parts.expert_counts is not None:
            interval.add("load_balancing", float(parts.load_balancing))
            interval.add("router_z", float(parts.router_z))
            counts = parts.expert_counts if counts is None else counts + parts.expert_counts
    limit = config.clip_norm or float("inf")
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
    if not norm < float("inf"):
        raise FloatingPointError(f"step {progress.step}: the gradient norm is {norm}; nothing was updated")
    interval.add("grad_norm", norm)
    optimizer.step()
    if counts is not None:
        interval.counts = counts if interval.counts is None else interval.counts + counts
        if config.model.router_bias_rate:
            model.update_router_bias(counts)
    interval.steps += 1
    return rate


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
        FloatingPointError: a gradient is not finite.
    """
    run_dir = Path(config.run_dir)
    existing = checkpoints(run_dir)
    if existing and not resume:
        raise FileExistsError(
            f"{run_dir} already holds checkpoints up to {existing[-1].name}; resume it or choose another"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    clear_leftovers(run_dir)
    opened = data or open_data(config)
    model = _build_model(config, opened.tokenizer)
    optimizer = make_optimizer(model, config)
    sampler = PackedSampler(
        opened.train, batch_tokens=config.batch_tokens, max_length=config.seq_length, seed=config.seed
    )
    progress = Progress()
    if existing:
        progress = load_checkpoint(existing[-1], model, optimizer, sampler)
    config.save(run_dir / "config.yaml")
    write_environment(run_dir)
    log = MetricsLog(run_dir, resume_step=progress.step, tensorboard=config.tensorboard)
    if listener is not None:
        listener.start(config, model, progress)
    evaluation: Evaluation | None = None

    def run_evaluation() -> Evaluation | None:
        if opened.valid is None:
            return None
        found = evaluate(
            model,
            opened.valid,
            batch_tokens=config.batch_tokens,
            seq_length=config.seq_length,
            max_tokens=config.eval_tokens,
            precision=config.precision,
        )
        record = {"loss": found.loss, "bits_per_byte": found.bits_per_byte, "tokens": found.tokens}
        log.write("eval", progress.step, {**record, "seconds": progress.seconds})
        if listener is not None:
            listener.evaluation(progress.step, record)
        return found

    def write_checkpoint() -> Path:
        return save_checkpoint(
            run_dir, model, optimizer, sampler, progress, opened.tokenizer, keep=config.keep_checkpoints
        )

    interval = _Interval()
    try:
        done = fraction_done(config, progress.step, progress.seconds)
        while done < 1:
            started = time.perf_counter()
            rate = _train_step(model, optimizer, sampler, config, progress, interval)
            elapsed = time.perf_counter() - started
            interval.seconds += elapsed
            progress.seconds += elapsed
            progress.tokens += config.step_tokens
            progress.step += 1
            before, done = done, fraction_done(config, progress.step, progress.seconds)
            last = done == 1

            def due(every: int, before: float = before, after: float = done, last: bool = last) -> bool:
                return last or is_due(config, every, progress.step, before, after)

            if due(config.log_every):
                record = {
                    **interval.record(config.accumulation),
                    "lr": rate,
                    "tokens": progress.tokens,
                    "epochs": sampler.epochs,
                    "done": done,
                    "seconds": progress.seconds,
                }
                log.write("train", progress.step, record)
                if listener is not None:
                    listener.step(progress.step, record)
                interval = _Interval()
            if due(config.eval_every):
                evaluation = run_evaluation()
            if due(config.checkpoint_every):
                write_checkpoint()
        if evaluation is None:
            evaluation = run_evaluation()
    finally:
        log.close()
        if listener is not None:
            listener.stop()
    model.eval()
    return TrainResult(model, opened.tokenizer, run_dir, checkpoints(run_dir)[-1], progress, evaluation)
