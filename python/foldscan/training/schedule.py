"""Learning-rate schedules, as functions of the step alone."""

from __future__ import annotations

import math

from foldscan.training.config import TrainConfig


def fraction_done(config: TrainConfig, step: int, seconds: float) -> float:
    """How much of a run is over, in [0, 1]: its steps, or its time where that is limited and further on."""
    by_time = seconds / config.max_seconds if config.max_seconds else 0.0
    return min(1.0, max(step / config.steps, by_time))


def is_due(config: TrainConfig, every: int, step: int, before: float, after: float) -> bool:
    """Whether something that happens every so many steps happens after step ``step`` (from 1).

    In a run that is limited in time it happens as often in all, at equal distances of the fraction done.

    Args:
        every: 0 for never.
        before, after: `fraction_done` before and after the step.
    """
    if not every:
        return False
    if not config.max_seconds:
        return step % every == 0
    count = max(1, config.steps // every)
    return int(after * count) > int(before * count)


def learning_rate(config: TrainConfig, step: int, seconds: float = 0.0) -> float:
    """The learning rate of optimizer step ``step`` (from 0), ``seconds`` into a run that is limited in time.

    Linear warm-up to ``lr`` over ``warmup_steps``; then a half cosine to ``min_lr`` (arXiv:1608.03983), or constant
    with a linear decay to ``min_lr`` over the last ``decay_fraction`` of all steps (WSD, arXiv:2404.06395), or just
    constant.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    span = config.lr - config.min_lr
    at = fraction_done(config, step, seconds) * config.steps
    if config.schedule == "cosine":
        length = max(1, config.steps - config.warmup_steps)
        done = min(1.0, max(0.0, at - config.warmup_steps) / length)
        return config.min_lr + span * 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "wsd":
        length = max(1, round(config.steps * config.decay_fraction))
        done = max(0.0, min(1.0, (at - (config.steps - length)) / length))
        return config.lr - span * done
    return config.lr
