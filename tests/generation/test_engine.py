"""Decoding equals the full forward bit for bit, and text depends on prompt and seed alone."""

from typing import Any

import pytest
import torch
from foldscan import ops
from foldscan.data import Tokenizer
from foldscan.generation import Engine
from foldscan.models import HybridConfig, HybridLM
from foldscan.nn import HybridCache

SHAPE: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 48,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_num_groups": 2,
    "state_size": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "rope_theta": 1e4,
    "intermediate_size": 64,
    "num_experts": 4,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 24,
    "initializer_range": 0.25,
}
PATTERNS = ["M", "*", "-", "E", "M*-EM"]


def make(pattern: str, **changes: Any) -> HybridLM:
    torch.manual_seed(0)
    return HybridLM(HybridConfig(**{**SHAPE, "pattern": pattern, **changes})).eval()


def feed(model: HybridLM, cache: HybridCache, slots: list[int], pieces: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of new tokens of several sequences through the cache."""
    step = cache.step(slots, [len(p) for p in pieces])
    rows = model.logits(model(torch.cat(pieces), cu_seqlens=step.cu_seqlens, cache=step))
    return list(rows.split([len(p) for p in pieces]))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@torch.no_grad()
def test_prefill_and_steps_equal_the_full_forward(pattern: str, precision: str) -> None:
    """Prompts of lengths around the scan's chunk and the attention's block, in one batch, then token by token."""
    model = make(pattern)
    if precision == "bf16":
        model.bfloat16()
    prompts, steps = [1, 2, 63, 64, 65, 128], 4
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(0, 257, (n + steps,), generator=generator) for n in prompts]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        want = [model.logits(model(s)) for s in sequences]
        cache = model.new_cache(len(prompts), 160, dtype=torch.bfloat16 if precision == "autocast" else None)
        slots = [cache.allocate() for _ in prompts]
        got = [[rows] for rows in feed(model, cache, slots, [s[:n] for s, n in zip(sequences, prompts)])]
        for k in range(steps):
            # the order of the batch changes at every step
            order = [(i + k) % len(prompts) for i in range(len(prompts))]
            pieces = [sequences[i][prompts[i] + k : prompts[i] + k + 1] for i in order]
            for i, rows in zip(order, feed(model, cache, [slots[i] for i in order], pieces)):
                got[i].append(rows)
    for i, length in enumerate(prompts):
        assert torch.equal(torch.cat(got[i]), want[i]), f"prompt of {length}"


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("page_size", [16, 64])
@torch.no_grad()
def test_any_cut_of_a_sequence_is_the_same_bits(pattern: str, page_size: int) -> None:
    model = make(pattern)
    sequence = torch.randint(0, 257, (200,), generator=torch.Generator().manual_seed(2))
    want = model.logits(model(sequence))
    for cuts in ([64, 128], [1, 2, 3], [63, 65, 127, 129], [100], list(range(120, 200)), [0, 200]):
        cache = model.new_cache(1, 200, page_size=page_size)
        slot, rows = cache.allocate(), []
        for piece in sequence.tensor_split(cuts):
            rows += feed(model, cache, [slot], [piece])
        assert torch.equal(torch.cat(rows), want), cuts


PROMPTS = ["def add(a, b):", "x", "", "class Long:\n    " * 12, "import os\n"]


@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0}, {"top_k": 20, "top_p": 0.9}])
def test_alone_and_in_company_give_the_same_text(precision: str | None, sampling: dict[str, Any]) -> None:
    model, tokenizer = make("M*-E"), Tokenizer.raw_bytes()
    wide = Engine(model, tokenizer, precision=precision)
    narrow = Engine(model, tokenizer, precision=precision, max_batch=2, step_tokens=7)
    together = wide.generate(PROMPTS, 12, seed=5, **sampling)
    queued = narrow.generate(PROMPTS[::-1], 12, seed=5, **sampling)[::-1]
    for prompt, a, b in zip(PROMPTS, together, queued):
        alone = wide.generate([prompt], 12, seed=5, **sampling)[0]
        assert alone.token_ids == a.token_ids == b.token_ids == list(wide.stream(prompt, 12, seed=5, **sampling))
        assert a.text == alone.text and len(a.token_ids) == 12 and a.finish == "length"
    if sampling.get("temperature") != 0.0:
        assert wide.generate(PROMPTS, 12, seed=6, **sampling)[0].token_ids != together[0].token_ids


def test_seeds_draw_different_texts_of_one_prompt() -> None:
    engine = Engine(make("M"), Tokenizer.raw_bytes())
    texts = engine.generate(["a"] * 3, 10, seed=[1, 2, 1])
    assert texts[0].token_ids == texts[2].token_ids != texts[1].token_ids


def test_stops_end_a_sequence_and_are_cut() -> None:
    tokenizer = Tokenizer.raw_bytes()
    engine = Engine(make("M*"), tokenizer)
    free = engine.generate([[65, 66]], 30, seed=1)[0]
    assert len(free.token_ids) == 30 and free.finish == "length"
    stop = free.token_ids[7]
    first = free.token_ids.index(stop)
    cut = engine.generate([[65, 66]], 30, seed=1, stop=[stop])[0]
    assert (cut.token_ids, cut.finish) == (free.token_ids[:first], "stop")
    assert list(engine.stream([65, 66], 30, seed=1, stop=[stop])) == free.token_ids[:first]
    ascii_at = next(i for i, t in enumerate(free.token_ids) if 32 < t < 127)
    text = engine.generate([[65, 66]], 30, seed=1, stop=[chr(free.token_ids[ascii_at])])[0]
    assert text.finish == "stop" and text.text == tokenizer.decode(free.token_ids[:ascii_at])
    engine.model.config.eos_token_id = stop
    assert engine.generate([[65, 66]], 30, seed=1)[0].token_ids == free.token_ids[:first]


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_log_probabilities_are_those_of_a_trainer(precision: str | None) -> None:
    model = make("M*E")
    engine = Engine(model, precision=precision)
    found = engine.generate([[1, 2, 3], [4] * 70], 6, seed=2, return_logprobs=True)
    for one in found:
        ids = torch.tensor(one.prompt_ids + one.token_ids)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            hidden = model(ids)
            stats = ops.linear_logprob(hidden[:-1], model.head_weight, ids[1:])
        assert one.logprobs == stats.logp[len(one.prompt_ids) - 1 :].tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.generate(["text"]), "prompts: got text"),
        (lambda e: e.generate([[]]), "prompts: got ids"),
        (lambda e: e.generate([[257]]), "prompts: got ids"),
        (lambda e: e.generate([[1]], 0), "max_new_tokens: got 0"),
        (lambda e: e.generate([[1]], seed=[1, 2]), "seed: got 2"),
        (lambda e: e.generate([[1]], stop=["x"]), "stop: got text"),
        (lambda e: e.generate([[1]], top_p=2.0), "top_p"),
        (lambda e: Engine(e.model, max_batch=0), "max_batch"),
        (lambda e: Engine(e.model, precision="fp8"), "precision: got 'fp8'"),
    ],
)
def test_bad_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(Engine(make("-")))


def test_no_prompts_no_texts() -> None:
    engine = Engine(make("-"))
    assert engine.generate([]) == []
    with pytest.raises(TypeError, match="one text"):
        engine.generate("abc")
