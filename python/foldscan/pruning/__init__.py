"""Pruning of hybrid models: scores from activations, gathered while the data streams by."""

from foldscan.pruning.scores import ScoreAccumulator

__all__ = ["ScoreAccumulator"]
