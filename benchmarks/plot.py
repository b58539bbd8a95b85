"""Tables and plots from the JSON lines under benchmarks/results.

python benchmarks/plot.py            rewrite the sections between the markers, and docs/images/*.png
python benchmarks/plot.py --check    exit 1 if a table is not what the results say
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import goals

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PERFORMANCE = ROOT / "docs" / "performance"
IMAGES = ROOT / "docs" / "images"
OURS = "foldscan"
SHORT = {"float32": "fp32", "bfloat16": "bf16"}

Case = dict[str, dict[str, Any]]  # rows of one case by implementation


def read(name: str) -> list[dict[str, Any]]:
    """Measured rows of a results file; none where it does not exist."""
    path = RESULTS / name
    rows = [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []
    return [r for r in rows if "missing" not in r]


def by_case(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], Case]:
    """Rows grouped by op, shape, dtype and mode, in the file's order."""
    cases: dict[tuple[Any, ...], Case] = {}
    for row in rows:
        key = (row["op"], tuple(row["shape"].items()), row["dtype"], row["mode"])
        cases.setdefault(key, {})[row["impl"]] = row
    return {key: impls for key, impls in cases.items() if OURS in impls}


def ratios(impls: Case) -> dict[str, float]:
    """How many times slower than ours each peer is, for the same work."""
    ours = impls[OURS]
    return {
        name: row["p50_ms"] / row["work"] / (ours["p50_ms"] / ours["work"])
        for name, row in impls.items()
        if name != OURS
    }


# Pages of docs/performance with a table of their own.
FAMILIES = {
    "linear": ("linear", "linear_decode", "linear_prefill"),
    "ssm": ("scan", "scan_pruned", "causal_conv1d", "selective_state_update", "rmsnorm_gated"),
    "attention": ("attention_causal", "attention_varlen", "attention_decode"),
    "moe": ("moe_mlp", "moe_mlp_128", "moe_mlp_relu2", "moe_mlp_mixtral"),
    "losses": ("linear_cross_entropy", "linear_logprob", "linear_logprob_entropy", "linear_kl_div"),
    "pruning": ("linear_2_4",),
}


def table(rows: list[dict[str, Any]], command: str = "foldscan bench", file: str = "cpu.jsonl") -> str:
    """One line a case: our median, the roofline fraction, and how many times slower each peer was in the same run."""
    if not rows:
        return "No results."
    first = rows[0]
    memory = any(r.get("extra_mb") is not None for r in rows)
    lines = [
        f"{first['device']}, {first['threads']} threads, {first['isa']}, PyTorch {first['versions']['torch']}, "
        f"transformers {first['versions']['transformers']}; medians of interleaved calls (`{command}`, file "
        f"`benchmarks/results/{file}`). The roofline is the larger of FLOPs / peak and bytes / copy bandwidth, both "
        "measured in the same run.",
        "",
        "| op | shape | dtype | mode | ours, ms | of roofline | peers, times slower |"
        + (" extra MB |" if memory else ""),
        "|---|---|---|---|---|---|---|" + ("---|" if memory else ""),
    ]
    for (op, shape, dtype, mode), impls in by_case(rows).items():
        ours = impls[OURS]
        peers = ", ".join(
            f"{name}{' (' + impls[name]['way'] + ')' if impls[name]['way'] else ''} {ratio:.2g}x"
            for name, ratio in ratios(impls).items()
        )
        sizes = " ".join(f"{k}={v}" for k, v in shape)
        line = f"| {op} | {sizes} | {SHORT[dtype]} | {mode} | {ours['p50_ms']:.3g} | {ours['roofline']:.0%} | {peers} |"
        if memory:
            extra = [impls[n].get("extra_mb") for n in impls]
            line += " " + " / ".join("-" if e is None else f"{e:.0f}" for e in extra) + " |"
        lines.append(line)
    return "\n".join(lines)


def missed_table(rows: list[dict[str, Any]]) -> str:
    """The goals that were not reached (benchmarks/goals.py), and what fraction of the roofline each would take."""
    lines = [
        "| op | shape | dtype | mode | against | goal | reached | roofline now | roofline at the goal |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    asked = 0
    for (op, shape, dtype, mode), impls in by_case(rows).items():
        reached, factors = impls[OURS]["roofline"], ratios(impls)
        asked += goals.roofline(op, dict(shape), dtype, mode) is not None
        asked += sum(goals.speedup(op, dict(shape), dtype, mode, peer) is not None for peer in factors)
        sizes = " ".join(f"{k}={v}" for k, v in shape)
        for against, goal, got, needs in goals.missed((op, shape, dtype, mode), reached, factors):
            unit = (lambda x: f"{x:.0%}") if against == "roofline" else (lambda x: f"{x:.2f}x")
            lines.append(
                f"| {op} | {sizes} | {SHORT[dtype]} | {mode} | {against} | {unit(goal)} | {unit(got)} | {reached:.0%} "
                f"| {needs:.0%} |"
            )
    return "\n".join([f"{asked - len(lines) + 2} of {asked} goals are reached. The others:", "", *lines])


def calls_table(rows: list[dict[str, Any]]) -> str:
    """What a call costs: ops that have next to nothing to do, and how much more they take than ``torch.add``."""
    lines = ["| call | microseconds | over torch.add |", "|---|---|---|"]
    for (op, shape, _, _), impls in by_case(rows).items():
        ours, add = (1e3 * impls[n]["p50_ms"] / dict(shape)["calls"] for n in (OURS, "torch.add"))
        name, recorded = op.removeprefix("overhead_"), op.endswith("_recorded")
        label = name.removesuffix("_recorded") + (", recorded by autograd" if recorded else "")
        lines.append(f"| {label} | {ours:.1f} | +{ours - add:.1f} |")
    return "\n".join(lines)


def model_table(rows: list[dict[str, Any]], base: str) -> str:
    """Tokens a second of each implementation, and how many times those of `base` ours are."""
    if not rows:
        return "No results."
    names = [base, *dict.fromkeys(r["impl"] for r in rows if r["impl"] != base)]
    lines = [
        f"{rows[0]['device']}, {rows[0]['threads']} threads, {rows[0]['isa']}; medians, tokens a second; in brackets "
        f"against {base}.",
        "",
        f"| model | dtype | | {' | '.join(names)} |",
        "|---" * (3 + len(names)) + "|",
    ]
    cases: dict[tuple[str, ...], dict[str, float]] = {}
    for r in rows:
        cases.setdefault((r["shape"]["model"], r["dtype"], r["mode"]), {})[r["impl"]] = r["tokens_s"]
    for (model, dtype, mode), found in cases.items():
        cells = [
            "-" if n not in found else f"{found[n]:.4g}" + ("" if n == base else f" ({found[n] / found[base]:.2f}x)")
            for n in names
        ]
        lines.append(f"| {model} | {SHORT[dtype]} | {mode} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _column(shape: dict[str, Any], dtype: str) -> str:
    return " ".join(f"{name}={shape[name]}" for name in "THEK") + f" {SHORT[dtype]}"


def megatron_table(rows: list[dict[str, Any]]) -> str:
    """Two ranks each of Megatron-Core and ours in turns: our median, and how many times slower Megatron-Core's is."""
    if not rows:
        return "No results."
    cases = by_case(rows)
    columns = list(dict.fromkeys((shape, dtype) for _, shape, dtype, _ in cases))
    first = rows[0]
    lines = [
        f"{first['device']}, {first['processes']} processes of {first['threads']} thread, forward, Megatron-Core "
        f"{first['versions']['megatron-core']}, PyTorch {first['versions']['torch']}; our median in ms, in brackets "
        "how many times slower Megatron-Core was in the same run (`benchmarks/megatron_core.py`, file "
        "`benchmarks/results/megatron.jsonl`). `dedup` stands beside their all-to-all.",
        "",
        f"| | {' | '.join(_column(dict(shape), dtype) for shape, dtype in columns)} |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for op in dict.fromkeys(key[0] for key in cases):
        cells = []
        for shape, dtype in columns:
            found = cases[op, shape, dtype, "fwd"]
            ours, theirs = found[OURS]["p50_ms"], found["megatron-core"]["p50_ms"]
            cells.append(f"{ours:.3g} ({theirs / ours:.2f}x)")
        lines.append(f"| {op} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rewrite(page: Path, marker: str, text: str, check: bool) -> bool:
    """Puts the text between the page's markers; True if it was something else."""
    begin, end = f"<!-- {marker}: begin -->", f"<!-- {marker}: end -->"
    old = page.read_text()
    new = re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{text}\n{end}", old, flags=re.S)
    if begin not in old:
        raise SystemExit(f"{page}: no marker {begin}")
    if new != old and not check:
        page.write_text(new)
    return new != old


def draw_ratios(rows: list[dict[str, Any]]) -> None:
    """A bar a case: the best peer's time over ours."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = {k: v for k, v in by_case(rows).items() if len(v) > 1 and v[OURS]["headline"]}
    labels, heights, colours, names = [], [], [], []
    for (op, shape, dtype, mode), impls in cases.items():
        best = min(ratios(impls).items(), key=lambda item: item[1])
        labels.append(f"{op} {'·'.join(str(v) for _, v in shape)} {SHORT[dtype]} {mode}")
        heights.append(best[1])
        names.append(best[0])
        colours.append("#c44e52" if best[1] < 1 else "#4c72b0" if dtype == "float32" else "#55a868")
    figure, axes = plt.subplots(figsize=(10, 0.26 * len(labels) + 1))
    places = range(len(labels))
    axes.barh(places, heights, color=colours, log=True, left=0)
    for i, (height, name) in enumerate(zip(heights, names)):
        axes.text(height * 1.03, i, f"{height:.2g}x  {name}", va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(list(places), labels, fontsize=7)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(0.5, max(heights) * 4)
    axes.set_xlabel("time of the fastest peer / ours (1 = equal; red: the peer is faster)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(IMAGES / "ratios.png", dpi=80, bbox_inches="tight")
    plt.close(figure)


def draw_roofline(rows: list[dict[str, Any]]) -> None:
    """Every case as a point under the machine's roof."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for axes, (dtype, short) in zip(panels, SHORT.items()):
        ours = [r for r in rows if r["impl"] == OURS and r["dtype"] == dtype]
        if not ours:
            continue
        peak = sorted(r["peak_gflops"] for r in ours)[len(ours) // 2]
        copy = sorted(r["copy_gbytes_s"] for r in ours)[len(ours) // 2]
        xs = [2.0**-4, peak / copy, 2.0**12]
        axes.plot(xs, [min(peak, copy * x) for x in xs], color="black", linewidth=1)
        ops = list(dict.fromkeys(r["op"] for r in ours))
        for i, op in enumerate(ops):
            chosen = [r for r in ours if r["op"] == op]
            axes.scatter(
                [r["intensity"] for r in chosen],
                [r["gflops"] for r in chosen],
                s=16,
                label=op,
                color=plt.get_cmap("tab20")(i % 20),
                marker="os^D"[i // 20 % 4],
            )
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="FLOP per compulsory byte",
            title=f"{short}: {peak:.0f} GF/s, {copy:.0f} GB/s",
        )
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("GFLOP/s")
    handles = {label: h for axes in panels for h, label in zip(*axes.get_legend_handles_labels())}
    panels[1].legend(handles.values(), handles.keys(), fontsize=6, loc="lower right")
    figure.tight_layout()
    figure.savefig(IMAGES / "roofline.png", dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    everything = read("cpu.jsonl")
    rows = [r for r in everything if not r["op"].startswith("overhead_")]
    calls = [r for r in everything if r["op"].startswith("overhead_")]
    pages = [
        (ROOT / "README.md", "benchmarks", table([r for r in rows if r["headline"]])),
        (ROOT / "docs" / "benchmarks.md", "operators", table(rows)),
        (ROOT / "docs" / "benchmarks.md", "missed", missed_table(rows)),
        (PERFORMANCE / "linear.md", "calls", calls_table(calls)),
        (PERFORMANCE / "models.md", "transformers", model_table(read("models.jsonl"), "transformers")),
        (PERFORMANCE / "models.md", "llama.cpp", model_table(read("llamacpp.jsonl"), "llama.cpp")),
        (ROOT / "docs" / "parallel.md", "megatron", megatron_table(read("megatron.jsonl"))),
    ]
    for family, ops in FAMILIES.items():
        pages.append((PERFORMANCE / f"{family}.md", "operators", table([r for r in rows if r["op"] in ops])))
    single = read("ggml.jsonl")
    for family in ("ssm", "attention"):
        text = table([r for r in single if r["op"] in FAMILIES[family]], "benchmarks/ggml.py", "ggml.jsonl")
        pages.append((PERFORMANCE / f"{family}.md", "ggml", text))
    stale = [page.name for page, marker, text in pages if rewrite(page, marker, text, options.check)]
    if not options.check:
        IMAGES.mkdir(exist_ok=True)
        draw_ratios(rows)
        draw_roofline(rows)
    print(f"{'stale' if options.check else 'rewritten'}: {stale or 'nothing'}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
