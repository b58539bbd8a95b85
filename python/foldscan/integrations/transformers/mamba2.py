"""The Mamba-2 mixer of transformers (Mamba2, NemotronH, Bamba, GraniteMoeHybrid, Zamba2, FalconH1) on foldscan's ops.

The numbers are transformers' own, quirks included: full sequences clamp dt to ``time_step_limit``, single steps do not
clamp it; padding is zeroed before the projection and after the convolution; a cache holds the last W inputs of the
convolution (one more than it needs) and the state (B, H, P, N) in fp32.
"""

from __future__ import annotations

from typing import Any

import torch

from foldscan import ops
from foldscan.integrations.transformers.swap import fallback, runs_here


def covers(module: Any) -> str | None:
    """None where `mixer` computes this module, else why not."""
    if module.activation not in ("silu", "swish"):
        return f"activation {module.activation}"
    if not 2 <= module.conv_kernel_size <= 8:
        return f"a convolution of width {module.conv_kernel_size}"
    if not runs_here(module.in_proj.weight):
        return f"weights of dtype {module.in_proj.weight.dtype} on {module.in_proj.weight.device}"
    return None


def mixer(
    self: Any,
    hidden_states: torch.Tensor,
    cache_params: Any = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """(B, L, d) to (B, L, d), extending ``cache_params`` where there is one."""
    if not computes(self, hidden_states, cache_params, kwargs):
        return fallback(self, hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs)
    length, dtype = hidden_states.shape[1], hidden_states.dtype
    conv_state, state = cached(self, cache_params)
    if hasattr(self, "ssm_in_multiplier"):
        hidden_states = hidden_states * self.ssm_in_multiplier
    projected = self.in_proj(unpadded(hidden_states, attention_mask))
    if hasattr(self, "mup_vector"):
        projected = projected * self.mup_vector
    gate, xbc, dt = projected.split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
    xbc = convolve(self, xbc, cache_params, conv_state)
    width = self.n_groups * self.ssm_state_size
    x, B, C = unpadded(xbc, attention_mask).split([self.intermediate_size, width, width], dim=-1)
    x = x.unflatten(-1, (self.num_heads, self.head_dim))
    B, C = (m.unflatten(-1, (self.n_groups, self.ssm_state_size)) for m in (B, C))
    # FalconH1 may have no norm: then the gate acts in the scan.
    normed = getattr(self, "mamba_rms_norm", True)
    z = None if normed else gate.unflatten(-1, (self.num_heads, self.head_dim))
    A = -torch.exp(self.A_log.float())
    if state is not None and length == 1:
        y = _step(self, state, x, dt, A, B, C, z)
    else:
        scanned = ops.mamba_chunk_scan_combined(
            x,
            dt,
            A,
            B,
            C,
            D=self.D,
            z=z,
            dt_bias=self.dt_bias,
            initial_states=state,
            dt_softplus=True,
            dt_limit=self.time_step_limit,
            return_final_states=cache_params is not None,
        )
        if cache_params is not None:
            scanned, final = scanned
            cache_params.update_recurrent_state(final, layer_idx=self.layer_idx)
        assert isinstance(scanned, torch.Tensor)
        y = scanned
    y = y.flatten(2)
    if normed:
        y = self.norm(y, gate)
    return self.out_proj(y.to(dtype))


def computes(self: Any, hidden_states: torch.Tensor, cache: Any, options: dict[str, Any]) -> bool:
    """Whether the mixers here, Mamba's and Mamba-2's, can take this call."""
    if options.get("seq_idx") is not None or options.get("cu_seqlens") is not None:
        return False
    return runs_here(hidden_states) and not (cache is not None and cache.is_recording_past(self.layer_idx))


def cached(self: Any, cache: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The layer's (convolution state, recurrent state), None where the cache holds nothing yet."""
    if cache is None:
        return None, None
    return tuple(get(self.layer_idx, state_idx=0) for get in (cache.get_conv_state, cache.get_recurrent_state))


def unpadded(t: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Zero what is padding."""
    return t if attention_mask is None else (t * attention_mask[:, :, None]).to(t.dtype)


def convolve(self: Any, xbc: torch.Tensor, cache: Any, conv_state: torch.Tensor | None) -> torch.Tensor:
    """The causal convolution of (B, L, C), after the inputs in the cache, which takes in the new ones."""
    weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
    inputs = xbc.transpose(1, 2)
    if conv_state is not None and xbc.shape[1] == 1 and conv_state.dtype == xbc.dtype:
        return ops.causal_conv1d_update(inputs, conv_state, weight, bias, "silu").transpose(1, 2)
    # The cache is updated in place: keep what it held.
    before = None if conv_state is None else conv_state[..., conv_state.shape[-1] - weight.shape[1] + 1 :].clone()
    if cache is not None:
        cache.update_conv_state(inputs, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
    out = ops.causal_conv1d_fn(inputs, weight, bias, initial_states=before, activation="silu")
    assert isinstance(out, torch.Tensor)  # no final states were asked for
    return out.transpose(1, 2)


def _step(
    self: Any,
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    z: torch.Tensor | None,
) -> torch.Tensor:
    """One token: the state is updated in place."""
    P, N = self.head_dim, self.ssm_state_size
    y = ops.selective_state_update(
        state,
        x[:, 0],
        dt[:, 0, :, None].expand(-1, -1, P),
        A[:, None, None].expand(-1, P, N),
        B[:, 0],
        C[:, 0],
        self.D[:, None].expand(-1, P),
        z=None if z is None else z[:, 0],
        dt_bias=self.dt_bias[:, None].expand(-1, P),
        dt_softplus=True,
    )
    return y[:, None]
