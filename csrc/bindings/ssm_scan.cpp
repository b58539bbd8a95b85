// Mamba-2 scan: forward, backward, cached extension, one-step update.
#include "bindings/common.h"
#include "ssm/ssm.h"

namespace foldscan::bindings {
namespace {

// (tokens, heads, width) or (rows, length, heads, width) with dense tokens: the stride from token to token.
int64_t token_stride(const Tensor& t, int64_t heads, int64_t width, int64_t tokens) {
  const int64_t n = t.dim();
  check((n == 3 || n == 4) && t.size(n - 1) == width && t.size(n - 2) == heads && t.numel() == tokens * heads * width,
        "ssm: a token tensor has the wrong shape");
  if (t.numel() == 0) return heads * width;
  check((width == 1 || t.stride(n - 1) == 1) && (heads == 1 || t.stride(n - 2) == width),
        "ssm: tokens must be dense in their last two dimensions");
  const int64_t stride = t.size(n - 3) == 1 && n == 4 ? t.stride(0) : t.stride(n - 3);
  check(n == 3 || t.size(0) == 1 || t.size(1) == 1 || t.stride(0) == t.size(1) * t.stride(1),
        "ssm: rows must follow each other");
  return stride;
}

ssm::ScanInputs scan_inputs(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                            const OptTensor& D, const OptTensor& z, const OptTensor& dt_bias, bool softplus,
                            double dt_min, double dt_max) {
  const int64_t n = x.dim();
  const int64_t P = x.size(n - 1), H = x.size(n - 2), G = B.size(B.dim() - 2), N = B.size(B.dim() - 1);
  const int64_t tokens = H * P > 0 ? x.numel() / (H * P) : 0;
  check(dt.numel() == tokens * H && A.numel() == H && G > 0 && H % G == 0, "scan: shapes disagree");
  check(!D || D->numel() == H || D->numel() == H * P, "scan: D has the wrong shape");
  check(!dt_bias || dt_bias->numel() == H, "scan: dt_bias has the wrong shape");
  check(B.scalar_type() == x.scalar_type() && C.scalar_type() == x.scalar_type() &&
            (!z || z->scalar_type() == x.scalar_type()),
        "scan: x, B, C and z must have one dtype");
  return {.x = data(x),
          .B = data(B),
          .C = data(C),
          .z = data(z),
          .x_stride = token_stride(x, H, P, tokens),
          .B_stride = token_stride(B, G, N, tokens),
          .C_stride = token_stride(C, G, N, tokens),
          .z_stride = z ? token_stride(*z, H, P, tokens) : 0,
          .dt = in_f32(dt),
          .A = in_f32(A),
          .D = in_f32(D),
          .dt_bias = in_f32(dt_bias),
          .D_per_channel = D && D->dim() == 2,
          .softplus = softplus,
          .dt_min = static_cast<float>(dt_min),
          .dt_max = static_cast<float>(dt_max),
          .H = H,
          .P = P,
          .G = G,
          .N = N,
          .type = dtype_of(x)};
}

ssm::Sequences sequences(const Tensor& x, const OptTensor& seq_idx, const OptTensor& cu_seqlens) {
  check(x.dim() == 4, "scan: x must be (rows, length, heads, channels)");
  check(!seq_idx || seq_idx->numel() == x.size(0) * x.size(1), "scan: seq_idx has the wrong shape");
  check(!cu_seqlens || x.size(0) == 1, "scan: cu_seqlens takes one row");
  return {.rows = x.size(0),
          .length = x.size(1),
          .seq_idx = in_i32(seq_idx),
          .cu_seqlens = in_i32(cu_seqlens),
          .count = cu_seqlens ? cu_seqlens->numel() - 1 : 0};
}

int64_t state_rows(const ssm::Sequences& s) { return s.cu_seqlens ? s.count : s.rows; }

void check_states(const OptTensor& states, const ssm::Sequences& s, const ssm::ScanInputs& in) {
  check(!states || states->numel() == state_rows(s) * in.H * in.P * in.N, "scan: states have the wrong shape");
}

std::tuple<Tensor, Tensor> scan_forward(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                                        const Tensor& C, const OptTensor& D, const OptTensor& z,
                                        const OptTensor& dt_bias, const OptTensor& initial_states,
                                        const OptTensor& seq_idx, const OptTensor& cu_seqlens, bool softplus,
                                        double dt_min, double dt_max, bool final_states) {
  const ssm::ScanInputs in = scan_inputs(x, dt, A, B, C, D, z, dt_bias, softplus, dt_min, dt_max);
  const ssm::Sequences s = sequences(x, seq_idx, cu_seqlens);
  check_states(initial_states, s, in);
  Tensor out = empty({x.size(0), x.size(1), in.H, in.P}, x.scalar_type());
  Tensor final = empty({final_states ? state_rows(s) : 0, in.H, in.P, in.N}, ScalarType::Float);
  ssm::cpu::scan_forward({.in = in,
                          .seqs = s,
                          .initial_states = in_f32(initial_states),
                          .final_states = final_states ? f32(final) : nullptr,
                          .out = data(out)});
  return {out, final};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_backward(
    const Tensor& dout, const OptTensor& dfinal_states, const Tensor& x, const Tensor& dt, const Tensor& A,
    const Tensor& B, const Tensor& C, const OptTensor& D, const OptTensor& z, const OptTensor& dt_bias,
    const OptTensor& initial_states, const OptTensor& seq_idx, const OptTensor& cu_seqlens, bool softplus,
    double dt_min, double dt_max) {
  const ssm::ScanInputs in = scan_inputs(x, dt, A, B, C, D, z, dt_bias, softplus, dt_min, dt_max);
  const ssm::Sequences s = sequences(x, seq_idx, cu_seqlens);
  check_states(initial_states, s, in);
  check_states(dfinal_states, s, in);
  check(dout.is_contiguous() && dout.numel() == x.numel() && dout.scalar_type() == x.scalar_type(),
        "scan: dout has the wrong shape or dtype");
  const int64_t rows = x.size(0), length = x.size(1);
  Tensor dx = empty({rows, length, in.H, in.P}, x.scalar_type());
  Tensor ddt = empty({rows, length, in.H}, ScalarType::Float);
  Tensor dA = empty({in.H}, ScalarType::Float);
  Tensor dB = empty({rows, length, in.G, in.N}, x.scalar_type());
  Tensor dC = empty({rows, length, in.G, in.N}, x.scalar_type());
  Tensor dD = empty({D ? in.H : 0, in.P}, ScalarType::Float);
  Tensor dz = empty({z ? rows : 0, length, in.H, in.P}, x.scalar_type());
  Tensor dbias = empty({in.H}, ScalarType::Float);
  Tensor dinitial = empty({initial_states ? state_rows(s) : 0, in.H, in.P, in.N}, ScalarType::Float);
  // Rows of initial states that no token reads (seq_idx, empty rows) get a zero gradient.
  torch::stable::zero_(dinitial);
  ssm::cpu::scan_backward({.in = in,
                           .seqs = s,
                           .initial_states = in_f32(initial_states),
                           .dout = data(dout),
                           .dfinal_states = in_f32(dfinal_states),
                           .dx = data(dx),
                           .ddt = f32(ddt),
                           .dB = data(dB),
                           .dC = data(dC),
                           .dz = z ? data(dz) : nullptr,
                           .dA = f32(dA),
                           .dD = D ? f32(dD) : nullptr,
                           .ddt_bias = f32(dbias),
                           .dinitial_states = initial_states ? f32(dinitial) : nullptr});
  return {dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial};
}

Tensor scan_extend(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                   const OptTensor& D, const OptTensor& z, const OptTensor& dt_bias, bool softplus, double dt_min,
                   double dt_max, Tensor state, Tensor x_rows, Tensor B_rows, Tensor dt_rows, const Tensor& slots,
                   const Tensor& positions, const Tensor& cu_seqlens) {
  const ssm::ScanInputs in = scan_inputs(x, dt, A, B, C, D, z, dt_bias, softplus, dt_min, dt_max);
  const int64_t count = slots.numel(), n = state.size(0);
  check(positions.numel() == count && cu_seqlens.numel() == count + 1, "scan: slots, positions, cu_seqlens disagree");
  check(state.is_contiguous() && x_rows.is_contiguous() && B_rows.is_contiguous() && dt_rows.is_contiguous() &&
            state.numel() == n * in.H * in.N * ((in.P + ssm::kStatePad - 1) / ssm::kStatePad * ssm::kStatePad) &&
            x_rows.numel() == n * ssm::kChunk * in.H * in.P && B_rows.numel() == n * ssm::kChunk * in.G * in.N &&
            dt_rows.numel() == n * ssm::kChunk * in.H && x_rows.scalar_type() == x.scalar_type() &&
            B_rows.scalar_type() == x.scalar_type(),
        "scan: the cache does not fit the inputs");
  const int32_t *slot = in_i32(slots), *seqlens = in_i32(cu_seqlens);
  for (int64_t i = 0; i < count; ++i)
    check(slot[i] >= 0 && slot[i] < n && seqlens[i] <= seqlens[i + 1], "scan: a slot or length is out of range");
  check(count == 0 || (seqlens[0] == 0 && seqlens[count] * in.H == dt.numel()), "scan: cu_seqlens do not cover x");
  Tensor out = empty({x.size(0), in.H, in.P}, x.scalar_type());
  ssm::cpu::scan_extend({.in = in,
                         .cu_seqlens = seqlens,
                         .slots = slot,
                         .positions = in_i32(positions),
                         .count = count,
                         .state = f32(state),
                         .x_rows = data(x_rows),
                         .B_rows = data(B_rows),
                         .dt_rows = f32(dt_rows),
                         .out = data(out)});
  return out;
}

Tensor state_update(Tensor state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                    const OptTensor& D, const OptTensor& z, const OptTensor& dt_bias, bool softplus,
                    const OptTensor& slots) {
  check(state.dim() == 4 && x.dim() == 3 && dt.dim() == 3 && A.dim() == 3 && B.dim() == 3 && C.dim() == 3,
        "state_update: wrong number of dimensions");
  const int64_t batch = x.size(0), H = x.size(1), P = x.size(2), G = B.size(1), N = B.size(2);
  check(state.is_contiguous() && x.is_contiguous() && B.is_contiguous() && C.is_contiguous() &&
            (!z || z->is_contiguous()) && state.size(1) == H && state.size(2) == P && state.size(3) == N &&
            A.size(0) == H && A.size(1) == P && A.size(2) == N && dt.size(0) == batch && dt.size(1) == H &&
            dt.size(2) == P && H % G == 0 && B.size(0) == batch && C.numel() == B.numel(),
        "state_update: shapes disagree");
  check(!D || (D->dim() == 2 && D->size(0) == H && D->size(1) == P), "state_update: D has the wrong shape");
  check(!dt_bias || (dt_bias->dim() == 2 && dt_bias->size(0) == H && dt_bias->size(1) == P),
        "state_update: dt_bias has the wrong shape");
  check(B.scalar_type() == x.scalar_type() && C.scalar_type() == x.scalar_type() &&
            (!z || z->scalar_type() == x.scalar_type()) && dt.scalar_type() == ScalarType::Float &&
            A.scalar_type() == ScalarType::Float,
        "state_update: wrong dtypes");
  const int32_t* slot = in_i32(slots);
  check(slots ? slots->numel() == batch : state.size(0) == batch, "state_update: one state row for each sequence");
  for (int64_t i = 0; slot && i < batch; ++i) check(slot[i] < state.size(0), "state_update: a slot is out of range");
  Tensor out = empty({batch, H, P}, x.scalar_type());
  ssm::cpu::state_update({.state = data(state),
                          .x = data(x),
                          .z = data(z),
                          .dt = f32(dt),
                          .A = f32(A),
                          .B = data(B),
                          .C = data(C),
                          .D = f32(D),
                          .dt_bias = f32(dt_bias),
                          .slots = slot,
                          .out = data(out),
                          .batch = batch,
                          .H = H,
                          .P = P,
                          .G = G,
                          .N = N,
                          .dt_strides = {dt.stride(0), dt.stride(1), dt.stride(2)},
                          .A_strides = {A.stride(0), A.stride(1), A.stride(2)},
                          .D_strides = {D ? D->stride(0) : 0, D ? D->stride(1) : 0},
                          .bias_strides = {dt_bias ? dt_bias->stride(0) : 0, dt_bias ? dt_bias->stride(1) : 0},
                          .softplus = softplus,
                          .type = dtype_of(x),
                          .state_type = dtype_of(state)});
  return out;
}

}  // namespace
}  // namespace foldscan::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(foldscan, m) {
  m.def(
      "scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? "
      "initial_states, Tensor? seq_idx, Tensor? cu_seqlens, bool softplus, float dt_min, float dt_max, bool "
      "final_states) -> (Tensor, Tensor)");
  m.def(
      "scan_backward(Tensor dout, Tensor? dfinal_states, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
      "Tensor? z, Tensor? dt_bias, Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens, bool softplus, float "
      "dt_min, float dt_max) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "scan_extend(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool "
      "softplus, float dt_min, float dt_max, Tensor(a!) state, Tensor(b!) x_rows, Tensor(c!) B_rows, Tensor(d!) "
      "dt_rows, Tensor slots, Tensor positions, Tensor cu_seqlens) -> Tensor");
  m.def(
      "state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? "
      "dt_bias, bool softplus, Tensor? slots) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(foldscan, CPU, m) {
  m.impl("scan", TORCH_BOX(&foldscan::bindings::scan_forward));
  m.impl("scan_backward", TORCH_BOX(&foldscan::bindings::scan_backward));
  m.impl("scan_extend", TORCH_BOX(&foldscan::bindings::scan_extend));
  m.impl("state_update", TORCH_BOX(&foldscan::bindings::state_update));
}
