// Router: scores, choice of k experts per token, probabilities; and the gradient with respect to the logits.
//
// Choice: an ordered list of the k best (value, index) is kept while the experts are scanned upwards, so that of equal
// values the lower index wins. Values are logits (softmax over the chosen), probabilities (softmax over all) or
// sigmoids, plus the bias. With groups, the experts outside of the best groups are skipped; a group's score is the sum
// of its best k / groups_topk values. A NaN counts as the largest value, so that it shows in the result.
//
// FLOPs: T E (exp) + T E log-ish comparisons. Bytes: the logits once. Numerics: fp32; a softmax is shifted by its
// maximum. Determinism: a token is one thread's work and no other token's value enters.
// Sources: arXiv:2101.03961 (softmax), arXiv:2412.19437 section 2.1.2 (sigmoid, bias, groups).
#include "core/parallel.h"
#include "core/vmath.h"
#include "moe/moe.h"

namespace foldscan::FOLDSCAN_ISA::moe {
namespace {

using namespace foldscan::moe;

constexpr float kInf = __builtin_inff();

struct Best {
  float* value;
  int64_t* index;
  int64_t size = 0;

  FOLDSCAN_INLINE void offer(float v, int64_t i, int64_t k) {
    if (!(v == v)) v = kInf;
    if (size == k && !(v > value[k - 1])) return;
    int64_t at = size < k ? size++ : k - 1;
    for (; at > 0 && v > value[at - 1]; --at) {
      value[at] = value[at - 1];
      index[at] = index[at - 1];
    }
    value[at] = v;
    index[at] = i;
  }
};

float row_max(const float* x, int64_t n) {
  VF m = VF::set(-kInf);
  for (int64_t i = 0; i < n; i += kLanes) {
    const VF v = load_upto(x + i, n - i);
    m = vmax(m, n - i < kLanes ? select(VM::first(static_cast<int>(n - i)), v, VF::set(-kInf)) : v);
  }
  return reduce_max(m);
}

// y = softmax(x); y may be x.
void softmax(const float* x, int64_t n, float* y) {
  const VF m = VF::set(row_max(x, n));
  VF sum = VF::zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    VF e = vexp_neg(load_upto(x + i, n - i) - m);
    if (n - i < kLanes) e = select(VM::first(static_cast<int>(n - i)), e, VF::zero());
    sum = sum + e;
    store_upto(e, y + i, n - i);
  }
  const VF total = VF::set(reduce_add(sum));
  for (int64_t i = 0; i < n; i += kLanes) store_upto(load_upto(y + i, n - i) / total, y + i, n - i);
}

void sigmoid(const float* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += kLanes) store_upto(vsigmoid(load_upto(x + i, n - i)), y + i, n - i);
}

// DeepSeek-V3's guard against a sum of zeros.
constexpr float kSumFloor = 1e-20f;

// Softmax over the chosen experts: also what the softmax over all gives once it is normalised.
bool over_chosen(const RouteMode& m) { return !m.sigmoid && (!m.pre_softmax || m.normalize); }

void choose(const Route& p, const float* value, int64_t* experts, float* best, int64_t* groups, float* group_best,
            float* in_group) {
  Best top{best, experts};
  if (p.mode.num_groups == 1) {
    for (int64_t e = 0; e < p.E; ++e) top.offer(value[e], e, p.k);
    return;
  }
  const int64_t size = p.E / p.mode.num_groups;
  const int64_t counted = imin(size, imax(1, p.k / p.mode.groups_topk));
  Best chosen{group_best, groups};
  for (int64_t g = 0; g < p.mode.num_groups; ++g) {
    Best inside{in_group, experts};
    for (int64_t i = 0; i < size; ++i) inside.offer(value[g * size + i], i, counted);
    float sum = 0.0f;
    for (int64_t i = 0; i < counted; ++i) sum += in_group[i];
    chosen.offer(sum, g, p.mode.groups_topk);
  }
  // Upwards over the groups, so that a tie goes to the lower expert here too.
  for (int64_t g = 0; g < p.mode.num_groups; ++g) {
    bool in = false;
    for (int64_t i = 0; i < p.mode.groups_topk; ++i) in = in || groups[i] == g;
    for (int64_t i = 0; in && i < size; ++i) top.offer(value[g * size + i], g * size + i, p.k);
  }
}

}  // namespace

void route(const Route& p) {
  parallel_for(p.T, grain_for(p.E * 16), [&](int64_t t) {
    Scratch scratch;
    const float* logits = p.logits + t * p.E;
    float* score = scratch.get<float>(p.E);
    float* value = scratch.get<float>(p.E);
    float* best = scratch.get<float>(p.E);
    float* group_best = scratch.get<float>(p.mode.num_groups);
    float* in_group = scratch.get<float>(p.E);
    int64_t* chosen = scratch.get<int64_t>(p.E);
    int64_t* groups = scratch.get<int64_t>(p.mode.num_groups);
    if (p.mode.sigmoid) {
      sigmoid(logits, p.E, score);
    } else if (p.mode.pre_softmax) {
      softmax(logits, p.E, score);
    } else {
      for (int64_t e = 0; e < p.E; ++e) score[e] = logits[e];
    }
    for (int64_t e = 0; e < p.E; ++e) value[e] = p.bias ? score[e] + p.bias[e] : score[e];
    choose(p, value, chosen, best, groups, group_best, in_group);

    float* probs = p.probs + t * p.k;
    const bool softmax_chosen = over_chosen(p.mode);
    for (int64_t j = 0; j < p.k; ++j) {
      p.experts[t * p.k + j] = chosen[j];
      probs[j] = softmax_chosen ? logits[chosen[j]] : score[chosen[j]];
    }
    float scale = p.mode.scaling;
    if (softmax_chosen) {
      softmax(probs, p.k, probs);
    } else if (p.mode.normalize) {
      float sum = kSumFloor;
      for (int64_t j = 0; j < p.k; ++j) sum += probs[j];
      for (int64_t j = 0; j < p.k; ++j) probs[j] /= sum;
    }
    for (int64_t j = 0; j < p.k; ++j) probs[j] *= scale;
  });
}

void route_backward(const RouteBackward& p) {
  parallel_for(p.T, grain_for(p.E * 8), [&](int64_t t) {
    Scratch scratch;
    const float* logits = p.logits + t * p.E;
    const int64_t* experts = p.experts + t * p.k;
    const float* g = p.dprobs + t * p.k;
    float* d = p.dlogits + t * p.E;
    float* s = scratch.get<float>(imax(p.E, p.k));
    const float scale = p.mode.scaling;
    if (!p.mode.sigmoid && !over_chosen(p.mode)) {
      softmax(logits, p.E, s);
      float dot = 0.0f;
      for (int64_t j = 0; j < p.k; ++j) dot += s[experts[j]] * g[j];
      for (int64_t e = 0; e < p.E; ++e) d[e] = -scale * dot * s[e];
      for (int64_t j = 0; j < p.k; ++j) d[experts[j]] += scale * s[experts[j]] * g[j];
      return;
    }
    for (int64_t e = 0; e < p.E; ++e) d[e] = 0.0f;
    for (int64_t j = 0; j < p.k; ++j) s[j] = logits[experts[j]];
    if (!p.mode.sigmoid) {
      softmax(s, p.k, s);
      float dot = 0.0f;
      for (int64_t j = 0; j < p.k; ++j) dot += s[j] * g[j];
      for (int64_t j = 0; j < p.k; ++j) d[experts[j]] = scale * s[j] * (g[j] - dot);
      return;
    }
    sigmoid(s, p.k, s);
    float sum = 1.0f, dot = 0.0f;
    if (p.mode.normalize) {
      sum = kSumFloor;
      for (int64_t j = 0; j < p.k; ++j) sum += s[j];
      for (int64_t j = 0; j < p.k; ++j) dot += g[j] * (s[j] / sum);
    }
    for (int64_t j = 0; j < p.k; ++j) d[experts[j]] = scale * (g[j] - dot) / sum * s[j] * (1.0f - s[j]);
  });
}

}  // namespace foldscan::FOLDSCAN_ISA::moe
