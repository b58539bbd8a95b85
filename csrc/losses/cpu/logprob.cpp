// Log-probability of a target, log-sum-exp, entropy, variance of -log p and sum of the logits, in one pass over the
// vocabulary; and their joint gradient. Cross entropy with label smoothing and z-loss is a combination of them.
//
//   logp = z_y - lse,  entropy = lse - sum p z,  varentropy = sum p (log p + entropy)^2,  zsum = sum z
//   dz_j = dlogp (1[j = y] - p_j) + dlse p_j + dzsum
//          + p_j (-dentropy s_j + dvarentropy (s_j^2 + 2 s_j - varentropy)),      s_j = log p_j + entropy
//
// FLOPs: 2 n H V forward, 6 n H V backward. Bytes: the weights once forward, twice backward; memory is O(n) forward.
// Numerics: logits and their gradients in fp32 (bf16 only as operands of a product), sums of a block of 512 in fp32,
//   merged over blocks in fp64. For the target p - 1 is expm1(logp), with logp from log1p: exact in the tail where
//   1 - p would be 0. Determinism: see vocab.h and backward.h.
// Sources: arXiv:2411.09009 (recomputation in tiles); the entropy terms follow from d p_j = p_j (dz_j - sum p dz).
#include "losses/cpu/backward.h"

namespace foldscan::FOLDSCAN_ISA::losses {
namespace {

using namespace foldscan::losses;

struct Rows {
  int64_t* index;
  int64_t n;
};

Rows valid_rows(const int64_t* targets, int64_t N, int64_t ignore_index, Scratch& scratch) {
  Rows rows{scratch.get<int64_t>(N), 0};
  for (int64_t i = 0; i < N; ++i)
    if (targets[i] != ignore_index) rows.index[rows.n++] = i;
  return rows;
}

template <class T>
void run_stats(const Stats& p) {
  Scratch scratch;
  const Rows rows = valid_rows(p.targets, p.N, p.ignore_index, scratch);
  const int64_t n = rows.n;
  struct Partial {
    Sums sums;
    double zsum;
  };
  const int64_t wave = wave_blocks(n, p.V, sizeof(Partial));
  Partial* partial = scratch.get<Partial>(wave * n);
  Partial* total = scratch.get<Partial>(n);
  float* target_logit = scratch.get<float>(n);
  for (int64_t r = 0; r < n; ++r) total[r] = {Sums::none(), 0.0};
  const Head* const heads[1] = {&p.head};
  for_waves(
      n, p.V, p.head.H, wave,
      [&](int64_t v, int64_t cols, int64_t r0, int64_t count, int64_t slot) {
        logit_tiles<T, 1>(heads, rows.index, r0, count, v, cols, [&](int64_t r, int64_t m, float* const(&z)[1]) {
          for (int64_t i = 0; i < m; ++i) {
            const float* row = z[0] + i * kVocabBlock;
            VW sum = VW::zero();
            each_vector(cols, [&](auto tag, int64_t j, int64_t left)
                                  FOLDSCAN_LAMBDA { add_to(sum, load_as<decltype(tag)>(row + j, left)); });
            partial[slot * n + r + i] = {block_sums(row, cols, p.moments), reduce_add(sum)};
            const int64_t y = p.targets[rows.index[r + i]] - v;
            if (y >= 0 && y < cols) target_logit[r + i] = row[y];
          }
        });
      },
      [&](int64_t r, int64_t blocks) {
        for (int64_t b = 0; b < blocks; ++b) {
          merge(total[r].sums, partial[b * n + r].sums);
          total[r].zsum += partial[b * n + r].zsum;
        }
      });
  for (int64_t i = 0; i < p.N; ++i) p.logp[i] = p.lse[i] = p.entropy[i] = p.varentropy[i] = p.zsum[i] = 0.0f;
  for (int64_t r = 0; r < n; ++r) {
    const Sums& s = total[r].sums;
    const int64_t i = rows.index[r];
    const double log_total = __builtin_log1p(s.rest), mean = s.mean();
    p.lse[i] = static_cast<float>(s.lse());
    p.logp[i] = static_cast<float>((static_cast<double>(target_logit[r]) - s.max) - log_total);
    p.zsum[i] = static_cast<float>(total[r].zsum);
    if (!p.moments) continue;
    const double spread = s.second / s.total() - mean * mean;
    p.entropy[i] = static_cast<float>(log_total - mean);
    p.varentropy[i] = static_cast<float>(spread > 0.0 ? spread : spread == spread ? 0.0 : spread);
  }
}

template <class T>
void run_stats_backward(const StatsBackward& p) {
  Scratch scratch;
  const Rows rows = valid_rows(p.targets, p.N, p.ignore_index, scratch);
  Head head = p.head;
  head.packed = nullptr;
  const Head* const heads[1] = {&head};
  head_gradient<T>(
      head, p.grad, rows.index, rows.n, p.N, p.V,
      [&](int64_t r0, int64_t count, int64_t v, int64_t cols, T* dst, int64_t ld) {
        logit_tiles<T, 1>(heads, rows.index, r0, count, v, cols, [&](int64_t r, int64_t m, float* const(&z)[1]) {
          for (int64_t q = 0; q < m; ++q) {
            const int64_t i = rows.index[r + q];
            const float* row = z[0] + q * kVocabBlock;
            T* out = dst + (r - r0 + q) * ld;
            const float g = p.dlogp[i], w = p.dvarentropy[i];
            const float base = p.dlse[i] - w * p.varentropy[i], slope = 2.0f * w - p.dentropy[i], lift = p.dzsum[i];
            const bool moments = slope != 0.0f || w != 0.0f;
            each_vector(cols, [&](auto tag, int64_t j, int64_t left) FOLDSCAN_LAMBDA {
              using V = decltype(tag);
              const V x = load_as<V>(row + j, left), t = x - V::set(p.lse[i]);
              V f = V::set(base - g);
              if (moments) {
                const V s = vmax(V::set(kFarBelow), t) + V::set(p.entropy[i]);
                f = fma(s, fma(V::set(w), s, V::set(slope)), f);
              }
              // log p: above 0 by rounding only.
              const V dz = fma(vexp_neg(vmin(V::zero(), t)), f, V::set(lift));
              store_upto(through_cap(head, x, dz), out + j, left);
            });
            const int64_t y = p.targets[i] - v;
            if (y < 0 || y >= cols) continue;
            const float logp = p.logp[i], s = logp + p.entropy[i];
            const double others = static_cast<double>(base) + static_cast<double>(s) * (slope + w * s);
            const double dz = -static_cast<double>(g) * __builtin_expm1(logp) + __builtin_exp(logp) * others + lift;
            float one[kLanes];
            through_cap(head, VF::set(row[y]), VF::set(static_cast<float>(dz))).store(one);
            out[y] = from_float<T>(one[0]);
          }
        });
      });
}

}  // namespace

void stats(const Stats& p) { p.head.type == DType::kF32 ? run_stats<float>(p) : run_stats<bf16>(p); }

void stats_backward(const StatsBackward& p) {
  p.head.type == DType::kF32 ? run_stats_backward<float>(p) : run_stats_backward<bf16>(p);
}

}  // namespace foldscan::FOLDSCAN_ISA::losses
