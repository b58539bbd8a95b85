// One chunk of the SSD scan for one head: the arithmetic that training, prefill and decoding share, so that they agree
// bit for bit.
//
//   delta_t = clamp(softplus(dt_t + bias)),  e_t = exp(delta_t A)
//   w[l][s] = e_{s+1} e_{s+2} .. e_l (multiplied in that order; 1 for s = l, 0 for s > l),  p_l = e_1 .. e_l
//   y_l    = sum_n (p_l C_l[n]) S[n]  +  sum_{s <= l} (C_l . B_s) w[l][s] delta_s x_s      one chain of fma per channel
//   S_next = w_last S + sum_s B_s (w[last][s] delta_s x_s)                                 one chain of fma per element
//
// The decay matrix is a product recursion over rows: a chunk costs Q exponentials instead of Q^2 / 2, and its relative
// error stays below Q ulp. Tokens beyond the current one never enter a row, so row l of a partial chunk, of a full
// chunk and of a chunk that is fed token by token is the same sequence of operations. The state is held transposed, (N,
// P) with P padded, because channels are the vector dimension of both products. Source: Dao & Gu, "Transformers are
// SSMs" (arXiv:2405.21060), section 6; row-recursive decay is ours.
#pragma once

#include "core/matmul.h"
#include "core/vmath.h"
#include "ssm/ssm.h"

namespace foldscan::FOLDSCAN_ISA::ssm {

using namespace foldscan::ssm;

constexpr int64_t kVecs = kChunk / kLanes;
constexpr float kTiny = 1e-30f;  // decays below are cut to zero: denormals are slow and mean nothing here

// Rows of a block of a causal product, each block as wide as its last row needs: about 24, whole register tiles.
template <class T>
constexpr int64_t kCausalRows = (4 * kMR + kTileMR<T> - 1) / kTileMR<T> * kTileMR<T>;

// A block of rows that a GEMM can read as A: row-major, pairs complete.
template <class T>
struct Rows {
  const T* p;
  int64_t ld;
};

// Uses the rows where they are unless an odd width would leave a bf16 pair half outside.
template <class T>
FOLDSCAN_INLINE Rows<T> as_rows(const T* src, int64_t stride, int64_t rows, int64_t width, Scratch& scratch) {
  if (width % kK<T> == 0) return {src, stride};
  const int64_t ld = round_up(width, kK<T>);
  T* dst = scratch.get<T>(rows * ld);
  for (int64_t i = 0; i < rows; ++i) copy_row(src + i * stride, width, dst + i * ld, ld);
  return {dst, ld};
}

// delta of q tokens of head h; dt points at the first token, tokens are dt_stride apart. Lanes beyond q are zero.
FOLDSCAN_INLINE void load_delta(const ScanInputs& in, const float* dt, int64_t dt_stride, int64_t h, int64_t q,
                                float* delta) {
  float raw[kChunk];
  const float bias = in.dt_bias ? in.dt_bias[h] : 0.0f;
  for (int64_t i = 0; i < kChunk; ++i) raw[i] = i < q ? dt[i * dt_stride + h] + bias : 0.0f;
  for (int64_t i = 0; i < kChunk; i += kLanes) {
    VF d = VF::load(raw + i);
    if (in.softplus) d = vsoftplus(d);
    d = vmin(VF::set(in.dt_max), vmax(VF::set(in.dt_min), d));
    select(VF::iota() < VF::set(static_cast<float>(q - i)), d, VF::zero()).store(delta + i);
  }
}

// Rows of a head that will be read or written soon. They are some KB apart, too far for the hardware to guess, and too
// many to be asked for at once: a few go with every register tile of a product.
template <class T>
struct Upcoming {
  const T* p;
  int64_t stride, P, rows;
  template <bool kWrite = false>
  FOLDSCAN_INLINE void fetch(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < imin(end, rows); ++i)
      for (int64_t c = 0; c < P; c += 64 / static_cast<int64_t>(sizeof(T)))
        __builtin_prefetch(p + i * stride + c, kWrite, 2);
  }
};

// gemm_block that sets C, with tile(m) called before the register tiles of the rows from m on.
template <class T, class Fn>
FOLDSCAN_INLINE void gemm_tiles(int64_t M, int64_t N, int64_t K, const T* a, int64_t lda, const T* b, int64_t ldb,
                                int64_t panel, float* c, int64_t ldc, bool accumulate, const Fn& tile) {
  for (int64_t m = 0; m < M; m += kTileMR<T>) {
    tile(m);
    gemm_block<T>(imin(kTileMR<T>, M - m), N, K, a + m * lda, lda, kK<T>, b, ldb, panel, c + m * ldc, ldc, accumulate);
  }
}

struct Decay {
  alignas(64) float delta[kChunk];
  alignas(64) float step[kChunk];        // e_t
  alignas(64) float from_start[kChunk];  // p_t
  alignas(64) float to_end[kChunk];      // w[q-1][s] delta_s
  float total;                           // p_{q-1}
};

// Fills d from d.delta, and rows [r0, q) of w (stride kChunk).
FOLDSCAN_INLINE void fill_decay(float A, int64_t r0, int64_t q, Decay& d, float* w) {
  for (int64_t i = 0; i < kChunk; i += kLanes) vexp(VF::load(d.delta + i) * VF::set(A)).store(d.step + i);
  VF row[kVecs];
  for (auto& r : row) r = VF::zero();
  const VF tiny = VF::set(kTiny), one = VF::set(1.0f);
  float p = 1.0f;
  for (int64_t l = 0; l < q; ++l) {
    const VF e = VF::set(d.step[l]);
    p *= d.step[l];
    if (p < kTiny) p = 0.0f;
    d.from_start[l] = p;
    const VF at = VF::set(static_cast<float>(l));
    for (int64_t v = 0; v < kVecs; ++v) {
      const VF next = row[v] * e;
      const VF lane = VF::iota() + VF::set(static_cast<float>(v * kLanes));
      row[v] = select(lane == at, one, select(next < tiny, VF::zero(), next));
      if (l >= r0) row[v].store(w + l * kChunk + v * kLanes);
    }
  }
  d.total = p;
  for (int64_t v = 0; v < kVecs; ++v) (row[v] * VF::load(d.delta + v * kLanes)).store(d.to_end + v * kLanes);
}

// The same for the backward pass, which wants the columns: wt[s][l] = w[l][s] for l < kChunk, zero beyond q, from
// the vector of the diagonal on. Rows by recursion over s, from the last.
FOLDSCAN_INLINE void fill_decay_columns(float A, int64_t q, Decay& d, float* wt) {
  for (int64_t i = 0; i < kChunk; i += kLanes) vexp(VF::load(d.delta + i) * VF::set(A)).store(d.step + i);
  float p = 1.0f;
  for (int64_t l = 0; l < q; ++l) {
    p *= d.step[l];
    if (p < kTiny) p = 0.0f;
    d.from_start[l] = p;
  }
  d.total = p;
  VF row[kVecs];
  for (auto& r : row) r = VF::zero();
  const VF tiny = VF::set(kTiny), one = VF::set(1.0f);
  for (int64_t s = q - 1; s >= 0; --s) {
    const VF e = VF::set(s + 1 < q ? d.step[s + 1] : 0.0f), at = VF::set(static_cast<float>(s));
    for (int64_t v = s / kLanes; v < kVecs; ++v) {
      const VF next = row[v] * e;
      const VF lane = VF::iota() + VF::set(static_cast<float>(v * kLanes));
      row[v] = select(lane == at, one, select(next < tiny, VF::zero(), next));
      row[v].store(wt + s * kChunk + v * kLanes);
    }
    d.to_end[s] = wt[s * kChunk + q - 1] * d.delta[s];
  }
}

// What all heads of a group share in a chunk.
template <class T>
struct GroupChunk {
  float* cb;     // C_l . B_s for rows [r0, q), stride kChunk
  T* b_columns;  // B^T: (N, kChunk), zero beyond q; null where no state is asked for
};

// B: q rows; C: rows r0.. q (C.p points at row r0). with_state: chunk_state will be called.
template <class T>
FOLDSCAN_INLINE GroupChunk<T> group_chunk(Rows<T> B, Rows<T> C, int64_t r0, int64_t q, int64_t N, bool with_state,
                                          Scratch& scratch) {
  GroupChunk<T> g{scratch.get<float>(kChunk * kChunk), with_state ? scratch.get<T>(N * kChunk) : nullptr};
  if (with_state) {
    transpose_copy(B.p, B.ld, q, N, g.b_columns, kChunk);
    for (int64_t n = 0; n < N; ++n)
      for (int64_t s = q; s < kChunk; ++s) g.b_columns[n * kChunk + s] = from_float<T>(0.0f);
  }
  T* packed = scratch.get<T>(b_packed_size<T>(N, kChunk));
  pack_b_cols(B.p, B.ld, N, q, packed);
  for (int64_t l = r0; l < q; l += kCausalRows<T>) {
    const int64_t rows = imin(kCausalRows<T>, q - l);
    gemm_block<T>(rows, l + rows, N, C.p + (l - r0) * C.ld, C.ld, kK<T>, packed, kNR * kK<T>, b_panel_size<T>(N),
                  g.cb + l * kChunk, kChunk, false);
  }
  return g;
}

// K rows of N as the B operand of a product: fp32 as they lie (readable up to a multiple of kLanes), bf16 packed.
template <class T>
struct RowsOperand {
  const T* p;
  int64_t ldb, panel;
  FOLDSCAN_INLINE const T* from(int64_t k) const { return p + k / kK<T> * ldb; }
};
template <class T, class S>
FOLDSCAN_INLINE RowsOperand<T> rows_operand(const S* rows, int64_t ld, int64_t K, int64_t N, Scratch& scratch) {
  if constexpr (sizeof(T) == 4) {
    return {rows, ld, kNR};
  } else {
    bf16* packed = scratch.get<bf16>(b_packed_size<bf16>(K, N));
    pack_b_rows(rows, ld, K, N, packed);
    return {packed, 2 * kNR, b_panel_size<bf16>(K)};
  }
}

// The last row of a chunk of q: the chains of chunk_output's two products, with the state and the rows of x read where
// they lie. For one row, packing them would take longer than multiplying.
FOLDSCAN_INLINE void output_row(const bf16* decayed_c, const bf16* scores, const float* state, int64_t ld_state,
                                const bf16* x, int64_t x_stride, int64_t q, int64_t N, int64_t P, float* y) {
  using X = Tile<bf16>;
  for (int64_t i = 0; i < P; i += kNR) {
    const int64_t vectors = ceil_div(imin(kNR, P - i), kLanes);
    VF sum[kNV];
    for (auto& s : sum) s = VF::zero();
    for (int64_t n = 0; n < N; n += 2) {
      const float* low = state + n * ld_state + i;
      for (int64_t v = 0; v < vectors; ++v, low += kLanes) {
        const VF high = n + 1 < N ? VF::load(low + ld_state) : VF::zero();
        sum[v] = X::mul_add(X::broadcast(decayed_c + n), VP::zip(VF::load(low), high), sum[v]);
      }
    }
    for (int64_t s = 0; s < q; s += 2) {
      const bf16* row = x + s * x_stride + i;
      for (int64_t v = 0; v < vectors; ++v, row += kLanes) {
        const int width = static_cast<int>(imin(kLanes, P - i - v * kLanes));
        const VP pair = VP::interleave(row, s + 1 < q ? row + x_stride : nullptr, width);
        sum[v] = X::mul_add(X::broadcast(scores + s), pair, sum[v]);
      }
    }
    for (int64_t v = 0; v < vectors; ++v) sum[v].store(y + i + v * kLanes);
  }
}

// y (rows r0.. q, stride ld_y) before the D term and the gate. x: q rows of P.
template <class T>
FOLDSCAN_INLINE void chunk_output(const GroupChunk<T>& g, Rows<T> C, const T* x, int64_t x_stride, const Decay& d,
                                  const float* w, const float* state, int64_t ld_state, int64_t r0, int64_t q,
                                  int64_t N, int64_t P, float* y, int64_t ld_y, const Upcoming<T>& out) {
  Scratch scratch;
  const int64_t rows = q - r0, ld_c = round_up(N, kK<T>);
  T* decayed_c = scratch.get<T>(rows * ld_c);
  for (int64_t i = 0; i < rows; ++i) {
    const VF p = VF::set(d.from_start[r0 + i]);
    for (int64_t n = 0; n < ld_c; n += kLanes)
      store_upto(load_upto(C.p + i * C.ld + n, N - n) * p, decayed_c + i * ld_c + n, ld_c - n);
  }
  T* scores = scratch.get<T>(rows * kChunk);
  for (int64_t l = r0; l < q; ++l)
    for (int64_t v = 0, end = imin(kChunk, l - (l - r0) % kCausalRows<T> + kCausalRows<T>); v < end; v += kLanes) {
      // Lanes beyond l of cb are not initialised: select, do not multiply by the zero decay.
      const VF wv = VF::load(w + l * kChunk + v);
      const VF cb = select(VF::zero() < wv, VF::load(g.cb + l * kChunk + v), VF::zero());
      (cb * wv * VF::load(d.delta + v)).store(scores + (l - r0) * kChunk + v);
    }
  if constexpr (sizeof(T) == 2 && kPairsAtOnce == 1)
    if (rows == 1) return output_row(decayed_c, scores, state, ld_state, x, x_stride, q, N, P, y);

  const auto s = rows_operand<T>(state, ld_state, N, P, scratch);
  gemm_tiles<T>(rows, P, N, decayed_c, ld_c, s.p, s.ldb, s.panel, y, ld_y, false,
                [&](int64_t m) FOLDSCAN_LAMBDA { out.template fetch<true>(m, m + kTileMR<T>); });
  T* packed_x = scratch.get<T>(b_packed_size<T>(q, P));
  pack_b_rows(x, x_stride, q, P, packed_x);
  for (int64_t l = r0; l < q; l += kCausalRows<T>) {
    const int64_t n = imin(kCausalRows<T>, q - l);
    gemm_block<T>(n, P, l + n, scores + (l - r0) * kChunk, kChunk, kK<T>, packed_x, kNR * kK<T>, b_panel_size<T>(q),
                  y + (l - r0) * ld_y, ld_y, true);
  }
}

// rows_operand of weights[k] x_k for q rows of P: in bf16 weighed, rounded and packed in one go.
template <class T>
FOLDSCAN_INLINE RowsOperand<T> weighted_operand(const T* x, int64_t x_stride, const float* weights, int64_t q,
                                                int64_t P, Scratch& scratch) {
  const auto row = [&](int64_t k, int64_t i) FOLDSCAN_LAMBDA {
    return k < q ? load_upto(x + k * x_stride + i, P - i) * VF::set(weights[k]) : VF::zero();
  };
  if constexpr (sizeof(T) == 4) {
    const int64_t ld = round_up(P, kLanes);
    float* rows = scratch.get<float>(q * ld);
    for (int64_t k = 0; k < q; ++k)
      for (int64_t i = 0; i < P; i += kLanes) row(k, i).store(rows + k * ld + i);
    return {rows, ld, kNR};
  } else {
    const int64_t panel = b_panel_size<bf16>(q);
    bf16* packed = scratch.get<bf16>(b_packed_size<bf16>(q, P));
    for (int64_t k = 0; k < q; k += 2)
      for (int64_t i = 0; i < P; i += kLanes)
        VP::zip(row(k, i), row(k + 1, i)).store(packed + i / kNR * panel + k * kNR + i % kNR * 2);
    return {packed, 2 * kNR, panel};
  }
}

// state (N, ld_state) += sum_s B_s (to_end_s x_s): what the chunk's q tokens leave.
template <class T>
FOLDSCAN_INLINE void add_tokens(const GroupChunk<T>& g, const T* x, int64_t x_stride, const Decay& d, int64_t q,
                                int64_t N, int64_t P, float* state, int64_t ld_state, const Upcoming<T>& next) {
  Scratch scratch;
  const auto tokens = weighted_operand<T>(x, x_stride, d.to_end, q, P, scratch);
  const int64_t rows = ceil_div(next.rows * kTileMR<T>, N);
  int64_t fetched = 0;
  gemm_tiles<T>(N, P, q, g.b_columns, kChunk, tokens.p, tokens.ldb, tokens.panel, state, ld_state, true,
                [&](int64_t) FOLDSCAN_LAMBDA {
                  next.fetch(fetched, fetched + rows);
                  fetched += rows;
                });
}

// state (N, ld_state) -> the state after the chunk's q tokens.
template <class T>
FOLDSCAN_INLINE void chunk_state(const GroupChunk<T>& g, const T* x, int64_t x_stride, const Decay& d, int64_t q,
                                 int64_t N, int64_t P, float* state, int64_t ld_state, const Upcoming<T>& next) {
  const VF total = VF::set(d.total);
  for (int64_t i = 0; i < N * ld_state; i += kLanes) (VF::load(state + i) * total).store(state + i);
  add_tokens(g, x, x_stride, d, q, N, P, state, ld_state, next);
}

// out = (y + D x) silu(z), rows of P; D is per channel or one value.
template <class T>
FOLDSCAN_INLINE void finish_row(const ScanInputs& in, int64_t h, const float* y, const T* x, const T* z, T* out) {
  for (int64_t i = 0; i < in.P; i += kLanes) {
    const int64_t n = in.P - i;
    VF v = load_upto(y + i, n);
    if (in.D) {
      const VF D = in.D_per_channel ? load_upto(in.D + h * in.P + i, n) : VF::set(in.D[h]);
      v = fma(D, load_upto(x + i, n), v);
    }
    if (z) v = v * vsilu(load_upto(z + i, n));
    store_upto(v, out + i, n);
  }
}

// (P, N) <-> padded (N, ld). The padding is zero: whole states are multiplied with each other in the backward pass.
FOLDSCAN_INLINE void load_state(const float* src, int64_t P, int64_t N, float* state, int64_t ld) {
  for (int64_t i = 0; (!src || ld != P) && i < N * ld; i += kLanes) VF::zero().store(state + i);
  if (src) transpose_copy(src, N, P, N, state, ld);
}
FOLDSCAN_INLINE void store_state(const float* state, int64_t ld, int64_t P, int64_t N, float* dst) {
  transpose_copy(state, ld, N, P, dst, N);
}

FOLDSCAN_INLINE int64_t state_ld(int64_t P) { return round_up(P, kStatePad); }

// Heads of a task: a divisor-free split of each group, small enough to give every thread work. Bits do not depend on
// it.
struct HeadBlocks {
  int64_t per_group, size;
  FOLDSCAN_INLINE HeadBlocks(int64_t heads_per_group, int64_t limit) {
    size = imax(1, imin(limit, heads_per_group));
    per_group = ceil_div(heads_per_group, size);
  }
};

}  // namespace foldscan::FOLDSCAN_ISA::ssm
