"""Appending to transformers' key/value cache without copying all of it at every token.

A ``DynamicLayer`` concatenates: a decode step reads and writes the whole past. Here its tensors are views of a buffer
with room to grow. The layer stays what it is to everyone else, also when it is cropped, reordered or copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from foldscan.integrations.transformers.swap import wants_gradient

_ROOM = "_foldscan_room"
_SPARE = 256  # tokens of room at least


@dataclass
class _Room:
    """Keys and values (B, H, capacity, D), of which ``used`` tokens are filled, by whoever appended last."""

    keys: torch.Tensor
    values: torch.Tensor
    used: int


def append(cache: Any, layer_idx: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``cache.update(k, v, layer_idx)``: all keys and values (B, H, K, D), the new ones last."""
    layers = getattr(cache, "layers", ())
    layer = layers[layer_idx] if layer_idx < len(layers) else None
    # Another kind of layer, a cache that offloads its layers, the prefill (whose memory may be all that is needed).
    if (
        type(layer) is not DynamicLayer
        or getattr(cache, "offloading", False)
        or not layer.is_initialized
        or layer.keys.numel() == 0
        or torch.compiler.is_compiling()
        or wants_gradient(k, v, layer.keys, layer.values)
    ):
        return cache.update(k, v, layer_idx)
    past, new = layer.keys.shape[2], k.shape[2]
    room = layer.__dict__.get(_ROOM)
    if not (
        room is not None
        and room.used == past  # nobody else, a shallow copy say, has appended to it
        and layer.keys.data_ptr() == room.keys.data_ptr()
        and layer.values.data_ptr() == room.values.data_ptr()
        and layer.keys.stride() == room.keys.stride()
        and layer.keys.shape[:2] == room.keys.shape[:2] == k.shape[:2]
        and past + new <= room.keys.shape[2]
    ):
        capacity = past + new + max(_SPARE, past // 4)
        room = _Room(_grown(layer.keys, capacity), _grown(layer.values, capacity), past)
        setattr(layer, _ROOM, room)
    room.keys[:, :, past : past + new] = k
    room.values[:, :, past : past + new] = v
    room.used = past + new
    layer.keys, layer.values = room.keys[:, :, : room.used], room.values[:, :, : room.used]
    return layer.keys, layer.values


def _grown(t: torch.Tensor, capacity: int) -> torch.Tensor:
    grown = t.new_empty(*t.shape[:2], capacity, t.shape[3])
    grown[:, :, : t.shape[2]] = t
    return grown
