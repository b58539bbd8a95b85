"""The Mamba mixer of transformers on foldscan's ops."""

from __future__ import annotations

from typing import Any

import torch

from foldscan import ops
from foldscan.integrations.transformers.mamba2 import cached, computes, convolve, unpadded
from foldscan.integrations.transformers.swap import fallback


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
    x, gate = self.in_proj(unpadded(hidden_states, attention_mask)).chunk(2, dim=-1)
    x = unpadded(convolve(self, x, cache_params, conv_state), attention_mask)
    rank, n = self.time_step_rank, self.ssm_state_size
    dt, B, C = self.x_proj(x).split([rank, n, n], dim=-1)
    dt = ops.linear(dt, self.dt_proj.weight)
    A = -torch.exp(self.A_log.float())
    if state is not None and length == 1:
        y = ops.selective_state_update(
            state,
            x[:, 0],
            dt[:, 0],
            A,
            B[:, 0],
            C[:, 0],
            self.D,
            z=gate[:, 0],
            dt_bias=self.dt_proj.bias,
            dt_softplus=True,
        )[:, None]
    else:
        # Like the original, a longer piece after a cached one starts from a zero state.
        result = ops.selective_scan_fn(
            x.transpose(1, 2),
            dt.transpose(1, 2),
            A,
            B.transpose(1, 2),
            C.transpose(1, 2),
            self.D.float(),
            gate.transpose(1, 2),
            self.dt_proj.bias,
            delta_softplus=True,
            return_last_state=cache_params is not None,
        )
        if cache_params is not None:
            result, final = result
            cache_params.update_recurrent_state(final, self.layer_idx)
        assert isinstance(result, torch.Tensor)
        y = result.transpose(1, 2)
    return self.out_proj(y.to(dtype))
