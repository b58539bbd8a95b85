// Losses over a vocabulary, fused with the projection onto it: the logits z = cap(x W^T + b) / temperature are made in
// tiles, used and forgotten.
#pragma once

#include "core/types.h"

namespace foldscan::losses {

// One model's last layer.
struct Head {
  const void* hidden;  // (N, H), dense rows
  const void* weight;  // (V, H), dense rows; ignored in forward when packed is given
  const void* packed;  // from linear::pack, or null
  const float* bias;   // (V) or null
  int64_t H, hidden_stride, weight_stride;
  DType type, weight_type;
  float inv_temperature;
  float softcap;  // 0 for none
};

// Per row: logp of the target, lse, entropy, variance of -log p, sum of z. Rows whose target is ignored are not
// computed and give zeros.
struct Stats {
  Head head;
  const int64_t* targets;                           // (N), in [0, V) or ignore_index
  float *logp, *lse, *entropy, *varentropy, *zsum;  // (N)
  int64_t N, V, ignore_index;
  bool moments;  // entropy and varentropy are wanted (else zeros)
};

// Where gradients with respect to a head go; each of the outputs may be null.
struct HeadGradient {
  void* dhidden;   // (N, H) contiguous, hidden's type
  void* dweight;   // (V, H) contiguous, weight's type
  float* dbias;    // (V)
  void* dlogits;   // workspace, N * wave_stride(...) of hidden's type
  float* dh;       // workspace, (N, H)
  void* x_packed;  // workspace, linear::PackedBytes(H, N) of hidden's type
};

struct StatsBackward {
  Head head;
  HeadGradient grad;
  const int64_t* targets;
  const float *logp, *lse, *entropy, *varentropy;              // from forward
  const float *dlogp, *dlse, *dentropy, *dvarentropy, *dzsum;  // (N)
  int64_t N, V, ignore_index;
};

enum class Divergence : int32_t { kForward = 0, kReverse = 1, kJensenShannon = 2 };

struct Kl {
  Head student, teacher;
  const uint8_t* mask;  // (N) or null; rows with 0 are not computed and give zeros
  float* value;         // (N)
  float *lse_student, *lse_teacher;
  float* inner;  // (N): what backward subtracts: KL(S||T), or KL(S||mixture) for Jensen-Shannon
  int64_t N, V;
  Divergence divergence;
  float beta;  // weight of the teacher in the mixture, in (0, 1)
};

struct KlBackward {
  Head student, teacher;
  HeadGradient grad;  // of the student
  const uint8_t* mask;
  const float *dvalue, *lse_student, *lse_teacher, *inner;
  int64_t N, V;
  Divergence divergence;
  float beta;
};

// Columns of logit gradients that exist at a time: whole groups, 16 MB of them but at least one group.
constexpr int64_t kVocabGroup = 512;
FOLDSCAN_INLINE int64_t wave_columns(int64_t N, int64_t V, DType type) {
  const int64_t fit = (int64_t{16} << 20) / (imax(N, 1) * element_size(type)) / kVocabGroup;
  return imin(round_up(V, kVocabGroup), imax(fit, 1) * kVocabGroup);
}
// Row length of that buffer; the odd number of cache lines keeps rows from meeting in one cache set.
FOLDSCAN_INLINE int64_t wave_stride(int64_t N, int64_t V, DType type) { return wave_columns(N, V, type) + 32; }

namespace cpu {
void stats(const Stats& p);
void stats_backward(const StatsBackward& p);
void kl(const Kl& p);
void kl_backward(const KlBackward& p);
}  // namespace cpu

}  // namespace foldscan::losses
