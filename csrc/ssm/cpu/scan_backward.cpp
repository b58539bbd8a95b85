// Mamba-2 SSD, backward: chunks in reverse, from recomputed chunk states. Nothing is saved by the forward pass.
//
// Per chunk and head, with G = dL/dS_next, W[l][s] = w[l][s], and rows l >= s:
//   M[l][s]  = (dY_l . X_s) W delta_s          E = M * (C B^T)
//   br_s     = sum_l (C_l.B_s) W dY_l + to_end_s/delta_s G B_s          dX = delta_s br_s + D dY_s
//   dC_l    += sum_s M B_s + p_l S^T dY_l                               dB_s += sum_l M C_l + to_end_s G^T X_s
//   v_l      = C_l . (p_l S^T dY_l)       u_s = to_end_s X_s . (G B_s)
//   d(delta A)_k = sum_{s<k<=l} E + sum_{l>=k} v_l + sum_{s<k} u_s + p_last <G, S>      rectangle sums: no cancellation
//   ddelta_k = X_k . br_k + A d(delta A)_k     dA += delta_k d(delta A)_k
//   G_prev   = p_last G + sum_l p_l dY_l C_l^T
// The sum in v_l is the one that dC_l takes from this head. The chunk itself is in scan_adjoint.h.
//
// FLOPs: T (HP (10 N + 5 Q/2) + 4 G' N Q), G' = head blocks. Extra memory: chunk states of a task's heads,
//   (L / 64) N P 4 bytes each, and fp32 partial sums of dB and dC for every block of up to eight heads.
// Numerics: fp32 sums; bf16 operands of products are rounded once. Determinism: dB and dC are summed over heads in
// order,
//   in blocks whose size is fixed; nothing depends on the threads.
// Source: adjoint of arXiv:2405.21060 section 6; verified against the sequential recurrence in fp64 by tests.
#include "ssm/cpu/scan_adjoint.h"

namespace foldscan::FOLDSCAN_ISA::ssm {
namespace {

// Heads of a task. The sums over a group's heads are grouped by it, so it must not depend on the threads: at least four
// tasks a sequence, and enough heads to share the products of the group.
FOLDSCAN_INLINE int64_t block_heads(int64_t H) { return imin(8, ceil_div(H, 4)); }

// States at the start of every chunk, by the forward recursion in fp32.
template <class T>
void recompute_states(const BackwardTask<T>& k, int64_t chunks) {
  const ScanInputs& in = k.p.in;
  const int64_t P = in.P, N = in.N, size = N * k.ld;
  Scratch scratch;
  float* w = scratch.get<float>(kChunk * kChunk);
  Decay* d = scratch.get<Decay>(1);
  float* states = scratch.get<float>(k.heads * size);
  for (int64_t j = 0; j < k.heads; ++j)
    load_state(k.p.initial_states && k.seg.initial_row >= 0
                   ? k.p.initial_states + ((k.seg.initial_row * in.H + k.h0 + j) * P) * N
                   : nullptr,
               P, N, states + j * size, k.ld);
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t t = k.seg.begin + c * kChunk, q = imin(kChunk, k.seg.end - t);
    Scratch inner;
    GroupChunk<T> group{nullptr, inner.get<T>(N * kChunk)};
    if (c + 1 < chunks)
      transpose_copy(static_cast<const T*>(in.B) + t * in.B_stride + k.g * N, in.B_stride, kChunk, N, group.b_columns,
                     kChunk);
    for (int64_t j = 0; j < k.heads; ++j) {
      const int64_t h = k.h0 + j;
      float* state = states + j * size;
      load_delta(in, in.dt + t * in.H, in.H, h, q, d->delta);
      fill_decay(in.A[h], q, q, *d, w);
      const T* x = static_cast<const T*>(in.x) + t * in.x_stride + h * P;
      const bool same = j + 1 < k.heads;
      const Upcoming<T> next{same ? x + P : x - j * P + kChunk * in.x_stride, in.x_stride, P,
                             same ? q : imin(kChunk, k.seg.end - t - q)};
      T* kept = k.states + (j * chunks + c) * size;
      const VF total = VF::set(d->total);
      for (int64_t i = 0; i < size; i += kLanes) {
        const VF v = VF::load(state + i);
        v.store(kept + i);
        (v * total).store(state + i);
      }
      if (c + 1 < chunks) add_tokens(group, x, in.x_stride, *d, kChunk, N, P, state, k.ld, next);
    }
  }
}

template <class T>
void run_task(BackwardTask<T> k) {
  const ScanBackward& p = k.p;
  const ScanInputs& in = p.in;
  const int64_t P = in.P, N = in.N, size = N * k.ld;
  const int64_t chunks = ceil_div(k.seg.end - k.seg.begin, kChunk);
  Scratch scratch;
  k.states = scratch.get<T>(k.heads * imax(chunks, 1) * size);
  k.grad_state = scratch.get<float>(k.heads * size);
  for (int64_t j = 0; j < k.heads; ++j)
    load_state(p.dfinal_states && k.seg.final_row >= 0 ? p.dfinal_states + ((k.seg.final_row * in.H + k.h0 + j) * P) * N
                                                       : nullptr,
               P, N, k.grad_state + j * size, k.ld);
  recompute_states(k, chunks);
  for (int64_t c = chunks - 1; c >= 0; --c) {
    ChunkAdjoint<T> chunk(k, c, chunks);
    for (int64_t j = 0; j < k.heads; ++j) chunk.head(j);
    chunk.finish();
  }
  if (p.dinitial_states && k.seg.initial_row >= 0)
    for (int64_t j = 0; j < k.heads; ++j)
      store_state(k.grad_state + j * size, k.ld, P, N,
                  p.dinitial_states + ((k.seg.initial_row * in.H + k.h0 + j) * P) * N);
}

template <class T>
void run(const ScanBackward& p) {
  const ScanInputs& in = p.in;
  const int64_t H = in.H, G = in.G, N = in.N, P = in.P, tokens = p.seqs.rows * p.seqs.length;
  const int64_t heads = H / G, ld = state_ld(P);
  Scratch scratch;
  Segment* segments = scratch.get<Segment>(max_segments(p.seqs));
  const int64_t count = fill_segments(p.seqs, segments);
  const HeadBlocks blocks(heads, block_heads(H));
  const int64_t nblocks = G * blocks.per_group;
  float* dB = scratch.get<float>(nblocks * tokens * N);
  float* dC = scratch.get<float>(nblocks * tokens * N);
  const int64_t per_segment = H * (2 + ld);
  float* sums = scratch.get<float>(imax(1, count) * per_segment);  // dA (H), dbias (H), dD (H, ld) of each segment
  for (int64_t i = 0; i < count * per_segment; ++i) sums[i] = 0.0f;

  parallel_for(count * nblocks, 1, [&](int64_t task) {
    const int64_t i = task / nblocks, block = task % nblocks, g = block / blocks.per_group;
    const int64_t first = block % blocks.per_group * blocks.size, h0 = g * heads + first;
    float* s = sums + i * per_segment;
    run_task(BackwardTask<T>{p, segments[i], g, h0, imin(blocks.size, heads - first), ld, nullptr, nullptr,
                             dB + block * tokens * N, dC + block * tokens * N, s + h0, s + H + h0,
                             s + 2 * H + h0 * ld});
  });

  parallel_for(tokens, grain_for(nblocks * N * 2), [&](int64_t t) {
    for (int64_t g = 0; g < G; ++g)
      for (int64_t n = 0; n < N; n += kLanes) {
        VF b = VF::zero(), c = VF::zero();
        for (int64_t i = g * blocks.per_group; i < (g + 1) * blocks.per_group; ++i) {
          b = b + load_upto(dB + (i * tokens + t) * N + n, N - n);
          c = c + load_upto(dC + (i * tokens + t) * N + n, N - n);
        }
        store_upto(b, static_cast<T*>(p.dB) + (t * G + g) * N + n, N - n);
        store_upto(c, static_cast<T*>(p.dC) + (t * G + g) * N + n, N - n);
      }
  });
  for (int64_t h = 0; h < H; ++h) {
    float dA = 0.0f, dbias = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
      dA += sums[i * per_segment + h];
      dbias += sums[i * per_segment + H + h];
    }
    p.dA[h] = dA;
    p.ddt_bias[h] = dbias;
    for (int64_t c = 0; p.dD && c < P; ++c) {
      float dD = 0.0f;
      for (int64_t i = 0; i < count; ++i) dD += sums[i * per_segment + 2 * H + h * ld + c];
      p.dD[h * P + c] = dD;
    }
  }
}

}  // namespace

void scan_backward(const ScanBackward& p) {
  if (p.in.type == DType::kF32) {
    run<float>(p);
  } else {
    run<bf16>(p);
  }
}

}  // namespace foldscan::FOLDSCAN_ISA::ssm
