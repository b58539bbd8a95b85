"""Enumeration against brute force, the ranking, advice, errors and files."""

from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import yaml
from foldscan.models import HybridConfig
from foldscan.parallel import FoldedMesh
from foldscan.parallel.planner import (
    Cluster,
    Constants,
    Mapping,
    ModelShape,
    NoMapping,
    Workload,
    check_mapping,
    compare,
    legal_mappings,
    load_cluster,
    load_constants,
    load_model,
    plan,
    predict,
    reasons,
    recommend,
    scale,
    standard_models,
)
from foldscan.parallel.planner.step_time import Machine

SMALL = ModelShape(
    "small", "*E" * 6, hidden=64, vocab=128, heads=12, kv_heads=4, head_dim=8, experts=6, top_k=2, ffn=24
)
MACHINE = Machine(load_cluster(), load_constants())


@cache
def every_mesh(gpus: int) -> dict[tuple[int, ...], FoldedMesh]:
    """Whatever FoldedMesh makes of any five sizes."""
    found = {}
    for sizes in product(range(1, gpus + 1), repeat=5):
        try:
            found[sizes] = FoldedMesh(gpus, **dict(zip(("tp", "cp", "ep", "etp", "pp"), sizes)))
        except ValueError:
            continue
    return found


def brute_force(gpus: int, gbs: int, seq: int, method: str) -> set[tuple[int, ...]]:
    """Every product of sizes, sifted by the rules in words."""
    found = set()
    for (tp, cp, ep, etp, pp), mesh in every_mesh(gpus).items():
        rules = [
            tp <= 8 and etp <= 8,
            12 % tp == 0 and 4 % tp == 0,
            6 % ep == 0 and 24 % etp == 0,
            6 % pp == 0 or (8 % pp == 0 and pp < 8),
            seq % (tp * cp * (2 if cp > 1 else 1)) == 0,
            gbs % mesh.dp == 0,
        ]
        if method != "folded":
            rules += [etp == tp, mesh.dp % ep == 0]
        if method in ("tp-ep-dp", "fsdp", "fsdp-ep"):
            rules.append(pp == 1)
        if method == "tp-ep-dp":
            rules.append(cp == 1)
        if method == "fsdp":
            rules.append(ep == 1)
        if all(rules):
            found.add((tp, cp, ep, etp, pp))
    return found


@pytest.mark.parametrize("gpus", [1, 6, 8])
@pytest.mark.parametrize("method", ["folded", "unfolded", "tp-ep-dp", "fsdp", "fsdp-ep"])
def test_enumeration_is_brute_force(gpus: int, method: str) -> None:
    listed = [(m.tp, m.cp, m.ep, m.etp, m.pp) for m in legal_mappings(SMALL, gpus, Workload(24, 48), [method])]
    assert len(set(listed)) == len(listed)
    assert set(listed) == brute_force(gpus, 24, 48, method)
    assert listed  # every method has a mapping of one rank for each


def test_strides_of_the_ep_group() -> None:
    folded = Mapping(64, tp=2, cp=2, ep=8)
    assert folded.ep_stride == 1 == FoldedMesh(64, tp=2, cp=2, ep=8).experts.strides["ep"]
    assert Mapping(64, tp=2, etp=2, cp=2, ep=8, method="unfolded").ep_stride == 4
    assert (folded.dp, folded.edp) == (16, 8)


def test_ranking_is_sorted_and_complete() -> None:
    ranked = plan("mixtral-8x22b", gpus=64, gbs=64, memory_limit=1e15, methods=("folded",))
    assert [p.seconds for p in ranked] == sorted(p.seconds for p in ranked)
    mappings = set(legal_mappings(load_model("mixtral-8x22b"), 64, Workload(64), ("folded",)))
    assert {p.mapping for p in ranked} == mappings
    best = min((predict(load_model("mixtral-8x22b"), m, Workload(64)) for m in mappings), key=lambda p: p.seconds)
    assert best.seconds == ranked[0].seconds
    assert sum(ranked[0].terms.values()) == ranked[0].seconds


def test_a_folded_mapping_that_needs_no_folding_is_listed_once() -> None:
    ranked = plan("mixtral-8x7b", gpus=32)
    key = [(m.tp, m.cp, m.ep, m.etp, m.pp) for m in (p.mapping for p in ranked) if m.cp == 1 and not m.sharded]
    assert len(set(key)) == len(key)
    # With both cp and ep the groups lie elsewhere: these are two mappings, though their sizes are the same.
    apart = {(m.method, m.tp, m.cp, m.ep, m.etp, m.pp) for m in (p.mapping for p in ranked)}
    both = [sizes[1:] for sizes in apart if sizes[0] == "unfolded" and sizes[2] > 1 and sizes[3] > 1]
    assert both and all(("folded", *sizes) in apart for sizes in both)
    twins = [p for p in ranked if p.mapping.method == "unfolded"]
    for twin in twins:
        m = twin.mapping
        if m.cp == 1:
            folded = predict(twin.model, replace(m, method="folded"), twin.work)
            assert folded.seconds == twin.seconds and folded.volumes == twin.volumes


def test_fewer_methods_are_never_better() -> None:
    every = plan("mixtral-8x22b-g8t8", gpus=128)
    unfolded = plan("mixtral-8x22b-g8t8", gpus=128, methods=("unfolded",))
    assert every[0].seconds < unfolded[0].seconds
    assert next(p for p in every if p.mapping.method == "unfolded").seconds == unfolded[0].seconds


def test_planning_is_deterministic() -> None:
    first, second = (plan("qwen2-57b-a14b", gpus=64, skew=2.6, dispatcher="auto") for _ in range(2))
    assert [p.to_dict() for p in first] == [p.to_dict() for p in second]


def test_reasons_name_the_terms_that_differ() -> None:
    ranked = plan("mixtral-8x22b-g8t8", gpus=128)
    model, work = ranked[0].model, ranked[0].work
    folded = predict(model, Mapping(128, tp=2, ep=8, pp=8), work)
    unfolded = predict(model, Mapping(128, tp=2, etp=2, ep=8, pp=8, method="unfolded"), work)
    text = compare(folded, unfolded)
    quicker = unfolded.seconds / folded.seconds - 1
    assert text.startswith(f"{quicker:.1%} quicker than unfolded tp2 cp1 dp8 pp8 ep8 etp2 edp1: saves ")
    saved = {t: unfolded.terms[t] - folded.terms[t] for t in folded.terms}
    assert f"{1e3 * saved['ETP']:.0f} ms of ETP" in text and f"{1e3 * saved['EP']:.0f} ms of EP" in text
    assert f"{1e3 * saved['bubble']:.3g} ms of bubble" in text and "spends" not in text  # DP's share is below 0.2 %
    assert f"spends {-1e3 * saved['DP']:.3g} ms more on DP" in compare(folded, unfolded, least=1e-4)
    biggest = max(saved, key=lambda term: saved[term])
    assert text.split("saves ")[1].split(",")[0].endswith(f"of {biggest}")
    assert len(reasons(ranked)) == 2 and str(ranked[1].mapping) in reasons(ranked)[0]
    assert "unfolded" in reasons(ranked)[1]


@pytest.mark.parametrize(
    ("name", "sizes", "chosen", "words"),
    [
        ("mixtral-8x22b-g8t8", {"gpus": 64}, "alltoall", "ep is 1"),
        ("mixtral-8x22b-g8t8", {"gpus": 64, "ep": 4}, "allgather", "EP 4 < K 8"),
        ("mixtral-8x22b-g8t8", {"gpus": 64, "ep": 8}, "dedup", "5.43 of 8 ranks"),
        ("mixtral-8x22b", {"gpus": 64, "ep": 8}, "alltoall", "EP 8, K 2"),
        ("qwen3-235b-a22b", {"gpus": 64, "ep": 16}, "dedup-node", "live on 1.99 of 2 nodes"),
        ("mixtral-8x22b", {"gpus": 64, "etp": 2, "ep": 8}, "dedup-node", "live on 1.57 of 2 nodes"),
        ("mixtral-8x22b", {"gpus": 64, "etp": 8, "ep": 8}, "alltoall", "spans 8 nodes, of which a token needs 2.00"),
    ],
)
def test_advice(name: str, sizes: dict, chosen: str, words: str) -> None:
    advice = recommend(load_model(name), Mapping(**sizes), Workload(), MACHINE)
    assert advice is not None and advice.dispatcher == chosen and words in advice.reason
    assert advice.seconds[chosen] * 0.9 <= min(advice.seconds.values())


@pytest.mark.parametrize("ep", [2, 4, 8, 16, 32])
def test_gathering_sends_less_exactly_below_k(ep: int) -> None:
    advice = recommend(load_model("qwen3-235b-a22b"), Mapping(64, ep=ep), Workload(), MACHINE)
    assert advice is not None
    gathered, copies, once = (advice.sent[name][0] for name in ("allgather", "alltoall", "dedup"))
    assert (gathered < copies) == (ep < 8) and once <= min(gathered, copies) * (1 + 1e-12)


def test_auto_takes_the_recommended_dispatcher() -> None:
    ranked = plan("qwen3-30b-a3b", gpus=64, dispatcher="auto")
    assert {p.dispatcher for p in ranked} == {"alltoall", "allgather", "dedup", "dedup-node"}
    assert all(p.advice and p.dispatcher == p.advice.dispatcher for p in ranked)
    assert ranked[0].seconds <= plan("qwen3-30b-a3b", gpus=64)[0].seconds


def test_dense_model_has_no_experts_to_fold() -> None:
    model = ModelShape("dense", "*-" * 4, hidden=256, vocab=1000, heads=8, kv_heads=8, head_dim=32, mlp_ffn=1024)
    ranked = plan(model, gpus=8, gbs=16, seq=128)
    assert len({p.mapping for p in ranked}) == len(ranked)
    for p in ranked:
        assert p.mapping.ep == 1 and p.advice is None and p.terms["experts"] == p.terms["EP"] == 0
        assert p.volumes["ep"].total.total == p.volumes["edp"].total.total == 0


def test_scale_over_gpu_counts() -> None:
    points = scale("mixtral-8x22b-g8t8", gpus=[8, 128, 1024], gbs=1024)
    assert points[0].folded is None and points[0].unfolded is None  # too large for eight
    for point in points[1:]:
        assert point.folded and point.unfolded and point.folded.mfu >= point.unfolded.mfu
        assert point.folded.seconds == plan("mixtral-8x22b-g8t8", gpus=point.gpus, gbs=1024)[0].seconds
    weak = scale("mixtral-8x22b-g8t8", gpus=[128, 256], gbs=[256, 512])
    assert [p.gbs for p in weak] == [256, 512]
    with pytest.raises(ValueError, match="gbs: got 1 values for 2 GPU counts"):
        scale("mixtral-8x22b", gpus=[1, 2], gbs=[1])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"gpus": 8, "tp": 3}, r"tp, cp, pp: got 3 x 1 x 1"),
        ({"gpus": 8, "method": "zero"}, "method: got 'zero', want one of folded"),
        ({"gpus": 8, "tp": 2, "method": "unfolded"}, "etp: got 1, want tp = 2"),
        ({"gpus": 8, "tp": 2, "etp": 2, "cp": 2, "ep": 4, "method": "unfolded"}, "ep: got 4, want a divisor of dp = 2"),
        ({"gpus": 8, "pp": 2, "method": "fsdp"}, "pp: got 2, want 1"),
        ({"gpus": 8, "cp": 2, "method": "tp-ep-dp"}, "cp: got 2, want 1"),
        ({"gpus": 8, "ep": 2, "method": "fsdp"}, "ep: got 2, want 1"),
    ],
)
def test_mappings_that_a_method_refuses(sizes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mapping(**sizes)


@pytest.mark.parametrize(
    ("sizes", "work", "message"),
    [
        ({"tp": 8}, {}, "tp: got 8, want a divisor of heads = 12"),
        ({"tp": 6}, {}, "tp: got 6, want a divisor of kv_heads = 4"),
        ({"ep": 4}, {}, "ep: got 4, want a divisor of experts = 6"),
        ({"etp": 16}, {}, "etp: got 16, want a divisor of ffn = 24"),
        ({"cp": 16}, {}, "tp x cp: got 32, want a divisor of seq = 48"),
        ({"tp": 2}, {"gbs": 12}, "dp x mbs: got 24, want a divisor of gbs = 12"),
        ({"pp": 16}, {}, "pp: got 16, want a divisor of 6 layers, or of 8"),
        ({"pp": 2}, {"vpp": 2}, "vpp: got 2, want a divisor of the 3 layers"),
    ],
)
def test_mappings_that_do_not_divide_the_model(sizes: dict, work: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_mapping(SMALL, Mapping(48, **sizes), Workload(**{"gbs": 48, "seq": 48, **work}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 8}, "gpus: no mapping of mixtral-8x22b to 8 GPUs fits in 80.0 GB; the smallest .* needs"),
        ({"gpus": 0}, "gpus: got 0, want a positive integer"),
        ({"gpus": 127}, "no legal mapping of mixtral-8x22b to 127 GPUs with 256 sequences"),
        ({"gpus": 128, "gbs": 0}, "gbs: got 0"),
        ({"gpus": 128, "skew": 0.5}, "skew: got 0.5, want max / mean, at least 1"),
        ({"gpus": 128, "dispatcher": "deepep"}, "dispatcher: got 'deepep'"),
        ({"gpus": 128, "context": "mesh"}, "context: got 'mesh'"),
        ({"gpus": 128, "methods": ("zero",)}, "method: got 'zero'"),
        ({"gpus": 128, "constants": "best"}, "constants: got 'best', want a YAML file or hand-set or fitted"),
        ({"gpus": 128, "cluster": "moon"}, "cluster: got 'moon', want a YAML file or h100"),
    ],
)
def test_plan_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        plan("mixtral-8x22b", **options)
    assert isinstance(caught.value, NoMapping) == ("no mapping" in message or "no legal mapping" in message)


def test_fitted_constants_are_the_default() -> None:
    assert load_constants() == load_constants("fitted") != load_constants("hand-set")


@pytest.mark.parametrize("kind", ["cluster", "constants"])
def test_hardware_and_constants_from_files(tmp_path: Path, kind: str) -> None:
    load = {"cluster": load_cluster, "constants": load_constants}[kind]
    known: Cluster | Constants = load("h100" if kind == "cluster" else "fitted")
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(vars(known)))
    assert load(file) == known
    values = vars(known) | {"source": "mine"}
    first = next(iter(values))
    for change, message in (
        ({first: -1.0}, f"{first}: got -1.0, want a number"),
        ({first: "1e9"}, f"{first}: got '1e9', want a number"),
        ({"colour": 3}, "colour missing or unknown"),
    ):
        file.write_text(yaml.safe_dump(values | change))
        with pytest.raises(ValueError, match=f"{kind}: .*{message}"):
            load(file)
    del values[first]
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=f"{first} missing"):
        load(file)
    file.write_text("[")
    with pytest.raises(ValueError, match="is no YAML"):
        load(file)


def test_shares_are_at_most_one() -> None:
    with pytest.raises(ValueError, match=r"gemm_efficiency: got 1.5, want at most 1"):
        replace(load_constants(), gemm_efficiency=1.5)
    with pytest.raises(ValueError, match=r"gpus_per_node: got 2.5"):
        replace(load_cluster(), gpus_per_node=2.5)


def test_models_by_name_and_what_is_not_covered() -> None:
    assert len(standard_models()) == 8
    assert load_model("mixtral-8x22b").layers == 56 and load_model("nemotron-3-nano-30b-a3b").layers == 52
    with pytest.raises(ValueError, match=r"deepseek-v3 is not covered: .* multi-head latent attention"):
        load_model("deepseek-v3")
    with pytest.raises(ValueError, match=r"model: got 'gpt-5', want a file, .*mixtral-8x7b"):
        load_model("gpt-5")


CONFIG = HybridConfig(
    pattern="ME*E", vocab_size=512, hidden_size=64, mamba_num_heads=4, num_heads=4, num_kv_heads=2, head_dim=16,
    num_experts=4, experts_per_token=2, moe_intermediate_size=96, shared_expert_intermediate_size=32,
)  # fmt: skip


def test_model_from_files(tmp_path: Path) -> None:
    shape = ModelShape.from_config(CONFIG, "tiny")
    assert (shape.layers, shape.blocks_per_layer, shape.gated_experts) == (2, 2, False)
    for name in ("tiny.yaml", "tiny.json", "tiny/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        CONFIG.save(tmp_path / name)
    for source in ("tiny.yaml", "tiny.json", "tiny"):
        assert load_model(tmp_path / source) == shape
    training = {"model": {k: v for k, v in CONFIG.to_dict().items() if k not in ("vocab_size", "model_type")}}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({**training, "tokenizer_vocab": 512}))
    assert replace(load_model(tmp_path / "train.yaml"), name="tiny") == shape
    (tmp_path / "bad.json").write_text('{"model_type": "rnn"}')
    with pytest.raises(ValueError, match=r"bad.json: field 'model_type' is 'rnn'"):
        load_model(tmp_path / "bad.json")
    assert plan(CONFIG, gpus=4, gbs=8, seq=64)[0].mapping.gpus == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [({"pattern": "P"}, "pattern: got 'P'"), ({"moe_latent_size": 16}, "moe_latent_size: got 16")],
)
def test_blocks_that_are_not_covered(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelShape.from_config(replace(CONFIG, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": "*X"}, "pattern: got"),
        ({"heads": 0}, "heads: got 0"),
        ({"top_k": 7}, "top_k: got 7, want at most experts = 6"),
        ({"hidden": 1.5}, "hidden: got 1.5"),
    ],
)
def test_impossible_shapes(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)
