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


PANEL = 64


def _panels(t: torch.Tensor, fill: int = 0) -> torch.Tensor:
    """(rows, out) to (panels, rows, 64)."""
    missing = -t.shape[1] % PANEL
    padded = torch.cat([t, t.new_full((t.shape[0], missing), fill)], dim=1)
    return padded.view(t.shape[0], padded.shape[1] // PANEL, PANEL).transpose(0, 1).contiguous()


def compress_2_4(weight: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept values (panels, in / 2, 64) and codes (panels, ceil(in / 8), 64) uint8 of weight (out, in)."""
    out, features = weight.shape
    places = mask.view(-1, 4).nonzero()[:, 1].view(out, features // 4, 2)
    values = weight.view(out, features // 4, 4).gather(2, places).reshape(out, features // 2)
    nibbles = _panels((places[..., 0] + 4 * places[..., 1]).T, fill=4)  # a missing output: places 0 and 1
    if nibbles.shape[1] % 2:
        nibbles = torch.cat([nibbles, nibbles.new_zeros(nibbles.shape[0], 1, PANEL)], dim=1)
    return _panels(values.T), (nibbles[:, 0::2] + 16 * nibbles[:, 1::2]).to(torch.uint8)


def decompress_2_4(values: torch.Tensor, codes: torch.Tensor, out_features: int) -> torch.Tensor:
    """The dense weight (out, in) with its zeros."""
    panels, half, _ = values.shape
    nibbles = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1, 2)[:, : half // 2].long()
    places = torch.stack([nibbles & 3, nibbles >> 2], dim=2)  # (panels, in / 4, 2, 64)
    dense = values.new_zeros(panels, half // 2, 4, PANEL)
    dense.scatter_(2, places, values.view(panels, half // 2, 2, PANEL))
    return dense.view(panels, 2 * half, PANEL).transpose(1, 2).reshape(panels * PANEL, 2 * half)[:out_features]
