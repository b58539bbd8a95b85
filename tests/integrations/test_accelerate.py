"""`accelerate`: every family computes what it computed before, in every way it is called, and `restore` undoes it."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_budget

transformers = pytest.importorskip("transformers", reason="needs transformers")

from foldscan.integrations.transformers import accelerate, restore  # noqa: E402
from integrations.families import FAMILIES, build  # noqa: E402

every_family = pytest.mark.parametrize("family", sorted(FAMILIES))
IDS = torch.randint(2, 61, (2, 37), generator=torch.Generator().manual_seed(5))


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert want.abs().max() > 0.5
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def logits(model: Any, **kwargs: Any) -> torch.Tensor:
    return model(**({"input_ids": IDS} | kwargs)).logits


@every_family
def test_logits_and_generated_tokens_stay(family: str) -> None:
    model = build(family)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        return logits(model), model.generate(IDS, max_new_tokens=24, do_sample=False)

    before = run()
    report = accelerate(model)
    after = run()
    close(after[0], before[0])
    assert torch.equal(after[1], before[1])
    assert not report.left, str(report)
    assert before[1][:, 37:].unique().numel() > 3, "a model that repeats itself shows nothing"


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(family: str, side: str) -> None:
    model = build(family)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    hidden = slice(0, 9) if side == "left" else slice(28, 37)
    ids[0, hidden], mask[0, hidden] = 0, 0

    def run() -> list[torch.Tensor]:
        found = [logits(model, input_ids=ids, attention_mask=mask)[mask.bool()]]
        if side == "left":
            found.append(model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False))
        return found

    before = run()
    accelerate(model)
    after = run()
    close(after[0], before[0])
    assert all(torch.equal(a, b) for a, b in zip(after[1:], before[1:]))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"bamba"}))  # whose positions begin at zero in each piece
def test_prefill_in_pieces(family: str) -> None:
    model = build(family)

    @torch.no_grad()
    def run() -> torch.Tensor:
        cache, found = None, []
        for piece in IDS.split([2, 20, 1, 1, 13], dim=1):
            out = model(piece, use_cache=True, **({} if cache is None else {cache_name: cache}))
            cache = out[cache_name]
            found.append(out.logits)
        return torch.cat(found, 1)

    cache_name = "cache_params" if family in ("mamba", "mamba2") else "past_key_values"
    before = run()
    accelerate(model)
    close(run(), before)


@every_family
def test_gradients_of_a_training_step(family: str) -> None:
    model = build(family).train()

    def step() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    before = step()
    accelerate(model)
    after = step()
    assert after.keys() == before.keys()
    for name, want in before.items():
        scale = want.abs().max().item()
        torch.testing.assert_close(after[name], want, atol=1e-4 * scale + 1e-6, rtol=1e-3, msg=name)


@every_family
def test_restore_gives_back_the_same_bits(family: str) -> None:
    model = build(family)
    before = logits(model)
    classes = [type(m) for m in model.modules()]
    config = model.config.to_json_string()
    implementations = model.config._attn_implementation, model.config._experts_implementation
    state = {name: t.data_ptr() for name, t in model.state_dict().items()}
    accelerate(model)
    assert {name: t.data_ptr() for name, t in model.state_dict().items()} == state
    assert model.config.to_json_string() == config
    assert [type(m) for m in model.modules()] != classes
    logits(model)
    restore(model)
    assert [type(m) for m in model.modules()] == classes
    assert (model.config._attn_implementation, model.config._experts_implementation) == implementations
    assert torch.equal(logits(model), before)


@every_family
def test_bfloat16_is_as_good(family: str) -> None:
    truth = build(family, torch.float64)
    want = logits(truth)
    model = build(family, torch.bfloat16)
    eager = logits(model)
    accelerate(model)
    assert_budget(family, logits(model), eager, want)


@every_family
def test_copies_pickles_and_saved_models(family: str, tmp_path: Path) -> None:
    model = build(family)
    plain = logits(model)
    accelerate(model)
    fast = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), fast)
    restore(twin)
    assert torch.equal(logits(twin), plain)
    assert torch.equal(logits(model), fast)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(logits(loaded), fast)
    model.save_pretrained(tmp_path)
    assert "foldscan" not in (tmp_path / "config.json").read_text()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    close(logits(again), plain)  # not the same bits: where a tensor lies in memory decides how torch multiplies it


@pytest.mark.parametrize("family", ["nemotron_h", "mamba2", "mixtral"])
def test_compiled(family: str) -> None:
    model = build(family)
    accelerate(model)
    want = logits(model)
    torch._dynamo.reset()
    close(logits(torch.compile(model, backend="aot_eager")), want)


@pytest.mark.parametrize(
    "family,extra",
    [
        ("mixtral", {"sliding_window": 8}),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}),
    ],
)
def test_sliding_windows(family: str, extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family, **extra)
    mask = torch.ones_like(IDS)
    mask[1, :6] = 0

    def run() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        padded = logits(model, attention_mask=mask)[mask.bool()]
        return logits(model), padded, model.generate(IDS, attention_mask=mask, max_new_tokens=12, do_sample=False)

    before = run()
    accelerate(model)
    _forbid_sdpa(monkeypatch)
    after = run()
    close(after[0], before[0])
    close(after[1], before[1])
    assert torch.equal(after[2], before[2])


def _forbid_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("sdpa was called")

    monkeypatch.setattr("foldscan.integrations.transformers.attention.sdpa_attention_forward", refuse)


def test_padding_needs_no_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mixtral")
    accelerate(model)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    _forbid_sdpa(monkeypatch)
    model.generate(IDS, attention_mask=mask, max_new_tokens=3, do_sample=False)
    with pytest.raises(AssertionError, match="sdpa"):
        mask[0, 20] = 0  # a hole is no padding
        logits(model, attention_mask=mask)


@pytest.mark.parametrize("family", ["mixtral", "nemotron_h", "falcon_h1"])
def test_masks_that_are_not_causal(family: str) -> None:
    model = build(family)
    holes = torch.ones_like(IDS)
    holes[0, 11:14] = 0
    both_ways = torch.zeros(2, 1, 37, 37)
    both_ways[..., :20, 20:] = torch.finfo(torch.float32).min
    documents = torch.cat([torch.arange(20), torch.arange(17)]).expand(2, -1)

    def run() -> list[torch.Tensor]:
        found = [logits(model, attention_mask=holes)[holes.bool()]]
        if family == "mixtral":
            found.append(logits(model, attention_mask=both_ways))
            found.append(logits(model, position_ids=documents, use_cache=False))
        return found

    before = run()
    accelerate(model)
    for after, want in zip(run(), before, strict=True):
        close(after, want)


def test_dropout_draws_the_same_numbers() -> None:
    model = build("mixtral", attention_dropout=0.3).train()

    def run() -> torch.Tensor:
        torch.manual_seed(7)
        return logits(model)

    before = run()
    accelerate(model)
    close(run(), before)
    assert not torch.allclose(logits(model), before, atol=1e-3)


def test_eager_attention_keeps_returning_weights() -> None:
    model = build("qwen3_moe", attn_implementation="eager")
    with torch.no_grad():
        before = model(IDS, output_attentions=True)
        report = accelerate(model)
        after = model(IDS, output_attentions=True)
    assert "eager" in str(report)
    close(after.logits, before.logits)
    for got, want in zip(after.attentions, before.attentions, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen3_moe", "granite", "nemotron_h"])
def test_recorded_outputs(family: str) -> None:
    model = build(family)
    wanted = {"output_hidden_states": True, "output_router_logits": True}
    with torch.no_grad():
        before = model(IDS, **wanted)
        accelerate(model)
        after = model(IDS, **wanted)
    assert len(before.hidden_states) > 1
    for got, want in zip(after.hidden_states, before.hidden_states, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    for got, want in zip(after.router_logits or (), before.router_logits or (), strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "nemotron_h"])
def test_static_cache(family: str) -> None:
    model = build(family)

    def run() -> torch.Tensor:
        return model.generate(
            IDS, max_new_tokens=9, do_sample=False, cache_implementation="static", disable_compile=True
        )

    before = run()
    accelerate(model)
    assert torch.equal(run(), before)


@torch.no_grad()
def test_caches_that_grow_in_place_are_cropped_and_shared() -> None:
    """Two shallow copies of a cache go on with different tokens, one is cropped; neither sees the other's."""
    model = build("mixtral")

    def run() -> list[torch.Tensor]:
        cache = model(IDS[:1, :20], use_cache=True).past_key_values
        found = [model(IDS[:1, 20:21], past_key_values=cache).logits]
        twin = copy.copy(cache)
        twin.layers = [copy.copy(layer) for layer in cache.layers]
        for token in (21, 22, 23):
            found.append(model(IDS[:1, token : token + 1], past_key_values=cache).logits)
            found.append(model(IDS[1:, token : token + 1], past_key_values=twin).logits)
        cache.crop(-2)
        found.append(model(IDS[1:, 30:33], past_key_values=cache).logits)
        found.append(model(IDS[:1, 30:31], past_key_values=copy.deepcopy(cache)).logits)
        found.append(model(IDS[:1, 31:32], past_key_values=cache).logits)
        return found

    before = run()
    accelerate(model)
    for after, want in zip(run(), before, strict=True):
        close(after, want)


def test_beam_search_reorders_caches() -> None:
    model = build("nemotron_h")

    def run() -> torch.Tensor:
        return model.generate(IDS, max_new_tokens=9, num_beams=3, do_sample=False)

    before = run()
    accelerate(model)
    assert torch.equal(run(), before)


@pytest.mark.parametrize(
    "extra",
    [
        {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4},
        {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 3},
        {"norm_topk_prob": False, "moe_latent_size": 16},
        {"use_bias": True, "use_conv_bias": False},
        {"mlp_hidden_act": "silu"},
        {"mlp_hidden_act": "gelu_new"},
    ],
    ids=["groups", "groups-not-covered", "latent", "biases", "silu", "tanh-gelu"],
)
def test_variants_of_nemotron_h(extra: dict[str, Any]) -> None:
    model = build("nemotron_h", **extra)
    before = logits(model)
    report = accelerate(model)
    close(logits(model), before)
    assert bool(report.left) == (extra.get("topk_group") == 1 or extra.get("mlp_hidden_act") == "gelu_new")


@pytest.mark.parametrize("extra", [{"mamba_rms_norm": True}, {"mamba_norm_before_gate": True, "mamba_rms_norm": True}])
def test_variants_of_falcon_h1(extra: dict[str, Any]) -> None:
    model = build("falcon_h1", **extra)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        return logits(model), model.generate(IDS, max_new_tokens=12, do_sample=False)

    before = run()
    accelerate(model)
    after = run()
    close(after[0], before[0])
    assert torch.equal(after[1], before[1])


def test_clamped_steps() -> None:
    """Full sequences clamp dt, single steps do not: both as transformers has it."""
    model = build("mamba2", time_step_limit=(0.1, 0.2))

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        out = model.generate(IDS, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
        return logits(model), torch.stack(out.logits)

    before = run()
    accelerate(model)
    for got, want in zip(run(), before):
        close(got, want)
    close(before[0], logits(build("mamba2", time_step_limit=(0.1, 0.2))))
    assert not torch.allclose(before[0], logits(build("mamba2")), atol=1e-2)


def test_a_hook_inside_a_fused_module_still_runs() -> None:
    model = build("bamba")
    accelerate(model)
    seen = []
    handle = model.model.layers[0].feed_forward.up_proj.register_forward_hook(lambda *_: seen.append(1))
    logits(model)
    assert seen
    handle.remove()


def test_other_dtypes_are_left_alone() -> None:
    model = build("nemotron_h", torch.float64)
    before = logits(model)
    report = accelerate(model)
    assert torch.equal(logits(model), before)
    assert not any("Mixer" in what for what, _ in report.replaced)
    assert any("float64" in why for _, why in report.left)


def test_twice_and_other_models() -> None:
    model = build("mixtral")
    assert accelerate(model).replaced
    assert not accelerate(model).replaced
    restore(model)
    restore(model)
    assert accelerate(model).replaced
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    llama = transformers.LlamaForCausalLM(config).eval()
    before = logits(llama)
    report = accelerate(llama)
    torch.testing.assert_close(logits(llama), before, atol=1e-4, rtol=1e-4)
    assert {what for what, _ in report.replaced} == {"Linear", "attention implementation sdpa"}
    for call in (accelerate, restore):
        with pytest.raises(TypeError, match="model: got Linear"):
            call(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
