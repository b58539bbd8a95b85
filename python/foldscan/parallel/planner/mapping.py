"""Mappings of a model to ranks: what is legal, and all that are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from foldscan.parallel.mesh import FoldedMesh
from foldscan.parallel.planner.shapes import ModelShape

METHODS = {
    "folded": "attention and experts divided independently (MoE Parallel Folding)",
    "unfolded": "experts inside data parallelism: etp = tp, ep divides dp (Megatron-Core without folding)",
    "tp-ep-dp": "unfolded without pipeline and context parallelism, distributed optimizer (ZeRO-1)",
    "fsdp": "parameters, gradients and optimizer sharded over data parallelism, tensor parallelism beside it",
    "fsdp-ep": "the same with expert parallelism",
}
DISPATCHERS = ("alltoall", "allgather", "dedup", "dedup-node")


@dataclass(frozen=True)
class Mapping:
    """How ranks are divided, and by which method.

    Attributes:
        gpus: ranks in all.
        tp, cp, pp: tensor, context and pipeline parallelism.
        ep, etp: expert parallelism, and tensor parallelism inside an expert.
        method: one of ``METHODS``.

    Raises:
        TypeError, ValueError: what `FoldedMesh` refuses, or what the method has no place for.
    """

    gpus: int
    tp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    pp: int = 1
    method: str = "folded"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: got {self.method!r}, want one of {', '.join(METHODS)}")
        FoldedMesh(self.gpus, tp=self.tp, cp=self.cp, ep=self.ep, etp=self.etp, pp=self.pp)
        if self.method == "folded":
            return
        if self.etp != self.tp:
            raise ValueError(f"etp: got {self.etp}, want tp = {self.tp} with method {self.method!r}")
        if self.dp % self.ep:
            raise ValueError(f"ep: got {self.ep}, want a divisor of dp = {self.dp} with method {self.method!r}")
        for axis in ("pp",) * (self.method != "unfolded") + ("cp",) * (self.method == "tp-ep-dp"):
            if getattr(self, axis) != 1:
                raise ValueError(f"{axis}: got {getattr(self, axis)}, want 1 with method {self.method!r}")
        if self.method == "fsdp" and self.ep != 1:
            raise ValueError(f"ep: got {self.ep}, want 1 with method 'fsdp'; 'fsdp-ep' has expert parallelism")

    @property
    def dp(self) -> int:
        return self.gpus // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        return self.gpus // (self.etp * self.ep * self.pp)

    @property
    def sharded(self) -> bool:
        """Parameters are sharded over data parallelism and gathered for every layer."""
        return self.method in ("fsdp", "fsdp-ep")

    @property
    def ep_stride(self) -> int:
        """Ranks between neighbours of an ep group: this is where folding and its absence differ."""
        return self.etp if self.method == "folded" else self.tp * self.cp

    def __str__(self) -> str:
        sizes = " ".join(f"{axis}{getattr(self, axis)}" for axis in ("tp", "cp", "dp", "pp", "ep", "etp", "edp"))
        return f"{self.method} {sizes}"


@dataclass(frozen=True)
class Workload:
    """What a step computes.

    Attributes:
        gbs: sequences a step over all ranks.
        seq: tokens a sequence.
        mbs: sequences a micro-batch.
        skew: tokens of the busiest expert rank over the mean, s >= 1. It multiplies the time of the experts, what the
            EP and ETP exchanges receive, and the memory of the expert rows (dropless).
        dispatcher: one of ``DISPATCHERS``, or ``"auto"`` for the quickest in every mapping.
        vpp: model chunks a pipeline stage; None for as many as it has layers.
        tp_regather: tensor parallelism gathers its input again for the weight gradient (Megatron-LM: five passes), or
            keeps it (four).
        context: keys and values go round in a ``"ring"``, or are gathered at once (``"allgather"``).

    Raises:
        ValueError: a field out of range.
    """

    gbs: int = 256
    seq: int = 4096
    mbs: int = 1
    skew: float = 1.0
    dispatcher: str = "alltoall"
    vpp: int | None = None
    tp_regather: bool = True
    context: str = "ring"

    def __post_init__(self) -> None:
        for name in ("gbs", "seq", "mbs") + (("vpp",) if self.vpp is not None else ()):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: got {value!r}, want a positive integer")
        if not 1 <= self.skew < float("inf"):
            raise ValueError(f"skew: got {self.skew}, want max / mean, at least 1")
        if self.dispatcher not in (*DISPATCHERS, "auto"):
            raise ValueError(f"dispatcher: got {self.dispatcher!r}, want auto or one of {', '.join(DISPATCHERS)}")
        if self.context not in ("ring", "allgather"):
            raise ValueError(f"context: got {self.context!r}, want ring or allgather")


def check_mapping(model: ModelShape, mapping: Mapping, work: Workload) -> None:
    """Refuse a mapping that does not divide the model or the batch.

    Raises:
        ValueError: names the axis, what it should divide, and what it got.
    """
    m, wholes = mapping, []
    if "*" in model.pattern:
        wholes += [("tp", m.tp, "heads", model.heads), ("tp", m.tp, "kv_heads", model.kv_heads)]
    if "M" in model.pattern:
        wholes += [("tp", m.tp, "mamba_heads", model.mamba_heads), ("tp", m.tp, "mamba_groups", model.mamba_groups)]
    if "-" in model.pattern:
        wholes.append(("tp", m.tp, "mlp_ffn", model.mlp_ffn))
    if "E" in model.pattern:
        wholes += [("ep", m.ep, "experts", model.experts), ("etp", m.etp, "ffn", model.ffn)]
        if model.shared_ffn:
            wholes.append(("tp", m.tp, "shared_ffn", model.shared_ffn))
    elif m.ep > 1 or m.etp not in (1, m.tp):
        raise ValueError(f"ep, etp: got {m.ep}, {m.etp}, want 1 for {model.name}, which has no experts")
    # A causal sequence is dealt out to cp ranks in 2 cp pieces, and the tokens of a rank to tp ranks.
    wholes.append(("tp x cp", m.tp * m.cp * (2 if m.cp > 1 else 1), "seq", work.seq))
    wholes.append(("dp x mbs", m.dp * work.mbs, "gbs", work.gbs))
    for axis, size, name, whole in wholes:
        if whole % size:
            raise ValueError(f"{axis}: got {size}, want a divisor of {name} = {whole}")
    chunks = min(len(stage) for stage in model.stages(m.pp)) // model.blocks_per_layer
    if work.vpp is not None and (chunks < 1 or chunks % work.vpp):
        raise ValueError(f"vpp: got {work.vpp}, want a divisor of the {chunks} layers of a stage")


def legal_mappings(
    model: ModelShape,
    gpus: int,
    work: Workload,
    methods: Sequence[str] = ("folded", "unfolded"),
    tensor_limit: int = 8,
) -> Iterator[Mapping]:
    """Every mapping of ``gpus`` ranks that `Mapping` and `check_mapping` accept, in a fixed order.

    Args:
        methods: which of ``METHODS``.
        tensor_limit: largest tp and etp: usually the GPUs of a node, tensor parallelism across nodes never pays.

    Raises:
        ValueError: gpus below 1, or an unknown method.
    """
    if not isinstance(gpus, int) or gpus < 1:
        raise ValueError(f"gpus: got {gpus!r}, want a positive integer")
    divisors = [d for d in range(1, gpus + 1) if gpus % d == 0]
    has_experts = "E" in model.pattern
    tensor = [d for d in divisors if d <= tensor_limit]
    # FoldedMesh and check_mapping decide; here only what cannot pass is left out, for speed.
    eps = [d for d in divisors if has_experts and model.experts % d == 0] or [1]
    etps = tensor if has_experts else [1]
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"method: got {method!r}, want one of {', '.join(METHODS)}")
        for pp in divisors:
            if pp > model.layers:
                break
            for tp in tensor:
                for cp in divisors:
                    dp, rest = divmod(gpus, tp * cp * pp)
                    if rest or work.gbs % (dp * work.mbs):
                        continue
                    for etp in etps if method == "folded" else [tp]:
                        for ep in eps:
                            if (gpus // pp) % (ep * etp):
                                continue
                            try:
                                mapping = Mapping(gpus, tp, cp, ep, etp, pp, method)
                                check_mapping(model, mapping, work)
                            except ValueError:
                                continue
                            yield mapping
