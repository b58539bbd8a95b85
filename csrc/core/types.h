// Element types and the small integer helpers that every kernel needs. Everything here is force-inlined: a kernel file
// is compiled once per instruction set, and a weak symbol emitted by the AVX-512 copy must never serve the baseline.
#pragma once

#include <cstdint>
#include <cstring>

#define FOLDSCAN_INLINE inline __attribute__((always_inline))
// Before the body of a lambda: always inlined.
#define FOLDSCAN_LAMBDA __attribute__((always_inline))

namespace foldscan {

using std::int32_t;
using std::int64_t;

enum class DType : int32_t { kF32 = 0, kBF16 = 1 };

// bfloat16: the upper half of an fp32.
struct bf16 {
  uint16_t bits;
};

FOLDSCAN_INLINE float to_float(float x) { return x; }
FOLDSCAN_INLINE float to_float(bf16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// Round to nearest even; NaN stays NaN.
FOLDSCAN_INLINE bf16 to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>((u >> 16) | 0x40)};
  return bf16{static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}

template <class T>
FOLDSCAN_INLINE T from_float(float f);
template <>
FOLDSCAN_INLINE float from_float<float>(float f) {
  return f;
}
template <>
FOLDSCAN_INLINE bf16 from_float<bf16>(float f) {
  return to_bf16(f);
}

FOLDSCAN_INLINE int64_t imin(int64_t a, int64_t b) { return a < b ? a : b; }
FOLDSCAN_INLINE int64_t imax(int64_t a, int64_t b) { return a > b ? a : b; }
FOLDSCAN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FOLDSCAN_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr int64_t element_size(DType t) { return t == DType::kF32 ? 4 : 2; }

}  // namespace foldscan
