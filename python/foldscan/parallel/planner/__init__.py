"""Which mapping of a model to GPUs trains fastest: bytes, memory and time of every legal one, predicted."""
