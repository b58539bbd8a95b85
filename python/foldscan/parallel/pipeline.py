"""Forward and backward of a step's microbatches through the stages of a pipeline, and forward alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from foldscan.parallel.model import FoldedLM, StepTotals
from foldscan.parallel.stage import Microbatch


class _Stage(nn.Module):
    """A stage as `torch.distributed.pipelining` wants it: a module of tensors, told which microbatch it is."""

    def __init__(self, pipeline: Pipeline, stage: int) -> None:
        super().__init__()
        self._pipeline, self._stage = pipeline, stage

    def forward(self, *inputs: torch.Tensor, microbatch: torch.Tensor) -> torch.Tensor:
        return self._pipeline.forward_stage(self._stage, inputs[0] if inputs else None, int(microbatch))


class Pipeline:
    """Runs a `FoldedLM`: one after another without stages, else by 1F1B (arXiv:1806.03377), interleaved when a rank has
    several stages (arXiv:2104.04473)."""

    def __init__(self, model: FoldedLM) -> None:
        self.model = model
        self._batches: list[Microbatch] = []
        self._totals: StepTotals = model.new_totals()
        self._weight = 1.0
        self._schedules: dict[tuple[int, tuple[int, ...], torch.dtype], Any] = {}

    def forward_stage(self, stage: int, x: torch.Tensor | None, index: int) -> torch.Tensor:
        return self.model.run_stage(stage, x, self._batches[index], self._totals, self._weight)

    def _loss(self, hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        share = self.model.loss(hidden, self._batches[int(index)])
        self._totals.loss += share.detach()
        return share * self._weight

    def forward_backward(self, batches: Sequence[Microbatch], in_step: int) -> StepTotals:
        """Leave the gradient of the step's loss, the mean over its microbatches, in this rank's parameters.

        Args:
            batches: this rank's microbatches. in_step: how many there are in the step on all ranks together.

        Returns:
            Sums of this rank's shares.

        Raises:
            ValueError: with stages, fewer microbatches than pp, or of different sizes.
        """
        model = self.model
        self._batches, self._totals, self._weight = list(batches), model.new_totals(), 1 / in_step
        if model.num_stages == 1:
            for index in range(len(self._batches)):
                hidden = self.forward_stage(0, None, index)
                self._loss(hidden, torch.tensor(index)).backward()
        else:
            self._run_schedule()
        model.collect_head_gradient()
        return self._totals

    def _run_schedule(self) -> None:
        model, count = self.model, len(self._batches)
        pp = model.pp.size
        if count < pp or (len(model.stages) > 1 and count % pp):
            want = f"a multiple of pp = {pp}" if len(model.stages) > 1 else f"at least pp = {pp}"
            raise ValueError(f"accumulation: got {count} microbatches for each data-parallel rank, want {want}")
        sizes = {batch.counts[model.tp.index] for batch in self._batches}
        if len(sizes) > 1:
            raise ValueError(f"batches: got rows {sorted(sizes)}, want microbatches of one size with pp > 1")
        like = next(model.parameters())
        key = (count, (sizes.pop(), model.config.hidden_size), like.dtype)
        if key not in self._schedules:
            self._schedules[key] = self._schedule(*key)
        index = torch.arange(count)
        if model.has_last:
            self._schedules[key].step(microbatch=index, target=index)
        else:
            self._schedules[key].step(microbatch=index)

    def _schedule(self, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

        model, device = self.model, torch.device(self.model.groups.device_type)
        rows = torch.empty(shape, dtype=dtype, device="meta").requires_grad_()
        stages: list[Any] = []
        for number in model.stages:
            first = number == 0
            stages.append(
                PipelineStage(
                    _Stage(self, number),
                    number,
                    model.num_stages,
                    device,
                    input_args=() if first else (rows,),
                    output_args=(rows,),
                    group=model.pp.process_group,
                )
            )
        if len(stages) == 1:
            return Schedule1F1B(stages[0], count, loss_fn=self._loss, scale_grads=False)
        return ScheduleInterleaved1F1B(stages, count, loss_fn=self._loss, scale_grads=False)

    @torch.no_grad()
    def token_losses(self, batch: Microbatch) -> torch.Tensor:
        """(T_loc,) cross entropy of this rank's rows, forward only; empty where the last stage is not."""
        model, x = self.model, None
        for stage in range(model.num_stages):
            owner = stage % model.pp.size
            if owner == model.pp.index:
                x = model.run_stage(stage, x, batch, None, 1.0)
                if stage + 1 < model.num_stages:
                    dist.send(x.contiguous(), model.pp.ranks[(owner + 1) % model.pp.size], group=model.pp.process_group)
            elif stage + 1 < model.num_stages and (owner + 1) % model.pp.size == model.pp.index:
                like = next(model.parameters())
                x = torch.empty(batch.counts[model.tp.index], model.config.hidden_size, dtype=like.dtype)
                dist.recv(x, model.pp.ranks[owner], group=model.pp.process_group)
        if not model.has_last:
            return torch.zeros(0)
        assert x is not None
        return model.token_losses(x, batch)
