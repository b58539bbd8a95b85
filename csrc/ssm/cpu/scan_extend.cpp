// Mamba-2 SSD with a cache: prefill, prefill in pieces and decoding are this one function.
//
// The cache of a sequence is the state at the start of its current chunk and the tokens of that chunk so far. New
// tokens complete the chunk with the arithmetic of scan_chunk.h, so outputs equal those of scan_forward on the whole
// sequence bit for bit; the state is read at every step but written only once in 64. Bytes of a decode step: the states
// once (4 H P N), half a chunk of x and B.
#include "ssm/cpu/scan_chunk.h"

namespace foldscan::FOLDSCAN_ISA::ssm {
namespace {

// The first chunk of a call joins cached rows [0, offset) with new ones; later chunks are read where they are.
template <class T>
struct ChunkRows {
  Rows<T> x, B;
  const float* dt;
};

template <class T>
ChunkRows<T> gather(const ScanExtend& p, int64_t slot, int64_t t, int64_t offset, int64_t q, int64_t g, int64_t h0,
                    int64_t heads, Scratch& scratch) {
  const ScanInputs& in = p.in;
  const int64_t P = in.P, N = in.N, width = heads * P, ld_b = round_up(N, kK<T>);
  T* x = scratch.get<T>(q * width);
  T* B = scratch.get<T>(q * ld_b);
  float* dt = scratch.get<float>(q * in.H);
  const T* x_old = static_cast<const T*>(p.x_rows) + slot * kChunk * in.H * P + h0 * P;
  const T* B_old = static_cast<const T*>(p.B_rows) + slot * kChunk * in.G * N + g * N;
  const T* x_new = static_cast<const T*>(in.x) + t * in.x_stride + h0 * P;
  const T* B_new = static_cast<const T*>(in.B) + t * in.B_stride + g * N;
  for (int64_t i = 0; i < q; ++i) {
    const bool old = i < offset;
    copy_row(old ? x_old + i * in.H * P : x_new + (i - offset) * in.x_stride, width, x + i * width, width);
    copy_row(old ? B_old + i * in.G * N : B_new + (i - offset) * in.B_stride, N, B + i * ld_b, ld_b);
    copy_row((old ? p.dt_rows + (slot * kChunk + i) * in.H : in.dt + (t + i - offset) * in.H) + h0, heads,
             dt + i * in.H + h0, heads);
  }
  return {{x, width}, {B, ld_b}, dt};
}

template <class T>
void run_sequence(const ScanExtend& p, int64_t i, int64_t g, int64_t h0, int64_t heads) {
  const ScanInputs& in = p.in;
  const int64_t P = in.P, N = in.N, ld = state_ld(P), slot = p.slots[i];
  Scratch scratch;
  float* w = scratch.get<float>(kChunk * kChunk);
  float* y = scratch.get<float>(kChunk * ld);
  Decay* d = scratch.get<Decay>(1);
  float* states = p.state + (slot * in.H + h0) * N * ld;
  if (p.positions[i] == 0)
    for (int64_t j = 0; j < heads; ++j) load_state(nullptr, P, N, states + j * N * ld, ld);
  const T* z = static_cast<const T*>(in.z);
  T* out = static_cast<T*>(p.out);
  int64_t offset = p.positions[i] % kChunk;
  for (int64_t t = p.cu_seqlens[i], end = p.cu_seqlens[i + 1]; t < end;) {
    const int64_t added = imin(kChunk - offset, end - t), q = offset + added;
    Scratch chunk;
    const auto rows = gather<T>(p, slot, t, offset, q, g, h0, heads, chunk);
    const auto C = as_rows(static_cast<const T*>(in.C) + t * in.C_stride + g * N, in.C_stride, added, N, chunk);
    const GroupChunk<T> group = group_chunk(rows.B, C, offset, q, N, q == kChunk, chunk);
    for (int64_t j = 0; j < heads; ++j) {
      const int64_t h = h0 + j;
      const T* xh = rows.x.p + j * P;
      float* state = states + j * N * ld;
      load_delta(in, rows.dt, in.H, h, q, d->delta);
      fill_decay(in.A[h], offset, q, *d, w);
      const Upcoming<T> out_rows{out + (t * in.H + h) * P, in.H * P, P, added};
      chunk_output(group, C, xh, rows.x.ld, *d, w, state, ld, offset, q, N, P, y, ld, out_rows);
      for (int64_t l = 0; l < added; ++l)
        finish_row(in, h, y + l * ld, xh + (offset + l) * rows.x.ld, z ? z + (t + l) * in.z_stride + h * P : nullptr,
                   out + ((t + l) * in.H + h) * P);
      if (q == kChunk) chunk_state(group, xh, rows.x.ld, *d, q, N, P, state, ld, Upcoming<T>{});
    }
    t += added;
    offset = 0;
  }
}

// The tokens of the last, unfinished chunk go into the cache, after every task has read the old ones.
template <class T>
void remember(const ScanExtend& p, int64_t i) {
  const ScanInputs& in = p.in;
  const int64_t begin = p.cu_seqlens[i], end = p.cu_seqlens[i + 1], slot = p.slots[i];
  const int64_t total = p.positions[i] + end - begin;
  const int64_t chunk_begin = total - total % kChunk;
  for (int64_t position = imax(chunk_begin, p.positions[i]); position < total; ++position) {
    const int64_t t = begin + position - p.positions[i], row = slot * kChunk + position % kChunk;
    copy_row(static_cast<const T*>(in.x) + t * in.x_stride, in.H * in.P, static_cast<T*>(p.x_rows) + row * in.H * in.P,
             in.H * in.P);
    copy_row(static_cast<const T*>(in.B) + t * in.B_stride, in.G * in.N, static_cast<T*>(p.B_rows) + row * in.G * in.N,
             in.G * in.N);
    copy_row(in.dt + t * in.H, in.H, p.dt_rows + row * in.H, in.H);
  }
}

template <class T>
void run(const ScanExtend& p) {
  const ScanInputs& in = p.in;
  const int64_t heads = in.H / in.G;
  // Tasks of a group share its C B^T and its packed B, which for one token is most of the work.
  const HeadBlocks blocks(heads, imin(16, ceil_div(p.count * in.H, num_threads())));
  const int64_t per_sequence = in.G * blocks.per_group;
  parallel_for(p.count * per_sequence, 1, [&](int64_t task) {
    const int64_t block = task % per_sequence, g = block / blocks.per_group;
    const int64_t first = block % blocks.per_group * blocks.size;
    run_sequence<T>(p, task / per_sequence, g, g * heads + first, imin(blocks.size, heads - first));
  });
  parallel_for(p.count, grain_for(in.H * in.P), [&](int64_t i) { remember<T>(p, i); });
}

}  // namespace

void scan_extend(const ScanExtend& p) {
  if (p.in.type == DType::kF32) {
    run<float>(p);
  } else {
    run<bf16>(p);
  }
}

}  // namespace foldscan::FOLDSCAN_ISA::ssm
