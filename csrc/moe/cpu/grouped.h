// Grouped matrix multiplication: the shell around the micro-kernels that grouped_mm and the expert layer share.
//
// for_tiles cuts the rows of every group and the columns of the result into independent tasks; a task packs the columns
// of B that it needs into its own cache (or finds them packed) and runs all its rows over them, so that every weight is
// packed once a call, groups without rows cost nothing, and one row in one group still occupies every thread.
// outer_product is the weight gradient of one group: both operands are packed by rows, and a packed panel serves as the
// A operand without a transpose (gemm.h: row stride one element or pair, k stride one panel row).
//
// Every element of a product is one chain over K, in order, on one thread: a row's bits do not depend on the other
// rows, nor on the number of threads. A weight gradient sums the rows of its group in runs of kRowGroup, run after run:
// long chains lose digits.
#pragma once

#include "core/matmul.h"

namespace foldscan::FOLDSCAN_ISA::moe {

constexpr int64_t kTaskRows = 8 * kMC;                 // rows that share one packing of B
constexpr int64_t kTaskCols = kNR >= 128 ? kNR : 128;  // columns of a task, a multiple of kNR on every ISA
static_assert(kTaskCols % kNR == 0);
constexpr int64_t kRowGroup = 512;

// B of every group: B_g[k][n] = p[g * group + k * k_stride + n * n_stride], or packed ahead of time.
template <class T>
struct Operand {
  const void* p;
  DType type;
  int64_t group, k_stride, n_stride;
  const T* packed;

  // Columns [n, n + cols) of group g as panels; `own` holds them when they have to be packed.
  const T* panels(int64_t g, int64_t n, int64_t cols, int64_t K, int64_t N, T* own) const {
    if (packed) return packed + g * b_packed_size<T>(K, N) + n / kNR * b_panel_size<T>(K);
    const int64_t at = g * group + n * n_stride;
    if (type == DType::kF32) {
      pack_b(static_cast<const float*>(p) + at, k_stride, n_stride, K, cols, own);
    } else {
      // fp32 activations never meet bf16 weights, so this copy is not needed there.
      if constexpr (sizeof(T) == 2) pack_b(static_cast<const bf16*>(p) + at, k_stride, n_stride, K, cols, own);
    }
    return own;
  }
};

// body(g, first row, rows, first column, columns) over all tiles; offs[g] .. offs[g + 1] are the rows of group g.
template <class Body>
void for_tiles(const int64_t* offs, int64_t G, int64_t N, int64_t K, int64_t cols, const Body& body) {
  Scratch scratch;
  int64_t* first = scratch.get<int64_t>(G + 1);
  const int64_t blocks = ceil_div(N, cols);
  first[0] = 0;
  for (int64_t g = 0; g < G; ++g) first[g + 1] = first[g] + ceil_div(offs[g + 1] - offs[g], kTaskRows) * blocks;
  parallel_for(first[G], grain_for(cols * K / 2), [&](int64_t task) {
    int64_t lo = 0, hi = G;  // first[lo] <= task < first[hi]
    while (hi - lo > 1) {
      const int64_t mid = (lo + hi) / 2;
      if (first[mid] <= task) {
        lo = mid;
      } else {
        hi = mid;
      }
    }
    const int64_t local = task - first[lo];
    const int64_t r = offs[lo] + local / blocks * kTaskRows, n = local % blocks * cols;
    body(lo, r, imin(kTaskRows, offs[lo + 1] - r), n, imin(cols, N - n));
  });
}

// c[i] (+)= A b[i], rows <= kMC. A comes from load_a once for all i. a: kMC * (kKC + 2), c[i]: kMC * kTaskCols.
template <class T, int NB, class LoadA>
void multiply_tile(int64_t r, int64_t rows, int64_t cols, int64_t K, const LoadA& load_a, const T* const (&b)[NB], T* a,
                   float* const (&c)[NB], bool accumulate) {
  constexpr int64_t lda = kKC + 2;
  const int64_t panel = b_panel_size<T>(K);
  if (K == 0)
    for (int i = 0; i < NB; ++i)
      gemm_block<T>(rows, cols, 0, a, lda, kK<T>, b[i], kNR * kK<T>, panel, c[i], kTaskCols, accumulate);
  for (int64_t k = 0; k < K; k += kKC) {
    const int64_t kc = imin(kKC, K - k);
    load_a(r, rows, k, kc, a, lda);
    for (int i = 0; i < NB; ++i)
      for (int64_t s = 0; s < kc; s += kKL1 * kK<T>)
        gemm_block<T>(rows, cols, imin(kKL1 * kK<T>, kc - s), a + s, lda, kK<T>, b[i] + (k + s) * kNR, kNR * kK<T>,
                      panel, c[i], kTaskCols, accumulate || k + s > 0);
  }
}

// load_a for rows found through row(r).
template <class T, class Row>
struct GatheredRows {
  Row row;
  FOLDSCAN_INLINE void operator()(int64_t r, int64_t rows, int64_t k, int64_t kc, T* dst, int64_t ld) const {
    for (int64_t i = 0; i < rows; ++i) copy_row(row(r + i) + k, kc, dst + i * ld, round_up(kc, kK<T>));
  }
};
template <class T, class Row>
GatheredRows<T, Row> gathered_rows(const Row& row) {
  return {row};
}

// Rows row(0) .. row(K - 1), columns [0, N), as panels (the layout of pack_b_rows), on all threads.
template <class T, class Row>
void pack_rows(const Row& row, int64_t K, int64_t N, T* dst) {
  parallel_for(ceil_div(N, kNR), grain_for(K * kNR / 4), [&](int64_t j) {
    const int64_t n = j * kNR, width = imin(kNR, N - n);
    T* d = dst + j * b_panel_size<T>(K);
    if constexpr (sizeof(T) == 4) {
      for (int64_t k = 0; k < K; ++k, d += kNR) copy_row(row(k) + n, width, d, kNR);
    } else {
      for (int64_t k = 0; k < K; k += 2, d += 2 * kNR) {
        const T* p = row(k) + n;
        const T* q = k + 1 < K ? row(k + 1) + n : nullptr;
        for (int64_t i = 0; i < kNR; i += kLanes) {
          const int w = static_cast<int>(imax(0, imin(kLanes, width - i)));
          const int64_t at = w ? i : 0;
          VP::interleave(p + at, q ? q + at : nullptr, w).store(d + 2 * i);
        }
      }
    }
  });
}

// out[m][n] = sum over k of A[k][m] B[k][n], both packed by pack_rows with K rows; out is (M, N) of type `type`.
template <class T>
void outer_product(int64_t K, int64_t M, int64_t N, const T* a, const T* b, void* out, DType type) {
  constexpr int64_t step = kKL1 * kK<T>;
  const int64_t panel = b_panel_size<T>(K), blocks = ceil_div(N, kTaskCols);
  parallel_for(ceil_div(M, kNR) * blocks, grain_for(kNR * kTaskCols * K / 16), [&](int64_t task) {
    const int64_t m = task / blocks * kNR, n = task % blocks * kTaskCols;
    const int64_t rows = imin(kNR, M - m), cols = imin(kTaskCols, N - n);
    Scratch scratch;
    float* c = scratch.get<float>(kNR * kTaskCols);
    float* sum = scratch.get<float>(kNR * kTaskCols);
    for (int64_t i = 0; i < kNR * kTaskCols; i += kLanes) VF::zero().store(sum + i);
    const T* pa = a + m / kNR * panel;
    const T* pb = b + n / kNR * panel;
    for (int64_t g = 0; g < K; g += kRowGroup) {
      const int64_t end = imin(K, g + kRowGroup);
      for (int64_t k = g; k < end; k += step)
        gemm_block<T>(rows, cols, imin(step, end - k), pa + k * kNR, kK<T>, kNR * kK<T>, pb + k * kNR, kNR * kK<T>,
                      panel, c, kTaskCols, k > g);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = i * kTaskCols; j < i * kTaskCols + cols; j += kLanes)
          (VF::load(sum + j) + load_upto(c + j, i * kTaskCols + cols - j)).store(sum + j);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = (m + i) * N + n;
      if (type == DType::kF32) {
        copy_row(sum + i * kTaskCols, cols, static_cast<float*>(out) + at, cols);
      } else {
        copy_row(sum + i * kTaskCols, cols, static_cast<bf16*>(out) + at, cols);
      }
    }
  });
}

}  // namespace foldscan::FOLDSCAN_ISA::moe
