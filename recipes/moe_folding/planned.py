"""What the planner's formulas say of a run: with even routing, and with the routing that the run counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from foldscan.data import PackedSampler, TokenFile
from foldscan.parallel import FoldedMesh
from foldscan.parallel.groups import shares
from foldscan.parallel.placement import placements
from foldscan.parallel.planner import Mapping, ModelShape
from foldscan.parallel.planner import volumes as v
from foldscan.training import TrainConfig

FP32 = 4


@dataclass(frozen=True)
class Line:
    """A collective over a whole run.

    Attributes:
        name: in words. labels, axes: what its traffic is counted under.
        even: bytes of all ranks as planned: every expert gets as many tokens, every cut is inside a document.
        counted: by the same formula from the choices that the routers made and the documents that were cut.
        even_inter, counted_inter: of these, what leaves the node; None where only the total is planned.
    """

    name: str
    labels: tuple[str, ...]
    axes: tuple[str, ...]
    even: float
    counted: float
    even_inter: float | None = None
    counted_inter: float | None = None


@dataclass(frozen=True)
class Counted:
    """By rank: choices and (token, rank) pairs for every rank of its ep group."""

    rows: list[list[int]]
    pairs: list[list[int]]

    def sums(self, mesh: FoldedMesh, node: int, *, pairs: bool) -> tuple[int, int, int]:
        """(all, those for another rank, those for another node)."""
        total = away = off = 0
        for rank, counts in enumerate(self.pairs if pairs else self.rows):
            for member, count in zip(mesh.group("ep", rank), counts):
                total += count
                away += count * (member != rank)
                off += count * (member // node != rank // node)
        return total, away, off


def plan_run(config: TrainConfig, world: int, node: int, counted: Counted) -> list[Line]:
    """Every collective of a training run under a mapping."""
    o, model, mesh = config.parallel, ModelShape.from_config(config.model), config.parallel.mesh(world)
    method = "unfolded" if o.order != "tp-cp-ep-dp-pp" else "folded"
    mapping = Mapping(world, tp=o.tp, cp=o.cp, ep=o.ep, etp=o.etp, pp=o.pp, method=method)
    times = config.steps * config.accumulation // mesh.dp  # micro-batches of a rank
    ranks = world // mesh.pp  # that have a layer
    part = config.batch_tokens // o.cp
    tokens = part // o.tp
    sizes: dict[str, Any] = {"element_bytes": FP32, "node": node}
    over_cp: dict[str, Any] = {**sizes, "stride": o.tp}
    found: list[Line] = []

    def same(name: str, labels: Sequence[str], axes: str, once: float) -> None:
        """Does not depend on routing: ``once`` a rank and micro-batch."""
        total = once * ranks * times
        found.append(Line(name, tuple(labels), (axes,), total, total))

    divided = sum(letter != "E" or model.shared_ffn > 0 for letter in model.pattern)
    tensor = v.tensor_volume(tokens, model.hidden, o.tp, regather=False, **sizes).total.total
    same("TP activations", ["activations"], "tp", divided * tensor)
    for label, volume in v.vocabulary_volumes(tokens, model.hidden, o.tp, **sizes).items():
        same(f"vocabulary: {label}", [label], "tp", volume.total.total)
    attention = model.pattern.count("*")
    ring = v.context_ring_volume(part, model.kv_width / o.tp, o.cp, **over_cp).total.total
    same("CP keys and values", ["kv", "dkv"], "cp", attention * ring)
    found += _scan(config, model, mesh, times * ranks, over_cp)
    found += _experts(config, model, mapping, mesh, times * ranks, counted, node)
    same("loads", ["loads"], "tp-cp", model.pattern.count("E") * (o.tp * o.cp - 1) * model.experts * v.COUNT_BYTES)
    found += _update(config, model, mesh, config.steps)
    return found


def _scan(config: TrainConfig, model: ModelShape, mesh: FoldedMesh, times: int, sizes: dict[str, Any]) -> list[Line]:
    """Halo and states of Mamba-2 blocks. Summed over a cp group, a cut inside a document costs one halo, unless both of
    its sides are on one rank, and a state to every other rank."""
    heads = model.mamba_heads / mesh.tp
    channels = (model.mamba_width + 2 * model.mamba_groups * model.state) / mesh.tp
    blocks = model.pattern.count("M")

    def volume(heads: float, channels: float) -> float:
        """Of the busiest rank, forward and backward."""
        found = v.context_scan_volume(heads, model.mamba_head_dim, model.state, channels, model.conv, mesh.cp, **sizes)
        return found.total.total

    states, halo = volume(heads, 0), volume(0, channels)
    halos, told = _cuts(config, mesh.cp)
    # One rank of the group tells one state only, two have one halo only where there are more than two.
    one_state, one_halo = states / 2, halo / min(2, max(1, mesh.cp - 1))
    groups = mesh.tp * (mesh.world_size // (mesh.pp * mesh.dp * mesh.cp * mesh.tp)) * blocks
    lines = []
    for name, label, most, one, cuts in (
        ("CP scan states", "states", states, one_state, told),
        ("CP convolution halo", "halo", halo, one_halo, halos),
    ):
        lines.append(Line(name, (label,), ("cp",), most * blocks * times, one * cuts * groups))
    return lines


def _cuts(config: TrainConfig, cp: int) -> tuple[float, int]:
    """Over all micro-batches of a run: convolution halos sent (in parts of W - 1 rows), and cuts inside documents."""
    assert config.train_data is not None
    pieces = 2 * cp if config.parallel.zigzag else cp
    ends = list(accumulate(shares(config.batch_tokens, pieces)))[:-1]
    width = config.model.conv_kernel - 1
    sampler = PackedSampler(
        TokenFile(config.train_data), batch_tokens=config.batch_tokens, max_length=config.seq_length, seed=config.seed
    )
    rows = told = 0
    for _ in range(config.steps * config.accumulation):
        starts = sampler.next().cu_seqlens.tolist()
        for number, end in enumerate(ends):
            before = end - max(start for start in starts if start <= end)
            told += before > 0
            if not (config.parallel.zigzag and number == cp - 1):  # the middle one is between two pieces of one rank
                rows += min(before, width)
    return rows / width, told


def _experts(
    config: TrainConfig, model: ModelShape, mapping: Mapping, mesh: FoldedMesh, times: int, counted: Counted, node: int
) -> list[Line]:
    """Dispatch and combine of the expert layers."""
    o, k = config.parallel, model.top_k
    layers = model.pattern.count("E")
    tokens = config.batch_tokens // (o.cp * o.tp)
    even = v.dispatch_volumes(
        tokens,
        k,
        model.hidden,
        experts=model.experts,
        ep=o.ep,
        etp=o.etp,
        dispatcher=o.dispatcher,
        element_bytes=FP32,
        ep_stride=mapping.ep_stride,
        node=node,
    )
    row, slots = model.hidden * FP32, 1 if o.dispatcher == "alltoall" else k
    rows = counted.sums(mesh, node, pairs=False)[0]
    travelling, away, off = counted.sums(mesh, node, pairs=o.dispatcher == "dedup")
    numbers = {"alltoall": model.experts * (o.ep - 1 + o.etp - 1), "dedup": o.ep * (o.ep - 1) + o.etp - 1}
    # Beside every row or token that leaves or is gathered over etp: a probability, there and back, and a choice.
    beside = slots * (away + (o.etp - 1) * travelling)
    metadata = numbers[o.dispatcher] * v.COUNT_BYTES * times * layers
    metadata += beside * v.CHOICE_BYTES * (o.dispatcher != "alltoall")
    sums = {
        "ep": (4 * away * row, 4 * off * row),
        "etp": (2 * (o.etp - 1) * (travelling + rows) * row, None),
        "probs": (2 * beside * v.FLOAT_BYTES, None),
        "metadata": (metadata, None),
    }
    names = {
        "ep": ("EP tokens", ("tokens",), ("ep",)),
        "etp": ("ETP tokens", ("tokens",), ("etp",)),
        "probs": ("probabilities", ("probs",), ("ep", "etp")),
        "metadata": ("choices and counts", ("metadata", "counts"), ("ep", "etp")),
    }
    lines = []
    for key, (total, inter) in sums.items():
        planned = even[key].total * (layers * times)
        lines.append(Line(*names[key], planned.total, total, None if inter is None else planned.inter, inter))
    return lines


def _update(config: TrainConfig, model: ModelShape, mesh: FoldedMesh, steps: int) -> list[Line]:
    """The distributed optimizer, and the norm and the report of every step."""
    gradients: dict[str, float] = {}
    places = placements(config.model)
    for rank in range(mesh.world_size):
        for name in _names_on(config, mesh, rank, places):
            place, size = places[name], 1
            for length in place.local_shape(mesh, rank):
                size *= length
            volume = v.optimizer_volume(size, len(mesh.group(place.replicas, rank)), parameter_bytes=FP32)
            kind = "experts" if place.expert else "dense"
            gradients[kind] = gradients.get(kind, 0.0) + volume.total.total
    axes = {"experts": ("edp",), "dense": ("dp-cp", "tp-cp-dp")}
    lines = [
        Line(f"{'EDP' if kind == 'experts' else 'DP'} gradients, {kind}", ("gradients", "parameters"), axes[kind], t, t)
        for kind, t in ((kind, total * steps) for kind, total in gradients.items())
    ]
    reported = 8 * (1 + 3 + model.pattern.count("E") * model.experts)
    small = float(steps * mesh.world_size * (mesh.world_size - 1) * reported)
    return [*lines, Line("norm and report", ("norm", "report"), ("tp-cp-dp-pp",), small, small)]


def _names_on(config: TrainConfig, mesh: FoldedMesh, rank: int, names: Iterable[str]) -> list[str]:
    """Parameters on a rank's pipeline stages."""
    stages = mesh.pp * config.parallel.stages_per_rank
    ends = list(accumulate(shares(config.model.num_layers, stages)))
    mine = range(mesh.position(rank)["pp"], stages, mesh.pp)

    def stage(name: str) -> int:
        if name.startswith("layers."):
            return next(s for s, end in enumerate(ends) if int(name.split(".")[1]) < end)
        return 0 if name.startswith("embeddings") else stages - 1

    return [name for name in names if stage(name) in mine]
