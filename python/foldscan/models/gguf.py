"""GGUF files of the llama architecture: configuration, dequantised weights, and the tokenizer's raw tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from foldscan.models.config import HybridConfig
from foldscan.models.files import FormatError

_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FIXED = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ImportError("reading GGUF files needs the gguf package: pip install 'foldscan[data]'") from None
    if not path.is_file():
        raise FormatError(f"{path}: no such file")
    try:
        return GGUFReader(str(path))
    except Exception as error:  # the reader raises whatever its parsing runs into
        raise FormatError(f"{path}: not a GGUF file ({error})") from None


def _field(reader: Any, name: str, path: Path, default: Any = None) -> Any:
    field = reader.get_field(name)
    if field is None:
        if default is None:
            raise FormatError(f"{path}: field {name!r} is missing")
        return default
    return field.contents()


def _interleaved_to_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a q or k projection from GGUF's interleaved rotary order to the rotate-half order."""
    return weight.reshape(heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def read_gguf(path: Path) -> tuple[HybridConfig, dict[str, torch.Tensor]]:
    """(configuration, fp32 tensors by their transformers names) of a llama-architecture GGUF file.

    Raises:
        FormatError: not GGUF, another architecture, a missing field, a tensor nobody knows.
        ImportError: the ``gguf`` package is not installed.
    """
    reader = _open(path)
    architecture = _field(reader, "general.architecture", path)
    if architecture != "llama":
        raise FormatError(f"{path}: field 'general.architecture' is {architecture!r}, want 'llama'")
    from gguf.quants import dequantize

    heads = int(_field(reader, "llama.attention.head_count", path))
    kv_heads = int(_field(reader, "llama.attention.head_count_kv", path, heads))
    tensors: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        if parts[0] == "blk" and len(parts) == 4 and parts[2] in _BLOCK:
            name = f"model.layers.{parts[1]}.{_BLOCK[parts[2]]}.{parts[3]}"
        elif len(parts) == 2 and parts[0] in _FIXED:
            name = f"{_FIXED[parts[0]]}.{parts[1]}"
        else:
            raise FormatError(f"{path}: tensor {tensor.name!r} is not one of a llama model")
        try:
            value = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        except NotImplementedError as error:
            raise FormatError(f"{path}: tensor {tensor.name!r}: {error}") from None
        if parts[-2] in ("attn_q", "attn_k"):
            value = _interleaved_to_halves(value, heads if parts[-2] == "attn_q" else kv_heads)
        tensors[name] = value
    hidden = int(_field(reader, "llama.embedding_length", path))
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None:
        raise FormatError(f"{path}: tensor 'token_embd.weight' is missing")
    config = HybridConfig.from_dict(
        {
            "pattern": "*-" * int(_field(reader, "llama.block_count", path)),
            "vocab_size": embedding.shape[0],
            "hidden_size": hidden,
            "tie_embeddings": "lm_head.weight" not in tensors,
            "norm_eps": float(_field(reader, "llama.attention.layer_norm_rms_epsilon", path)),
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": int(_field(reader, "llama.rope.dimension_count", path, hidden // heads)),
            "rope_theta": float(_field(reader, "llama.rope.freq_base", path, 10000.0)),
            "intermediate_size": int(_field(reader, "llama.feed_forward_length", path)),
            "mlp_activation": "silu",
            "max_position_embeddings": int(_field(reader, "llama.context_length", path)),
            "bos_token_id": int(_field(reader, "tokenizer.ggml.bos_token_id", path)),
            "eos_token_id": int(_field(reader, "tokenizer.ggml.eos_token_id", path)),
        },
        path,
    )
    return config, tensors


def read_gguf_vocabulary(path: Path) -> tuple[dict[str, int], list[tuple[str, str]], list[str], str]:
    """(vocabulary, merges, special tokens, kind of pre-tokenizer) of a GGUF file with a GPT-2 style tokenizer.

    Raises:
        FormatError: another kind of tokenizer, or a missing field.
    """
    reader = _open(path)
    model = _field(reader, "tokenizer.ggml.model", path)
    if model != "gpt2":
        raise FormatError(f"{path}: field 'tokenizer.ggml.model' is {model!r}, want 'gpt2'")
    tokens = _field(reader, "tokenizer.ggml.tokens", path)
    kinds = _field(reader, "tokenizer.ggml.token_type", path)
    merges = []
    for merge in _field(reader, "tokenizer.ggml.merges", path):
        left, space, right = merge.partition(" ")
        if not space:
            raise FormatError(f"{path}: field 'tokenizer.ggml.merges' has {merge!r}, want two parts")
        merges.append((left, right))
    control = 3  # gguf.TokenType.CONTROL
    specials = [token for token, kind in zip(tokens, kinds) if kind == control]
    pre = str(_field(reader, "tokenizer.ggml.pre", path, "default"))
    return {token: index for index, token in enumerate(tokens)}, merges, specials, pre
