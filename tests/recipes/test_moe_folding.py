"""The recipe in small: every part runs, what it says is what it measured, and a failed threshold is not hidden."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from rich.console import Console

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "moe_folding"
MODULES = ("run", "planned", "plots", "report", "publish")
RANKS = {"one-process": 1, "unfolded": 4, "folded": 4}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``run.py --smoke`` leaves."""
    folder = tmp_path_factory.mktemp("recipe")
    call(folder)
    return folder


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """run.py as a module."""
    monkeypatch.syspath_prepend(str(RECIPE))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import run

    yield run
    for name in MODULES:
        sys.modules.pop(name, None)


def call(folder: Path) -> str:
    command = [sys.executable, str(RECIPE / "run.py"), "--smoke", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def test_smoke_run_meets_its_thresholds(out: Path) -> None:
    summary = summary_of(out)
    limits = yaml.safe_load((RECIPE / "thresholds.yaml").read_text())
    assert set(summary["thresholds"]) == set(limits) - {"dispatchers"}  # no two runs differ in nothing else
    assert summary["passed"], summary["thresholds"]
    assert [run["ranks"] for run in summary["runs"]] == list(RANKS.values())
    assert summary["runs"][0]["bytes"] == []  # one process sends nothing
    for run in summary["runs"][1:]:
        lines = {line["name"]: line for line in run["bytes"]}
        assert all(line["measured"] == line["counted"] > 0 for line in lines.values())
        assert lines["EP tokens"]["measured_inter"] == lines["EP tokens"]["counted_inter"]
    unfolded, folded = ({line["name"]: line for line in run["bytes"]} for run in summary["runs"][1:])
    assert unfolded["EP tokens"]["measured_inter"] == unfolded["EP tokens"]["measured"]  # neighbours are a node apart
    assert folded["EP tokens"]["measured_inter"] == 0 and "ETP tokens" not in folded


def test_measured_bytes_are_those_that_the_ranks_wrote(out: Path) -> None:
    """The table is the sum of the ranks' files, and leaves nothing of them out."""
    runs = {run["name"]: run for run in summary_of(out)["runs"]}
    for folder, ranks in RANKS.items():
        files = [json.loads((out / "runs" / folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
        total = sum(record["bytes"] for file in files for record in file["sent"])
        run = runs[folder.replace("-", " ")]
        assert sum(line["measured"] for line in run["bytes"]) == total
        # 4 steps of 2 micro-batches of 64 tokens with 2 experts each, whoever routes them.
        rows = sum(sum(file["rows"]) for file in files)
        assert rows == 4 * 2 * 64 * 2
        assert rows / 2 <= sum(sum(file["pairs"]) for file in files) <= rows


def test_records_and_page(out: Path) -> None:
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["kind"] == "train"]
    assert [(r["mapping"], r["step"]) for r in steps[:5]] == [
        *(("one process", n) for n in range(1, 5)),
        ("unfolded", 1),
    ]
    assert all(abs(sum(layer) - 1) < 1e-3 for r in steps for layer in r["expert_load"])
    assert {r["kind"] for r in records} == {"train", "bytes", "calibration"}
    assert sum(r["kind"] == "calibration" for r in records) == 20
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "proves nothing else" in page


def test_finished_mappings_are_not_run_again(out: Path) -> None:
    """Only the one whose result is gone is."""
    before = {name: (out / "runs" / name / "rank0.json").stat().st_mtime_ns for name in RANKS}
    first = summary_of(out)["runs"]
    (out / "runs" / "one-process" / "done.json").unlink()
    call(out)
    after = {name: (out / "runs" / name / "rank0.json").stat().st_mtime_ns for name in RANKS}
    assert [name for name in RANKS if before[name] != after[name]] == ["one-process"]
    again = summary_of(out)["runs"]
    assert [run["bytes"] for run in again] == [run["bytes"] for run in first]
    assert again[0]["bits_per_byte"] == first[0]["bits_per_byte"]


def test_a_threshold_that_is_not_met_is_said(recipe: ModuleType, out: Path) -> None:
    limits = yaml.safe_load((RECIPE / "thresholds.yaml").read_text())
    runs = summary_of(out)["runs"]
    for run in runs:
        metrics = out / "runs" / run["name"].replace(" ", "-") / "metrics.jsonl"
        run["steps"] = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert all(outcome["passed"] for outcome in recipe.judge(runs, limits).values())
    twin = {**runs[1], "dispatcher": "dedup"}
    assert recipe.judge([*runs, twin], limits)["dispatchers"]["passed"]
    runs[1]["steps"][-1]["loss"] += 0.25
    runs[2]["bytes"][0]["measured"] += 1
    runs[2]["unplanned"]["gossip over dp"] = 12
    outcomes = recipe.judge(runs, limits)
    failed = {name: outcome["found"] for name, outcome in outcomes.items() if not outcome["passed"]}
    names = ("loss", "loss_first_steps", "loss_same_routing")
    assert [failed.pop(name) for name in names] == pytest.approx([0.25] * 3, abs=1e-4)
    assert failed == {"bytes": 1, "bytes_without_formula": 12}
    # A rounding that turned a router is seen in the loads, and is no breach of equal routing.
    runs[1]["steps"][-1]["expert_load"][0][0] += 0.01
    assert recipe.judge(runs, limits)["loss_same_routing"]["passed"]
    twin = {**runs[1], "steps": [{**step, "loss": step["loss"] + 1e-9} for step in runs[1]["steps"]]}
    assert not recipe.judge([*runs, twin], limits)["dispatchers"]["passed"]


def test_an_illegal_mapping_is_refused_before_anything_runs(recipe: ModuleType, tmp_path: Path) -> None:
    values = yaml.safe_load((RECIPE / "configs" / "smoke.yaml").read_text())
    values["mappings"] = [{"name": "too wide", "tp": 3}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match="got 3 x 1 x 1 = 3, want a divisor of the 4 ranks"):
        recipe.run(tmp_path / "config.yaml", tmp_path / "out", None, Console(quiet=True))
    assert not (tmp_path / "out" / "runs").exists()


def test_a_rank_that_fails_ends_the_run_with_its_reason(
    recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model has two Mamba-2 groups: no rank can have a part of one."""
    values = yaml.safe_load((RECIPE / "configs" / "smoke.yaml").read_text())
    values["mappings"] = [{"name": "cut group", "tp": 4}]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "smoke.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "thresholds.yaml").write_text((RECIPE / "thresholds.yaml").read_text())
    (tmp_path / "worker.py").write_text((RECIPE / "worker.py").read_text())
    monkeypatch.setattr(recipe, "HERE", tmp_path)
    assert recipe.main(["--smoke", "--out", str(tmp_path / "out")]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "cut group: exit code 1: ValueError: tp: got 4, want a divisor of mamba_num_groups = 2" in said


def test_the_readme_says_what_the_committed_results_say(recipe: ModuleType) -> None:
    import publish

    text = (RECIPE / "README.md").read_text()
    summary = json.loads((RECIPE / "results" / "summary.json").read_text())
    found = publish.MARKED.search(text)
    assert found is not None
    assert found[0] == f"{found[1]}{publish.tables(summary)}\n{found[2]}"
    limits = yaml.safe_load((RECIPE / "thresholds.yaml").read_text())
    kept = {
        name: {k: v for k, v in o.items() if k not in ("found", "passed")} for name, o in summary["thresholds"].items()
    }
    assert kept == limits
