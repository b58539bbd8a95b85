// Gradients of a head from the gradients of its logits: the backward half that all vocabulary losses share.
//
// The vocabulary is walked in waves of a few thousand columns. For each wave:
//   1. fill() recomputes its logits and writes the gradients of the logits (fp32, or bf16 as operands for bf16 input);
//   2. dhidden += dlogits W: chains over groups of kVocabGroup columns, added in the order of the groups in fp32;
//   3. dweight rows of the wave = dlogits^T hidden: chains over groups of kRowGroup rows, added in the order of the
//   groups.
// Tasks own what they write: no atomics, no result that depends on the number of threads; a row of dhidden does not
// depend on the other rows, nor on the width of a wave.
//
// FLOPs: 6 n H V with the recomputation. Memory beyond the results: 16 MB of logit gradients (one group of columns, if
// that is more), and (n, H) twice.
#pragma once

#include "losses/cpu/vocab.h"

namespace foldscan::FOLDSCAN_ISA::losses {

using foldscan::losses::HeadGradient;
using foldscan::losses::kVocabGroup;

constexpr int64_t kGradCols = kNR >= 128 ? kNR : 128;  // columns of H in a task of steps 2 and 3
// Long chains lose digits: their rounding errors grow with the length.
constexpr int64_t kRowGroup = 512;
static_assert(kMC % kLanes == 0);

constexpr int64_t kRowsAhead = 16;  // short pieces of rows, too far apart for the hardware to foresee

// Rows of dlogits or hidden as a panel of kWidth columns (kNR: the layout of pack_b_rows); row(k) points to the first
// of `width` elements.
template <class T, int64_t kWidth, class Row>
void pack_panel(const Row& row, int64_t K, int64_t width, T* d) {
  const auto ahead = [&](int64_t k) FOLDSCAN_LAMBDA {
    if (k < K) fetch_ahead(row(k), width * static_cast<int64_t>(sizeof(T)));
  };
  if constexpr (sizeof(T) == 4) {
    for (int64_t k = 0; k < K; ++k, d += kWidth) {
      ahead(k + kRowsAhead);
      copy_row(row(k), width, d, kWidth);
    }
  } else {
    for (int64_t k = 0; k < K; k += 2, d += 2 * kWidth) {
      ahead(k + kRowsAhead);
      ahead(k + kRowsAhead + 1);
      const T* p = row(k);
      const T* q = k + 1 < K ? row(k + 1) : nullptr;
      int64_t i = 0;
      for (; q && i + 2 * kLanes <= width; i += 2 * kLanes) {
        VP low, high;
        VP::zip(p + i, q + i, low, high);
        low.store(d + 2 * i);
        high.store(d + 2 * i + 2 * kLanes);
      }
      for (; i < kWidth; i += kLanes) {
        const int w = static_cast<int>(imax(0, imin(kLanes, width - i)));
        const int64_t at = w ? i : 0;
        VP::interleave(p + at, q ? q + at : nullptr, w).store(d + 2 * i);
      }
    }
  }
}

// dh (n, H) += dlogits (n, cols) W[v .. v + cols), group by group. For bf16 an odd number of columns is followed by a
// column of zeros in dlogits.
template <class T>
void accumulate_dhidden(const Head& head, int64_t n, int64_t v, int64_t cols, const T* dlogits, int64_t ld, float* dh) {
  const int64_t H = head.H, blocks = ceil_div(H, kGradCols);
  const int64_t chunk = task_rows(n, blocks), chunks = ceil_div(n, chunk);
  parallel_for(chunks * blocks, 1, [&](int64_t task) {
    const int64_t r0 = task / blocks * chunk, count = imin(chunk, n - r0);
    const int64_t h = task % blocks * kGradCols, width = imin(kGradCols, H - h);
    Scratch scratch;
    T* panels = scratch.get<T>(b_packed_size<T>(kVocabGroup, kGradCols));
    for (int64_t g = 0; g < cols; g += kVocabGroup) {
      const int64_t K = imin(kVocabGroup, cols - g);
      pack_weight(head, (v + g) * head.weight_stride + h, head.weight_stride, 1, K, width, panels);
      for (int64_t r = r0; r < r0 + count; r += kMC)
        gemm_run<T>(imin(kMC, r0 + count - r), width, K, dlogits + r * ld + g, ld, kK<T>, panels, b_panel_size<T>(K),
                    dh + r * H + h, H, Into::kAdd, panels);
    }
  });
}

// dweight[v .. v + cols) = dlogits^T hidden, and dbias.
template <class T>
void store_dweight(const Head& head, const HeadGradient& grad, int64_t n, int64_t v, int64_t cols, const T* dlogits,
                   int64_t ld) {
  const int64_t H = head.H, panel = b_panel_size<T>(n);
  const T* x = static_cast<const T*>(grad.x_packed);
  parallel_for(ceil_div(cols, kMC), 1, [&](int64_t task) {
    const int64_t p = task * kMC, rows = imin(kMC, cols - p);
    if (grad.dbias) {
      for (int64_t j = 0; j < rows; j += kLanes) {
        VF sum = VF::zero();
        for (int64_t r = 0; r < n; ++r) sum = sum + load_upto(dlogits + r * ld + p + j, rows - j);
        store_upto(sum, grad.dbias + v + p + j, rows - j);
      }
    }
    if (!grad.dweight) return;
    Scratch scratch;
    T* a = scratch.get<T>(round_up(n, kK<T>) * kMC);
    float* sum = scratch.get<float>(kMC * kGradCols);
    pack_panel<T, kMC>([&](int64_t r) { return dlogits + r * ld + p; }, n, rows, a);
    for (int64_t h = 0; h < H; h += kGradCols) {
      const int64_t width = imin(kGradCols, H - h);
      for (int64_t g = 0; g < n; g += kRowGroup) {
        const T* b = x + h / kNR * panel + g * kNR;
        gemm_run<T>(rows, width, imin(kRowGroup, n - g), a + g * kMC, kK<T>, kMC * kK<T>, b, panel, sum, kGradCols,
                    g > 0 ? Into::kAdd : Into::kSet, b + kRowGroup * kNR);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = (v + p + i) * H + h;
        if (head.weight_type == DType::kF32) {
          copy_row(sum + i * kGradCols, width, static_cast<float*>(grad.dweight) + at, width);
        } else {
          copy_row(sum + i * kGradCols, width, static_cast<bf16*>(grad.dweight) + at, width);
        }
      }
    }
  });
}

template <class T>
void zero(T* p, int64_t rows, int64_t n) {
  parallel_for(rows, grain_for(n), [&](int64_t r) {
    for (int64_t i = 0; i < n; i += kLanes) store_upto(VF::zero(), p + r * n + i, n - i);
  });
}

// fill(r0, count, v, cols, dst, ld): gradients of the logits of compact rows r0 .. r0 + count in columns v .. v + cols.
template <class T, class Fill>
void head_gradient(const Head& head, const HeadGradient& grad, const int64_t* rows, int64_t n, int64_t N, int64_t V,
                   const Fill& fill) {
  const int64_t H = head.H;
  T* dhidden = static_cast<T*>(grad.dhidden);
  if (dhidden) {
    zero(dhidden, N, H);
    zero(grad.dh, n, H);
  }
  if (n == 0) {
    if (grad.dweight && head.weight_type == DType::kF32) zero(static_cast<float*>(grad.dweight), V, H);
    if (grad.dweight && head.weight_type == DType::kBF16) zero(static_cast<bf16*>(grad.dweight), V, H);
    if (grad.dbias) zero(grad.dbias, 1, V);
    return;
  }
  if (grad.dweight) {
    const T* hidden = static_cast<const T*>(head.hidden);
    T* x = static_cast<T*>(grad.x_packed);
    parallel_for(ceil_div(H, kNR), grain_for(n * kNR / 4), [&](int64_t j) {
      pack_panel<T, kNR>([&](int64_t r) { return hidden + rows[r] * head.hidden_stride + j * kNR; }, n,
                         imin(kNR, H - j * kNR), x + j * b_panel_size<T>(n));
    });
  }
  const int64_t wave = foldscan::losses::wave_columns(N, V, head.type);
  const int64_t ld = foldscan::losses::wave_stride(N, V, head.type);
  T* dlogits = static_cast<T*>(grad.dlogits);
  for (int64_t v = 0; v < V; v += wave) {
    const int64_t cols = imin(wave, V - v), blocks = ceil_div(cols, kVocabBlock);
    const int64_t chunk = task_rows(n, blocks), chunks = ceil_div(n, chunk);
    parallel_for(blocks * chunks, 1, [&](int64_t task) {
      const int64_t c = task / chunks * kVocabBlock, r = task % chunks * chunk;
      const int64_t count = imin(chunk, n - r), width = imin(kVocabBlock, cols - c);
      T* to = dlogits + r * ld + c;
      fill(r, count, v + c, width, to, ld);
      if (width % 2 == 1)
        for (int64_t i = 0; i < count; ++i) to[i * ld + width] = from_float<T>(0.0f);
    });
    if (dhidden) accumulate_dhidden<T>(head, n, v, cols, dlogits, ld, grad.dh);
    if (grad.dweight || grad.dbias) store_dweight<T>(head, grad, n, v, cols, dlogits, ld);
  }
  if (dhidden)
    parallel_for(n, grain_for(H), [&](int64_t r) { copy_row(grad.dh + r * H, H, dhidden + rows[r] * H, H); });
}

}  // namespace foldscan::FOLDSCAN_ISA::losses
