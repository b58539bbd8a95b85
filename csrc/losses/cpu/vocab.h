// Tiles of logits: the forward half that all vocabulary losses share.
//
// Rows are compacted first (ignored ones are never multiplied); a task is one block of kVocabBlock columns and up to
// kChunkRows rows, whose weights it packs into its own cache. Every logit is one chain over H, so that a row's logits
// do not depend on the other rows; sums over the vocabulary are formed per block and merged in the order of the blocks,
// which depend neither on the number of rows nor on the number of threads.
#pragma once

#include "core/matmul.h"
#include "core/vmath.h"
#include "losses/losses.h"

namespace foldscan::FOLDSCAN_ISA::losses {

using foldscan::losses::Head;

constexpr int64_t kVocabBlock = 512;
constexpr int64_t kChunkRows = 24 * kMC;
static_assert(kVocabBlock % kNR == 0 && foldscan::losses::kVocabGroup % kVocabBlock == 0);

// Rows of a task where each chunk of rows makes `others` tasks: many, for each task packs its weights, but so that
// every thread gets a few tasks.
inline int64_t task_rows(int64_t n, int64_t others) {
  const int64_t busy = imin(ceil_div(4 * num_threads(), imax(others, 1)), ceil_div(n, kMC));
  return round_up(ceil_div(imax(n, 1), imax(1, imax(busy, ceil_div(n, kChunkRows)))), kMC);
}

constexpr float kInfinity = __builtin_inff();
// Below this, exp is 0 and a finite factor keeps it so.
constexpr float kFarBelow = -200.0f;

// exp(x) - 1 for x <= 0.
FOLDSCAN_INLINE VF vexpm1_neg(VF x) {
  VF p = VF::set(1.0f / 40320);
  p = fma(p, x, VF::set(1.0f / 5040));
  p = fma(p, x, VF::set(1.0f / 720));
  p = fma(p, x, VF::set(1.0f / 120));
  p = fma(p, x, VF::set(1.0f / 24));
  p = fma(p, x, VF::set(1.0f / 6));
  p = fma(p, x, VF::set(0.5f));
  p = fma(p * x, x, x);
  return select(VF::set(-0.4f) < x, p, vexp_neg(x) - VF::set(1.0f));
}

// z = cap(acc + bias) / temperature, in place.
FOLDSCAN_INLINE void finish_logits(const Head& head, float* c, const float* bias, int64_t cols) {
  if (!bias && !(head.softcap > 0.0f) && head.inv_temperature == 1.0f) return;
  const VF inv_cap = VF::set(head.softcap > 0.0f ? 1.0f / head.softcap : 0.0f), cap = VF::set(head.softcap);
  const VF inv_t = VF::set(head.inv_temperature);
  for (int64_t j = 0; j < cols; j += kLanes) {
    VF z = load_upto(c + j, cols - j);
    if (bias) z = z + load_upto(bias + j, cols - j);
    if (head.softcap > 0.0f) z = cap * vtanh(z * inv_cap);
    store_upto(z * inv_t, c + j, cols - j);
  }
}

// From a gradient with respect to z to one with respect to acc.
template <class V>
FOLDSCAN_INLINE V through_cap(const Head& head, V z, V dz) {
  if (head.softcap > 0.0f) {
    const V t = z * V::set(1.0f / (head.softcap * head.inv_temperature));
    dz = dz * fnma(t, t, V::set(1.0f));
  }
  return dz * V::set(head.inv_temperature);
}

// C (rows x cols, row length ldc) = A B for packed panels b of K rows; A through load_a. a: kMC * (kKC + 2).
template <class T, class LoadA>
void block_product(int64_t r, int64_t rows, int64_t cols, int64_t K, const LoadA& load_a, const T* b, T* a, float* c,
                   int64_t ldc) {
  constexpr int64_t lda = kKC + 2;
  int64_t k = 0;
  do {
    const int64_t kc = imin(kKC, K - k);
    load_a(r, rows, k, kc, a, lda);
    gemm_run<T>(rows, cols, kc, a, lda, kK<T>, b + k * kNR, b_panel_size<T>(K), c, ldc,
                k > 0 ? Into::kContinue : Into::kSet, k + kc < K ? b + (k + kc) * kNR : b);
    k += kc;
  } while (k < K);
}

// Packs (k, n) -> weight[v + n][k] (columns of the vocabulary) or weight[v + k][n] (rows), of either weight type.
template <class T>
void pack_weight(const Head& head, int64_t at, int64_t k_stride, int64_t n_stride, int64_t K, int64_t N, T* dst) {
  if (head.weight_type == DType::kF32) {
    pack_b(static_cast<const float*>(head.weight) + at, k_stride, n_stride, K, N, dst);
  } else {
    if constexpr (sizeof(T) == 2) pack_b(static_cast<const bf16*>(head.weight) + at, k_stride, n_stride, K, N, dst);
  }
}

// body(r, m, z): z[i] points to m rows (row length kVocabBlock) of logits of heads[i], for compact rows r .. r + m.
template <class T, int NH, class Body>
void logit_tiles(const Head* const (&heads)[NH], const int64_t* rows, int64_t r0, int64_t count, int64_t v,
                 int64_t cols, const Body& body) {
  Scratch scratch;
  const T* panels[NH];
  float* z[NH];
  T* a = scratch.get<T>(kMC * (kKC + 2));
  for (int i = 0; i < NH; ++i) {
    const Head& h = *heads[i];
    z[i] = scratch.get<float>(kMC * kVocabBlock);
    if (h.packed) {
      panels[i] = static_cast<const T*>(h.packed) + v / kNR * b_panel_size<T>(h.H);
    } else {
      T* own = scratch.get<T>(b_packed_size<T>(h.H, cols));
      pack_weight(h, v * h.weight_stride, 1, h.weight_stride, h.H, cols, own);
      panels[i] = own;
    }
  }
  for (int64_t r = r0; r < r0 + count; r += kMC) {
    const int64_t m = imin(kMC, r0 + count - r);
    for (int i = 0; i < NH; ++i) {
      const Head& h = *heads[i];
      const T* hidden = static_cast<const T*>(h.hidden);
      const auto load_a = [&](int64_t first, int64_t n, int64_t k, int64_t kc, T* dst, int64_t ld) {
        for (int64_t q = 0; q < n; ++q)
          copy_row(hidden + rows[first + q] * h.hidden_stride + k, kc, dst + q * ld, round_up(kc, kK<T>));
      };
      block_product<T>(r, m, cols, h.H, load_a, panels[i], a, z[i], kVocabBlock);
      for (int64_t q = 0; q < m; ++q) finish_logits(h, z[i] + q * kVocabBlock, h.bias ? h.bias + v : nullptr, cols);
    }
    body(r, m, z);
  }
}

// Running maximum and sums relative to it. The maximum's own 1 is left out of `rest`, so that log(sum) = log1p(rest)
// keeps its digits when one class has nearly all the mass.
//   rest = sum e^(z - max) - 1,  first = sum e^(z - max) (z - max),  second = sum e^(z - max) (z - max)^2
struct Sums {
  double max, rest, first, second;
  static Sums none() { return {-static_cast<double>(kInfinity), 0.0, 0.0, 0.0}; }
  double total() const { return 1.0 + rest; }
  double lse() const { return max + __builtin_log1p(rest); }
  double mean() const { return first / total(); }  // of z - max under p
};

FOLDSCAN_INLINE void merge(Sums& s, const Sums& b) {
  if (b.max == -static_cast<double>(kInfinity)) return;
  if (s.max == -static_cast<double>(kInfinity)) {
    s = b;
    return;
  }
  const bool keep = !(b.max > s.max);
  const Sums& hi = keep ? s : b;
  const Sums& lo = keep ? b : s;
  const double d = lo.max - hi.max, e = __builtin_exp(d), l = lo.total();
  s = {hi.max, hi.rest + e * l, hi.first + e * (lo.first + d * l),
       hi.second + e * (lo.second + 2.0 * d * lo.first + d * d * l)};
}

FOLDSCAN_INLINE VF load_logits(const float* z, int64_t left) {
  const VF v = load_upto(z, left);
  return left < kLanes ? select(VM::first(static_cast<int>(left)), v, VF::set(-kInfinity)) : v;
}
template <class V>
FOLDSCAN_INLINE V load_logits_as(const float* z, int64_t left) {
  if constexpr (sizeof(V) == sizeof(VW)) {
    return VW::load(z);
  } else {
    return load_logits(z, left);
  }
}

FOLDSCAN_INLINE float block_max(const float* z, int64_t cols) {
  VW top = VW::set(-kInfinity);
  each_vector(cols, [&](auto tag, int64_t j, int64_t left) FOLDSCAN_LAMBDA {
    if constexpr (sizeof(tag) == sizeof(VW)) {
      top = vmax(top, VW::load(z + j));
    } else {
      top.v[0] = vmax(top.v[0], load_logits(z + j, left));
    }
  });
  return reduce_max(top);
}

// Maximum and rest of one block of a row; the moments too, if wanted.
FOLDSCAN_INLINE Sums block_sums(const float* z, int64_t cols, bool moments) {
  const float m = block_max(z, cols);
  if (m == -kInfinity) return Sums::none();
  VW rest = VW::zero(), equal = VW::zero(), first = VW::zero(), second = VW::zero();
  each_vector(cols, [&](auto tag, int64_t j, int64_t left) FOLDSCAN_LAMBDA {
    using V = decltype(tag);
    const V x = load_logits_as<V>(z + j, left), max = V::set(m), d = x - max;
    const V e = vexp_neg(d);
    const auto is_max = x == max;
    add_to(equal, select(is_max, V::set(1.0f), V::zero()));
    add_to(rest, select(is_max, V::zero(), e));
    if (moments) {
      const V bounded = vmax(V::set(kFarBelow), d), ed = e * bounded;
      add_to(first, ed);
      add_to(second, ed * bounded);
    }
  });
  return {m, static_cast<double>(reduce_add(rest)) + (static_cast<double>(reduce_add(equal)) - 1.0), reduce_add(first),
          reduce_add(second)};
}

// Runs block(v, cols, r0, count) over all tasks of a wave of blocks, then merge_row(r, first block, blocks), wave after
// wave. How many blocks make a wave is a matter of memory only, because rows merge blocks in order.
template <class Block, class Merge>
void for_waves(int64_t n, int64_t V, int64_t H, int64_t wave, const Block& block, const Merge& merge_row) {
  const int64_t blocks = ceil_div(V, kVocabBlock);
  for (int64_t b0 = 0; b0 < blocks; b0 += wave) {
    const int64_t nb = imin(wave, blocks - b0), rows = task_rows(n, nb), chunks = ceil_div(n, rows);
    parallel_for(nb * chunks, grain_for(kVocabBlock * H), [&](int64_t task) {
      const int64_t b = b0 + task / chunks, r = task % chunks * rows, v = b * kVocabBlock;
      block(v, imin(kVocabBlock, V - v), r, imin(rows, n - r), b - b0);
    });
    parallel_for(n, grain_for(nb * 64), [&](int64_t r) { merge_row(r, nb); });
  }
}

// Blocks of a wave: partial results of `bytes` a row and block, 2 MB of them, but enough tasks for every thread.
inline int64_t wave_blocks(int64_t n, int64_t V, int64_t bytes) {
  const int64_t fit = (int64_t{2} << 20) / imax(1, n * bytes);
  const int64_t busy = ceil_div(2 * num_threads(), imax(1, ceil_div(n, kChunkRows)));
  return imin(ceil_div(V, kVocabBlock), imax(fit, busy));
}

}  // namespace foldscan::FOLDSCAN_ISA::losses
