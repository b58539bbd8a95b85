"""The Mamba-2 mixer: one projection, a short causal convolution, the state-space scan, a gated norm, a projection."""

from __future__ import annotations

import math

import torch
from torch import nn

from foldscan import ops
from foldscan.nn.cache import MambaCache
from foldscan.nn.linear import Linear
from foldscan.nn.packing import Packing
from foldscan.ops._library import wide


class GatedRMSNorm(nn.Module):
    """``RMSNorm(y * silu(z)) * weight`` with statistics over each of ``groups`` equal parts of the row; the gate after
    the norm with ``before_gate``."""

    def __init__(self, size: int, groups: int, eps: float, before_gate: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.group_size = size // groups
        self.eps, self.before_gate = eps, before_gate

    def forward(self, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """(T, size), (T, size) to (T, size)."""
        return ops.rmsnorm_fn(
            y, self.weight, z=z, eps=self.eps, group_size=self.group_size, norm_before_gate=self.before_gate
        )


class Mamba2Mixer(nn.Module):
    """Mamba-2 (arXiv:2405.21060, section 7; parameter layout of Nemotron-H, arXiv:2504.03624).

    Rows of ``in_proj`` are [z | x | B | C | dt], of widths H*P, H*P, G*N, G*N, H; the convolution with SiLU runs over
    x|B|C; the gate z acts inside the norm. State and convolution restart at every boundary of a packed batch.

    Args:
        hidden_size: d.
        num_heads, head_dim, num_groups, state_size: H, P, G, N.
        conv_kernel: W.
        norm: False for none; then the gate multiplies the scan's output.
        time_step_limit: clamp of softplus(dt + dt_bias).
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        head_dim: int,
        num_groups: int,
        state_size: int,
        conv_kernel: int = 4,
        conv_bias: bool = True,
        bias: bool = False,
        norm_eps: float = 1e-5,
        norm: bool = True,
        norm_before_gate: bool = False,
        time_step_limit: tuple[float, float] = (0.0, math.inf),
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.num_groups, self.state_size = num_heads, head_dim, num_groups, state_size
        self.inner_size = num_heads * head_dim
        self.conv_dim = self.inner_size + 2 * num_groups * state_size
        self.time_step_limit = time_step_limit
        self.in_proj = Linear(hidden_size, self.inner_size + self.conv_dim + num_heads, bias=bias)
        # Only the parameters (conv_dim, 1, W) and their names are torch's; the convolution itself is ours.
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, conv_kernel, groups=self.conv_dim, bias=conv_bias)
        self.A_log = nn.Parameter(torch.zeros(num_heads))
        self.D = nn.Parameter(torch.ones(num_heads))
        self.dt_bias = nn.Parameter(torch.zeros(num_heads))
        self.norm = GatedRMSNorm(self.inner_size, num_groups, norm_eps, norm_before_gate) if norm else None
        self.out_proj = Linear(self.inner_size, hidden_size, bias=bias)

    @torch.no_grad()
    def reset_state_space(self, time_step_min: float, time_step_max: float, time_step_floor: float) -> None:
        """Draw A in [1, 16], dt log-uniform in [min, max] through the inverse softplus, D = 1 (Mamba-2's own)."""
        self.A_log.copy_(torch.empty_like(self.A_log, dtype=torch.float32).uniform_(1.0, 16.0).log())
        self.D.fill_(1.0)
        low, high = math.log(time_step_min), math.log(time_step_max)
        dt = torch.empty_like(self.dt_bias, dtype=torch.float32).uniform_(low, high).exp().clamp_(min=time_step_floor)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def _convolve(self, xbc: torch.Tensor, packing: Packing, cache: MambaCache | None) -> torch.Tensor:
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        if packing.context is not None:
            return packing.context.convolve(xbc, weight, bias)
        channels_first = xbc.t().unsqueeze(0)  # (1, conv_dim, T), a view: channels stay the fast axis
        if cache is None or packing.cache is None:
            out = ops.causal_conv1d_fn(channels_first, weight, bias, activation="silu", cu_seqlens=packing.cu_seqlens)
            assert isinstance(out, torch.Tensor)  # no final states were asked for
            return out.squeeze(0).t()
        slots = packing.cache.slots.long()
        out, tails = ops.causal_conv1d_fn(
            channels_first,
            weight,
            bias,
            initial_states=cache.conv[slots],
            return_final_states=True,
            activation="silu",
            cu_seqlens=packing.cache.cu_seqlens,
        )
        cache.conv[slots] = tails.to(cache.conv.dtype)
        return out.squeeze(0).t()

    def _scan(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        z: torch.Tensor | None,
        packing: Packing,
        cache: MambaCache | None,
    ) -> torch.Tensor:
        A = -torch.exp(wide(self.A_log))
        D, dt_bias = wide(self.D), wide(self.dt_bias)
        if packing.context is not None:
            return packing.context.scan(x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_limit=self.time_step_limit)
        if cache is None or packing.cache is None:
            y = ops.mamba_chunk_scan_combined(
                x[None],
                dt[None],
                A,
                B[None],
                C[None],
                D=D,
                z=None if z is None else z[None],
                dt_bias=dt_bias,
                dt_softplus=True,
                dt_limit=self.time_step_limit,
                cu_seqlens=packing.cu_seqlens,
            )
            assert isinstance(y, torch.Tensor)  # no final states were asked for
            return y.squeeze(0)
        step = packing.cache
        return ops.mamba_chunk_scan_extend(
            x,
            dt,
            A,
            B,
            C,
            cache.scan,
            step.slots,
            step.positions,
            step.cu_seqlens,
            D=D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=True,
            dt_limit=self.time_step_limit,
        )

    def forward(self, hidden: torch.Tensor, packing: Packing, cache: MambaCache | None = None) -> torch.Tensor:
        """(T, d) to (T, d)."""
        total = hidden.shape[0]
        z, xbc, dt = self.in_proj(hidden).split([self.inner_size, self.conv_dim, self.num_heads], dim=-1)
        xbc = self._convolve(xbc, packing, cache)
        group_width = self.num_groups * self.state_size
        x, B, C = xbc.split([self.inner_size, group_width, group_width], dim=-1)
        y = self._scan(
            x.reshape(total, self.num_heads, self.head_dim),
            dt,
            B.reshape(total, self.num_groups, self.state_size),
            C.reshape(total, self.num_groups, self.state_size),
            z.reshape(total, self.num_heads, self.head_dim) if self.norm is None else None,
            packing,
            cache,
        )
        y = y.reshape(total, self.inner_size)
        return self.out_proj(y if self.norm is None else self.norm(y, z))
