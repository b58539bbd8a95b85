// Gated, grouped RMSNorm: norm(v) = v / sqrt(mean_group(v^2) + eps).
//   gate first (Mamba-2): out = norm(x silu(z)) w + b        norm first: out = (norm(x) w + b) silu(z)
//
// FLOPs: about 6 per element and one exponential with a gate. Bytes: x, z, out once (a group stays in L1 between
// passes). Numerics: fp32; the sum of squares runs in kLanes chains in a fixed order, so a row's bits depend on nothing
// else. Determinism: weight gradients are summed over blocks of 64 rows, then over the blocks in order. Source:
// arXiv:1910.07467; the gated form is Mamba-2's (arXiv:2405.21060).
#include "core/pack.h"
#include "core/parallel.h"
#include "core/vmath.h"
#include "ssm/ssm.h"

namespace foldscan::FOLDSCAN_ISA::ssm {
namespace {

using namespace foldscan::ssm;

constexpr int64_t kRowBlock = 64;

template <class T>
FOLDSCAN_INLINE VF gated(const T* x, const T* z, int64_t i, int64_t n, bool gate_first) {
  const VF v = load_upto(x + i, n);
  return gate_first ? v * vsilu(load_upto(z + i, n)) : v;
}

template <class T>
void forward_row(const RmsNorm& p, int64_t m) {
  const T* x = static_cast<const T*>(p.x) + m * p.x_stride;
  const T* z = p.z ? static_cast<const T*>(p.z) + m * p.z_stride : nullptr;
  T* out = static_cast<T*>(p.out) + m * p.D;
  const bool gate_first = z && !p.before_gate;
  Scratch scratch;
  float* v = scratch.get<float>(round_up(p.group, kLanes));
  for (int64_t g = 0; g < p.D; g += p.group) {
    VF squares = VF::zero();
    for (int64_t i = 0; i < p.group; i += kLanes) {
      const VF value = gated(x, z, g + i, p.group - i, gate_first);
      value.store(v + i);
      squares = fma(value, value, squares);
    }
    const float mean = reduce_add(squares) / static_cast<float>(p.group);
    const float rstd = 1.0f / __builtin_sqrtf(mean + p.eps);
    p.rstd[(m * p.D + g) / p.group] = rstd;
    for (int64_t i = 0; i < p.group; i += kLanes) {
      const int64_t n = p.group - i;
      VF y = VF::load(v + i) * VF::set(rstd) * load_upto(p.weight + g + i, n);
      if (p.bias) y = y + load_upto(p.bias + g + i, n);
      if (z && p.before_gate) y = y * vsilu(load_upto(z + g + i, n));
      store_upto(y, out + g + i, n);
    }
  }
}

// With v the normalised input's source, n = v rstd and e = dn w: dv = rstd (e - n mean(e n)).
template <class T>
void backward_row(const RmsNorm& p, int64_t m, float* dweight, float* dbias) {
  const T* x = static_cast<const T*>(p.x) + m * p.x_stride;
  const T* z = p.z ? static_cast<const T*>(p.z) + m * p.z_stride : nullptr;
  const T* dout = static_cast<const T*>(p.dout) + m * p.D;
  T* dx = static_cast<T*>(p.dx) + m * p.D;
  T* dz = z ? static_cast<T*>(p.dz) + m * p.D : nullptr;
  const bool gate_first = z && !p.before_gate;
  for (int64_t g = 0; g < p.D; g += p.group) {
    const VF rstd = VF::set(p.rstd[(m * p.D + g) / p.group]);
    VF sum = VF::zero();
    for (int64_t i = 0; i < p.group; i += kLanes) {
      const int64_t n = p.group - i;
      const VF norm = gated(x, z, g + i, n, gate_first) * rstd;
      VF dn = load_upto(dout + g + i, n);
      if (z && p.before_gate) dn = dn * vsilu(load_upto(z + g + i, n));
      store_upto(fma(dn, norm, load_upto(dweight + g + i, n)), dweight + g + i, n);
      store_upto(load_upto(dbias + g + i, n) + dn, dbias + g + i, n);
      sum = fma(dn * load_upto(p.weight + g + i, n), norm, sum);
    }
    const VF mean = VF::set(reduce_add(sum) / static_cast<float>(p.group));
    for (int64_t i = 0; i < p.group; i += kLanes) {
      const int64_t n = p.group - i;
      const VF norm = gated(x, z, g + i, n, gate_first) * rstd, w = load_upto(p.weight + g + i, n);
      const VF d = load_upto(dout + g + i, n);
      VF dn = d;
      if (z && p.before_gate) {
        const VF zv = load_upto(z + g + i, n);
        VF y = norm * w;
        if (p.bias) y = y + load_upto(p.bias + g + i, n);
        store_upto(d * y * vsilu_grad(zv), dz + g + i, n);
        dn = d * vsilu(zv);
      }
      VF dv = rstd * fnma(norm, mean, dn * w);
      if (gate_first) {
        const VF zv = load_upto(z + g + i, n);
        store_upto(dv * load_upto(x + g + i, n) * vsilu_grad(zv), dz + g + i, n);
        dv = dv * vsilu(zv);
      }
      store_upto(dv, dx + g + i, n);
    }
  }
}

template <class T>
void run_backward(const RmsNorm& p) {
  const int64_t blocks = ceil_div(p.M, kRowBlock);
  Scratch scratch;
  float* partial = scratch.get<float>(blocks * 2 * p.D);
  parallel_for(blocks, grain_for(kRowBlock * p.D * 2), [&](int64_t b) {
    float* dweight = partial + b * 2 * p.D;
    for (int64_t i = 0; i < 2 * p.D; ++i) dweight[i] = 0.0f;
    for (int64_t m = b * kRowBlock; m < imin(p.M, (b + 1) * kRowBlock); ++m)
      backward_row<T>(p, m, dweight, dweight + p.D);
  });
  for (int64_t i = 0; i < p.D; i += kLanes) {
    VF dweight = VF::zero(), dbias = VF::zero();
    for (int64_t b = 0; b < blocks; ++b) {
      dweight = dweight + load_upto(partial + b * 2 * p.D + i, p.D - i);
      dbias = dbias + load_upto(partial + b * 2 * p.D + p.D + i, p.D - i);
    }
    store_upto(dweight, p.dweight + i, p.D - i);
    store_upto(dbias, p.dbias + i, p.D - i);
  }
}

}  // namespace

void rmsnorm_forward(const RmsNorm& p) {
  parallel_for(p.M, grain_for(p.D * 2), [&](int64_t m) {
    if (p.type == DType::kF32) {
      forward_row<float>(p, m);
    } else {
      forward_row<bf16>(p, m);
    }
  });
}

void rmsnorm_backward(const RmsNorm& p) {
  if (p.type == DType::kF32) {
    run_backward<float>(p);
  } else {
    run_backward<bf16>(p);
  }
}

}  // namespace foldscan::FOLDSCAN_ISA::ssm
