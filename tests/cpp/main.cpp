#include "check.h"
#include "core/isa.h"

int main() {
  for (auto isa : foldscan::kIsas) {
    if (__builtin_strcmp(foldscan::isa_name(isa), FOLDSCAN_TEST_ISA) != 0) continue;
    const char* missing = foldscan::isa_missing(isa);
    if (missing && isa == foldscan::Isa::avx512_amx && !foldscan::isa_missing(foldscan::Isa::avx512_bf16)) {
      std::printf("%s: its instructions are emulated\n", missing);
      emulate_tiles();
      missing = nullptr;
    }
    if (missing) {
      std::printf("skipped: %s\n", missing);
      return 77;
    }
    run_tile_tests();
    run_gemm_tests();
    run_vmath_tests();
  }
  std::printf("%d passed, %d failed\n", foldscan::test::passed, foldscan::test::failed);
  return foldscan::test::failed == 0 && foldscan::test::passed > 0 ? 0 : 1;
}
