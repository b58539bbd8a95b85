"""Our kernels against plain eager PyTorch: the same model, the same run, turn by turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from foldscan.data import PackedSampler
from foldscan.generation import Engine
from foldscan.models import HybridLM
from foldscan.ops import backend
from foldscan.training.evaluate import autocast


def alternate(
    ours: Callable[[], int], eager: Callable[[], int], rounds: int, patience: float = 20.0
) -> tuple[float, float]:
    """Median tokens a second of two functions that return how many tokens they handled, called in turns after one
    warm-up each; fewer rounds, but one at least, when ``patience`` seconds are over."""
    rates: tuple[list[float], list[float]] = ([], [])
    begun = time.perf_counter()
    for number in range(rounds + 1):
        if number > 1 and time.perf_counter() - begun > patience:
            break
        for function, found in zip((ours, eager), rates):
            started = time.perf_counter()
            tokens = function()
            if number:
                found.append(tokens / (time.perf_counter() - started))
    return statistics.median(rates[0]), statistics.median(rates[1])


def _once(function: Callable[[], int]) -> float:
    function()
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def training_speed(model: HybridLM, sampler: PackedSampler, precision: str, rounds: int) -> tuple[float, float, str]:
    """(ours, eager, eager's precision): tokens a second of loss and gradients, no optimizer. The eager side runs in the
    precision that it is faster in on this machine."""
    batch = sampler.next()

    def step(name: str, how: str) -> int:
        model.zero_grad(set_to_none=True)
        with backend("native" if name == "native" else "eager"):
            with autocast(how):
                loss = model.loss(batch.input_ids, batch.labels, cu_seqlens=batch.cu_seqlens)
            loss.backward()
        return batch.num_tokens

    eager_precision = min(("bf16", "fp32"), key=lambda how: _once(lambda: step("eager", how)))
    fast, eager = alternate(lambda: step("native", precision), lambda: step("eager", eager_precision), rounds)
    model.zero_grad(set_to_none=True)
    return fast, eager, eager_precision


@torch.no_grad()
def generation_speed(model: HybridLM, prompts: list[list[int]], new_tokens: int, rounds: int) -> tuple[float, float]:
    """(ours, eager): generated tokens a second of a batch, prompts included in the time. Both in fp32."""
    engine = Engine(model)

    def run(name: str) -> int:
        with backend("native" if name == "native" else "eager"):
            found = engine.generate(prompts, new_tokens, temperature=0.0)
        return sum(len(g.token_ids) for g in found)

    return alternate(lambda: run("native"), lambda: run("eager"), rounds)
