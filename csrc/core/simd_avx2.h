// SIMD layer for AVX2 + FMA. See simd.h.
#pragma once

#include <immintrin.h>

#include "core/types.h"

namespace foldscan::FOLDSCAN_ISA {

constexpr int kLanes = 8;
// 12 accumulators, two vectors of B and one broadcast of A fit the 16 registers.
constexpr int kMR = 6;
constexpr int kMRPairs = 4;  // rows of the bf16 tile: the halves of a pair take registers of their own
constexpr int kPairsAtOnce = 1;
constexpr int kNV = 2;

struct VM {
  __m256 m;
  static FOLDSCAN_INLINE VM first(int n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane))};
  }
  FOLDSCAN_INLINE VM operator&(VM o) const { return {_mm256_and_ps(m, o.m)}; }
  FOLDSCAN_INLINE bool any() const { return _mm256_movemask_ps(m) != 0; }
};

struct VF {
  __m256 v;
  static FOLDSCAN_INLINE VF zero() { return {_mm256_setzero_ps()}; }
  static FOLDSCAN_INLINE VF set(float x) { return {_mm256_set1_ps(x)}; }
  static FOLDSCAN_INLINE VF iota() { return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)}; }
  static FOLDSCAN_INLINE VF load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static FOLDSCAN_INLINE VF load(const float* p, int n) {
    return {_mm256_maskload_ps(p, _mm256_castps_si256(VM::first(n).m))};
  }
  static FOLDSCAN_INLINE VF load(const bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static FOLDSCAN_INLINE VF load(const bf16* p, int n) {
    alignas(16) bf16 t[8] = {};
    for (int i = 0; i < n; ++i) t[i] = p[i];
    return load(t);
  }
  FOLDSCAN_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  FOLDSCAN_INLINE void store(float* p, int n) const { _mm256_maskstore_ps(p, _mm256_castps_si256(VM::first(n).m), v); }
  FOLDSCAN_INLINE void store(bf16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow()); }
  FOLDSCAN_INLINE void store(bf16* p, int n) const {
    alignas(16) bf16 t[8];
    store(t);
    for (int i = 0; i < n; ++i) p[i] = t[i];
  }

  FOLDSCAN_INLINE VF operator+(VF o) const { return {_mm256_add_ps(v, o.v)}; }
  FOLDSCAN_INLINE VF operator-(VF o) const { return {_mm256_sub_ps(v, o.v)}; }
  FOLDSCAN_INLINE VF operator*(VF o) const { return {_mm256_mul_ps(v, o.v)}; }
  FOLDSCAN_INLINE VF operator/(VF o) const { return {_mm256_div_ps(v, o.v)}; }
  FOLDSCAN_INLINE VF operator-() const { return {_mm256_xor_ps(v, _mm256_set1_ps(-0.0f))}; }
  FOLDSCAN_INLINE VM operator<(VF o) const { return {_mm256_cmp_ps(v, o.v, _CMP_LT_OQ)}; }
  FOLDSCAN_INLINE VM operator<=(VF o) const { return {_mm256_cmp_ps(v, o.v, _CMP_LE_OQ)}; }
  FOLDSCAN_INLINE VM operator==(VF o) const { return {_mm256_cmp_ps(v, o.v, _CMP_EQ_OQ)}; }

  FOLDSCAN_INLINE VF exp2_int() const {
    const __m256i i = _mm256_add_epi32(_mm256_cvtps_epi32(v), _mm256_set1_epi32(127));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(i, 23))};
  }
  FOLDSCAN_INLINE VF times_exp2(VF n) const { return *this * n.exp2_int(); }
  FOLDSCAN_INLINE VF exponent() const {
    const __m256i e = _mm256_srli_epi32(_mm256_castps_si256(v), 23);
    return {_mm256_cvtepi32_ps(_mm256_sub_epi32(e, _mm256_set1_epi32(127)))};
  }
  FOLDSCAN_INLINE VF mantissa() const {
    const __m256i m = _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffff));
    return {_mm256_castsi256_ps(_mm256_or_si256(m, _mm256_set1_epi32(0x3f800000)))};
  }

 private:
  friend struct VP;
  static FOLDSCAN_INLINE VF widen(__m128i b) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(b), 16))};
  }
  FOLDSCAN_INLINE __m128i narrow() const {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i q = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i s = _mm256_blendv_epi8(r, q, nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  }
};

FOLDSCAN_INLINE VF fma(VF a, VF b, VF c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FOLDSCAN_INLINE VF fnma(VF a, VF b, VF c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
FOLDSCAN_INLINE VF vmax(VF a, VF b) { return {_mm256_max_ps(a.v, b.v)}; }
FOLDSCAN_INLINE VF vmin(VF a, VF b) { return {_mm256_min_ps(a.v, b.v)}; }
FOLDSCAN_INLINE VF vabs(VF a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
FOLDSCAN_INLINE VF vsqrt(VF a) { return {_mm256_sqrt_ps(a.v)}; }
FOLDSCAN_INLINE VF vreciprocal(VF a) { return VF::set(1.0f) / a; }
FOLDSCAN_INLINE VF vround(VF a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
FOLDSCAN_INLINE VF select(VM m, VF a, VF b) { return {_mm256_blendv_ps(b.v, a.v, m.m)}; }
FOLDSCAN_INLINE float reduce_add(VF a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
FOLDSCAN_INLINE float reduce_max(VF a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

struct VP {
  __m256i v;
  static FOLDSCAN_INLINE VP load(const bf16* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
  static FOLDSCAN_INLINE VP broadcast(const bf16* pair) {
    int32_t x;
    std::memcpy(&x, pair, 4);
    return {_mm256_set1_epi32(x)};
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
    const __m256i x = load(a).v, y = load(b).v;
    const __m256i l = _mm256_unpacklo_epi16(x, y), h = _mm256_unpackhi_epi16(x, y);
    low = {_mm256_permute2x128_si256(l, h, 0x20)};
    high = {_mm256_permute2x128_si256(l, h, 0x31)};
  }
  static FOLDSCAN_INLINE VP narrow(VF a, VF b) { return {_mm256_set_m128i(b.narrow(), a.narrow())}; }
  static FOLDSCAN_INLINE VP zip(VF a, VF b) {
    const __m128i x = a.narrow(), y = b.narrow();
    return {_mm256_set_m128i(_mm_unpackhi_epi16(x, y), _mm_unpacklo_epi16(x, y))};
  }
  FOLDSCAN_INLINE VF as_floats() const { return {_mm256_castsi256_ps(v)}; }
  FOLDSCAN_INLINE void store(bf16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
};

// Pairs (lo, hi) of values that are bf16 already.
FOLDSCAN_INLINE VP pairs(VF lo, VF hi) {
  return {_mm256_or_si256(_mm256_srli_epi32(_mm256_castps_si256(lo.v), 16), _mm256_castps_si256(hi.v))};
}

struct VC {
  __m256i bit;
  static FOLDSCAN_INLINE VC load(const uint8_t* p, int shift) {
    const __m256i c = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m256i nibble = _mm256_and_si256(_mm256_srl_epi32(c, _mm_cvtsi32_si128(shift)), _mm256_set1_epi32(15));
    return {_mm256_sllv_epi32(_mm256_set1_epi32(1), nibble)};
  }
  FOLDSCAN_INLINE VM in(int set) const {
    const __m256i hit = _mm256_and_si256(bit, _mm256_set1_epi32(set));
    return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(hit, _mm256_setzero_si256()))};
  }
};

FOLDSCAN_INLINE VF dot2(VF acc, VP a, VP b) {
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  const __m256 a0 = _mm256_castsi256_ps(_mm256_slli_epi32(a.v, 16));
  const __m256 b0 = _mm256_castsi256_ps(_mm256_slli_epi32(b.v, 16));
  const __m256 a1 = _mm256_castsi256_ps(_mm256_and_si256(a.v, high));
  const __m256 b1 = _mm256_castsi256_ps(_mm256_and_si256(b.v, high));
  return {_mm256_fmadd_ps(a1, b1, _mm256_fmadd_ps(a0, b0, acc.v))};
}

FOLDSCAN_INLINE void transpose(VF (&r)[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm256_permute2f128_ps(u[i], u[4 + i], 0x20);
    r[4 + i].v = _mm256_permute2f128_ps(u[i], u[4 + i], 0x31);
  }
}

}  // namespace foldscan::FOLDSCAN_ISA
