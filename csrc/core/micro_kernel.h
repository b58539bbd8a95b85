// The innermost loop of every product: a register tile of C, a few rows by up to kNV vectors, over one run of K. The
// operands are laid out as gemm.h says.
#pragma once

#include "core/pack.h"

namespace foldscan::FOLDSCAN_ISA {

template <class T>
struct Tile;

// Rows of the register tile.
template <class T>
constexpr int kTileMR = sizeof(T) == 2 ? kMRPairs : kMR;

// A run of K may be cut and continued at multiples of this without changing bits.
template <class T>
constexpr int64_t kWholeSteps = sizeof(T) == 2 ? 2 * kPairsAtOnce : 1;

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

// What runs a register tile of mr rows and nv vectors: called like micro_kernel.
template <class T>
struct MicroKernels {
  static FOLDSCAN_INLINE MicroKernel<T> get(int mr, int nv) {
    if constexpr (kNV >= 4) {
      if (nv == 4) return micro_for_rows<T, 4>(mr);
      if (nv == 3) return micro_for_rows<T, 3>(mr);
    }
    if (nv == 2) return micro_for_rows<T, 2>(mr);
    return micro_for_rows<T, 1>(mr);
  }
};

template <class T>
inline auto micro_for(int mr, int nv) {
  return MicroKernels<T>::get(mr, nv);
}

}  // namespace foldscan::FOLDSCAN_ISA
