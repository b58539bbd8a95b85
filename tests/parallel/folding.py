"""Every legal mapping of a small model against one process: the reference, the cases, and what a rank compares."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from foldscan.data.sampler import PackedBatch
from foldscan.models import HybridConfig, HybridLM
from foldscan.nn import Experts
from foldscan.parallel import FoldedMesh, collectives
from foldscan.parallel import model as folded_model
from foldscan.parallel.config import DISPATCHERS, ParallelConfig
from foldscan.parallel.model import FoldedLM, microbatches_of
from foldscan.parallel.optimizer import DistributedOptimizer
from foldscan.parallel.pipeline import Pipeline
from foldscan.parallel.stage import Microbatch

WORLD = 8
ORDERS = ("tp-cp-ep-dp-pp", "tp-cp-pp-ep-dp")
MICROBATCHES, TOKENS = 8, 33  # 33 tokens: no axis divides them
CLIP = 0.5
CAPACITY = 1.0
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}

CONFIG = HybridConfig(
    pattern="ME*E-MP*",
    vocab_size=67,
    hidden_size=16,
    mamba_num_heads=8,
    mamba_head_dim=4,
    mamba_num_groups=8,
    state_size=4,
    num_heads=8,
    num_kv_heads=8,
    head_dim=4,
    attention_bias=True,
    rope_theta=1e4,
    qk_norm=True,
    intermediate_size=16,
    mlp_activation="silu",
    num_experts=8,
    experts_per_token=2,
    moe_intermediate_size=16,
    moe_activation="silu",
    shared_expert_intermediate_size=8,
    router_score="sigmoid",
    router_bias=True,
    router_bias_rate=0.01,
    load_balancing_coef=0.1,
    router_z_coef=0.01,
    initializer_range=0.05,
)


def optimizer_for(named: list[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
    # AdamW's first update is the gradient's sign, uncertain where that is rounding noise; eps makes it smooth.
    return torch.optim.AdamW([p for _, p in named], lr=1e-3, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.1)


def batches() -> list[PackedBatch]:
    """Microbatches of one to four documents each, one with an empty document, with ignored labels."""
    generator = torch.Generator().manual_seed(7)
    cuts: list[list[int]] = [[], [5], [16], [1, 2, 30], [11, 11], [32], [8, 17], [20]]
    found = []
    for cut in cuts:
        ids = torch.randint(0, CONFIG.vocab_size, (TOKENS,), generator=generator)
        labels = torch.randint(0, CONFIG.vocab_size, (TOKENS,), generator=generator)
        labels[torch.rand(TOKENS, generator=generator) < 0.2] = -100
        found.append(PackedBatch(ids, labels, torch.tensor([0, *cut, TOKENS], dtype=torch.int32)))
    return found


def drop_slowly(probs: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Full-sequence dropping as a loop: an expert above capacity keeps its most probable, of equals the earlier."""
    capacity = -int(-(experts.numel() * CAPACITY) // CONFIG.num_experts)
    out = experts.clone()
    for expert in range(CONFIG.num_experts):
        taken = [(-float(probs[t, s]), t, s) for t, s in (experts == expert).nonzero().tolist()]
        for _, t, s in sorted(taken)[capacity:]:
            out[t, s] = -1
    return out


@dataclass
class Reference:
    """What one process computes; ``inputs`` are gradients of the embedded tokens, ``losses`` those of each token."""

    initial: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    updated: dict[str, torch.Tensor]
    inputs: dict[int, torch.Tensor]
    losses: list[torch.Tensor]
    loss: float
    norm: float


def reference(dtype: torch.dtype, dropping: bool) -> Reference:
    """A step with `HybridLM`, torch's own clipping and optimizer."""
    torch.manual_seed(3)
    model = HybridLM(CONFIG).to(dtype)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("bias", "norm.weight", "norm_f.weight", ".D")):
                tensor += 0.2 * torch.randn(tensor.shape)
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs: dict[int, torch.Tensor] = {}
    losses: list[torch.Tensor] = []

    def keep_input(module: Any, args: tuple[Any, ...]) -> None:
        keep_gradient(args[0], inputs, len(losses))

    def keep_losses(module: Any, args: Any, hidden: torch.Tensor) -> None:
        logits = hidden.detach() @ model.head_weight.detach().t()
        labels = batches()[len(losses)].labels
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))

    model.layers[0].register_forward_pre_hook(keep_input)
    model.norm_f.register_forward_hook(keep_losses)
    compute = Experts.forward

    def dropped(module: Experts, x: torch.Tensor, probs: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        return compute(module, x, probs, drop_slowly(probs.detach(), experts))

    optimizer, loss, counts = optimizer_for(list(model.named_parameters())), 0.0, 0
    with mock.patch.object(Experts, "forward", dropped if dropping else compute):
        for batch in batches():
            parts = model.loss_parts(batch.input_ids, batch.labels, cu_seqlens=batch.cu_seqlens)
            (parts.total / MICROBATCHES).backward()
            loss += float(parts.cross_entropy) / MICROBATCHES
            counts = counts + parts.expert_counts
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP))
    assert norm > CLIP  # so that clipping is tested
    optimizer.step()
    assert isinstance(counts, torch.Tensor)
    model.update_router_bias(counts)
    updated = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return Reference(initial, gradients, updated, inputs, losses, loss, norm)


def keep_gradient(x: torch.Tensor, found: dict[int, torch.Tensor], number: int) -> None:
    """Put the gradient of x into ``found`` when it is known, as a copy: autograd may go on adding to its buffer."""

    def keep(grad: torch.Tensor) -> None:
        found[number] = grad.clone()

    x.register_hook(keep)


@dataclass(frozen=True)
class Case:
    """A mapping and how to run it."""

    options: ParallelConfig
    dtype: torch.dtype
    recompute: bool

    def __str__(self) -> str:
        o = self.options
        sizes = " ".join(f"{axis}{getattr(o, axis)}" for axis in ("tp", "cp", "ep", "etp", "pp"))
        drop = " dropping" if o.capacity_factor else ""
        zigzag = "zigzag" if o.zigzag else "contiguous"
        drop += " recomputing" if self.recompute else ""
        kind = "fp64" if self.dtype == torch.float64 else "fp32"
        return f"{sizes} {o.order} {o.dispatcher} {o.attention} {zigzag} stages {o.stages_per_rank}{drop} {kind}"


def legal_mappings(order: str) -> Iterator[dict[str, int]]:
    """Sizes of every legal mesh of 8 ranks."""
    divisors = (1, 2, 4, 8)
    for tp, cp, ep, etp, pp in itertools.product(divisors, repeat=5):
        try:
            FoldedMesh(WORLD, tp=tp, cp=cp, ep=ep, etp=etp, pp=pp, order=order)
        except ValueError:
            continue
        yield {"tp": tp, "cp": cp, "ep": ep, "etp": etp, "pp": pp}


def cases() -> list[Case]:
    """Every mapping, both orders (once where they divide the world alike), dropless and dropping, fp64 and fp32.

    Dispatchers, ways of context attention, layouts, schedules and recomputation take turns; tests of their own prove
    them equal.
    """
    found, seen = [], set()
    for order in ORDERS:
        for sizes in legal_mappings(order):
            mesh = FoldedMesh(WORLD, **sizes, order=order)
            axes = ("tp", "cp", "dp", "pp", "etp", "ep", "edp")
            division = tuple(mesh.ranks(axis) for axis in axes)
            if division in seen:
                continue
            seen.add(division)
            for capacity, dtype in itertools.product((0.0, CAPACITY), (torch.float64, torch.float32)):
                turn = len(found)
                options = ParallelConfig(
                    **sizes,
                    order=order,
                    dispatcher=DISPATCHERS[(turn // 4 + turn) % 3],
                    attention=("ring", "all_gather")[(turn // 2) % 2],
                    zigzag=turn % 3 != 0,
                    stages_per_rank=2 if 1 < sizes["pp"] <= 4 and (turn // 4) % 2 else 1,
                    capacity_factor=capacity,
                )
                found.append(Case(options, dtype, recompute=turn % 5 == 0))
    return found


@dataclass
class Errors:
    """Largest differences of a case, relative to the largest value of each tensor."""

    found: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, got: torch.Tensor, want: torch.Tensor, scale: torch.Tensor) -> None:
        if got.shape != want.shape:
            raise AssertionError(f"{name}: got shape {tuple(got.shape)}, want {tuple(want.shape)}")
        if got.numel():
            error = float((got - want).abs().max() / scale.abs().max().clamp(min=1e-30))
            self.found[name] = max(self.found.get(name, 0.0), error if error == error else float("inf"))

    def add_number(self, name: str, got: float, want: float) -> None:
        self.add(name, *(torch.tensor([value], dtype=torch.float64) for value in (got, want, want)))


def compare(case: Case, want: Reference) -> Errors:
    """Run a step of the case on this rank and compare all that the rank has with the reference."""
    errors = Errors()
    mesh = case.options.mesh(WORLD)
    groups = mesh.init_process_groups()
    model = FoldedLM(CONFIG, groups, case.options, recompute=case.recompute).to(case.dtype)
    model.load_whole(want.initial)
    optimizer = DistributedOptimizer(model.named_parameters(), model.placements, groups.group, optimizer_for)
    dp, own = mesh.position(groups.rank)["dp"], groups.group("tp-cp").index
    numbers = list(range(MICROBATCHES))[dp :: mesh.dp]
    shards = [model.shard(batch) for batch in microbatches_of(batches(), groups)]
    inputs: dict[int, torch.Tensor] = {}
    embedded = iter(numbers)
    embed, losses_of = folded_model.vocab_parallel_embedding, model.token_losses

    def keep_input(*args: Any, **options: Any) -> torch.Tensor:
        x = embed(*args, **options)
        keep_gradient(x, inputs, next(embedded))
        return x

    def keep_losses(hidden: torch.Tensor, batch: Microbatch) -> torch.Tensor:
        losses = losses_of(hidden, batch)
        whole = want.losses[numbers[next(i for i, s in enumerate(shards) if s is batch)]]
        errors.add("token losses", losses.detach(), whole[batch.places[own]], whole)
        return losses

    with (
        mock.patch.object(folded_model, "vocab_parallel_embedding", keep_input),
        mock.patch.object(model, "token_losses", keep_losses),
    ):
        totals = Pipeline(model).forward_backward(shards, MICROBATCHES)
    assert len(inputs) == (len(shards) if model.has_first else 0)
    for shard, number in zip(shards, numbers if model.has_first else []):
        errors.add("input gradients", inputs[number], want.inputs[number][shard.places[own]], want.inputs[number])
    loss = collectives.all_sum(totals.loss[None].double(), groups.group("tp-cp-dp-pp")) / MICROBATCHES
    errors.add_number("loss", float(loss), want.loss)
    optimizer.reduce_gradients()
    for name, piece in optimizer.shards.items():
        whole = want.gradients[name]
        mine = piece.piece(model.placements[name].take(whole, mesh, groups.rank), _member(optimizer, name))
        assert piece.value.grad is not None
        errors.add(f"gradient {name}", piece.value.grad, mine, whole)
    norm = optimizer.norm()
    errors.add_number("norm", norm, want.norm)
    optimizer.clip(norm, CLIP)
    optimizer.step()
    model.update_router_bias(totals)
    for name, tensor in model.state_dict().items():
        whole = want.updated[name]
        errors.add(f"updated {name}", tensor, model.placements[name].take(whole, mesh, groups.rank), whole)
    return errors


def _member(optimizer: DistributedOptimizer, name: str) -> int:
    shard = optimizer.shards[name]
    return next(i for i in range(len(shard.lengths)) if sum(shard.lengths[:i]) == shard.start and _is_own(shard, i))


def _is_own(shard: Any, member: int) -> bool:
    return shard.lengths[member] == shard.value.shape[shard.dim]
