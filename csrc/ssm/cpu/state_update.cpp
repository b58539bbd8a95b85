// One step of the SSM recurrence for a batch of sequences, in place on the state.
//
// FLOPs: 5 H P N a sequence. Bytes: the state read and written once (8 H P N in fp32), everything else is small.
// Numerics: fp32 arithmetic, state rounded once when it is stored in bf16; the sum over N runs in kLanes chains.
// Source: selective_state_update of mamba-ssm (recurrence of arXiv:2405.21060, eq. 1); D and dt_bias may be absent.
#include "core/parallel.h"
#include "core/vmath.h"
#include "ssm/ssm.h"

namespace foldscan::FOLDSCAN_ISA::ssm {
namespace {

using namespace foldscan::ssm;

template <class T, class S>
void run_head(const StateUpdate& p, int64_t b, int64_t h) {
  const int64_t P = p.P, N = p.N, slot = p.slots ? p.slots[b] : b, g = h / (p.H / p.G);
  T* out = static_cast<T*>(p.out) + (b * p.H + h) * P;
  if (slot < 0) {
    for (int64_t i = 0; i < P; ++i) out[i] = from_float<T>(0.0f);
    return;
  }
  const T* x = static_cast<const T*>(p.x) + (b * p.H + h) * P;
  const T* z = p.z ? static_cast<const T*>(p.z) + (b * p.H + h) * P : nullptr;
  const T* B = static_cast<const T*>(p.B) + (b * p.G + g) * N;
  const T* C = static_cast<const T*>(p.C) + (b * p.G + g) * N;
  S* state = static_cast<S*>(p.state) + (slot * p.H + h) * P * N;
  // One decay for the head when A and dt are tied over its channels and states.
  const bool tied =
      p.A_strides[1] == 0 && p.A_strides[2] == 0 && p.dt_strides[2] == 0 && (!p.dt_bias || p.bias_strides[1] == 0);
  VF decay = VF::zero();
  for (int64_t c = 0; c < P; ++c) {
    VF dt = VF::set(p.dt[b * p.dt_strides[0] + h * p.dt_strides[1] + c * p.dt_strides[2]]);
    if (p.dt_bias) dt = dt + VF::set(p.dt_bias[h * p.bias_strides[0] + c * p.bias_strides[1]]);
    if (p.softplus) dt = vsoftplus(dt);
    const float* A = p.A + h * p.A_strides[0] + c * p.A_strides[1];
    if (tied && c == 0) decay = vexp(dt * VF::set(A[0]));
    const VF dtx = dt * VF::set(to_float(x[c]));
    VF sum = VF::zero();
    for (int64_t n = 0; n < N; n += kLanes) {
      const int64_t m = N - n;
      if (!tied) {
        float a[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) a[i] = i < m ? A[(n + i) * p.A_strides[2]] : 0.0f;
        decay = vexp(dt * VF::load(a));
      }
      const VF s = fma(load_upto(B + n, m), dtx, load_upto(state + c * N + n, m) * decay);
      store_upto(s, state + c * N + n, m);
      sum = fma(s, load_upto(C + n, m), sum);
    }
    VF y = VF::set(reduce_add(sum));
    if (p.D) y = fma(VF::set(p.D[h * p.D_strides[0] + c * p.D_strides[1]]), VF::set(to_float(x[c])), y);
    if (z) y = y * vsilu(VF::set(to_float(z[c])));
    store_upto(y, out + c, 1);
  }
}

template <class T>
void run(const StateUpdate& p) {
  parallel_for(p.batch * p.H, grain_for(p.P * p.N / 4), [&](int64_t i) {
    if (p.state_type == DType::kF32) {
      run_head<T, float>(p, i / p.H, i % p.H);
    } else {
      run_head<T, bf16>(p, i / p.H, i % p.H);
    }
  });
}

}  // namespace

void state_update(const StateUpdate& p) {
  if (p.type == DType::kF32) {
    run<float>(p);
  } else {
    run<bf16>(p);
  }
}

}  // namespace foldscan::FOLDSCAN_ISA::ssm
