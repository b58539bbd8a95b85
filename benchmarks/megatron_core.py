"""Router, permutation, token dispatchers and MoE layer of Megatron-Core beside ours: two ranks, gloo, EP = 2.

    python -m venv --system-site-packages megatron-env             (from an environment in which foldscan runs)
    megatron-env/bin/pip install --no-deps megatron-core==0.16.1 packaging
    megatron-env/bin/python benchmarks/megatron_core.py

Megatron-Core's router and dispatchers call CUDA streams and events, which `without_cuda` replaces by nothing; its code
is otherwise as published, without Transformer Engine. Every round runs both, one after the other; a time is that of the
slower rank. Values must agree before anything is timed. ``dedup`` has no counterpart and stands beside their
``alltoall``. The rows go to benchmarks/results/megatron.jsonl. (A file called megatron.py would hide the package.)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from foldscan import ops
from foldscan.bench.driver import circumstances, keep
from foldscan.bench.measure import AGREEMENT, DTYPES, disagreement, percentile
from foldscan.nn.moe import Router
from foldscan.parallel.dispatchers import make_dispatcher, run
from foldscan.parallel.groups import Group

RESULTS = Path(__file__).parent / "results" / "megatron.jsonl"
PEER = "megatron-core"
WORLD = 2
# Tokens over both ranks, width, experts, experts a token, width of an expert.
SHAPES = ((2048, 1024, 8, 2, 256), (1024, 2048, 64, 8, 128))
LOCAL = ("moe_topk", "moe_router", "moe_permute")
Call = Callable[[], Any]


class Nothing:
    """A stream or an event of no device."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., Nothing]:
        return lambda *_, **__: Nothing()

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def without_cuda() -> None:
    """Megatron-Core on a machine without CUDA and without Transformer Engine."""
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import moe_utils

    torch.cuda.Stream = torch.cuda.Event = Nothing  # type: ignore[misc, assignment]
    torch.cuda.current_stream = torch.cuda.stream = lambda *_, **__: Nothing()  # type: ignore[assignment]
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *_: None
    moe_utils.te_general_gemm = None
    plain = mappings._AllToAll.forward

    def forward(ctx: Any, group: Any, x: Any, *splits: Any) -> Any:  # gloo wants splits as lists
        return plain(ctx, group, x, *(s.tolist() if isinstance(s, torch.Tensor) else s for s in splits))

    mappings._AllToAll.forward = staticmethod(forward)


class Bench:
    """One shape and dtype on one rank: inputs, and both sides' calls by op."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, rank: int) -> None:
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.moe import moe_utils
        from megatron.core.transformer.moe.router import TopKRouter

        tokens, self.H, self.E, self.k, self.F = shape
        self.T, self.rank, self.dtype, self.moe_utils = tokens // WORLD, rank, dtype, moe_utils
        self.local = self.E // WORLD
        torch.manual_seed(rank)
        self.x = torch.randn(self.T, self.H).to(dtype)
        self.logits = torch.randn(self.T, self.E)
        self.probs, self.experts = ops.topk_route(self.logits, self.k)
        self.dense, self.chosen = moe_utils.topk_routing_with_score_function(self.logits, self.k)
        self.up, self.gate = (torch.randn(self.local, self.F, self.H).to(dtype) / self.H**0.5 for _ in range(2))
        self.down = torch.randn(self.local, self.H, self.F).to(dtype) / self.F**0.5
        self.group = Group("ep", tuple(range(WORLD)), rank, dist.group.WORLD)
        self.alone = Group("etp", (rank,), 0)
        self.config = TransformerConfig(
            num_layers=1,
            hidden_size=self.H,
            num_attention_heads=1,
            num_moe_experts=self.E,
            moe_router_topk=self.k,
            moe_ffn_hidden_size=self.F,
            expert_model_parallel_size=WORLD,
            use_cpu_initialization=True,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            moe_router_load_balancing_type="none",
            moe_router_dtype="fp32",
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
        )
        self.modules = self._modules()
        self.router = Router(self.H, self.E, self.k)
        torch.nn.init.normal_(self.router.weight, std=self.H**-0.5)
        self.their_router = TopKRouter(self.config, pg_collection=moe_utils.get_default_pg_collection())
        self.their_router.weight.data = self.router.weight.data.to(dtype)
        self.router.weight.data = self.their_router.weight.data.float()

    def _modules(self) -> Any:
        """Megatron-Core's experts, one after the other, with our weights."""
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

        spec = get_gpt_layer_local_spec(num_experts=self.E, moe_grouped_gemm=False).submodules.mlp.submodules.experts
        groups = self.moe_utils.get_default_pg_collection()
        experts = spec.module(self.local, self.config, submodules=spec.submodules, pg_collection=groups)
        for i, expert in enumerate(experts.local_experts):
            expert.linear_fc1.weight.data = torch.cat([self.gate[i], self.up[i]])
            expert.linear_fc2.weight.data = self.down[i].clone()
        return experts

    def theirs(self, name: str, x: torch.Tensor, experts: bool) -> torch.Tensor:
        """Megatron-Core's six calls."""
        from megatron.core.transformer.moe import token_dispatcher

        kinds = {
            "alltoall": token_dispatcher.MoEAlltoAllTokenDispatcher,
            "allgather": token_dispatcher.MoEAllGatherTokenDispatcher,
        }
        here = list(range(self.rank * self.local, (self.rank + 1) * self.local))
        groups = self.moe_utils.get_default_pg_collection()
        d = kinds[name](self.local, here, self.config, pg_collection=groups)
        h, p = d.dispatch_preprocess(x.view(self.T, 1, self.H), self.chosen, self.dense)
        h, p = d.token_dispatch(h, p)
        h, counts, p = d.dispatch_postprocess(h, p)
        y = self.modules(h, counts, p)[0] if experts else h * p[:, None].to(h.dtype)
        out = d.combine_postprocess(d.token_combine(d.combine_preprocess(y)))
        return (out[0] if isinstance(out, tuple) else out).reshape(self.T, self.H)

    def ours(self, name: str, x: torch.Tensor, experts: bool) -> torch.Tensor:
        def compute(rows: torch.Tensor, probs: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
            if experts:
                return ops.moe_mlp(rows, probs, chosen, self.up, self.down, w_gate=self.gate)
            return rows * probs.to(rows.dtype)

        d = make_dispatcher(name, self.E, self.group, self.alone)
        return run(d, x, self.probs, self.experts, compute, tokens_per_rank=self.T)

    def calls(self) -> dict[str, dict[str, Call]]:
        """By op, both sides. Those of the dispatchers talk to the other rank."""
        utils, count = self.moe_utils, self.T * self.k

        def their_permutation() -> torch.Tensor:
            rows, _, order = utils.permute(self.x, self.chosen, num_out_tokens=count)
            return utils.unpermute(rows, order, self.x.shape)

        def our_permutation() -> torch.Tensor:
            rows, order = ops.permute(self.x, self.experts, self.E)
            return ops.unpermute(rows, order)

        found: dict[str, dict[str, Call]] = {
            "moe_topk": {
                PEER: lambda: utils.topk_routing_with_score_function(self.logits, self.k),
                "foldscan": lambda: ops.topk_route(self.logits, self.k),
            },
            "moe_router": {
                PEER: lambda: self.their_router(self.x.view(self.T, 1, self.H)),
                "foldscan": lambda: self.router(self.x)[1:],
            },
            "moe_permute": {PEER: their_permutation, "foldscan": our_permutation},
        }
        for experts, op in ((False, "dispatch_combine"), (True, "moe_layer")):
            for name, peer in (("alltoall", "alltoall"), ("allgather", "allgather"), ("dedup", "alltoall")):
                found[f"{op}_{name}"] = {
                    PEER: lambda peer=peer, experts=experts: self.theirs(peer, self.x, experts),
                    "foldscan": lambda name=name, experts=experts: self.ours(name, self.x, experts),
                }
        return found

    def check(self, op: str, calls: dict[str, Call]) -> None:
        got, want = calls["foldscan"](), calls[PEER]()
        if op in ("moe_topk", "moe_router"):  # theirs are dense: (T, E) probabilities and choice
            want, chosen = want
            differs = torch.zeros_like(chosen).scatter(1, got[1], True) != chosen
            if differs.any(1).float().mean() > (0.0 if op == "moe_topk" else 1e-2):  # logits of another GEMM may tie
                raise RuntimeError(f"{op}: other experts than those of {PEER}")
            got = torch.zeros_like(want).scatter(1, got[1], got[0])
        difference = disagreement(got, want)
        if not difference <= AGREEMENT[str(self.dtype).split(".")[1]][0]:
            raise RuntimeError(f"{op}: differs from {PEER} by {difference:.2e}")


def worker(rank: int, folder: str, options: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=120),
    )
    from megatron.core import parallel_state

    without_cuda()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=WORLD)
    about = {**circumstances(), "processes": WORLD}
    about["versions"][PEER] = metadata.version("megatron-core")
    for shape in SHAPES:
        for dtype in DTYPES:
            bench = Bench(shape, DTYPES[dtype], rank)
            for op, calls in bench.calls().items():
                with torch.no_grad():
                    bench.check(op, calls)
                    times = interleaved(calls, options.rounds, 10 if op in LOCAL else 1)
                if rank == 0:
                    dims = dict(zip(("T", "H", "E", "K", "F"), shape))
                    report(options.out, {"op": op, "shape": dims, "dtype": dtype, "mode": "fwd"}, times, about)
    dist.destroy_process_group()


def interleaved(calls: dict[str, Call], rounds: int, burst: int) -> dict[str, list[float]]:
    """Seconds a call, those of the slower rank; short ones are made several times on end."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 2):
        for name, call in calls.items():
            dist.barrier()
            began = time.perf_counter()
            for _ in range(burst):
                call()
            if i >= 2:  # the first two warm up
                times[name].append((time.perf_counter() - began) / burst)
    slower = torch.tensor([times[name] for name in calls])
    dist.all_reduce(slower, dist.ReduceOp.MAX)
    return dict(zip(calls, slower.tolist()))


def report(path: Path, head: dict[str, Any], times: dict[str, list[float]], about: dict[str, Any]) -> None:
    rows = [
        {
            **head,
            "impl": name,
            "way": "",
            "headline": False,
            **{f"p{p}_ms": percentile(samples, p / 100) * 1e3 for p in (20, 50, 80)},
            "rounds": len(samples),
            **about,
            "load": os.getloadavg()[0],
        }
        for name, samples in times.items()
    ]
    keep(path, rows)
    theirs, ours = (row["p50_ms"] for row in rows)
    shape = "x".join(str(v) for v in head["shape"].values())
    print(f"{head['op']:27} {shape:17} {head['dtype']:9} {theirs:9.3f} {ours:9.3f} {theirs / ours:7.2f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="calls of each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if find_spec("megatron") is None or find_spec("megatron.core") is None:
        print(json.dumps({"impl": PEER, "missing": "pip install --no-deps megatron-core==0.16.1 packaging"}))
        sys.exit(1)
    print(f"{'op':27} {'T x H x E x K x F':17} {'dtype':9} {'theirs ms':>9} {'ours ms':>9} {'ratio':>8}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(worker, (folder, options), WORLD, start_method="spawn")


if __name__ == "__main__":
    main()
