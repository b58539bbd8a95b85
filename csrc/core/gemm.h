// Matrix multiplication on register tiles, for kernels that own their blocks.
//
//   C (M x N, fp32) (+)= A (M x K) * B (K x N)          A, B both fp32, or both bf16 with fp32 accumulation
//
// Every element of C is one chain of fused multiply-adds over k = 0, 1, .. K-1 (pairs of k for bf16), whatever the
// tile, the block of K or the number of rows: a row of C has the same bits alone and among others (architecture rule
// 8).
//
// Operand layouts:
//   A  fp32: element (m, k) at a[m * lda + k * ak]. bf16: pair (k, k+1) at a[m * lda + (k/2) * ak], two adjacent bf16;
//      ak is 2 for row-major A. An odd K needs a zero in the last pair.
//   B  panels of kNR columns: panel j at b + j * panel, and in it row k at + k * ldb (fp32) or pair row k/2 at + (k/2)
//   * ldb
//      (bf16: kNR pairs, b[2 n], b[2 n + 1] = B[k][n], B[k+1][n]). pack_b writes panels with ldb = kNR (2 kNR) and
//      panel = b_panel_size(K); a row-major fp32 matrix is the same thing with ldb = its row length and panel = kNR, if
//      its rows are readable up to the next multiple of kLanes.
//   C  row-major, ldc; columns beyond N are not touched.
#pragma once

#include "core/pack.h"

namespace foldscan::FOLDSCAN_ISA {

template <class T>
struct Tile;

// Rows of the register tile.
template <class T>
constexpr int kTileMR = sizeof(T) == 2 ? kMRPairs : kMR;

template <>
struct Tile<float> {
  using B = VF;
  using A = VF;
  static FOLDSCAN_INLINE A broadcast(const float* p) { return VF::set(*p); }
  static FOLDSCAN_INLINE B load(const float* p) { return VF::load(p); }
  static FOLDSCAN_INLINE VF mul_add(A a, B b, VF c) { return fma(a, b, c); }
};

template <>
struct Tile<bf16> {
  using B = VP;
  using A = VP;
  static FOLDSCAN_INLINE A broadcast(const bf16* p) { return VP::broadcast(p); }
  static FOLDSCAN_INLINE B load(const bf16* p) { return VP::load(p); }
  static FOLDSCAN_INLINE VF mul_add(A a, B b, VF c) { return dot2(c, a, b); }
};

// What becomes of C: C = A B; C's values are the start of the chains; the finished chains are added to C.
enum class Into { kSet, kContinue, kAdd };

// Memory that will be read after this block: a few cache lines of it are asked for every kAheadSteps steps, so that
// they have arrived in L2 when their turn comes, without ever filling the queues that the multiplication loads through.
struct Ahead {
  const char* p = nullptr;
  int64_t lines = 0;  // every kAheadSteps steps
};
constexpr int64_t kAheadSteps = 4;

// steps: K (fp32) or ceil(K / 2) (bf16). tail: valid lanes of the last vector.
template <class T, int MR, int NV>
void micro_kernel(int64_t steps, const T* a, int64_t lda, int64_t ak, const T* b, int64_t ldb, float* c, int64_t ldc,
                  int tail, Into into, Ahead ahead) {
  using X = Tile<T>;
  constexpr int64_t kVec = kLanes * kK<T>;
  VF acc[MR][NV];
  if (into == Into::kContinue) {
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n)
        acc[m][n] = n == NV - 1 ? VF::load(c + m * ldc + n * kLanes, tail) : VF::load(c + m * ldc + n * kLanes);
  } else {
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) acc[m][n] = VF::zero();
  }
  const auto step = [&]() __attribute__((always_inline)) {
    typename X::B bv[NV];
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) bv[n] = X::load(b + n * kVec);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const typename X::A av = X::broadcast(a + m * lda);
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) acc[m][n] = X::mul_add(av, bv[n], acc[m][n]);
    }
    a += ak;
    b += ldb;
  };
  int64_t k = 0;
  for (; k + kAheadSteps <= steps; k += kAheadSteps) {
    for (int64_t i = 0; i < ahead.lines; ++i, ahead.p += 64) __builtin_prefetch(ahead.p, 0, 2);
#pragma GCC unroll 4
    for (int64_t i = 0; i < kAheadSteps; ++i) step();
  }
  for (; k < steps; ++k) step();
  if (into == Into::kAdd) {
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n)
        acc[m][n] =
            (n == NV - 1 ? VF::load(c + m * ldc + n * kLanes, tail) : VF::load(c + m * ldc + n * kLanes)) + acc[m][n];
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) {
      if (n == NV - 1) {
        acc[m][n].store(c + m * ldc + n * kLanes, tail);
      } else {
        acc[m][n].store(c + m * ldc + n * kLanes);
      }
    }
}

template <class T>
using MicroKernel = void (*)(int64_t, const T*, int64_t, int64_t, const T*, int64_t, float*, int64_t, int, Into, Ahead);

template <class T, int NV>
FOLDSCAN_INLINE MicroKernel<T> micro_for_rows(int mr) {
  constexpr int MR = kTileMR<T>;
  if constexpr (MR >= 6) {
    if (mr == 6) return micro_kernel<T, 6, NV>;
    if (mr == 5) return micro_kernel<T, 5, NV>;
  }
  if constexpr (MR >= 4) {
    if (mr == 4) return micro_kernel<T, 4, NV>;
    if (mr == 3) return micro_kernel<T, 3, NV>;
  }
  if (mr == 2) return micro_kernel<T, 2, NV>;
  return micro_kernel<T, 1, NV>;
}

template <class T>
inline MicroKernel<T> micro_for(int mr, int nv) {
  if constexpr (kNV >= 4) {
    if (nv == 4) return micro_for_rows<T, 4>(mr);
    if (nv == 3) return micro_for_rows<T, 3>(mr);
  }
  if (nv == 2) return micro_for_rows<T, 2>(mr);
  return micro_for_rows<T, 1>(mr);
}

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
    const MicroKernel<T> full = micro_for<T>(MR, nv);
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
