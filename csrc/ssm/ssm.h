// State-space operators: causal convolution, the Mamba-2 chunked scan (SSD), its cached form, single-step state update,
// the Mamba-1 selective scan, and gated RMSNorm.
//
// Shapes: T tokens, H heads, P channels a head, G groups (H % G == 0, head h reads group h / (H / G)), N state size,
// W convolution width, D channels. Strides are in elements; unless a stride is named the tensor is dense row-major.
#pragma once

#include "core/types.h"

namespace foldscan::ssm {

// How T = rows * length tokens fall apart into sequences. Either cu_seqlens (count + 1 cumulative lengths), or seq_idx
// (one id a token; a sequence is a run of equal ids within a row), or neither: each row is one sequence.
// State rows: with cu_seqlens sequence i owns row i of the initial and final states; otherwise the first sequence of a
// row reads that row's initial state and the last one writes its final state.
struct Sequences {
  int64_t rows, length;
  const int32_t* seq_idx;
  const int32_t* cu_seqlens;
  int64_t count;  // sequences in cu_seqlens
};

struct Segment {
  int64_t begin, end;   // tokens
  int64_t initial_row;  // -1: starts from zero
  int64_t final_row;    // -1: nobody wants the final state
  bool padding;         // negative seq_idx: the convolution gives zeros
};

int64_t max_segments(const Sequences& s);
// Fills out (room for max_segments) and returns how many there are.
int64_t fill_segments(const Sequences& s, Segment* out);

// Inputs of the scan, shared by all its forms. Rows (tokens) have strides, everything within a token is dense.
struct ScanInputs {
  const void* x;  // (T, H, P)
  const void* B;  // (T, G, N)
  const void* C;  // (T, G, N)
  const void* z;  // (T, H, P) or null
  int64_t x_stride, B_stride, C_stride, z_stride;
  const float* dt;       // (T, H)
  const float* A;        // (H), negative
  const float* D;        // (H) or (H, P) or null
  const float* dt_bias;  // (H) or null
  bool D_per_channel, softplus;
  float dt_min, dt_max;
  int64_t H, P, G, N;
  DType type;  // of x, B, C, z and out
};

struct ScanForward {
  ScanInputs in;
  Sequences seqs;
  const float* initial_states;  // (state rows, H, P, N) or null
  float* final_states;          // the same shape, or null
  void* out;                    // (T, H, P) dense
};

// Outputs may be null where nobody asks. dB, dC are in the input type; per-head gradients are fp32.
struct ScanBackward {
  ScanInputs in;
  Sequences seqs;
  const float* initial_states;
  const void* dout;            // (T, H, P) dense, input type
  const float* dfinal_states;  // or null
  void* dx;                    // (T, H, P)
  float* ddt;                  // (T, H)
  void* dB;                    // (T, G, N)
  void* dC;                    // (T, G, N)
  void* dz;                    // (T, H, P), null without z
  float* dA;                   // (H)
  float* dD;                   // (H, P), null without D
  float* ddt_bias;             // (H)
  float* dinitial_states;      // like initial_states, or null
};

constexpr int64_t kChunk = 64;     // tokens of a chunk: the grid that training and decoding share
constexpr int64_t kStatePad = 16;  // cached states are padded to a multiple of this in P

// Continues sequences whose past is in a cache; see ops.ScanCache. Sequence i: tokens cu_seqlens[i] .. cu_seqlens[i+1],
// cache slot slots[i], positions[i] tokens seen before.
struct ScanExtend {
  ScanInputs in;
  const int32_t* cu_seqlens;
  const int32_t* slots;
  const int32_t* positions;
  int64_t count;
  float* state;    // (slots, H, N, round_up(P, kStatePad)): state at the start of the current chunk
  void* x_rows;    // (slots, kChunk, H, P): the current chunk's tokens so far
  void* B_rows;    // (slots, kChunk, G, N)
  float* dt_rows;  // (slots, kChunk, H)
  void* out;       // (T, H, P)
};

// One step of the recurrence, in place: state = state * exp(dt A) + dt B x, out = C . state + D x, gated by z.
// A, D, dt and dt_bias are given per (head, channel) through strides, 0 where they are tied.
struct StateUpdate {
  void* state;           // (slots, H, P, N)
  const void *x, *z;     // (batch, H, P)
  const float* dt;       // (batch, H, P) through dt_strides
  const float* A;        // (H, P, N) through A_strides
  const void *B, *C;     // (batch, G, N)
  const float* D;        // (H, P) through D_strides, or null
  const float* dt_bias;  // (H, P) through bias_strides, or null
  const int32_t* slots;  // (batch) or null: row i; negative = padding, out is zero and no state is touched
  void* out;             // (batch, H, P)
  int64_t batch, H, P, G, N;
  int64_t dt_strides[3], A_strides[3], D_strides[2], bias_strides[2];
  bool softplus;
  DType type, state_type;
};

// Causal depthwise convolution; x, out, dout, dx share a type and are addressed as (row, channel, token).
struct Conv {
  const void* x;
  void* out;  // forward
  const void* dout;
  void* dx;
  const float* weight;         // (D, W)
  const float* bias;           // (D) or null
  float* dweight;              // (D, W)
  float* dbias;                // (D)
  const void* initial_states;  // (state rows, D, W - 1) or null, x's type
  void* dinitial_states;
  Sequences seqs;
  int64_t D, W;
  int64_t x_strides[3], out_strides[3];  // out_strides also for dout; dx uses x_strides
  int64_t dx_strides[3];
  bool silu;
  DType type;
};

// One or more new tokens a sequence, in place on conv_state (slots, D, state_len >= W - 1).
struct ConvUpdate {
  const void* x;  // (batch, D, tokens)
  void* conv_state;
  const float* weight;
  const float* bias;
  const int32_t* cache_seqlens;  // or null; else the state is a ring and this is the write position
  const int32_t* slots;          // or null; negative = padding
  void* out;
  int64_t batch, D, W, tokens, state_len;
  int64_t x_strides[3], state_strides[3], out_strides[3];
  bool silu;
  DType type;
};

// Mamba-1. u, delta, z, out (rows, D, L) dense; A (D, N); B, C (rows, G, N, L) dense, or (D, N) when constant in time.
struct SelectiveScan {
  const void *u, *delta, *z;
  const float* A;
  const void *B, *C;  // input type when they vary in time, else fp32
  const float *D_skip, *delta_bias;
  bool B_varies, C_varies, softplus;
  int64_t rows, D, L, N, G;
  DType type;
  void* out;
  float* last_state;  // (rows, D, N) or null
  // backward
  const void* dout;
  void *du, *ddelta, *dz;
  float *dA, *dB, *dC, *dD, *ddelta_bias;  // dB, dC in the shapes of B, C; fp32
};

// Gated RMSNorm over groups of `group` channels: before_gate ? norm(x) w * silu(z) : norm(x silu(z)) w, plus bias.
struct RmsNorm {
  const void *x, *z;           // (M, D), z or null
  const float *weight, *bias;  // (D), bias or null
  void* out;                   // (M, D)
  float* rstd;                 // (M, D / group)
  int64_t M, D, group, x_stride, z_stride;
  float eps;
  bool before_gate;
  DType type;
  // backward
  const void* dout;
  void *dx, *dz;
  float *dweight, *dbias;
};

namespace cpu {
void scan_forward(const ScanForward& p);
void scan_backward(const ScanBackward& p);
void scan_extend(const ScanExtend& p);
void state_update(const StateUpdate& p);
void conv_forward(const Conv& p);
void conv_backward(const Conv& p);
void conv_update(const ConvUpdate& p);
void selective_scan_forward(const SelectiveScan& p);
void selective_scan_backward(const SelectiveScan& p);
void rmsnorm_forward(const RmsNorm& p);
void rmsnorm_backward(const RmsNorm& p);
}  // namespace cpu

}  // namespace foldscan::ssm
