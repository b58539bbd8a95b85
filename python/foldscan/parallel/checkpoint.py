"""Distributed checkpoints: every rank writes what it owns, any mesh reads what it needs.

Planning, the check that the pieces tile every tensor, and the news of a rank that failed are
`torch.distributed.checkpoint`'s; the files are safetensors with a header that says where each piece belongs
(`foldscan.models.pieces`), so nothing pickled is ever written or read, and a folder written by one process is read the
same way. The names are those of a single process's checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from foldscan.models import FormatError
from foldscan.models.pieces import Piece, PieceFolder, write_pieces
from foldscan.models.pretrained import AVERAGE
from foldscan.parallel.model import FoldedLM
from foldscan.parallel.optimizer import DistributedOptimizer, Shard
from foldscan.parallel.placement import Placement
from foldscan.parallel.world import waiting

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class Held:
    """A box of a whole tensor of ``shape``, at ``offsets``, that ``tensor`` is, or has room for."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: torch.Tensor

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offsets), torch.Size(self.tensor.shape))


Holdings = Mapping[str, list[Held]]


def _boxes(place: Placement, model: FoldedLM, shard: Shard, tensor: torch.Tensor) -> Iterator[Held]:
    """What of the whole a tensor of the shape of a shard's value is."""
    first, last = shard.start, shard.start + tensor.shape[shard.dim]
    for box in place.boxes(model.groups.mesh, model.groups.rank):
        low = max(box.local[shard.dim], first)
        high = min(box.local[shard.dim] + box.size[shard.dim], last)
        if low >= high:
            continue
        whole, local, size = list(box.whole), list(box.local), list(box.size)
        whole[shard.dim] += low - box.local[shard.dim]
        local[shard.dim], size[shard.dim] = low - first, high - low
        view = tensor[tuple(slice(o, o + s) for o, s in zip(local, size))]
        yield Held(place.shape, tuple(whole), view)


def holdings(model: FoldedLM, optimizer: DistributedOptimizer) -> dict[str, list[Held]]:
    """All that this rank owns of the weights, the optimizer's state, moving averages and router biases, by name."""
    found: dict[str, list[Held]] = {}
    for name, shard in optimizer.shards.items():
        place = model.placements[name]
        tensors = {name: shard.value.detach()}
        if name in optimizer.averages:
            tensors[AVERAGE + name] = optimizer.averages[name]
        for key, value in optimizer.inner.state.get(shard.value, {}).items():
            tensors[f"optimizer/{name}/{key}"] = value
        for full, tensor in tensors.items():
            if tensor.dim() == 0:  # the step count, the same for all of a parameter
                corner = any(not any(held.offsets) for held in found[name])
                found[full] = [Held((), (), tensor)] if corner else []
            else:
                found[full] = list(_boxes(place, model, shard, tensor))
    for name, buffer in model.named_buffers():
        place = model.placements[name]
        owner = not model.groups.group(place.replicas).index
        found[name] = [Held(place.shape, (0,) * len(place.shape), buffer)] if owner else []
    return found


class _SavePlanner(DefaultSavePlanner):
    def __init__(self, held: Holdings) -> None:
        super().__init__(flatten_state_dict=False)
        self.held = held

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, boxes in self.held.items():
            for number, held in enumerate(boxes):
                data = TensorWriteData(
                    held.chunk, TensorProperties.create_from_tensor(held.tensor), torch.Size(held.shape)
                )
                index = MetadataIndex(name, held.chunk.offsets, number)
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return _held_at(self.held, write_item.index).tensor


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self, held: Holdings, folder: Path) -> None:
        super().__init__(flatten_state_dict=False)
        self.held, self.folder = held, folder

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, boxes in self.held.items():
            known = self.metadata.state_dict_metadata.get(name)
            if boxes and not isinstance(known, TensorStorageMetadata):
                raise FormatError(f"{self.folder}: tensor {name!r} is missing")
            for held in boxes:
                assert isinstance(known, TensorStorageMetadata)
                if tuple(known.size) != held.shape:
                    raise FormatError(
                        f"{self.folder}: tensor {name!r} has shape {tuple(known.size)}, want {held.shape}"
                    )
                found = create_read_items_for_chunk_list(name, known, [held.chunk])
                if sum(item.lengths.numel() for item in found) != held.tensor.numel():
                    raise FormatError(f"{self.folder}: the pieces of tensor {name!r} do not cover it")
                # The helper counts destinations from the box; the name of the box is where it begins.
                items += [replace(i, dest_index=MetadataIndex(name, held.chunk.offsets)) for i in found]
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        target = _held_at(self.held, read_item.dest_index).tensor
        return target[tuple(slice(o, o + n) for o, n in zip(read_item.dest_offsets, read_item.lengths))]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


def _held_at(held: Holdings, index: MetadataIndex) -> Held:
    offset = index.offset or torch.Size()
    return next(h for h in held[index.fqn] if h.offsets == tuple(offset))


class _Writer(StorageWriter):
    """One safetensors file a rank."""

    def __init__(self, folder: Path, rank: int, ranks: int) -> None:
        self.folder, self.rank, self.ranks = folder, rank, ranks

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: Future[list[WriteResult]] = Future()
        pieces, written = [], []
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, torch.Tensor) and item.tensor_data is not None
            pieces.append((item.index.fqn, item.tensor_data.chunk.offsets, item.tensor_data.size, tensor))
            written.append(WriteResult(item.index, tensor.nbytes, None))
        with open(write_pieces(self.folder, self.rank, self.ranks, pieces), "rb") as opened:
            os.fsync(opened.fileno())
        results.set_result(written)
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class _Reader(StorageReader):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pieces: dict[tuple[str, tuple[int, ...]], Piece] = {}
        self.files: PieceFolder | None = None
        self.problem: FormatError | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self) -> Metadata:  # type: ignore[override]
        try:
            self.files = PieceFolder(self.folder)
        except FormatError as error:
            # From here, dcp would take an error for a checkpoint of another kind (and with **kwargs ask once more); in
            # the next call the ranks tell each other.
            self.problem = error
            return Metadata({}, storage_meta=StorageMeta())
        self.pieces = {(p.name, p.offsets): p for pieces in self.files.pieces.values() for p in pieces}
        known: dict[str, Any] = {}
        for name, pieces in self.files.pieces.items():
            chunks = [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p in pieces]
            properties = TensorProperties(dtype=_DTYPES.get(pieces[0].dtype, torch.float32))
            known[name] = TensorStorageMetadata(properties, torch.Size(pieces[0].shape), chunks)
        return Metadata(known, storage_meta=StorageMeta())

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if self.problem is not None:
            raise self.problem

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        assert self.files is not None
        for item in plan.items:
            piece = self.pieces[item.storage_index.fqn, tuple(item.storage_index.offset or ())]
            planner.resolve_tensor(item).copy_(self.files.read_piece(piece, item.storage_offsets, item.lengths))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def save_pieces(folder: Path, model: FoldedLM, optimizer: DistributedOptimizer) -> None:
    """Write this rank's holdings into a folder that exists; every rank calls it.

    Raises:
        OSError: on every rank, when one could not write; the message says which and why.
    """
    held, groups = holdings(model, optimizer), model.groups
    writer = _Writer(folder, groups.rank, groups.mesh.world_size)
    try:
        with waiting("the writing of a checkpoint"):
            dcp.save({}, storage_writer=writer, planner=_SavePlanner(held), no_dist=not dist.is_initialized())
    except dcp.api.CheckpointException as error:
        raise OSError(f"{folder}: the checkpoint was not written: {_cause(error, writer.ranks)}") from None


def load_pieces(folder: Path, model: FoldedLM, optimizer: DistributedOptimizer) -> None:
    """Bring weights, optimizer state, averages and router biases back, from any mesh's files; every rank calls it.

    Raises:
        FormatError: on every rank; a file is missing or broken, a tensor is missing, misshapen, or not covered by its
            pieces. Weights and optimizer are as they were.
    """
    _make_state(optimizer)
    held = holdings(model, optimizer)
    for name, shard in optimizer.shards.items():  # every owner needs the step count, not only the one that writes it
        state = optimizer.inner.state[shard.value]
        if "step" in state:
            held[f"optimizer/{name}/step"] = [Held((), (), state["step"])]
    for name, buffer in model.named_buffers():
        shape = model.placements[name].shape
        held[name] = [Held(shape, (0,) * len(shape), buffer)]
    reader = _Reader(folder)
    try:
        with waiting("the reading of a checkpoint"):
            dcp.load({}, storage_reader=reader, planner=_LoadPlanner(held, folder), no_dist=not dist.is_initialized())
    except dcp.api.CheckpointException as error:
        raise FormatError(_cause(error, model.groups.mesh.world_size)) from None
    optimizer.publish()
    model.share_head()


def _make_state(optimizer: DistributedOptimizer) -> None:
    """Let the inner optimizer make its state, as its first step would, without changing any value."""
    for shard in optimizer.shards.values():
        if not optimizer.inner.state.get(shard.value):
            zeros = torch.zeros_like(shard.value)
            step = torch.zeros((), dtype=torch.float32)
            optimizer.inner.state[shard.value] = {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}


def _cause(error: Any, ranks: int) -> str:
    """What the first rank that failed says, one line; with its number where the others say something else."""
    said = {rank: " ".join(str(wrapped[0]).split()) for rank, wrapped in sorted(error.failures.items())}
    first = min(said)
    alike = len(said) == ranks and len(set(said.values())) == 1
    return said[first] if alike else f"rank {first}: {said[first]}"
