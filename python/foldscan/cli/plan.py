"""``foldscan plan``. Heavy imports are inside, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
import json
from typing import Any

SCALE = "1024,2048,4096,8192,16384,32768,65536"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``foldscan plan``."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME|PATH",
        help="mixtral-8x22b, qwen3-235b-a22b, ... or a configuration file or model directory",
    )
    parser.add_argument("--gpus", type=int, required=True, metavar="N")
    parser.add_argument("--gbs", type=int, default=256, metavar="N", help="sequences a step; default: %(default)s")
    parser.add_argument("--seq", type=int, default=4096, metavar="N", help="tokens a sequence; default: %(default)s")
    parser.add_argument("--mbs", type=int, default=1, metavar="N", help="sequences a micro-batch; default: %(default)s")
    parser.add_argument("--vpp", type=int, metavar="N", help="chunks a pipeline stage; default: its layers")
    parser.add_argument(
        "--skew", type=float, default=1.0, metavar="S", help="load of the busiest expert rank over the mean; default: 1"
    )
    parser.add_argument(
        "--dispatcher",
        default="alltoall",
        choices=["alltoall", "allgather", "dedup", "dedup-node", "auto"],
        help="of the expert layers; default: %(default)s",
    )
    parser.add_argument(
        "--context",
        default="ring",
        choices=["ring", "allgather"],
        help="how context parallelism exchanges keys and values; default: %(default)s",
    )
    parser.add_argument("--cluster", default="h100", metavar="NAME|FILE", help="default: %(default)s")
    parser.add_argument("--memory", type=float, metavar="GB", help="a GPU's; default: the cluster's")
    parser.add_argument(
        "--constants",
        metavar="NAME|FILE",
        help="fitted, hand-set or a YAML file; default: fitted, whose error on the published calibration table is less",
    )
    parser.add_argument(
        "--methods",
        default="folded,unfolded,fsdp,fsdp-ep",
        metavar="M,M",
        help="of folded, unfolded, tp-ep-dp, fsdp, fsdp-ep; default: %(default)s",
    )
    parser.add_argument(
        "--mapping", metavar="A=N,A=N", help="show this one, such as tp=2,ep=8,pp=8 or tp=2,etp=2,ep=4,method=unfolded"
    )
    parser.add_argument("--top", type=int, default=10, metavar="N", help="mappings to show; default: %(default)s")
    parser.add_argument(
        "--scale",
        nargs="?",
        const=SCALE,
        metavar="N,N",
        help=f"the best mapping of each of these GPU counts; default: {SCALE}",
    )
    parser.add_argument(
        "--grow-gbs", action="store_true", help="with --scale: --gbs is for --gpus, and grows with their number"
    )
    parser.add_argument("--plot", metavar="FILE", help="MFU over mappings, or over GPU counts with --scale")
    parser.add_argument("--json", action="store_true", help="print JSON for a machine to read")


def run(arguments: argparse.Namespace) -> None:
    """``foldscan plan``."""
    from foldscan.parallel.planner import load_model

    if arguments.top < 1:
        raise ValueError(f"--top: got {arguments.top}, want at least 1")
    options: dict[str, Any] = {
        "seq": arguments.seq,
        "mbs": arguments.mbs,
        "vpp": arguments.vpp,
        "skew": arguments.skew,
        "dispatcher": arguments.dispatcher,
        "context": arguments.context,
        "constants": arguments.constants,
        "memory_limit": None if arguments.memory is None else arguments.memory * 1e9,
    }
    model = load_model(arguments.model)
    if arguments.scale is None:
        _plan(arguments, model, options)
    else:
        _scale(arguments, model, options)


def _plan(arguments: argparse.Namespace, model: Any, options: dict[str, Any]) -> None:
    from foldscan.parallel.planner import NoMapping, plan, reasons

    ranked, asked = [], None
    if arguments.mapping is not None:
        asked = _asked(arguments, model)
    try:
        methods = arguments.methods.split(",")
        ranked = plan(model, arguments.cluster, gpus=arguments.gpus, gbs=arguments.gbs, methods=methods, **options)
    except NoMapping:
        if asked is None or arguments.plot is not None:
            raise
    if arguments.plot is not None:
        from foldscan.parallel.planner.plots import plot_mappings

        plot_mappings(ranked, arguments.plot)
    if arguments.json:
        value = {
            "model": model.name,
            "parameters": model.parameters,
            "gpus": arguments.gpus,
            "constants": arguments.constants or "fitted",
            "fitting_mappings": len(ranked),
            "ranking": [p.to_dict() for p in ranked[: arguments.top]],
            "reasons": reasons(ranked) if ranked else [],
        }
        if asked is not None:
            value["asked"] = asked.to_dict()
        print(json.dumps(value))
        return
    from foldscan.parallel.planner.report import print_details, print_ranking, print_reasons

    console = _console()
    if ranked:
        print_ranking(console, ranked, arguments.top)
    print_details(console, asked or ranked[0])
    if ranked:
        print_reasons(console, ranked, asked)


def _scale(arguments: argparse.Namespace, model: Any, options: dict[str, Any]) -> None:
    from foldscan.parallel.planner import scale

    counts = [_count(text, "--scale") for text in arguments.scale.split(",")]
    batches = [arguments.gbs] * len(counts)
    if arguments.grow_gbs:
        batches = [max(1, arguments.gbs * count // arguments.gpus) for count in counts]
    points = scale(model, arguments.cluster, gpus=counts, gbs=batches, **options)
    if arguments.plot is not None:
        from foldscan.parallel.planner.plots import plot_scale

        plot_scale(points, arguments.plot)
    if arguments.json:
        rows = [
            {
                "gpus": point.gpus,
                "gbs": point.gbs,
                "best": point.folded.to_dict() if point.folded else None,
                "unfolded": point.unfolded.to_dict() if point.unfolded else None,
            }
            for point in points
        ]
        print(json.dumps({"model": model.name, "constants": arguments.constants or "fitted", "points": rows}))
        return
    from foldscan.parallel.planner.report import print_scale

    print_scale(_console(), points)


def _asked(arguments: argparse.Namespace, model: Any) -> Any:
    """The prediction for ``--mapping``, whether it fits or not."""
    from dataclasses import replace

    from foldscan.parallel.planner import Workload, load_cluster, load_constants, predict

    work = Workload(
        gbs=arguments.gbs,
        seq=arguments.seq,
        mbs=arguments.mbs,
        skew=arguments.skew,
        dispatcher=arguments.dispatcher,
        vpp=arguments.vpp,
        context=arguments.context,
    )
    cluster = load_cluster(arguments.cluster)
    if arguments.memory is not None:
        cluster = replace(cluster, memory=arguments.memory * 1e9)
    return predict(
        model, _mapping(arguments.mapping, arguments.gpus), work, cluster, load_constants(arguments.constants)
    )


def _mapping(text: str, gpus: int) -> Any:
    """``tp=2,ep=8`` as a `Mapping`."""
    from foldscan.parallel.planner import Mapping

    sizes: dict[str, Any] = {}
    for item in text.split(","):
        axis, _, value = item.partition("=")
        if axis not in ("tp", "cp", "ep", "etp", "pp", "method") or axis in sizes or not value:
            raise ValueError(f"--mapping: got {item!r}, want tp, cp, ep, etp, pp or method, each once, as tp=2,ep=8")
        sizes[axis] = value if axis == "method" else _count(value, "--mapping")
    return Mapping(gpus, **sizes)


def _count(text: str, option: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{option}: got {text!r}, want a positive integer")
    return int(text)


def _console() -> Any:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 160
    return console
