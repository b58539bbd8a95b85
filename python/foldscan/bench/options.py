"""Command-line options of the benchmark; imports nothing heavy, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``foldscan bench`` and ``benchmarks/run.py``."""
    parser.add_argument("--op", action="append", help="only these ops (repeatable)")
    parser.add_argument("--shape", help="comma-separated sizes instead of the standard shapes (with one --op)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append")
    parser.add_argument("--mode", choices=["fwd", "fwd+bwd"], action="append")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--against", choices=["peers", "none"], default="peers")
    parser.add_argument("--rounds", type=int, default=25, help="at most this many rounds; default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="time for each implementation of a row; default: %(default)s"
    )
    parser.add_argument("--memory", action="store_true", help="measure extra memory too, each in a fresh process")
    parser.add_argument(
        "--out", type=Path, help="keep the rows in this file too, in place of older ones of the same case"
    )
    parser.add_argument("--list", action="store_true", help="list ops and shapes")
