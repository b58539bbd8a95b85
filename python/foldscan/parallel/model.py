"""A hybrid language model on a folded mesh: what one rank holds of it, and a training step over microbatches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import nn

from foldscan.data.sampler import IGNORE, PackedBatch
from foldscan.models import HybridConfig
from foldscan.nn import Packing, RMSNorm, positions_of
from foldscan.parallel import collectives
from foldscan.parallel.config import ParallelConfig
from foldscan.parallel.context import ContextLayout, ContextParallel
from foldscan.parallel.groups import shares
from foldscan.parallel.placement import Placement, placements
from foldscan.parallel.process_groups import ProcessGroups
from foldscan.parallel.stage import LayerRunner, Layers, Microbatch
from foldscan.parallel.vocabulary import vocab_parallel_cross_entropy, vocab_parallel_embedding


@dataclass
class StepTotals:
    """Sums over the microbatches of a step on this rank; those over all ranks are the step's.

    Attributes:
        loss: cross entropy in nats, every microbatch's mean added up; this rank's share.
        load_balancing, z: router losses, the mean over expert layers, every microbatch's added up; this rank's share.
        counts: by layer number, (experts,) tokens that each expert got of this rank's microbatches.
    """

    loss: torch.Tensor
    load_balancing: torch.Tensor
    z: torch.Tensor
    counts: dict[int, torch.Tensor]


class FoldedLM(nn.Module):
    """This rank's part of a `HybridLM`: some layers, in them some heads, groups, channels and experts, some vocabulary.

    Its parameters have the names that they have in `HybridLM`, and the shapes that `placements` says.

    Args:
        config: the whole model's.
        groups: the mesh's process groups.
        options: dispatcher, context attention, capacity.
        recompute: keep only what is between blocks for backward, and run each block again.

    Raises:
        ValueError: the mesh would cut through a head, a group or an expert, or has more stages than layers.
    """

    def __init__(
        self, config: HybridConfig, groups: ProcessGroups, options: ParallelConfig, *, recompute: bool = False
    ) -> None:
        super().__init__()
        mesh = groups.mesh
        self.config, self.groups, self.options = config, groups, options
        self.num_stages = mesh.pp * options.stages_per_rank
        if self.num_stages > config.num_layers:
            raise ValueError(
                f"pp, stages_per_rank: got {mesh.pp} x {options.stages_per_rank} stages, want at most the model's "
                f"{config.num_layers} layers"
            )
        self.placements = placements(config)
        position = mesh.position(groups.rank)
        self.tp, self.pp, self.cp_index = groups.group("tp"), groups.group("pp"), position["cp"]
        self.stages = list(range(position["pp"], self.num_stages, mesh.pp))
        ends = shares(config.num_layers, self.num_stages)
        self.stage_layers = {s: list(range(sum(ends[:s]), sum(ends[: s + 1]))) for s in self.stages}
        self.layers = Layers(config, [i for numbers in self.stage_layers.values() for i in numbers], mesh)
        self.runner = LayerRunner(config, options, groups.group, recompute=recompute)
        self.has_first, self.has_last = 0 in self.stages, self.num_stages - 1 in self.stages
        shape = (shares(config.vocab_size, mesh.tp)[self.tp.index], config.hidden_size)
        self.embeddings = nn.Embedding(*shape) if self.has_first else None
        self.norm_f = RMSNorm(config.hidden_size, config.norm_eps) if self.has_last else None
        self.lm_head = (
            nn.Linear(shape[1], shape[0], bias=False) if self.has_last and not config.tie_embeddings else None
        )
        # A tied head on another stage than the embedding: a copy, which `share_head` brings from the first stage.
        self.head_copy: torch.Tensor | None = None

    @property
    def head_weight(self) -> torch.Tensor:
        """(V_loc, d) this rank's rows of the head."""
        holder = self.embeddings if self.lm_head is None else self.lm_head
        if holder is not None:
            return holder.weight
        assert self.head_copy is not None  # load_whole and every step call share_head
        return self.head_copy

    def own_placements(self) -> dict[str, Placement]:
        """Of the tensors that this rank holds something of, by name."""
        return {name: self.placements[name] for name in self.state_dict()}

    @torch.no_grad()
    def load_whole(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take this rank's part of a whole model's state."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(self.placements[name].take(state[name], self.groups.mesh, self.groups.rank))
        self.share_head()

    @torch.no_grad()
    def share_head(self) -> None:
        """Bring a tied head's copy on the last stage up to the embedding."""
        if self.config.tie_embeddings and not (self.has_first and self.has_last):
            weight = self.embeddings.weight if self.embeddings is not None else None
            got = self._between_ends(weight, back=False)
            if self.has_last and not self.has_first:
                self.head_copy = got.requires_grad_()

    @torch.no_grad()
    def collect_head_gradient(self) -> None:
        """Add what the head's copy on the last stage got to the embedding's gradient on the first."""
        if self.config.tie_embeddings and not (self.has_first and self.has_last):
            copy = self.head_copy
            grad = None if copy is None else copy.grad if copy.grad is not None else torch.zeros_like(copy)
            got = self._between_ends(grad, back=True)
            if self.embeddings is not None:
                weight = self.embeddings.weight
                weight.grad = got if weight.grad is None else weight.grad + got
            if copy is not None:
                copy.grad = None

    def _between_ends(self, rows: torch.Tensor | None, *, back: bool) -> torch.Tensor:
        """Send rows of the vocabulary from the first stage to the last, or back; every rank of a pp group calls it."""
        vocabulary = shares(self.config.vocab_size, self.tp.size)[self.tp.index]
        last = (self.num_stages - 1) % self.pp.size
        source, target = (last, 0) if back else (0, last)
        send, receive = [0] * self.pp.size, [0] * self.pp.size
        if self.pp.index == source:
            send[target] = vocabulary
        if self.pp.index == target:
            receive[source] = vocabulary
        like = next(self.parameters())
        nothing = torch.zeros(0, self.config.hidden_size, dtype=like.dtype, device=like.device)
        payload = rows if rows is not None and self.pp.index == source else nothing
        return collectives.all_to_all(payload, send, receive, self.pp, label="tied embedding")

    def shard(self, batch: PackedBatch) -> Microbatch:
        """This rank's rows of a microbatch that every rank of its tp-cp group has whole."""
        mesh, cu, total = self.groups.mesh, batch.cu_seqlens, batch.num_tokens
        positions = positions_of(cu, total)
        longest = int(cu.diff().max()) if cu.numel() > 1 else 0
        if mesh.cp == 1:
            indices = [torch.arange(total)]
            packing = Packing(cu, longest, positions)
        else:
            layout = ContextLayout(total, cu, mesh.cp, zigzag=self.options.zigzag)
            indices = [layout.indices(i) for i in range(mesh.cp)]
            own = indices[self.cp_index]
            method = cast(Literal["ring", "all_gather"], self.options.attention)
            context = ContextParallel(layout, self.groups.group("cp"), method)
            packing = Packing(layout.cu_seqlens(self.cp_index), longest, positions[own], context=context)
        mine = indices[self.cp_index]
        counts = shares(len(mine), mesh.tp)
        places = []
        for rank in mesh.group("tp-cp", self.groups.rank):
            position = mesh.position(rank)
            rows = indices[position["cp"]]
            places.append(rows[_share(len(rows), mesh.tp, position["tp"])])
        return Microbatch(
            ids=batch.input_ids[mine],
            labels=batch.labels[mine],
            counts=counts,
            rows=_share(len(mine), mesh.tp, self.tp.index),
            packing=packing,
            places=places,
            total=total,
            valid=int((batch.labels != IGNORE).sum()),
        )

    def run_stage(
        self, stage: int, x: torch.Tensor | None, batch: Microbatch, totals: StepTotals | None, scale: float
    ) -> torch.Tensor:
        """Rows in, or None on the first stage, to rows out; on the last stage after the final norm.

        Args:
            totals: gets the router's losses and loads; None for an evaluation.
            scale: weight of this microbatch in the gradient of the router losses.
        """
        if stage == 0:
            assert self.embeddings is not None
            x = vocab_parallel_embedding(
                batch.ids, self.embeddings.weight, self.tp, counts=batch.counts, vocab_size=self.config.vocab_size
            )
        assert x is not None
        x, found = self.runner(self.layers, self.stage_layers[stage], x, batch, scale, totals is not None)
        if totals is not None:
            totals.load_balancing += found.load_balancing / self.runner.expert_layers
            totals.z += found.z / self.runner.expert_layers
            for number, counts in found.counts.items():
                totals.counts[number] = totals.counts[number] + counts if number in totals.counts else counts
        if stage == self.num_stages - 1:
            assert self.norm_f is not None
            x = self.norm_f(x)
        return x

    def token_losses(self, hidden: torch.Tensor, batch: Microbatch) -> torch.Tensor:
        """(T_loc,) cross entropy of this rank's rows, 0 where the label is ignored."""
        return vocab_parallel_cross_entropy(
            hidden, self.head_weight, batch.labels, self.tp, counts=batch.counts, vocab_size=self.config.vocab_size
        )

    def loss(self, hidden: torch.Tensor, batch: Microbatch) -> torch.Tensor:
        """This rank's share of a microbatch's mean cross entropy."""
        return self.token_losses(hidden, batch).sum() / max(1, batch.valid)

    def new_totals(self) -> StepTotals:
        like = next(self.parameters())
        zero = torch.zeros((), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        return StepTotals(zero, zero.clone(), zero.clone(), {})

    @torch.no_grad()
    def update_router_bias(self, totals: StepTotals) -> None:
        """Shift the score corrections of this rank's routers by the loads of all data-parallel microbatches."""
        dp = self.groups.group("dp")
        for number, counts in sorted(totals.counts.items()):
            self.layers[str(number)].mixer.shift_bias(  # type: ignore[operator, union-attr]
                collectives.all_sum(counts, dp, label="loads"), self.config.router_bias_rate
            )


def _share(total: int, parts: int, index: int) -> slice:
    sizes = shares(total, parts)
    return slice(sum(sizes[:index]), sum(sizes[: index + 1]))


def microbatches_of(batches: Sequence[PackedBatch], groups: ProcessGroups) -> list[PackedBatch]:
    """The part of a step's microbatches that this rank's data-parallel group works on.

    Raises:
        ValueError: they do not divide over dp.
    """
    dp, index = groups.mesh.dp, groups.mesh.position(groups.rank)["dp"]
    if len(batches) % dp:
        raise ValueError(f"accumulation: got {len(batches)} microbatches a step, want a multiple of dp = {dp}")
    return list(batches[index::dp])
