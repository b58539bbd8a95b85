// Linear layer on the packed GEMM.
//
// FLOPs: 2 M N K forward, 4 M N K backward. Bytes: each operand once from memory, packed B once more.
// Numerics: products and sums in fp32, over K in order in runs of 512 (core/matmul.h), whatever the number of rows;
//   bf16 operands are multiplied as bf16; dweight is rounded once, from its fp32 sum.
// Determinism: no value is summed by more than one thread.
#include "linear/linear.h"

#include "core/matmul.h"

namespace foldscan::FOLDSCAN_ISA::linear {
namespace {

using namespace foldscan::linear;

template <class T>
void add_bias_store(const float* row, const float* bias, int64_t n, int64_t count, T* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    VF v = load_upto(row + i, count - i);
    if (bias) v = v + load_upto(bias + n + i, count - i);
    store_upto(v, out + i, count - i);
  }
}

// X: type of x, out and the multiplication; W: type of the weight.
template <class X, class W>
void run_forward(const Forward& p) {
  X* out = static_cast<X*>(p.out);
  const StridedRows<X, X> x{static_cast<const X*>(p.x), p.x_stride, 1};
  const auto store = [&](int64_t m, int64_t n, const float* row, int64_t count) {
    add_bias_store(row, p.bias, n, count, out + m * p.N + n);
  };
  if (p.packed) {
    matmul<X>(p.M, p.N, p.K, x, static_cast<const X*>(p.packed), store);
  } else {
    matmul<X>(p.M, p.N, p.K, x, RawB<W, X>{static_cast<const W*>(p.weight), 1, p.weight_stride}, store);
  }
}

template <class X, class W>
void run_backward(const Backward& p) {
  const X* dout = static_cast<const X*>(p.dout);
  const auto store_to = [](auto* out, int64_t ld) {
    return [out, ld](int64_t m, int64_t n, const float* row, int64_t count) {
      copy_row(row, count, out + m * ld + n, count);
    };
  };
  if (p.dx)  // (M, K) = dout (M, N) weight (N, K)
    matmul<X>(p.M, p.K, p.N, StridedRows<X, X>{dout, p.N, 1},
              RawB<W, X>{static_cast<const W*>(p.weight), p.weight_stride, 1}, store_to(static_cast<X*>(p.dx), p.K));
  if (p.dweight)  // (N, K) = dout^T (N, M) x (M, K)
    matmul<X>(p.N, p.K, p.M, StridedRows<X, X>{dout, 1, p.N}, RawB<X, X>{static_cast<const X*>(p.x), p.x_stride, 1},
              store_to(static_cast<W*>(p.dweight), p.K));
  if (p.dbias) column_sums(dout, p.M, p.N, p.dbias);
}

template <class T>
void run_pack(const Pack& p) {
  T* dst = static_cast<T*>(p.packed);
  if (p.weight_type == DType::kF32) {
    pack_b_parallel(static_cast<const float*>(p.weight), 1, p.weight_stride, p.K, p.N, dst);
  } else {
    pack_b_parallel(static_cast<const bf16*>(p.weight), 1, p.weight_stride, p.K, p.N, dst);
  }
}

}  // namespace

void forward(const Forward& p) {
  if (p.x_type == DType::kF32) {
    run_forward<float, float>(p);
  } else if (p.weight_type == DType::kF32) {
    run_forward<bf16, float>(p);
  } else {
    run_forward<bf16, bf16>(p);
  }
}

void backward(const Backward& p) {
  if (p.x_type == DType::kF32) {
    run_backward<float, float>(p);
  } else if (p.weight_type == DType::kF32) {
    run_backward<bf16, float>(p);
  } else {
    run_backward<bf16, bf16>(p);
  }
}

void pack(const Pack& p) {
  if (p.type == DType::kF32) {
    run_pack<float>(p);
  } else {
    run_pack<bf16>(p);
  }
}

void packed_bytes(const PackedBytes& p) {
  *p.bytes = p.type == DType::kF32 ? 4 * b_packed_size<float>(p.K, p.N) : 2 * b_packed_size<bf16>(p.K, p.N);
}

}  // namespace foldscan::FOLDSCAN_ISA::linear
