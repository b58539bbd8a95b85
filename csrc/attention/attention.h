// Softmax attention over packed sequences: parameters of the kernels.
//
// One layout serves all: sequence s has query rows cu_q[s] .. cu_q[s+1] and keys cu_k[s] .. cu_k[s+1]. Without a block
// table the keys are rows of k at those places. With one, only the number of keys matters, and key j of sequence s lies
// in slot j % page_size of page block_table[s][j / page_size].
//
// Query i of Lq sees the keys j of Lk with  -window_left <= j - (i + Lk - Lq) <= window_right  (a negative window is
// unlimited): the diagonal ends at the last query and the last key. Causal is window_right = 0.
#pragma once

#include "core/types.h"

namespace foldscan::attention {

struct Problem {
  const void* q;                                        // (total_q, Hq, D)
  const void* k;                                        // (total_k, Hkv, D), or pages (pages, page_size, Hkv, D)
  const void* v;                                        // as k, with Dv
  const int32_t* cu_q;                                  // (n + 1)
  const int32_t* cu_k;                                  // (n + 1)
  const int32_t* block_table;                           // (n, table_stride) or null
  const float* sinks;                                   // (Hq) or null: a logit that joins the denominator only
  int64_t n, Hq, Hkv, D, Dv;                            // Hq is a multiple of Hkv
  int64_t q_row, q_head, k_row, k_head, v_row, v_head;  // strides in elements; the last dimension is dense
  int64_t k_page, v_page, page_size, table_stride;
  int64_t window_left, window_right;
  float scale, softcap;  // score = scale q.k, then softcap tanh(score / softcap) when softcap > 0
  DType type;
};

struct Forward {
  Problem p;
  void* out;   // (total_q, Hq, Dv) dense
  float* lse;  // (Hq, total_q): natural logarithm of the denominator; -inf for a row with no key and no sink
};

// Gradients of all inputs, from the gradients of out and lse. Not for a block table.
struct Backward {
  Problem p;
  const void* out;  // (total_q, Hq, Dv) dense, as dout
  const void* dout;
  const float* lse;   // (Hq, total_q), as dlse
  const float* dlse;  // or null
  void* dq;           // (total_q, Hq, D) dense, p.type; dk and dv likewise
  void* dk;
  void* dv;
  float* dsinks;  // (Hq) or null
};

// Writes the rows of sequence s, cu_seqlens[s] .. cu_seqlens[s+1] of k and v, into its pages as keys positions[s] ...
// Rows are copied as bytes: k and its cache have one type.
struct CacheAppend {
  const void* k;  // (total, Hkv, D)
  const void* v;
  void* k_cache;  // (pages, page_size, Hkv, D)
  void* v_cache;
  const int32_t* block_table;  // (n, table_stride)
  const int32_t* cu_seqlens;   // (n + 1)
  const int32_t* positions;    // (n)
  int64_t n, Hkv, page_size, table_stride;
  int64_t k_head_bytes, v_head_bytes;  // bytes of one head of one key
  // Strides in bytes; a head is dense.
  int64_t k_row, k_head, v_row, v_head;
  int64_t k_page, k_slot, k_cache_head, v_page, v_slot, v_cache_head;
};

// out = x with the first 2 r features of every head rotated by the angles of its token's position; feature i turns with
// i + r, or 2 i with 2 i + 1 (interleaved).
struct Rotary {
  const void* x;             // (tokens, heads, D), last dimension dense
  void* out;                 // (tokens, heads, D) dense
  const float *cos, *sin;    // (length, r) dense
  const int32_t* positions;  // (tokens)
  int64_t tokens, heads, D, r, x_row, x_head;
  bool interleaved;
  DType type;
};

// Two attentions over disjoint sets of keys become the one over their union. Rows are (batch, seqlen, heads), dense;
// lse is (batch, heads, seqlen), dense.
struct Merge {
  const void *out_a, *out_b;
  const float *lse_a, *lse_b;
  void* out;
  float* lse;
  int64_t batch, seqlen, heads, D;
  DType type;
};

struct MergeBackward {
  Merge p;  // with the results
  const void* dout;
  const float* dlse;
  void *dout_a, *dout_b;
  float *dlse_a, *dlse_b;
};

namespace cpu {
void forward(const Forward& p);
void backward(const Backward& p);
void cache_append(const CacheAppend& p);
void rotary(const Rotary& p);
void merge(const Merge& p);
void merge_backward(const MergeBackward& p);
}  // namespace cpu

}  // namespace foldscan::attention
