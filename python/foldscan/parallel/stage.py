"""One rank's part of a hybrid language model: local layers, and what goes round them on a folded mesh.

Between layers a rank holds the rows of a microbatch that are its own along tp and cp (sequence parallelism,
arXiv:2205.05198). Attention, Mamba-2 and MLP gather the rows of the tp group, work with fewer heads, groups or
channels, and scatter partial sums; experts dispatch rows over ep and etp. Nothing is scaled anywhere: the loss is the
sum of what the ranks compute, and every collective's backward is its adjoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from foldscan import ops
from foldscan.models import HybridConfig
from foldscan.models.hybrid_lm import Block
from foldscan.nn import MLP, Attention, Experts, Linear, Mamba2Mixer, MoE, Packing, RouterStats
from foldscan.ops._library import compute_dtype
from foldscan.parallel import adjoint, collectives
from foldscan.parallel.config import ParallelConfig
from foldscan.parallel.dispatchers import Dropping, TokenDispatcher, make_dispatcher, run
from foldscan.parallel.groups import Group
from foldscan.parallel.mesh import FoldedMesh
from foldscan.parallel.placement import local_config


@dataclass(frozen=True)
class Microbatch:
    """A microbatch as one rank sees it.

    Attributes:
        ids, labels: (T_cp,) of the tokens of this context rank, the same on its tp group.
        counts: rows of every member of the tp group, whose own are ``rows``.
        packing: of the context rank's tokens.
        places: for every member of the tp-cp group, where its rows stand in the whole microbatch.
        total, valid: tokens of the whole, and labels that count.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    counts: list[int]
    rows: slice
    packing: Packing
    places: list[torch.Tensor]
    total: int
    valid: int


class PartialLinear(Linear):
    """A projection whose outputs are summed over ``parts`` ranks, each of which adds its part of the bias."""

    def __init__(self, whole: Linear, parts: int) -> None:
        super().__init__(whole.in_features, whole.out_features, bias=True)
        self.weight, self.bias, self.parts = whole.weight, whole.bias, parts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, self.weight, self.bias / self.parts)


class Peers:
    """What an expert layer asks of the other ranks (`foldscan.nn.moe.ExpertPeers`)."""

    def __init__(
        self,
        dispatcher: TokenDispatcher | None,
        dropping: Dropping | None,
        tp: Group,
        sequence: Group,
        batch: Microbatch,
        training: bool,
    ) -> None:
        self.dispatcher, self.tp, self.sequence, self.batch, self.training = dispatcher, tp, sequence, batch, training
        self.dropping = dropping if training else None  # an evaluation drops nothing

    def drop(self, probs: torch.Tensor, experts: torch.Tensor, num_experts: int) -> torch.Tensor:
        """The choice with -1 where capacity drops an assignment."""
        if self.dropping is None:
            return experts
        return self.dropping.apply(probs, experts, num_experts, self.sequence, torch.cat(self.batch.places))

    def experts(
        self, compute: Callable[..., torch.Tensor], x: torch.Tensor, probs: torch.Tensor, experts: torch.Tensor
    ) -> torch.Tensor:
        """The routed experts' sum for this rank's rows, which travel in the dtype that the experts compute in."""
        assert self.dispatcher is not None  # there is one where the pattern has an expert layer
        x, rows = x.to(compute_dtype(x)), [len(places) for places in self.batch.places]
        capacity = None
        if self.dropping is not None:
            capacity = self.dropping.capacity_of(max(rows), experts.shape[1], self.dispatcher.num_experts)
        # In training every microbatch of the world has the same number of tokens.
        equal = rows[0] if self.training and len(set(rows)) == 1 else None
        return run(self.dispatcher, x, probs, experts, compute, capacity=capacity, tokens_per_rank=equal)

    def dense(self, layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """A layer that is divided over tp, on this rank's rows, which travel in the dtype that it computes in."""
        x = x.to(compute_dtype(x))
        gathered = adjoint.all_gather(x, self.batch.counts, self.tp, label="activations")
        return adjoint.reduce_scatter(layer(gathered), self.batch.counts, self.tp, label="activations")

    def stats(self, logits: torch.Tensor, experts: torch.Tensor, num_experts: int, score: Any) -> RouterStats:
        """This rank's share of the losses of the whole microbatch, and the whole's loads."""
        own = torch.bincount(experts.detach().reshape(-1).long(), minlength=num_experts)
        counts = collectives.all_sum(own, self.sequence, label="loads")
        share = logits.shape[0] / max(1, self.batch.total)
        wide = counts.to(logits.dtype) * share
        balance = ops.load_balancing_loss(logits, experts, num_experts, score=score, tokens_per_expert=wide)
        return RouterStats(balance * share, ops.router_z_loss(logits) * share, counts)


class FoldedBlock(Block):
    """A block of the model with local heads, groups, channels and experts."""

    def __init__(self, config: HybridConfig, kind: str, mesh: FoldedMesh) -> None:
        super().__init__(local_config(config, mesh), kind)
        if isinstance(self.mixer, MoE):
            c = config
            width = c.moe_latent_size or c.hidden_size
            self.mixer.experts = Experts(
                width, c.moe_intermediate_size // mesh.etp, c.num_experts // mesh.ep, c.moe_activation
            )
        if mesh.tp > 1:
            _divide_biases(self.mixer, mesh.tp)

    def folded(
        self, x: torch.Tensor, batch: Microbatch, peers: Peers, stats: bool
    ) -> tuple[torch.Tensor, RouterStats | None]:
        """This rank's rows (T_loc, d) to the same, and the router's share of the losses when asked for."""
        y = self.norm(x)
        if isinstance(self.mixer, MoE):
            out, routed = self.mixer(y, stats=stats, peers=peers)
            return x + out, routed
        mixer: Any = self.mixer
        if self.kind == "-":
            return x + peers.dense(mixer, y), None
        return x + peers.dense(lambda rows: mixer(rows, batch.packing), y), None


def _divide_biases(mixer: nn.Module, parts: int) -> None:
    for module in list(mixer.modules()):
        for kind, name in ((Mamba2Mixer, "out_proj"), (Attention, "o_proj"), (MLP, "down_proj")):
            if isinstance(module, kind) and getattr(module, name).bias is not None:
                setattr(module, name, PartialLinear(getattr(module, name), parts))


class _AddGradient(torch.autograd.Function):
    """x, unchanged; in backward ``loss`` gets the gradient 1, as if it had been added to what is differentiated."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.like = loss.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0], torch.ones_like(ctx.like)


@dataclass
class RouterShares:
    """Router losses of a microbatch, this rank's shares summed over its expert layers, and the loads of each."""

    load_balancing: torch.Tensor
    z: torch.Tensor
    counts: dict[int, torch.Tensor]


class Layers(nn.ModuleDict):
    """The blocks of some layers, by their number in the whole model."""

    def __init__(self, config: HybridConfig, numbers: list[int], mesh: FoldedMesh) -> None:
        super().__init__({str(i): FoldedBlock(config, config.pattern[i], mesh) for i in numbers})


class LayerRunner:
    """Runs local blocks one after another on this rank's rows.

    Args:
        group: this rank's `Group` along some axes.
        aux_scale: factor on the router losses in the gradient, before the config's coefficients.
    """

    def __init__(
        self, config: HybridConfig, options: ParallelConfig, group: Callable[[str], Group], *, recompute: bool
    ) -> None:
        self.config, self.recompute = config, recompute
        self.tp, self.sequence = group("tp"), group("tp-cp")
        self.expert_layers = max(1, config.pattern.count("E"))
        self.dispatcher = (
            make_dispatcher(options.dispatcher, config.num_experts, group("ep"), group("etp"))
            if "E" in config.pattern
            else None
        )
        self.dropping = None
        if options.capacity_factor:
            self.dropping = Dropping(
                options.capacity_factor,
                cast(Literal["probs", "position"], options.drop_policy),
                cast(Literal["rank", "sequence"], options.drop_scope),
                pad=options.pad_to_capacity,
            )

    def __call__(
        self, layers: Layers, numbers: list[int], x: torch.Tensor, batch: Microbatch, aux_scale: float, stats: bool
    ) -> tuple[torch.Tensor, RouterShares]:
        """(T_loc, d) to the same; the gradient of the router losses is attached to what comes out."""
        peers = Peers(self.dispatcher, self.dropping, self.tp, self.sequence, batch, training=stats)
        zero = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        shares = RouterShares(zero, zero, {})
        for number in numbers:
            block = layers[str(number)]
            assert isinstance(block, FoldedBlock)
            x, routed = self._block(block, x, batch, peers, stats)
            if routed is None:
                continue
            loss = (self.config.load_balancing_coef * routed.load_balancing + self.config.router_z_coef * routed.z) * (
                aux_scale / self.expert_layers
            )
            if loss.requires_grad:
                x = _AddGradient.apply(x, loss)
            shares.load_balancing = shares.load_balancing + routed.load_balancing.detach()
            shares.z = shares.z + routed.z.detach()
            shares.counts[number] = routed.counts
        return x, shares

    def _block(
        self, block: FoldedBlock, x: torch.Tensor, batch: Microbatch, peers: Peers, stats: bool
    ) -> tuple[torch.Tensor, RouterStats | None]:
        if not (self.recompute and torch.is_grad_enabled()):
            return block.folded(x, batch, peers, stats)

        def call(value: torch.Tensor) -> Any:
            out, routed = block.folded(value, batch, peers, stats)
            return (out,) if routed is None else (out, routed.load_balancing, routed.z, routed.counts)

        # Nothing in a block draws random numbers; the collectives are repeated by all ranks in the same order.
        result = checkpoint(call, x, use_reentrant=False, preserve_rng_state=False)
        return result[0], RouterStats(*result[1:]) if len(result) > 1 else None
