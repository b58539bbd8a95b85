#include "core/isa.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace foldscan {
namespace {

[[maybe_unused]] constexpr const char* kNotCompiled = "this build holds no kernels for it";

#if defined(__x86_64__)
[[maybe_unused]] const char* missing_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? nullptr : "this CPU has no AVX2 with FMA";
}
[[maybe_unused]] const char* missing_avx512() {
  if (const char* missing = missing_avx2()) return missing;
  const bool all = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return all ? nullptr : "this CPU has no AVX-512 (F, BW, DQ, VL)";
}
[[maybe_unused]] const char* missing_avx512_bf16() {
  if (const char* missing = missing_avx512()) return missing;
  return __builtin_cpu_supports("avx512bf16") ? nullptr : "this CPU has no AVX512-BF16";
}

[[maybe_unused]] const char* missing_amx() {
  if (const char* missing = missing_avx512_bf16()) return missing;
#if defined(FOLDSCAN_SOFTWARE_TILES)
  return nullptr;
#else
  unsigned a = 0, b = 0, c = 0, features = 0;
  __get_cpuid_count(7, 0, &a, &b, &c, &features);
  if (!(features & (1u << 24))) return "this CPU has no AMX-TILE";
  if (!(features & (1u << 22))) return "this CPU has no AMX-BF16";
  constexpr int kTileConfig = 17, kTileData = 18;  // components of the extended state
  unsigned enabled = 0, high = 0;
  asm("xgetbv" : "=a"(enabled), "=d"(high) : "c"(0));
  if (~enabled & ((1u << kTileConfig) | (1u << kTileData))) return "the system does not enable the tile state (XCR0)";
#if defined(__linux__)
  // Linux saves tile data only for a process that asked (its documentation of xstate): the permission is valid for all
  // threads, also those that run already, is inherited by fork and ends with exec. It is refused where a thread's
  // alternate signal stack is too small for the larger state.
  constexpr long kRequestPermission = 0x1023;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0)
    return "Linux does not permit tile data (arch_prctl, ARCH_REQ_XCOMP_PERM)";
#endif
  return nullptr;
#endif
}
#endif

Isa choose() {
  if (const char* forced = std::getenv("FOLDSCAN_ISA"); forced && *forced) {
    std::string names;
    for (Isa isa : kIsas) {
      names += std::string(names.empty() ? "" : ", ") + isa_name(isa);
      if (std::strcmp(forced, isa_name(isa)) != 0) continue;
      const char* missing = isa_missing(isa);
      if (!missing) return isa;
      throw std::runtime_error(std::string("FOLDSCAN_ISA: ") + forced + " is not available: " + missing);
    }
    throw std::runtime_error(std::string("FOLDSCAN_ISA: got '") + forced + "', want one of " + names);
  }
  const Isa* best = nullptr;
  for (const Isa& isa : kIsas)
    if (!isa_missing(isa)) best = &isa;
  if (!best) throw std::runtime_error("foldscan: this build holds no kernels for this CPU");
  return *best;
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
    case Isa::avx512_amx:
      return "avx512_amx";
  }
  return "?";
}

const char* isa_missing(Isa isa) {
  switch (isa) {
#ifdef FOLDSCAN_HAS_PORTABLE
    case Isa::portable:
      return nullptr;
#endif
#ifdef FOLDSCAN_HAS_AVX2
    case Isa::avx2:
      return missing_avx2();
#endif
#ifdef FOLDSCAN_HAS_AVX512
    case Isa::avx512:
      return missing_avx512();
#endif
#ifdef FOLDSCAN_HAS_AVX512_BF16
    case Isa::avx512_bf16:
      return missing_avx512_bf16();
#endif
#ifdef FOLDSCAN_HAS_AVX512_AMX
    case Isa::avx512_amx:
      return missing_amx();
#endif
    default:
      return kNotCompiled;
  }
}

Isa current_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace foldscan
