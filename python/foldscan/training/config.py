"""Everything a training run is made of, in one dataclass that reads and writes YAML."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any

import yaml

from foldscan.models.config import HybridConfig, read_yaml
from foldscan.models.files import FormatError, atomic_write_text
from foldscan.parallel.config import ParallelConfig


@dataclass
class TrainConfig:
    """A training run.

    Attributes:
        model: shape of the model; its ``vocab_size`` may be 0, to be taken from the data.
        run_dir: where checkpoints, metrics and the config go.
        init_from: a model directory whose weights to start from, instead of drawing them.
        corpus: a name of `foldscan.data.CORPORA`, tokenised into ``run_dir/data`` on first use; or give
        train_data, valid_data: token files, and
        tokenizer: the ``tokenizer.json`` (or its folder) they were made with.
        tokenizer_vocab: vocabulary to train on the corpus; 257 means raw bytes.
        steps: optimizer steps in all.
        max_seconds: 0, or a limit on the time spent in steps. The schedule and the spacing of records, evaluations and
            checkpoints then follow the time where it is ahead of the steps, so such a run is not reproducible bit for
            bit.
        batch_tokens: tokens of one forward and backward.
        accumulation: forwards and backwards in one step.
        seq_length: longest piece of a document.
        lr, min_lr: peak, and where the schedule ends.
        schedule: ``"cosine"``, ``"wsd"`` (warm-up, stable, decay; arXiv:2404.06395) or ``"constant"``.
        warmup_steps: linear from 0.
        decay_fraction: of the steps, spent in the decay of ``"wsd"``.
        weight_decay, beta1, beta2, adam_eps: of AdamW; decay acts on matrices only.
        clip_norm: largest global gradient norm; 0 for no clipping.
        ema_decay: 0, or the decay a step of a moving average of the weights, kept in fp32 beside them and saved in the
            checkpoints, of which ``load_pretrained(checkpoint, average=True)`` makes a model.
        precision: ``"fp32"``, or ``"bf16"`` for autocast over fp32 weights.
        activation_checkpointing: recompute blocks in backward.
        seed: of the initial weights and the order of the data.
        eval_every, eval_tokens: steps between evaluations, and roughly how many held-out tokens (0 for all).
        log_every, checkpoint_every, keep_checkpoints: steps between records and checkpoints; how many stay.
        tensorboard: also write event files.
        parallel: how the run is divided over the processes that torchrun starts; without it, or with one process, only
            its capacity counts.
    """

    model: HybridConfig
    run_dir: str
    init_from: str | None = None
    corpus: str | None = None
    train_data: str | None = None
    valid_data: str | None = None
    tokenizer: str | None = None
    tokenizer_vocab: int = 4096
    steps: int = 1000
    max_seconds: float = 0.0
    batch_tokens: int = 4096
    accumulation: int = 1
    seq_length: int = 512
    lr: float = 2e-3
    min_lr: float = 2e-4
    schedule: str = "cosine"
    warmup_steps: int = 50
    decay_fraction: float = 0.2
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    precision: str = "bf16"
    activation_checkpointing: bool = False
    seed: int = 0
    eval_every: int = 200
    eval_tokens: int = 65536
    log_every: int = 10
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    tensorboard: bool = True
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raises ValueError naming the first field that is wrong."""
        for name in ("steps", "batch_tokens", "accumulation", "seq_length", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, want at least 1")
        for name in (
            "max_seconds",
            "warmup_steps",
            "eval_every",
            "eval_tokens",
            "checkpoint_every",
            "clip_norm",
            "weight_decay",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, want 0 or more")
        if self.schedule not in ("cosine", "wsd", "constant"):
            raise ValueError(f"schedule: got {self.schedule!r}, want 'cosine', 'wsd' or 'constant'")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision: got {self.precision!r}, want 'fp32' or 'bf16'")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr: got {self.min_lr} with lr {self.lr}, want 0 <= min_lr <= lr")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: got {self.ema_decay}, want in [0, 1)")
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction: got {self.decay_fraction}, want in (0, 1]")
        if (self.corpus is None) == (self.train_data is None):
            raise ValueError("corpus, train_data: want exactly one of them")
        if self.train_data is not None and self.tokenizer is None:
            raise ValueError("tokenizer: got None with train_data, want the tokenizer it was made with")

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch_tokens * self.accumulation

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**values, "model": self.model.to_dict(), "parallel": dataclasses.asdict(self.parallel)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: object = "config") -> TrainConfig:
        """The inverse of `to_dict`.

        Raises:
            FormatError: an unknown, missing, mistyped or impossible field.
        """
        _check_fields(cls, values, where, nested=("model", "parallel"))
        for name in ("model", "run_dir"):
            if name not in values:
                raise FormatError(f"{where}: field {name!r} is missing")
        model = values["model"]
        if not isinstance(model, dict):
            raise FormatError(f"{where}: field 'model' is {model!r}, want a mapping")
        shape = dict(model)
        unknown_vocab = shape.get("vocab_size", 0) == 0
        if unknown_vocab:
            shape["vocab_size"] = 1
        config = HybridConfig.from_dict(shape, f"{where}: model")
        if unknown_vocab:
            config.vocab_size = 0
        try:
            division = ParallelConfig(**_parallel_values(values, where))
            return cls(**{**values, "model": config, "parallel": division})
        except ValueError as error:
            raise FormatError(f"{where}: field {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write YAML, atomically."""
        atomic_write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False))

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: list[str] | None = None) -> TrainConfig:
        """Read YAML, then apply ``key=value`` overrides (``model.hidden_size=128`` reaches inside).

        Raises:
            FormatError: unreadable file, or a field or override that is wrong.
        """
        values = read_yaml(path)
        for override in overrides or []:
            key, equals, text = override.partition("=")
            if not equals or not key:
                raise FormatError(f"override {override!r}: want key=value")
            *parents, leaf = key.split(".")
            at = values
            for parent in parents:
                inner = at.setdefault(parent, {})
                if not isinstance(inner, dict):
                    raise FormatError(f"override {override!r}: {parent!r} has no fields")
                at = inner
            at[leaf] = _scalar(text)
        return cls.from_dict(values, path)


def _scalar(text: str) -> Any:
    """A YAML value, and numbers such as 3e-4 that YAML 1.1 takes for text."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _check_fields(kind: type, values: dict[str, Any], where: object, nested: tuple[str, ...] = ()) -> None:
    known = {f.name: str(f.type) for f in dataclasses.fields(kind)}
    for name, value in values.items():
        if name not in known:
            raise FormatError(f"{where}: field {name!r} is not a field of {kind.__name__}")
        if name not in nested and not _fits(value, known[name]):
            raise FormatError(f"{where}: field {name!r} is {value!r}, want {known[name]}")


def _parallel_values(values: dict[str, Any], where: object) -> dict[str, Any]:
    found = values.get("parallel", {})
    if not isinstance(found, dict):
        raise FormatError(f"{where}: field 'parallel' is {found!r}, want a mapping")
    _check_fields(ParallelConfig, found, f"{where}: parallel")
    return found


def _fits(value: Any, annotation: str) -> bool:
    if value is None:
        return "None" in annotation
    base = annotation.replace(" | None", "")
    if base == "float":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if base == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, bool if base == "bool" else str)
