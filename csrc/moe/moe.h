// Mixture of Experts: routing, permutation by expert, grouped matrix multiplication and the fused expert layer.
//
// An *assignment* is one of the k slots of a token: id = t * k + j. *Rows* are assignments sorted by expert, stable in
// the id. An expert of -1 is an empty slot.
#pragma once

#include "core/types.h"

namespace foldscan::moe {

enum class Activation : int32_t { kSilu = 0, kRelu2 = 1, kGelu = 2 };

struct RouteMode {
  int64_t num_groups, groups_topk;  // 1, 1: no limit
  float scaling;
  bool sigmoid, pre_softmax, normalize;
};

// Top-k of every row of logits. Everything is contiguous.
struct Route {
  const float* logits;  // (T, E)
  const float* bias;    // (E) or null; steers the choice only
  float* probs;         // (T, k)
  int64_t* experts;     // (T, k), best first
  int64_t T, E, k;
  RouteMode mode;
};

struct RouteBackward {
  const float* logits;     // (T, E)
  const int64_t* experts;  // (T, k)
  const float* dprobs;     // (T, k)
  float* dlogits;          // (T, E)
  int64_t T, E, k;
  RouteMode mode;
};

// Stable counting sort of assignments by expert.
struct Sort {
  const int64_t* experts;  // (n), in [-1, E)
  const float* probs;      // (n), read when capacity >= 0 and not by_position
  int64_t* rows;           // (R): assignment of each row, -1 for padding and beyond the last row
  int64_t* inverse;        // (n): row of each assignment, -1 if empty or dropped
  int64_t* counts;         // (E): assignments kept
  int32_t* offs;           // (E): end of each expert's rows
  int64_t n, E, R;
  int64_t capacity;  // most assignments an expert keeps, or -1
  bool by_position;  // keep the first, not the most probable
  bool pad;          // every expert has exactly `capacity` rows
};

// out[r] = tokens[rows[r] / k], zero where rows[r] < 0.
struct Gather {
  const void* tokens;  // (T, H) contiguous
  const int64_t* rows;
  void* out;  // (R, H)
  int64_t R, k, H;
  DType type;
};

// out[t] = sum over j of probs[t, j] * permuted[inverse[t, j]], in the order of j.
struct Combine {
  const void* permuted;    // (R, H) contiguous
  const int64_t* inverse;  // (T, k)
  const float* probs;      // (T, k) or null for ones
  void* out;               // (T, H)
  int64_t T, k, H;
  DType type;
};

struct CombineBackward {
  const void* dout;        // (T, H) contiguous
  const void* permuted;    // (R, H) contiguous
  const int64_t* rows;     // (R)
  const int64_t* inverse;  // (T, k)
  const float* probs;      // (T, k) or null
  void* dpermuted;         // (R, H) or null
  float* dprobs;           // (T, k) or null
  int64_t R, T, k, H;
  DType type;
};

// out[r] = a[r] b[g] + bias[g] for the rows r of group g; rows beyond the last group are zero.
struct GroupedMm {
  const void* a;        // (R, K), dense rows
  const void* b;        // (G, K, N)
  const int32_t* offs;  // (G)
  const float* bias;    // (G, N) contiguous or null
  void* out;            // (R, N) contiguous
  int64_t R, K, N, G;
  int64_t a_stride, b_group, b_k, b_n;  // one of b_k, b_n is 1
  DType a_type, b_type;
};

struct GroupedMmBackward {
  const void* dout;  // (R, N) contiguous
  const void* a;
  const void* b;
  const int32_t* offs;
  void* da;      // (R, K) contiguous or null
  void* db;      // (G, K, N) contiguous or null, b's type
  float* dbias;  // (G, N) or null
  int64_t R, K, N, G;
  int64_t a_stride, b_group, b_k, b_n;
  DType a_type, b_type;
};

// The expert layer. Weights are dense (E, out, in).
struct ExpertWeights {
  const void* up;                                     // (E, F, H)
  const void* gate;                                   // (E, F, H) or null
  const void* down;                                   // (E, D, F)
  const void *packed_up, *packed_gate, *packed_down;  // from pack(), or null: then the weights are packed on the way
  DType type;
};

struct ExpertForward {
  const void* tokens;  // (T, H) contiguous
  const float* probs;  // (T, k)
  const int64_t* experts;
  ExpertWeights w;
  void* out;        // (T, D)
  void *up, *gate;  // (T k, F): pre-activations of the sorted rows, kept for backward, or null
  void* hidden;     // (T k, F) workspace of the tokens' type
  float* y;         // (T k, D) workspace where k > 1
  int64_t T, k, E, H, F, D;
  Activation activation;
  DType type;
};

struct ExpertBackward {
  const void* dout;  // (T, D) contiguous
  const void* tokens;
  const float* probs;
  const int64_t* experts;
  ExpertWeights w;  // packed_* are not read
  const void *up, *gate;
  void* dtokens;                    // (T, H) or null
  float* dprobs;                    // (T, k) or null
  void *dw_up, *dw_gate, *dw_down;  // of the weights' type, or null
  void *du, *dg, *hp;               // (T k, F) workspaces of the tokens' type; dg may be null without a gate
  float* dx;                        // (T k, H) workspace when dtokens is given and k > 1
  int64_t T, k, E, H, F, D;
  Activation activation;
  DType type;
};

// All experts of a weight (E, N, K) into the layout of the micro-kernels of the ISA in use.
struct PackExperts {
  const void* weight;
  void* packed;  // E * linear::PackedBytes(N, K)
  int64_t E, N, K;
  DType weight_type, type;
};

namespace cpu {
void route(const Route& p);
void route_backward(const RouteBackward& p);
void sort(const Sort& p);
void gather(const Gather& p);
void combine(const Combine& p);
void combine_backward(const CombineBackward& p);
void grouped_mm(const GroupedMm& p);
void grouped_mm_backward(const GroupedMmBackward& p);
void expert_forward(const ExpertForward& p);
void expert_backward(const ExpertBackward& p);
void pack_experts(const PackExperts& p);
}  // namespace cpu

}  // namespace foldscan::moe
