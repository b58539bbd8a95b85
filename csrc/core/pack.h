// Copying matrices into the layouts that the GEMM micro-kernels read: column panels for B, contiguous rows for A.
#pragma once

#include "core/simd.h"

namespace foldscan::FOLDSCAN_ISA {

constexpr int64_t kNR = kNV * kLanes;  // columns of a panel of B

// Elements of K that one step of the micro-kernel takes: 1 for fp32, a pair for bf16.
template <class T>
constexpr int64_t kK = sizeof(T) == 2 ? 2 : 1;

template <class T>
constexpr int64_t b_panel_size(int64_t K) {
  return round_up(K, kK<T>) * kNR;
}
// Elements of the packed form of a K x N matrix.
template <class T>
constexpr int64_t b_packed_size(int64_t K, int64_t N) {
  return ceil_div(N, kNR) * b_panel_size<T>(K);
}

// dst[c * ld_dst + r] = src[r * ld_src + c] for r < rows, c < cols. With pad, each dst row is filled with zeros up to
// the next multiple of kLanes (which must be writable).
template <class S, class T>
void transpose_copy(const S* src, int64_t ld_src, int64_t rows, int64_t cols, T* dst, int64_t ld_dst,
                    bool pad = false) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    const int64_t nr = imin(kLanes, rows - r);
    for (int64_t c = 0; c < cols; c += kLanes) {
      const int64_t nc = imin(kLanes, cols - c);
      VF t[kLanes];
      for (int i = 0; i < kLanes; ++i) t[i] = i < nr ? load_upto(src + (r + i) * ld_src + c, nc) : VF::zero();
      transpose(t);
      for (int i = 0; i < nc; ++i) store_upto(t[i], dst + (c + i) * ld_dst + r, pad ? kLanes : nr);
    }
  }
}

// Converting copy of n elements, zero up to `padded`.
template <class S, class T>
FOLDSCAN_INLINE void copy_row(const S* src, int64_t n, T* dst, int64_t padded) {
  int64_t i = 0;
  if constexpr (sizeof(S) == 2 && sizeof(T) == 2)  // no detour through fp32
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) VP::load(src + i).store(dst + i);
  for (; i + kLanes <= n; i += kLanes) VF::load(src + i).store(dst + i);
  for (; i < padded; i += kLanes) store_upto(load_upto(src + i, n - i), dst + i, padded - i);
}

// B given by rows of n (N contiguous): B[k][n] = src[k * ld + n].
template <class S>
void pack_b_rows(const S* src, int64_t ld, int64_t K, int64_t N, float* dst) {
  for (int64_t n = 0; n < N; n += kNR)
    for (int64_t k = 0; k < K; ++k, dst += kNR) copy_row(src + k * ld + n, imin(kNR, N - n), dst, kNR);
}

template <class S>
void pack_b_rows(const S* src, int64_t ld, int64_t K, int64_t N, bf16* dst) {
  for (int64_t n = 0; n < N; n += kNR) {
    for (int64_t k = 0; k < K; k += 2, dst += 2 * kNR) {
      int64_t i = 0;
      if constexpr (sizeof(S) == 2) {
        const int64_t whole = k + 1 < K ? imin(kNR, N - n) / (2 * kLanes) * (2 * kLanes) : 0;
        for (; i < whole; i += 2 * kLanes) {
          const S* p = src + k * ld + n + i;
          VP low, high;
          VP::zip(p, p + ld, low, high);
          low.store(dst + 2 * i);
          high.store(dst + 2 * i + 2 * kLanes);
        }
      }
      for (; i < kNR; i += kLanes) {
        const int w = static_cast<int>(imax(0, imin(kLanes, N - n - i)));
        const S* p = src + k * ld + n + (w ? i : 0);
        if constexpr (sizeof(S) == 2) {
          VP::interleave(p, k + 1 < K ? p + ld : nullptr, w).store(dst + 2 * i);
        } else {
          VP::zip(load_upto(p, w), k + 1 < K ? load_upto(p + ld, w) : VF::zero()).store(dst + 2 * i);
        }
      }
    }
  }
}

// One vector of columns of a panel from w columns of K contiguous elements, `ld` apart: transposed in registers. dst is
// the vector's place in the first row of the panel; between() is called after each tile of the transpose.
template <class S, class Between>
FOLDSCAN_INLINE void pack_b_col_vector(const S* src, int64_t ld, int64_t K, int64_t w, float* dst,
                                       const Between& between) {
  int64_t k = 0;
  for (; w == kLanes && k + kLanes <= K; k += kLanes) {
    VF t[kLanes];
    for (int j = 0; j < kLanes; ++j) t[j] = VF::load(src + j * ld + k);
    transpose(t);
    for (int j = 0; j < kLanes; ++j) t[j].store(dst + (k + j) * kNR);
    between();
  }
  for (; k < K; k += kLanes) {
    const int64_t nk = imin(kLanes, K - k);
    VF t[kLanes];
    for (int j = 0; j < kLanes; ++j) t[j] = j < w ? load_upto(src + j * ld + k, nk) : VF::zero();
    transpose(t);
    for (int j = 0; j < nk; ++j) t[j].store(dst + (k + j) * kNR);
  }
}

// kLanes pairs of bf16; `elements` of them, the rest zero.
FOLDSCAN_INLINE VF load_pairs(const bf16* p) { return VF::load(reinterpret_cast<const float*>(p)); }
FOLDSCAN_INLINE VF load_pairs(const float* p) { return VP::narrow(VF::load(p), VF::load(p + kLanes)).as_floats(); }
FOLDSCAN_INLINE VF load_pairs(const bf16* p, int64_t elements) {
  if (elements >= 2 * kLanes) return VF::load(reinterpret_cast<const float*>(p));
  alignas(64) bf16 t[2 * kLanes] = {};
  std::memcpy(t, p, static_cast<size_t>(elements) * 2);
  return VF::load(reinterpret_cast<const float*>(t));
}
FOLDSCAN_INLINE VF load_pairs(const float* p, int64_t elements) {
  const int64_t more = imax(0, elements - kLanes);
  return VP::narrow(load_upto(p, elements), load_upto(p + (more ? kLanes : 0), more)).as_floats();
}

// bf16 moves pairs of k as one 32-bit lane.
template <class S, class Between>
FOLDSCAN_INLINE void pack_b_col_vector(const S* src, int64_t ld, int64_t K, int64_t w, bf16* dst,
                                       const Between& between) {
  int64_t k = 0;
  for (; w == kLanes && k + 2 * kLanes <= K; k += 2 * kLanes) {
    VF t[kLanes];
    for (int j = 0; j < kLanes; ++j) t[j] = load_pairs(src + j * ld + k);
    transpose(t);
    for (int j = 0; j < kLanes; ++j) t[j].store(reinterpret_cast<float*>(dst + (k + 2 * j) * kNR));
    between();
  }
  for (; k < K; k += 2 * kLanes) {
    const int64_t nk = imin(2 * kLanes, K - k);
    VF t[kLanes];
    for (int j = 0; j < kLanes; ++j) t[j] = j < w ? load_pairs(src + j * ld + k, nk) : VF::zero();
    transpose(t);
    for (int j = 0; j < ceil_div(nk, 2); ++j) t[j].store(reinterpret_cast<float*>(dst + (k + 2 * j) * kNR));
  }
}

// B given by columns (K contiguous): B[k][n] = src[n * ld + k]. Panels may be those of a longer K, of which these are
// some rows.
template <class S, class T>
void pack_b_cols(const S* src, int64_t ld, int64_t K, int64_t N, T* dst, int64_t panel) {
  for (int64_t n = 0; n < N; n += kNR, dst += panel)
    for (int64_t i = 0; i < kNR; i += kLanes)
      pack_b_col_vector(src + (n + i) * ld, ld, K, imax(0, imin(kLanes, N - n - i)), dst + i * kK<T>, [] {});
}

template <class S, class T>
void pack_b_cols(const S* src, int64_t ld, int64_t K, int64_t N, T* dst) {
  pack_b_cols(src, ld, K, N, dst, b_panel_size<T>(K));
}

// B[k][n] = src[k * k_stride + n * n_stride], one of the strides being 1. dst: b_packed_size<T>(K, N) elements.
template <class S, class T>
void pack_b(const S* src, int64_t k_stride, int64_t n_stride, int64_t K, int64_t N, T* dst) {
  if (n_stride == 1) {
    pack_b_rows(src, k_stride, K, N, dst);
  } else {
    pack_b_cols(src, n_stride, K, N, dst);
  }
}

}  // namespace foldscan::FOLDSCAN_ISA
