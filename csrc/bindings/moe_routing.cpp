// Routing, sorting and permuting of Mixture-of-Experts layers.
#include "moe/moe.h"

#include "bindings/moe_checks.h"

namespace foldscan::bindings {
namespace {

moe::RouteMode route_mode(int64_t E, int64_t k, bool sigmoid, bool pre_softmax, int64_t num_groups, int64_t groups_topk,
                          double scaling, bool normalize) {
  check(num_groups > 0 && E % num_groups == 0 && groups_topk > 0 && groups_topk <= num_groups && k > 0 &&
            k <= groups_topk * (E / num_groups),
        "topk_route: k, num_groups and groups_topk do not fit the experts");
  return {.num_groups = num_groups,
          .groups_topk = groups_topk,
          .scaling = static_cast<float>(scaling),
          .sigmoid = sigmoid,
          .pre_softmax = pre_softmax,
          .normalize = normalize};
}

std::tuple<Tensor, Tensor> moe_route(const Tensor& logits, const OptTensor& bias, int64_t k, bool sigmoid,
                                     bool pre_softmax, int64_t num_groups, int64_t groups_topk, double scaling,
                                     bool normalize) {
  check_dense(logits, 2);
  const int64_t T = logits.size(0), E = logits.size(1);
  check(!bias || bias->numel() == E, "topk_route: bias has the wrong length");
  const moe::RouteMode mode = route_mode(E, k, sigmoid, pre_softmax, num_groups, groups_topk, scaling, normalize);
  Tensor probs = empty({T, k}, ScalarType::Float), experts = empty({T, k}, ScalarType::Long);
  moe::cpu::route({.logits = in_f32(logits),
                   .bias = in_f32(bias),
                   .probs = f32(probs),
                   .experts = static_cast<int64_t*>(data(experts)),
                   .T = T,
                   .E = E,
                   .k = k,
                   .mode = mode});
  return {probs, experts};
}

Tensor moe_route_backward(const Tensor& dprobs, const Tensor& logits, const Tensor& experts, bool sigmoid,
                          bool pre_softmax, double scaling, bool normalize) {
  check_dense(logits, 2);
  check_dense(experts, 2);
  const int64_t T = logits.size(0), E = logits.size(1), k = experts.size(1);
  check(experts.size(0) == T && dprobs.numel() == T * k, "moe_route_backward: shapes disagree");
  for (int64_t i = 0; i < T * k; ++i)
    check(in_i64(experts)[i] >= 0 && in_i64(experts)[i] < E, "experts: an index is out of range");
  Tensor dlogits = empty({T, E}, ScalarType::Float);
  moe::cpu::route_backward({.logits = in_f32(logits),
                            .experts = in_i64(experts),
                            .dprobs = in_f32(dprobs),
                            .dlogits = f32(dlogits),
                            .T = T,
                            .E = E,
                            .k = k,
                            .mode = route_mode(E, k, sigmoid, pre_softmax, 1, 1, scaling, normalize)});
  return dlogits;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_sort(const Tensor& experts, const OptTensor& probs, int64_t num_experts,
                                                    int64_t capacity, bool by_position, bool pad) {
  const int64_t n = experts.numel(), E = num_experts;
  const int64_t* ids = in_i64(experts);
  check(E > 0 && capacity >= -1 && (!pad || capacity >= 0), "moe_sort: bad capacity");
  check(!probs || probs->numel() == n, "moe_sort: probs and experts disagree");
  check(capacity < 0 || by_position || probs, "moe_sort: dropping by probability needs probs");
  check_experts(ids, n, E);
  const int64_t R = pad ? E * capacity : capacity < 0 ? n : imin(n, E * capacity);
  check(R <= INT32_MAX, "moe_sort: more rows than int32 offsets can count");
  Tensor rows = empty({R}, ScalarType::Long), inverse = empty({n}, ScalarType::Long);
  Tensor counts = empty({E}, ScalarType::Long), offs = empty({E}, ScalarType::Int);
  moe::cpu::sort({.experts = ids,
                  .probs = in_f32(probs),
                  .rows = static_cast<int64_t*>(data(rows)),
                  .inverse = static_cast<int64_t*>(data(inverse)),
                  .counts = static_cast<int64_t*>(data(counts)),
                  .offs = static_cast<int32_t*>(data(offs)),
                  .n = n,
                  .E = E,
                  .R = R,
                  .capacity = capacity,
                  .by_position = by_position,
                  .pad = pad});
  return {rows, inverse, counts, offs};
}

void check_below(const Tensor& index, int64_t limit) {
  const int64_t* p = in_i64(index);
  for (int64_t i = 0; i < index.numel(); ++i) check(p[i] >= -1 && p[i] < limit, "moe: a row index is out of range");
}

// `inverse` is what backward needs.
Tensor moe_gather(const Tensor& tokens, const Tensor& rows, const Tensor& inverse, int64_t k) {
  check_dense(tokens, 2);
  check(k > 0 && inverse.numel() == tokens.size(0) * k, "moe_gather: tokens and permutation disagree");
  check_below(rows, tokens.size(0) * k);
  Tensor out = empty({rows.numel(), tokens.size(1)}, tokens.scalar_type());
  moe::cpu::gather({.tokens = data(tokens),
                    .rows = in_i64(rows),
                    .out = data(out),
                    .R = rows.numel(),
                    .k = k,
                    .H = tokens.size(1),
                    .type = dtype_of(tokens)});
  return out;
}

Tensor moe_combine(const Tensor& permuted, const Tensor& rows, const Tensor& inverse, const OptTensor& probs) {
  check_dense(permuted, 2);
  check_dense(inverse, 2);
  check(rows.numel() == permuted.size(0), "moe_combine: rows and permuted disagree");
  check(!probs || probs->numel() == inverse.numel(), "moe_combine: probs and permutation disagree");
  check_below(inverse, permuted.size(0));
  Tensor out = empty({inverse.size(0), permuted.size(1)}, permuted.scalar_type());
  moe::cpu::combine({.permuted = data(permuted),
                     .inverse = in_i64(inverse),
                     .probs = in_f32(probs),
                     .out = data(out),
                     .T = inverse.size(0),
                     .k = inverse.size(1),
                     .H = permuted.size(1),
                     .type = dtype_of(permuted)});
  return out;
}

std::tuple<Tensor, Tensor> moe_combine_backward(const Tensor& dout, const Tensor& permuted, const Tensor& rows,
                                                const Tensor& inverse, const OptTensor& probs, bool need_permuted,
                                                bool need_probs) {
  check_dense(dout, 2);
  check_dense(permuted, 2);
  check_dense(inverse, 2);
  const int64_t R = permuted.size(0), T = inverse.size(0), k = inverse.size(1), H = permuted.size(1);
  check(dout.size(0) == T && dout.size(1) == H && dout.scalar_type() == permuted.scalar_type() && rows.numel() == R,
        "moe_combine_backward: shapes or dtypes disagree");
  check(!probs || probs->numel() == T * k, "moe_combine_backward: probs and permutation disagree");
  check_below(inverse, R);
  check_below(rows, T * k);
  Tensor dpermuted = empty({need_permuted ? R : 0, H}, permuted.scalar_type());
  Tensor dprobs = empty({need_probs ? T : 0, k}, ScalarType::Float);
  moe::cpu::combine_backward({.dout = data(dout),
                              .permuted = data(permuted),
                              .rows = in_i64(rows),
                              .inverse = in_i64(inverse),
                              .probs = in_f32(probs),
                              .dpermuted = need_permuted ? data(dpermuted) : nullptr,
                              .dprobs = need_probs ? f32(dprobs) : nullptr,
                              .R = R,
                              .T = T,
                              .k = k,
                              .H = H,
                              .type = dtype_of(permuted)});
  return {dpermuted, dprobs};
}

}  // namespace
}  // namespace foldscan::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(foldscan, m) {
  m.def(
      "moe_route(Tensor logits, Tensor? bias, int k, bool sigmoid, bool pre_softmax, int num_groups, int groups_topk, "
      "float scaling, bool normalize) -> (Tensor, Tensor)");
  m.def(
      "moe_route_backward(Tensor dprobs, Tensor logits, Tensor experts, bool sigmoid, bool pre_softmax, float scaling, "
      "bool normalize) -> Tensor");
  m.def(
      "moe_sort(Tensor experts, Tensor? probs, int num_experts, int capacity, bool by_position, bool pad) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def("moe_gather(Tensor tokens, Tensor rows, Tensor inverse, int k) -> Tensor");
  m.def("moe_combine(Tensor permuted, Tensor rows, Tensor inverse, Tensor? probs) -> Tensor");
  m.def(
      "moe_combine_backward(Tensor dout, Tensor permuted, Tensor rows, Tensor inverse, Tensor? probs, "
      "bool need_permuted, bool need_probs) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(foldscan, CPU, m) {
  m.impl("moe_route", TORCH_BOX(&foldscan::bindings::moe_route));
  m.impl("moe_route_backward", TORCH_BOX(&foldscan::bindings::moe_route_backward));
  m.impl("moe_sort", TORCH_BOX(&foldscan::bindings::moe_sort));
  m.impl("moe_gather", TORCH_BOX(&foldscan::bindings::moe_gather));
  m.impl("moe_combine", TORCH_BOX(&foldscan::bindings::moe_combine));
  m.impl("moe_combine_backward", TORCH_BOX(&foldscan::bindings::moe_combine_backward));
}
