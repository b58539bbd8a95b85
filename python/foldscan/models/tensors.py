"""Reading and writing named tensors as safetensors, whole or sharded. Nothing here can run code from a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from foldscan.models.files import FormatError, read_json, want_field, write_json
from foldscan.models.pieces import PieceFolder, save_tensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class TensorFolder:
    """The tensors of a model directory, by name: ``model.safetensors``, the shards that its index lists, or the pieces
    that the ranks of a mesh wrote.

    Raises:
        FormatError: no such file, a broken shard, an index that names a missing shard or tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        self._pieces: PieceFolder | None = None
        if (folder / INDEX).is_file():
            index = read_json(folder / INDEX)
            for name, shard in want_field(index, "weight_map", dict, folder / INDEX).items():
                if not isinstance(shard, str) or Path(shard).name != shard:
                    raise FormatError(f"{folder / INDEX}: field 'weight_map[{name}]' is {shard!r}, want a file name")
                self._file_of[name] = folder / shard
            for file in sorted(set(self._file_of.values())):
                missing = {n for n, f in self._file_of.items() if f == file} - set(self._names_in(file))
                if missing:
                    raise FormatError(f"{file}: tensor {min(missing)!r} is missing, though the index lists it")
        elif (folder / WEIGHTS).is_file():
            self._file_of = dict.fromkeys(self._names_in(folder / WEIGHTS), folder / WEIGHTS)
        elif any(folder.glob("rank_*.safetensors")):
            self._pieces = PieceFolder(folder)
            # What else is in a training checkpoint has a kind before its name.
            self._file_of = {n: self._pieces.where(n) for n in self._pieces.pieces if "/" not in n}
        else:
            raise FormatError(f"{folder}: neither {WEIGHTS} nor {INDEX} is there")

    @staticmethod
    def _names_in(file: Path) -> list[str]:
        try:
            with safe_open(file, framework="pt") as shard:
                return list(shard.keys())
        except FileNotFoundError:
            raise FormatError(f"{file}: no such file") from None
        except SafetensorError as error:
            raise FormatError(f"{file}: not a safetensors file ({error})") from None

    def names(self) -> Iterable[str]:
        return self._file_of.keys()

    def where(self, name: str) -> Path:
        """The file that holds (or should hold) a tensor."""
        return self._file_of.get(name, self.folder / (INDEX if (self.folder / INDEX).is_file() else WEIGHTS))

    def get(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        if self._pieces is not None:
            return self._pieces.read(name)
        try:
            with safe_open(self._file_of[name], framework="pt") as shard:
                return shard.get_tensor(name)
        except SafetensorError as error:
            raise FormatError(f"{self._file_of[name]}: tensor {name!r}: {error}") from None


def read_tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors and the metadata of one safetensors file.

    Raises:
        FormatError: missing or broken.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, dict(opened.metadata() or {})  # noqa: SIM118
    except FileNotFoundError:
        raise FormatError(f"{file}: no such file") from None
    except SafetensorError as error:
        raise FormatError(f"{file}: not a safetensors file ({error})") from None


def write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], *, max_shard_bytes: int = 4 << 30) -> None:
    """Write ``model.safetensors``, or numbered shards and their index when the whole is larger than one shard.

    Raises:
        OSError: they could not be written.
    """
    shards: list[dict[str, torch.Tensor]] = [{}]
    held = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and held + size > max_shard_bytes:
            shards.append({})
            held = 0
        # A view of a larger storage would be refused, and a tied tensor must be written by its own name.
        shards[-1][name] = tensor.detach().to("cpu").contiguous().clone()
        held += size
    if len(shards) == 1:
        save_tensors(folder / WEIGHTS, shards[0], {"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_tensors(folder / file, shard, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
