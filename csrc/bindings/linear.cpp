#include "linear/linear.h"

#include "bindings/common.h"

namespace foldscan::bindings {
namespace {

void check_matrix(const Tensor& t) { check(t.dim() == 2 && t.stride(1) == 1, "linear takes matrices with dense rows"); }

linear::Forward forward_params(const Tensor& x, int64_t M, int64_t N, int64_t K, const OptTensor& bias,
                               const Tensor& out) {
  check(!bias || bias->numel() == N, "linear: bias has the wrong length");
  return {.x = data(x),
          .weight = nullptr,
          .packed = nullptr,
          .bias = in_f32(bias),
          .out = data(out),
          .M = M,
          .N = N,
          .K = K,
          .x_stride = K,
          .weight_stride = 0,
          .x_type = dtype_of(x),
          .weight_type = dtype_of(x)};
}

Tensor linear_forward(const Tensor& x, const Tensor& weight, const OptTensor& bias) {
  check_matrix(x);
  check_matrix(weight);
  check(x.size(1) == weight.size(1), "linear: x and weight disagree in K");
  Tensor out = empty({x.size(0), weight.size(0)}, x.scalar_type());
  linear::Forward p = forward_params(x, x.size(0), weight.size(0), weight.size(1), bias, out);
  p.x_stride = x.stride(0);
  p.weight = data(weight);
  p.weight_stride = weight.stride(0);
  p.weight_type = dtype_of(weight);
  check(p.x_type == DType::kBF16 || p.weight_type == DType::kF32, "linear: an fp32 x needs an fp32 weight");
  linear::cpu::forward(p);
  return out;
}

Tensor linear_pack(const Tensor& weight, bool as_bf16) {
  check_matrix(weight);
  const DType type = as_bf16 ? DType::kBF16 : DType::kF32;
  int64_t bytes = 0;
  linear::cpu::packed_bytes({.N = weight.size(0), .K = weight.size(1), .type = type, .bytes = &bytes});
  Tensor packed = empty({bytes / element_size(type)}, type);
  linear::cpu::pack({.weight = data(weight),
                     .packed = data(packed),
                     .N = weight.size(0),
                     .K = weight.size(1),
                     .weight_stride = weight.stride(0),
                     .weight_type = dtype_of(weight),
                     .type = type});
  return packed;
}

// x of any number of dimensions; only a matrix may have gaps between its rows.
Tensor linear_packed(const Tensor& x, const Tensor& packed, int64_t N, int64_t K, const OptTensor& bias) {
  constexpr int64_t kMaxDims = 8;
  check(x.scalar_type() == packed.scalar_type(), "linear: the weight was packed for another dtype");
  int64_t bytes = 0;
  linear::cpu::packed_bytes({.N = N, .K = K, .type = dtype_of(packed), .bytes = &bytes});
  check(bytes == packed.numel() * element_size(dtype_of(packed)), "linear: the packed weight has another shape");
  const int64_t dims = x.dim();
  check(dims >= 1 && dims <= kMaxDims && x.size(dims - 1) == K, "linear: x and weight disagree in K");
  check(dims == 2 ? x.stride(1) == 1 : x.is_contiguous(), "linear: x is not dense");
  int64_t sizes[kMaxDims], M = 1;
  for (int64_t i = 0; i + 1 < dims; ++i) M *= sizes[i] = x.size(i);
  sizes[dims - 1] = N;
  Tensor out = empty(sizes, static_cast<size_t>(dims), x.scalar_type());
  linear::Forward p = forward_params(x, M, N, K, bias, out);
  if (dims == 2) p.x_stride = x.stride(0);
  p.packed = data(packed);
  linear::cpu::forward(p);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& dout, const Tensor& x, const Tensor& weight,
                                                   bool need_dx, bool need_dweight, bool need_dbias) {
  check_matrix(x);
  check_matrix(weight);
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0);
  check(dout.is_contiguous() && dout.dim() == 2 && dout.size(0) == M && dout.size(1) == N && weight.size(1) == K &&
            dout.scalar_type() == x.scalar_type(),
        "linear_backward: shapes or dtypes disagree");
  Tensor dx = empty({need_dx ? M : 0, K}, x.scalar_type());
  Tensor dweight = empty({need_dweight ? N : 0, K}, weight.scalar_type());
  Tensor dbias = empty({need_dbias ? N : 0}, ScalarType::Float);
  linear::cpu::backward({.dout = data(dout),
                         .x = data(x),
                         .weight = data(weight),
                         .dx = need_dx ? data(dx) : nullptr,
                         .dweight = need_dweight ? data(dweight) : nullptr,
                         .dbias = need_dbias ? f32(dbias) : nullptr,
                         .M = M,
                         .N = N,
                         .K = K,
                         .x_stride = x.stride(0),
                         .weight_stride = weight.stride(0),
                         .x_type = dtype_of(x),
                         .weight_type = dtype_of(weight)});
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace foldscan::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(foldscan, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("linear_pack(Tensor weight, bool as_bf16) -> Tensor");
  m.def("linear_packed(Tensor x, Tensor packed, int N, int K, Tensor? bias) -> Tensor");
  m.def(
      "linear_backward(Tensor dout, Tensor x, Tensor weight, bool need_dx, bool need_dweight, bool need_dbias) -> "
      "(Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(foldscan, CPU, m) {
  m.impl("linear", TORCH_BOX(&foldscan::bindings::linear_forward));
  m.impl("linear_pack", TORCH_BOX(&foldscan::bindings::linear_pack));
  m.impl("linear_packed", TORCH_BOX(&foldscan::bindings::linear_packed));
  m.impl("linear_backward", TORCH_BOX(&foldscan::bindings::linear_backward));
}
