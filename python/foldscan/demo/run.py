"""The main job: a tokenizer and a small hybrid model on real text in a few minutes, judged, compared, reported."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from foldscan.data import Document, PackedSampler, load_corpus
from foldscan.demo.ngram import ByteNgram, lzma_bits_per_byte, lzma_primed_bits_per_byte
from foldscan.demo.report import Report, Sample, write_report
from foldscan.demo.snippets import first_block, parses
from foldscan.demo.speed import generation_speed, training_speed
from foldscan.generation import Engine
from foldscan.models import HybridConfig, HybridLM, save_pretrained
from foldscan.models.files import write_json
from foldscan.training import Display, PreparedData, TrainConfig, TrainResult, prepare, train
from foldscan.training.corpus import take_bytes
from foldscan.training.metrics import METRICS_FILE, environment, read_metrics

_ABOUT = {
    "stdlib": "CPython's standard library, Python source and docstrings",
    "english": "State-of-the-Union addresses and Jane Austen's novels",
    "moby-dick": "Moby Dick",
}
# Without a space at the end: the tokenizer's words begin with theirs.
_CODE_PROMPTS = [
    "def",
    "class",
    "import os\nimport sys\n\n\ndef",
    "class Node:\n    def __init__(self",
    "from",
    "def test_",
    "if __name__ ==",
    "class Error(Exception):",
]
_MARK = ".foldscan-demo"
_PROSE_PROMPTS = ["It is a truth", "The people of", "She was", "Our country", "Fellow-citizens,", "Mr. Knightley"]


@dataclass(frozen=True)
class Scale:
    """Sizes of a demo: the full one, and a smoke test of all its parts."""

    seconds: float
    vocab: int
    hidden: int
    batch_tokens: int
    train_bytes: int | None
    held_out_bytes: int
    snippets: int
    new_tokens: int
    rounds: int
    ngram_order: int
    primed_lzma: bool


FULL = Scale(150, 4096, 192, 4096, None, 1 << 18, 64, 96, 5, 6, True)
SMOKE = Scale(8, 1024, 96, 2048, 1 << 21, 1 << 15, 8, 40, 2, 4, False)


def demo_model(scale: Scale) -> HybridConfig:
    """Mamba-2 for most of the mixing, one attention layer, two expert layers with a shared expert, one MLP."""
    d = scale.hidden
    return HybridConfig(
        pattern="MEM*ME-",
        vocab_size=scale.vocab,
        hidden_size=d,
        tie_embeddings=True,
        mamba_num_heads=d // 16,
        mamba_head_dim=32,
        mamba_num_groups=1,
        state_size=32,
        num_heads=d // 32,
        num_kv_heads=max(1, d // 96),
        head_dim=32,
        rope_theta=10000.0,
        intermediate_size=3 * d,
        num_experts=8,
        experts_per_token=2,
        moe_intermediate_size=d,
        shared_expert_intermediate_size=d,
        load_balancing_coef=0.01,
        router_z_coef=1e-3,
        initializer_range=0.05,
    )


def _train_config(scale: Scale, run_dir: Path, data: PreparedData, steps: int, seed: int) -> TrainConfig:
    model = demo_model(scale)
    model.vocab_size = data.tokenizer.vocab_size
    return TrainConfig(
        model=model,
        run_dir=str(run_dir),
        train_data=str(data.train.path),
        valid_data=str(data.valid.path) if data.valid else None,
        tokenizer=str(run_dir / "data"),
        steps=steps,
        batch_tokens=scale.batch_tokens,
        seq_length=512,
        lr=6e-3,
        min_lr=3e-4,
        schedule="wsd",
        decay_fraction=0.4,
        warmup_steps=10,
        weight_decay=0.05,
        precision="bf16",
        seed=seed,
        eval_every=max(1, steps // 6),
        eval_tokens=0,
        log_every=max(1, steps // 120),
        checkpoint_every=max(1, steps // 2),
        keep_checkpoints=1,
    )


def _baselines(scale: Scale, training: list[Document], held_out: list[Document]) -> list[tuple[str, float, str]]:
    """(name, bits per byte, remark) of predictors without a network, on the same held-out bytes."""
    known, unseen = [d.text.encode() for d in training], [d.text.encode() for d in held_out]
    with ThreadPoolExecutor() as pool:
        alone = pool.submit(lzma_bits_per_byte, unseen)
        primed = pool.submit(lzma_primed_bits_per_byte, b"".join(known), unseen) if scale.primed_lzma else None
        ngram = ByteNgram(scale.ngram_order).fit(known).bits_per_byte(unseen)
    rows = [
        (f"byte {scale.ngram_order}-gram", ngram, "interpolated (Witten-Bell), same training text"),
        ("lzma", alone.result(), "all held-out files together, no training text"),
    ]
    if primed is not None:
        rows.append(("lzma, primed", primed.result(), "after compressing the training text, which it may copy from"))
    return rows


def _warm_model(scale: Scale, data: PreparedData, seed: int) -> tuple[HybridLM, PackedSampler]:
    config = demo_model(scale)
    config.vocab_size = data.tokenizer.vocab_size
    torch.manual_seed(seed)
    sampler = PackedSampler(data.train, batch_tokens=scale.batch_tokens, max_length=512, seed=seed + 1)
    return HybridLM(config), sampler


def _samples(scale: Scale, result: TrainResult, code: bool, seed: int) -> list[Sample]:
    prompts = _CODE_PROMPTS if code else _PROSE_PROMPTS
    chosen = [prompts[i % len(prompts)] for i in range(scale.snippets if code else len(prompts))]
    engine = Engine(result.model, result.tokenizer)
    end = result.tokenizer.end_of_text  # every document of the training text begins with it
    ids = [[end, *result.tokenizer.encode(p)] for p in chosen]
    found = engine.generate(
        ids, scale.new_tokens, temperature=0.6, top_p=0.95, seed=[seed + i for i in range(len(chosen))]
    )
    samples = []
    for prompt, one in zip(chosen, found):
        if not code:
            samples.append(Sample(prompt, one.text, None))
            continue
        block = first_block(prompt + one.text)
        samples.append(Sample(prompt, block[len(prompt) :], parses(block)))
    return samples


def _pick(samples: list[Sample], count: int = 6) -> list[Sample]:
    """A few to show, of different prompts, in the order they were drawn: not chosen for quality."""
    shown: list[Sample] = []
    for sample in samples:
        if len(shown) < count and sample.prompt not in {s.prompt for s in shown}:
            shown.append(sample)
    return shown


def _make_room(run_dir: Path) -> None:
    """Remove what an earlier demo left, and nothing that another program did."""
    mark = run_dir / _MARK
    if run_dir.exists() and any(run_dir.iterdir()) and not mark.exists():
        raise FileExistsError(f"{run_dir} holds something that is no demo; choose another --run-dir")
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    for name in (METRICS_FILE, "report.html", "summary.json"):
        (run_dir / name).unlink(missing_ok=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    mark.touch()


def run_demo(
    *,
    corpus: str = "stdlib",
    run_dir: Path = Path("runs/demo"),
    smoke: bool = False,
    seconds: float | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run the demo and write ``report.html`` and ``summary.json`` into ``run_dir``.

    Args:
        corpus: ``"stdlib"``, or a fetched one.
        run_dir: checkpoints, metrics and report of an earlier demo there are replaced; the tokenised corpus is reused.
        smoke: a small version of everything.
        seconds: of training, about; the number of steps is set from the measured speed.
        quiet: print nothing.

    Returns:
        The summary.

    Raises:
        FileExistsError: ``run_dir`` holds something that is no demo.
        FetchError: a corpus could not be fetched.
    """
    started = time.perf_counter()
    console = Console(quiet=quiet)
    scale = SMOKE if smoke else FULL
    budget = scale.seconds if seconds is None else seconds
    if budget <= 0:
        raise ValueError(f"seconds: got {seconds}, want more than 0")
    _make_room(run_dir)

    console.rule(f"foldscan demo: {_ABOUT.get(corpus, corpus)}")
    training, held_out = load_corpus(corpus)
    held_out = take_bytes(held_out, scale.held_out_bytes)
    if scale.train_bytes is not None:
        training = take_bytes(training, scale.train_bytes)
    data = prepare(run_dir / "data", corpus, scale.vocab, documents=(training, held_out))
    assert data.valid is not None  # a corpus always has a held-out part
    console.print(
        f"{len(training)} files to learn from, {len(held_out)} held out; {data.train.num_bytes / 1e6:.1f} MB = "
        f"{data.train.num_tokens / 1e6:.2f} M tokens of {data.train.num_bytes / data.train.num_tokens:.2f} bytes",
        highlight=False,
    )
    with console.status("fitting the baselines"):
        rows = _baselines(scale, training, held_out)
    with console.status("measuring speed against eager PyTorch"):
        model, sampler = _warm_model(scale, data, seed)
        fast, eager, eager_precision = training_speed(model, sampler, "bf16", scale.rounds)
        prompts = [data.train.document(i)[:n].tolist() for i, n in enumerate((8, 33, 64, 100))]
        decode = generation_speed(model.eval(), prompts, scale.new_tokens // 2, max(1, scale.rounds // 2))
    speed = [("Training speed", fast, eager), ("Generation speed", *decode)]
    console.print(
        f"training {fast:,.0f} tokens/s, eager {eager:,.0f}; generation {decode[0]:,.0f}, eager {decode[1]:,.0f}",
        highlight=False,
    )

    # The time decides when to stop; the steps are only a bound, far off in case the machine gets faster.
    steps = max(2000, int(4 * budget * fast / scale.batch_tokens))
    config = _train_config(scale, run_dir, data, steps, seed)
    config.max_seconds = budget
    result = train(config, data=data, listener=None if quiet else Display(console))
    assert result.evaluation is not None  # there is held-out data
    with console.status("judging the model"):
        samples = _samples(scale, result, corpus == "stdlib", seed)
    model_dir = run_dir / "model"
    save_pretrained(result.model, model_dir, overwrite=True)
    result.tokenizer.save(model_dir)
    judged = [s for s in samples if s.parses is not None]
    parsed = (sum(bool(s.parses) for s in judged), len(judged)) if judged else None
    rows.insert(
        0,
        (
            "this model",
            result.evaluation.bits_per_byte,
            f"read in pieces of up to {config.seq_length} tokens",
        ),
    )

    mparams = result.model.num_parameters() / 1e6
    model_line = (
        f"{mparams:.1f} million parameters in the pattern {config.model.pattern}: M Mamba-2, E mixture of 8 experts, "
        "* attention, - MLP."
    )
    total = time.perf_counter() - started
    report = Report(
        corpus="Python" if corpus == "stdlib" else "English",
        about=f"{_ABOUT.get(corpus, corpus)}: {len(training)} files, {data.train.num_bytes / 1e6:.1f} MB",
        model_line=model_line,
        metrics=read_metrics(run_dir / METRICS_FILE),
        bits_per_byte=rows,
        speed=speed,
        parsed=parsed,
        samples=_pick(samples),
        seconds=result.progress.seconds,
        total_seconds=total,
        config=config.to_dict(),
        environment=environment(),
        notes=[
            "Training speed is loss and gradients without the optimizer; ours in bf16, eager in "
            f"{eager_precision}, its faster precision here. Generation is a batch of four in fp32."
        ],
    )
    write_report(report, run_dir / "report.html")
    summary = {
        "bits_per_byte": {name: round(value, 4) for name, value, _ in rows},
        "tokens_per_second": {what: {"foldscan": round(a, 1), "eager": round(b, 1)} for what, a, b in speed},
        "parsed": {"good": parsed[0], "all": parsed[1]} if parsed else None,
        "parameters": result.model.num_parameters(),
        "tokens": result.progress.tokens,
        "training_seconds": round(result.progress.seconds, 1),
        "total_seconds": round(total, 1),
        "model": str(model_dir),
        "report": str(run_dir / "report.html"),
    }
    write_json(run_dir / "summary.json", summary)
    _print_summary(console, rows, report, run_dir)
    return json.loads(json.dumps(summary))


def _print_summary(console: Console, rows: list[tuple[str, float, str]], report: Report, run_dir: Path) -> None:
    table = Table(title="held-out text", title_justify="left")
    table.add_column("predictor")
    table.add_column("bits per byte", justify="right")
    for name, value, _ in sorted(rows, key=lambda r: r[1]):
        table.add_row(name, f"{value:.3f}", style="bold cyan" if name == "this model" else None)
    console.print(table)
    if report.parsed is not None:
        console.print(f"{report.parsed[0]} of {report.parsed[1]} generated snippets parse as Python")
    for sample in report.samples[:2]:
        console.print(f"[cyan]{_escape(sample.prompt)}[/cyan]{_escape(sample.text)}", highlight=False)
    console.print(f"report: {run_dir / 'report.html'}  ({report.total_seconds:.0f} s in all)", highlight=False)
    prompt = shlex.quote(report.samples[0].prompt)
    console.print(f"try: foldscan generate --model {run_dir / 'model'} {prompt}", highlight=False)


def _escape(text: str) -> str:
    return text.replace("[", "\\[")


__all__ = ["demo_model", "run_demo"]
