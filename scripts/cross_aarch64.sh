#!/usr/bin/env bash
# Cross-compiles all kernels for aarch64, where the baseline is NEON, and runs the C++ tests under QEMU's user emulation.
# Debian and Ubuntu: apt-get install g++-aarch64-linux-gnu qemu-user
#   scripts/cross_aarch64.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
for tool in aarch64-linux-gnu-g++ qemu-aarch64; do
  command -v $tool >/dev/null || { echo "$tool is missing: apt-get install g++-aarch64-linux-gnu qemu-user" >&2; exit 1; }
done
mkdir -p build
log=build/aarch64.log
"$python" -m cmake -S . -B build/aarch64 -G Ninja -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
  "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu" >$log || { cat $log; exit 1; }
"$python" -m cmake --build build/aarch64 >$log || { cat $log; exit 1; }
"$(dirname "$(command -v "$python")")/ctest" --test-dir build/aarch64 --output-on-failure --no-tests=error
