// Mamba-1 selective scan: h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,  y_t = C_t . h_t + D u_t,  out = y silu(z).
//
// Channels are the vector dimension: a task owns a block of channels, stages 64 tokens of its inputs transposed in fp32
// and runs the recurrence with the N states of each lane in memory that stays in L1. No horizontal sums in the forward.
// FLOPs: about 7 D N a token and one exponential per (channel, state). Bytes: inputs and output once.
// Backward: states are recomputed from checkpoints at every 64 tokens (D N fp32 each), then walked in reverse.
// Numerics: fp32. Determinism: dB and dC are summed over the lanes of a block, then over the blocks in order.
// Source: Gu & Dao, "Mamba" (arXiv:2312.00752), eq. 2 and 4 with the simplified Euler step for B.
#include "core/pack.h"
#include "core/parallel.h"
#include "core/vmath.h"
#include "ssm/ssm.h"

namespace foldscan::FOLDSCAN_ISA::ssm {
namespace {

using namespace foldscan::ssm;

constexpr int64_t kTile = 64;   // tokens of a tile, and distance of the checkpoints
constexpr int64_t kBlock = 16;  // channels of a block: one vector on AVX-512, fixed so that sums group alike everywhere

template <class T>
struct Inputs {
  const SelectiveScan& p;
  int64_t row, d0, width;  // channels [d0, d0 + width)

  // (D, L) rows of this block, tokens [t, t + n), as dst[token][kBlock]; zero beyond the last channel.
  FOLDSCAN_INLINE void stage(const void* src, int64_t t, int64_t n, float* dst) const {
    const T* s = static_cast<const T*>(src) + (row * p.D + d0) * p.L + t;
    if (width < kBlock)
      for (int64_t i = 0; i < n * kBlock; ++i) dst[i] = 0.0f;
    transpose_copy(s, p.L, width, n, dst, kBlock);
  }
  FOLDSCAN_INLINE void unstage(const float* src, int64_t t, int64_t n, void* dst) const {
    transpose_copy(src, kBlock, n, width, static_cast<T*>(dst) + (row * p.D + d0) * p.L + t, p.L);
  }

  // B or C of tokens [t, t + n) as dst[token][N][kBlock], broadcast over lanes where it varies in time.
  FOLDSCAN_INLINE void stage_bc(const void* src, bool varies, int64_t t, int64_t n, float* dst) const {
    const int64_t N = p.N, g = d0 / (p.D / p.G);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t s = 0; s < N; ++s) {
        float* out = dst + (i * N + s) * kBlock;
        if (varies) {
          const float v = to_float(static_cast<const T*>(src)[((row * p.G + g) * N + s) * p.L + t + i]);
          for (int64_t c = 0; c < kBlock; c += kLanes) VF::set(v).store(out + c);
        } else {
          for (int64_t c = 0; c < kBlock; ++c)
            out[c] = c < width ? static_cast<const float*>(src)[(d0 + c) * N + s] : 0.0f;
        }
      }
  }

  // A as dst[N][kBlock].
  FOLDSCAN_INLINE void stage_a(float* dst) const {
    for (int64_t s = 0; s < p.N; ++s)
      for (int64_t c = 0; c < kBlock; ++c) dst[s * kBlock + c] = c < width ? p.A[(d0 + c) * p.N + s] : 0.0f;
  }

  FOLDSCAN_INLINE VF per_channel(const float* v, int64_t c) const {
    return v ? load_upto(v + d0 + c, width - c) : VF::zero();
  }

  // delta before and after bias and softplus.
  FOLDSCAN_INLINE VF raw_delta(const float* staged, int64_t c) const {
    return VF::load(staged + c) + per_channel(p.delta_bias, c);
  }
  FOLDSCAN_INLINE VF step(VF raw) const { return p.softplus ? vsoftplus(raw) : raw; }
};

// Runs n tokens of the recurrence on h (N, kBlock); y may be null, trace keeps h before each token, may be null.
template <class T>
void advance(const Inputs<T>& in, const float* A, const float* u, const float* delta, const float* B, const float* C,
             int64_t n, float* h, float* y, float* trace) {
  const int64_t N = in.p.N;
  for (int64_t c = 0; c < kBlock; c += kLanes) {
    const VF D = in.per_channel(in.p.D_skip, c);
    for (int64_t t = 0; t < n; ++t) {
      const VF dt = in.step(in.raw_delta(delta + t * kBlock, c)), ut = VF::load(u + t * kBlock + c);
      const VF dtu = dt * ut;
      VF sum = VF::zero();
      for (int64_t s = 0; s < N; ++s) {
        const int64_t at = s * kBlock + c, bc = (t * N + s) * kBlock + c;
        const VF old = VF::load(h + at);
        if (trace) old.store(trace + bc);
        const VF next = fma(vexp(dt * VF::load(A + at)), old, dtu * VF::load(B + bc));
        next.store(h + at);
        if (y) sum = fma(next, VF::load(C + bc), sum);
      }
      if (y) fma(D, ut, sum).store(y + t * kBlock + c);
    }
  }
}

template <class T>
void run_forward(const SelectiveScan& p) {
  const int64_t per_row = p.G * ceil_div(p.D / p.G, kBlock), per_group = ceil_div(p.D / p.G, kBlock);
  const int64_t N = p.N;
  parallel_for(p.rows * per_row, 1, [&](int64_t task) {
    const int64_t block = task % per_row, first = block % per_group * kBlock;
    const Inputs<T> in{p, task / per_row, block / per_group * (p.D / p.G) + first, imin(kBlock, p.D / p.G - first)};
    Scratch scratch;
    float *A = scratch.get<float>(N * kBlock), *h = scratch.get<float>(N * kBlock);
    float *u = scratch.get<float>(kTile * kBlock), *delta = scratch.get<float>(kTile * kBlock);
    float *z = scratch.get<float>(kTile * kBlock), *y = scratch.get<float>(kTile * kBlock);
    float *B = scratch.get<float>(kTile * N * kBlock), *C = scratch.get<float>(kTile * N * kBlock);
    in.stage_a(A);
    for (int64_t i = 0; i < N * kBlock; ++i) h[i] = 0.0f;
    for (int64_t t = 0; t < p.L; t += kTile) {
      const int64_t n = imin(kTile, p.L - t);
      in.stage(p.u, t, n, u);
      in.stage(p.delta, t, n, delta);
      in.stage_bc(p.B, p.B_varies, t, n, B);
      in.stage_bc(p.C, p.C_varies, t, n, C);
      advance(in, A, u, delta, B, C, n, h, y, nullptr);
      if (p.z) {
        in.stage(p.z, t, n, z);
        for (int64_t i = 0; i < n * kBlock; i += kLanes) (VF::load(y + i) * vsilu(VF::load(z + i))).store(y + i);
      }
      in.unstage(y, t, n, p.out);
    }
    if (p.last_state)
      for (int64_t c = 0; c < in.width; ++c)
        for (int64_t s = 0; s < N; ++s) p.last_state[(in.row * p.D + in.d0 + c) * N + s] = h[s * kBlock + c];
  });
}

// Partial gradients of one block: dA (N, kBlock), dD, dbias (kBlock), then dB, dC as (L, N) when they vary in time or
// (N, kBlock) when not.
struct Partial {
  float *dA, *dD, *dbias, *dB, *dC;
};

template <class T>
void backward_block(const Inputs<T>& in, Partial g) {
  const SelectiveScan& p = in.p;
  const int64_t N = p.N, tiles = ceil_div(p.L, kTile);
  Scratch scratch;
  float *A = scratch.get<float>(N * kBlock), *h = scratch.get<float>(N * kBlock), *dh = scratch.get<float>(N * kBlock);
  float *u = scratch.get<float>(kTile * kBlock), *delta = scratch.get<float>(kTile * kBlock);
  float *z = scratch.get<float>(kTile * kBlock), *y = scratch.get<float>(kTile * kBlock);
  float *dy = scratch.get<float>(kTile * kBlock), *du = scratch.get<float>(kTile * kBlock);
  float *ddelta = scratch.get<float>(kTile * kBlock), *dz = scratch.get<float>(kTile * kBlock);
  float *B = scratch.get<float>(kTile * N * kBlock), *C = scratch.get<float>(kTile * N * kBlock);
  float* trace = scratch.get<float>(kTile * N * kBlock);
  float* checkpoints = scratch.get<float>(imax(1, tiles) * N * kBlock);
  in.stage_a(A);
  for (int64_t i = 0; i < N * kBlock; ++i) h[i] = dh[i] = 0.0f;
  for (int64_t k = 0; k < tiles; ++k) {
    const int64_t t = k * kTile, n = imin(kTile, p.L - t);
    for (int64_t i = 0; i < N * kBlock; ++i) checkpoints[k * N * kBlock + i] = h[i];
    in.stage(p.u, t, n, u);
    in.stage(p.delta, t, n, delta);
    in.stage_bc(p.B, p.B_varies, t, n, B);
    if (k + 1 < tiles) advance<T>(in, A, u, delta, B, nullptr, n, h, nullptr, nullptr);
  }
  for (int64_t k = tiles - 1; k >= 0; --k) {
    const int64_t t0 = k * kTile, n = imin(kTile, p.L - t0);
    in.stage(p.u, t0, n, u);
    in.stage(p.delta, t0, n, delta);
    in.stage(p.dout, t0, n, dy);
    in.stage_bc(p.B, p.B_varies, t0, n, B);
    in.stage_bc(p.C, p.C_varies, t0, n, C);
    for (int64_t i = 0; i < N * kBlock; ++i) h[i] = checkpoints[k * N * kBlock + i];
    advance(in, A, u, delta, B, C, n, h, y, trace);
    if (p.z) {
      in.stage(p.z, t0, n, z);
      for (int64_t i = 0; i < n * kBlock; i += kLanes) {
        const VF zv = VF::load(z + i), d = VF::load(dy + i);
        (d * VF::load(y + i) * vsilu_grad(zv)).store(dz + i);
        (d * vsilu(zv)).store(dy + i);
      }
      in.unstage(dz, t0, n, p.dz);
    }
    for (int64_t c = 0; c < kBlock; c += kLanes) {
      const VF D = in.per_channel(p.D_skip, c);
      VF dD = VF::load(g.dD + c), dbias = VF::load(g.dbias + c);
      for (int64_t t = n - 1; t >= 0; --t) {
        const VF raw = in.raw_delta(delta + t * kBlock, c), dt = in.step(raw);
        const VF ut = VF::load(u + t * kBlock + c), dyt = VF::load(dy + t * kBlock + c);
        VF dB_u = VF::zero(), d_decay = VF::zero();
        for (int64_t s = 0; s < N; ++s) {
          const int64_t at = s * kBlock + c, bc = (t * N + s) * kBlock + c;
          const VF a = VF::load(A + at), e = vexp(dt * a), old = VF::load(trace + bc), b = VF::load(B + bc);
          const VF state = fma(e, old, dt * ut * b);
          const VF gh = fma(dyt, VF::load(C + bc), VF::load(dh + at));
          const VF e_grad = gh * old * e;
          fma(e_grad, dt, VF::load(g.dA + at)).store(g.dA + at);
          d_decay = fma(e_grad, a, d_decay);
          dB_u = fma(gh, b, dB_u);
          const VF to_b = gh * dt * ut, to_c = dyt * state;
          if (p.B_varies) {
            g.dB[(t0 + t) * N + s] += reduce_add(to_b);
          } else {
            (VF::load(g.dB + at) + to_b).store(g.dB + at);
          }
          if (p.C_varies) {
            g.dC[(t0 + t) * N + s] += reduce_add(to_c);
          } else {
            (VF::load(g.dC + at) + to_c).store(g.dC + at);
          }
          (gh * e).store(dh + at);
        }
        VF ddt = fma(dB_u, ut, d_decay);
        if (p.softplus) ddt = ddt * vsigmoid(raw);
        ddt.store(ddelta + t * kBlock + c);
        dbias = dbias + ddt;
        dD = fma(dyt, ut, dD);
        fma(dB_u, dt, D * dyt).store(du + t * kBlock + c);
      }
      dD.store(g.dD + c);
      dbias.store(g.dbias + c);
    }
    in.unstage(du, t0, n, p.du);
    in.unstage(ddelta, t0, n, p.ddelta);
  }
}

template <class T>
void run_backward(const SelectiveScan& p) {
  const int64_t N = p.N, L = p.L, group = p.D / p.G, per_group = ceil_div(group, kBlock), per_row = p.G * per_group;
  const int64_t b_size = p.B_varies ? L * N : N * kBlock, c_size = p.C_varies ? L * N : N * kBlock;
  const int64_t size = N * kBlock + 2 * kBlock + b_size + c_size;
  for (int64_t i = 0; i < p.D * N; ++i) p.dA[i] = 0.0f;
  for (int64_t i = 0; i < p.D; ++i) p.dD[i] = p.ddelta_bias[i] = 0.0f;
  for (int64_t i = 0; !p.B_varies && i < p.D * N; ++i) p.dB[i] = 0.0f;
  for (int64_t i = 0; !p.C_varies && i < p.D * N; ++i) p.dC[i] = 0.0f;
  // Row by row, so that the partial sums need memory for one row only.
  for (int64_t row = 0; row < p.rows; ++row) {
    Scratch scratch;
    float* partial = scratch.get<float>(per_row * size);
    const auto part = [&](int64_t block) {
      float* s = partial + block * size;
      return Partial{s, s + N * kBlock, s + N * kBlock + kBlock, s + N * kBlock + 2 * kBlock,
                     s + N * kBlock + 2 * kBlock + b_size};
    };
    parallel_for(per_row, 1, [&](int64_t block) {
      const int64_t first = block % per_group * kBlock;
      for (int64_t i = 0; i < size; ++i) partial[block * size + i] = 0.0f;
      backward_block(Inputs<T>{p, row, block / per_group * group + first, imin(kBlock, group - first)}, part(block));
    });
    for (int64_t block = 0; block < per_row; ++block) {
      const Partial g = part(block);
      const int64_t first = block % per_group * kBlock, d0 = block / per_group * group + first;
      for (int64_t c = 0; c < imin(kBlock, group - first); ++c) {
        for (int64_t s = 0; s < N; ++s) {
          p.dA[(d0 + c) * N + s] += g.dA[s * kBlock + c];
          if (!p.B_varies) p.dB[(d0 + c) * N + s] += g.dB[s * kBlock + c];
          if (!p.C_varies) p.dC[(d0 + c) * N + s] += g.dC[s * kBlock + c];
        }
        p.dD[d0 + c] += g.dD[c];
        p.ddelta_bias[d0 + c] += g.dbias[c];
      }
    }
    parallel_for(p.G * N, 1, [&](int64_t i) {
      const int64_t gr = i / N, s = i % N;
      for (int64_t t = 0; t < L; ++t) {
        float b = 0.0f, c = 0.0f;
        for (int64_t block = gr * per_group; block < (gr + 1) * per_group; ++block) {
          if (p.B_varies) b += part(block).dB[t * N + s];
          if (p.C_varies) c += part(block).dC[t * N + s];
        }
        if (p.B_varies) p.dB[((row * p.G + gr) * N + s) * L + t] = b;
        if (p.C_varies) p.dC[((row * p.G + gr) * N + s) * L + t] = c;
      }
    });
  }
}

}  // namespace

void selective_scan_forward(const SelectiveScan& p) {
  if (p.type == DType::kF32) {
    run_forward<float>(p);
  } else {
    run_forward<bf16>(p);
  }
}

void selective_scan_backward(const SelectiveScan& p) {
  if (p.type == DType::kF32) {
    run_backward<float>(p);
  } else {
    run_backward<bf16>(p);
  }
}

}  // namespace foldscan::FOLDSCAN_ISA::ssm
