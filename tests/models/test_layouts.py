"""Formats of transformers as patterns of our blocks: logits both ways, on disk and in memory; what cannot be said."""

from pathlib import Path
from typing import Any

import pytest
import torch
from foldscan import ops
from foldscan.generation import Engine
from foldscan.models import CannotExpress, FormatError, HybridConfig, HybridLM, load_pretrained, save_pretrained

transformers = pytest.importorskip("transformers", reason="needs transformers")

from integrations.families import build  # noqa: E402

IDS = torch.randint(2, 61, (2, 37), generator=torch.Generator().manual_seed(5))
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", {}, "*-*-"),
    "qwen2": ("qwen2", {}, "*-*-"),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "*-*-"),
    "qwen3": ("qwen3", {}, "*-*-"),
    "mixtral": ("mixtral", {}, "*E*E"),
    "mixtral-window": ("mixtral", {"sliding_window": 8, "tie_word_embeddings": True}, "*E*E"),
    "qwen3_moe": ("qwen3_moe", {}, "*E*-"),
    "qwen3_moe-raw": ("qwen3_moe", {"norm_topk_prob": False}, "*E*-"),
    "mamba2": ("mamba2", {}, "MM"),
    "mamba2-clamped": ("mamba2", {"time_step_limit": (0.05, 0.2), "use_bias": True, "use_conv_bias": False}, "MM"),
    "bamba": ("bamba", {}, "M-*-M-"),
    "falcon_h1": ("falcon_h1", {}, "P-P-"),
    "falcon_h1-norm": ("falcon_h1", {"mamba_rms_norm": True, "attention_bias": True}, "P-P-"),
    "falcon_h1-gate-inside": ("falcon_h1", {"mamba_rms_norm": True, "mamba_norm_before_gate": False}, "P-P-"),
    "falcon_h1-tied": ("falcon_h1", {"tie_word_embeddings": True}, "P-P-"),
}
every_model = pytest.mark.parametrize("name", list(MODELS))


@torch.no_grad()
def logits(model: HybridLM) -> torch.Tensor:
    return model.logits(model(IDS))


@torch.no_grad()
def their_logits(model: Any) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


@every_model
def test_both_ways(name: str, tmp_path: Path) -> None:
    family, extra, pattern = MODELS[name]
    theirs = build(family, **extra)
    want = their_logits(theirs)
    assert want.abs().max() > 0.5
    theirs.save_pretrained(tmp_path / "theirs")
    for source in (theirs, tmp_path / "theirs"):
        ours = load_pretrained(source)
        assert ours.config.pattern == pattern
        torch.testing.assert_close(logits(ours), want, atol=1e-4, rtol=1e-4)
    assert save_pretrained(ours, tmp_path / "ours", format=family) == family
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(their_logits(again), want, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(load_pretrained(tmp_path / "ours")), logits(ours))


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mixtral", "qwen3_moe", "bamba", "falcon_h1", "falcon_h1-norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_has_the_bits_of_the_whole_sequence(name: str, dtype: torch.dtype) -> None:
    """The plan of single tokens and the modules, alone and in company, through the cache and without."""
    family, extra, _ = MODELS[name]
    model = load_pretrained(build(family, **extra), dtype=dtype)
    prompts = [IDS[0, :20].tolist(), IDS[1, :7].tolist(), IDS[1, 9:18].tolist()]
    found = Engine(model).generate(prompts, 9, temperature=0.7, seed=3, return_logprobs=True)
    for prompt, generation in zip(prompts, found):
        ids = torch.tensor(prompt + generation.token_ids)
        with torch.no_grad():
            hidden = model(ids[:-1])[len(prompt) - 1 :]
            whole = ops.linear_logprob(hidden, model.head_weight, ids[len(prompt) :]).logp
            alone = Engine(model).generate([prompt], 9, temperature=0.7, seed=3, return_logprobs=True)[0]
        assert (alone.token_ids, alone.logprobs) == (generation.token_ids, generation.logprobs)
        assert torch.equal(torch.tensor(generation.logprobs), whole)


def test_the_plan_gives_the_bits_of_the_modules() -> None:
    from foldscan.generation.plan import DecodePlan

    torch.manual_seed(0)
    config = HybridConfig(
        "M*-EP-E",
        vocab_size=61,
        hidden_size=32,
        initializer_range=0.2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        attention_bias=True,
        qk_norm=True,
        rope_theta=1e4,
        rotary_dim=8,
        sliding_window=9,
        state_size=16,
        shared_expert_intermediate_size=24,
        router_score="sigmoid",
        router_bias=True,
    )
    for dtype in (torch.float32, torch.bfloat16):
        model = HybridLM(config).to(dtype).eval()
        caches = [model.new_cache(2, 40) for _ in range(2)]
        with torch.no_grad():
            plan = DecodePlan(model)
        with torch.inference_mode():
            for cache in caches:
                model(IDS[:, :11], cache=cache)
            for token in range(11, 16):
                want = model(IDS[:, token : token + 1], cache=caches[0])[:, 0]
                got = plan.hidden(IDS[:, token].tolist(), caches[1].step([0, 1], [1, 1]))
                assert torch.equal(got, want)
                assert torch.equal(plan.logits(got), model.logits(want))


@pytest.mark.parametrize(
    "format,changes,match",
    [
        ("qwen2", {}, "attention_bias"),
        ("qwen3", {}, "qk_norm"),
        ("llama", {"qk_norm": True}, "qk_norm"),
        ("llama", {"rotary_dim": 8}, "rotary_dim"),
        ("llama", {"pattern": "*E"}, "pattern"),
        ("mixtral", {"pattern": "*E"}, "router_pre_softmax"),
        ("mixtral", {"pattern": "*E*-"}, "pattern"),
        ("qwen3_moe", {"pattern": "*E", "qk_norm": True, "moe_activation": "relu2"}, "moe_activation"),
        ("mamba2", {}, "pattern"),
        ("mamba2", {"pattern": "M", "mamba_norm": False}, "mamba_norm"),
        ("bamba", {"pattern": "M*"}, "pattern"),
        ("bamba", {"pattern": "M-", "sliding_window": 3}, "sliding_window"),
        ("falcon_h1", {"pattern": "M-"}, "pattern"),
        ("nemotron_h", {"pattern": "P"}, "pattern"),
    ],
)
def test_what_a_format_has_no_words_for(format: str, changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"pattern": "*-", "rope_theta": 1e4, "mlp_activation": "silu", "moe_activation": "silu"}
    config = HybridConfig(**(fields | changes), vocab_size=11, hidden_size=64, num_heads=4, head_dim=16)
    with pytest.raises(CannotExpress, match=f"{match}: got"):
        save_pretrained(HybridLM(config), tmp_path / "x", format=format)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "family,extra,match",
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "layer_types"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_type"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act"),
        ("bamba", {"mlp_bias": True}, "mlp_bias"),
        ("falcon_h1", {"projectors_bias": True}, "projectors_bias"),
    ],
)
def test_what_we_have_no_words_for(family: str, extra: dict[str, Any], match: str) -> None:
    with pytest.raises(FormatError, match=f"field '{match}'"):
        load_pretrained(build(family, **extra))
