"""Arguments, exit codes and one-line errors of the ``foldscan`` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from foldscan.bench.options import add_arguments as add_bench_arguments
from foldscan.cli import commands, plan

# Threads that wait should sleep, not spin: on a shared machine spinning costs the others, and us, several times the
# speed. It must be set before torch loads its OpenMP, which nothing has done yet here; the user's own setting wins.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for a machine to read")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="foldscan", description="Hybrid language models: Mamba-2, attention, MLP and Mixture of Experts."
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads to use (default: torch's choice)")
    subs = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    info = subs.add_parser("info", help="version, instruction sets, threads, builds")
    _json_flag(info)
    info.set_defaults(run=commands.info)

    data = subs.add_parser("data", help="corpora and small models to work with")
    data_subs = data.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    listing = data_subs.add_parser("list", help="what there is, and what is in the cache")
    _json_flag(listing)
    listing.set_defaults(run=commands.data_list)
    fetch = data_subs.add_parser("fetch", help="bring packages into the cache ($FOLDSCAN_CACHE or ~/.cache/foldscan)")
    fetch.add_argument("name", nargs="+", help="a package of `foldscan data list`, or english for all that it needs")
    _json_flag(fetch)
    fetch.set_defaults(run=commands.data_fetch)
    prepare = data_subs.add_parser("prepare", help="train a tokenizer on a corpus and write token files")
    prepare.add_argument("corpus", help="a corpus of `foldscan data list`")
    prepare.add_argument("folder", help="gets tokenizer.json, train.tokens and valid.tokens")
    prepare.add_argument("--vocab", type=int, default=4096, help="tokens; 257 for raw bytes (default: %(default)s)")
    _json_flag(prepare)
    prepare.set_defaults(run=commands.data_prepare)

    train = subs.add_parser("train", help="train a model as a YAML file says")
    train.add_argument("--config", required=True, metavar="FILE", help="a TrainConfig as YAML; see docs/training.md")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a field, such as model.hidden_size=128",
    )
    train.add_argument("--resume", action="store_true", help="continue from the run's last checkpoint, if any")
    mesh = train.add_argument_group(
        "parallel training", "sizes of the mesh of processes that torchrun starts; one process takes no notice of them"
    )
    for axis, about in (
        ("tp", "tensor parallelism of attention, Mamba-2, MLP and vocabulary"),
        ("cp", "context parallelism"),
        ("ep", "expert parallelism"),
        ("etp", "tensor parallelism inside an expert"),
        ("pp", "pipeline stages"),
    ):
        mesh.add_argument(f"--{axis}", type=int, metavar="N", help=about)
    mesh.add_argument("--dispatcher", choices=["alltoall", "allgather", "dedup"], help="of tokens to experts")
    _json_flag(train)
    train.set_defaults(run=commands.train)

    generate = subs.add_parser("generate", help="continue a text")
    generate.add_argument("prompt", help="text; - to read it from standard input")
    generate.add_argument("--model", required=True, metavar="DIR", help="a model directory, a .gguf file, or smollm2")
    generate.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    generate.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0 for greedy; default: %(default)s"
    )
    generate.add_argument("--top-k", type=int, default=0, metavar="K", help="0 for all; default: %(default)s")
    generate.add_argument("--top-p", type=float, default=0.95, metavar="P", help="1 for all; default: %(default)s")
    generate.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    generate.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="default: %(default)s")
    generate.add_argument("--raw", action="store_true", help="do not wrap the prompt as a chat message")
    _json_flag(generate)
    generate.set_defaults(run=commands.generate)

    bench = subs.add_parser("bench", help="time the operators beside their peers; one JSON line a row")
    add_bench_arguments(bench)
    bench.set_defaults(run=commands.bench)

    planner = subs.add_parser(
        "plan", help="predict step time, bytes and memory of every way to divide a model over GPUs"
    )
    plan.add_arguments(planner)
    planner.set_defaults(run=plan.run)

    demo = subs.add_parser("demo", help="train a small hybrid model on real text and write a report")
    demo.add_argument("--corpus", default="stdlib", help="stdlib (no download) or english; default: %(default)s")
    demo.add_argument(
        "--run-dir", default="runs/demo", metavar="DIR", help="default: %(default)s; replaced if it is there"
    )
    demo.add_argument("--seconds", type=float, metavar="S", help="how long to train (default: 150, smoke: 8)")
    demo.add_argument("--smoke", action="store_true", help="a small version of everything, in well under a minute")
    demo.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    _json_flag(demo)
    demo.set_defaults(run=commands.demo)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0; 1 after an error, told in one line on standard error; 130 after an interrupt. (argparse itself exits with 2.)
    """
    arguments = build_parser().parse_args(argv)
    try:
        if arguments.threads is not None:
            import torch

            if arguments.threads < 1:
                raise ValueError(f"--threads: got {arguments.threads}, want at least 1")
            torch.set_num_threads(arguments.threads)
        arguments.run(arguments)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print("foldscan: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read us has gone
        return 1
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, ArithmeticError) as error:
        if os.environ.get("FOLDSCAN_TRACEBACK"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"foldscan: error: {message}", file=sys.stderr)
        return 1
