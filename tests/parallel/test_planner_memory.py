"""Memory of the fullest rank: published figures, counting by hand, and what must grow with what."""

from dataclasses import replace

import pytest
from foldscan.parallel.planner import Mapping, ModelShape, Workload, load_model, memory, plan
from foldscan.parallel.planner.calibration import calibration
from foldscan.parallel.planner.memory import activations, block_activations
from foldscan.parallel.planner.step_volumes import stage_parameters

PAIRS = [  # GB of dense and of expert states, without and with folding
    ("mixtral-8x22b", {"gpus": 128, "tp": 2, "etp": 2, "ep": 4, "pp": 8}, (2.5, 25.4)),
    ("mixtral-8x22b", {"gpus": 128, "tp": 2, "ep": 8, "pp": 8}, (2.5, 25.4)),
    ("mixtral-8x22b-g8t8", {"gpus": 128, "tp": 2, "etp": 2, "ep": 8, "pp": 8}, (2.5, 19.0)),
    ("mixtral-8x22b-g8t8", {"gpus": 128, "tp": 4, "ep": 8, "pp": 8}, (1.5, 25.4)),
    ("qwen2-57b-a14b", {"gpus": 64, "tp": 2, "etp": 2, "ep": 4, "pp": 4}, (7.6, 18.5)),
    ("qwen2-57b-a14b", {"gpus": 64, "tp": 2, "ep": 4, "pp": 4}, (7.6, 27.7)),
    ("llama3-8x70b", {"gpus": 256, "tp": 8, "etp": 8, "ep": 4, "pp": 8}, (2.0, 31.7)),
    ("llama3-8x70b", {"gpus": 256, "tp": 8, "ep": 8, "pp": 16}, (1.3, 42.3)),
]


@pytest.mark.parametrize(("name", "sizes", "gigabytes"), PAIRS)
def test_states_of_the_published_mappings(name: str, sizes: dict, gigabytes: tuple[float, float]) -> None:
    found = memory(load_model(name), Mapping(**sizes), Workload())
    assert (round(found.dense / 1e9, 1), round(found.experts / 1e9, 1)) == gigabytes


def test_every_published_run_fits_and_the_full_replica_does_not() -> None:
    """The 18 mappings that ran in the paper fit in 80 GB; tensor and expert parallelism without a pipeline ran out."""
    rows = calibration()
    assert all(row.prediction.fits for row in rows if row.published is not None)
    out = {row.prediction.mapping.method: row.prediction.fits for row in rows if row.published is None}
    assert out["tp-ep-dp"] is False
    # The paper ran out of memory with FSDP as well; sharded states alone do not explain it (docs/planner.md).
    assert out["fsdp"] is True


TINY = ModelShape("tiny", "*E*E", hidden=32, vocab=64, heads=4, kv_heads=2, head_dim=8, experts=4, top_k=2, ffn=48)


def test_tiny_model_by_hand() -> None:
    mapping, work = Mapping(4, tp=2, ep=2), Workload(gbs=2, seq=16)
    found = memory(TINY, mapping, work)
    dense = (2 * (2 * 32 * (32 + 16)) + 2 * 32 * 64) / 2
    expert = 2 * 3 * 32 * 48 * 4 / 2
    assert stage_parameters(TINY, mapping) == (dense, expert)
    assert found.dense == dense * (6 + 12 / 2) and found.experts == expert * (6 + 12 / 2)
    tokens, rows = 8, 16
    attention = 2 * (2 * tokens * 32) + 2 * 16 * (32 + 16 + 16 + 32) / 2
    experts = 2 * (2 * tokens * 32) + 2 * rows * (32 + 3 * 48) + 4 * tokens * 4
    assert block_activations(TINY, "*", mapping, work) == attention
    assert block_activations(TINY, "E", mapping, work) == experts
    assert found.activations == 2 * (attention + experts) + 6 * 16 * 64 / 2
    assert found.buffers == 4 * rows * 32
    assert found.total == found.dense + found.experts + found.activations + found.buffers


def test_blocks_of_a_hybrid_by_hand() -> None:
    model = ModelShape(
        "hybrid", "M-", hidden=32, vocab=64, mlp_ffn=40, gated_mlp=False, mamba_heads=4, mamba_head_dim=8, state=16
    )
    mapping, work = Mapping(2), Workload(gbs=2, seq=128)
    projected, channels = 2 * 32 + 2 * 16 + 4, 32 + 2 * 16
    scan = 4 * 128 * 32 + 2 * 128 * (projected + channels + 2 * 32) + 4 * 128 * 32 * 16 / 128
    assert block_activations(model, "M", mapping, work) == scan
    assert block_activations(model, "-", mapping, work) == 4 * 128 * 32 + 2 * 128 * 2 * 40
    assert memory(model, mapping, work).experts == 0 == memory(model, mapping, work).buffers


def in_flight(pp: int, chunks: int, microbatches: int) -> int:
    """Most chunks alive on the first stage: warm-up of interleaved 1F1B as its order of calls has it, then one more."""
    warm_up = (pp - 1) * 2 + (chunks - 1) * pp if chunks > 1 else pp - 1
    alive = most = 0
    forwards = list(range(microbatches * chunks))
    for done, _ in enumerate(forwards):
        alive += 1
        most = max(most, alive)
        if done >= warm_up:
            alive -= 1
    return most


@pytest.mark.parametrize("vpp", [1, 7])
@pytest.mark.parametrize("gbs", [16, 256])
def test_micro_batches_in_flight(vpp: int, gbs: int) -> None:
    model, mapping = replace(load_model("mixtral-8x22b"), vocab=1), Mapping(128, tp=2, ep=8, pp=8)
    work = Workload(gbs=gbs, vpp=vpp)
    layer = block_activations(model, "*", mapping, work) + block_activations(model, "E", mapping, work)
    expected = layer * 7 / vpp * in_flight(8, vpp, gbs // 8)
    assert activations(model, mapping, work) == pytest.approx(expected, rel=1e-5)  # one row of logits beside it


def test_last_stage_has_the_logits_and_fewest_micro_batches() -> None:
    """Two stages of a layer, a chunk each: two micro-batches in flight on the first, one and the logits on the last."""
    mapping, work = Mapping(2, pp=2), Workload(gbs=8, seq=16, vpp=1)
    layer = block_activations(TINY, "*", mapping, work) + block_activations(TINY, "E", mapping, work)
    logits = 6 * 16 * 2000
    assert logits > layer
    assert activations(replace(TINY, vocab=2000), mapping, work) == layer + logits
    assert activations(replace(TINY, vocab=1), mapping, work) == 2 * layer


def test_experts_without_a_gate_keep_one_projection_less() -> None:
    mapping, work = Mapping(2, ep=2), Workload(gbs=8, seq=16)
    gated = block_activations(replace(TINY, shared_ffn=40), "E", mapping, work)
    plain = block_activations(replace(TINY, shared_ffn=40, gated_experts=False), "E", mapping, work)
    assert gated - plain == 2 * (16 * 2 * 48 + 16 * 40)


def test_skew_is_the_peak_of_expert_rows() -> None:
    model, mapping = load_model("qwen3-30b-a3b"), Mapping(64, ep=8)
    even, skewed = memory(model, mapping, Workload()), memory(model, mapping, Workload(skew=5.1))
    rows = 4096 * 8
    assert skewed.buffers == pytest.approx(5.1 * even.buffers)
    grown = 48 * 4.1 * rows * 2 * (2048 + 3 * 768)
    assert skewed.activations - even.activations == pytest.approx(grown)
    assert (skewed.dense, skewed.experts) == (even.dense, even.experts)


def test_fsdp_shards_everything_but_the_layer_at_work() -> None:
    model, mapping = load_model("mixtral-8x22b"), Mapping(128, tp=2, etp=2, ep=8, method="fsdp-ep")
    found = memory(model, mapping, Workload())
    dense, expert = stage_parameters(model, mapping)
    assert found.dense == dense * 18 / 64 and found.experts == expert * 18 / 8
    layer = 2 * 6144 * (6144 + 1024) / 2 + 3 * 6144 * 16384 * 8 / 16
    assert found.buffers == pytest.approx(4 * 2048 * 2 * 2 * 6144 + 8 * layer)


@pytest.mark.parametrize("limit", [30e9, 45e9, 60e9])
def test_no_ranked_mapping_is_over_the_limit(limit: float) -> None:
    free = plan("mixtral-8x22b-g8t8", gpus=128, memory_limit=1e15)
    found = plan("mixtral-8x22b-g8t8", gpus=128, memory_limit=limit)
    assert all(p.memory.total <= limit and p.fits for p in found)
    inside = [p for p in free if p.memory.total <= limit]
    assert [p.mapping for p in found] == [p.mapping for p in inside]
    assert free[0].memory.total > limit  # so the limit decided


def test_more_micro_batch_needs_more() -> None:
    model, mapping = load_model("mixtral-8x7b"), Mapping(32, ep=8, pp=4)
    one, two = (memory(model, mapping, Workload(gbs=64, mbs=mbs, vpp=1)) for mbs in (1, 2))
    assert two.activations == pytest.approx(2 * one.activations)
    whole = memory(replace(model, pattern="*E" * 16), mapping, Workload(gbs=64, vpp=1))
    assert whole.experts == one.experts / 2
