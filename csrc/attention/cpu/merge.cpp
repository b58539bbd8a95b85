// Merging two attentions over disjoint keys:  lse = log(e^a + e^b),  out = w_a out_a + w_b out_b,  w = e^(lse_. - lse)
// (FlashInfer, arXiv:2501.01005, section 2.2). Gradients, with t = dout . (out_a - out_b):
//   dout_a = w_a dout,  dlse_a = w_a dlse + w_a w_b t,   dout_b = w_b dout,  dlse_b = w_b dlse - w_a w_b t.
//
// FLOPs: 3 D a row. Bytes: every tensor once. Numerics: fp32, out rounded once; an empty side (lse = -inf) is an exact
// identity and two empty sides give 0 and -inf. Determinism: rows are independent.
#include "attention/cpu/tiles.h"

namespace foldscan::FOLDSCAN_ISA::attention {
namespace {

struct Weights {
  float a, b, lse;
};

// The larger weight is 1 / (1 + e), the smaller e / (1 + e), e = e^-|a - b|.
FOLDSCAN_INLINE Weights merge_weights(float a, float b) {
  const float top = a > b ? a : b, low = a > b ? b : a;
  if (top == -kInf) return {0.0f, 0.0f, -kInf};
  float t[2 * kLanes];
  const VF e = vexp_neg(VF::set(low) - VF::set(top));
  e.store(t);
  vlog1p01(e).store(t + kLanes);
  const float major = 1.0f / (1.0f + t[0]), minor = t[0] / (1.0f + t[0]);
  return {a > b ? major : minor, a > b ? minor : major, top + t[kLanes]};
}

FOLDSCAN_INLINE int64_t lse_index(const Merge& p, int64_t row) {
  const int64_t head = row % p.heads, i = row / p.heads % p.seqlen, b = row / p.heads / p.seqlen;
  return (b * p.heads + head) * p.seqlen + i;
}

template <class T>
void run_merge(const Merge& p) {
  parallel_for(p.batch * p.seqlen * p.heads, grain_for(p.D / 4 + 32), [&](int64_t row) {
    const int64_t at = lse_index(p, row);
    const Weights w = merge_weights(p.lse_a[at], p.lse_b[at]);
    p.lse[at] = w.lse;
    const T *a = static_cast<const T*>(p.out_a) + row * p.D, *b = static_cast<const T*>(p.out_b) + row * p.D;
    T* out = static_cast<T*>(p.out) + row * p.D;
    for (int64_t d = 0; d < p.D; d += kLanes) {
      const int64_t n = p.D - d;
      store_upto(fma(load_upto(a + d, n), VF::set(w.a), load_upto(b + d, n) * VF::set(w.b)), out + d, n);
    }
  });
}

template <class T>
void run_merge_backward(const MergeBackward& g) {
  const Merge& p = g.p;
  parallel_for(p.batch * p.seqlen * p.heads, grain_for(p.D / 2 + 32), [&](int64_t row) {
    const int64_t at = lse_index(p, row), first = row * p.D;
    const Weights w = merge_weights(p.lse_a[at], p.lse_b[at]);
    const T *a = static_cast<const T*>(p.out_a) + first, *b = static_cast<const T*>(p.out_b) + first;
    const T* dout = static_cast<const T*>(g.dout) + first;
    T *da = static_cast<T*>(g.dout_a) + first, *db = static_cast<T*>(g.dout_b) + first;
    VF sum = VF::zero();
    for (int64_t d = 0; d < p.D; d += kLanes) {
      const int64_t n = p.D - d;
      const VF x = load_upto(dout + d, n);
      sum = fma(x, load_upto(a + d, n) - load_upto(b + d, n), sum);
      store_upto(x * VF::set(w.a), da + d, n);
      store_upto(x * VF::set(w.b), db + d, n);
    }
    const float t = w.a * w.b * reduce_add(sum);
    g.dlse_a[at] = w.a * g.dlse[at] + t;
    g.dlse_b[at] = w.b * g.dlse[at] - t;
  });
}

}  // namespace

void merge(const Merge& p) {
  if (p.type == DType::kF32) {
    run_merge<float>(p);
  } else {
    run_merge<bf16>(p);
  }
}

void merge_backward(const MergeBackward& g) {
  if (g.p.type == DType::kF32) {
    run_merge_backward<float>(g);
  } else {
    run_merge_backward<bf16>(g);
  }
}

}  // namespace foldscan::FOLDSCAN_ISA::attention
