"""The benchmark harness: what it refuses to time, what it keeps, what its tables say."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from foldscan.bench.case import OURS, Case
from foldscan.bench.cases import CASES
from foldscan.bench.driver import keep, tasks
from foldscan.bench.measure import Machine, measure
from foldscan.bench.memory import extra_memory
from foldscan.cli import main

SLOW_MACHINE = Machine("cpu", {"float32": 1e9, "bfloat16": 1e9}, 1e9)
QUICK = {"rounds": 3, "budget": 0.0}


def doubling(peer: Any, **kwargs: Any) -> Case:
    """y = 2 x against a peer."""
    return Case(
        "double",
        ("N",),
        [(64,)],
        lambda n, dtype: {"x": torch.ones(n).to(dtype)},
        lambda n: {OURS: lambda x: x * 2, "peer": peer},
        lambda n: n,
        lambda n, element: 2 * n * element,
        **kwargs,
    )


def test_rows_of_a_case() -> None:
    rows = list(measure(doubling(lambda x: x + x), (64,), "float32", "fwd+bwd", SLOW_MACHINE, **QUICK))
    assert [r["impl"] for r in rows] == [OURS, "peer"]
    for row in rows:
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["rounds"] == 3
        seconds = row["p50_ms"] / 1e3
        assert row["gflops"] == pytest.approx(3 * 64 / seconds / 1e9)
        assert row["bound"] == "memory" and row["roofline"] == pytest.approx(3 * 2 * 64 * 4 / 1e9 / seconds)


def test_the_fastest_way_to_write_a_peer_is_timed() -> None:
    def slow(x: torch.Tensor) -> torch.Tensor:
        torch.randn(300, 300) @ torch.randn(300, 300)
        return x * 2

    rows = list(
        measure(doubling({"slow": slow, "quick": lambda x: x * 2}), (64,), "float32", "fwd", SLOW_MACHINE, **QUICK)
    )
    assert rows[1]["way"] == "quick"


@pytest.mark.parametrize(
    ("peer", "mode"), [(lambda x: x * 2.001, "fwd"), (lambda x: x + x.detach(), "fwd+bwd"), (lambda x: x / 0, "fwd")]
)
def test_what_differs_is_not_timed(peer: Any, mode: str) -> None:
    with pytest.raises(SystemExit, match="of peer differs from foldscan's"):
        list(measure(doubling(peer), (64,), "float32", mode, SLOW_MACHINE, **QUICK))


def test_a_missing_peer_is_named_and_ours_may_not_be_missing() -> None:
    def lacking(x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("not on this device")

    rows = list(measure(doubling(lacking), (64,), "float32", "fwd", SLOW_MACHINE, **QUICK))
    assert rows[0]["impl"] == "peer" and rows[0]["missing"] == "not on this device" and rows[1]["impl"] == OURS
    case = doubling(lambda x: x)
    broken = Case(**{**case.__dict__, "implementations": lambda n: {OURS: lacking}})
    with pytest.raises(NotImplementedError):
        list(measure(broken, (64,), "float32", "fwd", SLOW_MACHINE, **QUICK))


def test_implementations_that_update_their_inputs_get_their_own() -> None:
    case = doubling(lambda x: x.mul_(2), updates_inputs=True)
    case = Case(
        **{**case.__dict__, "implementations": lambda n: {OURS: lambda x: x.mul_(2), "peer": lambda x: x.mul_(2)}}
    )
    assert len(list(measure(case, (64,), "float32", "fwd", SLOW_MACHINE, **QUICK))) == 2


def test_newer_rows_take_the_place_of_older_ones(tmp_path: Path) -> None:
    def rows(op: str, value: int) -> list[dict[str, Any]]:
        return [{"op": op, "shape": {"N": 1}, "dtype": "float32", "mode": "fwd", "device": "x", "value": value}]

    path = tmp_path / "r.jsonl"
    for op, value in (("a", 1), ("b", 2), ("c", 3), ("b", 4)):
        keep(path, rows(op, value))
    assert [json.loads(line)["value"] for line in path.read_text().splitlines()] == [1, 4, 3]


def options(**kwargs: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"op": None, "shape": None, "dtype": None, "mode": None, **kwargs})


def test_every_case_is_a_task_and_bad_options_are_named() -> None:
    assert {t[0].op for t in tasks(options())} == {c.op for c in CASES}
    assert len({c.op for c in CASES}) == len(CASES)
    assert {t[2:] for t in tasks(options(op=["scan"], dtype=["bfloat16"], mode=["fwd"]))} == {("bfloat16", "fwd")}
    with pytest.raises(ValueError, match="--op: got"):
        tasks(options(op=["nothing"]))
    with pytest.raises(ValueError, match="--shape: got 1,2, want T,H,P,N,G"):
        tasks(options(op=["scan"], shape="1,2"))


def test_flops_and_bytes_of_every_shape_are_positive() -> None:
    for case in CASES:
        for shape in case.shapes:
            assert len(shape) == len(case.dims), case.op
            assert case.flops(*shape) > 0 and case.bytes(*shape, element=2) > 0, (case.op, shape)


def test_command_and_extra_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A gated norm of 4,096 x 1,024: its output of 16 MiB is what it takes."""
    out = tmp_path / "rows.jsonl"
    arguments = ["--op", "rmsnorm_gated", "--shape", "4096,1024,8", "--dtype", "float32", "--mode", "fwd"]
    assert main(["bench", *arguments, "--against", "none", "--rounds", "3", "--seconds", "0", "--out", str(out)]) == 0
    row = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == row and row["impl"] == OURS and row["roofline"] > 0
    extra = extra_memory(row, 1)
    assert extra is not None and 15 << 20 < extra < 24 << 20
    assert main(["bench", "--op", "nothing"]) == 1
    assert "--op: got ['nothing']" in capsys.readouterr().err


@pytest.fixture
def plot(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("plot")


def test_table_and_plots(plot: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"device": "x", "threads": 2, "isa": "y", "versions": {"torch": "1", "transformers": "2"}}
    rows = []
    for impl, p50, work in ((OURS, 2.0, 1.0), ("peer", 6.0, 1.5)):
        measured = {"p50_ms": p50, "work": work, "roofline": 0.5, "way": "", "headline": True, "gflops": 3.0}
        case = {"op": "o", "shape": {"N": 4}, "dtype": "float32", "mode": "fwd", "impl": impl}
        rows.append({**case, **measured, "intensity": 2.0, "peak_gflops": 10.0, "copy_gbytes_s": 5.0, **about})
    assert "| o | N=4 | fp32 | fwd | 2 | 50% | peer 2x |" in plot.table(rows)  # per work, not per call
    missed = plot.missed_table([{**r, "op": "linear_kl_div", "p50_ms": 2.0} for r in rows])  # wanted: 1.5 times
    assert (
        "0 of 1 goals are reached" in missed and "| linear_kl_div | N=4 | fp32 | fwd | peer | 1.50x | 0.67x |" in missed
    )
    assert missed.endswith("| 50% | 112% |")  # 0.5 * 1.5 / 0.67
    assert "1 of 1 goals are reached" in plot.missed_table([{**r, "op": "linear_kl_div"} for r in rows])
    monkeypatch.setattr(plot, "IMAGES", tmp_path)
    plot.draw_ratios(rows)
    plot.draw_roofline(rows)
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("ratios.png", "roofline.png"))
    model = {"shape": {"model": "m"}, "dtype": "bfloat16", "mode": "decode", **about}
    speeds = [{"impl": "base", "tokens_s": 50.0, **model}, {"impl": OURS, "tokens_s": 100.0, **model}]
    assert "| m | bf16 | decode | 50 | 100 (2.00x) |" in plot.model_table(speeds, "base")
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- m: begin -->\nold\n<!-- m: end -->\nb\n")
    assert plot.rewrite(page, "m", "new", check=True) and "old" in page.read_text()
    assert plot.rewrite(page, "m", "new", check=False) and not plot.rewrite(page, "m", "new", check=True)
