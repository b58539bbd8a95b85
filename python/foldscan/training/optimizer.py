"""AdamW with decay on matrices only, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from foldscan.models import FormatError, HybridLM
from foldscan.training.config import TrainConfig

_STATE = ("exp_avg", "exp_avg_sq", "step")


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay acts on a parameter: projections and embeddings, not norms, biases, convolutions nor the
    state-space parameters."""
    return parameter.dim() >= 2 and "conv1d" not in name


def make_optimizer(named: Sequence[tuple[str, torch.nn.Parameter]], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) over named parameters, or parts of them, in two groups."""
    groups = [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": config.weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=True,
    )


def optimizer_tensors(model: HybridLM, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state by parameter name: ``<name>/exp_avg`` and so on."""
    out = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            out[f"{name}/{key}"] = value.detach().clone()
    return out


def restore_optimizer(
    model: HybridLM, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], where: object
) -> None:
    """The inverse of `optimizer_tensors`.

    Raises:
        FormatError: a tensor is missing or misshapen; nothing is changed.
    """
    found = {}
    for name, parameter in model.named_parameters():
        state = {}
        for key in _STATE:
            value = tensors.get(f"{name}/{key}")
            want = () if key == "step" else tuple(parameter.shape)
            if value is None or tuple(value.shape) != want:
                got = "missing" if value is None else f"of shape {tuple(value.shape)}"
                raise FormatError(f"{where}: tensor '{name}/{key}' is {got}, want shape {want}")
            state[key] = value.clone()
        found[parameter] = state
    for parameter, state in found.items():
        optimizer.state[parameter] = state
