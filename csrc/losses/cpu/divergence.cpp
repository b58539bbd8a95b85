// Kullback-Leibler and Jensen-Shannon divergence between a teacher's and a student's distribution over a vocabulary,
// without the logits of either; and the gradient with respect to the student.
//
//   forward  KL(T || S) = sum pT (zT - zS) - lseT + lseS               dz = pS - pT
//   reverse  KL(S || T) = sum pS (zS - zT) - lseS + lseT               dz = pS (log pS - log pT - KL)
//   JSD      b KL(T || M) + (1 - b) KL(S || M), M = b pT + (1 - b) pS  dz = (1 - b) pS (log pS / M - KL(S || M))
// The first two take one pass over the vocabulary; JSD needs both lse first, so two.
//
// FLOPs: 2 n (H + H_teacher) V a pass; backward that and 4 n H V. Memory: O(n) forward, backward.h's backward.
// Numerics: as in logprob.cpp. Near convergence lseS - lseT is formed from the sums, and pS - pT as
//   p * expm1(difference of log p), not as differences of rounded numbers of their size.
// Determinism: see vocab.h and backward.h.
#include "losses/cpu/backward.h"

namespace foldscan::FOLDSCAN_ISA::losses {
namespace {

using namespace foldscan::losses;

struct Rows {
  int64_t* index;
  int64_t n;
};

Rows unmasked_rows(const uint8_t* mask, int64_t N, Scratch& scratch) {
  Rows rows{scratch.get<int64_t>(N), 0};
  for (int64_t i = 0; i < N; ++i)
    if (!mask || mask[i]) rows.index[rows.n++] = i;
  return rows;
}

// log(pS / M) from d = log pS - log pT: M / pS = (1 - b) + b e^-d.
struct Mixture {
  VF log_student, logit;
  explicit Mixture(float beta)
      : log_student(VF::set(static_cast<float>(__builtin_log1p(-static_cast<double>(beta))))),
        logit(VF::set(static_cast<float>(__builtin_log(static_cast<double>(beta)) -
                                         __builtin_log1p(-static_cast<double>(beta))))) {}
  FOLDSCAN_INLINE VF log_ratio(VF d) const { return -(log_student + vsoftplus(logit - d)); }
};

// sum over a block of e^(z_w - max) (z_w - z_o), the weighting distribution being w.
FOLDSCAN_INLINE float weighted_gap(const float* w, const float* o, int64_t cols, float max) {
  VF sum = VF::zero();
  for (int64_t j = 0; j < cols; j += kLanes) {
    const VF x = load_upto(w + j, cols - j);
    VF e = vexp_neg(x - VF::set(max));
    if (cols - j < kLanes) e = select(VM::first(static_cast<int>(cols - j)), e, VF::zero());
    sum = fma(e, x - load_upto(o + j, cols - j), sum);
  }
  return reduce_add(sum);
}

struct Side {
  Sums student, teacher;
  double gap;  // relative to the weighting distribution's max
};

void merge_side(Side& s, const Side& b, bool weight_is_student) {
  const double before = weight_is_student ? s.student.max : s.teacher.max;
  const double block = weight_is_student ? b.student.max : b.teacher.max;
  merge(s.student, b.student);
  merge(s.teacher, b.teacher);
  const double after = weight_is_student ? s.student.max : s.teacher.max;
  const double none = -static_cast<double>(kInfinity);
  s.gap = (before == none ? 0.0 : s.gap * __builtin_exp(before - after)) +
          (block == none ? 0.0 : b.gap * __builtin_exp(block - after));
}

template <class T>
void run_kl(const Kl& p) {
  Scratch scratch;
  const Rows rows = unmasked_rows(p.mask, p.N, scratch);
  const int64_t n = rows.n;
  const bool by_student = p.divergence == Divergence::kReverse;
  const int64_t wave = wave_blocks(n, p.V, sizeof(Side));
  Side* partial = scratch.get<Side>(wave * n);
  Side* total = scratch.get<Side>(n);
  for (int64_t r = 0; r < n; ++r) total[r] = {Sums::none(), Sums::none(), 0.0};
  for (int64_t i = 0; i < p.N; ++i) p.value[i] = p.lse_student[i] = p.lse_teacher[i] = p.inner[i] = 0.0f;
  const Head* const heads[2] = {&p.student, &p.teacher};
  const int64_t H = p.student.H + p.teacher.H;
  for_waves(
      n, p.V, H, wave,
      [&](int64_t v, int64_t cols, int64_t r0, int64_t count, int64_t slot) {
        logit_tiles<T, 2>(heads, rows.index, r0, count, v, cols, [&](int64_t r, int64_t m, float* const(&z)[2]) {
          for (int64_t i = 0; i < m; ++i) {
            const float *s = z[0] + i * kVocabBlock, *t = z[1] + i * kVocabBlock;
            Side side{block_sums(s, cols, false), block_sums(t, cols, false), 0.0};
            if (by_student) {
              side.gap = weighted_gap(s, t, cols, static_cast<float>(side.student.max));
            } else if (p.divergence == Divergence::kForward) {
              side.gap = weighted_gap(t, s, cols, static_cast<float>(side.teacher.max));
            }
            partial[slot * n + r + i] = side;
          }
        });
      },
      [&](int64_t r, int64_t blocks) {
        for (int64_t b = 0; b < blocks; ++b) merge_side(total[r], partial[b * n + r], by_student);
      });
  for (int64_t r = 0; r < n; ++r) {
    const Side& s = total[r];
    const int64_t i = rows.index[r];
    p.lse_student[i] = static_cast<float>(s.student.lse());
    p.lse_teacher[i] = static_cast<float>(s.teacher.lse());
    const double lse_gap =
        (s.student.max - s.teacher.max) + (__builtin_log1p(s.student.rest) - __builtin_log1p(s.teacher.rest));
    const double kl = by_student ? s.gap / s.student.total() - lse_gap : s.gap / s.teacher.total() + lse_gap;
    p.value[i] = p.inner[i] = static_cast<float>(kl);
  }
  if (p.divergence != Divergence::kJensenShannon) return;

  struct Mixed {
    double student, teacher;  // KL(S || M), KL(T || M)
  };
  Mixed* mixed_partial = scratch.get<Mixed>(wave * n);
  Mixed* mixed = scratch.get<Mixed>(n);
  for (int64_t r = 0; r < n; ++r) mixed[r] = {0.0, 0.0};
  const Mixture mixture(p.beta);
  for_waves(
      n, p.V, H, wave,
      [&](int64_t v, int64_t cols, int64_t r0, int64_t count, int64_t slot) {
        logit_tiles<T, 2>(heads, rows.index, r0, count, v, cols, [&](int64_t r, int64_t m, float* const(&z)[2]) {
          for (int64_t i = 0; i < m; ++i) {
            const VF lse_s = VF::set(p.lse_student[rows.index[r + i]]);
            const VF lse_t = VF::set(p.lse_teacher[rows.index[r + i]]);
            VF kl_s = VF::zero(), kl_t = VF::zero();
            for (int64_t j = 0; j < cols; j += kLanes) {
              const VF log_s = load_logits(z[0] + i * kVocabBlock + j, cols - j) - lse_s;
              const VF log_t = load_logits(z[1] + i * kVocabBlock + j, cols - j) - lse_t;
              const VF ls = vmax(VF::set(kFarBelow), log_s), lt = vmax(VF::set(kFarBelow), log_t);
              const VF d = ls - lt, ratio = mixture.log_ratio(d);
              kl_s = fma(vexp(log_s), ratio, kl_s);
              kl_t = fma(vexp(log_t), ratio - d, kl_t);
            }
            mixed_partial[slot * n + r + i] = {reduce_add(kl_s), reduce_add(kl_t)};
          }
        });
      },
      [&](int64_t r, int64_t blocks) {
        for (int64_t b = 0; b < blocks; ++b) {
          mixed[r].student += mixed_partial[b * n + r].student;
          mixed[r].teacher += mixed_partial[b * n + r].teacher;
        }
      });
  for (int64_t r = 0; r < n; ++r) {
    const double beta = p.beta;
    p.value[rows.index[r]] = static_cast<float>(beta * mixed[r].teacher + (1.0 - beta) * mixed[r].student);
    p.inner[rows.index[r]] = static_cast<float>(mixed[r].student);
  }
}

template <class T>
void run_kl_backward(const KlBackward& p) {
  Scratch scratch;
  const Rows rows = unmasked_rows(p.mask, p.N, scratch);
  const Head* const heads[2] = {&p.student, &p.teacher};
  const Mixture mixture(p.beta);
  head_gradient<T>(p.student, p.grad, rows.index, rows.n, p.N, p.V,
                   [&](int64_t r0, int64_t count, int64_t v, int64_t cols, T* dst, int64_t ld) {
                     logit_tiles<T, 2>(
                         heads, rows.index, r0, count, v, cols, [&](int64_t r, int64_t m, float* const(&z)[2]) {
                           for (int64_t q = 0; q < m; ++q) {
                             const int64_t i = rows.index[r + q];
                             const VF lse_s = VF::set(p.lse_student[i]), lse_t = VF::set(p.lse_teacher[i]);
                             const VF inner = VF::set(p.inner[i]), g = VF::set(p.dvalue[i]);
                             const VF share = g * VF::set(1.0f - p.beta);
                             for (int64_t j = 0; j < cols; j += kLanes) {
                               const VF x = load_upto(z[0] + q * kVocabBlock + j, cols - j);
                               const VF log_s = vmax(VF::set(kFarBelow), x - lse_s);
                               const VF far_t = load_upto(z[1] + q * kVocabBlock + j, cols - j) - lse_t;
                               const VF log_t = vmax(VF::set(kFarBelow), far_t);
                               const VF d = log_s - log_t, ps = vexp(log_s);
                               VF dz;
                               if (p.divergence == Divergence::kForward) {
                                 const VM less = d < VF::zero();
                                 dz = g * select(less, vexp(log_t), -ps) * vexpm1_neg(select(less, d, -d));
                               } else if (p.divergence == Divergence::kReverse) {
                                 // Where the student has mass the teacher may have next to none, and the divergence
                                 // says how little.
                                 dz = g * ps * ((log_s - far_t) - inner);
                               } else {
                                 dz = share * ps * (mixture.log_ratio(d) - inner);
                               }
                               store_upto(through_cap(p.student, x, dz), dst + (r - r0 + q) * ld + j, cols - j);
                             }
                           }
                         });
                   });
}

}  // namespace

void kl(const Kl& p) { p.student.type == DType::kF32 ? run_kl<float>(p) : run_kl<bf16>(p); }

void kl_backward(const KlBackward& p) {
  p.student.type == DType::kF32 ? run_kl_backward<float>(p) : run_kl_backward<bf16>(p);
}

}  // namespace foldscan::FOLDSCAN_ISA::losses
