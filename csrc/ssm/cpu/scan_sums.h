// The sums and products that the scan's backward pass is made of.
#pragma once

#include "ssm/cpu/scan_chunk.h"

namespace foldscan::FOLDSCAN_ISA::ssm {

// <a, b> over n elements, a multiple of kLanes; then a *= scale.
template <class S>
FOLDSCAN_INLINE float dot_then_scale(float* a, const S* b, int64_t n, float scale) {
  constexpr int kChains = 4;
  VF sums[kChains];
  for (auto& s : sums) s = VF::zero();
  int64_t i = 0;
  const auto step = [&](VF& sum) FOLDSCAN_LAMBDA {
    const VF v = VF::load(a + i);
    sum = fma(v, VF::load(b + i), sum);
    (v * VF::set(scale)).store(a + i);
    i += kLanes;
  };
  while (i + kChains * kLanes <= n)
    for (auto& s : sums) step(s);
  while (i < n) step(sums[0]);
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// out[i] = the sum of the vector at partial + i kLanes, for i < n. Both hold a multiple of kLanes.
FOLDSCAN_INLINE void row_sums(const float* partial, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    VF r[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) r[j] = VF::load(partial + (i + j) * kLanes);
    transpose(r);
    for (int64_t d = kLanes / 2; d > 0; d /= 2)
      for (int64_t j = 0; j < d; ++j) r[j] = r[j] + r[j + d];
    r[0].store(out + i);
  }
}

// dst[i] = weights[i] src[i] for rows of `width`.
template <class T>
FOLDSCAN_INLINE void scale_rows(const T* src, int64_t ld, int64_t rows, int64_t width, const float* weights, T* dst,
                                int64_t ld_dst) {
  for (int64_t i = 0; i < rows; ++i) {
    const VF weight = VF::set(weights[i]);
    for (int64_t c = 0; c < width; c += kLanes) (VF::load(src + i * ld + c) * weight).store(dst + i * ld_dst + c);
  }
}

// The operands of sum_heads rows_h^T state_h over (head, channel), for a few heads side by side.
template <class T>
struct SideBySide {
  T *rows, *states;
  int64_t ld, panel;
  SideBySide(int64_t q, int64_t heads, int64_t ld_p, int64_t N, Scratch& scratch)
      : ld(heads * ld_p), panel(b_panel_size<T>(ld)) {
    rows = scratch.get<T>(q * ld);
    states = scratch.get<T>(b_packed_size<T>(ld, N));
  }
  // Place of a head.
  T* rows_of(int64_t place, int64_t ld_p) { return rows + place * ld_p; }
  T* states_of(int64_t place, int64_t ld_p) { return states + place * ld_p * kNR; }
  // c (q x N) (+)= the product of the first `places` heads.
  void product(int64_t q, int64_t N, int64_t places, int64_t ld_p, float* c, int64_t ldc, bool accumulate) const {
    gemm_block<T>(q, N, places * ld_p, rows, ld, kK<T>, states, kNR * kK<T>, panel, c, ldc, accumulate);
  }
};

// c[m][n] for n >= m (from the beginning of m's vector): a (q x K rows) times packed b (K x q).
template <class T>
void product_from_diagonal(int64_t q, int64_t K, Rows<T> a, const T* packed, float* c, int64_t ldc) {
  constexpr int MR = kTileMR<T>;
  const int64_t steps = ceil_div(K, kK<T>), panel = b_panel_size<T>(K);
  for (int64_t m = 0; m < q; m += MR)
    for (int64_t n = m / kLanes * kLanes; n < q; n = round_up(n + 1, kNR)) {
      const int64_t width = imin(round_up(n + 1, kNR), q) - n;
      const int nv = static_cast<int>(ceil_div(width, kLanes)), tail = static_cast<int>(width - (nv - 1) * kLanes);
      micro_for<T>(static_cast<int>(imin(MR, q - m)), nv)(steps, a.p + m * a.ld, a.ld, kK<T>,
                                                          packed + n / kNR * panel + n % kNR * kK<T>, kNR * kK<T>,
                                                          c + m * ldc + n, ldc, tail, Into::kSet, {});
    }
}

// d(delta A)_k for k in [0, q): e is E^T ([s][l], read from the diagonal on), v and u as in scan_backward.cpp, tail the
// state term.
FOLDSCAN_INLINE void decay_gradient(const float* e, const float* v, const float* u, float tail, int64_t q, float* out) {
  VF prefix[kVecs];  // over l: sum_{s < k} E[l][s]
  for (auto& x : prefix) x = VF::zero();
  float suffix[kChunk + 1];
  suffix[q] = 0.0f;
  for (int64_t l = q - 1; l >= 0; --l) suffix[l] = suffix[l + 1] + v[l];
  alignas(64) float partial[kChunk * kLanes], sums[kChunk];
  for (int64_t k = 0; k < q; ++k) {
    if (k > 0)
      for (int64_t i = k / kLanes; i < kVecs; ++i) prefix[i] = prefix[i] + VF::load(e + (k - 1) * kChunk + i * kLanes);
    const VF lane = VF::iota() + VF::set(static_cast<float>(k / kLanes * kLanes));
    VF sum = select(lane < VF::set(static_cast<float>(k)), VF::zero(), prefix[k / kLanes]);
    for (int64_t i = k / kLanes + 1; i < kVecs; ++i) sum = sum + prefix[i];
    sum.store(partial + k * kLanes);
  }
  for (int64_t k = q; k < round_up(q, kLanes); ++k) VF::zero().store(partial + k * kLanes);
  row_sums(partial, q, sums);
  float before = 0.0f;
  for (int64_t k = 0; k < q; ++k) {
    if (k > 0) before += u[k - 1];
    out[k] = sums[k] + suffix[k] + before + tail;
  }
}

}  // namespace foldscan::FOLDSCAN_ISA::ssm
