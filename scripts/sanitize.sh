#!/usr/bin/env bash
# The C++ tests under AddressSanitizer + UBSan (all instruction sets) and ThreadSanitizer (the thread pool); then the
# operators' Python tests on a build of the kernels under AddressSanitizer + UBSan (the best instruction set only).
#   scripts/sanitize.sh PYTHON [pytest arguments for the last part]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PWD/${1#"$PWD/"}
shift
tests=("${@:-tests/ops}")

configure() { # name, then cmake arguments
  "$python" -m cmake -S . -B "build/$1" -G Ninja "${@:2}" >"build/$1.log" 2>&1 || { cat "build/$1.log"; exit 1; }
}
compile() { # name, then targets
  "$python" -m cmake --build "build/$1" --target "${@:2}" >"build/$1.log" 2>&1 || { cat "build/$1.log"; exit 1; }
}
mkdir -p build
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1

echo "== core under AddressSanitizer and UBSan"
configure asan -DFOLDSCAN_SANITIZE=address,undefined
compile asan test_core_portable test_core_avx2 test_core_avx512 test_core_avx512_bf16 test_core_avx512_amx \
  test_core_software_tiles test_parallel
for isa in portable avx2 avx512 avx512_bf16 avx512_amx software_tiles; do
  "build/asan/tests/cpp/test_core_$isa" || [ $? -eq 77 ]
done
build/asan/tests/cpp/test_parallel

echo "== thread pool under ThreadSanitizer"
configure tsan -DFOLDSCAN_SANITIZE=thread
compile tsan test_parallel
build/tsan/tests/cpp/test_parallel

echo "== operators under AddressSanitizer and UBSan"
isa=$("$python" -c 'from foldscan import _native; print(_native.capabilities()["isa"])')
torch=$("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent)')
overlay=build/asan-ops/python/foldscan
mkdir -p "$overlay"
for item in python/foldscan/*; do
  [[ $item == *.so ]] || ln -sfn "$PWD/$item" "$overlay/"
done
configure asan-ops -DFOLDSCAN_SANITIZE=address,undefined -DFOLDSCAN_ISAS="$isa" -DFOLDSCAN_TESTS=OFF \
  -DFOLDSCAN_TORCH_DIR="$torch" -DFOLDSCAN_PYTHON="$python" -DFOLDSCAN_OUTPUT_DIR="$PWD/$overlay"
compile asan-ops all
# The C++ library first of all, or the sanitizer does not find the function that throws exceptions.
runtime="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so)"
PYTHONPATH=$PWD/build/asan-ops/python LD_PRELOAD=$runtime \
  ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:log_path=$PWD/build/asan-ops/report \
  "$python" -m pytest -x -q -p no:cacheprovider -k "not memory and not compile" "${tests[@]}" || {
  cat build/asan-ops/report* # pytest swallows what a dying process prints
  exit 1
}
