"""Shared by all tests: the helpers module on the path, two threads, a fixed seed."""

import os
import sys
from pathlib import Path

# Idle OpenMP threads that spin make a busy two-core machine several times slower; read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(1234)
