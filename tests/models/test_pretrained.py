"""Checkpoints both ways with transformers, sharded or not, and errors that name file and tensor."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from foldscan.models import CannotExpress, FormatError, HybridConfig, HybridLM, load_pretrained, save_pretrained
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers", reason="needs transformers")

IDS = torch.randint(0, 97, (2, 45), generator=torch.Generator().manual_seed(0))


def nemotron(**changes: Any) -> Any:
    """A small random NemotronH with all kinds of layers and weights large enough for the layers to matter."""
    torch.manual_seed(3)
    config = transformers.NemotronHConfig(
        **{
            "vocab_size": 97,
            "hidden_size": 40,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "intermediate_size": 56,
            "ssm_state_size": 24,
            "mamba_num_heads": 6,
            "mamba_head_dim": 20,
            "n_groups": 2,
            "chunk_size": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 32,
            "initializer_range": 0.15,
            **changes,
        }
    )
    model = transformers.NemotronHForCausalLM(config).eval()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "e_score_correction_bias" in name or name.endswith(("norm.weight", "conv1d.bias")):
                value.add_(0.2 * torch.randn_like(value))
    return model


def logits(model: HybridLM) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(IDS))


def hf_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "routed_scaling_factor": 2.5},
        {"norm_topk_prob": False, "moe_latent_size": 16},
        {"use_bias": True, "use_conv_bias": False, "n_groups": 6},
        {"layers_block_type": ["mlp", "full_attention", "mlp"], "mlp_bias": True},
    ],
    ids=["plain", "grouped-router", "latent", "biases", "no-mamba"],
)
def test_nemotron_h_both_ways(tmp_path: Path, changes: dict[str, Any]) -> None:
    theirs = nemotron(**changes)
    theirs.save_pretrained(tmp_path / "hf")
    want = hf_logits(theirs)
    ours = load_pretrained(tmp_path / "hf")
    assert want.abs().max() > 0.5
    torch.testing.assert_close(logits(ours), want, atol=1e-4, rtol=0)
    assert save_pretrained(ours, tmp_path / "back") == "nemotron_h"
    again = transformers.NemotronHForCausalLM.from_pretrained(tmp_path / "back").eval()
    torch.testing.assert_close(hf_logits(again), want, atol=1e-4, rtol=0)
    assert torch.equal(logits(load_pretrained(tmp_path / "back")), logits(ours))


def test_the_clamp_of_dt_is_a_real_difference() -> None:
    theirs = nemotron(layers_block_type=["linear_attention"])
    with torch.no_grad():
        theirs.model.layers[0].mixer.dt_bias.fill_(-9.0)  # softplus about 1e-4, below time_step_min
    want = hf_logits(theirs)
    clamped = load_pretrained(theirs)
    assert clamped.config.time_step_limit == (1e-3, math.inf)
    torch.testing.assert_close(logits(clamped), want, atol=1e-4, rtol=0)
    trained = load_pretrained(theirs, time_step_limit=(0.0, math.inf))
    assert (logits(trained) - want).abs().max() > 2e-4


@pytest.mark.parametrize(("version", "limit"), [("4.48.0.dev0", (0.0, math.inf)), ("5.1.0", (1e-3, math.inf))])
def test_the_clamp_is_that_of_the_writer(tmp_path: Path, version: str, limit: tuple[float, float]) -> None:
    nemotron(layers_block_type=["linear_attention"]).save_pretrained(tmp_path)
    edit_config(tmp_path, transformers_version=version, time_step_limit=[0.0, math.inf])
    assert load_pretrained(tmp_path).config.time_step_limit == limit


def test_a_model_in_memory_is_read_like_its_directory(tmp_path: Path) -> None:
    theirs = nemotron()
    theirs.save_pretrained(tmp_path / "hf")
    assert torch.equal(logits(load_pretrained(theirs)), logits(load_pretrained(tmp_path / "hf")))


@pytest.mark.parametrize("tied", [True, False])
def test_llama_both_ways(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=36,
        intermediate_size=50,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        rope_theta=1000.0,
        tie_word_embeddings=tied,
        initializer_range=0.15,
        attention_bias=True,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    ours = load_pretrained(tmp_path / "hf")
    assert ours.config.pattern == "*-*-*-"
    torch.testing.assert_close(logits(ours), hf_logits(theirs), atol=1e-4, rtol=0)
    assert save_pretrained(ours, tmp_path / "back") == "llama"
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back").eval()
    torch.testing.assert_close(hf_logits(again), hf_logits(theirs), atol=1e-5, rtol=0)


def small(**changes: Any) -> HybridLM:
    torch.manual_seed(5)
    shape: dict[str, Any] = {
        "pattern": "M*-E",
        "vocab_size": 97,
        "hidden_size": 24,
        "mamba_num_heads": 2,
        "mamba_head_dim": 8,
        "state_size": 8,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 8,
        "rope_theta": 1e4,
        "intermediate_size": 20,
        "mlp_activation": "silu",
        "num_experts": 3,
        "moe_intermediate_size": 12,
        "moe_activation": "silu",
    }
    return HybridLM(HybridConfig(**{**shape, **changes})).eval()


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 3000])
def test_our_own_format_keeps_every_bit(tmp_path: Path, max_shard_bytes: int) -> None:
    model = small(tie_embeddings=True)
    assert save_pretrained(model, tmp_path / "m", max_shard_bytes=max_shard_bytes) == "foldscan_hybrid"
    again = load_pretrained(tmp_path / "m")
    assert again.config == model.config
    assert torch.equal(logits(again), logits(model))
    files = len(list((tmp_path / "m").glob("*.safetensors")))
    assert files == 1 if max_shard_bytes > 3000 else files > 2


def test_bf16_weights_load_as_asked(tmp_path: Path) -> None:
    model = small().bfloat16()
    save_pretrained(model, tmp_path / "m")
    assert load_file(tmp_path / "m" / "model.safetensors")["norm_f.weight"].dtype == torch.bfloat16
    assert load_pretrained(tmp_path / "m").head_weight.dtype == torch.float32
    same = load_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize(
    ("changes", "format", "field"),
    [
        ({}, "nemotron_h", "rope_theta"),
        ({"rope_theta": None}, "nemotron_h", "mlp_activation"),
        ({"rope_theta": None, "mlp_activation": "relu2"}, "nemotron_h", "moe_activation"),
        ({"pattern": "M", "time_step_limit": (0.0, 1.0)}, "nemotron_h", "time_step_limit"),
        ({}, "llama", "pattern"),
        ({"pattern": "*-", "mlp_activation": "relu2"}, "llama", "mlp_activation"),
        ({"pattern": "*-", "rope_theta": None}, "llama", "rope_theta"),
    ],
)
def test_what_a_format_cannot_say_is_refused(tmp_path: Path, changes: dict, format: str, field: str) -> None:
    with pytest.raises(CannotExpress, match=field):
        save_pretrained(small(**changes), tmp_path / "m", format=format)
    assert not (tmp_path / "m").exists()


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(folder: Path, name: str, value: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit_config(f, model_type="gpt2"), r"config\.json: field 'model_type' is 'gpt2'"),
        (lambda f: edit_config(f, hidden_size="wide"), r"config\.json: field 'hidden_size' is 'wide'"),
        (lambda f: edit_config(f, layers_block_type=["conv"]), r"config\.json: field 'layers_block_type'"),
        (lambda f: edit_config(f, n_group=4, topk_group=2), r"config\.json: field 'topk_group' is 2, want 1"),
        (lambda f: edit_config(f, mlp_hidden_act="gelu"), r"config\.json: field 'mlp_hidden_act' is 'gelu'"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json: not valid JSON"),
        (lambda f: (f / "config.json").unlink(), r"config\.json: no such file"),
        (lambda f: (f / "model.safetensors").unlink(), r"neither model\.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04pickle"), "not a safetensors file"),
        (lambda f: edit_weights(f, "lm_head.weight", None), "tensor 'lm_head.weight' is missing"),
        (
            lambda f: edit_weights(f, "backbone.layers.1.mixer.experts.7.up_proj.weight", None),
            "tensor 'backbone.layers.1.mixer.experts.7.up_proj.weight' is missing",
        ),
        (
            lambda f: edit_weights(f, "backbone.norm_f.weight", torch.ones(3)),
            r"tensor 'backbone.norm_f.weight' has shape \(3,\), want \(40,\)",
        ),
        (
            lambda f: edit_weights(f, "backbone.norm_f.weight", torch.ones(40, dtype=torch.int64)),
            "'backbone.norm_f.weight' has dtype",
        ),
        (lambda f: edit_weights(f, "backbone.surprise", torch.ones(1)), "'backbone.surprise' has no place"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    nemotron().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(FormatError, match=message) as caught:
        load_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_broken_index_is_named(tmp_path: Path) -> None:
    save_pretrained(small(), tmp_path / "m", max_shard_bytes=3000)
    index = tmp_path / "m" / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    good["weight_map"]["ghost"] = next(iter(good["weight_map"].values()))
    index.write_text(json.dumps(good))
    with pytest.raises(FormatError, match="tensor 'ghost' is missing, though the index lists it"):
        load_pretrained(tmp_path / "m")
    good["weight_map"]["ghost"] = "../../etc/passwd"
    index.write_text(json.dumps(good))
    with pytest.raises(FormatError, match="want a file name"):
        load_pretrained(tmp_path / "m")


def test_an_existing_directory_is_kept_unless_told(tmp_path: Path) -> None:
    save_pretrained(small(), tmp_path / "m")
    with pytest.raises(FileExistsError):
        save_pretrained(small(), tmp_path / "m")
    save_pretrained(small(hidden_size=32), tmp_path / "m", overwrite=True)
    assert load_pretrained(tmp_path / "m").config.hidden_size == 32


def test_nonsense_sources_are_refused() -> None:
    with pytest.raises(TypeError, match="want a path or a transformers model"):
        load_pretrained(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="format: got 'onnx'"):
        save_pretrained(small(), "nowhere", format="onnx")
