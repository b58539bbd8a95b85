"""Training: configuration, the loop, checkpoints that survive kill -9, evaluation, metrics."""

from foldscan.training.config import TrainConfig
from foldscan.training.corpus import PreparedData, prepare
from foldscan.training.display import Display
from foldscan.training.evaluate import Evaluation, evaluate
from foldscan.training.loop import TrainResult, train
from foldscan.training.schedule import learning_rate

__all__ = [
    "Display",
    "Evaluation",
    "PreparedData",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "learning_rate",
    "prepare",
    "train",
]
