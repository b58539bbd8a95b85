// Router: scores, choice of k experts per token, probabilities; and the gradient with respect to the logits.
//
// Choice: an ordered list of the k best (value, index) is kept while the experts are scanned upwards, so that of equal
// values the lower index wins. Values are logits (softmax over the chosen), probabilities (softmax over all) or
// sigmoids, plus the bias. With groups, the experts outside of the best groups are skipped; a group's score is the sum
// of its best k / groups_topk values. A NaN counts as the largest value, so that it shows in the result.
//
// kLanes tokens are a block, one token a lane: a value sinks through the lists of all lanes by compare and exchange,
// without a branch. Long lists, groups and a block of too few tokens are scanned token by token, where most values end
// at the first comparison. Both choose the same, so that a token's choice does not depend on its block.
//
// FLOPs: T E (exp) + T E k comparisons at most. Bytes: the logits once. Numerics: fp32; a softmax is shifted by its
// maximum. Determinism: a token is one lane's or one thread's work and no other token's value enters.
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

// The k best experts of a token.
void choose(const Route& p, const float* score, int64_t* experts) {
  Scratch scratch;
  float* value = scratch.get<float>(p.E);
  float* best = scratch.get<float>(p.E);
  for (int64_t e = 0; e < p.E; ++e) value[e] = p.bias ? score[e] + p.bias[e] : score[e];
  Best top{best, experts};
  if (p.mode.num_groups == 1) {
    for (int64_t e = 0; e < p.E; ++e) top.offer(value[e], e, p.k);
    return;
  }
  float* group_best = scratch.get<float>(p.mode.num_groups);
  int64_t* groups = scratch.get<int64_t>(p.mode.num_groups);
  const int64_t size = p.E / p.mode.num_groups;
  const int64_t counted = imin(size, imax(1, p.k / p.mode.groups_topk));
  float* in_group = scratch.get<float>(counted);
  int64_t* members = scratch.get<int64_t>(counted);
  Best chosen{group_best, groups};
  for (int64_t g = 0; g < p.mode.num_groups; ++g) {
    Best inside{in_group, members};
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

// value (E, kLanes): the values of `count` tokens, given their scores (count, E).
void values_in_lanes(const Route& p, const float* score, int64_t count, float* value) {
  for (int64_t e = 0; e < p.E; e += kLanes) {
    VF v[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) v[i] = i < count ? load_upto(score + i * p.E + e, p.E - e) : VF::zero();
    transpose(v);
    for (int64_t i = 0; i < imin(kLanes, p.E - e); ++i) {
      const VF x = p.bias ? v[i] + VF::set(p.bias[e + i]) : v[i];
      select(x == x, x, VF::set(kInf)).store(value + (e + i) * kLanes);
    }
  }
}

// index (K, kLanes): the K best of the E values of every lane, best first. Free places are NaN: they compare with
// nothing, and vmax and vmin then give their second operand, the newcomer and the free place. Where a newcomer goes is
// asked of itself at every place, not of what it pushed down, which stays before its equals.
template <int K>
void best_in_lanes(const float* value, int64_t E, float* index) {
  VF best[K], at[K];
#pragma GCC unroll 16
  for (int j = 0; j < K; ++j) {
    best[j] = VF::set(__builtin_nanf(""));
    at[j] = VF::zero();
  }
  for (int64_t e = 0; e < E; ++e) {
    const VF newcomer = VF::load(value + e * kLanes);
    VF v = newcomer, i = VF::set(static_cast<float>(e));
#pragma GCC unroll 16
    for (int j = 0; j < K; ++j) {
      const VM stays = newcomer <= best[j];
      const VF place = best[j], holder = at[j];
      best[j] = vmax(place, v);
      v = vmin(v, place);
      at[j] = select(stays, holder, i);
      i = select(stays, i, holder);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < K; ++j) at[j].store(index + j * kLanes);
}

constexpr int64_t kListInLanes = kLanes < 8 ? 8 : 16;  // four lanes do not pay for longer ones
constexpr int64_t kExpertsInLanes = 4096;  // their values take 256 KiB with 16 lanes: a share of the second-level cache

// Where the lists of a block, k steps an expert, beat its tokens' scans, about four steps an expert and token.
bool lists_in_lanes(const Route& p, int64_t count) {
  return p.mode.num_groups == 1 && p.k <= kListInLanes && p.E <= kExpertsInLanes && p.k <= 4 * count;
}

// experts (count, k): the k best experts of `count` tokens, given their scores (count, E).
void choose_in_lanes(const Route& p, const float* score, int64_t count, int64_t* experts) {
  Scratch scratch;
  float* value = scratch.get<float>(p.E * kLanes);
  float index[kListInLanes * kLanes];
  values_in_lanes(p, score, count, value);
  if (p.k == 1) {
    best_in_lanes<1>(value, p.E, index);
  } else if (p.k == 2) {
    best_in_lanes<2>(value, p.E, index);
  } else if (p.k <= 4) {
    best_in_lanes<4>(value, p.E, index);
  } else if (p.k <= 8) {
    best_in_lanes<8>(value, p.E, index);
  } else {
    best_in_lanes<kListInLanes>(value, p.E, index);
  }
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < p.k; ++j) experts[i * p.k + j] = static_cast<int64_t>(index[j * kLanes + i]);
}

// probs (count, k) of the chosen experts; a sum is taken in the order of the slots.
void weigh(const Route& p, const float* score, int64_t count, const int64_t* experts, float* probs) {
  Scratch scratch;
  float* x = scratch.get<float>(p.k * kLanes);
  for (int64_t j = 0; j < p.k; ++j) {
    for (int64_t i = 0; i < kLanes; ++i) x[j * kLanes + i] = i < count ? score[i * p.E + experts[i * p.k + j]] : 0.0f;
  }
  const VF scale = VF::set(p.mode.scaling);
  const bool softmax = over_chosen(p.mode);
  VF sum = VF::set(softmax || !p.mode.normalize ? 0.0f : kSumFloor), top = VF::set(-kInf);
  if (softmax)
    for (int64_t j = 0; j < p.k; ++j) top = vmax(top, VF::load(x + j * kLanes));
  for (int64_t j = 0; j < p.k; ++j) {
    VF v = VF::load(x + j * kLanes);
    if (softmax) v = vexp_neg(v - top);
    sum = sum + v;
    v.store(x + j * kLanes);
  }
  for (int64_t j = 0; j < p.k; ++j) {
    const VF v = VF::load(x + j * kLanes);
    (scale * (softmax || p.mode.normalize ? v / sum : v)).store(x + j * kLanes);
  }
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < p.k; ++j) probs[i * p.k + j] = x[j * kLanes + i];
}

}  // namespace

void route(const Route& p) {
  parallel_for(ceil_div(p.T, kLanes), grain_for(p.E * 8 * kLanes), [&](int64_t block) {
    Scratch scratch;
    const int64_t first = block * kLanes, count = imin(kLanes, p.T - first);
    const float* logits = p.logits + first * p.E;
    const float* score = logits;
    int64_t* experts = p.experts + first * p.k;
    if (p.mode.sigmoid || p.mode.pre_softmax) {
      float* of_logits = scratch.get<float>(count * p.E);
      if (p.mode.sigmoid) {
        sigmoid(logits, count * p.E, of_logits);
      } else {
        for (int64_t i = 0; i < count; ++i) softmax(logits + i * p.E, p.E, of_logits + i * p.E);
      }
      score = of_logits;
    }
    if (lists_in_lanes(p, count)) {
      choose_in_lanes(p, score, count, experts);
    } else {
      for (int64_t i = 0; i < count; ++i) choose(p, score + i * p.E, experts + i * p.k);
    }
    weigh(p, over_chosen(p.mode) ? logits : score, count, experts, p.probs + first * p.k);
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
