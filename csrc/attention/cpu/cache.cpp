// New keys and values into their slots of a paged cache: a copy, one task a token. And the rotation of queries and keys
// by their positions (RoFormer, arXiv:2104.09864, equation 34): fp32, rounded once, every token on its own.
#include "attention/cpu/tiles.h"

namespace foldscan::FOLDSCAN_ISA::attention {
namespace {

void copy_heads(const char* from, int64_t from_head, char* to, int64_t to_head, int64_t heads, int64_t bytes) {
  for (int64_t h = 0; h < heads; ++h) std::memcpy(to + h * to_head, from + h * from_head, static_cast<size_t>(bytes));
}

template <class T>
void rotate_head(const T* x, const float* cos, const float* sin, const Rotary& p, T* out) {
  if (p.interleaved) {
    for (int64_t i = 0; i < p.r; ++i) {
      const float a = to_float(x[2 * i]), b = to_float(x[2 * i + 1]);
      out[2 * i] = from_float<T>(a * cos[i] - b * sin[i]);
      out[2 * i + 1] = from_float<T>(a * sin[i] + b * cos[i]);
    }
  } else {
    for (int64_t i = 0; i < p.r; i += kLanes) {
      const int64_t n = p.r - i;
      const VF a = load_upto(x + i, n), b = load_upto(x + p.r + i, n);
      const VF c = load_upto(cos + i, n), s = load_upto(sin + i, n);
      store_upto(a * c - b * s, out + i, n);
      store_upto(a * s + b * c, out + p.r + i, n);
    }
  }
  copy_row(x + 2 * p.r, p.D - 2 * p.r, out + 2 * p.r, p.D - 2 * p.r);
}

template <class T>
void run_rotary(const Rotary& p) {
  parallel_for(p.tokens, grain_for(p.heads * p.D), [&](int64_t t) {
    const float *cos = p.cos + p.positions[t] * p.r, *sin = p.sin + p.positions[t] * p.r;
    for (int64_t h = 0; h < p.heads; ++h)
      rotate_head(static_cast<const T*>(p.x) + t * p.x_row + h * p.x_head, cos, sin, p,
                  static_cast<T*>(p.out) + (t * p.heads + h) * p.D);
  });
}

}  // namespace

void rotary(const Rotary& p) {
  if (p.type == DType::kF32) {
    run_rotary<float>(p);
  } else {
    run_rotary<bf16>(p);
  }
}

void cache_append(const CacheAppend& p) {
  Scratch scratch;
  int64_t* starts = scratch.get<int64_t>(p.n + 1);
  for (int64_t s = 0; s <= p.n; ++s) starts[s] = p.cu_seqlens[s];
  parallel_for(starts[p.n], grain_for(p.Hkv * (p.k_head_bytes + p.v_head_bytes) / 8), [&](int64_t token) {
    const int64_t seq = find_sequence(starts, p.n, token);
    const int64_t key = p.positions[seq] + token - starts[seq];
    const int64_t page = p.block_table[seq * p.table_stride + key / p.page_size], slot = key % p.page_size;
    copy_heads(static_cast<const char*>(p.k) + token * p.k_row, p.k_head,
               static_cast<char*>(p.k_cache) + page * p.k_page + slot * p.k_slot, p.k_cache_head, p.Hkv,
               p.k_head_bytes);
    copy_heads(static_cast<const char*>(p.v) + token * p.v_row, p.v_head,
               static_cast<char*>(p.v_cache) + page * p.v_page + slot * p.v_slot, p.v_cache_head, p.Hkv,
               p.v_head_bytes);
  });
}

}  // namespace foldscan::FOLDSCAN_ISA::attention
