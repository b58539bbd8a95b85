#include <initializer_list>

#include "check.h"
#include "core/isa.h"

int main() {
  const auto all = {foldscan::Isa::portable, foldscan::Isa::avx2, foldscan::Isa::avx512, foldscan::Isa::avx512_bf16};
  for (auto isa : all) {
    if (__builtin_strcmp(foldscan::isa_name(isa), FOLDSCAN_TEST_ISA) != 0) continue;
    if (!foldscan::isa_available(isa)) {
      std::printf("skipped: this CPU has no %s\n", FOLDSCAN_TEST_ISA);
      return 77;
    }
    run_gemm_tests();
    run_vmath_tests();
  }
  std::printf("%d passed, %d failed\n", foldscan::test::passed, foldscan::test::failed);
  return foldscan::test::failed == 0 && foldscan::test::passed > 0 ? 0 : 1;
}
