// Linear layer: y = x W^T + b and its gradients.
#pragma once

#include "core/types.h"

namespace foldscan::linear {

// x (M, K) times weight (N, K) transposed, plus bias, into out (M, N) of x's type.
// Types: x fp32 with an fp32 weight; x bf16 with a bf16 or an fp32 weight (rounded to bf16 while it is packed).
struct Forward {
  const void* x;
  const void* weight;  // ignored when packed is given
  const void* packed;  // from pack(), or null
  const float* bias;   // (N) or null
  void* out;           // (M, N) contiguous
  int64_t M, N, K;
  int64_t x_stride, weight_stride;  // elements from row to row; rows are contiguous
  DType x_type, weight_type;
};

// Weight (N, K) into the layout of the micro-kernels of the ISA in use, for multiplication in `type`.
struct Pack {
  const void* weight;
  void* packed;
  int64_t N, K, weight_stride;
  DType weight_type, type;
};

// Gradients; each output may be null. dx has x's type, dweight the weight's type, dbias is fp32.
struct Backward {
  const void* dout;  // (M, N) contiguous, x's type
  const void* x;
  const void* weight;
  void* dx;       // (M, K) contiguous
  void* dweight;  // (N, K) contiguous
  float* dbias;   // (N)
  int64_t M, N, K;
  int64_t x_stride, weight_stride;
  DType x_type, weight_type;
};

// Bytes of a packed weight.
struct PackedBytes {
  int64_t N, K;
  DType type;
  int64_t* bytes;
};

namespace cpu {
void forward(const Forward& p);
void pack(const Pack& p);
void packed_bytes(const PackedBytes& p);
void backward(const Backward& p);
}  // namespace cpu

}  // namespace foldscan::linear
