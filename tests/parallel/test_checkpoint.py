"""Checkpoints go from any mesh to any other, and to one process and back, bit for bit; all ranks refuse broken ones."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from folding import CONFIG, TOLERANCE, WORLD, batches
from foldscan.models import FormatError, HybridConfig, HybridLM, load_pretrained
from foldscan.models.files import write_json
from foldscan.models.layouts import Native
from foldscan.models.pieces import PieceFolder, rank_file
from foldscan.parallel import checkpoint
from foldscan.parallel.config import ParallelConfig
from foldscan.parallel.engine import MeshEngine
from foldscan.parallel.world import World
from foldscan.training import TrainConfig
from foldscan.training.engine import Engine, LocalEngine
from safetensors.torch import load_file

# None is one process. Every kind of division follows another, and each ends in a file layout of its own.
MESHES: list[dict[str, Any] | None] = [
    {"tp": 2, "pp": 2},
    {"ep": 4, "etp": 2},
    {"pp": 4, "stages_per_rank": 2},
    None,
    {"tp": 2, "cp": 2, "ep": 8},
    {"tp": 8, "etp": 8},
    {"tp": 2, "cp": 2, "pp": 2, "etp": 4, "order": "tp-cp-pp-ep-dp"},
    None,
    {},
]
RATE = 1e-3
Whole = dict[str, torch.Tensor]


def model_of(dtype: torch.dtype) -> HybridConfig:
    """A tied head in one of the two chains."""
    return dataclasses.replace(CONFIG, tie_embeddings=dtype == torch.float64)


def engine_of(division: dict[str, Any] | None, model: HybridConfig, seed: int, ema: float = 0.9) -> Engine:
    """With weights of its own: whatever equals a checkpoint later was read from it."""
    config = TrainConfig(
        model=model,
        run_dir="none",
        train_data="none",
        tokenizer="none",
        adam_eps=1e-3,  # Adam's first updates are the gradient's sign, uncertain where that is rounding noise
        clip_norm=0.5,
        precision="fp32",
        accumulation=len(batches()),
        ema_decay=ema,
        parallel=ParallelConfig(**(division or {}), timeout=60),
    )
    torch.manual_seed(seed)
    whole = HybridLM(model)
    if division is None:
        return LocalEngine(whole, config)
    return MeshEngine(whole, config, World(dist.get_rank(), WORLD))


def read(folder: Path) -> Whole:
    files = PieceFolder(folder)
    return {name: files.read(name) for name in files.pieces}


def in_memory(engine: Engine) -> dict[str, tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]]:
    """Everything with a state that this rank has: the tensor, and what it should be of the whole one."""
    found: dict[str, tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]] = {}
    model, optimizer = engine._model, engine._optimizer  # type: ignore[attr-defined]
    if isinstance(engine, LocalEngine):
        found = {name: (tensor, lambda whole: whole) for name, tensor in model.state_dict().items()}
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state[parameter].items():
                found[f"optimizer/{name}/{key}"] = (value, lambda whole: whole)
            found[f"ema/{name}"] = (engine._averages[name], lambda whole: whole)
        return found
    mesh, rank = model.groups.mesh, model.groups.rank
    for name, tensor in model.state_dict().items():
        found[name] = (tensor, lambda whole, place=model.placements[name]: place.take(whole, mesh, rank))
    for name, shard in optimizer.shards.items():

        def own(whole: torch.Tensor, name: str = name, shard: Any = shard) -> torch.Tensor:
            if not whole.dim():
                return whole
            return model.placements[name].take(whole, mesh, rank).narrow(shard.dim, shard.start, len_of(shard))

        def len_of(shard: Any) -> int:
            return int(shard.value.shape[shard.dim])

        found[f"owned {name}"] = (shard.value.detach(), own)
        found[f"ema/{name}"] = (optimizer.averages[name], own)
        for key, value in optimizer.inner.state[shard.value].items():
            found[f"optimizer/{name}/{key}"] = (value, own)
    if model.has_last and model.config.tie_embeddings:
        place = model.placements["embeddings.weight"]
        found["head of embeddings.weight"] = (model.head_weight, lambda whole: place.take(whole, mesh, rank))
    return found


def assert_holds(engine: Engine, whole: Whole, where: str) -> None:
    found = in_memory(engine)
    assert any(name.startswith("optimizer/") for name in found) and any(name.startswith("ema/") for name in found)
    for name, (tensor, part) in found.items():
        assert torch.equal(tensor, part(whole[name.split(" ")[-1]])), f"{where}: {name}"


def names_of(model: HybridConfig) -> set[str]:
    """What a checkpoint should have: nothing less and nothing more."""
    lm = HybridLM(model, init=False)
    names = set(lm.state_dict())
    for name, _ in lm.named_parameters():
        names |= {f"ema/{name}", *(f"optimizer/{name}/{key}" for key in ("step", "exp_avg", "exp_avg_sq"))}
    return names


def every(division: dict[str, Any] | None) -> bool:
    """Whether this rank takes part."""
    return division is not None or dist.get_rank() == 0


def chain(root: Path, dtype: torch.dtype) -> None:
    """A step on each mesh (five of them in fp32), from the checkpoint of the one before; the same in one process."""
    model, before = model_of(dtype), None
    for number, division in enumerate(MESHES if dtype == torch.float64 else MESHES[:5]):
        folder = root / f"{number}"
        if dist.get_rank() == 0:
            folder.mkdir(parents=True)
        dist.barrier()
        if every(division):
            # Only the first has the weights that the reference begins with.
            engine = engine_of(division, model, seed=number)
            if before is not None:
                engine.load(before)
                assert_holds(engine, read(before), f"{MESHES[number - 1]} -> {division}")
                copy = root / f"{number} again"
                if dist.get_rank() == 0:
                    copy.mkdir()
                if division is not None:
                    dist.barrier()
                engine.save(copy)
                again, earlier = read(copy), read(before)
                assert again.keys() == earlier.keys()
                assert all(torch.equal(again[name], tensor) for name, tensor in earlier.items())
            engine.step(batches(), RATE)
            engine.save(folder)
            whole = read(folder)
            assert whole.keys() == names_of(model)
            assert_holds(engine, whole, f"{division} in memory")
            assert {file.suffix for file in folder.iterdir()} == {".safetensors"}
        dist.barrier()
        before = folder
    if dist.get_rank():
        return
    # Rounding grows with the steps: all of them in fp64, four in fp32.
    steps = len(MESHES) if dtype == torch.float64 else 4
    reference = engine_of(None, model, seed=0)
    assert isinstance(reference, LocalEngine)
    for _ in range(steps):
        reference.step(batches(), RATE)
    (root / "reference").mkdir()
    reference.save(root / "reference")
    want, got = read(root / "reference"), read(root / f"{steps - 1}")
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        error = float((got[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-30))
        # The tolerance is that of one gradient; fp32 moments hold four, whose points have drifted, and their squares.
        drift = 4 if name.startswith("optimizer/") and dtype == torch.float32 else 1
        assert error <= TOLERANCE[dtype] * drift, f"{name}: {error:.1e}"
    weight = "layers.1.mixer.gate.weight"
    assert float((want[weight] - want[f"ema/{weight}"]).abs().max()) > 1e-4  # an average, and not the weights again


def a_mesh_folder_is_a_model(root: Path) -> None:
    """`load_pretrained` of the folders of both kinds of engine."""
    if dist.get_rank():
        return
    model = model_of(torch.float32)
    for number in (2, 3):
        folder = root / f"{number}"
        write_json(folder / "config.json", Native().write_config(model))
        whole = read(folder)
        for average in (False, True):
            state = load_pretrained(folder, average=average).state_dict()
            parameters = {name for name, _ in HybridLM(model, init=False).named_parameters()}
            for name, tensor in state.items():
                source = f"ema/{name}" if average and name in parameters else name
                assert torch.equal(tensor, whole[source]), (number, source)


def unlink(folder: Path) -> None:
    rank_file(folder, 3).unlink()


def truncate(folder: Path) -> None:
    file = rank_file(folder, 3)
    file.write_bytes(file.read_bytes()[:-1])


def wrong_header(folder: Path) -> None:
    file = rank_file(folder, 3)
    content = file.read_bytes()
    at = content.index(b'\\"offsets\\": [')
    file.write_bytes(content[:at] + content[at:].replace(b'"offsets\\"', b'"offzets\\"', 1))


def rename_tensor(folder: Path) -> None:
    for rank in range(WORLD):
        file = rank_file(folder, rank)
        file.write_bytes(file.read_bytes().replace(b"norm_f.weight", b"norm_g.weight"))


def another_model(folder: Path, **changes: Any) -> None:
    for file in folder.iterdir():
        file.unlink()
    engine = engine_of(None, dataclasses.replace(CONFIG, **changes), 0)
    engine.step(batches(), RATE)
    engine.save(folder)


DAMAGES: list[tuple[Callable[[Path], None], str, str]] = [
    (unlink, "rank_00003.safetensors", "no such file"),
    (truncate, "rank_00003.safetensors", "not a safetensors file"),
    (wrong_header, "rank_00003.safetensors", "does not describe the tensors"),
    (rename_tensor, "damaged", "tensor 'norm_f.weight' is missing"),
    (lambda f: another_model(f, vocab_size=71), "damaged", "tensor 'embeddings.weight' has shape (71, 16), want"),
    (lambda f: another_model(f, pattern="ME*E-M"), "damaged", "is missing"),
]


def broken_folders(root: Path) -> None:
    """Each is refused by every rank with the same words, and nothing has changed."""
    engine = engine_of({"tp": 2, "cp": 2, "ep": 4}, model_of(torch.float32), seed=5)
    engine.step(batches(), RATE)
    before = {name: tensor.clone() for name, (tensor, _) in in_memory(engine).items()}
    folder = root / "damaged"
    for damage, place, words in DAMAGES:
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(root / "2", folder)
            (folder / "config.json").unlink(missing_ok=True)
            damage(folder)
        dist.barrier()
        with pytest.raises(FormatError) as refused:
            engine.load(folder)
        text = str(refused.value)
        assert place in text and words in text and "\n" not in text, text
        said: list[str | None] = [None] * WORLD
        dist.all_gather_object(said, text)
        if not words.endswith("is missing"):  # there ranks of one part of the model may miss another tensor
            assert len(set(said)) == 1, said
        for name, (tensor, _) in in_memory(engine).items():
            assert torch.equal(tensor, before[name]), (words, name)
    engine.load(root / "2")  # and goes on from a good one
    assert_holds(engine, read(root / "2"), "after the broken ones")


def one_rank_fails(root: Path) -> None:
    """What one rank cannot read or write, all refuse, with its number; the others do not wait."""
    engine = engine_of({"ep": 8}, model_of(torch.float32), seed=6)
    engine.step(batches(), RATE)
    rank = dist.get_rank()

    def broken(*args: Any) -> Any:
        if rank == 5:
            raise FormatError("this file: not here")
        return PieceFolder(*args)

    def full(*args: Any) -> Any:
        if rank == 6:
            raise OSError(28, "No space left on device", "that file")
        return writes(*args)

    writes, folder = checkpoint.write_pieces, root / "half"
    if rank == 0:
        folder.mkdir()
    with mock.patch.object(checkpoint, "PieceFolder", broken), pytest.raises(FormatError, match=r"^rank 5: this file"):
        engine.load(root / "2")
    with mock.patch.object(checkpoint, "write_pieces", full), pytest.raises(OSError, match=r"rank 6: .*No space left"):
        engine.save(folder)
    with pytest.raises(ValueError, match=f"^rank 2 of {WORLD}: only here"):
        World(rank, WORLD).everyone(lambda: _only_on(rank, 2))
    with pytest.raises(OSError, match=r"^everywhere$"):
        World(rank, WORLD).everyone(_everywhere)
    assert World(rank, WORLD).everyone(lambda: rank) == rank


def _only_on(rank: int, failing: int) -> None:
    if rank == failing:
        raise ValueError("only here")


def _everywhere() -> None:
    raise FileNotFoundError("everywhere")


def without_averages(root: Path) -> None:
    """A run that wants averages does not take up one that has none; one that wants none takes up any."""
    model, folder = model_of(torch.float32), root / "no averages"
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    plain = engine_of({"tp": 2}, model, seed=8, ema=0.0)
    plain.load(root / "2")
    plain.save(folder)
    assert not [name for name in read(folder) if name.startswith("ema/")]
    averaging = engine_of({"ep": 2}, model, seed=8)
    with pytest.raises(FormatError, match=r"tensor 'ema/.*' is missing"):
        averaging.load(folder)
    if dist.get_rank() == 0:
        local = engine_of(None, model, seed=8)
        with pytest.raises(FormatError, match=r"tensor 'ema/.*' is missing"):
            local.load(folder)
        write_json(folder / "config.json", Native().write_config(model))
        with pytest.raises(FormatError, match=r"tensor 'ema/.*' is missing: was it trained with an ema_decay"):
            load_pretrained(folder, average=True)
    dist.barrier()


def no_pickle(*args: Any, **options: Any) -> Any:
    raise AssertionError("a checkpoint was unpickled")


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    with mock.patch.object(pickle, "load", no_pickle), mock.patch.object(torch, "load", no_pickle):
        for dtype in (torch.float64, torch.float32):
            torch.set_default_dtype(dtype)
            chain(Path(folder) / str(dtype), dtype)
        root = Path(folder) / str(torch.float32)
        a_mesh_folder_is_a_model(root)
        dist.barrier()
        broken_folders(root)
        one_rank_fails(root)
        without_averages(root)
    dist.destroy_process_group()


def test_checkpoints_across_meshes(tmp_path: Path) -> None:
    mp.start_processes(worker, (str(tmp_path),), WORLD, start_method="spawn")
    root = tmp_path / str(torch.float32)
    assert len(list((root / "0").glob("rank_*.safetensors"))) == WORLD
    # Every element is written once: the sizes of the files' tensors add up to those of a single process's.
    size = {d: sum(t.nbytes for f in (root / d).glob("*.safetensors") for t in load_file(f).values()) for d in "0234"}
    assert len(set(size.values())) == 1


def test_averages_are_of_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="average"):
        load_pretrained(tmp_path / "model.gguf", average=True)
