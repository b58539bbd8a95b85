"""Pruning, written out: statistics per sequence, selection by sorting, 2:4 patterns group by group."""

from __future__ import annotations

import itertools

import torch


def score_update(x: torch.Tensor, cu_seqlens: torch.Tensor, first: bool, state: torch.Tensor) -> None:
    """Add the tokens of x (tokens, channels) to state (8, channels) fp64, whose rows csrc/pruning/pruning.h names."""
    x = x.double()
    if first and x.shape[0]:
        state[2] = x[0]
    starts = cu_seqlens.tolist()
    for begin, end in itertools.pairwise(starts):
        if begin == end:
            continue
        tokens = x[begin:end]
        shifted = tokens - state[2]
        mean_abs = tokens.abs().mean(0)
        state[0] += tokens.abs().sum(0)
        state[1] += tokens.square().sum(0)
        state[3] += shifted.sum(0)
        state[4] += shifted.square().sum(0)
        state[5] += mean_abs
        state[6] += mean_abs.square()
        state[7] += tokens.square().sum(0).sqrt()


def group_topk_mask(scores: torch.Tensor, groups: torch.Tensor, count: int, keep: int) -> torch.Tensor:
    """True for the ``keep`` largest scores of each group, the earlier first among equals."""
    mask = torch.zeros(scores.shape[0], dtype=torch.bool, device=scores.device)
    for group in range(count):
        members = (groups == group).nonzero()[:, 0]
        order = torch.sort(scores[members], descending=True, stable=True).indices
        mask[members[order[:keep]]] = True
    return mask


def sparsity_mask_2_4(scores: torch.Tensor) -> torch.Tensor:
    """True for the two largest of every four consecutive scores of a row (rows, cols), the earlier among equals."""
    four = scores.reshape(-1, 4)
    order = torch.sort(four, dim=1, descending=True, stable=True).indices
    return torch.zeros_like(four, dtype=torch.bool).scatter_(1, order[:, :2], True).view(scores.shape)


def compress_2_4(weight: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept values (in / 2, out) and codes (ceil(in / 8), out) uint8 of weight (out, in)."""
    out, features = weight.shape
    places = mask.view(-1, 4).nonzero()[:, 1].view(out, features // 4, 2)
    values = weight.view(out, features // 4, 4).gather(2, places).reshape(out, features // 2).T.contiguous()
    nibbles = (places[..., 0] + 4 * places[..., 1]).T
    if nibbles.shape[0] % 2:
        nibbles = torch.cat([nibbles, nibbles.new_zeros(1, out)])
    return values, (nibbles[0::2] + 16 * nibbles[1::2]).to(torch.uint8)


def decompress_2_4(values: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The dense weight (out, in) with its zeros."""
    half, out = values.shape
    nibbles = torch.stack([codes & 15, codes >> 4], dim=1).flatten(0, 1)[: half // 2].long()
    places = torch.stack([nibbles & 3, nibbles >> 2], dim=1)  # (in / 4, 2, out)
    dense = values.new_zeros(half // 2, 4, out).scatter_(1, places, values.view(half // 2, 2, out))
    return dense.view(2 * half, out).T.contiguous()
