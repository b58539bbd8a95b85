// The expert layer: gather, up (and gate) projection, activation x gate x probability, down projection, and the sum
// over a token's experts.
//
//   h[r] = p_r act(W_gate x_t) (W_up x_t)      or, without a gate, p_r act(W_up x_t);      r = slot (t, j) of expert e
//   out[t] = sum over j of W_down h[(t, j)], in the order of j
//
// The probability multiplies the hidden vector, not the output, so that backward needs no output of W_down: with
// dh = W_down^T dout, dp = <dh, h / p>. Forward keeps the pre-activations only (arXiv:2512.14080 drops the output too).
//
// FLOPs: 2 R F (H + D), R = T k, and as much again for a gate's half; backward twice that. Bytes: the weights of the
// experts that were hit once; h and the fp32 rows of the down projection once each way.
// Numerics: fp32 sums of fp32 or bf16 products; h is rounded to the tokens' type as a GEMM operand; the sum over slots
//   is fp32, rounded once. dp sums columns in blocks of kNR.
// Determinism: see grouped.h. Nothing of a token's result depends on another token.
#include "core/vmath.h"
#include "moe/cpu/grouped.h"
#include "moe/cpu/sort.h"

namespace foldscan::FOLDSCAN_ISA::moe {
namespace {

using namespace foldscan::moe;

template <Activation A>
FOLDSCAN_INLINE VF act(VF x) {
  if constexpr (A == Activation::kSilu) return vsilu(x);
  if constexpr (A == Activation::kGelu) return VF::set(0.5f) * x * verfc(x * VF::set(-0.707106781f));
  const VF r = vmax(VF::zero(), x);
  return r * r;
}

template <Activation A>
FOLDSCAN_INLINE VF act_grad(VF x) {
  if constexpr (A == Activation::kSilu) return vsilu_grad(x);
  if constexpr (A == Activation::kGelu) {
    const VF cdf = VF::set(0.5f) * verfc(x * VF::set(-0.707106781f));
    const VF pdf = VF::set(0.39894228f) * vexp_neg(x * x * VF::set(-0.5f));
    return fma(x, pdf, cdf);
  }
  return VF::set(2.0f) * vmax(VF::zero(), x);
}

template <Activation A>
struct Act {
  static constexpr Activation value = A;
};

template <class F>
FOLDSCAN_INLINE void with_activation(Activation a, const F& f) {
  if (a == Activation::kSilu) return f(Act<Activation::kSilu>{});
  if (a == Activation::kRelu2) return f(Act<Activation::kRelu2>{});
  f(Act<Activation::kGelu>{});
}

// h[0 .. n) from fp32 pre-activations; they are kept in `keep_up` / `keep_gate` where given.
template <class T, class A>
void activate_row(A, const float* up, const float* gate, float prob, int64_t n, T* keep_up, T* keep_gate, T* h) {
  const VF pr = VF::set(prob);
  for (int64_t i = 0; i < n; i += kLanes) {
    const VF u = load_upto(up + i, n - i);
    const VF g = gate ? load_upto(gate + i, n - i) : u;
    VF v = act<A::value>(g);
    if (gate) v = v * u;
    store_upto(pr * v, h + i, n - i);
    if (keep_up) store_upto(u, keep_up + i, n - i);
    if (keep_gate) store_upto(g, keep_gate + i, n - i);
  }
}

// From dh: gradients of the pre-activations, h again, and this block's share of dp.
template <class T, class A>
float activate_row_backward(A, const float* dh, const T* up, const T* gate, float prob, int64_t n, T* du, T* dg, T* h) {
  const VF pr = VF::set(prob);
  VF dp = VF::zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const VF d = load_upto(dh + i, n - i), u = load_upto(up + i, n - i);
    const VF g = gate ? load_upto(gate + i, n - i) : u;
    const VF a = act<A::value>(g), slope = act_grad<A::value>(g), pd = pr * d;
    const VF v = gate ? a * u : a;
    store_upto(gate ? pd * a : pd * slope, du + i, n - i);
    if (gate) store_upto(pd * u * slope, dg + i, n - i);
    store_upto(pr * v, h + i, n - i);
    dp = fma(d, v, dp);
  }
  return reduce_add(dp);
}

// The assignments sorted by expert.
struct Rows {
  int64_t* ids;      // (R): assignment of a row
  int64_t* inverse;  // (R): row of an assignment, or -1
  int64_t* starts;   // (E + 1)
};

Rows sort_rows(const int64_t* experts, int64_t n, int64_t E, Scratch& scratch) {
  Rows rows{scratch.get<int64_t>(n), scratch.get<int64_t>(n), scratch.get<int64_t>(E + 1)};
  int64_t* counts = scratch.get<int64_t>(E);
  int32_t* offs = scratch.get<int32_t>(E);
  sort_assignments({.experts = experts,
                    .probs = nullptr,
                    .rows = rows.ids,
                    .inverse = rows.inverse,
                    .counts = counts,
                    .offs = offs,
                    .n = n,
                    .E = E,
                    .R = n,
                    .capacity = -1,
                    .by_position = true,
                    .pad = false});
  rows.starts[0] = 0;
  for (int64_t e = 0; e < E; ++e) rows.starts[e + 1] = rows.starts[e] + counts[e];
  return rows;
}

// out[t] = sum over the slots of t of y[row], in order.
template <class T>
void sum_slots(const float* y, const int64_t* inverse, int64_t tokens, int64_t k, int64_t n, T* out) {
  parallel_for(tokens, grain_for(n * k), [&](int64_t t) {
    for (int64_t i = 0; i < n; i += kLanes) {
      VF sum = VF::zero();
      for (int64_t id = t * k; id < (t + 1) * k; ++id)
        if (inverse[id] >= 0) sum = sum + load_upto(y + inverse[id] * n + i, n - i);
      store_upto(sum, out + t * n + i, n - i);
    }
  });
}

// up -> activation -> h, for NB = 1 (no gate) or 2 (up, gate).
template <class T, int NB>
void project_up(const ExpertForward& p, const Rows& rows) {
  const T* tokens = static_cast<const T*>(p.tokens);
  const Operand<T> operands[2] = {{p.w.up, p.w.type, p.F * p.H, 1, p.H, static_cast<const T*>(p.w.packed_up)},
                                  {p.w.gate, p.w.type, p.F * p.H, 1, p.H, static_cast<const T*>(p.w.packed_gate)}};
  T* keep_up = static_cast<T*>(p.up);
  T* keep_gate = static_cast<T*>(p.gate);
  T* hidden = static_cast<T*>(p.hidden);
  with_activation(p.activation, [&](auto activation) {
    multiply_groups<T, NB>(
        rows.starts, p.E, p.F, p.H, p.H, operands[0].packed,
        gathered_rows<T>([&](int64_t r, int64_t k) { return tokens + rows.ids[r] / p.k * p.H + k; }),
        [&](int64_t e, int64_t n, int64_t cols, Scratch& scratch) {
          InTurn<T, NB> b{{}, b_panel_size<T>(p.H)};
          for (int i = 0; i < NB; ++i) b.b[i] = operands[i].panels(e, n, cols, p.H, p.F, scratch);
          return b;
        },
        [&](int64_t, int64_t r, int64_t n, int64_t count, const float* const(&v)[NB]) {
          const int64_t at = r * p.F + n;
          activate_row<T>(activation, v[0], NB == 2 ? v[NB - 1] : nullptr, p.probs[rows.ids[r]], count,
                          keep_up ? keep_up + at : nullptr, keep_gate ? keep_gate + at : nullptr, hidden + at);
        });
  });
}

// put(r, n, values, count): rows of a[0] B[0] + a[1] B[1], the second where given; a[i] (R, K), B[i] (K, N).
template <class T, class Put>
void project(const Rows& rows, int64_t E, int64_t N, int64_t K, const T* const (&a)[2], const Operand<T> (&b)[2],
             const Put& put) {
  multiply_groups<T, 1>(
      rows.starts, E, N, a[1] ? 2 * K : K, K, b[0].packed,
      gathered_rows<T>([&](int64_t r, int64_t k) { return k < K ? a[0] + r * K + k : a[1] + r * K + k - K; }),
      [&](int64_t e, int64_t n, int64_t cols, Scratch& scratch) {
        const T* first = b[0].panels(e, n, cols, K, N, scratch);
        return AfterAnother<T>{first, a[1] ? b[1].panels(e, n, cols, K, N, scratch) : nullptr, K, b_panel_size<T>(K)};
      },
      [&](int64_t, int64_t r, int64_t n, int64_t count, const float* const(&v)[1]) { put(r, n, v[0], count); });
}

// out (tokens, N): every token's sum over its slots of a row's products (see project). With one slot a row is its
// token's result; otherwise y (R, N) holds the rows.
template <class T>
void project_to_tokens(const Rows& rows, int64_t tokens, int64_t k, int64_t E, int64_t N, int64_t K,
                       const T* const (&a)[2], const Operand<T> (&b)[2], float* y, T* out) {
  if (k == 1) {
    for (int64_t t = 0; t < tokens; ++t)
      if (rows.inverse[t] < 0) std::memset(out + t * N, 0, static_cast<size_t>(N) * sizeof(T));
    project<T>(rows, E, N, K, a, b, [&](int64_t r, int64_t n, const float* values, int64_t count) {
      copy_row(values, count, out + rows.ids[r] * N + n, count);
    });
  } else {
    project<T>(rows, E, N, K, a, b, [&](int64_t r, int64_t n, const float* values, int64_t count) {
      copy_row(values, count, y + r * N + n, count);
    });
    sum_slots(y, rows.inverse, tokens, k, N, out);
  }
}

template <class T>
void run_forward(const ExpertForward& p) {
  Scratch scratch;
  const Rows rows = sort_rows(p.experts, p.T * p.k, p.E, scratch);
  if (p.w.gate || p.w.packed_gate) {
    project_up<T, 2>(p, rows);
  } else {
    project_up<T, 1>(p, rows);
  }
  const Operand<T> down{p.w.down, p.w.type, p.D * p.F, 1, p.F, static_cast<const T*>(p.w.packed_down)};
  project_to_tokens<T>(rows, p.T, p.k, p.E, p.D, p.F, {static_cast<const T*>(p.hidden), nullptr}, {down, down}, p.y,
                       static_cast<T*>(p.out));
}

// du, dg, hp and dprobs from dout.
template <class T>
void backward_activation(const ExpertBackward& p, const Rows& rows) {
  Scratch outer;
  const int64_t blocks = ceil_div(p.F, kNR), R = p.T * p.k;
  float* dp = outer.get<float>(R * blocks);
  const T* dout = static_cast<const T*>(p.dout);
  const Operand<T> down{p.w.down, p.w.type, p.D * p.F, p.F, 1, nullptr};
  const T* up = static_cast<const T*>(p.up);
  const T* gate = static_cast<const T*>(p.gate);
  with_activation(p.activation, [&](auto activation) {
    multiply_groups<T, 1>(
        rows.starts, p.E, p.F, p.D, p.D, false,
        gathered_rows<T>([&](int64_t r, int64_t k) { return dout + rows.ids[r] / p.k * p.D + k; }),
        [&](int64_t e, int64_t n, int64_t cols, Scratch& scratch) {
          return InTurn<T, 1>{{down.panels(e, n, cols, p.D, p.F, scratch)}, b_panel_size<T>(p.D)};
        },
        [&](int64_t, int64_t r, int64_t n, int64_t count, const float* const(&v)[1]) {
          const int64_t id = rows.ids[r], at = r * p.F + n;
          dp[id * blocks + n / kNR] = activate_row_backward<T>(
              activation, v[0], up + at, gate ? gate + at : nullptr, p.probs[id], count, static_cast<T*>(p.du) + at,
              gate ? static_cast<T*>(p.dg) + at : nullptr, static_cast<T*>(p.hp) + at);
        });
  });
  if (!p.dprobs) return;
  for (int64_t id = 0; id < R; ++id) {
    float sum = 0.0f;
    for (int64_t i = 0; rows.inverse[id] >= 0 && i < blocks; ++i) sum += dp[id * blocks + i];
    p.dprobs[id] = sum;
  }
}

template <class T>
void backward_weights(const ExpertBackward& p, const Rows& rows) {
  const auto token = [&](int64_t r) { return static_cast<const T*>(p.tokens) + rows.ids[r] / p.k * p.H; };
  const auto dout = [&](int64_t r) { return static_cast<const T*>(p.dout) + rows.ids[r] / p.k * p.D; };
  const auto hidden = [&](const void* m) { return [&p, m](int64_t r) { return static_cast<const T*>(m) + r * p.F; }; };
  if (p.dw_up) outer_products<T>(rows.starts, p.E, p.F, p.H, hidden(p.du), token, p.dw_up, p.w.type);
  if (p.dw_gate) outer_products<T>(rows.starts, p.E, p.F, p.H, hidden(p.dg), token, p.dw_gate, p.w.type);
  if (p.dw_down) outer_products<T>(rows.starts, p.E, p.D, p.F, dout, hidden(p.hp), p.dw_down, p.w.type);
}

template <class T>
void run_backward(const ExpertBackward& p) {
  Scratch scratch;
  const Rows rows = sort_rows(p.experts, p.T * p.k, p.E, scratch);
  backward_activation<T>(p, rows);
  if (p.dtokens) {
    const Operand<T> up{p.w.up, p.w.type, p.F * p.H, p.H, 1, nullptr};
    const Operand<T> gate{p.w.gate, p.w.type, p.F * p.H, p.H, 1, nullptr};
    project_to_tokens<T>(rows, p.T, p.k, p.E, p.H, p.F,
                         {static_cast<const T*>(p.du), p.w.gate ? static_cast<const T*>(p.dg) : nullptr}, {up, gate},
                         p.dx, static_cast<T*>(p.dtokens));
  }
  if (p.dw_up || p.dw_gate || p.dw_down) backward_weights<T>(p, rows);
}

template <class S, class T>
void run_pack(const PackExperts& p) {
  const int64_t panels = ceil_div(p.N, kNR);
  parallel_for(p.E * panels, grain_for(p.K * kNR / 4), [&](int64_t i) {
    const int64_t e = i / panels, n = i % panels * kNR;
    pack_b(static_cast<const S*>(p.weight) + (e * p.N + n) * p.K, 1, p.K, p.K, imin(kNR, p.N - n),
           static_cast<T*>(p.packed) + i * b_panel_size<T>(p.K));
  });
}

}  // namespace

void expert_forward(const ExpertForward& p) { p.type == DType::kF32 ? run_forward<float>(p) : run_forward<bf16>(p); }

void expert_backward(const ExpertBackward& p) {
  p.type == DType::kF32 ? run_backward<float>(p) : run_backward<bf16>(p);
}

void pack_experts(const PackExperts& p) {
  if (p.type == DType::kF32) {
    run_pack<float, float>(p);
  } else if (p.weight_type == DType::kF32) {
    run_pack<float, bf16>(p);
  } else {
    run_pack<bf16, bf16>(p);
  }
}

}  // namespace foldscan::FOLDSCAN_ISA::moe
