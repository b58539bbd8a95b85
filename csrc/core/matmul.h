// Parallel matrix multiplication with caller-supplied rows and store: the shell around the micro-kernels that linear
// layers, expert layers and losses share.
//
//   load_a(m, rows, k, kc, dst, ld)   writes rows [m, m + rows) x columns [k, k + kc) of A, row-major with ld, into dst
//                                     (type T; for bf16 an odd kc is followed by a zero)
//   store(m, n, row, count)           takes the finished fp32 values C[m][n .. n + count)
//
// Tiles of kMC x kNC are independent tasks. K falls into runs of kKC: a run is one chain of multiply-adds in the order
// of k, and the runs are added in order. Long sums (weight gradients over all tokens) keep their digits that way, and a
// value still depends on nothing but its own row, column and K.
#pragma once

#include "core/gemm.h"
#include "core/parallel.h"

namespace foldscan::FOLDSCAN_ISA {

constexpr int64_t kMC = 96;                  // rows of a task: A block 96 x 512 fp32 = 192 KB of L2
constexpr int64_t kNC = 4 * kNR;             // columns of a task
constexpr int64_t kKC = 512;                 // K of a block of A, and length of a run
constexpr int64_t kKL1 = 32768 / (kNR * 4);  // K steps of a panel of B that fits L1

// sum += run, on a tile with rows of kNC.
FOLDSCAN_INLINE void add_run(const float* run, int64_t rows, int64_t cols, float* sum) {
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = m * kNC; n < m * kNC + cols; n += kLanes) (VF::load(sum + n) + VF::load(run + n)).store(sum + n);
}

// One task: C[m0.. m0+rows, n0.. n0+cols). Scratch: c and run kMC * kNC each, a kMC * (kKC + 2).
template <class T, class LoadA>
FOLDSCAN_INLINE void matmul_tile(int64_t m0, int64_t rows, int64_t n0, int64_t cols, int64_t K, const LoadA& load_a,
                                 const T* b, T* a, float* run, float* c) {
  const int64_t panel = b_panel_size<T>(K);
  const T* b0 = b + (n0 / kNR) * panel;
  constexpr int64_t lda = kKC + 2;
  if (K == 0) gemm_block<T>(rows, cols, 0, a, lda, kK<T>, b0, kNR * kK<T>, panel, c, kNC, false);
  for (int64_t k = 0; k < K; k += kKC) {
    const int64_t kc = imin(kKC, K - k);
    float* to = k == 0 ? c : run;
    load_a(m0, rows, k, kc, a, lda);
    for (int64_t s = 0; s < kc; s += kKL1 * kK<T>)
      gemm_block<T>(rows, cols, imin(kKL1 * kK<T>, kc - s), a + s, lda, kK<T>, b0 + (k + s) * kNR, kNR * kK<T>, panel,
                    to, kNC, s > 0);
    if (k > 0) add_run(run, rows, cols, c);
  }
}

template <class T, class LoadA, class Store>
void matmul(int64_t M, int64_t N, int64_t K, const LoadA& load_a, const T* packed_b, const Store& store) {
  const int64_t mb = ceil_div(M, kMC);
  // Few rows: narrower tasks, so that one row still occupies every thread.
  const int64_t nc = mb == 1 ? kNR : kNC;
  const int64_t nb = ceil_div(N, nc);
  parallel_for(mb * nb, grain_for(imin(M, kMC) * nc * K / 16), [&](int64_t task) {
    const int64_t m0 = task % mb * kMC, n0 = task / mb * nc;
    const int64_t rows = imin(kMC, M - m0), cols = imin(nc, N - n0);
    Scratch scratch;
    T* a = scratch.get<T>(kMC * (kKC + 2));
    float* run = scratch.get<float>(kMC * kNC);
    float* c = scratch.get<float>(kMC * kNC);
    matmul_tile<T>(m0, rows, n0, cols, K, load_a, packed_b, a, run, c);
    for (int64_t m = 0; m < rows; ++m) store(m0 + m, n0, c + m * kNC, cols);
  });
}

// pack_b with the panels spread over the threads.
template <class S, class T>
void pack_b_parallel(const S* src, int64_t k_stride, int64_t n_stride, int64_t K, int64_t N, T* dst) {
  parallel_for(ceil_div(N, kNR), grain_for(K * kNR / 4), [&](int64_t j) {
    pack_b(src + j * kNR * n_stride, k_stride, n_stride, K, imin(kNR, N - j * kNR), dst + j * b_panel_size<T>(K));
  });
}

// out[n] = sum over m of rows[m * N + n], in the order of m: the gradient of a bias.
template <class T>
void column_sums(const T* rows, int64_t M, int64_t N, float* out) {
  parallel_for(ceil_div(N, kLanes), grain_for(M), [&](int64_t i) {
    const int64_t n = i * kLanes;
    VF sum = VF::zero();
    for (int64_t m = 0; m < M; ++m) sum = sum + load_upto(rows + m * N + n, N - n);
    store_upto(sum, out + n, N - n);
  });
}

// load_a for a row-major matrix (k_stride 1) or a transposed one (m_stride 1).
template <class S, class T>
struct StridedRows {
  const S* p;
  int64_t m_stride, k_stride;
  FOLDSCAN_INLINE void operator()(int64_t m, int64_t rows, int64_t k, int64_t kc, T* dst, int64_t ld) const {
    const int64_t padded = round_up(kc, kK<T>);
    if (k_stride == 1) {
      for (int64_t i = 0; i < rows; ++i) copy_row(p + (m + i) * m_stride + k, kc, dst + i * ld, padded);
    } else {
      transpose_copy(p + k * k_stride + m, k_stride, kc, rows, dst, ld);
      if (padded != kc)
        for (int64_t i = 0; i < rows; ++i) dst[i * ld + kc] = from_float<T>(0.0f);
    }
  }
};

}  // namespace foldscan::FOLDSCAN_ISA
