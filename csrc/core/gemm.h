// Matrix multiplication on register tiles, for kernels that own their blocks.
//
//   C (M x N, fp32) (+)= A (M x K) * B (K x N)          A, B both fp32, or both bf16 with fp32 accumulation
//
// Every element of C is one chain of fused multiply-adds over k = 0, 1, .. K-1 (pairs of k for bf16), whatever the
// tile, the block of K or the number of rows: a row of C has the same bits alone and among others (architecture rule
// 8). On a tile unit (micro_kernel_tiles.h) a link of the chain is a run of 32 k from the chain's start, so a caller
// that cuts K and continues cuts at multiples of kWholeSteps.
//
// Operand layouts:
//   A  fp32: element (m, k) at a[m * lda + k * ak]. bf16: pair (k, k+1) at a[m * lda + (k/2) * ak], two adjacent bf16;
//      ak is 2 for row-major A, or lda is 2 for pairs by columns. An odd K needs a zero in the last pair.
//   B  panels of kNR columns: panel j at b + j * panel, and in it row k at + k * ldb (fp32) or pair row k/2 at + (k/2)
//   * ldb
//      (bf16: kNR pairs, b[2 n], b[2 n + 1] = B[k][n], B[k+1][n]). pack_b writes panels with ldb = kNR (2 kNR) and
//      panel = b_panel_size(K); a row-major fp32 matrix is the same thing with ldb = its row length and panel = kNR, if
//      its rows are readable up to the next multiple of kLanes.
//   C  row-major, ldc; columns beyond N are not touched.
#pragma once

#include "core/micro_kernel.h"
#ifdef __AMX_BF16__
#include "core/micro_kernel_tiles.h"
#endif

namespace foldscan::FOLDSCAN_ISA {

// One block that fits the caches, on the calling thread. K steps are not blocked here.
template <class T>
void gemm_block(int64_t M, int64_t N, int64_t K, const T* a, int64_t lda, int64_t ak, const T* b, int64_t ldb,
                int64_t panel, float* c, int64_t ldc, bool accumulate) {
  constexpr int MR = kTileMR<T>;
  const int64_t steps = ceil_div(K, kK<T>);
  const Into into = accumulate ? Into::kContinue : Into::kSet;
  for (int64_t n = 0; n < N; n += kNR, b += panel) {
    const int64_t width = imin(kNR, N - n);
    const int nv = static_cast<int>(ceil_div(width, kLanes));
    const int tail = static_cast<int>(width - (nv - 1) * kLanes);
    const auto full = micro_for<T>(MR, nv);
    int64_t m = 0;
    for (; m + MR <= M; m += MR) full(steps, a + m * lda, lda, ak, b, ldb, c + m * ldc + n, ldc, tail, into, {});
    if (m < M)
      micro_for<T>(static_cast<int>(M - m), nv)(steps, a + m * lda, lda, ak, b, ldb, c + m * ldc + n, ldc, tail, into,
                                                {});
  }
}

// gemm_block with row-major A (ak = 1 element or pair) and B from pack_b, K cut so that a panel of B stays in L1.
template <class T>
void gemm_packed(int64_t M, int64_t N, int64_t K, const T* a, int64_t lda, const T* b, float* c, int64_t ldc,
                 bool accumulate) {
  constexpr int64_t kc = 32768 / (kNR * 4) * kK<T>;
  const int64_t panel = b_panel_size<T>(K);
  if (K == 0) gemm_block<T>(M, N, 0, a, lda, kK<T>, b, kNR * kK<T>, panel, c, ldc, accumulate);
  for (int64_t k = 0; k < K; k += kc)
    gemm_block<T>(M, N, imin(kc, K - k), a + k, lda, kK<T>, b + k * kNR, kNR * kK<T>, panel, c, ldc,
                  accumulate || k > 0);
}

}  // namespace foldscan::FOLDSCAN_ISA
