// One chunk of the SSD scan backwards, for the heads of one task. scan_backward.cpp has the formulas and the tasks.
//
// Matrices over (l, s) are kept as [s][l] ("transposed"), which is how the products of dX and dB read them; what lies
// left of the diagonal is neither computed nor read, in steps of a vector.
#pragma once

#include "ssm/cpu/scan_sums.h"

namespace foldscan::FOLDSCAN_ISA::ssm {

// So many heads lie side by side in one product over (head, channel) for dB: the sums are read and written once for all
// of them, and the operands still fit L2.
constexpr int64_t kSideBySide = 4;

// Everything a task keeps between chunks, and scratch that lives for the task.
template <class T>
struct BackwardTask {
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

template <class T>
class ChunkAdjoint {
 public:
  ChunkAdjoint(const BackwardTask<T>& task, int64_t chunk, int64_t chunks)
      : k(task),
        in(task.p.in),
        c(chunk),
        chunks(chunks),
        P(in.P),
        N(in.N),
        ld(task.ld),
        ld_n(round_up(in.N, kStatePad)),
        t(task.seg.begin + chunk * kChunk),
        q(imin(kChunk, task.seg.end - t)),
        B(as_rows(static_cast<const T*>(in.B) + t * in.B_stride + k.g * N, in.B_stride, q, N, scratch)),
        C(as_rows(static_cast<const T*>(in.C) + t * in.C_stride + k.g * N, in.C_stride, q, N, scratch)),
        side(imin(kSideBySide, task.heads)),
        for_db(q, side, ld, N, scratch) {
    packed_b = scratch.get<T>(b_packed_size<T>(q, N));
    packed_c = scratch.get<T>(b_packed_size<T>(q, N));
    pack_b_rows(B.p, B.ld, q, N, packed_b);
    pack_b_rows(C.p, C.ld, q, N, packed_c);
    c_columns = scratch.get<T>(N * kChunk);
    transpose_copy(C.p, C.ld, q, N, c_columns, kChunk);
    if (q % kK<T> != 0)
      for (int64_t n = 0; n < N; ++n) c_columns[n * kChunk + q] = from_float<T>(0.0f);
    cbt = scratch.get<float>(kChunk * kChunk);
    T* packed_ct = scratch.get<T>(b_packed_size<T>(N, q));
    pack_b_cols(C.p, C.ld, N, q, packed_ct);
    product_from_diagonal(q, N, B, packed_ct, cbt, kChunk);
    m_sum = zeros<float>();
    scores = zeros<T>();
    db = scratch.get<float>(q * ld_n);
    dc = scratch.get<float>(q * ld_n);
    wt = scratch.get<float>(kChunk * kChunk);
    et = scratch.get<float>(kChunk * kChunk);
    x = scratch.get<T>(kChunk * ld);
    dy = scratch.get<T>(kChunk * ld);
    decayed = scratch.get<T>(kChunk * ld);
    gb = scratch.get<float>(q * ld);
    br = scratch.get<float>(q * ld);
    d = scratch.get<Decay>(1);
  }

  void head(int64_t j) {
    Scratch inner;
    const int64_t h = k.h0 + j, H = in.H, size = N * ld, place = j % side;
    const T* state = k.states + (j * chunks + c) * size;
    float* grad_state = k.grad_state + j * size;
    load_delta(in, in.dt + t * H, H, h, q, d->delta);
    fill_decay_columns(in.A[h], q, *d, wt);
    load_rows(j);
    scale_rows(dy, ld, q, ld, d->from_start, decayed, ld);
    scale_rows(x, ld, q, ld, d->to_end, for_db.rows_of(place, ld), for_db.ld);

    T* packed_dyt = inner.get<T>(b_packed_size<T>(P, q));  // rows p, columns l
    pack_b_cols(dy, ld, P, q, packed_dyt);
    product_from_diagonal(q, P, Rows<T>{x, ld}, packed_dyt, et, kChunk);
    weigh();

    // G B and the rest of br = scores dY + end_weight G B.
    const auto g_op = rows_operand<T>(grad_state, ld, N, P, inner);
    const Upcoming<T> out{static_cast<T*>(k.p.dx) + (t * H + h) * P, H * P, P, q};
    gemm_tiles<T>(q, P, N, B.p, B.ld, g_op.p, g_op.ldb, g_op.panel, gb, ld, false,
                  [&](int64_t m) FOLDSCAN_LAMBDA { out.template fetch<true>(m, m + kTileMR<T>); });
    const auto dy_op = rows_operand<T>(dy, ld, q, P, inner);
    for (int64_t s = 0; s < q; s += kCausalRows<T>)  // row s has nothing before l = s
      gemm_block<T>(imin(kCausalRows<T>, q - s), P, q - s, scores + s * kChunk + s, kChunk, kK<T>, dy_op.from(s),
                    dy_op.ldb, dy_op.panel, br + s * ld, ld, false);
    alignas(64) float direct[kChunk], u[kChunk], v[kChunk];
    input_gradient(j, direct, u);
    output_gradient(j, state, v);
    if (in.z) gate_gradient(h, state);

    // The time step and the decay.
    pack_b_cols(grad_state, ld, ld, N, for_db.states_of(place, ld), for_db.panel);
    const float tail = d->total * dot_then_scale(grad_state, state, size, d->total);
    step_gradient(j, direct, u, v, tail);

    // dB through the state.
    if (place + 1 == side || j + 1 == k.heads) for_db.product(q, N, place + 1, ld, db, ld_n, j >= side);

    // G_prev.
    const auto decayed_op = rows_operand<T>(decayed, ld, q, P, inner);
    const bool same = j + 1 < k.heads;
    const int64_t h_next = same ? h + 1 : k.h0, t_next = same ? t : t - kChunk;
    const int64_t rows = t_next < k.seg.begin ? 0 : imin(kChunk, k.seg.end - t_next),
                  each = ceil_div(rows * kTileMR<T>, N);
    const Upcoming<T> next_x{static_cast<const T*>(in.x) + t_next * in.x_stride + h_next * P, in.x_stride, P, rows};
    const Upcoming<T> next_dout{static_cast<const T*>(k.p.dout) + (t_next * H + h_next) * P, H * P, P, rows};
    int64_t fetched = 0;
    gemm_tiles<T>(N, P, q, c_columns, kChunk, decayed_op.p, decayed_op.ldb, decayed_op.panel, grad_state, ld, true,
                  [&](int64_t) FOLDSCAN_LAMBDA {
                    next_x.fetch(fetched, fetched + each);
                    next_dout.fetch(fetched, fetched + each);
                    fetched += each;
                  });
  }

  // Once for the block: dB += M^T C, dC += M B with M summed over the heads.
  void finish() {
    T* m = scratch.get<T>(kChunk * kChunk);
    for (int64_t i = 0; i < q; ++i) copy_row(m_sum + i * kChunk, kChunk, m + i * kChunk, kChunk);
    constexpr int64_t block = kCausalRows<T>, ldb = kNR * kK<T>;
    const int64_t panel = b_panel_size<T>(q);
    for (int64_t s = 0; s < q; s += block)
      gemm_block<T>(imin(block, q - s), N, q - s, m + s * kChunk + s, kChunk, kK<T>, packed_c + s * kNR, ldb, panel,
                    db + s * ld_n, ld_n, true);
    transpose_copy(m_sum, kChunk, kChunk, q, m, kChunk);
    for (int64_t l = 0; l < q; l += block)
      gemm_block<T>(imin(block, q - l), N, imin(l + block, q), m + l * kChunk, kChunk, kK<T>, packed_b, ldb, panel,
                    dc + l * ld_n, ld_n, true);
    for (int64_t i = 0; i < q; ++i) {
      copy_row(db + i * ld_n, N, k.dB_part + (t + i) * N, N);
      copy_row(dc + i * ld_n, N, k.dC_part + (t + i) * N, N);
    }
  }

 private:
  template <class S>
  S* zeros() {
    S* m = scratch.get<S>(kChunk * kChunk);
    for (int64_t i = 0; i < kChunk * kChunk; i += kLanes) VF::zero().store(m + i);
    return m;
  }

  VF skip_weight(int64_t h, int64_t i) const {
    return in.D_per_channel ? load_upto(in.D + h * P + i, P - i) : VF::set(in.D[h]);
  }

  // X and dY (through the gate) of head j, zero in the padding of P.
  void load_rows(int64_t j) {
    const int64_t H = in.H, h = k.h0 + j;
    const T* x_rows = static_cast<const T*>(in.x) + t * in.x_stride + h * P;
    const T* z_rows = in.z ? static_cast<const T*>(in.z) + t * in.z_stride + h * P : nullptr;
    const T* dout = static_cast<const T*>(k.p.dout) + (t * H + h) * P;
    for (int64_t l = 0; l < q; ++l) {
      copy_row(x_rows + l * in.x_stride, P, x + l * ld, ld);
      if (!z_rows) {
        copy_row(dout + l * H * P, P, dy + l * ld, ld);
        continue;
      }
      for (int64_t i = 0; i < ld; i += kLanes)
        (load_upto(dout + l * H * P + i, P - i) * vsilu(load_upto(z_rows + l * in.z_stride + i, P - i)))
            .store(dy + l * ld + i);
    }
  }

  // From X dY^T in et: M (summed over heads), (C B^T) w, and E.
  void weigh() {
    for (int64_t s = 0; s < q; ++s) {
      const VF delta = VF::set(d->delta[s]);
      for (int64_t l = s / kLanes * kLanes; l < kChunk; l += kLanes) {
        const int64_t at = s * kChunk + l;
        const VF keep = VF::load(wt + at);   // zero for l < s and beyond q
        const VM valid = VF::zero() < keep;  // elsewhere the products may not have been written
        const VF cb = select(valid, VF::load(cbt + at), VF::zero());
        const VF gram = select(valid, VF::load(et + at), VF::zero());
        const VF m = gram * keep * delta;
        (VF::load(m_sum + at) + m).store(m_sum + at);
        (cb * keep).store(scores + at);
        (m * cb).store(et + at);
      }
    }
  }

  // dX and dD; what dX says about the time step (direct) and the decay to the chunk's end (u).
  void input_gradient(int64_t j, float* direct, float* u) {
    const int64_t H = in.H, h = k.h0 + j;
    T* dx = static_cast<T*>(k.p.dx) + (t * H + h) * P;
    alignas(64) float direct_part[kChunk * kLanes], u_part[kChunk * kLanes];
    // Copies in registers: the compiler has to expect that a store changes the members.
    const float *const gb = this->gb, *const br = this->br, *const D = in.D;
    const T *const x = this->x, *const dy = this->dy;
    float* const dD_sum = k.dD_sum + j * this->ld;
    const int64_t P = this->P, ld = this->ld, row = H * P;
    for (int64_t s = 0; s < q; ++s) {
      const VF end = VF::set(wt[s * kChunk + q - 1]), delta = VF::set(d->delta[s]);
      VF sum_direct = VF::zero(), sum_u = VF::zero();
      for (int64_t i = 0; i < P; i += kLanes) {
        const int64_t n = P - i;
        const VF gbv = load_upto(gb + s * ld + i, n), xv = VF::load(x + s * ld + i);
        const VF b = fma(end, gbv, load_upto(br + s * ld + i, n));
        sum_direct = fma(xv, b, sum_direct);
        sum_u = fma(xv, gbv, sum_u);
        VF g = delta * b;
        if (D) {
          const VF dyv = VF::load(dy + s * ld + i);
          g = fma(skip_weight(h, i), dyv, g);
          fma(dyv, xv, VF::load(dD_sum + i)).store(dD_sum + i);
        }
        store_upto(g, dx + s * row + i, n);
      }
      sum_direct.store(direct_part + s * kLanes);
      sum_u.store(u_part + s * kLanes);
    }
    for (int64_t s = q; s < round_up(q, kLanes); ++s) {
      VF::zero().store(direct_part + s * kLanes);
      VF::zero().store(u_part + s * kLanes);
    }
    row_sums(direct_part, q, direct);
    row_sums(u_part, q, u);
    for (int64_t s = 0; s < q; s += kLanes) (VF::load(u + s) * VF::load(d->to_end + s)).store(u + s);
  }

  // dC += p_l S^T dY_l, and v_l, which is the product of that sum with C_l.
  void output_gradient(int64_t j, const T* state, float* v) {
    Scratch inner;
    alignas(64) float part[kChunk * kLanes];
    for (int64_t l = 0; l < round_up(q, kLanes); ++l) VF::zero().store(part + l * kLanes);
    T* columns = inner.get<T>(b_packed_size<T>(P, N));
    pack_b_cols(state, ld, P, N, columns);
    alignas(64) float tile[kTileMR<T> * kNR];
    gemm_run<T>(
        q, N, P, decayed, ld, kK<T>, [&](int64_t n) { return columns + n / kNR * b_panel_size<T>(P); }, tile, kNR, true,
        Into::kSet, nullptr, [](int64_t, int64_t) {},
        [&](int64_t n, int64_t m, int64_t rows, int64_t width, const float* values) FOLDSCAN_LAMBDA {
          for (int64_t r = 0; r < rows; ++r) {
            float* sum = dc + (m + r) * ld_n + n;
            VF dot = VF::load(part + (m + r) * kLanes);
            for (int64_t i = 0; i < width; i += kLanes) {
              const VF value = load_upto(values + r * kNR + i, width - i);
              dot = fma(load_upto(C.p + (m + r) * C.ld + n + i, width - i), value, dot);
              (j > 0 ? VF::load(sum + i) + value : value).store(sum + i);
            }
            dot.store(part + (m + r) * kLanes);
          }
        });
    row_sums(part, q, v);
  }

  // dz needs the output before the gate: y = p S C + tril(C B^T w delta) X + D x.
  void gate_gradient(int64_t h, const T* state) {
    Scratch inner;
    const int64_t H = in.H;
    float *sc = inner.get<float>(q * ld), *y = inner.get<float>(q * ld);
    const auto s_op = rows_operand<T>(state, ld, N, P, inner);
    gemm_block<T>(q, P, N, C.p, C.ld, kK<T>, s_op.p, s_op.ldb, s_op.panel, sc, ld, false);
    T* forward = inner.get<T>(kChunk * kChunk);
    for (int64_t l = 0; l < q; ++l)
      for (int64_t s = 0; s < kChunk; ++s) {
        const bool on = s <= l;
        forward[l * kChunk + s] = from_float<T>(on ? cbt[s * kChunk + l] * wt[s * kChunk + l] * d->delta[s] : 0.0f);
      }
    const auto x_op = rows_operand<T>(x, ld, q, P, inner);
    gemm_block<T>(q, P, q, forward, kChunk, kK<T>, x_op.p, x_op.ldb, x_op.panel, y, ld, false);
    const T* z = static_cast<const T*>(in.z) + t * in.z_stride + h * P;
    const T* dout = static_cast<const T*>(k.p.dout) + (t * H + h) * P;
    T* dz = static_cast<T*>(k.p.dz) + (t * H + h) * P;
    for (int64_t l = 0; l < q; ++l)
      for (int64_t i = 0; i < P; i += kLanes) {
        const int64_t n = P - i;
        VF yv = fma(VF::set(d->from_start[l]), load_upto(sc + l * ld + i, n), load_upto(y + l * ld + i, n));
        if (in.D) yv = fma(skip_weight(h, i), VF::load(x + l * ld + i), yv);
        const VF g = load_upto(dout + l * H * P + i, n) * vsilu_grad(load_upto(z + l * in.z_stride + i, n));
        store_upto(g * yv, dz + l * H * P + i, n);
      }
  }

  // ddt, and what it adds to dA and to the gradient of dt's bias.
  void step_gradient(int64_t j, float* direct, const float* u, const float* v, float tail) {
    const int64_t H = in.H, h = k.h0 + j;
    alignas(64) float raw[kChunk] = {}, ddt[kChunk], grad_log[kChunk];
    decay_gradient(et, v, u, tail, q, grad_log);
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
    for (int64_t s = 0; s < q; ++s) k.p.ddt[(t + s) * H + h] = ddt[s];
    k.dA_sum[j] += reduce_add(sum_dA);
    k.dbias_sum[j] += reduce_add(sum_ddt);
  }

  Scratch scratch;
  const BackwardTask<T>& k;
  const ScanInputs& in;
  const int64_t c, chunks, P, N, ld, ld_n, t, q;
  const Rows<T> B, C;
  const int64_t side;
  SideBySide<T> for_db;
  T *packed_b, *packed_c;  // rows s (l), columns n
  T* c_columns;            // C^T
  float* cbt;              // [s][l] = C_l . B_s
  float* m_sum;            // sum of M^T over heads, [s][l]
  T* scores;               // [s][l] = (C_l . B_s) w
  float *db, *dc;
  float *wt, *et;       // w^T; dY_l . X_s, then E^T
  T *x, *dy, *decayed;  // rows of the head, decayed: p_l dY_l
  float *gb, *br;
  Decay* d;
};

}  // namespace foldscan::FOLDSCAN_ISA::ssm
