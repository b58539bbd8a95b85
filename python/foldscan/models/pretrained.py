"""`load_pretrained` and `save_pretrained`: model directories of transformers and our own, and GGUF files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foldscan.models.config import HybridConfig
from foldscan.models.files import FormatError, atomic_directory, read_json, want_field, write_json
from foldscan.models.gguf import read_gguf
from foldscan.models.hybrid_lm import HybridLM
from foldscan.models.layouts import LAYOUTS, CannotExpress, Layout
from foldscan.models.pieces import PieceFolder
from foldscan.models.tensors import TensorFolder, write_tensors

AVERAGE = "ema/"  # before a parameter's name: its moving average in a training checkpoint


def _layout(model_type: str, where: object) -> Layout:
    if model_type not in LAYOUTS:
        raise FormatError(f"{where}: field 'model_type' is {model_type!r}, want one of {', '.join(LAYOUTS)}")
    return LAYOUTS[model_type]


@torch.no_grad()
def _fill(
    model: HybridLM,
    layout: Layout,
    names: Iterable[str],
    get: Callable[[str], torch.Tensor],
    where: Callable[[str], object],
    values: dict[str, Any],
) -> None:
    """Copy tensors into the model, every one exactly once, refusing what is missing, left over or misshapen."""
    available = set(names)
    used: set[str] = set()
    for name, target in model.state_dict(keep_vars=True).items():
        alternatives = layout.sources(name, model.config)
        source = next((s for s in alternatives if available.issuperset(s.names)), None)
        if source is None:
            absent = next(n for n in alternatives[0].names if n not in available)
            raise FormatError(f"{where(absent)}: tensor {absent!r} is missing")
        parts = list(target) if source.stacked else [target]
        for part, part_name in zip(parts, source.names):
            value = get(part_name)
            if source.half is not None and value.dim() > 1:
                value = value.chunk(2, dim=-2)[source.half]
            if value.shape != part.shape:
                raise FormatError(
                    f"{where(part_name)}: tensor {part_name!r} has shape {tuple(value.shape)}, want {tuple(part.shape)}"
                )
            if not value.is_floating_point():
                raise FormatError(f"{where(part_name)}: tensor {part_name!r} has dtype {value.dtype}, want a float")
            part.copy_(layout.read_tensor(name, value, values))
        used.update(source.names)
    extra = sorted(n for n in available - used if not layout.ignores(n))
    if model.config.tie_embeddings:
        extra = [n for n in extra if n != "lm_head.weight"]
    if extra:
        raise FormatError(f"{where(extra[0])}: tensor {extra[0]!r} has no place in the model ({len(extra)} such)")


def load_pretrained(
    source: str | os.PathLike[str] | nn.Module,
    *,
    dtype: torch.dtype = torch.float32,
    time_step_limit: tuple[float, float] | None = None,
    average: bool = False,
) -> HybridLM:
    """A `HybridLM` with the weights of a directory, a GGUF file, or a transformers model in memory.

    Understood are ``config.json`` with ``model_type`` nemotron_h, llama, qwen2, qwen3, mixtral, qwen3_moe, mamba2,
    bamba, falcon_h1 or our own, beside safetensors (whole or sharded); and GGUF files of the llama architecture (or a
    directory that holds one), which are dequantised. Pickled weights are never read.

    Args:
        source: where to load from.
        dtype: of the weights in memory.
        time_step_limit: overrides the clamp of dt of a Mamba-2 model. By default it is what the writer of the files
            computes: ``config.time_step_limit``, but for files of transformers 5, which clamps at ``time_step_min``
            from below instead (docs/models.md).
        average: instead of the weights take their moving averages, which a training checkpoint holds when the run's
            ``ema_decay`` is not 0; what is no parameter (a router's bias) is as it is.

    Raises:
        FormatError: a malformed file; the message names the file and the field or tensor.
        ValueError: ``average`` of what is not a directory.
    """
    if average and (isinstance(source, nn.Module) or not Path(source).is_dir()):
        raise ValueError(f"average: got True for {source}, want a training checkpoint's directory")
    if isinstance(source, nn.Module):
        return _from_module(source, dtype, time_step_limit)
    path = Path(source)
    ggufs = [path] if path.suffix == ".gguf" else sorted(path.rglob("*.gguf")) if path.is_dir() else []
    if ggufs and not (path / "config.json").is_file():
        config, tensors = read_gguf(ggufs[0])
        model = HybridLM(config, init=False).to(dtype)
        _fill(model, LAYOUTS["llama"], tensors, tensors.__getitem__, lambda _: ggufs[0], {})
        return model.eval()
    file = path / "config.json"
    values = read_json(file)
    layout = _layout(want_field(values, "model_type", str, file), file)
    config = _limited(layout.read_config(values, file), time_step_limit)
    folder = TensorFolder(path)
    model = HybridLM(config, init=False).to(dtype)
    get = _averages(path, model, folder.get) if average else folder.get
    _fill(model, layout, folder.names(), get, folder.where, values)
    return model.eval()


def _averages(folder: Path, model: HybridLM, otherwise: Callable[[str], torch.Tensor]) -> Callable[[str], torch.Tensor]:
    """How to get the moving average of a parameter, or a tensor that is none."""
    files, parameters = PieceFolder(folder), {name for name, _ in model.named_parameters()}
    absent = sorted(name for name in parameters if AVERAGE + name not in files.pieces)
    if absent:
        raise FormatError(f"{folder}: tensor {AVERAGE + absent[0]!r} is missing: was it trained with an ema_decay?")
    return lambda name: files.read(AVERAGE + name) if name in parameters else otherwise(name)


def _limited(config: HybridConfig, limit: tuple[float, float] | None) -> HybridConfig:
    if limit is not None:
        config.time_step_limit = (float(limit[0]), float(limit[1]))
        config.validate()
    return config


def _from_module(source: nn.Module, dtype: torch.dtype, limit: tuple[float, float] | None) -> HybridLM:
    hf_config: Any = getattr(source, "config", None)
    where = f"{type(source).__name__}.config"
    if not hasattr(hf_config, "to_dict"):
        raise TypeError(f"source: got {type(source).__name__}, want a path or a transformers model")
    values = hf_config.to_dict()
    layout = _layout(str(values.get("model_type")), where)
    model = HybridLM(_limited(layout.read_config(values, where), limit), init=False).to(dtype)
    state = source.state_dict()
    _fill(model, layout, state, state.__getitem__, lambda _: type(source).__name__, values)
    return model.eval()


def save_pretrained(
    model: HybridLM,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = 4 << 30,
) -> str:
    """Write ``config.json`` and safetensors, the whole directory atomically.

    Args:
        format: a ``model_type`` that `load_pretrained` understands, or None for the first that can express the model.
        overwrite: replace an existing directory.
        max_shard_bytes: larger models are split.

    Returns:
        The format written.

    Raises:
        CannotExpress: (a ValueError) the wanted format has no words for the model; names the field.
        FileExistsError: ``path`` exists and ``overwrite`` is false.
    """
    if format is not None and format not in LAYOUTS:
        raise ValueError(f"format: got {format!r}, want one of {', '.join(LAYOUTS)}")
    for model_type in [format] if format else list(LAYOUTS):
        layout = LAYOUTS[model_type]
        try:
            values = layout.write_config(model.config)
            break
        except CannotExpress:
            if format:
                raise
    dtype = str(model.embeddings.weight.dtype).removeprefix("torch.")
    if "dtype" in values:
        values["dtype"] = dtype
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        source = layout.sources(name, model.config)[0]
        tensors.update(zip(source.names, tensor) if source.stacked else [(source.names[0], tensor)])
    if model.config.tie_embeddings and model_type == "nemotron_h":
        tensors["lm_head.weight"] = model.head_weight  # the format has no tied head
    with atomic_directory(path, overwrite=overwrite) as work:
        write_json(work / "config.json", values)
        write_tensors(work, tensors, max_shard_bytes=max_shard_bytes)
    return model_type
