"""The rules of the house that a machine can check: no import upward, no framework in the core, ISA copies apart.

Run by `make lint`; prints every breach and exits 1 if there is one.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "foldscan"

# Floors from the ground up; a module may import its own floor and those below. Unlisted names are systems (the top).
FLOORS = [
    {"__init__", "_native", "py"},
    {"info", "reference"},
    {"ops", "triton_kernels"},
    {"nn"},
    {"models"},
]
SYSTEMS = len(FLOORS)
APPLICATIONS = {"bench": SYSTEMS + 1, "demo": SYSTEMS + 1, "cli": SYSTEMS + 2, "__main__": SYSTEMS + 3}


def floor_of(module: str) -> int:
    """Floor of ``foldscan.<module>``."""
    for level, names in enumerate(FLOORS):
        if module in names:
            return level
    return APPLICATIONS.get(module, SYSTEMS)


def imported(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, first module below foldscan) of every import of this package, also inside functions."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module] if node.module != "foldscan" else [f"foldscan.{a.name}" for a in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "foldscan" and len(parts) > 1 and parts[1] not in ("__version__",):
                found.append((node.lineno, parts[1]))
    return found


def check_python() -> list[str]:
    problems = []
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        own = relative.parts[0].removesuffix(".py")
        for line, target in imported(ast.parse(path.read_text(), str(path))):
            if floor_of(target) > floor_of(own):
                problems.append(f"{path.relative_to(ROOT)}:{line}: {own} imports {target}, which is above it")
    return problems


FAMILY = re.compile(r'#include "(\w+)/')


def check_csrc() -> list[str]:
    problems = []
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix not in (".h", ".cpp", ".cu", ".cuh"):
            continue
        own = path.relative_to(ROOT / "csrc").parts[0]
        for number, line in enumerate(path.read_text().splitlines(), 1):
            where = f"{path.relative_to(ROOT)}:{number}"
            if own != "bindings" and re.search(r"#include\s*[<\"](torch|ATen|c10|pybind11|Python)", line):
                problems.append(f"{where}: framework header below bindings")
            target = FAMILY.search(line)
            if target and own not in ("bindings", target[1]) and target[1] != "core":
                problems.append(f"{where}: {own} includes {target[1]}; families know only core")
            if "cpu" in path.parts and re.search(r"#include <(vector|algorithm|string|iostream|functional|map)>", line):
                problems.append(f"{where}: a per-ISA file must not instantiate library templates (weak symbols)")
    return problems


def check_weak_symbols() -> list[str]:
    """Weak symbols of per-ISA objects must carry their ISA's namespace, or the linker could mix the copies."""
    problems = []
    for obj in sorted((ROOT / "build").glob("cmake-*/CMakeFiles/foldscan_kernels_*.dir/**/*.o")):
        isa = re.search(r"foldscan_kernels_(\w+)\.dir", str(obj))
        listing = subprocess.run(["nm", "-C", "--defined-only", str(obj)], capture_output=True, text=True).stdout
        for line in listing.splitlines():
            kind, name = line.split(maxsplit=2)[1:3] if len(line.split(maxsplit=2)) == 3 else ("", "")
            if kind in ("W", "V", "u") and isa and f"::{isa[1]}::" not in name and not name.startswith("DW.ref."):
                problems.append(f"{obj.name} ({isa[1]}): weak symbol {name}")
    return problems


def main() -> int:
    problems = check_python() + check_csrc() + check_weak_symbols()
    print("\n".join(problems) if problems else "floors: nothing imports upward, the core is framework-free")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
