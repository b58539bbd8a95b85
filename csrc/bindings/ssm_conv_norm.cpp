// Causal convolution, Mamba-1 selective scan and gated RMSNorm.
#include "bindings/common.h"
#include "ssm/ssm.h"

namespace foldscan::bindings {
namespace {

// A new tensor laid out like t (rows, channels, tokens): channels dense if they are in t, tokens dense otherwise.
Tensor like(const Tensor& t) {
  if (t.stride(1) == 1 && t.size(1) > 1)
    return torch::stable::transpose(empty({t.size(0), t.size(2), t.size(1)}, t.scalar_type()), 1, 2);
  return empty({t.size(0), t.size(1), t.size(2)}, t.scalar_type());
}

ssm::Conv conv_params(const Tensor& x, const Tensor& weight, const OptTensor& bias, const OptTensor& seq_idx,
                      const OptTensor& cu_seqlens, const OptTensor& initial_states, bool silu) {
  check(x.dim() == 3 && weight.dim() == 2 && weight.size(0) == x.size(1), "conv: shapes disagree");
  check(weight.size(1) >= 1 && weight.size(1) <= 8, "conv: the width must be 1 to 8");
  check(!bias || bias->numel() == x.size(1), "conv: bias has the wrong shape");
  check(!seq_idx || seq_idx->numel() == x.size(0) * x.size(2), "conv: seq_idx has the wrong shape");
  check(!cu_seqlens || x.size(0) == 1, "conv: cu_seqlens takes one row");
  const int64_t states = cu_seqlens ? cu_seqlens->numel() - 1 : x.size(0);
  check(!initial_states || (initial_states->numel() == states * x.size(1) * (weight.size(1) - 1) &&
                            initial_states->is_contiguous() && initial_states->scalar_type() == x.scalar_type()),
        "conv: initial_states have the wrong shape, dtype or layout");
  ssm::Conv p{};
  p.x = data(x);
  p.weight = in_f32(weight);
  p.bias = in_f32(bias);
  p.initial_states = data(initial_states);
  p.seqs = {.rows = x.size(0),
            .length = x.size(2),
            .seq_idx = in_i32(seq_idx),
            .cu_seqlens = in_i32(cu_seqlens),
            .count = cu_seqlens ? cu_seqlens->numel() - 1 : 0};
  p.D = x.size(1);
  p.W = weight.size(1);
  for (int i = 0; i < 3; ++i) p.x_strides[i] = x.stride(i);
  p.silu = silu;
  p.type = dtype_of(x);
  return p;
}

Tensor conv_forward(const Tensor& x, const Tensor& weight, const OptTensor& bias, const OptTensor& seq_idx,
                    const OptTensor& cu_seqlens, const OptTensor& initial_states, bool silu) {
  ssm::Conv p = conv_params(x, weight, bias, seq_idx, cu_seqlens, initial_states, silu);
  Tensor out = like(x);
  p.out = data(out);
  for (int i = 0; i < 3; ++i) p.out_strides[i] = out.stride(i);
  ssm::cpu::conv_forward(p);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_backward(const Tensor& dout, const Tensor& x, const Tensor& weight,
                                                         const OptTensor& bias, const OptTensor& seq_idx,
                                                         const OptTensor& cu_seqlens, const OptTensor& initial_states,
                                                         bool silu) {
  ssm::Conv p = conv_params(x, weight, bias, seq_idx, cu_seqlens, initial_states, silu);
  check(dout.dim() == 3 && dout.numel() == x.numel() && dout.scalar_type() == x.scalar_type(),
        "conv: dout has the wrong shape or dtype");
  Tensor dx = like(x);
  Tensor dweight = empty({p.D, p.W}, ScalarType::Float), dbias = empty({p.D}, ScalarType::Float);
  Tensor dinitial = empty({initial_states ? initial_states->size(0) : 0, p.D, p.W - 1}, x.scalar_type());
  torch::stable::zero_(dinitial);
  p.dout = data(dout);
  p.dx = data(dx);
  p.dweight = f32(dweight);
  p.dbias = f32(dbias);
  p.dinitial_states = initial_states ? data(dinitial) : nullptr;
  for (int i = 0; i < 3; ++i) {
    p.out_strides[i] = dout.stride(i);
    p.dx_strides[i] = dx.stride(i);
  }
  ssm::cpu::conv_backward(p);
  return {dx, dweight, dbias, dinitial};
}

Tensor conv_update(const Tensor& x, Tensor conv_state, const Tensor& weight, const OptTensor& bias,
                   const OptTensor& cache_seqlens, const OptTensor& slots, bool silu) {
  check(x.dim() == 3 && conv_state.dim() == 3 && weight.dim() == 2 && weight.size(0) == x.size(1) &&
            conv_state.size(1) == x.size(1) && conv_state.size(2) >= weight.size(1) - 1 && weight.size(1) <= 8 &&
            conv_state.scalar_type() == x.scalar_type(),
        "conv_update: shapes or dtypes disagree");
  const int32_t* slot = in_i32(slots);
  check(slots ? slots->numel() == x.size(0) : conv_state.size(0) == x.size(0), "conv_update: one state row a sequence");
  for (int64_t i = 0; slot && i < x.size(0); ++i) check(slot[i] < conv_state.size(0), "conv_update: slot out of range");
  check(!cache_seqlens || cache_seqlens->numel() == x.size(0), "conv_update: one cache length for each sequence");
  Tensor out = like(x);
  ssm::ConvUpdate p{};
  p.x = data(x);
  p.conv_state = data(conv_state);
  p.weight = in_f32(weight);
  p.bias = in_f32(bias);
  p.cache_seqlens = in_i32(cache_seqlens);
  p.slots = slot;
  p.out = data(out);
  p.batch = x.size(0);
  p.D = x.size(1);
  p.W = weight.size(1);
  p.tokens = x.size(2);
  p.state_len = conv_state.size(2);
  for (int i = 0; i < 3; ++i) {
    p.x_strides[i] = x.stride(i);
    p.state_strides[i] = conv_state.stride(i);
    p.out_strides[i] = out.stride(i);
  }
  p.silu = silu;
  p.type = dtype_of(x);
  if (p.state_len > 0 || p.W == 1) ssm::cpu::conv_update(p);
  return out;
}

ssm::SelectiveScan selective_params(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                                    const Tensor& C, const OptTensor& D, const OptTensor& z,
                                    const OptTensor& delta_bias, bool softplus) {
  check(u.dim() == 3 && A.dim() == 2 && A.size(0) == u.size(1) && delta.numel() == u.numel() && u.is_contiguous() &&
            delta.is_contiguous() && B.is_contiguous() && C.is_contiguous() &&
            (!z || (z->is_contiguous() && z->numel() == u.numel() && z->scalar_type() == u.scalar_type())) &&
            delta.scalar_type() == u.scalar_type(),
        "selective_scan: shapes, dtypes or layouts disagree");
  const int64_t rows = u.size(0), channels = u.size(1), L = u.size(2), N = A.size(1);
  const bool B_varies = B.dim() == 4, C_varies = C.dim() == 4;
  const int64_t G = B_varies ? B.size(1) : C_varies ? C.size(1) : 1;
  for (const Tensor* t : {&B, &C}) {
    const bool varies = t->dim() == 4;
    check(varies ? t->numel() == rows * G * N * L && t->scalar_type() == u.scalar_type()
                 : t->numel() == channels * N && t->scalar_type() == ScalarType::Float,
          "selective_scan: B or C has the wrong shape or dtype");
  }
  check(G > 0 && channels % G == 0, "selective_scan: channels must divide into the groups");
  check((!D || D->numel() == channels) && (!delta_bias || delta_bias->numel() == channels),
        "selective_scan: D or delta_bias has the wrong shape");
  ssm::SelectiveScan p{};
  p.u = data(u);
  p.delta = data(delta);
  p.z = data(z);
  p.A = in_f32(A);
  p.B = data(B);
  p.C = data(C);
  p.D_skip = in_f32(D);
  p.delta_bias = in_f32(delta_bias);
  p.B_varies = B_varies;
  p.C_varies = C_varies;
  p.softplus = softplus;
  p.rows = rows;
  p.D = channels;
  p.L = L;
  p.N = N;
  p.G = G;
  p.type = dtype_of(u);
  return p;
}

std::tuple<Tensor, Tensor> selective_scan(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                                          const Tensor& C, const OptTensor& D, const OptTensor& z,
                                          const OptTensor& delta_bias, bool softplus) {
  ssm::SelectiveScan p = selective_params(u, delta, A, B, C, D, z, delta_bias, softplus);
  Tensor out = empty({p.rows, p.D, p.L}, u.scalar_type());
  Tensor last = empty({p.rows, p.D, p.N}, ScalarType::Float);
  p.out = data(out);
  p.last_state = f32(last);
  ssm::cpu::selective_scan_forward(p);
  return {out, last};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward(
    const Tensor& dout, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptTensor& D, const OptTensor& z, const OptTensor& delta_bias, bool softplus) {
  ssm::SelectiveScan p = selective_params(u, delta, A, B, C, D, z, delta_bias, softplus);
  check(dout.is_contiguous() && dout.numel() == u.numel() && dout.scalar_type() == u.scalar_type(),
        "selective_scan: dout has the wrong shape, dtype or layout");
  Tensor du = empty({p.rows, p.D, p.L}, u.scalar_type()), ddelta = empty({p.rows, p.D, p.L}, u.scalar_type());
  Tensor dz = empty({z ? p.rows : 0, p.D, p.L}, u.scalar_type());
  Tensor dA = empty({p.D, p.N}, ScalarType::Float);
  Tensor dB = p.B_varies ? empty({p.rows, p.G, p.N, p.L}, ScalarType::Float) : empty({p.D, p.N}, ScalarType::Float);
  Tensor dC = p.C_varies ? empty({p.rows, p.G, p.N, p.L}, ScalarType::Float) : empty({p.D, p.N}, ScalarType::Float);
  Tensor dD = empty({p.D}, ScalarType::Float), dbias = empty({p.D}, ScalarType::Float);
  torch::stable::zero_(dB);
  torch::stable::zero_(dC);
  p.dout = data(dout);
  p.du = data(du);
  p.ddelta = data(ddelta);
  p.dz = z ? data(dz) : nullptr;
  p.dA = f32(dA);
  p.dB = f32(dB);
  p.dC = f32(dC);
  p.dD = f32(dD);
  p.ddelta_bias = f32(dbias);
  ssm::cpu::selective_scan_backward(p);
  return {du, ddelta, dA, dB, dC, dD, dz, dbias};
}

ssm::RmsNorm norm_params(const Tensor& x, const Tensor& weight, const OptTensor& bias, const OptTensor& z, double eps,
                         int64_t group, bool before_gate) {
  check(x.dim() == 2 && (x.stride(1) == 1 || x.size(1) == 1) && weight.numel() == x.size(1) && group > 0 &&
            x.size(1) % group == 0,
        "rmsnorm: shapes disagree");
  check(!bias || bias->numel() == x.size(1), "rmsnorm: bias has the wrong shape");
  check(!z || (z->dim() == 2 && z->numel() == x.numel() && (z->stride(1) == 1 || z->size(1) == 1) &&
               z->scalar_type() == x.scalar_type()),
        "rmsnorm: z has the wrong shape or dtype");
  ssm::RmsNorm p{};
  p.x = data(x);
  p.z = data(z);
  p.weight = in_f32(weight);
  p.bias = in_f32(bias);
  p.M = x.size(0);
  p.D = x.size(1);
  p.group = group;
  p.x_stride = x.stride(0);
  p.z_stride = z ? z->stride(0) : 0;
  p.eps = static_cast<float>(eps);
  p.before_gate = before_gate;
  p.type = dtype_of(x);
  return p;
}

std::tuple<Tensor, Tensor> rmsnorm(const Tensor& x, const Tensor& weight, const OptTensor& bias, const OptTensor& z,
                                   double eps, int64_t group, bool before_gate) {
  ssm::RmsNorm p = norm_params(x, weight, bias, z, eps, group, before_gate);
  Tensor out = empty({p.M, p.D}, x.scalar_type()), rstd = empty({p.M, p.D / group}, ScalarType::Float);
  p.out = data(out);
  p.rstd = f32(rstd);
  ssm::cpu::rmsnorm_forward(p);
  return {out, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rmsnorm_backward(const Tensor& dout, const Tensor& x, const Tensor& weight,
                                                            const OptTensor& bias, const OptTensor& z,
                                                            const Tensor& rstd, double eps, int64_t group,
                                                            bool before_gate) {
  ssm::RmsNorm p = norm_params(x, weight, bias, z, eps, group, before_gate);
  check(dout.is_contiguous() && dout.numel() == x.numel() && dout.scalar_type() == x.scalar_type() &&
            rstd.numel() == p.M * (p.D / group),
        "rmsnorm: dout or rstd has the wrong shape or dtype");
  Tensor dx = empty({p.M, p.D}, x.scalar_type()), dz = empty({z ? p.M : 0, p.D}, x.scalar_type());
  Tensor dweight = empty({p.D}, ScalarType::Float), dbias = empty({p.D}, ScalarType::Float);
  p.rstd = f32(rstd);
  p.dout = data(dout);
  p.dx = data(dx);
  p.dz = z ? data(dz) : nullptr;
  p.dweight = f32(dweight);
  p.dbias = f32(dbias);
  ssm::cpu::rmsnorm_backward(p);
  return {dx, dweight, dbias, dz};
}

}  // namespace
}  // namespace foldscan::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(foldscan, m) {
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? cu_seqlens, Tensor? "
      "initial_states, bool silu) -> Tensor");
  m.def(
      "causal_conv1d_backward(Tensor dout, Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? cu_seqlens, "
      "Tensor? initial_states, bool silu) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, Tensor? cache_seqlens, "
      "Tensor? slots, bool silu) -> Tensor");
  m.def(
      "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
      "bool softplus) -> (Tensor, Tensor)");
  m.def(
      "selective_scan_backward(Tensor dout, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? "
      "z, Tensor? delta_bias, bool softplus) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "rmsnorm(Tensor x, Tensor weight, Tensor? bias, Tensor? z, float eps, int group, bool before_gate) -> (Tensor, "
      "Tensor)");
  m.def(
      "rmsnorm_backward(Tensor dout, Tensor x, Tensor weight, Tensor? bias, Tensor? z, Tensor rstd, float eps, int "
      "group, bool before_gate) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(foldscan, CPU, m) {
  m.impl("causal_conv1d", TORCH_BOX(&foldscan::bindings::conv_forward));
  m.impl("causal_conv1d_backward", TORCH_BOX(&foldscan::bindings::conv_backward));
  m.impl("causal_conv1d_update", TORCH_BOX(&foldscan::bindings::conv_update));
  m.impl("selective_scan", TORCH_BOX(&foldscan::bindings::selective_scan));
  m.impl("selective_scan_backward", TORCH_BOX(&foldscan::bindings::selective_scan_backward));
  m.impl("rmsnorm", TORCH_BOX(&foldscan::bindings::rmsnorm));
  m.impl("rmsnorm_backward", TORCH_BOX(&foldscan::bindings::rmsnorm_backward));
}
