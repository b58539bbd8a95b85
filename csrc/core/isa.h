// Which instruction set runs: decided once at load time from cpuid, or forced by FOLDSCAN_ISA.
//
// A kernel file is compiled once per instruction set with FOLDSCAN_ISA set to the name below; its functions live in
// namespace foldscan::FOLDSCAN_ISA. The entry point that callers see picks one of them through FOLDSCAN_DISPATCH.
#pragma once

namespace foldscan {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, avx512_amx = 4 };
// The later, the better.
constexpr Isa kIsas[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::avx512_amx};

// The one in use. Throws std::runtime_error when FOLDSCAN_ISA names one that is unknown or lacks something here.
Isa current_isa();
const char* isa_name(Isa isa);
// What this build, CPU or system lacks to run it; nullptr if nothing. Asking for avx512_amx asks Linux for permission
// to use the tile registers, which holds for all threads of the process and for its forks.
const char* isa_missing(Isa isa);

}  // namespace foldscan

// Declares the per-ISA copies of family::function(const Params&) and defines family::cpu::function, which calls the
// copy of the ISA in use. To be used at global scope in a file that is compiled once. FOLDSCAN_HAS_* say which copies
// the build contains (all that the compiler knows, unless a developer asked for fewer).
#define FOLDSCAN_DECLARE_COPY(isa, family, function, Params) \
  namespace foldscan::isa::family {                          \
  void function(const ::foldscan::family::Params&);          \
  }

#ifdef FOLDSCAN_HAS_PORTABLE
#define FOLDSCAN_COPY_PORTABLE(family, function) ::foldscan::portable::family::function
#else
#define FOLDSCAN_COPY_PORTABLE(family, function) nullptr
#endif
#ifdef FOLDSCAN_HAS_AVX2
#define FOLDSCAN_COPY_AVX2(family, function) ::foldscan::avx2::family::function
#else
#define FOLDSCAN_COPY_AVX2(family, function) nullptr
#endif
#ifdef FOLDSCAN_HAS_AVX512
#define FOLDSCAN_COPY_AVX512(family, function) ::foldscan::avx512::family::function
#else
#define FOLDSCAN_COPY_AVX512(family, function) nullptr
#endif
#ifdef FOLDSCAN_HAS_AVX512_BF16
#define FOLDSCAN_COPY_AVX512_BF16(family, function) ::foldscan::avx512_bf16::family::function
#else
#define FOLDSCAN_COPY_AVX512_BF16(family, function) nullptr
#endif
#ifdef FOLDSCAN_HAS_AVX512_AMX
#define FOLDSCAN_COPY_AVX512_AMX(family, function) ::foldscan::avx512_amx::family::function
#else
#define FOLDSCAN_COPY_AVX512_AMX(family, function) nullptr
#endif

#define FOLDSCAN_DISPATCH(family, function, Params)                                          \
  FOLDSCAN_DECLARE_COPY(portable, family, function, Params)                                  \
  FOLDSCAN_DECLARE_COPY(avx2, family, function, Params)                                      \
  FOLDSCAN_DECLARE_COPY(avx512, family, function, Params)                                    \
  FOLDSCAN_DECLARE_COPY(avx512_bf16, family, function, Params)                               \
  FOLDSCAN_DECLARE_COPY(avx512_amx, family, function, Params)                                \
  namespace foldscan::family::cpu {                                                          \
  void function(const Params& p) {                                                           \
    static void (*const table[])(const Params&) = {                                          \
        FOLDSCAN_COPY_PORTABLE(family, function), FOLDSCAN_COPY_AVX2(family, function),      \
        FOLDSCAN_COPY_AVX512(family, function), FOLDSCAN_COPY_AVX512_BF16(family, function), \
        FOLDSCAN_COPY_AVX512_AMX(family, function)};                                         \
    table[static_cast<int>(current_isa())](p);                                               \
  }                                                                                          \
  }
