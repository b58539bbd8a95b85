// New keys and values into their slots of a paged cache: a copy, one task a token.
#include "attention/cpu/tiles.h"

namespace foldscan::FOLDSCAN_ISA::attention {
namespace {

void copy_heads(const char* from, int64_t from_head, char* to, int64_t to_head, int64_t heads, int64_t bytes) {
  for (int64_t h = 0; h < heads; ++h) std::memcpy(to + h * to_head, from + h * from_head, static_cast<size_t>(bytes));
}

}  // namespace

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
