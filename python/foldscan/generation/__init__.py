"""Generation: batched prefill and decode whose bits do not depend on the batch, and sampling that does not either."""

from foldscan.generation.engine import Engine, Generation
from foldscan.generation.sampling import Sampling, choose, gumbel_noise

__all__ = ["Engine", "Generation", "Sampling", "choose", "gumbel_noise"]
