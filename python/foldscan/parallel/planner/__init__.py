"""Which mapping of a model to GPUs trains fastest: bytes, memory and time of every legal one, predicted."""

from foldscan.parallel.planner.cluster import Cluster, Constants, load_cluster, load_constants
from foldscan.parallel.planner.dispatcher import Advice, recommend
from foldscan.parallel.planner.mapping import Mapping, Workload, check_mapping, legal_mappings
from foldscan.parallel.planner.memory import Memory, memory
from foldscan.parallel.planner.plan import NoMapping, Prediction, ScalePoint, compare, plan, predict, reasons, scale
from foldscan.parallel.planner.shapes import ModelShape, load_model, standard_models

__all__ = [
    "Advice",
    "Cluster",
    "Constants",
    "Mapping",
    "Memory",
    "ModelShape",
    "NoMapping",
    "Prediction",
    "ScalePoint",
    "Workload",
    "check_mapping",
    "compare",
    "legal_mappings",
    "load_cluster",
    "load_constants",
    "load_model",
    "memory",
    "plan",
    "predict",
    "reasons",
    "recommend",
    "scale",
    "standard_models",
]
