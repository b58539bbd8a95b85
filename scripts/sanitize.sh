#!/usr/bin/env bash
# C++ tests under AddressSanitizer + UBSan (all instruction sets) and ThreadSanitizer (the thread pool).
set -euo pipefail
python=$1
run() { # name, sanitizers, targets..
  local name=$1 sanitizers=$2
  shift 2
  "$python" -m cmake -S . -B "build/$name" -G Ninja -DFOLDSCAN_SANITIZE="$sanitizers" -DCMAKE_BUILD_TYPE=Release >/dev/null
  "$python" -m cmake --build "build/$name" --target "$@" >/dev/null
}
run asan address,undefined test_core_portable test_core_avx2 test_core_avx512 test_core_avx512_bf16 test_parallel
for t in portable avx2 avx512 avx512_bf16; do
  UBSAN_OPTIONS=halt_on_error=1 "build/asan/tests/cpp/test_core_$t" || [ $? -eq 77 ]
done
UBSAN_OPTIONS=halt_on_error=1 build/asan/tests/cpp/test_parallel
run tsan thread test_parallel
build/tsan/tests/cpp/test_parallel
