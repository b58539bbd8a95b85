#include "losses/losses.h"

#include "bindings/common.h"
#include "linear/linear.h"

namespace foldscan::bindings {
namespace {

void check_rows(const Tensor& t) { check(t.dim() == 2 && t.stride(1) == 1, "losses take matrices with dense rows"); }

int64_t packed_elements(int64_t N, int64_t K, DType type) {
  int64_t bytes = 0;
  linear::cpu::packed_bytes({.N = N, .K = K, .type = type, .bytes = &bytes});
  return bytes / element_size(type);
}

losses::Head head_of(const Tensor& hidden, const Tensor& weight, const OptTensor& bias, double temperature,
                     double softcap) {
  check_rows(hidden);
  check_rows(weight);
  check(hidden.size(1) == weight.size(1), "losses: hidden and weight disagree in H");
  check(!bias || bias->numel() == weight.size(0), "losses: bias has the wrong length");
  check(dtype_of(hidden) == DType::kBF16 || dtype_of(weight) == DType::kF32,
        "losses: an fp32 hidden needs an fp32 weight");
  check(temperature > 0.0 && softcap >= 0.0, "losses: want temperature > 0 and softcap >= 0");
  return {.hidden = data(hidden),
          .weight = data(weight),
          .packed = nullptr,
          .bias = in_f32(bias),
          .H = hidden.size(1),
          .hidden_stride = hidden.stride(0),
          .weight_stride = weight.stride(0),
          .type = dtype_of(hidden),
          .weight_type = dtype_of(weight),
          .inv_temperature = static_cast<float>(1.0 / temperature),
          .softcap = static_cast<float>(softcap)};
}

const int64_t* check_targets(const Tensor& targets, int64_t N, int64_t V, int64_t ignore_index) {
  const int64_t* t = in_i64(targets);
  check(targets.numel() == N, "targets: want one a row of hidden");
  for (int64_t i = 0; i < N; ++i)
    check(t[i] == ignore_index || (t[i] >= 0 && t[i] < V), "targets: a label is out of range");
  return t;
}

const float* per_row(const Tensor& t, int64_t N) {
  check(t.numel() == N, "losses: want one value a row");
  return in_f32(t);
}

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

FiveTensors run_stats(const losses::Head& head, const Tensor& targets, int64_t N, int64_t V, int64_t ignore_index,
                      bool moments) {
  const ScalarType f = ScalarType::Float;
  Tensor logp = empty({N}, f), entropy = empty({N}, f), varentropy = empty({N}, f), lse = empty({N}, f);
  Tensor zsum = empty({N}, f);
  losses::cpu::stats({.head = head,
                      .targets = check_targets(targets, N, V, ignore_index),
                      .logp = f32(logp),
                      .lse = f32(lse),
                      .entropy = f32(entropy),
                      .varentropy = f32(varentropy),
                      .zsum = f32(zsum),
                      .N = N,
                      .V = V,
                      .ignore_index = ignore_index,
                      .moments = moments});
  return {logp, entropy, varentropy, lse, zsum};
}

FiveTensors linear_stats(const Tensor& hidden, const Tensor& weight, const Tensor& targets, const OptTensor& bias,
                         double temperature, double softcap, int64_t ignore_index, bool moments) {
  return run_stats(head_of(hidden, weight, bias, temperature, softcap), targets, hidden.size(0), weight.size(0),
                   ignore_index, moments);
}

FiveTensors linear_stats_packed(const Tensor& hidden, const Tensor& packed, int64_t V, const Tensor& targets,
                                const OptTensor& bias, double temperature, double softcap, int64_t ignore_index,
                                bool moments) {
  check_rows(hidden);
  const DType type = dtype_of(hidden);
  const int64_t H = hidden.size(1);
  check(packed.scalar_type() == hidden.scalar_type() && packed.is_contiguous() &&
            packed.numel() == packed_elements(V, H, type),
        "losses: the packed weight has another shape or dtype");
  check(!bias || bias->numel() == V, "losses: bias has the wrong length");
  check(temperature > 0.0 && softcap >= 0.0, "losses: want temperature > 0 and softcap >= 0");
  return run_stats({.hidden = data(hidden),
                    .weight = nullptr,
                    .packed = data(packed),
                    .bias = in_f32(bias),
                    .H = H,
                    .hidden_stride = hidden.stride(0),
                    .weight_stride = 0,
                    .type = type,
                    .weight_type = type,
                    .inv_temperature = static_cast<float>(1.0 / temperature),
                    .softcap = static_cast<float>(softcap)},
                   targets, hidden.size(0), V, ignore_index, moments);
}

// The results and workspaces of a head's gradient.
struct Gradient {
  Tensor dhidden, dweight, dbias, dlogits, dh, x_packed;
  losses::HeadGradient raw;

  Gradient(const losses::Head& head, int64_t N, int64_t V, bool need_hidden, bool need_weight, bool need_bias)
      : dhidden(empty({need_hidden ? N : 0, head.H}, head.type)),
        dweight(empty({need_weight ? V : 0, head.H}, head.weight_type)),
        dbias(empty({need_bias ? V : 0}, ScalarType::Float)),
        dlogits(empty({N, losses::wave_stride(N, V, head.type)}, head.type)),
        dh(empty({need_hidden ? N : 0, head.H}, ScalarType::Float)),
        x_packed(empty({need_weight ? packed_elements(head.H, N, head.type) : 0}, head.type)),
        raw{.dhidden = need_hidden ? data(dhidden) : nullptr,
            .dweight = need_weight ? data(dweight) : nullptr,
            .dbias = need_bias ? f32(dbias) : nullptr,
            .dlogits = data(dlogits),
            .dh = f32(dh),
            .x_packed = data(x_packed)} {}
};

std::tuple<Tensor, Tensor, Tensor> linear_stats_backward(
    const Tensor& dlogp, const Tensor& dentropy, const Tensor& dvarentropy, const Tensor& dlse, const Tensor& dzsum,
    const Tensor& hidden, const Tensor& weight, const Tensor& targets, const OptTensor& bias, const Tensor& logp,
    const Tensor& entropy, const Tensor& varentropy, const Tensor& lse, double temperature, double softcap,
    int64_t ignore_index, bool need_hidden, bool need_weight, bool need_bias) {
  const losses::Head head = head_of(hidden, weight, bias, temperature, softcap);
  const int64_t N = hidden.size(0), V = weight.size(0);
  const int64_t* labels = check_targets(targets, N, V, ignore_index);
  Gradient grad(head, N, V, need_hidden, need_weight, need_bias);
  losses::cpu::stats_backward({.head = head,
                               .grad = grad.raw,
                               .targets = labels,
                               .logp = per_row(logp, N),
                               .lse = per_row(lse, N),
                               .entropy = per_row(entropy, N),
                               .varentropy = per_row(varentropy, N),
                               .dlogp = per_row(dlogp, N),
                               .dlse = per_row(dlse, N),
                               .dentropy = per_row(dentropy, N),
                               .dvarentropy = per_row(dvarentropy, N),
                               .dzsum = per_row(dzsum, N),
                               .N = N,
                               .V = V,
                               .ignore_index = ignore_index});
  return {grad.dhidden, grad.dweight, grad.dbias};
}

const uint8_t* mask_of(const OptTensor& mask, int64_t N) {
  if (!mask) return nullptr;
  check(mask->numel() == N, "mask: want one value a row");
  return in<uint8_t>(*mask, ScalarType::Bool);
}

losses::Divergence divergence_of(int64_t d, double beta) {
  check(d >= 0 && d <= 2 && beta > 0.0 && beta < 1.0, "linear_kl: unknown divergence or beta outside (0, 1)");
  return static_cast<losses::Divergence>(d);
}

void check_pair(const Tensor& hidden, const Tensor& weight, const Tensor& teacher_hidden,
                const Tensor& teacher_weight) {
  check(hidden.size(0) == teacher_hidden.size(0) && weight.size(0) == teacher_weight.size(0) &&
            hidden.scalar_type() == teacher_hidden.scalar_type(),
        "linear_kl: student and teacher disagree in rows, vocabulary or dtype");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_kl(const Tensor& hidden, const Tensor& weight,
                                                     const Tensor& teacher_hidden, const Tensor& teacher_weight,
                                                     const OptTensor& mask, int64_t divergence, double beta,
                                                     double temperature) {
  const losses::Head student = head_of(hidden, weight, std::nullopt, temperature, 0.0);
  const losses::Head teacher = head_of(teacher_hidden, teacher_weight, std::nullopt, temperature, 0.0);
  check_pair(hidden, weight, teacher_hidden, teacher_weight);
  const int64_t N = hidden.size(0);
  const ScalarType f = ScalarType::Float;
  Tensor value = empty({N}, f), lse_student = empty({N}, f), lse_teacher = empty({N}, f), inner = empty({N}, f);
  losses::cpu::kl({.student = student,
                   .teacher = teacher,
                   .mask = mask_of(mask, N),
                   .value = f32(value),
                   .lse_student = f32(lse_student),
                   .lse_teacher = f32(lse_teacher),
                   .inner = f32(inner),
                   .N = N,
                   .V = weight.size(0),
                   .divergence = divergence_of(divergence, beta),
                   .beta = static_cast<float>(beta)});
  return {value, lse_student, lse_teacher, inner};
}

std::tuple<Tensor, Tensor> linear_kl_backward(const Tensor& dvalue, const Tensor& hidden, const Tensor& weight,
                                              const Tensor& teacher_hidden, const Tensor& teacher_weight,
                                              const OptTensor& mask, const Tensor& lse_student,
                                              const Tensor& lse_teacher, const Tensor& inner, int64_t divergence,
                                              double beta, double temperature, bool need_hidden, bool need_weight) {
  const losses::Head student = head_of(hidden, weight, std::nullopt, temperature, 0.0);
  const losses::Head teacher = head_of(teacher_hidden, teacher_weight, std::nullopt, temperature, 0.0);
  check_pair(hidden, weight, teacher_hidden, teacher_weight);
  const int64_t N = hidden.size(0), V = weight.size(0);
  Gradient grad(student, N, V, need_hidden, need_weight, false);
  losses::cpu::kl_backward({.student = student,
                            .teacher = teacher,
                            .grad = grad.raw,
                            .mask = mask_of(mask, N),
                            .dvalue = per_row(dvalue, N),
                            .lse_student = per_row(lse_student, N),
                            .lse_teacher = per_row(lse_teacher, N),
                            .inner = per_row(inner, N),
                            .N = N,
                            .V = V,
                            .divergence = divergence_of(divergence, beta),
                            .beta = static_cast<float>(beta)});
  return {grad.dhidden, grad.dweight};
}

}  // namespace
}  // namespace foldscan::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(foldscan, m) {
  m.def(
      "linear_stats(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, float temperature, float softcap, "
      "int ignore_index, bool moments) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_stats_packed(Tensor hidden, Tensor packed, int V, Tensor targets, Tensor? bias, float temperature, "
      "float softcap, int ignore_index, bool moments) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_stats_backward(Tensor dlogp, Tensor dentropy, Tensor dvarentropy, Tensor dlse, Tensor dzsum, "
      "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor logp, Tensor entropy, Tensor varentropy, "
      "Tensor lse, float temperature, float softcap, int ignore_index, bool need_hidden, bool need_weight, "
      "bool need_bias) -> (Tensor, Tensor, Tensor)");
  m.def(
      "linear_kl(Tensor hidden, Tensor weight, Tensor teacher_hidden, Tensor teacher_weight, Tensor? mask, "
      "int divergence, float beta, float temperature) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_kl_backward(Tensor dvalue, Tensor hidden, Tensor weight, Tensor teacher_hidden, Tensor teacher_weight, "
      "Tensor? mask, Tensor lse_student, Tensor lse_teacher, Tensor inner, int divergence, float beta, "
      "float temperature, bool need_hidden, bool need_weight) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(foldscan, CPU, m) {
  m.impl("linear_stats", TORCH_BOX(&foldscan::bindings::linear_stats));
  m.impl("linear_stats_packed", TORCH_BOX(&foldscan::bindings::linear_stats_packed));
  m.impl("linear_stats_backward", TORCH_BOX(&foldscan::bindings::linear_stats_backward));
  m.impl("linear_kl", TORCH_BOX(&foldscan::bindings::linear_kl));
  m.impl("linear_kl_backward", TORCH_BOX(&foldscan::bindings::linear_kl_backward));
}
