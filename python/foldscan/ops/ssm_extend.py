"""The Mamba-2 scan with a cache: prefill, prefill in pieces and decoding as one operation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from foldscan.ops import _checks
from foldscan.ops._backend import use_native
from foldscan.ops._library import kernels, register
from foldscan.ops.ssm_scan import check_scan_inputs, dense_tokens
from foldscan.reference import ssm as reference

CHUNK = 64
"""Tokens of a chunk: the grid that training and decoding share. The kernels' constant, not a setting."""

_STATE_PAD = 16


@dataclass
class ScanCache:
    """What a sequence must remember: the state at the start of its current chunk and the chunk's tokens so far.

    Reading the state at each step but writing it only once in 64 is what makes decoding repeat the arithmetic (and the
    bits) of the full scan.

    Attributes:
        state: (slots, H, N, P rounded up to 16), fp32.
        x: (slots, 64, H, P). B: (slots, 64, G, N). Both in the activations' dtype.
        dt: (slots, 64, H), fp32, before bias and softplus.
    """

    state: torch.Tensor
    x: torch.Tensor
    B: torch.Tensor
    dt: torch.Tensor

    @classmethod
    def empty(
        cls,
        slots: int,
        heads: int,
        channels: int,
        groups: int,
        state: int,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
    ) -> ScanCache:
        """A cache of ``slots`` sequences; nothing needs to be cleared: a sequence at position 0 starts from zero."""
        padded = -(-channels // _STATE_PAD) * _STATE_PAD
        return cls(
            torch.zeros(slots, heads, state, padded, device=device),
            torch.zeros(slots, CHUNK, heads, channels, dtype=dtype, device=device),
            torch.zeros(slots, CHUNK, groups, state, dtype=dtype, device=device),
            torch.zeros(slots, CHUNK, heads, device=device),
        )


def mamba_chunk_scan_extend(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    cache: ScanCache,
    slots: torch.Tensor,
    positions: torch.Tensor,
    cu_seqlens: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> torch.Tensor:
    """Feed new tokens to sequences whose past is in ``cache``, which is updated in place.

    Args:
        x, z: (T, H, P); dt: (T, H); A: (H); B, C: (T, G, N); D, dt_bias: as in ``mamba_chunk_scan_combined``.
        cache: a ScanCache in x's dtype. slots: (n) int32, the slot of each sequence, no slot twice.
        positions: (n) int32, how many tokens of each sequence the cache has seen; 0 starts anew.
        cu_seqlens: (n + 1) int32, where each sequence's new tokens are in T.

    Returns:
        (T, H, P), with the bits that ``mamba_chunk_scan_combined`` gives these tokens in the whole sequence, however it
        was cut. Not differentiable.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or value.
    """
    _checks.tensor("x", x, dims=3)
    check_scan_inputs(x, dt, A, B, C, D, z, dt_bias)
    total, heads, channels = x.shape
    groups, n = B.shape[1:]
    _checks.cu_seqlens("cu_seqlens", cu_seqlens, total)
    for name, value in (("slots", slots), ("positions", positions)):
        _checks.tensor(name, value, dtypes=(torch.int32,))
        _checks.shape(name, value, cu_seqlens.shape[0] - 1)
    _checks.shape("cache.x", cache.x, "slots", CHUNK, heads, channels)
    _checks.shape("cache.B", cache.B, "slots", CHUNK, groups, n)
    _checks.same_dtype("cache.x", cache.x, "x", x)
    if (
        not torch.compiler.is_compiling()
        and slots.numel()
        and not 0 <= int(slots.min()) <= int(slots.max()) < len(cache.x)
    ):
        raise ValueError(f"slots: got {slots.tolist()}, want numbers in 0 .. {len(cache.x) - 1}")
    if x.dtype == torch.float16 or not use_native(x, dt, A, D, dt_bias):
        with torch.no_grad():
            return _extend_reference(
                x, dt, A, B, C, cache, slots, positions, cu_seqlens, D, z, dt_bias, dt_softplus, dt_limit
            )
    return kernels.scan_extend(
        dense_tokens(x),
        dt.float().contiguous(),
        A.float(),
        dense_tokens(B),
        dense_tokens(C),
        None if D is None else D.float().contiguous(),
        None if z is None else dense_tokens(z),
        None if dt_bias is None else dt_bias.float(),
        dt_softplus,
        *dt_limit,
        cache.state,
        cache.x,
        cache.B,
        cache.dt,
        slots,
        positions,
        cu_seqlens,
    )


def _extend_reference(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    cache: ScanCache,
    slots: torch.Tensor,
    positions: torch.Tensor,
    cu_seqlens: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    softplus: bool,
    limit: tuple[float, float],
) -> torch.Tensor:
    channels = x.shape[2]
    out = torch.empty_like(x)
    bounds = cu_seqlens.tolist()
    for i, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist())):
        t = bounds[i]
        if position == 0:
            cache.state[slot] = 0
        while t < bounds[i + 1]:
            start = position % CHUNK
            count = min(CHUNK - start, bounds[i + 1] - t)
            rows = slice(start, start + count)
            cache.x[slot, rows], cache.B[slot, rows] = x[t : t + count], B[t : t + count]
            cache.dt[slot, rows] = dt[t : t + count].float()
            state = cache.state[slot, :, :, :channels].transpose(1, 2)[None].to(reference.wide(x).dtype)
            seen = slice(0, start + count)
            c = torch.cat([torch.zeros_like(C[:1]).expand(start, -1, -1), C[t : t + count]])
            gate = (
                None
                if z is None
                else torch.cat([torch.zeros_like(z[:1]).expand(start, -1, -1), z[t : t + count]])[None]
            )
            chunk = (cache.x[slot, seen][None], cache.dt[slot, seen][None], A, cache.B[slot, seen][None], c[None])
            y, final = reference.chunk_scan(*chunk, D, gate, dt_bias, state, dt_softplus=softplus, dt_limit=limit)
            out[t : t + count] = y[0, start:]
            if start + count == CHUNK:
                cache.state[slot, :, :, :channels] = final[0].transpose(1, 2).float()
            t, position = t + count, position + count
    return out


register("scan_extend", lambda x, *_: x.new_empty(x.shape))
