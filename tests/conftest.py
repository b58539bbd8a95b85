"""Shared by all tests: the helpers module on the path, two threads, a fixed seed."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(1234)
