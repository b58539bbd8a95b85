"""The six calls that every dispatcher answers, and what passes between them.

MoE Parallel Folding, arXiv:2504.14960, section 3.3; the split into calls is Megatron-Core's. Tokens live on the ranks
of the group EP; expert e lives on the EP member ``e // (E / EP)``, its hidden width sliced over the group ETP. Local
work and communication are calls of their own, so that a schedule can put other work beside the latter.

**One order of sums.** All dispatchers give the same bits. A row that an expert computes is rounded to the activation
dtype; then rows are added, each time in fp32 (fp64) and rounded once:

1. a row over the ETP members, in the order of the ranks;
2. the rows of a token on one EP member, in the order of its slots;
3. these sums over the EP members, in the order of the ranks.

In backward the gradient of a token is the same sum over the gradients of its rows, and the gradient of a row is that
of its token. Rows of one expert stand in the same order everywhere (ETP member, EP member, token, slot), so its weight
gradients have the same bits as well where the expert layer's sums depend on nothing else: `foldscan.ops.moe_mlp` in
fp32 and bf16, but not in fp64, whose products are PyTorch's and may depend on how many rows there are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from foldscan.ops.moe_routing import check_experts
from foldscan.parallel.dispatchers.links import Chain, Copies, bring_back
from foldscan.parallel.groups import Group


@dataclass(frozen=True)
class State:
    """What one call hands to the next. Never changed in place: a call may be repeated on its state.

    Attributes:
        rows: tokens, rows or results, as far as they have come.
        probs: probabilities beside them. After dispatch (R, 1).
        experts: (.., slots) experts beside them, local ones after dispatch; None where counts say it all.
        counts: (E,) rows for every expert, or (EP,) for every rank; None where nobody needs to be told.
        capacity, tokens_per_rank: as given to ``dispatch_preprocess``.
        own: from the tokens here to the rows that leave, where these are not the same.
        route: from there to the rows of the experts. None before ``token_dispatch``.
    """

    rows: torch.Tensor
    probs: torch.Tensor
    experts: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    capacity: int | None = None
    tokens_per_rank: int | None = None
    own: Copies | None = None
    route: Chain | None = None


class TokenDispatcher(ABC):
    """Brings tokens to their experts and the results back.

    Args:
        num_experts: experts in all, a multiple of the size of ``ep``.
        ep: ranks that hold different experts.
        etp: ranks that hold slices of the same experts.
    """

    def __init__(self, num_experts: int, ep: Group, etp: Group) -> None:
        if num_experts < 1 or num_experts % ep.size:
            raise ValueError(f"num_experts: got {num_experts}, want a multiple of the {ep.size} ranks of {ep.axes}")
        self.num_experts, self.ep, self.etp = num_experts, ep, etp
        self.local_experts = num_experts // ep.size

    def dispatch_preprocess(
        self,
        tokens: torch.Tensor,
        probs: torch.Tensor,
        experts: torch.Tensor,
        *,
        capacity: int | None = None,
        tokens_per_rank: int | None = None,
    ) -> State:
        """Local: tokens into the order in which they leave.

        Args:
            tokens: (T, H). T may differ between ranks, and be 0.
            probs: (T, k), carried in fp32 (fp64).
            experts: (T, k) int32 or int64 in [-1, E); -1 is an empty or dropped slot. k is the same on all ranks.
            capacity: pad to it: from every rank every expert gets this many rows, those too many empty, so that the
                sizes are known beforehand. The same on all ranks. No token may be left over; see `Dropping`.
            tokens_per_rank: T, where the caller knows that all ranks of EP x ETP have as many: nobody needs to ask.

        Raises:
            TypeError: wrong dtypes. ValueError: wrong shapes, an expert out of range, more tokens than the capacity.
        """
        check_experts(experts, tokens.shape[0], self.num_experts)
        if probs.shape != experts.shape:
            raise ValueError(f"probs: got shape {tuple(probs.shape)}, want {tuple(experts.shape)} as experts has")
        if tokens_per_rank is not None and tokens_per_rank != tokens.shape[0]:
            raise ValueError(f"tokens_per_rank: got {tokens_per_rank}, want {tokens.shape[0]} as tokens has")
        if capacity is not None and capacity < 0:
            raise ValueError(f"capacity: got {capacity}, want at least 0")
        if capacity is not None and experts.device.type == "cpu":
            load = torch.bincount(experts.reshape(-1).long() + 1, minlength=self.num_experts + 1)[1:]
            if int(load.max()) > capacity:
                raise ValueError(f"capacity: got {capacity}, want {int(load.max())} as an expert has rows here")
        probs = probs if probs.dtype == torch.float64 else probs.float()
        return self._leave(State(tokens, probs, experts.long(), None, capacity, tokens_per_rank))

    @abstractmethod
    def _leave(self, state: State) -> State:
        """Local part of dispatch that differs between dispatchers."""

    @abstractmethod
    def token_dispatch(self, state: State) -> State:
        """Communication: what belongs to the experts of this rank arrives."""

    def dispatch_postprocess(self, state: State) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Local: what an expert layer takes, ``ops.moe_mlp(rows, row_probs, local_experts, ...)``.

        Returns:
            rows (R, H); row_probs (R, 1) fp32 (fp64); local_experts (R, 1) int64 in [-1, E / EP), -1 for padding.
        """
        assert state.experts is not None
        return state.rows, state.probs, state.experts

    def combine_preprocess(self, y: torch.Tensor, state: State) -> State:
        """Local: take the results of the experts.

        Args:
            y: (R, D), row by row what `dispatch_postprocess` gave; on an ETP member its slice's part of the sum.
            state: as `token_dispatch` gave it.
        """
        if y.dim() != 2 or y.shape[0] != state.rows.shape[0]:
            raise ValueError(f"y: got shape {tuple(y.shape)}, want {state.rows.shape[0]} rows as were dispatched")
        return replace(state, rows=y)

    def token_combine(self, state: State) -> State:
        """Communication: results go home."""
        assert state.route is not None
        return replace(state, rows=bring_back(state.rows, state.route, state.probs))

    def combine_postprocess(self, state: State) -> torch.Tensor:
        """Local: (T, D), every token the sum of its rows."""
        return state.rows if state.own is None else bring_back(state.rows, state.own)


Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def run(
    dispatcher: TokenDispatcher,
    tokens: torch.Tensor,
    probs: torch.Tensor,
    experts: torch.Tensor,
    compute: Compute,
    *,
    capacity: int | None = None,
    tokens_per_rank: int | None = None,
) -> torch.Tensor:
    """The six calls with the experts between them.

    Args:
        tokens, probs, experts, capacity, tokens_per_rank: see `TokenDispatcher.dispatch_preprocess`.
        compute: ``(rows, row_probs, local_experts) -> y``, e.g. the forward of ``nn.Experts``.

    Returns:
        (T, D).
    """
    state = dispatcher.dispatch_preprocess(tokens, probs, experts, capacity=capacity, tokens_per_rank=tokens_per_rank)
    state = dispatcher.token_dispatch(state)
    y = compute(*dispatcher.dispatch_postprocess(state))
    state = dispatcher.combine_preprocess(y, state)
    return dispatcher.combine_postprocess(dispatcher.token_combine(state))
