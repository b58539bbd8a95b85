// How fast this core multiplies: the bound that benchmarks compare with, and a plain GEMM for callers without tensors.
#pragma once

#include "core/types.h"

namespace foldscan::probe {

// FLOPs that one thread did in `iterations` rounds of independent multiply-adds on registers (time it around the call).
struct Peak {
  DType type;
  int64_t iterations;
  double* flops;
};

// c (M, N) = a (M, K) b (K, N), dense fp32; with type bf16 the operands are rounded to bf16 first.
struct Gemm {
  const float *a, *b;
  float* c;
  int64_t M, N, K;
  DType type;
};

namespace cpu {
void peak(const Peak& p);
void gemm(const Gemm& p);
}  // namespace cpu

}  // namespace foldscan::probe
