#include "pruning/pruning.h"

#include "bindings/common.h"

namespace foldscan::bindings {
namespace {

void score_update(const Tensor& x, const Tensor& cu_seqlens, bool first, const Tensor& state) {
  check(x.dim() == 2 && x.stride(1) == 1, "score_update: x must be (tokens, channels) with dense rows");
  check(state.scalar_type() == ScalarType::Double && state.is_contiguous() && state.dim() == 2 &&
            state.size(0) == pruning::kStatistics && state.size(1) == x.size(1),
        "score_update: the state has another shape");
  pruning::ScoreUpdate p{.x = data(x),
                         .cu_seqlens = in_i32(cu_seqlens),
                         .state = static_cast<double*>(state.data_ptr()),
                         .n = cu_seqlens.numel() - 1,
                         .channels = x.size(1),
                         .x_row = x.stride(0),
                         .first = first,
                         .type = dtype_of(x)};
  check(p.n >= 0 && p.cu_seqlens[0] == 0 && p.cu_seqlens[p.n] == x.size(0), "argument cu_seqlens: wrong total");
  for (int64_t s = 0; s < p.n; ++s) check(p.cu_seqlens[s] <= p.cu_seqlens[s + 1], "argument cu_seqlens: decreases");
  pruning::cpu::score_update(p);
}

Tensor group_topk_mask(const Tensor& scores, const Tensor& groups, int64_t count, int64_t keep) {
  Tensor mask = empty({scores.numel()}, ScalarType::Bool);
  check(groups.numel() == scores.numel(), "group_topk_mask: scores and groups differ in length");
  pruning::GroupTopK p{.scores = in<double>(scores, ScalarType::Double),
                       .groups = in_i64(groups),
                       .mask = static_cast<bool*>(mask.data_ptr()),
                       .n = scores.numel(),
                       .count = count,
                       .keep = keep};
  for (int64_t i = 0; i < p.n; ++i)
    check(p.groups[i] >= 0 && p.groups[i] < count, "argument groups: a group number is out of range");
  pruning::cpu::group_topk(p);
  return mask;
}

Tensor sparsity_mask_2_4(const Tensor& scores, bool magnitude) {
  check(scores.dim() == 2 && scores.is_contiguous() && scores.size(1) % 4 == 0,
        "sparsity_mask_2_4: scores must be dense (rows, multiple of 4)");
  Tensor mask = empty({scores.size(0), scores.size(1)}, ScalarType::Bool);
  pruning::cpu::mask_2_4({.scores = data(scores),
                          .mask = static_cast<bool*>(mask.data_ptr()),
                          .rows = scores.size(0),
                          .cols = scores.size(1),
                          .magnitude = magnitude,
                          .type = dtype_of(scores)});
  return mask;
}

std::tuple<Tensor, Tensor> compress_2_4(const Tensor& weight, const Tensor& mask) {
  check(weight.dim() == 2 && weight.is_contiguous() && weight.size(1) % 4 == 0 && mask.is_contiguous() &&
            mask.numel() == weight.numel(),
        "compress_2_4: weight must be dense (out, multiple of 4), and mask alike");
  const int64_t N = weight.size(0), K = weight.size(1);
  const int64_t panels = ceil_div(N, pruning::kPanel);
  Tensor values = empty({panels, K / 2, pruning::kPanel}, weight.scalar_type());
  Tensor codes = empty({panels, ceil_div(K, 8), pruning::kPanel}, ScalarType::Byte);
  pruning::cpu::compress_2_4({.weight = data(weight),
                              .mask = in<bool>(mask, ScalarType::Bool),
                              .values = data(values),
                              .codes = static_cast<uint8_t*>(codes.data_ptr()),
                              .N = N,
                              .K = K,
                              .type = dtype_of(weight)});
  return {values, codes};
}

void check_compressed(const Tensor& values, const Tensor& codes, int64_t N) {
  check(values.dim() == 3 && values.is_contiguous() && values.size(1) % 2 == 0 && values.size(2) == pruning::kPanel &&
            values.size(0) == ceil_div(N, pruning::kPanel) && codes.dim() == 3 && codes.is_contiguous() &&
            codes.scalar_type() == ScalarType::Byte && codes.size(0) == values.size(0) &&
            codes.size(1) == ceil_div(values.size(1) * 2, 8) && codes.size(2) == pruning::kPanel,
        "linear_2_4: the compressed weight is malformed");
}

Tensor linear_2_4(const Tensor& x, const Tensor& values, const Tensor& codes, int64_t N, const OptTensor& bias) {
  check_compressed(values, codes, N);
  const int64_t K = values.size(1) * 2;
  check(x.dim() == 2 && x.stride(1) == 1 && x.size(1) == K, "linear_2_4: x must be (rows, in) with dense rows");
  check(!bias || bias->numel() == N, "linear_2_4: bias has the wrong length");
  check(dtype_of(x) == DType::kBF16 || dtype_of(values) == DType::kF32, "linear_2_4: an fp32 x needs fp32 values");
  Tensor out = empty({x.size(0), N}, x.scalar_type());
  pruning::cpu::linear_2_4({.x = data(x),
                            .values = data(values),
                            .codes = static_cast<const uint8_t*>(codes.data_ptr()),
                            .bias = in_f32(bias),
                            .out = data(out),
                            .M = x.size(0),
                            .N = N,
                            .K = K,
                            .x_row = x.stride(0),
                            .x_type = dtype_of(x),
                            .value_type = dtype_of(values)});
  return out;
}

std::tuple<Tensor, Tensor> linear_2_4_backward(const Tensor& dout, const Tensor& values, const Tensor& codes, int64_t N,
                                               bool need_dx, bool need_dbias) {
  check_compressed(values, codes, N);
  const int64_t K = values.size(1) * 2;
  check(dout.dim() == 2 && dout.is_contiguous() && dout.size(1) == N, "linear_2_4_backward: dout has another shape");
  check(dtype_of(dout) == DType::kBF16 || dtype_of(values) == DType::kF32, "linear_2_4_backward: dtypes disagree");
  Tensor dx = empty({need_dx ? dout.size(0) : 0, K}, dout.scalar_type());
  Tensor dbias = empty({need_dbias ? N : 0}, ScalarType::Float);
  pruning::cpu::linear_2_4_backward({.dout = data(dout),
                                     .values = data(values),
                                     .codes = static_cast<const uint8_t*>(codes.data_ptr()),
                                     .dx = need_dx ? data(dx) : nullptr,
                                     .dbias = need_dbias ? f32(dbias) : nullptr,
                                     .M = dout.size(0),
                                     .N = N,
                                     .K = K,
                                     .x_type = dtype_of(dout),
                                     .value_type = dtype_of(values)});
  return {dx, dbias};
}

}  // namespace
}  // namespace foldscan::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(foldscan, m) {
  m.def("score_update(Tensor x, Tensor cu_seqlens, bool first, Tensor(a!) state) -> ()");
  m.def("group_topk_mask(Tensor scores, Tensor groups, int count, int keep) -> Tensor");
  m.def("sparsity_mask_2_4(Tensor scores, bool magnitude) -> Tensor");
  m.def("compress_2_4(Tensor weight, Tensor mask) -> (Tensor, Tensor)");
  m.def("linear_2_4(Tensor x, Tensor values, Tensor codes, int out_features, Tensor? bias) -> Tensor");
  m.def(
      "linear_2_4_backward(Tensor dout, Tensor values, Tensor codes, int out_features, bool need_dx, "
      "bool need_dbias) -> "
      "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(foldscan, CPU, m) {
  m.impl("score_update", TORCH_BOX(&foldscan::bindings::score_update));
  m.impl("group_topk_mask", TORCH_BOX(&foldscan::bindings::group_topk_mask));
  m.impl("sparsity_mask_2_4", TORCH_BOX(&foldscan::bindings::sparsity_mask_2_4));
  m.impl("compress_2_4", TORCH_BOX(&foldscan::bindings::compress_2_4));
  m.impl("linear_2_4", TORCH_BOX(&foldscan::bindings::linear_2_4));
  m.impl("linear_2_4_backward", TORCH_BOX(&foldscan::bindings::linear_2_4_backward));
}
