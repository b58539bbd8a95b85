"""The benchmark harness behind ``foldscan bench``: cases with their peers, interleaved timing, memory, JSON lines."""
