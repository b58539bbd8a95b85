"""What is dropped before dispatch: capacity per rank or per sequence (arXiv:2504.14960, section 3.1.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from foldscan import ops
from foldscan.parallel import collectives
from foldscan.parallel.groups import Group


@dataclass(frozen=True)
class Dropping:
    """Experts above their capacity ``ceil(tokens k / experts * capacity_factor)`` lose assignments.

    Args:
        capacity_factor: above 0.
        policy: an expert keeps its most probable assignments, of equal ones the earlier (``"probs"``), or its first
            ones (``"position"``), as `foldscan.ops.permute` does.
        scope: ``"rank"``: every rank decides on its own tokens, with the capacity that these give (sub-sequence
            dropping): no communication, but what is kept depends on how sequences are divided. ``"sequence"``: all
            ranks that share sequences decide on these as a whole: the same is kept for every TP and CP.
        pad: pad to the capacity in dispatch; see `capacity_of`. Only with scope ``"rank"``, where it bounds the rows
            that one rank sends to one expert.
    """

    capacity_factor: float
    policy: Literal["probs", "position"] = "probs"
    scope: Literal["rank", "sequence"] = "rank"
    pad: bool = False

    def __post_init__(self) -> None:
        if not self.capacity_factor > 0:
            raise ValueError(f"capacity_factor: got {self.capacity_factor}, want above 0")
        if self.policy not in ("probs", "position"):
            raise ValueError(f"policy: got {self.policy!r}, want 'probs' or 'position'")
        if self.scope not in ("rank", "sequence"):
            raise ValueError(f"scope: got {self.scope!r}, want 'rank' or 'sequence'")
        if self.pad and self.scope == "sequence":
            raise ValueError(
                "pad: got True with scope='sequence', where one rank may send all that an expert keeps; want "
                "scope='rank' or pad=False"
            )

    def capacity_of(self, num_tokens: int, k: int, num_experts: int) -> int | None:
        """What `TokenDispatcher.dispatch_preprocess` takes as ``capacity``: a number with ``pad``, else None."""
        return ops.expert_capacity(num_tokens, k, num_experts, self.capacity_factor) if self.pad else None

    def apply(
        self,
        probs: torch.Tensor,
        experts: torch.Tensor,
        num_experts: int,
        group: Group | None = None,
        order: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Local with scope ``"rank"``; with ``"sequence"`` every rank of the group has to call it.

        Args:
            probs: (T, k), not changed: what is kept is not normalised again.
            experts: (T, k) int32 or int64 in [-1, num_experts); -1 stays.
            group: the ranks that share sequences ("tp-cp"), for scope ``"sequence"``. T may differ between them.
            order: (T_all,) int64, a permutation: where in the sequence the tokens of all ranks stand, rank after rank;
                None where they lie in order.

        Returns:
            (T, k) of the dtype of ``experts``, -1 where an assignment was dropped.

        Raises:
            ValueError: no group for scope ``"sequence"``, or an order of another length.
        """
        if self.scope == "rank":
            return self._keep(probs, experts, num_experts)
        if group is None:
            raise ValueError("group: got None with scope='sequence', want the ranks that share sequences")
        mine, counts, wide = experts.shape[0], [experts.shape[0]], probs.detach()
        whole = experts
        if group.size > 1:
            counts = [row[0] for row in collectives.exchange_counts(counts, group)]
            wide = collectives.all_gather(wide, counts, group, label="probs")
            whole = collectives.all_gather(experts.int(), counts, group, label="metadata").to(experts.dtype)
        first = sum(counts[: group.index])
        if order is None:
            return self._keep(wide, whole, num_experts)[first : first + mine]
        if order.shape != (sum(counts),):
            raise ValueError(f"order: got shape {tuple(order.shape)}, want ({sum(counts)},) as the group has tokens")
        wide, whole = (torch.empty_like(x).index_copy_(0, order, x) for x in (wide, whole))
        return self._keep(wide, whole, num_experts)[order[first : first + mine]]

    def _keep(self, probs: torch.Tensor, experts: torch.Tensor, num_experts: int) -> torch.Tensor:
        tokens, k = experts.shape
        capacity = ops.expert_capacity(tokens, k, num_experts, self.capacity_factor)
        nothing = torch.empty(tokens, 0, device=experts.device)
        _, kept = ops.permute(
            nothing, experts, num_experts, capacity=capacity, drop_policy=self.policy, probs=probs.detach()
        )
        return experts.masked_fill(kept.inverse < 0, -1)
