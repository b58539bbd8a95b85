// Grouped matrix multiplication with torch's grouped_mm layout, and its gradients.
//
// FLOPs: 2 R K N forward, 4 R K N backward. Bytes: a, out and the weights of the groups that have rows, once.
// Numerics: fp32 sums (bf16 products), rounded once. Determinism: see grouped.h.
#include "moe/cpu/grouped.h"
#include "moe/moe.h"

namespace foldscan::FOLDSCAN_ISA::moe {
namespace {

using namespace foldscan::moe;

// offs with a leading zero.
int64_t* row_starts(const int32_t* offs, int64_t G, Scratch& scratch) {
  int64_t* starts = scratch.get<int64_t>(G + 1);
  starts[0] = 0;
  for (int64_t g = 0; g < G; ++g) starts[g + 1] = offs[g];
  return starts;
}

template <class T>
void zero_rows(T* out, int64_t begin, int64_t end, int64_t n) {
  parallel_for(end - begin, grain_for(n), [&](int64_t r) {
    for (int64_t i = 0; i < n; i += kLanes) store_upto(VF::zero(), out + (begin + r) * n + i, n - i);
  });
}

// out (R, N) = a (R, K) B_g + bias_g.
template <class T>
void products(const int64_t* starts, int64_t G, int64_t R, int64_t N, int64_t K, const T* a, int64_t a_stride,
              const Operand<T>& b, const float* bias, T* out) {
  multiply_groups<T, 1>(
      starts, G, N, K, K, false, gathered_rows<T>([&](int64_t r, int64_t k) { return a + r * a_stride + k; }),
      [&](int64_t g, int64_t n, int64_t cols, Scratch& scratch) {
        return InTurn<T, 1>{{b.panels(g, n, cols, K, N, scratch)}, b_panel_size<T>(K)};
      },
      [&](int64_t g, int64_t r, int64_t n, int64_t count, const float* const(&v)[1]) {
        for (int64_t j = 0; j < count; j += kLanes) {
          VF value = load_upto(v[0] + j, count - j);
          if (bias) value = value + load_upto(bias + g * N + n + j, count - j);
          store_upto(value, out + r * N + n + j, count - j);
        }
      });
  zero_rows(out, starts[G], R, N);
}

template <class T>
void run_forward(const GroupedMm& p) {
  Scratch scratch;
  const Operand<T> b{p.b, p.b_type, p.b_group, p.b_k, p.b_n, nullptr};
  products<T>(row_starts(p.offs, p.G, scratch), p.G, p.R, p.N, p.K, static_cast<const T*>(p.a), p.a_stride, b, p.bias,
              static_cast<T*>(p.out));
}

template <class T>
void run_backward(const GroupedMmBackward& p) {
  Scratch scratch;
  const int64_t* starts = row_starts(p.offs, p.G, scratch);
  const T* dout = static_cast<const T*>(p.dout);
  const T* a = static_cast<const T*>(p.a);
  if (p.da) {
    const Operand<T> b{p.b, p.b_type, p.b_group, p.b_n, p.b_k, nullptr};
    products<T>(starts, p.G, p.R, p.K, p.N, dout, p.N, b, nullptr, static_cast<T*>(p.da));
  }
  if (p.db) {
    outer_products<T>(
        starts, p.G, p.K, p.N, [&](int64_t r) { return a + r * p.a_stride; }, [&](int64_t r) { return dout + r * p.N; },
        p.db, p.b_type);
  }
  if (p.dbias) {
    parallel_for(p.G, 1, [&](int64_t g) {
      for (int64_t n = 0; n < p.N; n += kLanes) {
        VF sum = VF::zero();
        for (int64_t r = starts[g]; r < starts[g + 1]; ++r) sum = sum + load_upto(dout + r * p.N + n, p.N - n);
        store_upto(sum, p.dbias + g * p.N + n, p.N - n);
      }
    });
  }
}

}  // namespace

void grouped_mm(const GroupedMm& p) { p.a_type == DType::kF32 ? run_forward<float>(p) : run_forward<bf16>(p); }

void grouped_mm_backward(const GroupedMmBackward& p) {
  p.a_type == DType::kF32 ? run_backward<float>(p) : run_backward<bf16>(p);
}

}  // namespace foldscan::FOLDSCAN_ISA::moe
