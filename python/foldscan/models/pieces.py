"""Tensors in pieces: what the ranks of a mesh write of a model, one safetensors file each, to be read back in any way.

A file's header says of each piece where in the whole tensor it begins and how large the whole is, and how many ranks
wrote. Tensors without such an entry are whole, so a folder that one process wrote reads the same way.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from foldscan.models.files import FormatError

_HEADER, _RANKS = "pieces", "ranks"


@dataclass(frozen=True)
class Piece:
    """A box of a tensor in a file: ``offsets`` in the whole of ``shape``, ``sizes``, and the name it has there."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, ...]
    key: str
    file: Path
    dtype: str


def save_tensors(file: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it could not be written; a full disk, for instance.
    """
    try:
        save_file(dict(tensors), file, metadata=dict(metadata or {}))
    except SafetensorError as error:
        raise OSError(f"{file}: {error}") from None


def rank_file(folder: Path, rank: int) -> Path:
    """The file that a rank writes."""
    return folder / f"rank_{rank:05d}.safetensors"


def write_pieces(
    folder: Path, rank: int, ranks: int, pieces: Iterable[tuple[str, Sequence[int], Sequence[int], torch.Tensor]]
) -> Path:
    """Write (name, offsets, shape of the whole, tensor) pieces as the file of one of ``ranks`` ranks.

    Returns:
        The file; a rank without any piece has one too.

    Raises:
        OSError: it could not be written.
    """
    tensors, header = {}, {}
    for name, offsets, shape, tensor in pieces:
        key = f"{name}@{'.'.join(map(str, offsets))}" if any(offsets) or tuple(shape) != tuple(tensor.shape) else name
        tensors[key] = tensor.detach().to("cpu").contiguous().clone()
        header[key] = {"name": name, "offsets": list(offsets), "shape": list(shape)}
    file = rank_file(folder, rank)
    save_tensors(file, tensors, {"format": "pt", _HEADER: json.dumps(header), _RANKS: str(ranks)})
    return file


class PieceFolder:
    """All tensors in the safetensors files of a folder, whole or in pieces.

    Attributes:
        pieces: by the tensor's name.

    Raises:
        FormatError: no such files, a rank's missing or broken, or one whose header does not describe its tensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened: dict[Path, Any] = {}
        self.pieces: dict[str, list[Piece]] = {}
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise FormatError(f"{folder}: holds no safetensors files")
        for file in files:
            ranks, pieces = _pieces_in(file)
            for absent in (rank_file(folder, rank) for rank in range(ranks)):
                if absent not in files:
                    raise FormatError(f"{absent}: no such file, but {file.name} is one of {ranks}")
            for piece in pieces:
                known = self.pieces.setdefault(piece.name, [])
                if known and known[0].shape != piece.shape:
                    raise FormatError(
                        f"{file}: tensor {piece.name!r} is a piece of shape {piece.shape}, but {known[0].file} says "
                        f"{known[0].shape}"
                    )
                known.append(piece)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        if name not in self.pieces:
            raise FormatError(f"{self.folder}: tensor {name!r} is missing")
        return self.pieces[name][0].shape

    def read_piece(self, piece: Piece, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """A box inside of a piece, ``offsets`` counted from the piece's own corner."""
        try:
            if piece.file not in self._opened:  # opening is dearer than reading: a header has an entry for every piece
                self._opened[piece.file] = safe_open(piece.file, framework="pt")
            opened = self._opened[piece.file]
            if not piece.sizes:
                return opened.get_tensor(piece.key)
            return opened.get_slice(piece.key)[tuple(slice(o, o + s) for o, s in zip(offsets, sizes))]
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{piece.file}: tensor {piece.name!r}: {error}") from None

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor.

        Raises:
            FormatError: it is missing, or its pieces do not cover it.
        """
        shape = self.shape(name)
        pieces = self.pieces[name]
        if len(pieces) == 1 and pieces[0].sizes == shape:
            return self.read_piece(pieces[0], (0,) * len(shape), shape)
        first = self.read_piece(pieces[0], (0,) * len(shape), pieces[0].sizes)
        whole, covered = first.new_empty(shape), 0
        for piece in pieces:
            box = tuple(slice(o, o + s) for o, s in zip(piece.offsets, piece.sizes))
            whole[box] = self.read_piece(piece, (0,) * len(shape), piece.sizes)
            covered += prod(piece.sizes)
        if covered != prod(shape):
            raise FormatError(f"{self.folder}: tensor {name!r} has {covered} of its {prod(shape)} elements")
        return whole

    def where(self, name: str) -> Path:
        """A file that holds some of a tensor (or the folder that should)."""
        return self.pieces[name][0].file if name in self.pieces else self.folder


def _pieces_in(file: Path) -> tuple[int, list[Piece]]:
    """How many ranks wrote a folder, 0 where one process did, and the pieces in one of its files."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            header, ranks, found = json.loads(metadata.get(_HEADER, "{}")), int(metadata.get(_RANKS, "0")), []
            for key in opened.keys():  # noqa: SIM118 - not a dictionary
                view = opened.get_slice(key)
                sizes, dtype = tuple(view.get_shape()), str(view.get_dtype())
                entry: dict[str, Any] = header.get(key, {"name": key, "offsets": [0] * len(sizes), "shape": sizes})
                offsets, shape = tuple(entry["offsets"]), tuple(entry["shape"])
                fits = len(offsets) == len(shape) == len(sizes) and all(
                    o >= 0 and o + s <= w for o, s, w in zip(offsets, sizes, shape)
                )
                if not fits:
                    raise FormatError(
                        f"{file}: tensor {key!r} of shape {sizes} at {offsets} is no piece of one of shape {shape}"
                    )
                found.append(Piece(str(entry["name"]), offsets, sizes, shape, key, file, dtype))
            return ranks, found
    except FormatError:
        raise
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{file}: not a safetensors file ({error})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{file}: header field {_HEADER!r} does not describe the tensors ({error})") from None
