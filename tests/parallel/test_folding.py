"""Folding proven: a training step under every legal mapping of 8 ranks equals the single process's.

Output, loss, input gradient, every weight gradient, gradient norm, and every weight and router bias after a clipped
step of AdamW, to 1e-10 in fp64 and 1e-5 in fp32, dropless and with full-sequence dropping.
"""

from __future__ import annotations

import json
from pathlib import Path

import folding
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def worker(rank: int, folder: str, chosen: list[int]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=folding.WORLD)
    references = torch.load(f"{folder}/references.pt", weights_only=False)
    cases, found = folding.cases(), []
    for number in chosen:
        case = cases[number]
        errors = folding.compare(case, references[case.dtype, bool(case.options.capacity_factor)]).found
        everyone: list[dict[str, float]] = [{} for _ in range(folding.WORLD)]
        dist.all_gather_object(everyone, errors)
        merged = {name: max(e.get(name, 0.0) for e in everyone) for e in everyone for name in e}
        found.append(merged)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def check(folder: Path, chosen: list[int]) -> None:
    references = {
        (dtype, dropping): folding.reference(dtype, dropping)
        for dtype in (torch.float64, torch.float32)
        for dropping in (False, True)
    }
    torch.save(references, folder / "references.pt")
    mp.start_processes(worker, (str(folder), chosen), folding.WORLD, start_method="spawn")
    cases, bad = folding.cases(), []
    names = {"token losses", "loss", "norm", "input gradients"}
    names |= {f"gradient {name}" for name in references[torch.float64, False].gradients}
    names |= {f"updated {name}" for name in references[torch.float64, False].updated}
    found = json.loads((folder / "found.json").read_text())
    assert len(found) == len(chosen)
    for number, errors in zip(chosen, found):
        case = cases[number]
        assert set(errors) == names, f"{case}: not compared: {sorted(names - set(errors))}"
        worst = max(errors, key=lambda name: errors[name])
        if not errors[worst] <= folding.TOLERANCE[case.dtype]:
            bad.append(f"{case}: {worst} differs by {errors[worst]:.1e}")
    assert not bad, "\n".join([f"{len(bad)} of {len(chosen)} mappings differ", *bad])


def test_the_cases_are_all_there() -> None:
    """146 legal meshes in one order, 115 in the other; without stages both divide the world alike."""
    assert [len(list(folding.legal_mappings(order))) for order in folding.ORDERS] == [146, 115]
    cases = folding.cases()
    meshes = {str(case.options.mesh(folding.WORLD)) for case in cases}
    assert len(meshes) == len(cases) // 4
    for name in ("dispatcher", "attention", "zigzag", "stages_per_rank", "capacity_factor"):
        assert len({getattr(case.options, name) for case in cases}) > 1, name


def test_every_eleventh_mapping(tmp_path: Path) -> None:
    check(tmp_path, list(range(0, len(folding.cases()), 11)))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_mapping(tmp_path: Path) -> None:
    check(tmp_path, list(range(len(folding.cases()))))
