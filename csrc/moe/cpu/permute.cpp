// Moving rows between token order and expert order. Both directions are gathers (of one row, or of the k rows of a
// token in the order of its slots), so that no two threads write one place.
//
// FLOPs: 2 R H at most. Bytes: every row once in, once out. Numerics: fp32 sums, rounded once.
// Determinism: fixed order per output row; no other token's value enters.
#include "core/vmath.h"
#include "moe/cpu/sort.h"

namespace foldscan::FOLDSCAN_ISA::moe {
namespace {

using namespace foldscan::moe;

template <class T>
void run_combine(const Combine& p) {
  const T* rows = static_cast<const T*>(p.permuted);
  T* out = static_cast<T*>(p.out);
  parallel_for(p.T, grain_for(p.H * p.k), [&](int64_t t) {
    each_vector(p.H, [&](auto zero, int64_t h, int64_t n) FOLDSCAN_LAMBDA {
      using V = decltype(zero);
      V sum = V::zero();
      for (int64_t id = t * p.k; id < (t + 1) * p.k; ++id) {
        if (p.inverse[id] < 0) continue;
        const V v = load_as<V>(rows + p.inverse[id] * p.H + h, n);
        sum = p.probs ? fma(V::set(p.probs[id]), v, sum) : sum + v;
      }
      store_upto(sum, out + t * p.H + h, n);
    });
  });
}

template <class T>
void run_combine_backward(const CombineBackward& p) {
  const T* dout = static_cast<const T*>(p.dout);
  const T* permuted = static_cast<const T*>(p.permuted);
  if (T* d = static_cast<T*>(p.dpermuted)) {
    parallel_for(p.R, grain_for(p.H), [&](int64_t r) {
      const int64_t id = p.rows[r];
      const VF prob = VF::set(id < 0 ? 0.0f : p.probs ? p.probs[id] : 1.0f);
      for (int64_t h = 0; h < p.H; h += kLanes) {
        const VF v = id < 0 ? VF::zero() : prob * load_upto(dout + id / p.k * p.H + h, p.H - h);
        store_upto(v, d + r * p.H + h, p.H - h);
      }
    });
  }
  if (p.dprobs) {
    parallel_for(p.T * p.k, grain_for(p.H), [&](int64_t id) {
      const int64_t r = p.inverse[id];
      VF sum = VF::zero();
      for (int64_t h = 0; r >= 0 && h < p.H; h += kLanes)
        sum = fma(load_upto(dout + id / p.k * p.H + h, p.H - h), load_upto(permuted + r * p.H + h, p.H - h), sum);
      p.dprobs[id] = reduce_add(sum);
    });
  }
}

}  // namespace

void sort(const Sort& p) { sort_assignments(p); }

void gather(const Gather& p) {
  const char* tokens = static_cast<const char*>(p.tokens);
  char* out = static_cast<char*>(p.out);
  const int64_t bytes = p.H * element_size(p.type);
  parallel_for(p.R, grain_for(p.H), [&](int64_t r) {
    const int64_t id = p.rows[r];
    if (id < 0) {
      std::memset(out + r * bytes, 0, static_cast<size_t>(bytes));
    } else {
      std::memcpy(out + r * bytes, tokens + id / p.k * bytes, static_cast<size_t>(bytes));
    }
  });
}

void combine(const Combine& p) { p.type == DType::kF32 ? run_combine<float>(p) : run_combine<bf16>(p); }

void combine_backward(const CombineBackward& p) {
  p.type == DType::kF32 ? run_combine_backward<float>(p) : run_combine_backward<bf16>(p);
}

}  // namespace foldscan::FOLDSCAN_ISA::moe
