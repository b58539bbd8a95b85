// Statistics of channels in one pass, and selection of the best within groups.
//
// Bytes: x once. FLOPs: 10 an element. Numerics: all sums in fp64, of exactly converted values; the variance is taken
//   around the first token, so that a large common offset costs no digits.
// Determinism: a channel belongs to one task, which adds tokens in order: neither the threads nor the way a stream is
//   cut into updates (at sequence ends) changes a bit.
#include "core/parallel.h"
#include "core/simd.h"
#include "pruning/pruning.h"

namespace foldscan::FOLDSCAN_ISA::pruning {
namespace {

using namespace foldscan::pruning;

constexpr int64_t kChannels = 64;  // of a task

FOLDSCAN_INLINE double magnitude(double x) { return x < 0 ? -x : x; }

template <class T>
void update_channels(const ScoreUpdate& p, int64_t first, int64_t count) {
  double shift[kChannels], sum_abs[kChannels], sum_square[kChannels], shifted[kChannels], shifted_square[kChannels];
  double own_abs[kChannels], own_square[kChannels];
  const auto row = [&](Statistic s) { return p.state + s * p.channels + first; };
  const T* x = static_cast<const T*>(p.x) + first;
  const int64_t tokens = p.cu_seqlens[p.n];
  if (p.first && tokens > 0)
    for (int64_t c = 0; c < count; ++c) row(kShift)[c] = to_float(x[c]);
  for (int64_t c = 0; c < count; ++c) {
    shift[c] = row(kShift)[c];
    sum_abs[c] = row(kSumAbs)[c];
    sum_square[c] = row(kSumSquare)[c];
    shifted[c] = row(kSumShifted)[c];
    shifted_square[c] = row(kSumShiftedSquare)[c];
  }
  for (int64_t s = 0; s < p.n; ++s) {
    const int64_t length = p.cu_seqlens[s + 1] - p.cu_seqlens[s];
    if (length == 0) continue;
    for (int64_t c = 0; c < count; ++c) own_abs[c] = own_square[c] = 0.0;
    for (int64_t t = p.cu_seqlens[s]; t < p.cu_seqlens[s + 1]; ++t) {
      const T* xt = x + t * p.x_row;
      for (int64_t c = 0; c < count; ++c) {
        const double v = to_float(xt[c]), a = magnitude(v), d = v - shift[c];
        sum_abs[c] += a;
        own_abs[c] += a;
        sum_square[c] += v * v;
        own_square[c] += v * v;
        shifted[c] += d;
        shifted_square[c] += d * d;
      }
    }
    for (int64_t c = 0; c < count; ++c) {
      const double mean = own_abs[c] / static_cast<double>(length);
      row(kSequenceMeanAbs)[c] += mean;
      row(kSequenceMeanAbsSquare)[c] += mean * mean;
      row(kSequenceNorm)[c] += __builtin_sqrt(own_square[c]);
    }
  }
  for (int64_t c = 0; c < count; ++c) {
    row(kSumAbs)[c] = sum_abs[c];
    row(kSumSquare)[c] = sum_square[c];
    row(kSumShifted)[c] = shifted[c];
    row(kSumShiftedSquare)[c] = shifted_square[c];
  }
}

}  // namespace

void score_update(const ScoreUpdate& p) {
  parallel_for(ceil_div(p.channels, kChannels), grain_for(p.cu_seqlens[p.n] * kChannels), [&](int64_t i) {
    const int64_t first = i * kChannels, count = imin(kChannels, p.channels - first);
    if (p.type == DType::kF32) {
      update_channels<float>(p, first, count);
    } else {
      update_channels<bf16>(p, first, count);
    }
  });
}

// The rank of a score is the number of better ones in its group: n^2 / groups comparisons, no sort.
void group_topk(const GroupTopK& p) {
  Scratch scratch;
  int64_t* start = scratch.get<int64_t>(p.count + 1);
  int64_t* next = scratch.get<int64_t>(p.count);
  int64_t* index = scratch.get<int64_t>(p.n);
  double* sorted = scratch.get<double>(p.n);
  for (int64_t g = 0; g <= p.count; ++g) start[g] = 0;
  for (int64_t i = 0; i < p.n; ++i) ++start[p.groups[i] + 1];
  for (int64_t g = 0; g < p.count; ++g) {
    start[g + 1] += start[g];
    next[g] = start[g];
  }
  for (int64_t i = 0; i < p.n; ++i) {
    const int64_t at = next[p.groups[i]]++;
    index[at] = i;
    sorted[at] = p.scores[i];
  }
  parallel_for(p.n, grain_for(ceil_div(p.n, imax(1, p.count))), [&](int64_t at) {
    const int64_t group = p.groups[index[at]];
    const double own = sorted[at];
    int64_t better = 0;
    for (int64_t j = start[group]; j < at; ++j) better += sorted[j] >= own;
    for (int64_t j = at + 1; j < start[group + 1]; ++j) better += sorted[j] > own;
    p.mask[index[at]] = better < p.keep;
  });
}

}  // namespace foldscan::FOLDSCAN_ISA::pruning
