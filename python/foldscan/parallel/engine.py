"""The training engine of one rank of a folded mesh (`foldscan.training.engine.Engine`)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch

from foldscan.data import PackedBatch, TokenFile
from foldscan.data.sampler import sequential_batches
from foldscan.models import HybridLM
from foldscan.parallel import collectives
from foldscan.parallel.checkpoint import load_pieces, save_pieces
from foldscan.parallel.model import FoldedLM, StepTotals, microbatches_of
from foldscan.parallel.optimizer import DistributedOptimizer
from foldscan.parallel.pipeline import Pipeline
from foldscan.parallel.world import World
from foldscan.training.config import TrainConfig
from foldscan.training.engine import StepResult, check_norm
from foldscan.training.evaluate import Evaluation, autocast, documents_within
from foldscan.training.optimizer import make_optimizer


class MeshEngine:
    """A rank's part of the model, its share of the optimizer, and the way to the others.

    Args:
        whole: the model to begin with; only this rank's part of it is kept.

    Raises:
        ValueError: mesh, model and microbatches do not fit together.
    """

    def __init__(self, whole: HybridLM, config: TrainConfig, world: World) -> None:
        self.config, self.world = config, world
        self.groups = config.parallel.mesh(world.size).init_process_groups(timeout=config.parallel.timeout)
        self._model = FoldedLM(whole.config, self.groups, config.parallel, recompute=config.activation_checkpointing)
        self._model.load_whole(whole.state_dict())
        self.num_parameters = whole.num_parameters()
        self._pipeline = Pipeline(self._model)
        self._optimizer = DistributedOptimizer(
            self._model.named_parameters(),
            self._model.placements,
            self.groups.group,
            lambda named: make_optimizer(named, config),
            ema=config.ema_decay or None,
        )
        if config.accumulation % self.groups.mesh.dp:
            raise ValueError(
                f"accumulation: got {config.accumulation} microbatches a step, want a multiple of dp = "
                f"{self.groups.mesh.dp}, which is what {world.size} ranks leave"
            )

    def step(self, batches: Sequence[PackedBatch], rate: float) -> StepResult:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad()
        own = [self._model.shard(batch) for batch in microbatches_of(batches, self.groups)]
        with autocast(self.config.precision):
            totals = self._pipeline.forward_backward(own, len(batches))
        self._optimizer.reduce_gradients()
        norm = self._optimizer.norm()
        check_norm(norm)
        if self.config.clip_norm:
            self._optimizer.clip(norm, self.config.clip_norm)
        self._optimizer.step()
        self._model.share_head()
        if self._model.config.router_bias_rate:
            self._model.update_router_bias(totals)
        return self._result(totals, norm)

    def _result(self, totals: StepTotals, norm: float) -> StepResult:
        """The sums over all ranks."""
        config = self._model.config
        layers = [i for i, kind in enumerate(config.pattern) if kind == "E"]
        losses = torch.stack([totals.loss, totals.load_balancing, totals.z]).double()
        counts = torch.zeros(len(layers), config.num_experts, dtype=torch.float64)
        if self.groups.group("tp-cp").index == 0:  # the loads are sums over this group already
            for number, found in totals.counts.items():
                counts[layers.index(number)] = found.double()
        everything = torch.cat([losses, counts.reshape(-1)])
        everything = collectives.all_sum(everything, self.groups.group("tp-cp-dp-pp"), label="report")
        loss, balance, z = everything[:3].tolist()
        loads = everything[3:].view(counts.shape).long() if layers else None
        return StepResult(loss, balance, z, loads, norm)

    @torch.no_grad()
    def evaluate(self, file: TokenFile) -> Evaluation:
        config, dp = self.config, self.groups.mesh.dp
        documents = documents_within(file, config.eval_tokens)
        mine = self.groups.mesh.position(self.groups.rank)["dp"]
        nats, tokens = torch.zeros(1, dtype=torch.float64), 0
        batches = sequential_batches(
            file, batch_tokens=config.batch_tokens, max_length=config.seq_length, max_documents=documents
        )
        empty = torch.zeros(0, dtype=torch.int64)
        nothing = PackedBatch(empty, empty, torch.zeros(2, dtype=torch.int32))
        while row := list(itertools.islice(batches, dp)):
            tokens += sum(batch.num_tokens for batch in row)
            # Experts may be shared along dp: a rank for which no batch is left takes part with no tokens.
            batch = row[mine] if mine < len(row) else nothing
            with autocast(config.precision):
                losses = self._pipeline.token_losses(self._model.shard(batch))
            nats += losses.double().sum()
        total = float(collectives.all_sum(nats, self.groups.group("tp-cp-dp-pp"), label="report"))
        return Evaluation(total, tokens, int(file.byte_starts[documents]), documents)

    def save(self, folder: Path) -> None:
        save_pieces(folder, self._model, self._optimizer)

    def load(self, folder: Path) -> None:
        load_pieces(folder, self._model, self._optimizer)

    def model(self) -> HybridLM | None:
        return None
