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
void multiply_groups(const int64_t* starts, int64_t G, int64_t R, int64_t N, int64_t K, const T* a, int64_t a_stride,
                     const Operand<T>& b, const float* bias, T* out) {
  const auto row = [&](int64_t r) { return a + r * a_stride; };
  for_tiles(starts, G, N, K, kTaskCols, [&](int64_t g, int64_t r0, int64_t rows, int64_t n, int64_t cols) {
    Scratch scratch;
    const T* panels[1] = {b.panels(g, n, cols, K, N, scratch.get<T>(b_packed_size<T>(K, cols)))};
    T* tile = scratch.get<T>(kTileRows * (kKC + 2));
    float* c[1] = {scratch.get<float>(kTileRows * kTaskCols)};
    for (int64_t r = r0; r < r0 + rows; r += kTileRows) {
      const int64_t m = imin(kTileRows, r0 + rows - r);
      multiply_tile<T>(r, m, cols, K, gathered_rows<T>(row), panels, tile, c, false);
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < cols; j += kLanes) {
          VF v = load_upto(c[0] + i * kTaskCols + j, cols - j);
          if (bias) v = v + load_upto(bias + g * N + n + j, cols - j);
          store_upto(v, out + (r + i) * N + n + j, cols - j);
        }
    }
  });
  zero_rows(out, starts[G], R, N);
}

template <class T>
void run_forward(const GroupedMm& p) {
  Scratch scratch;
  const Operand<T> b{p.b, p.b_type, p.b_group, p.b_k, p.b_n, nullptr};
  multiply_groups<T>(row_starts(p.offs, p.G, scratch), p.G, p.R, p.N, p.K, static_cast<const T*>(p.a), p.a_stride, b,
                     p.bias, static_cast<T*>(p.out));
}

template <class T>
void run_backward(const GroupedMmBackward& p) {
  Scratch scratch;
  const int64_t* starts = row_starts(p.offs, p.G, scratch);
  const T* dout = static_cast<const T*>(p.dout);
  const T* a = static_cast<const T*>(p.a);
  if (p.da) {
    const Operand<T> b{p.b, p.b_type, p.b_group, p.b_n, p.b_k, nullptr};
    multiply_groups<T>(starts, p.G, p.R, p.K, p.N, dout, p.N, b, nullptr, static_cast<T*>(p.da));
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
