"""Learning-rate schedules, as functions of the step alone."""

from __future__ import annotations

import math

from foldscan.training.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of optimizer step ``step`` (from 0).

    Linear warm-up to ``lr`` over ``warmup_steps``; then a half cosine to ``min_lr`` (arXiv:1608.03983), or constant with a
    linear decay to ``min_lr`` over the last ``decay_fraction`` of all steps (WSD, arXiv:2404.06395), or constant.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    span = config.lr - config.min_lr
    if config.schedule == "cosine":
        length = max(1, config.steps - config.warmup_steps)
        done = min(1.0, (step - config.warmup_steps) / length)
        return config.min_lr + span * 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "wsd":
        length = max(1, round(config.steps * config.decay_fraction))
        done = max(0.0, min(1.0, (step - (config.steps - length)) / length))
        return config.lr - span * done
    return config.lr
