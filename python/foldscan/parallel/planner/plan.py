"""`plan`: every legal mapping, predicted and ranked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foldscan.parallel.planner.cluster import Cluster, Constants, load_cluster, load_constants
from foldscan.parallel.planner.dispatcher import Advice, recommend
from foldscan.parallel.planner.mapping import Mapping, Workload, check_mapping, legal_mappings
from foldscan.parallel.planner.memory import Memory, memory
from foldscan.parallel.planner.shapes import ModelShape, load_model
from foldscan.parallel.planner.step_time import Machine, StepModel, mfu
from foldscan.parallel.planner.step_volumes import step_volumes
from foldscan.parallel.planner.volumes import Volume

if TYPE_CHECKING:
    from foldscan.models import HybridConfig

DEFAULT_METHODS = ("folded", "unfolded", "fsdp", "fsdp-ep")


class NoMapping(ValueError):
    """No legal mapping, or none that fits in memory."""


@dataclass(frozen=True)
class Prediction:
    """What a mapping should do. Modelled, not measured.

    Attributes:
        model, mapping, work, machine: what was predicted.
        dispatcher: of the expert layers.
        terms: seconds of a step by term (``step_time.TERMS``); their sum is the step's time.
        memory: of the fullest rank.
        mfu: model FLOP/s over the peak.
    """

    model: ModelShape
    mapping: Mapping
    work: Workload
    machine: Machine
    dispatcher: str
    terms: dict[str, float]
    memory: Memory
    mfu: float

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.terms.values())

    @property
    def tflops(self) -> float:
        """Model TFLOP/s of a GPU."""
        return self.mfu * self.machine.cluster.peak / 1e12

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.machine.cluster.memory

    @cached_property
    def volumes(self) -> dict[str, Volume]:
        """Bytes that a rank sends in a step, by collective."""
        node = self.machine.cluster.gpus_per_node
        return step_volumes(self.model, self.mapping, self.work, dispatcher=self.dispatcher, node=node)

    @cached_property
    def advice(self) -> Advice | None:
        """Which dispatcher the expert layers should use; None without experts."""
        return recommend(self.model, self.mapping, self.work, self.machine)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: seconds and bytes."""
        mapping = {**asdict(self.mapping), "dp": self.mapping.dp, "edp": self.mapping.edp}
        return {
            "mapping": mapping,
            "seconds": self.seconds,
            "mfu": self.mfu,
            "tflops": self.tflops,
            "fits": self.fits,
            "terms": self.terms,
            "memory": self.memory.to_dict(),
            "bytes": {name: asdict(volume) for name, volume in self.volumes.items()},
            "dispatcher": self.dispatcher,
            "recommended_dispatcher": self.advice.to_dict() if self.advice else None,
        }


def predict(
    model: ModelShape,
    mapping: Mapping,
    work: Workload,
    cluster: Cluster | None = None,
    constants: Constants | None = None,
) -> Prediction:
    """One mapping, whether it fits in memory or not.

    Raises:
        ValueError: a mapping that does not divide the model or the batch.
    """
    check_mapping(model, mapping, work)
    machine = Machine(cluster or load_cluster(), constants or load_constants())
    return _predict(model, mapping, work, machine, memory(model, mapping, work))


def plan(
    model: str | Path | ModelShape | HybridConfig,
    cluster: str | Path | Cluster = "h100",
    *,
    gpus: int,
    gbs: int = 256,
    seq: int = 4096,
    mbs: int = 1,
    skew: float = 1.0,
    dispatcher: str = "alltoall",
    vpp: int | None = None,
    methods: Sequence[str] = DEFAULT_METHODS,
    constants: str | Path | Constants | None = None,
    memory_limit: float | None = None,
    tp_regather: bool = True,
    context: str = "ring",
) -> list[Prediction]:
    """Every legal mapping that fits in memory, the quickest first. See docs/planner.md for the model.

    Args:
        model: a name of `standard_models`, a path (see `load_model`), or a shape.
        cluster: a name, a YAML file, or a `Cluster`.
        gpus: ranks.
        gbs, seq, mbs: sequences a step, tokens a sequence, sequences a micro-batch.
        skew: tokens of the busiest expert rank over the mean.
        dispatcher: ``"alltoall"``, ``"allgather"``, ``"dedup"``, ``"dedup-node"``, or ``"auto"``: the recommended one
            of every mapping.
        vpp: model chunks a pipeline stage; None for as many as it has layers.
        methods: which mappings to try (``mapping.METHODS``). A folded one that an unfolded one equals is left out.
        constants: ``"fitted"`` (default), ``"hand-set"``, a YAML file, or `Constants`.
        memory_limit: bytes a GPU; the cluster's by default.
        tp_regather, context: as in `Workload`.

    Returns:
        Predictions by step time; of equal ones in the order of enumeration.

    Raises:
        ValueError: an argument that is wrong.
        NoMapping: no legal mapping, or none that fits (with what the smallest needs).
    """
    shape = _shape(model)
    hardware = cluster if isinstance(cluster, Cluster) else load_cluster(cluster)
    if memory_limit is not None:
        hardware = replace(hardware, memory=memory_limit)
    machine = Machine(hardware, constants if isinstance(constants, Constants) else load_constants(constants))
    work = Workload(gbs, seq, mbs, skew, dispatcher, vpp, tp_regather, context)
    found, smallest = [], None
    for mapping in legal_mappings(shape, gpus, work, methods, hardware.gpus_per_node):
        if _has_twin(shape, mapping, methods):
            continue
        needed = memory(shape, mapping, work)
        if smallest is None or needed.total < smallest[0]:
            smallest = (needed.total, mapping)
        if needed.total <= hardware.memory:
            found.append(_predict(shape, mapping, work, machine, needed))
    if smallest is None:
        raise NoMapping(
            f"gpus, gbs: no legal mapping of {shape.name} to {gpus} GPUs with {gbs} sequences of {seq}: dp has to "
            "divide the batch, and tp, cp, ep, etp and pp heads, sequence, experts, ffn and layers"
        )
    if not found:
        raise NoMapping(
            f"gpus: no mapping of {shape.name} to {gpus} GPUs fits in {hardware.memory / 1e9:.1f} GB; the smallest "
            f"({smallest[1]}) needs {smallest[0] / 1e9:.1f} GB"
        )
    return sorted(found, key=lambda prediction: prediction.seconds)


@dataclass(frozen=True)
class ScalePoint:
    """The best folded and the best unfolded mapping of one GPU count; None where none is legal and fits."""

    gpus: int
    gbs: int
    folded: Prediction | None
    unfolded: Prediction | None


def scale(
    model: str | Path | ModelShape | HybridConfig,
    cluster: str | Path | Cluster = "h100",
    *,
    gpus: Sequence[int],
    gbs: int | Sequence[int],
    **options: Any,
) -> list[ScalePoint]:
    """The best mappings over GPU counts.

    Args:
        gpus: counts.
        gbs: sequences a step: one number for all counts (strong scaling), or one a count (weak scaling).
        options: as for `plan`.

    Returns:
        A point a count. The best folded mapping may be one that does without folding.

    Raises:
        ValueError: as `plan`. A count without a mapping is no error.
    """
    shape = _shape(model)
    batches = [gbs] * len(gpus) if isinstance(gbs, int) else list(gbs)
    if len(batches) != len(gpus):
        raise ValueError(f"gbs: got {len(batches)} values for {len(gpus)} GPU counts")
    points = []
    for count, batch in zip(gpus, batches):
        try:
            ranked = plan(shape, cluster, gpus=count, gbs=batch, **{"methods": ("folded", "unfolded"), **options})
        except NoMapping:
            ranked = []
        unfolded = next((p for p in ranked if p.mapping.method != "folded"), None)
        points.append(ScalePoint(count, batch, ranked[0] if ranked else None, unfolded))
    return points


def compare(better: Prediction, other: Prediction, least: float = 0.002) -> str:
    """Which terms make the difference between two mappings, in words, but for those below ``least`` of the step."""
    differences = {term: other.terms[term] - seconds for term, seconds in better.terms.items()}
    gains = sorted((t for t, d in differences.items() if d > least * other.seconds), key=lambda t: -differences[t])
    losses = sorted((t for t, d in differences.items() if -d > least * other.seconds), key=lambda t: differences[t])
    text = f"{other.seconds / better.seconds - 1:.1%} quicker than {other.mapping}"
    if gains:
        text += ": saves " + ", ".join(f"{_milliseconds(differences[t])} of {t}" for t in gains)
    if losses:
        text += "; spends " + ", ".join(f"{_milliseconds(-differences[t])} more on {t}" for t in losses)
    return text


def reasons(ranked: Sequence[Prediction]) -> list[str]:
    """Why the first of a ranking wins: against the second, and against the best that is not folded."""
    winner, others = ranked[0], []
    if len(ranked) > 1:
        others.append(ranked[1])
    unfolded = next((p for p in ranked if p.mapping.method != "folded"), None)
    if unfolded is not None and unfolded is not winner and unfolded not in others:
        others.append(unfolded)
    return [compare(winner, other) for other in others]


def _milliseconds(seconds: float) -> str:
    """Three digits, or as many as a large number has."""
    value = 1e3 * seconds
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _predict(model: ModelShape, mapping: Mapping, work: Workload, machine: Machine, needed: Memory) -> Prediction:
    dispatcher = work.dispatcher
    if dispatcher == "auto":
        advice = recommend(model, mapping, work, machine)
        dispatcher = advice.dispatcher if advice else "alltoall"
    terms = StepModel(model, mapping, work, machine, dispatcher).step()
    share = mfu(model, mapping, work, sum(terms.values()), machine.cluster)
    return Prediction(model, mapping, work, machine, dispatcher, terms, needed, share)


def _shape(model: str | Path | ModelShape | HybridConfig) -> ModelShape:
    if isinstance(model, ModelShape):
        return model
    if isinstance(model, (str, Path)):
        return load_model(model)
    return ModelShape.from_config(model)


def _has_twin(model: ModelShape, mapping: Mapping, methods: Sequence[str]) -> bool:
    """Whether another of the methods has the same mapping, ranks and all, and is the one to be shown."""
    if mapping.method == "folded" and "unfolded" in methods:
        placed_alike = mapping.cp == 1 or mapping.ep == 1
        dense = "E" not in model.pattern
        return dense or (mapping.etp == mapping.tp and placed_alike and mapping.dp % mapping.ep == 0)
    if mapping.method == "fsdp-ep" and "fsdp" in methods:
        return mapping.ep == 1
    return False
