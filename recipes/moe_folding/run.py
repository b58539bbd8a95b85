"""MoE Parallel Folding on real text: one model under several mappings, the same losses, and bytes beside the plan's.

    python recipes/moe_folding/run.py [--smoke] [--out DIR] [--corpus stdlib|english]

A finished mapping is not run again. Leaves report.html, results.jsonl and summary.json in the folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml
from foldscan.data import load_corpus
from foldscan.models.files import atomic_write_text, read_json, write_json
from foldscan.parallel.planner import load_constants
from foldscan.parallel.planner.calibration import calibration, pairs_in_order, rms_log_error
from foldscan.training import PreparedData, TrainConfig, prepare
from foldscan.training.corpus import take_bytes
from foldscan.training.metrics import METRICS_FILE, environment, read_metrics
from planned import Counted, plan_run
from plots import write_plots
from report import write_report
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

HERE = Path(__file__).resolve().parent
Values = dict[str, Any]


def configure(values: Values, mapping: Values, data: PreparedData, folder: Path) -> tuple[TrainConfig, int]:
    """The training run of a mapping, and how many ranks it has.

    Raises:
        ValueError: a field that is wrong, or a mapping that does not divide the ranks.
    """
    assert data.valid is not None
    parallel = {key: value for key, value in mapping.items() if key not in ("name", "ranks", "control")}
    quiet = {"log_every": 1, "eval_every": 0, "checkpoint_every": 0, "keep_checkpoints": 1, "tensorboard": False}
    files = {"train_data": str(data.train.path), "valid_data": str(data.valid.path)}
    config = TrainConfig.from_dict(
        {
            **values["train"],
            **mapping.get("control", {}),
            **quiet,
            **files,
            "tokenizer": str(data.valid.path.parent),
            "run_dir": str(folder),
            "parallel": {"timeout": 60.0, **parallel},
        }
    )
    config.model.vocab_size = data.tokenizer.vocab_size
    config.model.eos_token_id = data.tokenizer.end_of_text
    ranks: int = mapping.get("ranks") or values["world"]
    config.parallel.mesh(ranks)
    return config, ranks


def launch(config: TrainConfig, ranks: int, node: int, limit: float, progress: Progress, name: str) -> None:
    """Run a mapping under torchrun until all of its ranks have written what they counted.

    Raises:
        RuntimeError: it failed, or took longer than ``limit`` seconds; with the end of what it said.
    """
    folder = Path(config.run_dir)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config.save(folder / "train.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(HERE / "worker.py"), str(folder), str(node)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    task = progress.add_task(name, total=config.steps)
    started = time.monotonic()
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=settings, start_new_session=True)
        try:
            while process.poll() is None:
                if time.monotonic() - started > limit:
                    raise RuntimeError(f"{name}: not finished after {limit:.0f} s; see {log.name}")
                progress.update(task, completed=len(read_metrics(folder / METRICS_FILE)))
                time.sleep(0.3)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if process.returncode:
        said = (folder / "log.txt").read_text(encoding="utf-8").splitlines()
        found = (re.match(r"(?:\[rank\d+\]: )?([\w.]*(?:Error|Exception)\b.*)", line) for line in said)
        why = next((match[1] for match in found if match), "no reason given")
        raise RuntimeError(f"{name}: exit code {process.returncode}: {why} (see {folder / 'log.txt'})")
    progress.update(task, completed=config.steps)


def digest(config: TrainConfig, ranks: int, node: int) -> str:
    """A short name for everything that a mapping's result depends on, but for the code."""
    values = {key: value for key, value in config.to_dict().items() if key != "run_dir"}
    return hashlib.sha256(json.dumps([values, ranks, node], sort_keys=True).encode()).hexdigest()[:16]


def collect(config: TrainConfig, ranks: int, node: int, mapping: Values) -> Values:
    """A finished mapping: curves, loads, and what it sent beside the plan."""
    folder = Path(config.run_dir)
    files = [read_json(folder / f"rank{rank}.json") for rank in range(ranks)]
    lines = plan_run(config, ranks, node, Counted([f["rows"] for f in files], [f["pairs"] for f in files]))
    sent: dict[tuple[str, str], list[int]] = {}
    for file in files:
        for record in file["sent"]:
            both = sent.setdefault((record["label"], record["axes"]), [0, 0])
            both[0] += record["bytes"]
            both[1] += record["inter"]
    table = []
    for line in lines:
        keys = [(label, axes) for label in line.labels for axes in line.axes]
        measured, inter = (sum(sent.get(key, [0, 0])[i] for key in keys) for i in (0, 1))
        for key in keys:
            sent.pop(key, None)
        if measured or line.counted:
            row = {"name": line.name, "even": line.even, "counted": line.counted, "measured": measured}
            row |= {"measured_inter": inter, "even_inter": line.even_inter, "counted_inter": line.counted_inter}
            table.append(row)
    unplanned = {f"{label} over {axes}": both[0] for (label, axes), both in sent.items() if both[0]}
    return {
        "name": mapping["name"],
        "ranks": ranks,
        "control": "control" in mapping,
        "mapping": mapping_name(config, ranks),
        "dispatcher": config.parallel.dispatcher,
        "experts_in_a_node": ranks > 1 and _in_a_node(config, ranks, node),
        **read_json(folder / "result.json"),
        "steps": read_metrics(folder / METRICS_FILE),
        "bytes": table,
        "unplanned": unplanned,
    }


def _apart(run: Values, base: list[float]) -> list[float]:
    return [abs(step["loss"] - b) for step, b in zip(run["steps"], base)]


def _same_routing(run: Values, reference: Values) -> int:
    """Steps before the first in which an expert got another number of tokens than in the reference."""
    pairs = enumerate(zip(run["steps"], reference["steps"]))
    return next((i for i, (a, b) in pairs if a["expert_load"] != b["expert_load"]), len(reference["steps"]))


def _turned(run: Values, reference: Values, choices: int) -> int:
    """Choices of the routers, ``choices`` a layer and step, that are others than in the reference in the first step in
    which any are, as far as the loads tell."""
    step = _same_routing(run, reference)
    if step == len(reference["steps"]):
        return 0
    loads = zip(run["steps"][step]["expert_load"], reference["steps"][step]["expert_load"])
    return sum(round(choices * sum(abs(a - b) for a, b in zip(*layer)) / 2) for layer in loads)


def _busiest(run: Values) -> float:
    """Tokens of the busiest expert over the mean, on average over steps and layers."""
    found = [max(layer) * len(layer) for step in run["steps"] for layer in step["expert_load"]]
    return sum(found) / len(found)


def _short(run: Values, reference: Values, train: Values) -> Values:
    """A run without its steps, and what they come to."""
    choices = train["batch_tokens"] * train["accumulation"] * train["model"]["experts_per_token"]
    return {key: value for key, value in run.items() if key != "steps"} | {
        "num_steps": len(run["steps"]),
        "last_loss": run["steps"][-1]["loss"],
        "same_routing_steps": _same_routing(run, reference),
        "turned": _turned(run, reference, choices),
        "busiest_expert": _busiest(run),
    }


def mapping_name(config: TrainConfig, ranks: int) -> str:
    """Sizes of all axes."""
    mesh = config.parallel.mesh(ranks)
    return " ".join(f"{axis}{getattr(mesh, axis)}" for axis in ("tp", "cp", "dp", "pp", "etp", "ep", "edp"))


def _in_a_node(config: TrainConfig, ranks: int, node: int) -> bool:
    groups = config.parallel.mesh(ranks).ranks("ep")
    return config.parallel.ep > 1 and all(len({rank // node for rank in group}) == 1 for group in groups)


def judge(runs: list[Values], limits: Values) -> dict[str, Values]:
    """Every threshold with what was found; that on dispatchers only where two runs differ in nothing else."""
    reference, others = runs[0], [run for run in runs[1:] if not run["control"]]
    base = [step["loss"] for step in reference["steps"]]
    apart = [_apart(run, base) for run in others]
    first = limits["loss_first_steps"]["steps"]
    fixed, fitted = (calibration(load_constants(name)) for name in ("hand-set", "fitted"))
    lines = [line for run in runs for line in run["bytes"]]
    exchanged = [
        line for run in runs if run["experts_in_a_node"] for line in run["bytes"] if line["name"] == "EP tokens"
    ]
    same = [each[: _same_routing(run, reference)] for run, each in zip(others, apart)]
    found = {
        "loss_first_steps": max(max(each[:first]) for each in apart),
        "loss_same_routing": max(max(each, default=0.0) for each in same),
        "loss": max(max(each) for each in apart),
        "held_out": max(abs(run["bits_per_byte"] - reference["bits_per_byte"]) for run in others),
        "bytes": max((abs(line["measured"] - line["counted"]) for line in lines), default=0),
        "bytes_without_formula": sum(size for run in runs for size in run["unplanned"].values()),
        "folded_exchange_off_node": sum(line["measured_inter"] for line in exchanged),
        "calibration_pairs_hand_set": pairs_in_order(fixed)[0],
        "calibration_pairs_fitted": pairs_in_order(fitted)[0],
    }
    twins = [(a, b) for a, b in combinations(others, 2) if a["mapping"] == b["mapping"]]
    if twins:
        found["dispatchers"] = max(max(_apart(a, [s["loss"] for s in b["steps"]])) for a, b in twins)
    outcomes = {}
    for name in (name for name in limits if name in found):
        value, limit = found[name], limits[name]
        passed = value <= limit["most"] if "most" in limit else value >= limit["least"]
        outcomes[name] = {"found": value, **limit, "passed": passed}
    return outcomes


def calibration_rows() -> list[Values]:
    """The paper's table: published MFU, and predicted with either set of constants."""
    sets = [calibration(load_constants(name)) for name in ("hand-set", "fitted")]
    rows = []
    for hand_set, fitted in zip(*sets):
        p = fitted.prediction
        row = {"model": p.model.name, "mapping": str(p.mapping), "method": p.mapping.method}
        rows.append({**row, "published": fitted.published, "hand_set": hand_set.prediction.mfu, "fitted": p.mfu})
    return rows


def run(config_file: Path, out: Path, corpus: str | None, console: Console) -> Values:
    """The whole recipe; the summary."""
    values = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    limits = yaml.safe_load((HERE / "thresholds.yaml").read_text(encoding="utf-8"))
    corpus = corpus or values["corpus"]
    training, held_out = load_corpus(corpus)
    documents = take_bytes(training, values["train_bytes"]), take_bytes(held_out, values["held_out_bytes"])
    data = prepare(out / "data", corpus, values["train"]["tokenizer_vocab"], documents=documents)
    runs = []
    columns = (TextColumn("{task.description:<16}"), BarColumn(), TextColumn("{task.completed:.0f} steps"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for mapping in values["mappings"]:
            folder = out / "runs" / mapping["name"].replace(", ", "-").replace(" ", "-")
            config, ranks = configure(values, mapping, data, folder)
            done, name = folder / "done.json", digest(config, ranks, values["node"])
            if not (done.is_file() and read_json(done).get("digest") == name):
                launch(config, ranks, values["node"], values["timeout"], progress, mapping["name"])
                write_json(done, {"digest": name})
            runs.append(collect(config, ranks, values["node"], mapping))
    outcomes, rows = judge(runs, limits), calibration_rows()
    summary = {
        "config": config_file.name,
        "corpus": corpus,
        "parameters": runs[0]["parameters"],
        "tokens": runs[0]["tokens"],
        "node": values["node"],
        "thresholds": outcomes,
        "control": {
            run["name"]: {
                "same_routing_steps": _same_routing(run, runs[0]),
                "loss": max(_apart(run, [step["loss"] for step in runs[0]["steps"]])),
                "held_out": abs(run["bits_per_byte"] - runs[0]["bits_per_byte"]),
            }
            for run in runs
            if run["control"]
        },
        "passed": all(outcome["passed"] for outcome in outcomes.values()),
        "calibration_rms_log_error": {
            name: rms_log_error(calibration(load_constants(name))) for name in ("hand-set", "fitted")
        },
        "runs": [_short(run, runs[0], values["train"]) for run in runs],
        "calibration": rows,
        "environment": environment(),
    }
    records = [{"mapping": r["name"], **step} for r in runs for step in r["steps"]]
    records += [{"kind": "bytes", "mapping": r["name"], **line} for r in runs for line in r["bytes"]]
    records += [{"kind": "calibration", **row} for row in rows]
    atomic_write_text(out / "results.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    write_json(out / "summary.json", summary)
    write_plots(runs, rows, limits, out)
    write_report(runs, summary, values, out)
    return summary


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--smoke", action="store_true", help="every part for a few steps; under a minute")
    parser.add_argument("--out", type=Path, help="folder (default: runs/moe_folding, or runs/moe_folding_smoke)")
    parser.add_argument("--corpus", choices=("stdlib", "english"), help="english is fetched (foldscan data fetch)")
    given = parser.parse_args(arguments)
    console, size = Console(), "smoke" if given.smoke else "full"
    out = given.out or Path("runs") / ("moe_folding_smoke" if given.smoke else "moe_folding")
    out.mkdir(parents=True, exist_ok=True)
    try:
        summary = run(HERE / "configs" / f"{size}.yaml", out.resolve(), given.corpus, console)
    except (OSError, ValueError, RuntimeError) as error:
        console.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        return 1
    table = Table("threshold", "found", "limit", "outcome", title=f"{out / 'report.html'}", title_justify="left")
    for name, outcome in summary["thresholds"].items():
        limit = f"<= {outcome['most']:g}" if "most" in outcome else f">= {outcome['least']:g}"
        table.add_row(name, f"{outcome['found']:.3g}", limit, "passed" if outcome["passed"] else "FAILED")
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
