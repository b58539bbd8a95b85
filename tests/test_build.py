"""What the build must be: stable ABI only, portable flags, one capability report, NumPy entry points that are right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import foldscan
import numpy as np
import pytest
from foldscan import _native, info

ROOT = Path(__file__).resolve().parent.parent
OPERATORS = Path(foldscan.__file__).parent / "_ops.so"


def test_operators_use_the_stable_abi_only() -> None:
    """No undefined C++ symbol of ATen or c10: one binary for every PyTorch from 2.10 on."""
    listing = subprocess.run(["nm", "-DC", "--undefined-only", OPERATORS], capture_output=True, text=True, check=True)
    symbols = listing.stdout.splitlines()
    assert len(symbols) > 10
    leaks = [s for s in symbols if "at::" in s or "c10::" in s or "torch::" in s]
    assert leaks == []
    assert any("aoti_torch" in s or "torch_call_dispatcher" in s for s in symbols)


def test_no_native_flags_and_no_framework_in_the_core() -> None:
    build = (ROOT / "CMakeLists.txt").read_text() + (ROOT / "setup.py").read_text()
    assert "march=native" not in build
    done = subprocess.run([sys.executable, ROOT / "scripts" / "check_floors.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_report_and_info_command() -> None:
    report = info.report()
    assert report["isa"] in report["isa_available"] and report["threads"] >= 1 and report["cuda"] is False
    assert not set(report["isa_missing"]) & set(report["isa_available"])
    done = subprocess.run([sys.executable, "-m", "foldscan", "info", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["version"] == foldscan.__version__


def _error_of_forced(isa: str) -> str:
    code = f"import os; os.environ['FOLDSCAN_ISA'] = '{isa}'; from foldscan import _native; _native.capabilities()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    return done.stderr


def test_unknown_instruction_set_is_one_clear_error() -> None:
    assert "FOLDSCAN_ISA: got 'avx9', want one of portable, avx2" in _error_of_forced("avx9")


def test_missing_instruction_set_says_what_is_missing() -> None:
    missing = _native.capabilities()["isa_missing"]
    if not missing:
        pytest.skip("this CPU and build have all instruction sets")
    for isa, what in missing.items():
        assert f"FOLDSCAN_ISA: {isa} is not available: {what}" in _error_of_forced(isa)


def test_numpy_gemm() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((37, 65), dtype=np.float32), rng.standard_normal((65, 19), dtype=np.float32)
    want = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(_native.gemm(a, b), want, rtol=0, atol=1e-4)
    np.testing.assert_allclose(_native.gemm(a, b, "bfloat16"), want, rtol=0, atol=0.3)
    assert abs(_native.gemm(a, b, "bfloat16") - want).max() > 1e-3
    with pytest.raises(ValueError, match="want matrices"):
        _native.gemm(a, a)
    with pytest.raises(ValueError, match="dtype: got 'int8'"):
        _native.gemm(a, b, "int8")


def test_peak_is_a_rate() -> None:
    assert 1e8 < _native.peak_flops("float32", 0.02) < 1e13
    with pytest.raises(ValueError, match="seconds"):
        _native.peak_flops("float32", 0.0)
