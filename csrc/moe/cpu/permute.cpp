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
void run_gather(const Gather& p) {
  const T* tokens = static_cast<const T*>(p.tokens);
  T* out = static_cast<T*>(p.out);
  parallel_for(p.R, grain_for(p.H), [&](int64_t r) {
    const int64_t id = p.rows[r];
    for (int64_t h = 0; h < p.H; h += kLanes)
      store_upto(id < 0 ? VF::zero() : load_upto(tokens + id / p.k * p.H + h, p.H - h), out + r * p.H + h, p.H - h);
  });
}

template <class T>
void run_combine(const Combine& p) {
  const T* rows = static_cast<const T*>(p.permuted);
  T* out = static_cast<T*>(p.out);
  parallel_for(p.T, grain_for(p.H * p.k), [&](int64_t t) {
    for (int64_t h = 0; h < p.H; h += kLanes) {
      VF sum = VF::zero();
      for (int64_t id = t * p.k; id < (t + 1) * p.k; ++id) {
        if (p.inverse[id] < 0) continue;
        const VF v = load_upto(rows + p.inverse[id] * p.H + h, p.H - h);
        sum = p.probs ? fma(VF::set(p.probs[id]), v, sum) : sum + v;
      }
      store_upto(sum, out + t * p.H + h, p.H - h);
    }
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

void gather(const Gather& p) { p.type == DType::kF32 ? run_gather<float>(p) : run_gather<bf16>(p); }

void combine(const Combine& p) { p.type == DType::kF32 ? run_combine<float>(p) : run_combine<bf16>(p); }

void combine_backward(const CombineBackward& p) {
  p.type == DType::kF32 ? run_combine_backward<float>(p) : run_combine_backward<bf16>(p);
}

}  // namespace foldscan::FOLDSCAN_ISA::moe
