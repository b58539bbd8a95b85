"""Every instruction set of this build and machine computes the same functions (bits may differ between them)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from foldscan import _native

HERE = Path(__file__).resolve().parent
# Fast, wide tests of each family; the one in use is covered by the whole suite.
SELECTION = [
    "ops/test_linear.py::test_forward_and_gradients",
    "ops/test_scan.py::test_against_the_recurrence",
    "ops/test_scan.py::test_packed_sequences",
    "ops/test_scan.py::test_cached_extension_has_the_bits_of_the_whole",
    "ops/test_ssm_conv.py::test_packed_with_states",
    "ops/test_ssm_steps.py::test_state_update",
    "ops/test_ssm_steps.py::test_rmsnorm",
    "ops/test_attention.py::test_lengths",
    "ops/test_moe.py::test_mlp_forward_and_gradients",
    "ops/test_losses.py::test_cross_entropy_and_gradients",
    "ops/test_pruning.py::test_linear_has_the_bits_of_the_dense_layer_for_any_rows_and_threads",
]


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16", "avx512_amx"])
def test_forced_instruction_set(isa: str) -> None:
    capabilities = _native.capabilities()
    if isa in capabilities["isa_missing"]:
        pytest.skip(f"{isa}: {capabilities['isa_missing'][isa]}")
    if isa == capabilities["isa"]:
        assert isa == capabilities["isa_available"][-1] or os.environ.get("FOLDSCAN_ISA") == isa
        return
    tests = [str(HERE / name) for name in SELECTION]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests],
        env=os.environ | {"FOLDSCAN_ISA": isa},
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
