// SIMD layer on the vector extensions of GCC and Clang: SSE2 on any x86-64, NEON on any aarch64, and other targets. See
// simd.h.
#pragma once

#include <cmath>

#include "core/types.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace foldscan::FOLDSCAN_ISA {

constexpr int kLanes = 4;
#if defined(__aarch64__)  // NEON: 24 accumulators, four vectors of B and one of A fit the 32 registers
constexpr int kMR = 6;
constexpr int kNV = 4;
#else
constexpr int kMR = 4;
constexpr int kNV = 2;
#endif
constexpr int kMRPairs = 4;
constexpr int kPairsAtOnce = 1;

typedef float float4 __attribute__((vector_size(16)));
typedef int32_t int4 __attribute__((vector_size(16)));

struct VM {
  int4 m;
  static FOLDSCAN_INLINE VM first(int n) { return {int4{0, 1, 2, 3} < (int4{} + n)}; }
  FOLDSCAN_INLINE VM operator&(VM o) const { return {m & o.m}; }
  FOLDSCAN_INLINE bool any() const { return (m[0] | m[1] | m[2] | m[3]) != 0; }
};

struct VF {
  float4 v;
  static FOLDSCAN_INLINE VF zero() { return {float4{}}; }
  static FOLDSCAN_INLINE VF set(float x) { return {float4{x, x, x, x}}; }
  static FOLDSCAN_INLINE VF iota() { return {float4{0, 1, 2, 3}}; }
  static FOLDSCAN_INLINE VF load(const float* p) {
    VF r;
    std::memcpy(&r.v, p, 16);
    return r;
  }
  static FOLDSCAN_INLINE VF load(const bf16* p) {
    return {float4{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
  }
  template <class T>
  static FOLDSCAN_INLINE VF load(const T* p, int n) {
    VF r = zero();
    for (int i = 0; i < n; ++i) r.v[i] = to_float(p[i]);
    return r;
  }
  FOLDSCAN_INLINE void store(float* p) const { std::memcpy(p, &v, 16); }
  FOLDSCAN_INLINE void store(bf16* p) const { store(p, 4); }
  template <class T>
  FOLDSCAN_INLINE void store(T* p, int n) const {
    for (int i = 0; i < n; ++i) p[i] = from_float<T>(v[i]);
  }

  FOLDSCAN_INLINE VF operator+(VF o) const { return {v + o.v}; }
  FOLDSCAN_INLINE VF operator-(VF o) const { return {v - o.v}; }
  FOLDSCAN_INLINE VF operator*(VF o) const { return {v * o.v}; }
  FOLDSCAN_INLINE VF operator/(VF o) const { return {v / o.v}; }
  FOLDSCAN_INLINE VF operator-() const { return {-v}; }
  FOLDSCAN_INLINE VM operator<(VF o) const { return {v < o.v}; }
  FOLDSCAN_INLINE VM operator<=(VF o) const { return {v <= o.v}; }
  FOLDSCAN_INLINE VM operator==(VF o) const { return {v == o.v}; }

  FOLDSCAN_INLINE VF exp2_int() const {
    return {reinterpret_cast<float4>((__builtin_convertvector(v, int4) + 127) << 23)};
  }
  FOLDSCAN_INLINE VF times_exp2(VF n) const { return *this * n.exp2_int(); }
  FOLDSCAN_INLINE VF exponent() const {
    return {__builtin_convertvector((reinterpret_cast<int4>(v) >> 23) - 127, float4)};
  }
  FOLDSCAN_INLINE VF mantissa() const {
    return {reinterpret_cast<float4>((reinterpret_cast<int4>(v) & 0x7fffff) | 0x3f800000)};
  }
};

FOLDSCAN_INLINE VF select(VM m, VF a, VF b) {
  return {reinterpret_cast<float4>((reinterpret_cast<int4>(a.v) & m.m) | (reinterpret_cast<int4>(b.v) & ~m.m))};
}
// Fused where the hardware has it; a library call per lane would cost a hundred times more than it gives.
FOLDSCAN_INLINE VF fma(VF a, VF b, VF c) {
#if defined(__aarch64__)
  return {vfmaq_f32(c.v, a.v, b.v)};
#else
  return {a.v * b.v + c.v};
#endif
}
FOLDSCAN_INLINE VF fnma(VF a, VF b, VF c) { return fma(-a, b, c); }
FOLDSCAN_INLINE VF vmax(VF a, VF b) { return select(VM{a.v > b.v}, a, b); }
FOLDSCAN_INLINE VF vmin(VF a, VF b) { return select(VM{a.v < b.v}, a, b); }
FOLDSCAN_INLINE VF vabs(VF a) { return {reinterpret_cast<float4>(reinterpret_cast<int4>(a.v) & 0x7fffffff)}; }
FOLDSCAN_INLINE VF vsqrt(VF a) {
  return {float4{__builtin_sqrtf(a.v[0]), __builtin_sqrtf(a.v[1]), __builtin_sqrtf(a.v[2]), __builtin_sqrtf(a.v[3])}};
}
FOLDSCAN_INLINE VF vreciprocal(VF a) { return VF::set(1.0f) / a; }
// Adding and subtracting 1.5 * 2^23 rounds to nearest even for |x| < 2^22.
FOLDSCAN_INLINE VF vround(VF a) {
  const VF magic = VF::set(12582912.0f);
  return (a + magic) - magic;
}
FOLDSCAN_INLINE float reduce_add(VF a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
FOLDSCAN_INLINE float reduce_max(VF a) {
  const float x = a.v[0] > a.v[1] ? a.v[0] : a.v[1], y = a.v[2] > a.v[3] ? a.v[2] : a.v[3];
  return x > y ? x : y;
}

struct VP {
  int4 v;
  static FOLDSCAN_INLINE VP load(const bf16* p) {
    VP r;
    std::memcpy(&r.v, p, 16);
    return r;
  }
  static FOLDSCAN_INLINE VP broadcast(const bf16* pair) {
    int32_t x;
    std::memcpy(&x, pair, 4);
    return {int4{x, x, x, x}};
  }
  static FOLDSCAN_INLINE VP interleave(const bf16* a, const bf16* b, int n) {
    alignas(32) bf16 t[2 * kLanes] = {};
    for (int i = 0; i < n; ++i) {
      t[2 * i] = a[i];
      if (b) t[2 * i + 1] = b[i];
    }
    return load(t);
  }
  static FOLDSCAN_INLINE void zip(const bf16* a, const bf16* b, VP& low, VP& high) {
    low = interleave(a, b, kLanes);
    high = interleave(a + kLanes, b + kLanes, kLanes);
  }
  static FOLDSCAN_INLINE VP narrow(VF a, VF b) {
    bf16 t[2 * kLanes];
    a.store(t);
    b.store(t + kLanes);
    return load(t);
  }
  static FOLDSCAN_INLINE VP zip(VF a, VF b) {
    bf16 lo[kLanes], hi[kLanes];
    a.store(lo);
    b.store(hi);
    return interleave(lo, hi, kLanes);
  }
  FOLDSCAN_INLINE VF as_floats() const { return {reinterpret_cast<float4>(v)}; }
  FOLDSCAN_INLINE void store(bf16* p) const { std::memcpy(p, &v, 16); }
};

// Pairs (lo, hi) of values that are bf16 already.
FOLDSCAN_INLINE VP pairs(VF lo, VF hi) {
  return {((reinterpret_cast<int4>(lo.v) >> 16) & 0xffff) | reinterpret_cast<int4>(hi.v)};
}

struct VC {
  int4 bit;
  static FOLDSCAN_INLINE VC load(const uint8_t* p, int shift) {
    const int4 nibble = int4{p[0] >> shift, p[1] >> shift, p[2] >> shift, p[3] >> shift} & 15;
    return {(int4{} + 1) << nibble};
  }
  FOLDSCAN_INLINE VM in(int set) const { return {(bit & set) != 0}; }
};

FOLDSCAN_INLINE VF dot2(VF acc, VP a, VP b) {
  const int4 high = int4{} + static_cast<int32_t>(0xffff0000u);
  const VF a0{reinterpret_cast<float4>(a.v << 16)}, b0{reinterpret_cast<float4>(b.v << 16)};
  const VF a1{reinterpret_cast<float4>(a.v & high)}, b1{reinterpret_cast<float4>(b.v & high)};
  return fma(a1, b1, fma(a0, b0, acc));
}

FOLDSCAN_INLINE void transpose(VF (&r)[4]) {
  for (int i = 0; i < 4; ++i)
    for (int j = i + 1; j < 4; ++j) {
      const float t = r[i].v[j];
      r[i].v[j] = r[j].v[i];
      r[j].v[i] = t;
    }
}

}  // namespace foldscan::FOLDSCAN_ISA
