"""One cache for a hybrid model: paged keys and values, convolution tails, and scan states, by sequence slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from foldscan import ops


@dataclass
class AttentionCache:
    """Pages of one attention layer: (pages, page_size, kv_heads, head_dim) each."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass
class MambaCache:
    """State of one Mamba-2 layer: the last W - 1 inputs of the convolution, (slots, channels, W - 1), and the scan's
    state at the start of the current chunk with the chunk's tokens so far (`foldscan.ops.ScanCache`)."""

    conv: torch.Tensor
    scan: Any


@dataclass(frozen=True)
class CacheStep:
    """The part of a cache that one forward reads and extends.

    Attributes:
        cache: the whole.
        slots: (n,) int32, the slot of each packed sequence.
        positions: (n,) int32, tokens of each sequence that are already cached.
        cu_seqlens: (n + 1,) int32, boundaries of the new tokens.
        cu_seqlens_k: (n + 1,) int32, boundaries of cached and new tokens together.
        block_table: (n, max_pages) int32, the pages of each sequence.
        max_seqlen_k: the longest sequence after this step.
    """

    cache: HybridCache
    slots: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    cu_seqlens_k: torch.Tensor
    block_table: torch.Tensor
    max_seqlen_k: int
    slot_list: tuple[int, ...]
    counts: tuple[int, ...]

    def commit(self) -> None:
        """Count the new tokens as cached. The model calls it once, after its last layer."""
        for slot, count in zip(self.slot_list, self.counts):
            self.cache.lengths[slot] += count


class HybridCache:
    """What a model remembers of up to ``slots`` sequences between forwards.

    Pages of keys and values are shared by all slots and handed out on demand, so memory follows the tokens that exist,
    not ``slots * max_length``. Layers are added with `add_attention` and `add_mamba` in model order
    (`HybridLM.new_cache` does it).

    Args:
        slots: sequences at a time.
        max_length: longest sequence, prompt and generated tokens together.
        dtype: of keys, values and convolution inputs: the model's activation dtype.
        page_size: tokens a page.
        total_pages: pages in all; by default enough for every slot at ``max_length``.
    """

    def __init__(
        self,
        slots: int,
        max_length: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        page_size: int = 64,
        total_pages: int | None = None,
    ) -> None:
        for name, value in (("slots", slots), ("max_length", max_length), ("page_size", page_size)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, want at least 1")
        self.slots, self.max_length, self.page_size = slots, max_length, page_size
        self.dtype, self.device = dtype, torch.device(device)
        self.pages_per_slot = -(-max_length // page_size)
        self.total_pages = slots * self.pages_per_slot if total_pages is None else total_pages
        self.layers: list[AttentionCache | MambaCache | None] = []
        self.lengths = [0] * slots
        self._free_slots = list(range(slots))[::-1]
        self._free_pages = list(range(self.total_pages))[::-1]
        self._pages: list[list[int]] = [[] for _ in range(slots)]

    def add_attention(self, kv_heads: int, head_dim: int) -> None:
        """Add an attention layer's pages."""
        shape = (self.total_pages, self.page_size, kv_heads, head_dim)
        keys = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self.layers.append(AttentionCache(keys, torch.zeros_like(keys)))

    def add_mamba(self, heads: int, head_dim: int, groups: int, state_size: int, kernel: int) -> None:
        """Add a Mamba-2 layer's states."""
        channels = heads * head_dim + 2 * groups * state_size
        conv = torch.zeros(self.slots, channels, kernel - 1, dtype=self.dtype, device=self.device)
        scan = ops.ScanCache.empty(self.slots, heads, head_dim, groups, state_size, self.dtype, device=self.device)
        self.layers.append(MambaCache(conv, scan))

    def add_stateless(self) -> None:
        """Add a layer that remembers nothing (MLP, MoE), to keep layer numbers aligned."""
        self.layers.append(None)

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    def allocate(self) -> int:
        """A fresh slot of length 0.

        Raises:
            RuntimeError: all slots are taken.
        """
        if not self._free_slots:
            raise RuntimeError(f"the cache's {self.slots} slots are all taken")
        slot = self._free_slots.pop()
        self.lengths[slot] = 0
        for layer in self.layers:
            if isinstance(layer, MambaCache):
                layer.conv[slot] = 0
        return slot

    def release(self, slot: int) -> None:
        """Give a slot and its pages back."""
        if slot in self._free_slots or not 0 <= slot < self.slots:
            raise ValueError(f"slot: got {slot}, want one that was allocated")
        self._free_pages.extend(reversed(self._pages[slot]))
        self._pages[slot] = []
        self.lengths[slot] = 0
        self._free_slots.append(slot)

    def step(self, slots: Sequence[int], counts: Sequence[int]) -> CacheStep:
        """Prepare to feed ``counts[i]`` new tokens to the sequence in ``slots[i]``, taking pages as needed.

        Raises:
            ValueError: a slot twice or out of range, or a sequence longer than ``max_length``; nothing is changed.
            RuntimeError: no pages are left; nothing is changed.
        """
        if len(slots) != len(counts) or not slots:
            raise ValueError(f"slots, counts: got {len(slots)} and {len(counts)} values, want as many, and some")
        if len(set(slots)) != len(slots) or min(slots) < 0 or max(slots) >= self.slots:
            raise ValueError(f"slots: got {list(slots)}, want different ones in [0, {self.slots})")
        needed = 0
        for slot, count in zip(slots, counts):
            after = self.lengths[slot] + count
            if count < 0 or after > self.max_length:
                raise ValueError(
                    f"counts: got {count} for a sequence of {self.lengths[slot]}, want a total of at most "
                    f"max_length = {self.max_length}"
                )
            needed += -(-after // self.page_size) - len(self._pages[slot])
        paged = any(isinstance(layer, AttentionCache) for layer in self.layers)
        if paged and needed > len(self._free_pages):
            raise RuntimeError(f"the cache has {len(self._free_pages)} free pages, want {needed}")
        positions = [self.lengths[s] for s in slots]
        table = torch.zeros(len(slots), self.pages_per_slot, dtype=torch.int32)
        if paged:
            for row, (slot, count) in enumerate(zip(slots, counts)):
                pages = self._pages[slot]
                while len(pages) * self.page_size < self.lengths[slot] + count:
                    pages.append(self._free_pages.pop())
                table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)

        def ints(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.device)

        def cumulative(values: list[int]) -> torch.Tensor:
            total, out = 0, [0]
            for value in values:
                total += value
                out.append(total)
            return ints(out)

        lengths = [p + c for p, c in zip(positions, counts)]
        return CacheStep(
            cache=self,
            slots=ints(list(slots)),
            positions=ints(positions),
            cu_seqlens=cumulative(list(counts)),
            cu_seqlens_k=cumulative(lengths),
            block_table=table.to(self.device),
            max_seqlen_k=max(lengths),
            slot_list=tuple(slots),
            counts=tuple(counts),
        )
