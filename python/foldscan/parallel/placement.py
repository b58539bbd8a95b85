"""Where each parameter of a hybrid model lies on a folded mesh: the one place that knows.

A parameter is cut along some of its dimensions (attention, Mamba-2 and MLP over tp, experts over ep and etp, vocabulary
over tp) and is the same on the ranks of one *replica group*. Gradient sums, the norm, clipping, averages, optimizer
state and checkpoints all follow from the two: a gradient is summed over the replica group, one of whose members owns
each element.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from foldscan.models import HybridConfig
from foldscan.parallel.groups import shares
from foldscan.parallel.mesh import FoldedMesh


@dataclass(frozen=True)
class Split:
    """One dimension divided over one axis of a mesh.

    Attributes:
        dim: which. axis: ``"tp"``, ``"ep"`` or ``"etp"``.
        sections: sizes of the runs along the dimension that are divided each by itself: z, x, B, C and dt of a Mamba-2
            projection, of which a rank holds its heads and groups.
    """

    dim: int
    axis: str
    sections: tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """A rectangle that a rank holds: where it begins in the whole tensor and in the local one, and its size."""

    whole: tuple[int, ...]
    local: tuple[int, ...]
    size: tuple[int, ...]

    def of_whole(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[tuple(slice(o, o + s) for o, s in zip(self.whole, self.size))]

    def of_local(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[tuple(slice(o, o + s) for o, s in zip(self.local, self.size))]


@dataclass(frozen=True)
class Placement:
    """Where one parameter lies.

    Attributes:
        shape: of the whole.
        splits: the dimensions that are divided, at most one split each.
        expert: it belongs to routed experts, so its replicas lie along edp, not along dp and cp.
    """

    shape: tuple[int, ...]
    splits: tuple[Split, ...] = ()
    expert: bool = False

    @property
    def replicas(self) -> str:
        """The axes along which it is the same on every rank, over which its gradient is summed.

        A dense parameter that tensor parallelism does not divide works on other rows on every tp rank.
        """
        if self.expert:
            return "edp"
        return "dp-cp" if self.splits else "tp-cp-dp"

    def _runs(self, dim: int, position: Mapping[str, int], sizes: Mapping[str, int]) -> list[tuple[int, int]]:
        """(start, length) in the whole of what a rank has along a dimension, in local order."""
        for split in self.splits:
            if split.dim == dim:
                runs, start = [], 0
                for section in split.sections:
                    parts, at = shares(section, sizes[split.axis]), position[split.axis]
                    runs.append((start + sum(parts[:at]), parts[at]))
                    start += section
                return runs
        return [(0, self.shape[dim])]

    def boxes(self, mesh: FoldedMesh, rank: int) -> Iterator[Box]:
        """What ``rank`` holds; empty boxes are left out."""
        position = mesh.position(rank)
        sizes = {"tp": mesh.tp, "ep": mesh.ep, "etp": mesh.etp}
        along = []
        for dim in range(len(self.shape)):
            local, pieces = 0, []
            for start, length in self._runs(dim, position, sizes):
                pieces.append((start, local, length))
                local += length
            along.append(pieces)
        for combination in itertools.product(*along):
            box = Box(*(tuple(piece[i] for piece in combination) for i in range(3)))
            if prod(box.size):
                yield box

    def local_shape(self, mesh: FoldedMesh, rank: int) -> tuple[int, ...]:
        """The shape of what ``rank`` holds."""
        position = mesh.position(rank)
        sizes = {"tp": mesh.tp, "ep": mesh.ep, "etp": mesh.etp}
        return tuple(sum(n for _, n in self._runs(dim, position, sizes)) for dim in range(len(self.shape)))

    def take(self, whole: torch.Tensor, mesh: FoldedMesh, rank: int) -> torch.Tensor:
        """A copy of what ``rank`` holds of the whole tensor."""
        out = whole.new_empty(self.local_shape(mesh, rank))
        for box in self.boxes(mesh, rank):
            box.of_local(out).copy_(box.of_whole(whole))
        return out


def _mamba(c: HybridConfig) -> dict[str, Placement]:
    d, inner, heads, state = c.hidden_size, c.mamba_inner_size, c.mamba_num_heads, c.mamba_num_groups * c.state_size
    rows, channels = (inner, inner, state, state, heads), (inner, state, state)
    found = {
        "in_proj.weight": Placement((sum(rows), d), (Split(0, "tp", rows),)),
        "conv1d.weight": Placement((sum(channels), 1, c.conv_kernel), (Split(0, "tp", channels),)),
        "out_proj.weight": Placement((d, inner), (Split(1, "tp", (inner,)),)),
    }
    for name in ("A_log", "D", "dt_bias"):
        found[name] = Placement((heads,), (Split(0, "tp", (heads,)),))
    if c.mamba_norm:
        found["norm.weight"] = Placement((inner,), (Split(0, "tp", (inner,)),))
    if c.conv_bias:
        found["conv1d.bias"] = Placement((sum(channels),), (Split(0, "tp", channels),))
    if c.mamba_bias:
        found["in_proj.bias"] = Placement((sum(rows),), (Split(0, "tp", rows),))
        found["out_proj.bias"] = Placement((d,))
    return found


def _attention(c: HybridConfig) -> dict[str, Placement]:
    d, found = c.hidden_size, {}
    for name, heads in (("q_proj", c.num_heads), ("k_proj", c.num_kv_heads), ("v_proj", c.num_kv_heads)):
        rows = heads * c.head_dim
        found[f"{name}.weight"] = Placement((rows, d), (Split(0, "tp", (rows,)),))
        if c.attention_bias:
            found[f"{name}.bias"] = Placement((rows,), (Split(0, "tp", (rows,)),))
    columns = c.num_heads * c.head_dim
    found["o_proj.weight"] = Placement((d, columns), (Split(1, "tp", (columns,)),))
    if c.attention_bias if c.attention_output_bias is None else c.attention_output_bias:
        found["o_proj.bias"] = Placement((d,))
    if c.qk_norm:
        found["q_norm.weight"] = found["k_norm.weight"] = Placement((c.head_dim,))
    return found


def _mlp(d: int, width: int, activation: str, bias: bool) -> dict[str, Placement]:
    rows = (Split(0, "tp", (width,)),)
    found = {
        "up_proj.weight": Placement((width, d), rows),
        "down_proj.weight": Placement((d, width), (Split(1, "tp", (width,)),)),
    }
    if activation == "silu":
        found["gate_proj.weight"] = Placement((width, d), rows)
    if bias:
        found["up_proj.bias"], found["down_proj.bias"] = Placement((width,), rows), Placement((d,))
    return found


def _moe(c: HybridConfig) -> dict[str, Placement]:
    d, E, F = c.hidden_size, c.num_experts, c.moe_intermediate_size
    width = c.moe_latent_size or d

    def expert(shape: tuple[int, ...], ffn: int) -> Placement:
        return Placement(shape, (Split(0, "ep", (E,)), Split(ffn, "etp", (F,))), expert=True)

    found = {
        "gate.weight": Placement((E, d)),
        "experts.up_proj": expert((E, F, width), 1),
        "experts.down_proj": expert((E, width, F), 2),
    }
    if c.router_bias:
        found["gate.e_score_correction_bias"] = Placement((E,))
    if c.moe_activation == "silu":
        found["experts.gate_proj"] = expert((E, F, width), 1)
    if c.moe_latent_size:
        found["fc1_latent_proj.weight"] = Placement((width, d))
        found["fc2_latent_proj.weight"] = Placement((d, width))
    if c.shared_expert_intermediate_size:
        shared = _mlp(d, c.shared_expert_intermediate_size, c.moe_activation, False)
        found |= {f"shared_experts.{name}": place for name, place in shared.items()}
    return found


def placements(config: HybridConfig) -> dict[str, Placement]:
    """Every tensor of a `HybridLM`'s state by its name there."""
    c = config
    vocabulary = Placement((c.vocab_size, c.hidden_size), (Split(0, "tp", (c.vocab_size,)),))
    found = {"embeddings.weight": vocabulary}
    for i, kind in enumerate(c.pattern):
        found[f"layers.{i}.norm.weight"] = Placement((c.hidden_size,))
        if kind == "P":
            parts = {f"mamba.{n}": p for n, p in _mamba(c).items()}
            parts |= {f"attention.{n}": p for n, p in _attention(c).items()}
        elif kind == "-":
            parts = _mlp(c.hidden_size, c.intermediate_size, c.mlp_activation, c.mlp_bias)
        else:
            parts = {"M": _mamba, "*": _attention, "E": _moe}[kind](c)
        found |= {f"layers.{i}.mixer.{name}": place for name, place in parts.items()}
    found["norm_f.weight"] = Placement((c.hidden_size,))
    if not c.tie_embeddings:
        found["lm_head.weight"] = vocabulary
    return found


def check_divisible(config: HybridConfig, mesh: FoldedMesh) -> None:
    """Refuse a mesh that would cut through a head, a group or an expert.

    Raises:
        ValueError: names the axis, the field of the config and what would be legal.
    """
    c, kinds = config, set(config.pattern)
    wanted = []
    if kinds & {"M", "P"}:
        wanted += [("tp", "mamba_num_groups", c.mamba_num_groups)]
    if kinds & {"*", "P"}:
        wanted += [("tp", "num_heads", c.num_heads), ("tp", "num_kv_heads", c.num_kv_heads)]
    if "-" in kinds:
        wanted += [("tp", "intermediate_size", c.intermediate_size)]
    if "E" in kinds:
        wanted += [("ep", "num_experts", c.num_experts), ("etp", "moe_intermediate_size", c.moe_intermediate_size)]
        if c.shared_expert_intermediate_size:
            wanted += [("tp", "shared_expert_intermediate_size", c.shared_expert_intermediate_size)]
    elif mesh.ep > 1 or mesh.etp > 1:
        raise ValueError(f"ep, etp: got {mesh.ep} and {mesh.etp}, want 1: the pattern {c.pattern!r} has no E layer")
    for axis, name, size in wanted:
        parts = getattr(mesh, axis)
        if size % parts:
            raise ValueError(f"{axis}: got {parts}, want a divisor of {name} = {size}")
    if mesh.tp > c.vocab_size:
        raise ValueError(f"tp: got {mesh.tp}, want at most vocab_size = {c.vocab_size}")


def local_config(config: HybridConfig, mesh: FoldedMesh) -> HybridConfig:
    """The shape of the layers that one tp rank holds: the same modules with fewer heads, groups and channels.

    Raises:
        ValueError: as `check_divisible`.
    """
    check_divisible(config, mesh)
    c, tp = config, mesh.tp
    kinds = set(c.pattern)
    changed: dict[str, Any] = {}
    if kinds & {"M", "P"}:
        changed |= {"mamba_num_heads": c.mamba_num_heads // tp, "mamba_num_groups": c.mamba_num_groups // tp}
    if kinds & {"*", "P"}:
        changed |= {"num_heads": c.num_heads // tp, "num_kv_heads": c.num_kv_heads // tp}
    if "-" in kinds:
        changed["intermediate_size"] = c.intermediate_size // tp
    if "E" in kinds:
        changed["shared_expert_intermediate_size"] = c.shared_expert_intermediate_size // tp
    return dataclasses.replace(config, **changed)
