// Mamba-2 SSD, backward: chunks in reverse, from recomputed chunk states. Nothing is saved by the forward pass.
//
// Per chunk and head, with G = dL/dS_next, W[l][s] = w[l][s], and rows l >= s:
//   M[l][s]  = (dY_l . X_s) W delta_s          E = M * (C B^T)
//   br_s     = sum_l (C_l.B_s) W dY_l + to_end_s/delta_s G B_s          dX = delta_s br_s + D dY_s
//   dC_l    += sum_s M B_s + p_l S^T dY_l                               dB_s += sum_l M C_l + to_end_s G^T X_s
//   v_l      = p_l dY_l . (S C_l)         u_s = to_end_s X_s . (G B_s)
//   d(delta A)_k = sum_{s<k<=l} E + sum_{l>=k} v_l + sum_{s<k} u_s + p_last <G, S>      rectangle sums: no cancellation
//   ddelta_k = X_k . br_k + A d(delta A)_k     dA += delta_k d(delta A)_k
//   G_prev   = p_last G + sum_l p_l dY_l C_l^T
// The matrices over (l, s) are kept as [s][l] ("transposed"), which is how the products of dX and dB read them.
//
// FLOPs: T (HP (12 N + 5 Q/2) + 3 G' N Q), G' = head blocks. Extra memory: chunk states of a task's heads,
//   (L / 64) N P 4 bytes each, and fp32 partial sums of dB and dC for every block of up to eight heads.
// Numerics: fp32 sums; bf16 operands of products are rounded once. Determinism: dB and dC are summed over heads in
// order,
//   in blocks whose size is fixed; nothing depends on the threads.
// Source: adjoint of arXiv:2405.21060 section 6; verified against the sequential recurrence in fp64 by tests.
#include "ssm/cpu/scan_chunk.h"

namespace foldscan::FOLDSCAN_ISA::ssm {
namespace {

// Heads of a task. The sums over a group's heads are grouped by it, so it must not depend on the threads: at least four
// tasks a sequence, and enough heads to share the products of the group.
FOLDSCAN_INLINE int64_t block_heads(int64_t H) { return imin(8, ceil_div(H, 4)); }

// So many heads lie side by side in one product over (head, channel) for dB and dC: the sums are read and written once
// for all of them, and the operands still fit L2.
constexpr int64_t kSideBySide = 4;

// <a, b> over n elements, a multiple of kLanes; then a *= scale.
template <class S>
FOLDSCAN_INLINE float dot_then_scale(float* a, const S* b, int64_t n, float scale) {
  VF sum = VF::zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const VF v = VF::load(a + i);
    sum = fma(v, VF::load(b + i), sum);
    (v * VF::set(scale)).store(a + i);
  }
  return reduce_add(sum);
}

// Everything a task keeps between chunks, and scratch that lives for the task.
template <class T>
struct Task {
  const ScanBackward& p;
  Segment seg;
  int64_t g, h0, heads, ld;  // ld: padded P
  T* states;                 // (heads, chunks, N, ld): state at each chunk's start
  float* grad_state;         // (heads, N, ld): dL/dS flowing backwards
  float* dB_part;            // (T, N) fp32 of this block of heads
  float* dC_part;
  float* dA_sum;     // (heads)
  float* dbias_sum;  // (heads)
  float* dD_sum;     // (heads, ld)
};

// States at the start of every chunk, by the forward recursion in fp32.
template <class T>
void recompute_states(const Task<T>& k, int64_t chunks) {
  const ScanInputs& in = k.p.in;
  const int64_t P = in.P, N = in.N, size = N * k.ld;
  Scratch scratch;
  float* w = scratch.get<float>(kChunk * kChunk);
  Decay* d = scratch.get<Decay>(1);
  float* states = scratch.get<float>(k.heads * size);
  for (int64_t j = 0; j < k.heads; ++j)
    load_state(k.p.initial_states && k.seg.initial_row >= 0
                   ? k.p.initial_states + ((k.seg.initial_row * in.H + k.h0 + j) * P) * N
                   : nullptr,
               P, N, states + j * size, k.ld);
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t t = k.seg.begin + c * kChunk, q = imin(kChunk, k.seg.end - t);
    Scratch inner;
    GroupChunk<T> group{nullptr, inner.get<T>(N * kChunk)};
    if (c + 1 < chunks)
      transpose_copy(static_cast<const T*>(in.B) + t * in.B_stride + k.g * N, in.B_stride, kChunk, N, group.b_columns,
                     kChunk);
    for (int64_t j = 0; j < k.heads; ++j) {
      const int64_t h = k.h0 + j;
      float* state = states + j * size;
      load_delta(in, in.dt + t * in.H, in.H, h, q, d->delta);
      fill_decay(in.A[h], q, q, *d, w);
      T* kept = k.states + (j * chunks + c) * size;
      const VF total = VF::set(d->total);
      for (int64_t i = 0; i < size; i += kLanes) {
        const VF v = VF::load(state + i);
        v.store(kept + i);
        (v * total).store(state + i);
      }
      if (c + 1 < chunks)
        add_tokens(group, static_cast<const T*>(in.x) + t * in.x_stride + h * P, in.x_stride, *d, kChunk, N, P, state,
                   k.ld);
    }
  }
}

// dst[i] = weights[i] src[i] for rows of `width`, zero up to `padded`.
template <class T>
void scale_rows(const float* src, int64_t ld, int64_t rows, int64_t width, const float* weights, T* dst, int64_t ld_dst,
                int64_t padded) {
  for (int64_t i = 0; i < rows; ++i) {
    const VF weight = VF::set(weights[i]);
    for (int64_t c = 0; c < padded; c += kLanes)
      store_upto(load_upto(src + i * ld + c, width - c) * weight, dst + i * ld_dst + c, padded - c);
  }
}

// The operands of sum_heads rows_h^T state_h over (head, channel), for a few heads side by side.
template <class T>
struct SideBySide {
  T *rows, *states;
  int64_t ld, K, panel;
  SideBySide(int64_t q, int64_t heads, int64_t ld_p, int64_t N, Scratch& scratch)
      : ld(heads * ld_p), K(ld), panel(b_panel_size<T>(ld)) {
    rows = scratch.get<T>(q * ld);
    states = scratch.get<T>(b_packed_size<T>(ld, N));
  }
  // Place of a head.
  T* rows_of(int64_t place, int64_t ld_p) { return rows + place * ld_p; }
  T* states_of(int64_t place, int64_t ld_p) { return states + place * ld_p * kNR; }
  // c (q x N) (+)= the product of the first `places` heads.
  void product(int64_t q, int64_t N, int64_t places, int64_t ld_p, float* c, int64_t ldc, bool accumulate) const {
    gemm_block<T>(q, N, places * ld_p, rows, ld, kK<T>, states, kNR * kK<T>, panel, c, ldc, accumulate);
  }
};

// a (M x K rows) times packed b: a convenience for products that are not triangular.
template <class T>
void product(int64_t M, int64_t N, int64_t K, Rows<T> a, const T* packed, float* c, int64_t ldc, bool accumulate) {
  gemm_block<T>(M, N, K, a.p, a.ld, kK<T>, packed, kNR * kK<T>, b_panel_size<T>(K), c, ldc, accumulate);
}

// d(delta A)_k for k in [0, q): e is E^T ([s][l], zero for l < s), v and u as above, tail the state term.
void decay_gradient(const float* e, const float* v, const float* u, float tail, int64_t q, float* out) {
  VF prefix[kVecs];  // over l: sum_{s < k} E[l][s]
  for (auto& x : prefix) x = VF::zero();
  float suffix[kChunk + 1];
  suffix[q] = 0.0f;
  for (int64_t l = q - 1; l >= 0; --l) suffix[l] = suffix[l + 1] + v[l];
  float before = 0.0f;
  for (int64_t k = 0; k < q; ++k) {
    if (k > 0) {
      for (int64_t i = 0; i < kVecs; ++i) prefix[i] = prefix[i] + VF::load(e + (k - 1) * kChunk + i * kLanes);
      before += u[k - 1];
    }
    VF sum = VF::zero();
    for (int64_t i = 0; i < kVecs; ++i) {
      const VF lane = VF::iota() + VF::set(static_cast<float>(i * kLanes));
      sum = sum + select(lane < VF::set(static_cast<float>(k)), VF::zero(), prefix[i]);
    }
    out[k] = reduce_add(sum) + suffix[k] + before + tail;
  }
}

template <class T>
void run_chunk(const Task<T>& k, int64_t c, int64_t chunks) {
  const ScanBackward& p = k.p;
  const ScanInputs& in = p.in;
  const int64_t P = in.P, N = in.N, H = in.H, ld = k.ld, size = N * ld;
  const int64_t t = k.seg.begin + c * kChunk, q = imin(kChunk, k.seg.end - t);
  const int64_t ld_n = round_up(N, kStatePad);
  Scratch scratch;
  const auto B = as_rows(static_cast<const T*>(in.B) + t * in.B_stride + k.g * N, in.B_stride, q, N, scratch);
  const auto C = as_rows(static_cast<const T*>(in.C) + t * in.C_stride + k.g * N, in.C_stride, q, N, scratch);
  T* packed_b = scratch.get<T>(b_packed_size<T>(q, N));   // rows s, columns n
  T* packed_c = scratch.get<T>(b_packed_size<T>(q, N));   // rows l, columns n
  T* packed_ct = scratch.get<T>(b_packed_size<T>(N, q));  // rows n, columns l
  pack_b_rows(B.p, B.ld, q, N, packed_b);
  pack_b_rows(C.p, C.ld, q, N, packed_c);
  pack_b_cols(C.p, C.ld, N, q, packed_ct);
  T* c_columns = scratch.get<T>(N * kChunk);  // C^T
  transpose_copy(C.p, C.ld, q, N, c_columns, kChunk);
  if (q % kK<T> != 0)
    for (int64_t n = 0; n < N; ++n) c_columns[n * kChunk + q] = from_float<T>(0.0f);
  float* cbt = scratch.get<float>(kChunk * kChunk);  // [s][l] = C_l . B_s
  product(q, q, N, B, packed_ct, cbt, kChunk, false);
  float* m_sum = scratch.get<float>(kChunk * kChunk);  // sum of M^T over heads, [s][l]
  for (int64_t i = 0; i < kChunk * kChunk; i += kLanes) VF::zero().store(m_sum + i);
  float* db = scratch.get<float>(q * ld_n);
  float* dc = scratch.get<float>(q * ld_n);
  float* wt = scratch.get<float>(kChunk * kChunk);
  float* dxt = scratch.get<float>(kChunk * kChunk);  // [s][l] = dY_l . X_s, then E^T
  T* scores = scratch.get<T>(kChunk * kChunk);       // [s][l] = (C_l . B_s) w
  const int64_t side = imin(kSideBySide, k.heads);
  SideBySide<T> for_dc(q, side, ld, N, scratch), for_db(q, side, ld, N, scratch);
  float *x32 = scratch.get<float>(q * ld), *dy = scratch.get<float>(q * ld), *br = scratch.get<float>(q * ld);
  float *gb = scratch.get<float>(q * ld), *sc = scratch.get<float>(q * ld);
  Decay* d = scratch.get<Decay>(1);
  alignas(64) float end_weight[kChunk], v[kChunk], u[kChunk], grad_log[kChunk];

  for (int64_t j = 0; j < k.heads; ++j) {
    Scratch inner;
    const int64_t h = k.h0 + j;
    const T* state = k.states + (j * chunks + c) * size;
    float* grad_state = k.grad_state + j * size;
    load_delta(in, in.dt + t * H, H, h, q, d->delta);
    fill_decay_columns(in.A[h], q, *d, wt);
    for (int64_t s = 0; s < q; ++s) end_weight[s] = wt[s * kChunk + q - 1];

    // X and dY (through the gate) in fp32, zero in the padding of P.
    const T* x = static_cast<const T*>(in.x) + t * in.x_stride + h * P;
    const T* dout = static_cast<const T*>(p.dout) + (t * H + h) * P;
    const T* z = in.z ? static_cast<const T*>(in.z) + t * in.z_stride + h * P : nullptr;
    for (int64_t l = 0; l < q; ++l)
      for (int64_t i = 0; i < ld; i += kLanes) {
        load_upto(x + l * in.x_stride + i, P - i).store(x32 + l * ld + i);
        VF g = load_upto(dout + l * H * P + i, P - i);
        if (z) g = g * vsilu(load_upto(z + l * in.z_stride + i, P - i));
        g.store(dy + l * ld + i);
      }
    const auto x_rows = as_rows(x, in.x_stride, q, P, inner);
    Rows<T> dy_rows;
    if (z) {
      dy_rows = {inner.get<T>(q * ld), ld};
      for (int64_t l = 0; l < q; ++l) copy_row(dy + l * ld, ld, const_cast<T*>(dy_rows.p) + l * ld, ld);
    } else {
      dy_rows = as_rows(dout, H * P, q, P, inner);
    }
    const int64_t place = j % side;
    const Rows<T> dy_decayed{for_dc.rows_of(place, ld), for_dc.ld};
    scale_rows(dy, ld, q, P, d->from_start, for_dc.rows_of(place, ld), for_dc.ld, ld);
    T* packed_dyt = inner.get<T>(b_packed_size<T>(P, q));  // rows p, columns l
    pack_b_cols(dy_rows.p, dy_rows.ld, P, q, packed_dyt);
    RowsOperand<T> dy_op;  // rows l, columns p
    if constexpr (sizeof(T) == 4) {
      dy_op = rows_operand<T>(dy, ld, q, P, inner);
    } else {
      dy_op = rows_operand<T>(dy_rows.p, dy_rows.ld, q, P, inner);
    }

    product(q, q, P, x_rows, packed_dyt, dxt, kChunk, false);
    for (int64_t s = 0; s < q; ++s) {
      const VF delta = VF::set(d->delta[s]);
      for (int64_t l = 0; l < kChunk; l += kLanes) {
        const VF keep = VF::load(wt + s * kChunk + l);  // zero for l < s and beyond q
        const VM valid = VF::zero() < keep;             // elsewhere the products may not have been written
        const VF cb = select(valid, VF::load(cbt + s * kChunk + l), VF::zero());
        const VF gram = select(valid, VF::load(dxt + s * kChunk + l), VF::zero());
        const VF m = gram * keep * delta;
        (VF::load(m_sum + s * kChunk + l) + m).store(m_sum + s * kChunk + l);
        (cb * keep).store(scores + s * kChunk + l);
        (m * cb).store(dxt + s * kChunk + l);
      }
    }

    // br = scores dY + end_weight (B G^T);  S C for v.
    const auto g_op = rows_operand<T>(grad_state, ld, N, P, inner);
    gemm_block<T>(q, P, N, B.p, B.ld, kK<T>, g_op.p, g_op.ldb, g_op.panel, gb, ld, false);
    const auto s_op = rows_operand<T>(state, ld, N, P, inner);
    gemm_block<T>(q, P, N, C.p, C.ld, kK<T>, s_op.p, s_op.ldb, s_op.panel, sc, ld, false);
    for (int64_t s = 0; s < q; s += kCausalRows<T>)  // row s has nothing before l = s
      gemm_block<T>(imin(kCausalRows<T>, q - s), P, q - s, scores + s * kChunk + s, kChunk, kK<T>, dy_op.from(s),
                    dy_op.ldb, dy_op.panel, br + s * ld, ld, false);

    T* dx = static_cast<T*>(p.dx) + (t * H + h) * P;
    alignas(64) float direct[kChunk];
    for (int64_t s = 0; s < q; ++s) {
      const VF end = VF::set(end_weight[s]), delta = VF::set(d->delta[s]);
      VF sum_direct = VF::zero(), sum_u = VF::zero(), sum_v = VF::zero();
      for (int64_t i = 0; i < P; i += kLanes) {
        const int64_t n = P - i;
        const VF gbv = load_upto(gb + s * ld + i, n), xv = load_upto(x32 + s * ld + i, n);
        const VF dyv = load_upto(dy + s * ld + i, n);
        const VF b = fma(end, gbv, load_upto(br + s * ld + i, n));
        sum_direct = fma(xv, b, sum_direct);
        sum_u = fma(xv, gbv, sum_u);
        sum_v = fma(dyv, load_upto(sc + s * ld + i, n), sum_v);
        VF g = delta * b;
        if (in.D) {
          const VF D = in.D_per_channel ? load_upto(in.D + h * P + i, n) : VF::set(in.D[h]);
          g = fma(D, dyv, g);
          float* dD = k.dD_sum + j * ld + i;
          fma(dyv, xv, VF::load(dD)).store(dD);
        }
        store_upto(g, dx + s * H * P + i, n);
      }
      direct[s] = reduce_add(sum_direct);
      u[s] = d->to_end[s] * reduce_add(sum_u);
      v[s] = d->from_start[s] * reduce_add(sum_v);
    }

    // dz needs the output before the gate: y = p S C + tril(C B^T w delta) X + D x.
    if (z) {
      T* forward = inner.get<T>(kChunk * kChunk);
      for (int64_t l = 0; l < q; ++l)
        for (int64_t s = 0; s < kChunk; ++s) {
          const bool on = s <= l;
          forward[l * kChunk + s] = from_float<T>(on ? cbt[s * kChunk + l] * wt[s * kChunk + l] * d->delta[s] : 0.0f);
        }
      T* packed_x = inner.get<T>(b_packed_size<T>(q, P));
      pack_b_rows(x, in.x_stride, q, P, packed_x);
      float* y = inner.get<float>(q * ld);
      product(q, P, q, Rows<T>{forward, kChunk}, packed_x, y, ld, false);
      T* dz = static_cast<T*>(p.dz) + (t * H + h) * P;
      for (int64_t l = 0; l < q; ++l)
        for (int64_t i = 0; i < P; i += kLanes) {
          const int64_t n = P - i;
          VF yv = fma(VF::set(d->from_start[l]), load_upto(sc + l * ld + i, n), load_upto(y + l * ld + i, n));
          if (in.D) {
            const VF D = in.D_per_channel ? load_upto(in.D + h * P + i, n) : VF::set(in.D[h]);
            yv = fma(D, load_upto(x32 + l * ld + i, n), yv);
          }
          const VF g = load_upto(dout + l * H * P + i, n) * vsilu_grad(load_upto(z + l * in.z_stride + i, n));
          store_upto(g * yv, dz + l * H * P + i, n);
        }
    }

    // The time step and the decay.
    pack_b_cols(grad_state, ld, ld, N, for_db.states_of(place, ld), for_db.panel);
    const float tail = d->total * dot_then_scale(grad_state, state, size, d->total);
    decay_gradient(dxt, v, u, tail, q, grad_log);
    alignas(64) float raw[kChunk] = {}, ddt[kChunk];
    for (int64_t s = 0; s < q; ++s) raw[s] = in.dt[(t + s) * H + h] + (in.dt_bias ? in.dt_bias[h] : 0.0f);
    for (int64_t s = q; s < kChunk; ++s) direct[s] = grad_log[s] = 0.0f;
    VF sum_dA = VF::zero(), sum_ddt = VF::zero();
    for (int64_t i = 0; i < kChunk; i += kLanes) {
      const VF change = VF::load(grad_log + i), dt = VF::load(raw + i);
      sum_dA = fma(VF::load(d->delta + i), change, sum_dA);
      VF g = fma(VF::set(in.A[h]), change, VF::load(direct + i));
      const VF before_clamp = in.softplus ? vsoftplus(dt) : dt;
      const VM free = (VF::set(in.dt_min) < before_clamp) & (before_clamp < VF::set(in.dt_max));
      g = select(free, in.softplus ? g * vsigmoid(dt) : g, VF::zero());
      g.store(ddt + i);
      sum_ddt = sum_ddt + g;
    }
    const float dA = reduce_add(sum_dA), dbias = reduce_add(sum_ddt);
    for (int64_t s = 0; s < q; ++s) p.ddt[(t + s) * H + h] = ddt[s];
    k.dA_sum[j] += dA;
    k.dbias_sum[j] += dbias;

    // dC and dB through the state.
    pack_b_cols(state, ld, ld, N, for_dc.states_of(place, ld), for_dc.panel);
    scale_rows(x32, ld, q, P, d->to_end, for_db.rows_of(place, ld), for_db.ld, ld);
    if (place + 1 == side || j + 1 == k.heads) {
      for_dc.product(q, N, place + 1, ld, dc, ld_n, j >= side);
      for_db.product(q, N, place + 1, ld, db, ld_n, j >= side);
    }

    // G_prev.
    const auto decayed = rows_operand<T>(dy_decayed.p, dy_decayed.ld, q, P, inner);
    gemm_block<T>(N, P, q, c_columns, kChunk, kK<T>, decayed.p, decayed.ldb, decayed.panel, grad_state, ld, true);
  }

  // Once for the block: dB += M^T C, dC += M B with M summed over the heads.
  T* m_rows = scratch.get<T>(kChunk * kChunk);
  for (int64_t i = 0; i < q; ++i) copy_row(m_sum + i * kChunk, kChunk, m_rows + i * kChunk, kChunk);
  product(q, N, q, Rows<T>{m_rows, kChunk}, packed_c, db, ld_n, true);
  transpose_copy(m_sum, kChunk, kChunk, q, m_rows, kChunk);
  product(q, N, q, Rows<T>{m_rows, kChunk}, packed_b, dc, ld_n, true);
  for (int64_t i = 0; i < q; ++i) {
    copy_row(db + i * ld_n, N, k.dB_part + (t + i) * N, N);
    copy_row(dc + i * ld_n, N, k.dC_part + (t + i) * N, N);
  }
}

template <class T>
void run_task(Task<T> k) {
  const ScanBackward& p = k.p;
  const ScanInputs& in = p.in;
  const int64_t P = in.P, N = in.N, size = N * k.ld;
  const int64_t chunks = ceil_div(k.seg.end - k.seg.begin, kChunk);
  Scratch scratch;
  k.states = scratch.get<T>(k.heads * imax(chunks, 1) * size);
  k.grad_state = scratch.get<float>(k.heads * size);
  for (int64_t j = 0; j < k.heads; ++j)
    load_state(p.dfinal_states && k.seg.final_row >= 0 ? p.dfinal_states + ((k.seg.final_row * in.H + k.h0 + j) * P) * N
                                                       : nullptr,
               P, N, k.grad_state + j * size, k.ld);
  recompute_states(k, chunks);
  for (int64_t c = chunks - 1; c >= 0; --c) run_chunk(k, c, chunks);
  if (p.dinitial_states && k.seg.initial_row >= 0)
    for (int64_t j = 0; j < k.heads; ++j)
      store_state(k.grad_state + j * size, k.ld, P, N,
                  p.dinitial_states + ((k.seg.initial_row * in.H + k.h0 + j) * P) * N);
}

template <class T>
void run(const ScanBackward& p) {
  const ScanInputs& in = p.in;
  const int64_t H = in.H, G = in.G, N = in.N, P = in.P, tokens = p.seqs.rows * p.seqs.length;
  const int64_t heads = H / G, ld = state_ld(P);
  Scratch scratch;
  Segment* segments = scratch.get<Segment>(max_segments(p.seqs));
  const int64_t count = fill_segments(p.seqs, segments);
  const HeadBlocks blocks(heads, block_heads(H));
  const int64_t nblocks = G * blocks.per_group;
  float* dB = scratch.get<float>(nblocks * tokens * N);
  float* dC = scratch.get<float>(nblocks * tokens * N);
  const int64_t per_segment = H * (2 + ld);
  float* sums = scratch.get<float>(imax(1, count) * per_segment);  // dA (H), dbias (H), dD (H, ld) of each segment
  for (int64_t i = 0; i < count * per_segment; ++i) sums[i] = 0.0f;

  parallel_for(count * nblocks, 1, [&](int64_t task) {
    const int64_t i = task / nblocks, block = task % nblocks, g = block / blocks.per_group;
    const int64_t first = block % blocks.per_group * blocks.size, h0 = g * heads + first;
    float* s = sums + i * per_segment;
    run_task(Task<T>{p, segments[i], g, h0, imin(blocks.size, heads - first), ld, nullptr, nullptr,
                     dB + block * tokens * N, dC + block * tokens * N, s + h0, s + H + h0, s + 2 * H + h0 * ld});
  });

  parallel_for(tokens, grain_for(nblocks * N * 2), [&](int64_t t) {
    for (int64_t g = 0; g < G; ++g)
      for (int64_t n = 0; n < N; n += kLanes) {
        VF b = VF::zero(), c = VF::zero();
        for (int64_t i = g * blocks.per_group; i < (g + 1) * blocks.per_group; ++i) {
          b = b + load_upto(dB + (i * tokens + t) * N + n, N - n);
          c = c + load_upto(dC + (i * tokens + t) * N + n, N - n);
        }
        store_upto(b, static_cast<T*>(p.dB) + (t * G + g) * N + n, N - n);
        store_upto(c, static_cast<T*>(p.dC) + (t * G + g) * N + n, N - n);
      }
  });
  for (int64_t h = 0; h < H; ++h) {
    float dA = 0.0f, dbias = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
      dA += sums[i * per_segment + h];
      dbias += sums[i * per_segment + H + h];
    }
    p.dA[h] = dA;
    p.ddt_bias[h] = dbias;
    for (int64_t c = 0; p.dD && c < P; ++c) {
      float dD = 0.0f;
      for (int64_t i = 0; i < count; ++i) dD += sums[i * per_segment + 2 * H + h * ld + c];
      p.dD[h * P + c] = dD;
    }
  }
}

}  // namespace

void scan_backward(const ScanBackward& p) {
  if (p.in.type == DType::kF32) {
    run<float>(p);
  } else {
    run<bf16>(p);
  }
}

}  // namespace foldscan::FOLDSCAN_ISA::ssm
