"""The configuration: round trips, and every wrong field is refused by its name."""

import math
from pathlib import Path

import pytest
from foldscan.models import FormatError, HybridConfig

GOOD = {"pattern": "M*-E", "vocab_size": 64, "hidden_size": 32}


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_files_round_trip(tmp_path: Path, suffix: str) -> None:
    config = HybridConfig(
        **GOOD,
        rope_theta=5e5,
        sliding_window=7,
        eos_token_id=[1, 2],
        time_step_limit=(1e-3, 4.0),
        router_score="sigmoid",
        router_bias=True,
        num_experts=8,
        router_groups=4,
        router_groups_topk=2,
        moe_latent_size=16,
    )
    file = tmp_path / f"config.{suffix}"
    config.save(file)
    assert HybridConfig.load(file) == config
    endless = HybridConfig(**GOOD)
    endless.save(file)
    assert HybridConfig.load(file).time_step_limit == (0.0, math.inf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": ""}, "pattern: got ''"),
        ({"pattern": "MX"}, "pattern: got 'MX'"),
        ({"vocab_size": 0}, "vocab_size: got 0"),
        ({"hidden_size": -3}, "hidden_size: got -3"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"mamba_num_groups": 3}, "mamba_num_groups: got 3"),
        ({"conv_kernel": 5}, "conv_kernel: got 5"),
        ({"time_step_min": 0.0}, "time_step_min"),
        ({"time_step_limit": (2.0, 1.0)}, "time_step_limit"),
        ({"num_kv_heads": 3}, "num_kv_heads: got 3"),
        ({"head_dim": 512}, "head_dim: got 512"),
        ({"head_dim": 7, "rope_theta": 1e4}, "rope_theta"),
        ({"sliding_window": 0}, "sliding_window: got 0"),
        ({"mlp_activation": "tanh"}, "mlp_activation: got 'tanh'"),
        ({"mlp_activation": "silu", "mlp_bias": True}, "mlp_bias"),
        ({"experts_per_token": 9}, "experts_per_token: got 9"),
        ({"router_score": "max"}, "router_score: got 'max'"),
        ({"router_groups": 2}, "router_groups"),
        ({"router_groups": 3, "router_groups_topk": 1}, "router_groups: got 3"),
        ({"router_bias_rate": 0.1}, "router_bias_rate"),
        ({"shared_expert_intermediate_size": -1}, "shared_expert_intermediate_size"),
    ],
)
def test_impossible_values_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HybridConfig(**{**GOOD, **change})


def test_fields_of_absent_layers_do_not_matter() -> None:
    HybridConfig(pattern="--", vocab_size=8, hidden_size=8, mamba_num_groups=3, num_kv_heads=3, experts_per_token=99)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "'colour' is not a field"),
        ({"vocab_size": "64"}, "'vocab_size' is '64', want int"),
        ({"vocab_size": True}, "'vocab_size' is True, want int"),
        ({"tie_embeddings": 1}, "'tie_embeddings' is 1, want bool"),
        ({"rope_theta": "big"}, "'rope_theta'"),
        ({"time_step_limit": 3}, "'time_step_limit'"),
        ({"model_type": "gpt2"}, "'model_type' is 'gpt2'"),
        ({"pattern": "Q"}, "field pattern: got 'Q'"),
    ],
)
def test_wrong_file_fields_are_named_with_their_file(change: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        HybridConfig.from_dict({**GOOD, **change}, "x/config.json")
    assert "x/config.json" in str(caught.value)


def test_missing_fields_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="'hidden_size' is missing"):
        HybridConfig.from_dict({"pattern": "M", "vocab_size": 8})
    for name, text in (("a.json", "{"), ("b.yaml", "a: ["), ("c.json", "[1]"), ("d.yaml", "- 1")):
        (tmp_path / name).write_text(text)
        with pytest.raises(FormatError, match=name.replace(".", r"\.")):
            HybridConfig.load(tmp_path / name)
    with pytest.raises(FormatError, match="no such file"):
        HybridConfig.load(tmp_path / "missing.json")


def test_derived_sizes() -> None:
    config = HybridConfig(**GOOD, mamba_num_heads=6, mamba_head_dim=10, mamba_num_groups=3, state_size=5)
    assert (config.mamba_inner_size, config.mamba_conv_dim, config.num_layers) == (60, 60 + 2 * 3 * 5, 4)
    assert config.stop_ids == frozenset()
    config.eos_token_id = 3
    assert config.stop_ids == {3}
