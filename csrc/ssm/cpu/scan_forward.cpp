// Mamba-2 SSD, forward: chunks of 64 tokens, anchored at the start of each sequence.
//
// FLOPs: T (HP (4N + Q) + G N Q) with the causal half counted, Q = 64. Bytes: inputs and output once; the state of a
// task
//   stays in L2 and no intermediate of size T x anything leaves it (see scan_chunk.h for numerics and source).
// A task is one sequence and up to eight heads of one group, which share C B^T.
// Determinism: every output is written by one task; nothing depends on the split.
#include "ssm/cpu/scan_chunk.h"

namespace foldscan::FOLDSCAN_ISA::ssm {
namespace {

template <class T>
void run_segment(const ScanForward& p, const Segment& seg, int64_t g, int64_t h0, int64_t heads) {
  const ScanInputs& in = p.in;
  const int64_t P = in.P, N = in.N, ld = state_ld(P), state_size = N * ld;
  Scratch scratch;
  float* states = scratch.get<float>(heads * state_size);
  float* w = scratch.get<float>(kChunk * kChunk);
  float* y = scratch.get<float>(kChunk * ld);
  Decay* d = scratch.get<Decay>(1);
  for (int64_t j = 0; j < heads; ++j)
    load_state(p.initial_states && seg.initial_row >= 0 ? p.initial_states + ((seg.initial_row * in.H + h0 + j) * P) * N
                                                        : nullptr,
               P, N, states + j * state_size, ld);
  const T* x = static_cast<const T*>(in.x);
  const T* z = static_cast<const T*>(in.z);
  T* out = static_cast<T*>(p.out);
  const bool want_final = p.final_states && seg.final_row >= 0;
  for (int64_t t = seg.begin; t < seg.end; t += kChunk) {
    const int64_t q = imin(kChunk, seg.end - t);
    Scratch chunk;
    const auto B = as_rows(static_cast<const T*>(in.B) + t * in.B_stride + g * N, in.B_stride, q, N, chunk);
    const auto C = as_rows(static_cast<const T*>(in.C) + t * in.C_stride + g * N, in.C_stride, q, N, chunk);
    const GroupChunk<T> group = group_chunk(B, C, 0, q, N, true, chunk);
    for (int64_t j = 0; j < heads; ++j) {
      const int64_t h = h0 + j;
      const T* xh = x + t * in.x_stride + h * P;
      float* state = states + j * state_size;
      const bool same = j + 1 < heads;
      const Upcoming<T> next{same ? xh + P : xh - j * P + kChunk * in.x_stride, in.x_stride, P,
                             same ? q : imin(kChunk, seg.end - t - q)};
      load_delta(in, in.dt + t * in.H, in.H, h, q, d->delta);
      fill_decay(in.A[h], 0, q, *d, w);
      const Upcoming<T> rows{out + (t * in.H + h) * P, in.H * P, P, q};
      chunk_output(group, C, xh, in.x_stride, *d, w, state, ld, 0, q, N, P, y, ld, rows);
      for (int64_t l = 0; l < q; ++l)
        finish_row(in, h, y + l * ld, xh + l * in.x_stride, z ? z + (t + l) * in.z_stride + h * P : nullptr,
                   out + ((t + l) * in.H + h) * P);
      if (t + q < seg.end || want_final) chunk_state(group, xh, in.x_stride, *d, q, N, P, state, ld, next);
    }
  }
  if (want_final)
    for (int64_t j = 0; j < heads; ++j)
      store_state(states + j * state_size, ld, P, N, p.final_states + ((seg.final_row * in.H + h0 + j) * P) * N);
}

template <class T>
void run(const ScanForward& p) {
  const ScanInputs& in = p.in;
  Scratch scratch;
  Segment* segments = scratch.get<Segment>(max_segments(p.seqs));
  const int64_t count = fill_segments(p.seqs, segments);
  const int64_t heads = in.H / in.G;
  const HeadBlocks blocks(heads, imin(8, ceil_div(count * in.H, 2 * num_threads())));
  const int64_t per_segment = in.G * blocks.per_group;
  parallel_for(count * per_segment, 1, [&](int64_t task) {
    const int64_t block = task % per_segment, g = block / blocks.per_group;
    const int64_t first = block % blocks.per_group * blocks.size;
    run_segment<T>(p, segments[task / per_segment], g, g * heads + first, imin(blocks.size, heads - first));
  });
}

}  // namespace

void scan_forward(const ScanForward& p) {
  if (p.in.type == DType::kF32) {
    run<float>(p);
  } else {
    run<bf16>(p);
  }
}

}  // namespace foldscan::FOLDSCAN_ISA::ssm
