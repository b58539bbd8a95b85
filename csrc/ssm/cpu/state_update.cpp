// One step of the SSM recurrence for a batch of sequences, in place on the state.
//
// FLOPs: 5 H P N a sequence. Bytes: the state read and written once (8 H P N in fp32), everything else is small.
// Numerics: fp32 arithmetic, state rounded once when it is stored in bf16; the sum over N runs in kLanes chains.
// Source: selective_state_update of mamba-ssm (recurrence of arXiv:2405.21060, eq. 1); D and dt_bias may be absent.
#include "core/pack.h"
#include "core/parallel.h"
#include "core/vmath.h"
#include "ssm/ssm.h"

namespace foldscan::FOLDSCAN_ISA::ssm {
namespace {

using namespace foldscan::ssm;

constexpr int kSide = 4;  // channels side by side: B and C are loaded once for them, and their sums are chains apart

// What a head's channels share, in fp32; vectors are readable up to a multiple of kLanes.
struct Head {
  const float *B, *C;  // (N)
  const float* dt;     // (P), after bias and softplus
  const float* A;      // at [c * A_stride + n * A_step] when not tied
  int64_t N, A_stride, A_step;
  VF decay;  // when A and dt are tied over the head
  bool tied;
};

// `Channels` rows of the state from channel c on: y = C . state.
template <int Channels, class T, class S>
FOLDSCAN_INLINE void run_channels(const Head& head, const T* x, int64_t c, S* state, float* y) {
  const int64_t N = head.N;
  VF dtx[Channels], sum[Channels];
#pragma GCC unroll 4
  for (int j = 0; j < Channels; ++j) {
    dtx[j] = VF::set(head.dt[c + j] * to_float(x[c + j]));
    sum[j] = VF::zero();
  }
  for (int64_t n = 0; n < N; n += kLanes) {
    const VF B = VF::load(head.B + n), C = VF::load(head.C + n);
#pragma GCC unroll 4
    for (int j = 0; j < Channels; ++j) {
      S* row = state + (c + j) * N + n;
      VF decay = head.decay;
      if (!head.tied) {
        float a[kLanes];
        const float* A = head.A + (c + j) * head.A_stride;
        for (int64_t i = 0; i < kLanes; ++i) a[i] = n + i < N ? A[(n + i) * head.A_step] : 0.0f;
        decay = vexp(VF::set(head.dt[c + j]) * VF::load(a));
      }
      const VF next = fma(B, dtx[j], load_upto(row, N - n) * decay);
      store_upto(next, row, N - n);
      sum[j] = fma(next, C, sum[j]);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < Channels; ++j) y[c + j] = reduce_add(sum[j]);
}

template <class T, class S>
void run_head(const StateUpdate& p, int64_t b, int64_t h) {
  const int64_t P = p.P, N = p.N, slot = p.slots ? p.slots[b] : b, g = h / (p.H / p.G);
  T* out = static_cast<T*>(p.out) + (b * p.H + h) * P;
  if (slot < 0) {
    for (int64_t i = 0; i < P; ++i) out[i] = from_float<T>(0.0f);
    return;
  }
  const T* x = static_cast<const T*>(p.x) + (b * p.H + h) * P;
  S* state = static_cast<S*>(p.state) + (slot * p.H + h) * P * N;
  Scratch scratch;
  float *B = scratch.get<float>(round_up(N, kLanes)), *C = scratch.get<float>(round_up(N, kLanes));
  copy_row(static_cast<const T*>(p.B) + (b * p.G + g) * N, N, B, round_up(N, kLanes));
  copy_row(static_cast<const T*>(p.C) + (b * p.G + g) * N, N, C, round_up(N, kLanes));
  const int64_t padded = round_up(P, kLanes);
  float *dt = scratch.get<float>(padded), *y = scratch.get<float>(padded);
  for (int64_t c = 0; c < padded; ++c) {
    dt[c] = c < P ? p.dt[b * p.dt_strides[0] + h * p.dt_strides[1] + c * p.dt_strides[2]] : 0.0f;
    if (p.dt_bias && c < P) dt[c] += p.dt_bias[h * p.bias_strides[0] + c * p.bias_strides[1]];
  }
  const bool tied =
      p.A_strides[1] == 0 && p.A_strides[2] == 0 && p.dt_strides[2] == 0 && (!p.dt_bias || p.bias_strides[1] == 0);
  const VF first = p.softplus ? vsoftplus(VF::set(dt[0])) : VF::set(dt[0]);
  for (int64_t c = 0; c < padded; c += kLanes)
    (tied ? first : p.softplus ? vsoftplus(VF::load(dt + c)) : VF::load(dt + c)).store(dt + c);
  const float* A = p.A + h * p.A_strides[0];
  const VF decay = vexp(first * VF::set(A[0]));
  const Head head{B, C, dt, A, N, p.A_strides[1], p.A_strides[2], decay, tied};
  int64_t c = 0;
  for (; c + kSide <= P; c += kSide) run_channels<kSide>(head, x, c, state, y);
  for (; c < P; ++c) run_channels<1>(head, x, c, state, y);
  const T* z = p.z ? static_cast<const T*>(p.z) + (b * p.H + h) * P : nullptr;
  for (int64_t i = 0; i < P; i += kLanes) {
    VF v = VF::load(y + i);
    if (p.D) {
      float D[kLanes];
      for (int64_t j = 0; j < kLanes; ++j) D[j] = i + j < P ? p.D[h * p.D_strides[0] + (i + j) * p.D_strides[1]] : 0.0f;
      v = fma(VF::load(D), load_upto(x + i, P - i), v);
    }
    if (z) v = v * vsilu(load_upto(z + i, P - i));
    store_upto(v, out + i, P - i);
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
