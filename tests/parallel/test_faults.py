"""Ranks that are killed or stall, disks that fill: the job ends and says why, and a resumed run has the same bits."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torchrun
from foldscan.training.checkpoint import checkpoints

TIMEOUT = 30  # of a collective, in seconds; a loaded machine needs as much to start
MESH = ["--tp", "2", "--ep", "4", "--set", f"parallel.timeout={TIMEOUT}"]
PROGRAM = str(Path(__file__).with_name("faulty.py"))
# Two microbatches a step on each rank, a checkpoint after three steps: the eighth is the second of step 3 (from 0).
CALL, STEP = 8, 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return torchrun.write_data(tmp_path_factory.mktemp("data"))


def train(config: Path, *arguments: str) -> list[str]:
    return ["--threads", "1", "train", "--config", str(config), "--json", *arguments]


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    done = torchrun.run(train(torchrun.write_config(data, run_dir), *MESH))
    assert done.returncode == 0, done.stderr[-3000:]
    return run_dir


def faulty(
    fault: str, rank: int, call: int, data: Path, run_dir: Path, *, restarts: int = 0, arguments: list[str] = MESH
) -> subprocess.CompletedProcess[str]:
    """A run with a fault, which did happen."""
    mark = run_dir.with_suffix(".mark")
    config = torchrun.write_config(data, run_dir)
    planted = [fault, str(rank), str(call), str(mark), *train(config, *arguments)]
    done = torchrun.run(planted, program=PROGRAM, restarts=restarts)
    assert mark.exists()
    return done


def leftovers(run_dir: Path) -> list[str]:
    return [path.name for path in (run_dir / "checkpoints").iterdir() if path.name.startswith(".")]


def resume(run_dir: Path) -> None:
    done = torchrun.run(train(run_dir.with_suffix(".yaml"), *MESH, "--resume"))
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_killed_rank_ends_the_job(data: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    done = faulty("kill in a step", 2, CALL, data, tmp_path / "run")
    assert done.returncode != 0 and time.monotonic() - started < 2 * TIMEOUT
    said = torchrun.told(done)
    assert 1 <= len(said) <= torchrun.RANKS - 1  # a line from each survivor that torchrun lets speak
    waited = rf"foldscan: error: rank [013] of 4: step {STEP}: in \w+ over [\w-]+, one of the ranks \[.*\] is gone"
    assert any(re.match(waited, line) for line in said), said
    # The one that shares a group with the dead rank says which it is.
    assert any("2" in re.findall(r"ranks \[(.*?)\]", line)[0].split(", ") for line in said), said
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_00000003"]


def test_a_restarted_run_has_the_same_bits(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    done = faulty("kill in a step", 3, CALL, data, tmp_path / "run", restarts=1)
    assert done.returncode == 0, done.stderr[-3000:]
    torchrun.assert_same_bits(tmp_path / "run", undisturbed)
    assert leftovers(tmp_path / "run") == []
    # A backend's thread that outlives its process group may abort a rank that is done.
    assert done.stderr.count("threads at the end: 1\n") >= torchrun.RANKS, done.stderr[-3000:]


def test_what_one_rank_cannot_read_ends_all(data: Path, tmp_path: Path) -> None:
    """At the start, when all are asked, one tells for all."""
    done = faulty("no data at first", 2, 1, data, tmp_path / "run")
    assert done.returncode != 0
    (line,) = torchrun.told(done)
    assert re.match(r"foldscan: error: rank 2 of 4: .*Input/output error.*train\.tokens", line), line


def test_an_error_of_all_is_told_once(data: Path, tmp_path: Path) -> None:
    config = torchrun.write_config(data, tmp_path / "run")
    done = torchrun.run(train(config, "--tp", "4"))
    assert done.returncode != 0
    (line,) = torchrun.told(done)
    assert line == "foldscan: error: tp: got 4, want a divisor of mamba_num_groups = 2"


@pytest.mark.slow
def test_what_one_rank_cannot_read_later_names_it(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    done = faulty("no data later", 1, 4 * STEP + 2, data, tmp_path / "run")
    assert done.returncode != 0
    said = torchrun.told(done)
    assert len(said) <= torchrun.RANKS
    assert any(re.match(rf"foldscan: error: rank 1 of 4: step {STEP}: .*train\.tokens", line) for line in said), said
    resume(tmp_path / "run")
    torchrun.assert_same_bits(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_stalled_rank_ends_the_job(data: Path, tmp_path: Path) -> None:
    """Within the timeout of a collective and the 30 seconds that torchrun gives a process to leave."""
    started = time.monotonic()
    done = faulty("stall in a step", 1, CALL, data, tmp_path / "run")
    assert done.returncode != 0 and TIMEOUT < time.monotonic() - started < 2 * TIMEOUT + 30
    said = torchrun.told(done)
    waited = rf"foldscan: error: rank [023] of 4: step {STEP}: in .*, one of the ranks \[.*\] did not come in time"
    assert any(re.match(waited, line) for line in said), said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "rank", "call"),
    [("kill in a file", 2, 2), ("kill in a file", 0, 2), ("kill before the name", 0, 3)],
)
def test_a_checkpoint_cut_short_is_none(
    data: Path, undisturbed: Path, tmp_path: Path, fault: str, rank: int, call: int
) -> None:
    """The first checkpoint stays; what there is of the second never has its name, and goes when the run is resumed."""
    run_dir = tmp_path / "run"
    done = faulty(fault, rank, call, data, run_dir)
    assert done.returncode != 0
    said = torchrun.told(done)
    assert all(re.match(r"foldscan: error: rank \d of 4: step 5: waiting for .* is gone", line) for line in said), said
    assert [path.name for path in checkpoints(run_dir)] == ["step_00000003"]
    (run_dir / "checkpoints" / ".step_00000006.tmp").mkdir(exist_ok=True)  # a survivor may have removed it
    (run_dir / "checkpoints" / ".step_00000001.removed").mkdir()
    resume(run_dir)
    torchrun.assert_same_bits(run_dir, undisturbed)
    assert leftovers(run_dir) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("ranks", [1, pytest.param(torchrun.RANKS, marks=pytest.mark.slow)])
def test_a_full_disk_loses_nothing(data: Path, small_disk: Path, tmp_path: Path, ranks: int) -> None:
    run_dir = small_disk / "run"
    config = torchrun.write_config(data, run_dir, schedule="constant")
    first = torchrun.run(train(config, *MESH, "--set", "steps=3"), ranks=ranks)
    assert first.returncode == 0, first.stderr[-3000:]
    (before,) = checkpoints(run_dir)
    content = {file.name: file.read_bytes() for file in before.iterdir()}
    filler = small_disk / "filler"
    room = 96 << 10  # for the log and the config, not for a checkpoint
    with open(filler, "wb") as file:
        stat = subprocess.run(
            ["stat", "-f", "-c", "%a %S", str(small_disk)], capture_output=True, text=True, check=True
        )
        blocks, size = map(int, stat.stdout.split())
        file.write(bytes(blocks * size - room))
    full = torchrun.run(train(config, *MESH, "--resume"), ranks=ranks)
    assert full.returncode != 0
    (line,) = torchrun.told(full)
    assert "No space left on device" in line and "step_00000006" in line, line
    assert "Traceback" not in full.stderr.partition("torch/distributed/elastic")[0]
    assert checkpoints(run_dir) == [before] and leftovers(run_dir) == []
    assert {file.name: file.read_bytes() for file in before.iterdir()} == content
    filler.unlink()
    resumed = torchrun.run(train(config, *MESH, "--resume"), ranks=ranks)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    whole = tmp_path / "whole"
    torchrun.run(train(torchrun.write_config(data, whole, schedule="constant"), *MESH), ranks=ranks)
    torchrun.assert_same_bits(run_dir, whole)
