"""Builds the compiled half of foldscan by driving CMakeLists.txt with ninja. Metadata lives in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """One CMake run gives both modules: the operator library (_ops) and the pybind11 module (_native)."""

    def run(self) -> None:
        import torch

        package = ROOT / "python" if self.inplace else Path(self.build_lib).resolve()
        output = package / "foldscan"
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        args = [
            f"-DFOLDSCAN_TORCH_DIR={Path(torch.__file__).parent}",
            f"-DFOLDSCAN_PYTHON={sys.executable}",
            f"-DFOLDSCAN_OUTPUT_DIR={output}",
            "-DFOLDSCAN_TESTS=OFF",
        ]
        # A developer's quick build of one instruction set must not be remembered by the next full one.
        isas = os.environ.get("FOLDSCAN_BUILD_ISAS")
        args.append(f"-DFOLDSCAN_ISAS={isas}" if isas else "-UFOLDSCAN_ISAS")
        software_tiles = os.environ.get("FOLDSCAN_BUILD_SOFTWARE_TILES", "0") != "0"
        args.append(f"-DFOLDSCAN_SOFTWARE_TILES={'ON' if software_tiles else 'OFF'}")
        cmake = [sys.executable, "-m", "cmake"] if _has_module("cmake") else ["cmake"]
        subprocess.run([*cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *args], check=True)
        subprocess.run([*cmake, "--build", str(build)], check=True)


def _has_module(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


setup(ext_modules=[Extension("foldscan._native", [])], cmdclass={"build_ext": CMakeBuild})
