"""Tensors in pieces: any box of any tensor from the files of any number of ranks, and what is wrong with a folder."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from foldscan.models import FormatError
from foldscan.models.pieces import PieceFolder, rank_file, save_tensors, write_pieces
from safetensors.torch import load_file, save_file

RANKS = 4
Entry = tuple[str, Sequence[int], Sequence[int], torch.Tensor]


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "matrix": torch.randn(13, 7, generator=generator),
        "experts": torch.randn(5, 3, 11, generator=generator, dtype=torch.float64).bfloat16(),
        "vector": torch.arange(17),
        "step": torch.tensor(4.0),
        "empty": torch.zeros(0, 3),
    }


def cut(whole: torch.Tensor, chance: random.Random) -> list[tuple[list[int], torch.Tensor]]:
    """Cut at random places along random dimensions."""
    boxes = [([0] * whole.dim(), whole)]
    for _ in range(5):
        offsets, box = boxes.pop(chance.randrange(len(boxes)))
        dims = [d for d in range(box.dim()) if box.shape[d] > 1]
        if not dims:
            boxes.append((offsets, box))
            continue
        dim = chance.choice(dims)
        at = chance.randrange(1, box.shape[dim])
        after = [*offsets]
        after[dim] += at
        boxes += [(offsets, box.narrow(dim, 0, at)), (after, box.narrow(dim, at, box.shape[dim] - at))]
    return boxes


def write(folder: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """The tensors, their pieces dealt out to the ranks but the last, which has none."""
    chance, whole = random.Random(seed), tensors()
    entries: list[list[Entry]] = [[] for _ in range(RANKS)]
    for name, tensor in whole.items():
        for offsets, box in cut(tensor, chance):
            entries[chance.randrange(RANKS - 1)].append((name, offsets, tensor.shape, box))
    for rank, own in enumerate(entries):
        assert write_pieces(folder, rank, RANKS, own) == rank_file(folder, rank)
    return whole


@pytest.mark.parametrize("seed", range(4))
def test_pieces_make_the_whole(tmp_path: Path, seed: int) -> None:
    whole = write(tmp_path, seed)
    folder = PieceFolder(tmp_path)
    assert folder.pieces.keys() == whole.keys()
    for name, tensor in whole.items():
        got = folder.read(name)
        assert folder.shape(name) == tuple(tensor.shape)
        assert got.dtype == tensor.dtype and torch.equal(got, tensor)
        for piece in folder.pieces[name]:
            inside = [max(0, size - 2) for size in piece.sizes]
            box = folder.read_piece(piece, inside, [s - o for s, o in zip(piece.sizes, inside)])
            at = [o + i for o, i in zip(piece.offsets, inside)]
            assert torch.equal(box, tensor[tuple(slice(a, a + n) for a, n in zip(at, box.shape))])
    assert folder.where("matrix").parent == tmp_path and folder.where("no such") == tmp_path


def test_whole_tensors_read_the_same_way(tmp_path: Path) -> None:
    save_tensors(tmp_path / "model.safetensors", tensors())
    folder = PieceFolder(tmp_path)
    assert all(torch.equal(folder.read(name), tensor) for name, tensor in tensors().items())
    assert len(folder.pieces) == len(tensors())


def test_a_file_is_opened_once_for_all_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from foldscan.models import pieces

    whole = write(tmp_path)
    folder, opened, really = PieceFolder(tmp_path), [], pieces.safe_open

    def count(file: Path, **options: str) -> object:
        opened.append(file)
        return really(file, **options)

    monkeypatch.setattr(pieces, "safe_open", count)
    for name in [*whole, *whole]:
        folder.read(name)
    assert sorted(opened) == [rank_file(tmp_path, rank) for rank in range(RANKS - 1)]


def rewrite(change: Callable[[dict[str, dict[str, object]]], None]) -> Callable[[Path], None]:
    """Change what the first file's header says of its pieces."""

    def damage(folder: Path) -> None:
        from safetensors import safe_open

        file = rank_file(folder, 0)
        with safe_open(file, framework="pt") as opened:
            metadata = dict(opened.metadata())
        header = json.loads(metadata["pieces"])
        change(header)
        save_file(load_file(file), file, metadata={**metadata, "pieces": json.dumps(header)})

    return damage


def only(header: dict[str, dict[str, object]], field: str, value: object) -> None:
    header[next(key for key in header if header[key]["name"] == "matrix")][field] = value


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: [file.unlink() for file in f.iterdir()], "holds no safetensors files"),
        (lambda f: rank_file(f, 2).unlink(), r"rank_00002\.safetensors: no such file, but rank_00000.* one of 4"),
        (lambda f: rank_file(f, 3).unlink(), r"rank_00003\.safetensors: no such file"),
        (
            lambda f: rank_file(f, 1).write_bytes(rank_file(f, 1).read_bytes()[:-3]),
            r"rank_00001\.safetensors: not a safe",
        ),
        (lambda f: rank_file(f, 1).write_bytes(b""), r"rank_00001\.safetensors: not a safetensors file"),
        (rewrite(lambda h: only(h, "offsets", [9, 9])), r"rank_00000.*'matrix.*is no piece of one of shape \(13, 7\)"),
        (rewrite(lambda h: only(h, "offsets", [-1, 0])), r"rank_00000.*'matrix.*is no piece"),
        (rewrite(lambda h: only(h, "offsets", [0])), r"rank_00000.*'matrix.*is no piece"),
        (rewrite(lambda h: only(h, "offsets", "x")), r"rank_00000.*(is no piece|does not describe)"),
        (rewrite(lambda h: only(h, "offsets", None)), r"rank_00000.*does not describe the tensors"),
        (rewrite(lambda h: only(h, "shape", [99, 7])), r"tensor 'matrix' is a piece of shape .*99, 7"),
        (
            lambda f: save_file({"a": torch.zeros(2)}, rank_file(f, 0), metadata={"pieces": "{"}),
            "header field 'pieces' does not describe",
        ),
        (
            lambda f: save_file({"a": torch.zeros(2)}, rank_file(f, 0), metadata={"ranks": "many"}),
            "rank_00000.*does not describe",
        ),
    ],
)
def test_a_broken_folder_is_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    write(tmp_path)
    damage(tmp_path)
    with pytest.raises(FormatError, match=message):
        PieceFolder(tmp_path)


def test_a_tensor_with_a_hole_is_refused(tmp_path: Path) -> None:
    matrix = tensors()["matrix"]
    write_pieces(tmp_path, 0, 1, [("matrix", (0, 0), (13, 7), matrix[:5]), ("matrix", (6, 0), (13, 7), matrix[6:])])
    with pytest.raises(FormatError, match="tensor 'matrix' has 84 of its 91 elements"):
        PieceFolder(tmp_path).read("matrix")
    with pytest.raises(FormatError, match="tensor 'other' is missing"):
        PieceFolder(tmp_path).read("other")


def test_a_file_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"gone/model\.safetensors"):
        save_tensors(tmp_path / "gone" / "model.safetensors", tensors())
