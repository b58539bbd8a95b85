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
void forward_row(const RmsNorm& p, int64_t m, float* v) {
  const T* x = static_cast<const T*>(p.x) + m * p.x_stride;
  const T* z = p.z ? static_cast<const T*>(p.z) + m * p.z_stride : nullptr;
  T* out = static_cast<T*>(p.out) + m * p.D;
  const bool gate_first = z && !p.before_gate;
  for (int64_t g = 0; g < p.D; g += p.group) {
    VF squares = VF::zero();
    each_vector(p.group, [&](auto tag, int64_t i, int64_t n) FOLDSCAN_LAMBDA {
      using V = decltype(tag);
      V value = load_as<V>(x + g + i, n);
      if (gate_first) value = value * vsilu_for<T>(load_as<V>(z + g + i, n));
      store_upto(value, v + i, n);
      squares = dot_in_order(value, value, squares);
    });
    const float mean = reduce_add(squares) / static_cast<float>(p.group);
    const float rstd = 1.0f / __builtin_sqrtf(mean + p.eps);
    p.rstd[(m * p.D + g) / p.group] = rstd;
    each_vector(p.group, [&](auto tag, int64_t i, int64_t n) FOLDSCAN_LAMBDA {
      using V = decltype(tag);
      V y = load_as<V>(v + i, n) * V::set(rstd) * load_as<V>(p.weight + g + i, n);
      if (p.bias) y = y + load_as<V>(p.bias + g + i, n);
      if (z && p.before_gate) y = y * vsilu_for<T>(load_as<V>(z + g + i, n));
      store_upto(y, out + g + i, n);
    });
  }
}

// With v the normalised input's source, n = v rstd and e = dn w: dv = rstd (e - n mean(e n)). `scratch`: two groups.
template <class T>
void backward_row(const RmsNorm& p, int64_t m, float* dweight, float* dbias, float* scratch) {
  const T* x = static_cast<const T*>(p.x) + m * p.x_stride;
  const T* z = p.z ? static_cast<const T*>(p.z) + m * p.z_stride : nullptr;
  const T* dout = static_cast<const T*>(p.dout) + m * p.D;
  T* dx = static_cast<T*>(p.dx) + m * p.D;
  T* dz = z ? static_cast<T*>(p.dz) + m * p.D : nullptr;
  const bool gate_first = z && !p.before_gate;
  float *norms = scratch, *sigmoids = scratch + round_up(p.group, kLanes);
  for (int64_t g = 0; g < p.D; g += p.group) {
    const float rstd = p.rstd[(m * p.D + g) / p.group];
    VF sum = VF::zero();
    each_vector(p.group, [&](auto tag, int64_t i, int64_t n) FOLDSCAN_LAMBDA {
      using V = decltype(tag);
      V norm = load_as<V>(x + g + i, n) * V::set(rstd), dn = load_as<V>(dout + g + i, n);
      if (z) {
        const V zv = load_as<V>(z + g + i, n), sigmoid = vsigmoid_for<T>(zv);
        (gate_first ? norm : dn) = (gate_first ? norm : dn) * (zv * sigmoid);
        store_upto(sigmoid, sigmoids + i, n);
      }
      store_upto(norm, norms + i, n);
      store_upto(fma(dn, norm, load_as<V>(dweight + g + i, n)), dweight + g + i, n);
      if (p.bias) store_upto(load_as<V>(dbias + g + i, n) + dn, dbias + g + i, n);
      sum = dot_in_order(dn * load_as<V>(p.weight + g + i, n), norm, sum);
    });
    const float mean = reduce_add(sum) / static_cast<float>(p.group);
    each_vector(p.group, [&](auto tag, int64_t i, int64_t n) FOLDSCAN_LAMBDA {
      using V = decltype(tag);
      const V norm = load_as<V>(norms + i, n), w = load_as<V>(p.weight + g + i, n), d = load_as<V>(dout + g + i, n);
      if (!z) return store_upto(V::set(rstd) * fnma(norm, V::set(mean), d * w), dx + g + i, n);
      const V zv = load_as<V>(z + g + i, n), s = load_as<V>(sigmoids + i, n);
      const V silu = zv * s, slope = s * fma(zv, V::set(1.0f) - s, V::set(1.0f));
      const V dv = V::set(rstd) * fnma(norm, V::set(mean), (gate_first ? d : d * silu) * w);
      if (gate_first) {
        store_upto(dv * load_as<V>(x + g + i, n) * slope, dz + g + i, n);
        store_upto(dv * silu, dx + g + i, n);
      } else {
        V y = norm * w;
        if (p.bias) y = y + load_as<V>(p.bias + g + i, n);
        store_upto(d * y * slope, dz + g + i, n);
        store_upto(dv, dx + g + i, n);
      }
    });
  }
}

template <class T>
void run_backward(const RmsNorm& p) {
  const int64_t blocks = ceil_div(p.M, kRowBlock);
  Scratch scratch;
  float* partial = scratch.get<float>(blocks * 2 * p.D);
  parallel_for(blocks, grain_for(kRowBlock * p.D * 2), [&](int64_t b) {
    float* dweight = partial + b * 2 * p.D;
    Scratch inner;
    float* groups = inner.get<float>(2 * round_up(p.group, kLanes));
    for (int64_t i = 0; i < 2 * p.D; ++i) dweight[i] = 0.0f;
    for (int64_t m = b * kRowBlock; m < imin(p.M, (b + 1) * kRowBlock); ++m)
      backward_row<T>(p, m, dweight, dweight + p.D, groups);
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
    Scratch scratch;
    float* v = scratch.get<float>(round_up(p.group, kLanes));
    p.type == DType::kF32 ? forward_row<float>(p, m, v) : forward_row<bf16>(p, m, v);
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
