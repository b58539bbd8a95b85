"""Whole models: prefill and decoding of transformers, of the same model after `accelerate`, and of our own `Engine`.

    python benchmarks/models.py                                        all, with benchmarks/results/models.jsonl
    python benchmarks/models.py --model nemotron_h --dtype bfloat16 --rounds 3

Weights are random, the shapes those of small siblings of Nemotron-H and Qwen3-MoE. Every round runs all three, one
after another, on one prompt; prefill ends with the first token, decoding feeds one token at a time, greedily.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from foldscan.bench.driver import circumstances, keep
from foldscan.generation import Engine
from foldscan.integrations.transformers import accelerate, restore
from foldscan.models import load_pretrained

RESULTS = Path(__file__).parent / "results" / "models.jsonl"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Timed = tuple[float, float]
"""Seconds of the prefill; seconds a token of decoding."""


def nemotron_h() -> Any:
    """173 million parameters: 8 Mamba-2, 8 MLP and 2 attention layers."""
    kinds = {"M": "linear_attention", "-": "mlp", "*": "full_attention"}
    return transformers.NemotronHConfig(
        vocab_size=16384,
        hidden_size=1024,
        layers_block_type=[kinds[c] for c in "M-M-M*-M-M-M*-M-M-"],
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        mamba_num_heads=32,
        mamba_head_dim=64,
        n_groups=8,
        ssm_state_size=128,
        intermediate_size=4096,
        max_position_embeddings=8192,
    )


def qwen3_moe() -> Any:
    """279 million parameters, 61 million active: 3 layers of 64 experts, 8 a token."""
    return transformers.Qwen3MoeConfig(
        vocab_size=16384,
        hidden_size=1024,
        num_hidden_layers=3,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        moe_intermediate_size=384,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=8192,
    )


def mamba2() -> Any:
    """Mamba2-130M's shape."""
    return transformers.Mamba2Config(
        vocab_size=16384,
        hidden_size=768,
        num_hidden_layers=24,
        num_heads=24,
        head_dim=64,
        n_groups=1,
        state_size=128,
        tie_word_embeddings=True,
    )


def random_model(config: Any, dtype: torch.dtype) -> Any:
    """The same weights every time."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@torch.no_grad()
def run_transformers(model: Any, prompt: list[int], new: int) -> Timed:
    """Forward passes with a cache; `generate` would add to them."""
    began = time.perf_counter()
    out = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    prefilled = time.perf_counter()
    for _ in range(new - 1):
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    return prefilled - began, (time.perf_counter() - prefilled) / (new - 1)


def run_engine(engine: Engine, prompt: list[int], new: int) -> Timed:
    """The engine's public way, sampling included."""
    began = time.perf_counter()
    tokens = engine.stream(prompt, new, temperature=0.0)
    next(tokens)
    prefilled = time.perf_counter()
    count = sum(1 for _ in tokens)
    return prefilled - began, (time.perf_counter() - prefilled) / count


@torch.no_grad()
def engine_logits(engine: Engine, prompt: list[int]) -> torch.Tensor:
    """(V,) after the prompt."""
    return engine.model.logits(engine.model(torch.tensor(prompt))[-1]).float()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative RMSE."""
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


def interleave(ways: dict[str, Callable[[], Timed]], rounds: int) -> dict[str, list[Timed]]:
    """A round runs each way once; one round before those that count."""
    found: dict[str, list[Timed]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            timed = run()
            if number:
                found[name].append(timed)
    return found


def report(
    model: str, dtype: str, prompt: int, new: int, found: dict[str, list[Timed]], errors: dict[str, float], out: Path
) -> None:
    """Rows into the file, ratios onto the terminal."""
    about = {
        **circumstances(),
        "load": os.getloadavg()[0],
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
    }
    for index, mode in enumerate(("prefill", "decode")):
        rows = []
        for name, timed in found.items():
            times = sorted(1e3 * t[index] for t in timed)
            low, middle, high = (
                statistics.quantiles(times, n=5)[0],
                statistics.median(times),
                statistics.quantiles(times, n=5)[3],
            )
            rows.append(
                {
                    "op": "model",
                    "impl": name,
                    "shape": {"model": model, "prompt": prompt, "new": new},
                    "dtype": dtype,
                    "mode": mode,
                    "p20_ms": low,
                    "p50_ms": middle,
                    "p80_ms": high,
                    "rounds": len(times),
                    "tokens_s": 1e3 * (prompt if mode == "prefill" else 1) / middle,
                    "logits_error": errors.get(name),
                    **about,
                }
            )
        keep(out, rows)
        first = rows[0]
        ratios = ", ".join(
            f"{r['impl']} {r['tokens_s']:.1f} tok/s ({first['p50_ms'] / r['p50_ms']:.2f}x)" for r in rows
        )
        print(f"{model} {dtype} {mode}: {ratios}", flush=True)


def compare(name: str, dtype: str, prompt_length: int, new: int, rounds: int, out: Path) -> None:
    """One model in one dtype."""
    model = random_model({"nemotron_h": nemotron_h, "qwen3_moe": qwen3_moe}[name](), DTYPES[dtype])
    engine = Engine(load_pretrained(model, dtype=DTYPES[dtype]))
    prompt = torch.randint(0, model.config.vocab_size, (prompt_length,)).tolist()

    def plain() -> Timed:
        restore(model)
        return run_transformers(model, prompt, new)

    def fast() -> Timed:
        accelerate(model)
        return run_transformers(model, prompt, new)

    @torch.no_grad()
    def last_logits() -> torch.Tensor:
        return model(torch.tensor([prompt]), logits_to_keep=1).logits[0, -1].float()

    want = last_logits()
    accelerate(model)
    errors = {"accelerate": error(last_logits(), want), "engine": error(engine_logits(engine, prompt), want)}
    if max(errors.values()) > {"float32": 1e-3, "bfloat16": 0.1}[dtype]:
        raise RuntimeError(f"{name} {dtype}: logits disagree with transformers': {errors}")
    ways = {"transformers": plain, "accelerate": fast, "engine": lambda: run_engine(engine, prompt, new)}
    report(name, dtype, prompt_length, new, interleave(ways, rounds), errors, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["nemotron_h", "qwen3_moe"], action="append")
    parser.add_argument("--dtype", choices=list(DTYPES), action="append")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    for name in options.model or ["nemotron_h", "qwen3_moe"]:
        for dtype in options.dtype or list(DTYPES):
            compare(name, dtype, options.prompt, options.new, options.rounds, options.out)


if __name__ == "__main__":
    main()
