#include "core/isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace foldscan {
namespace {

constexpr Isa kAll[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16};

#if defined(__x86_64__)
[[maybe_unused]] bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

Isa choose() {
  if (const char* forced = std::getenv("FOLDSCAN_ISA"); forced && *forced) {
    for (Isa isa : kAll) {
      if (std::strcmp(forced, isa_name(isa)) != 0) continue;
      if (isa_available(isa)) return isa;
      throw std::runtime_error(std::string("FOLDSCAN_ISA: ") + forced + " is not available on this CPU");
    }
    throw std::runtime_error(std::string("FOLDSCAN_ISA: got '") + forced +
                             "', want portable, avx2, avx512 or avx512_bf16");
  }
  for (int i = static_cast<int>(Isa::avx512_bf16); i >= 0; --i)
    if (isa_available(static_cast<Isa>(i))) return static_cast<Isa>(i);
  throw std::runtime_error("foldscan: this build holds no kernels for this CPU");
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return "portable";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_bf16:
      return "avx512_bf16";
  }
  return "?";
}

bool isa_available(Isa isa) {
  switch (isa) {
#ifdef FOLDSCAN_HAS_PORTABLE
    case Isa::portable:
      return true;
#endif
#ifdef FOLDSCAN_HAS_AVX2
    case Isa::avx2:
      return has_avx2();
#endif
#ifdef FOLDSCAN_HAS_AVX512
    case Isa::avx512:
      return has_avx512();
#endif
#ifdef FOLDSCAN_HAS_AVX512_BF16
    case Isa::avx512_bf16:
      return has_avx512() && __builtin_cpu_supports("avx512bf16");
#endif
    default:
      return false;
  }
}

Isa current_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace foldscan
