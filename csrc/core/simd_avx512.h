// SIMD layer for AVX-512 (F, BW, DQ, VL), with the bf16 dot product where the compiler target has it. See simd.h.
#pragma once

#include <immintrin.h>

#include "core/types.h"

namespace foldscan::FOLDSCAN_ISA {

constexpr int kLanes = 16;
// Register tile of the GEMM micro-kernels: kMR rows by kNV vectors (24 accumulators of 32 registers).
constexpr int kMR = 6;
#ifdef __AMX_BF16__  // a tile unit multiplies bf16 pairs: 16 rows by 16 pairs of k at a time
constexpr int kMRPairs = 16;
constexpr int kPairsAtOnce = 16;
#else
constexpr int kMRPairs = 6;  // rows of the bf16 tile
constexpr int kPairsAtOnce = 1;
#endif
constexpr int kNV = 4;

struct VM {
  __mmask16 m;
  static FOLDSCAN_INLINE VM first(int n) { return {static_cast<__mmask16>((1u << n) - 1u)}; }
  FOLDSCAN_INLINE VM operator&(VM o) const { return {static_cast<__mmask16>(m & o.m)}; }
  FOLDSCAN_INLINE bool any() const { return m != 0; }
};

struct VF {
  __m512 v;
  static FOLDSCAN_INLINE VF zero() { return {_mm512_setzero_ps()}; }
  static FOLDSCAN_INLINE VF set(float x) { return {_mm512_set1_ps(x)}; }
  static FOLDSCAN_INLINE VF iota() { return {_mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)}; }
  static FOLDSCAN_INLINE VF load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static FOLDSCAN_INLINE VF load(const float* p, int n) { return {_mm512_maskz_loadu_ps(VM::first(n).m, p)}; }
  static FOLDSCAN_INLINE VF load(const bf16* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static FOLDSCAN_INLINE VF load(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(VM::first(n).m, p)); }
  FOLDSCAN_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  FOLDSCAN_INLINE void store(float* p, int n) const { _mm512_mask_storeu_ps(p, VM::first(n).m, v); }
  FOLDSCAN_INLINE void store(bf16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow()); }
  FOLDSCAN_INLINE void store(bf16* p, int n) const { _mm256_mask_storeu_epi16(p, VM::first(n).m, narrow()); }

  FOLDSCAN_INLINE VF operator+(VF o) const { return {_mm512_add_ps(v, o.v)}; }
  FOLDSCAN_INLINE VF operator-(VF o) const { return {_mm512_sub_ps(v, o.v)}; }
  FOLDSCAN_INLINE VF operator*(VF o) const { return {_mm512_mul_ps(v, o.v)}; }
  FOLDSCAN_INLINE VF operator/(VF o) const { return {_mm512_div_ps(v, o.v)}; }
  FOLDSCAN_INLINE VF operator-() const { return {_mm512_xor_ps(v, _mm512_set1_ps(-0.0f))}; }
  FOLDSCAN_INLINE VM operator<(VF o) const { return {_mm512_cmp_ps_mask(v, o.v, _CMP_LT_OQ)}; }
  FOLDSCAN_INLINE VM operator<=(VF o) const { return {_mm512_cmp_ps_mask(v, o.v, _CMP_LE_OQ)}; }
  FOLDSCAN_INLINE VM operator==(VF o) const { return {_mm512_cmp_ps_mask(v, o.v, _CMP_EQ_OQ)}; }

  // 2^n for integral n in [-126, 127].
  FOLDSCAN_INLINE VF exp2_int() const {
    const __m512i i = _mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(i, 23))};
  }
  // This times 2^n for integral n in [-126, 127].
  FOLDSCAN_INLINE VF times_exp2(VF n) const { return {_mm512_scalef_ps(v, n.v)}; }
  // x = mantissa * 2^exponent with mantissa in [1, 2), for positive normal x.
  FOLDSCAN_INLINE VF exponent() const {
    const __m512i e = _mm512_srli_epi32(_mm512_castps_si512(v), 23);
    return {_mm512_cvtepi32_ps(_mm512_sub_epi32(e, _mm512_set1_epi32(127)))};
  }
  FOLDSCAN_INLINE VF mantissa() const {
    const __m512i m = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffff));
    return {_mm512_castsi512_ps(_mm512_or_si512(m, _mm512_set1_epi32(0x3f800000)))};
  }

 private:
  friend struct VP;
  static FOLDSCAN_INLINE VF widen(__m256i b) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16))};
  }
  FOLDSCAN_INLINE __m256i narrow() const {
#ifdef __AVX512BF16__
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#else
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __m512i q = _mm512_or_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), q));
#endif
  }
};

FOLDSCAN_INLINE VF fma(VF a, VF b, VF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FOLDSCAN_INLINE VF fnma(VF a, VF b, VF c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
// A NaN in the second operand propagates.
FOLDSCAN_INLINE VF vmax(VF a, VF b) { return {_mm512_max_ps(a.v, b.v)}; }
FOLDSCAN_INLINE VF vmin(VF a, VF b) { return {_mm512_min_ps(a.v, b.v)}; }
FOLDSCAN_INLINE VF vabs(VF a) { return {_mm512_abs_ps(a.v)}; }
FOLDSCAN_INLINE VF vsqrt(VF a) { return {_mm512_sqrt_ps(a.v)}; }
// The 14 bits of the table and a Newton step.
FOLDSCAN_INLINE VF vreciprocal(VF a) {
  const __m512 r = _mm512_rcp14_ps(a.v);
  return {_mm512_fmadd_ps(r, _mm512_fnmadd_ps(a.v, r, _mm512_set1_ps(1.0f)), r)};
}
FOLDSCAN_INLINE VF vround(VF a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
FOLDSCAN_INLINE VF select(VM m, VF a, VF b) { return {_mm512_mask_blend_ps(m.m, b.v, a.v)}; }
FOLDSCAN_INLINE float reduce_add(VF a) { return _mm512_reduce_add_ps(a.v); }
FOLDSCAN_INLINE float reduce_max(VF a) { return _mm512_reduce_max_ps(a.v); }

struct VP {
  __m512i v;
  static FOLDSCAN_INLINE VP load(const bf16* p) { return {_mm512_loadu_si512(p)}; }
  static FOLDSCAN_INLINE VP broadcast(const bf16* pair) {
    int32_t x;
    std::memcpy(&x, pair, 4);
    return {_mm512_set1_epi32(x)};
  }
  // Pairs (a[i], b[i]) for i < n, the rest zero; b may be null for zeros.
  static FOLDSCAN_INLINE VP interleave(const bf16* a, const bf16* b, int n) {
    const __mmask16 m = VM::first(n).m;
    const __m512i lo = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, a));
    if (!b) return {lo};
    const __m512i hi = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, b));
    return {_mm512_or_si512(lo, _mm512_slli_epi32(hi, 16))};
  }
  // Pairs (a[i], b[i]) for i < 2 kLanes.
  static FOLDSCAN_INLINE void zip(const bf16* a, const bf16* b, VP& low, VP& high) {
    const __m512i first =
        _mm512_cvtepu16_epi32(_mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    const __m512i index = _mm512_or_si512(first, _mm512_slli_epi32(_mm512_add_epi32(first, _mm512_set1_epi32(32)), 16));
    const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
    low = {_mm512_permutex2var_epi16(x, index, y)};
    high = {_mm512_permutex2var_epi16(x, _mm512_add_epi16(index, _mm512_set1_epi16(16)), y)};
  }
  static FOLDSCAN_INLINE VP narrow(VF a, VF b) {
#ifdef __AVX512BF16__
    return {reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b.v, a.v))};
#else
    return {_mm512_inserti64x4(_mm512_castsi256_si512(a.narrow()), b.narrow(), 1)};
#endif
  }
  static FOLDSCAN_INLINE VP zip(VF a, VF b) {
    const __m512i first =
        _mm512_cvtepu16_epi32(_mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    const __m512i index = _mm512_or_si512(first, _mm512_slli_epi32(_mm512_add_epi32(first, _mm512_set1_epi32(16)), 16));
    return {_mm512_permutexvar_epi16(index, narrow(a, b).v)};
  }
  FOLDSCAN_INLINE VF as_floats() const { return {_mm512_castsi512_ps(v)}; }
  FOLDSCAN_INLINE void store(bf16* p) const { _mm512_storeu_si512(p, v); }
};

// Pairs (lo, hi) of values that are bf16 already.
FOLDSCAN_INLINE VP pairs(VF lo, VF hi) {
  return {_mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(lo.v), 16), _mm512_castps_si512(hi.v))};
}

struct VC {
  __m512i bit;
  static FOLDSCAN_INLINE VC load(const uint8_t* p, int shift) {
    const __m512i c = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m512i nibble = _mm512_and_si512(_mm512_srl_epi32(c, _mm_cvtsi32_si128(shift)), _mm512_set1_epi32(15));
    return {_mm512_sllv_epi32(_mm512_set1_epi32(1), nibble)};
  }
  FOLDSCAN_INLINE VM in(int set) const { return {_mm512_test_epi32_mask(bit, _mm512_set1_epi32(set))}; }
};

FOLDSCAN_INLINE VF dot2(VF acc, VP a, VP b) {
#ifdef __AVX512BF16__
  return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
#else
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512 a0 = _mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16));
  const __m512 b0 = _mm512_castsi512_ps(_mm512_slli_epi32(b.v, 16));
  const __m512 a1 = _mm512_castsi512_ps(_mm512_and_si512(a.v, high));
  const __m512 b1 = _mm512_castsi512_ps(_mm512_and_si512(b.v, high));
  return {_mm512_fmadd_ps(a1, b1, _mm512_fmadd_ps(a0, b0, acc.v))};
#endif
}

// Four rounds of interleaving: 32-bit, 64-bit, then 128-bit lanes twice.
FOLDSCAN_INLINE void transpose(VF (&r)[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
  __m512 u[16];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
    const __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
    u[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    u[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    u[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    u[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(u[i], u[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(u[i], u[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    r[8 + i].v = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    r[4 + i].v = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i].v = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

}  // namespace foldscan::FOLDSCAN_ISA
