"""Large outputs live in blocks that are used again, but never while a tensor needs them."""

from __future__ import annotations

import gc

import torch
from foldscan import ops


def large(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An output of 8 MiB and what it should be."""
    x = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(seed))
    return ops.rmsnorm_fn(x, torch.ones(1024)), torch.nn.functional.rms_norm(x, (1024,), eps=1e-6)


def test_blocks_are_used_again_but_not_while_a_view_lives() -> None:
    out, want = large(0)
    view, where = out[5:7].flatten(), out.data_ptr()
    del out
    gc.collect()
    others = [large(seed) for seed in range(1, 4)]
    assert all(where != o.data_ptr() for o, _ in others)
    torch.testing.assert_close(view, want[5:7].flatten())
    for other, expected in others:
        torch.testing.assert_close(other, expected)
    places = {o.data_ptr() for o, _ in others}
    del view, other, others
    gc.collect()
    again = [large(seed)[0] for seed in range(4)]
    assert {o.data_ptr() for o in again} & (places | {where})


def test_a_large_output_is_an_ordinary_tensor() -> None:
    out, want = large(0)
    assert out.device == torch.device("cpu") and out.is_contiguous()
    torch.testing.assert_close(out.add_(1.0).resize_(2, 1024), want[:2] + 1.0)
