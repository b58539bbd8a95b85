"""What the training loop asks of whoever computes: one process with the whole model, or a rank of a mesh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from foldscan.data import PackedBatch, TokenFile
from foldscan.models import FormatError, HybridLM
from foldscan.models.pieces import PieceFolder, save_tensors
from foldscan.models.pretrained import AVERAGE
from foldscan.models.tensors import write_tensors
from foldscan.training.config import TrainConfig
from foldscan.training.evaluate import Evaluation, autocast, evaluate
from foldscan.training.optimizer import make_optimizer, optimizer_tensors, restore_optimizer

_OPTIMIZER = "optimizer/"  # before the names of its state in a checkpoint


@dataclass
class StepResult:
    """What a step says of itself.

    Attributes:
        loss, load_balancing, router_z: sums over the step's microbatches of each one's mean.
        expert_counts: (expert layers, experts) tokens that each expert got in the step, None without expert layers.
        grad_norm: before clipping.
    """

    loss: float
    load_balancing: float
    router_z: float
    expert_counts: torch.Tensor | None
    grad_norm: float


class Engine(Protocol):
    """Holds the model (or a rank's part of it) and its optimizer.

    Attributes:
        num_parameters: of the whole model.
    """

    num_parameters: int

    def step(self, batches: Sequence[PackedBatch], rate: float) -> StepResult:
        """One optimizer step on the microbatches of the whole world.

        Raises:
            FloatingPointError: the gradient is not finite; nothing was updated.
        """

    def evaluate(self, file: TokenFile) -> Evaluation:
        """On held-out documents, as the config says."""

    def save(self, folder: Path) -> None:
        """Write weights, optimizer state and averages into a folder that exists; every process calls it.

        Raises:
            OSError: on every process, when one could not write.
        """

    def load(self, folder: Path) -> None:
        """The inverse of `save`, whoever wrote the folder.

        Raises:
            FormatError: on every process; names the file and the tensor. Nothing is changed.
        """

    def model(self) -> HybridLM | None:
        """The whole model, where one process has it."""


class LocalEngine:
    """The whole model in this process."""

    def __init__(self, model: HybridLM, config: TrainConfig) -> None:
        self.config, self._model = config, model
        self._optimizer = make_optimizer(list(model.named_parameters()), config)
        self.num_parameters = model.num_parameters()
        self._averages: dict[str, torch.Tensor] = {}
        if config.ema_decay:
            self._averages = {
                n: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
                for n, p in model.named_parameters()
            }

    def step(self, batches: Sequence[PackedBatch], rate: float) -> StepResult:
        model, config = self._model, self.config
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        result = StepResult(0.0, 0.0, 0.0, None, 0.0)
        for batch in batches:
            with autocast(config.precision):
                parts = model.loss_parts(batch.input_ids, batch.labels, cu_seqlens=batch.cu_seqlens)
            (parts.total / len(batches)).backward()
            result.loss += float(parts.cross_entropy)
            counts = parts.expert_counts
            if counts is not None:
                result.load_balancing += float(parts.load_balancing)
                result.router_z += float(parts.router_z)
                result.expert_counts = counts if result.expert_counts is None else result.expert_counts + counts
        limit = config.clip_norm or float("inf")
        result.grad_norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
        check_norm(result.grad_norm)
        self._optimizer.step()
        self._average()
        if result.expert_counts is not None and config.model.router_bias_rate:
            model.update_router_bias(result.expert_counts)
        return result

    @torch.no_grad()
    def _average(self) -> None:
        parameters = dict(self._model.named_parameters())
        for name, average in self._averages.items():
            average.lerp_(parameters[name].to(average.dtype), 1 - self.config.ema_decay)

    def evaluate(self, file: TokenFile) -> Evaluation:
        config = self.config
        return evaluate(
            self._model,
            file,
            batch_tokens=config.batch_tokens,
            seq_length=config.seq_length,
            max_tokens=config.eval_tokens,
            precision=config.precision,
        )

    def save(self, folder: Path) -> None:
        write_tensors(folder, self._model.state_dict())
        state = {f"{_OPTIMIZER}{n}": t for n, t in optimizer_tensors(self._model, self._optimizer).items()}
        state |= {f"{AVERAGE}{n}": t for n, t in self._averages.items()}
        save_tensors(folder / "training.safetensors", state)

    def load(self, folder: Path) -> None:
        files, own = PieceFolder(folder), self._model.state_dict()
        own |= {f"{AVERAGE}{n}": t for n, t in self._averages.items()}
        for name, tensor in own.items():
            if files.shape(name) != tuple(tensor.shape):
                raise FormatError(
                    f"{files.where(name)}: tensor {name!r} has shape {files.shape(name)}, want {tuple(tensor.shape)}"
                )
        moments = {n.removeprefix(_OPTIMIZER): files.read(n) for n in files.pieces if n.startswith(_OPTIMIZER)}
        found = {name: files.read(name) for name in own}  # all of it before anything is changed
        restore_optimizer(self._model, self._optimizer, moments, folder)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(found[name])

    def model(self) -> HybridLM | None:
        return self._model


def check_norm(norm: float) -> None:
    """Refuse a gradient that is not finite."""
    if not norm < float("inf"):
        raise FloatingPointError(f"the gradient norm is {norm}; nothing was updated")
