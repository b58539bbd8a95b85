"""Plants faults in a copy of the kernels and expects the named tests to fail on each one.

    python tests/mutation/run.py [FAMILY ...] [--list]

A family is a file FAMILY.yaml beside this one: a list of {file, find, replace, test, why}. `find` must occur exactly
once in `file`. `test` is what pytest takes, or ctest:NAME for a C++ test, built by itself. The copy is built for the
best instruction set of this machine only. Progress is kept in
build/mutation/done.json, so that an interrupted run goes on where it stopped; exit code 1 if a fault survives.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import Progress

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
COPY = ROOT / "build" / "mutation" / "tree"
DONE = ROOT / "build" / "mutation" / "done.json"
CMAKE = [sys.executable, "-m", "cmake"]
SKIPPED = 77


def load(families: list[str]) -> list[dict[str, Any]]:
    """The faults of the families asked for (all by default), each checked to be plantable."""
    known = {p.stem: p for p in sorted(HERE.glob("*.yaml"))}
    unknown = set(families) - set(known)
    if unknown:
        raise SystemExit(f"no such family: {sorted(unknown)}, want some of {sorted(known)}")
    faults = []
    for family in families or known:
        for fault in yaml.safe_load(known[family].read_text()):
            missing = {"file", "find", "replace", "test", "why"} - set(fault)
            if missing:
                raise SystemExit(f"{known[family]}: a fault lacks {sorted(missing)}")
            count = (ROOT / fault["file"]).read_text().count(fault["find"])
            if count != 1:
                raise SystemExit(
                    f"{known[family]}: {fault['find']!r} occurs {count} times in {fault['file']}, want once"
                )
            faults.append({"family": family, **fault})
    return faults


def copy_tree() -> None:
    """A fresh copy of the tracked and new files; its build folder is kept between runs."""
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in listing:
        source, target = ROOT / name, COPY / name
        if not source.is_file():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_bytes() != source.read_bytes():
            shutil.copyfile(source, target)


def build(isa: str, tests: str) -> bool:
    if name := ctest_name(tests):
        folder = ["-S", ".", "-B", "build/cpp", "-G", "Ninja"]
        steps = [[*CMAKE, *folder], [*CMAKE, "--build", "build/cpp", "--target", f"test_{name}"]]
        return all(subprocess.run(step, cwd=COPY, capture_output=True).returncode == 0 for step in steps)
    env = os.environ | {"FOLDSCAN_BUILD_ISAS": isa}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=COPY, env=env, capture_output=True).returncode == 0


def ctest_name(tests: str) -> str | None:
    return tests.removeprefix("ctest:") if tests.startswith("ctest:") else None


def run_tests(tests: str) -> int:
    """The exit code: 0 passed, 77 a C++ test that this machine cannot run."""
    if name := ctest_name(tests):
        program = COPY / "build" / "cpp" / "tests" / "cpp" / f"test_{name}"
        return subprocess.run([program], capture_output=True).returncode
    env = os.environ | {"PYTHONPATH": str(COPY / "python"), "FOLDSCAN_ISA": ""}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()]
    return subprocess.run(command, cwd=COPY, env=env, capture_output=True).returncode


def source_of(tests: str) -> str:
    if ctest_name(tests):
        paths = sorted((ROOT / "tests" / "cpp").iterdir())
    else:
        paths = [ROOT / t.split("::")[0] for t in tests.split()]
    return "".join(path.read_text() for path in paths)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--list", action="store_true", help="print the faults and stop")
    options = parser.parse_args()
    faults = load(options.families)
    if options.list:
        for fault in faults:
            print(f"{fault['family']:12} {fault['file']:40} {fault['why']}")
        return 0
    from foldscan import _native

    isa = _native.capabilities()["isa"]
    done: dict[str, bool] = json.loads(DONE.read_text()) if DONE.exists() else {}
    copy_tree()
    for tests in sorted({f["test"] for f in faults}):
        if not build(isa, tests):
            raise SystemExit(f"the unchanged tree does not build in {COPY}")
        code = run_tests(tests)
        if code == SKIPPED:
            print(f"{tests} cannot run on this machine: its faults are left out")
            faults = [f for f in faults if f["test"] != tests]
        elif code != 0:
            raise SystemExit(f"{tests} fails on the unchanged tree")
    survivors = []
    console = Console()
    with Progress(console=console) as progress:
        task = progress.add_task("faults", total=len(faults))
        for fault in faults:
            clean = (ROOT / fault["file"]).read_text()
            key = hashlib.sha256(json.dumps([fault, clean, source_of(fault["test"])]).encode()).hexdigest()
            if key not in done:
                (COPY / fault["file"]).write_text(clean.replace(fault["find"], fault["replace"]))
                # A fault that does not compile proves nothing: it counts as surviving.
                done[key] = build(isa, fault["test"]) and run_tests(fault["test"]) != 0
                (COPY / fault["file"]).write_text(clean)
                DONE.write_text(json.dumps(done))
            if not done[key]:
                survivors.append(fault)
            console.print(f"{'caught  ' if done[key] else 'SURVIVED'} {fault['family']}: {fault['why']}")
            progress.advance(task)
    console.print(f"{len(faults) - len(survivors)} of {len(faults)} faults caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
