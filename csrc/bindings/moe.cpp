// Grouped matrix multiplication and the expert layer.
#include "moe/moe.h"

#include "bindings/moe_checks.h"
#include "linear/linear.h"

namespace foldscan::bindings {
namespace {

void check_grouped(const Tensor& a, const Tensor& b, const Tensor& offs) {
  check(a.dim() == 2 && a.stride(1) == 1 && b.dim() == 3 && (b.stride(1) == 1 || b.stride(2) == 1),
        "grouped_mm takes a (rows, K) and b (groups, K, N) with dense rows or columns");
  check(a.size(1) == b.size(1) && offs.numel() == b.size(0), "grouped_mm: shapes disagree");
  check(dtype_of(a) == DType::kBF16 || dtype_of(b) == DType::kF32, "grouped_mm: an fp32 a needs an fp32 b");
  const int32_t* o = in_i32(offs);
  for (int64_t g = 0; g < offs.numel(); ++g)
    check(o[g] >= (g ? o[g - 1] : 0) && o[g] <= a.size(0), "offs: want row ends that do not decrease");
}

// pack_b wants one stride to be 1; where both sizes are 1 or 0 any is.
int64_t k_stride(const Tensor& b) { return b.stride(2) == 1 ? b.stride(1) : 1; }
int64_t n_stride(const Tensor& b) { return b.stride(2) == 1 ? 1 : b.stride(2); }

Tensor grouped_mm(const Tensor& a, const Tensor& b, const Tensor& offs, const OptTensor& bias) {
  check_grouped(a, b, offs);
  check(!bias || bias->numel() == b.size(0) * b.size(2), "grouped_mm: bias has the wrong shape");
  Tensor out = empty({a.size(0), b.size(2)}, a.scalar_type());
  moe::cpu::grouped_mm({.a = data(a),
                        .b = data(b),
                        .offs = in_i32(offs),
                        .bias = in_f32(bias),
                        .out = data(out),
                        .R = a.size(0),
                        .K = a.size(1),
                        .N = b.size(2),
                        .G = b.size(0),
                        .a_stride = a.stride(0),
                        .b_group = b.stride(0),
                        .b_k = k_stride(b),
                        .b_n = n_stride(b),
                        .a_type = dtype_of(a),
                        .b_type = dtype_of(b)});
  return out;
}

std::tuple<Tensor, Tensor, Tensor> grouped_mm_backward(const Tensor& dout, const Tensor& a, const Tensor& b,
                                                       const Tensor& offs, bool need_a, bool need_b, bool need_bias) {
  check_grouped(a, b, offs);
  const int64_t R = a.size(0), K = a.size(1), N = b.size(2), G = b.size(0);
  check_dense(dout, 2);
  check(dout.size(0) == R && dout.size(1) == N && dout.scalar_type() == a.scalar_type(),
        "grouped_mm_backward: shapes or dtypes disagree");
  Tensor da = empty({need_a ? R : 0, K}, a.scalar_type());
  Tensor db = empty({need_b ? G : 0, K, N}, b.scalar_type());
  Tensor dbias = empty({need_bias ? G : 0, N}, ScalarType::Float);
  moe::cpu::grouped_mm_backward({.dout = data(dout),
                                 .a = data(a),
                                 .b = data(b),
                                 .offs = in_i32(offs),
                                 .da = need_a ? data(da) : nullptr,
                                 .db = need_b ? data(db) : nullptr,
                                 .dbias = need_bias ? f32(dbias) : nullptr,
                                 .R = R,
                                 .K = K,
                                 .N = N,
                                 .G = G,
                                 .a_stride = a.stride(0),
                                 .b_group = b.stride(0),
                                 .b_k = k_stride(b),
                                 .b_n = n_stride(b),
                                 .a_type = dtype_of(a),
                                 .b_type = dtype_of(b)});
  return {da, db, dbias};
}

struct ExpertShape {
  int64_t T, k, E, H, F, D;
};

ExpertShape expert_shape(const Tensor& tokens, const Tensor& probs, const Tensor& experts, const Tensor& w_up,
                         const Tensor& w_down, const OptTensor& w_gate) {
  check_dense(tokens, 2);
  check_dense(probs, 2);
  check_dense(experts, 2);
  check_dense(w_up, 3);
  check_dense(w_down, 3);
  const ExpertShape s{tokens.size(0), experts.size(1), w_up.size(0), tokens.size(1), w_up.size(1), w_down.size(1)};
  check(experts.size(0) == s.T && probs.size(0) == s.T && probs.size(1) == s.k && w_up.size(2) == s.H &&
            w_down.size(0) == s.E && w_down.size(2) == s.F && w_down.scalar_type() == w_up.scalar_type(),
        "moe_mlp: shapes or dtypes disagree");
  check(dtype_of(tokens) == DType::kBF16 || dtype_of(w_up) == DType::kF32, "moe_mlp: fp32 tokens need fp32 weights");
  if (w_gate) {
    check_dense(*w_gate, 3);
    check(w_gate->numel() == w_up.numel() && w_gate->size(1) == s.F && w_gate->size(2) == s.H &&
              w_gate->scalar_type() == w_up.scalar_type(),
          "moe_mlp: w_gate differs from w_up in shape or dtype");
  }
  check(w_up.numel() > 0 && s.k > 0, "moe_mlp: want experts, hidden units, inputs and slots");
  check_experts(in_i64(experts), experts.numel(), s.E);
  return s;
}

moe::Activation activation_of(int64_t a) {
  check(a >= 0 && a <= 2, "moe_mlp: unknown activation");
  return static_cast<moe::Activation>(a);
}

std::tuple<Tensor, Tensor, Tensor> run_experts(const Tensor& tokens, const Tensor& probs, const Tensor& experts,
                                               const ExpertShape& s, const moe::ExpertWeights& w, int64_t activation,
                                               bool keep) {
  const bool gated = w.gate || w.packed_gate;
  const ScalarType type = tokens.scalar_type();
  const int64_t R = s.T * s.k;
  Tensor out = empty({s.T, s.D}, type);
  Tensor up = empty({keep ? R : 0, s.F}, type), gate = empty({keep && gated ? R : 0, s.F}, type);
  Tensor hidden = empty({R, s.F}, type), y = empty({s.k > 1 ? R : 0, s.D}, ScalarType::Float);
  moe::cpu::expert_forward({.tokens = data(tokens),
                            .probs = in_f32(probs),
                            .experts = in_i64(experts),
                            .w = w,
                            .out = data(out),
                            .up = keep ? data(up) : nullptr,
                            .gate = keep && gated ? data(gate) : nullptr,
                            .hidden = data(hidden),
                            .y = f32(y),
                            .T = s.T,
                            .k = s.k,
                            .E = s.E,
                            .H = s.H,
                            .F = s.F,
                            .D = s.D,
                            .activation = activation_of(activation),
                            .type = dtype_of(tokens)});
  return {out, up, gate};
}

std::tuple<Tensor, Tensor, Tensor> moe_mlp(const Tensor& tokens, const Tensor& probs, const Tensor& experts,
                                           const Tensor& w_up, const Tensor& w_down, const OptTensor& w_gate,
                                           int64_t activation, bool keep) {
  const ExpertShape s = expert_shape(tokens, probs, experts, w_up, w_down, w_gate);
  return run_experts(tokens, probs, experts, s,
                     {.up = data(w_up),
                      .gate = data(w_gate),
                      .down = data(w_down),
                      .packed_up = nullptr,
                      .packed_gate = nullptr,
                      .packed_down = nullptr,
                      .type = dtype_of(w_up)},
                     activation, keep);
}

int64_t packed_elements(int64_t N, int64_t K, DType type) {
  int64_t bytes = 0;
  linear::cpu::packed_bytes({.N = N, .K = K, .type = type, .bytes = &bytes});
  return bytes / element_size(type);
}

Tensor moe_pack(const Tensor& weight, bool as_bf16) {
  check_dense(weight, 3);
  const DType type = as_bf16 ? DType::kBF16 : DType::kF32;
  check(as_bf16 || dtype_of(weight) == DType::kF32, "moe_pack: a bf16 weight is packed as bf16");
  Tensor packed = empty({weight.size(0), packed_elements(weight.size(1), weight.size(2), type)}, type);
  moe::cpu::pack_experts({.weight = data(weight),
                          .packed = data(packed),
                          .E = weight.size(0),
                          .N = weight.size(1),
                          .K = weight.size(2),
                          .weight_type = dtype_of(weight),
                          .type = type});
  return packed;
}

Tensor moe_mlp_packed(const Tensor& tokens, const Tensor& probs, const Tensor& experts, const Tensor& up,
                      const Tensor& down, const OptTensor& gate, int64_t F, int64_t D, int64_t activation) {
  check_dense(tokens, 2);
  check_dense(probs, 2);
  check_dense(experts, 2);
  const ExpertShape s{tokens.size(0), experts.size(1), up.size(0), tokens.size(1), F, D};
  const DType type = dtype_of(tokens);
  const auto fits = [&](const Tensor& w, int64_t N, int64_t K) {
    return w.is_contiguous() && w.scalar_type() == tokens.scalar_type() && w.size(0) == s.E &&
           w.numel() == s.E * packed_elements(N, K, type);
  };
  check(s.E > 0 && s.k > 0 && F > 0 && s.H > 0 && experts.size(0) == s.T && probs.size(0) == s.T &&
            probs.size(1) == s.k && fits(up, F, s.H) && fits(down, D, F) && (!gate || fits(*gate, F, s.H)),
        "moe_mlp_packed: shapes or dtypes disagree");
  check_experts(in_i64(experts), experts.numel(), s.E);
  return std::get<0>(run_experts(tokens, probs, experts, s,
                                 {.up = nullptr,
                                  .gate = nullptr,
                                  .down = nullptr,
                                  .packed_up = data(up),
                                  .packed_gate = data(gate),
                                  .packed_down = data(down),
                                  .type = type},
                                 activation, false));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> moe_mlp_backward(
    const Tensor& dout, const Tensor& tokens, const Tensor& probs, const Tensor& experts, const Tensor& w_up,
    const Tensor& w_down, const OptTensor& w_gate, const Tensor& up, const Tensor& gate, int64_t activation,
    bool need_tokens, bool need_probs, bool need_up, bool need_down, bool need_gate) {
  const ExpertShape s = expert_shape(tokens, probs, experts, w_up, w_down, w_gate);
  check_dense(dout, 2);
  check_dense(up, 2);
  check_dense(gate, 2);
  const int64_t R = s.T * s.k;
  const ScalarType type = tokens.scalar_type();
  check(dout.size(0) == s.T && dout.size(1) == s.D && dout.scalar_type() == type && up.size(0) == R &&
            up.size(1) == s.F && up.scalar_type() == type && gate.scalar_type() == type &&
            gate.numel() == (w_gate ? R * s.F : 0),
        "moe_mlp_backward: shapes or dtypes disagree");
  need_gate = need_gate && w_gate.has_value();
  Tensor dtokens = empty({need_tokens ? s.T : 0, s.H}, type);
  Tensor dprobs = empty({need_probs ? s.T : 0, s.k}, ScalarType::Float);
  Tensor dw_up = empty({need_up ? s.E : 0, s.F, s.H}, w_up.scalar_type());
  Tensor dw_down = empty({need_down ? s.E : 0, s.D, s.F}, w_up.scalar_type());
  Tensor dw_gate = empty({need_gate ? s.E : 0, s.F, s.H}, w_up.scalar_type());
  Tensor du = empty({R, s.F}, type), dg = empty({w_gate ? R : 0, s.F}, type), hp = empty({R, s.F}, type);
  Tensor dx = empty({need_tokens && s.k > 1 ? R : 0, s.H}, ScalarType::Float);
  moe::cpu::expert_backward({.dout = data(dout),
                             .tokens = data(tokens),
                             .probs = in_f32(probs),
                             .experts = in_i64(experts),
                             .w = {.up = data(w_up),
                                   .gate = data(w_gate),
                                   .down = data(w_down),
                                   .packed_up = nullptr,
                                   .packed_gate = nullptr,
                                   .packed_down = nullptr,
                                   .type = dtype_of(w_up)},
                             .up = data(up),
                             .gate = w_gate ? data(gate) : nullptr,
                             .dtokens = need_tokens ? data(dtokens) : nullptr,
                             .dprobs = need_probs ? f32(dprobs) : nullptr,
                             .dw_up = need_up ? data(dw_up) : nullptr,
                             .dw_gate = need_gate ? data(dw_gate) : nullptr,
                             .dw_down = need_down ? data(dw_down) : nullptr,
                             .du = data(du),
                             .dg = w_gate ? data(dg) : nullptr,
                             .hp = data(hp),
                             .dx = need_tokens ? f32(dx) : nullptr,
                             .T = s.T,
                             .k = s.k,
                             .E = s.E,
                             .H = s.H,
                             .F = s.F,
                             .D = s.D,
                             .activation = activation_of(activation),
                             .type = dtype_of(tokens)});
  return {dtokens, dprobs, dw_up, dw_down, dw_gate};
}

}  // namespace
}  // namespace foldscan::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(foldscan, m) {
  m.def("grouped_mm(Tensor a, Tensor b, Tensor offs, Tensor? bias) -> Tensor");
  m.def(
      "grouped_mm_backward(Tensor dout, Tensor a, Tensor b, Tensor offs, bool need_a, bool need_b, bool need_bias) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "moe_mlp(Tensor tokens, Tensor probs, Tensor experts, Tensor w_up, Tensor w_down, Tensor? w_gate, "
      "int activation, bool keep) -> (Tensor, Tensor, Tensor)");
  m.def("moe_pack(Tensor weight, bool as_bf16) -> Tensor");
  m.def(
      "moe_mlp_packed(Tensor tokens, Tensor probs, Tensor experts, Tensor up, Tensor down, Tensor? gate, int F, "
      "int D, int activation) -> Tensor");
  m.def(
      "moe_mlp_backward(Tensor dout, Tensor tokens, Tensor probs, Tensor experts, Tensor w_up, Tensor w_down, "
      "Tensor? w_gate, Tensor up, Tensor gate, int activation, bool need_tokens, bool need_probs, bool need_up, "
      "bool need_down, bool need_gate) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(foldscan, CPU, m) {
  m.impl("grouped_mm", TORCH_BOX(&foldscan::bindings::grouped_mm));
  m.impl("grouped_mm_backward", TORCH_BOX(&foldscan::bindings::grouped_mm_backward));
  m.impl("moe_mlp", TORCH_BOX(&foldscan::bindings::moe_mlp));
  m.impl("moe_pack", TORCH_BOX(&foldscan::bindings::moe_pack));
  m.impl("moe_mlp_packed", TORCH_BOX(&foldscan::bindings::moe_mlp_packed));
  m.impl("moe_mlp_backward", TORCH_BOX(&foldscan::bindings::moe_mlp_backward));
}
