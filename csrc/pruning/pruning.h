// Pruning: activation statistics of channels, selection within groups, 2:4 sparse weights.
#pragma once

#include "core/types.h"

namespace foldscan::pruning {

// Rows of a statistics state (kStatistics, channels), fp64.
enum Statistic : int {
  kSumAbs = 0,      // over tokens
  kSumSquare = 1,   //
  kShift = 2,       // value of the first token: the variance is taken around it
  kSumShifted = 3,  // over tokens, of x - shift
  kSumShiftedSquare = 4,
  kSequenceMeanAbs = 5,        // over sequences, of the mean of |x|
  kSequenceMeanAbsSquare = 6,  // over sequences, of its square
  kSequenceNorm = 7,           // over sequences, of sqrt(sum x^2)
  kStatistics = 8
};

// Adds the tokens of x to a state. Sums are chains over tokens (and sequences) in order.
struct ScoreUpdate {
  const void* x;              // (tokens, channels), rows x_row elements apart
  const int32_t* cu_seqlens;  // (n + 1)
  double* state;              // (kStatistics, channels)
  int64_t n, channels, x_row;
  bool first;  // no token was seen before: the shift is taken from this x
  DType type;
};

// mask[i] = 1 for the `keep` largest scores of each group, the earlier index first among equals.
struct GroupTopK {
  const double* scores;   // (n), no NaN
  const int64_t* groups;  // (n): group of each score, 0 .. count - 1
  bool* mask;             // (n)
  int64_t n, count, keep;
};

// mask (rows, cols) = 1 for the two largest of every four consecutive scores of a row, the earlier first among equals.
struct Mask24 {
  const void* scores;  // (rows, cols) dense, cols a multiple of 4
  bool* mask;
  int64_t rows, cols;
  bool magnitude;  // compare absolute values
  DType type;
};

// Compressed 2:4 weight W (N, K), in panels of kPanel outputs, each stored along its outputs: it expands without a
// transposition, and a task reads one run of memory. Outputs beyond N are zeros.
//   values (panels, K / 2, kPanel)        the two kept elements of group g (k = 4 g ..) are rows 2 g and 2 g + 1
//   codes (panels, ceil(K / 8), kPanel)   bytes: low nibble group 2 b, high 2 b + 1; i0 + 4 i1, the places i0 < i1
constexpr int64_t kPanel = 64;

struct Compress24 {
  const void* weight;  // (N, K) dense
  const bool* mask;    // (N, K) dense, two of every four
  void* values;
  uint8_t* codes;
  int64_t N, K;
  DType type;
};

struct Linear24 {
  const void* x;  // (M, K), rows x_row apart
  const void* values;
  const uint8_t* codes;
  const float* bias;  // (N) or null
  void* out;          // (M, N) dense, x's type
  int64_t M, N, K, x_row;
  DType x_type, value_type;
};

struct Linear24Backward {
  const void* dout;  // (M, N) dense
  const void* values;
  const uint8_t* codes;
  void* dx;      // (M, K) dense or null
  float* dbias;  // (N) or null
  int64_t M, N, K;
  DType x_type, value_type;
};

namespace cpu {
void score_update(const ScoreUpdate& p);
void group_topk(const GroupTopK& p);
void mask_2_4(const Mask24& p);
void compress_2_4(const Compress24& p);
void linear_2_4(const Linear24& p);
void linear_2_4_backward(const Linear24Backward& p);
}  // namespace cpu

}  // namespace foldscan::pruning
