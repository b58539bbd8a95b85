// 2:4 sparse weights: mask, compression, and the linear layer that reads the compressed form.
//
// Algorithm: a task owns kRows x kColumns outputs. For a piece of K it expands panels of the compressed weight into the
//   layout of the GEMM micro-kernel, in L1, and multiplies; with few rows that streams the compressed bytes from memory
//   once, with many the expansion is shared by all rows of the task.
// FLOPs: 2 M N K (the zeros are multiplied). Bytes of the weight: 9/16 of a dense bf16 one, 17/32 of fp32, once for
//   every kRows rows.
// Numerics and determinism: every output is summed over k in order and in the runs of core/matmul.h, zeros included:
// the
//   same bits as csrc/linear with the dense masked weight, whatever the number of rows and threads.
#include "core/matmul.h"
#include "pruning/pruning.h"

namespace foldscan::FOLDSCAN_ISA::pruning {
namespace {

using namespace foldscan::pruning;

constexpr int64_t kRows = 192;
constexpr int64_t kColumns = 4 * kNR;
// K of an expanded piece, a multiple of 8 (one byte of codes): a panel of it is at most 32 KB and within a run.
template <class T>
constexpr int64_t kPiece = 32768 / (kNR * 4) * kK<T> < kKC ? 32768 / (kNR * 4) * kK<T> : kKC;

// sum += run, on a tile with rows of kColumns.
FOLDSCAN_INLINE void add_run(const float* run, int64_t rows, int64_t cols, float* sum) {
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = m * kColumns; n < m * kColumns + cols; n += kLanes)
      (VF::load(sum + n) + VF::load(run + n)).store(sum + n);
}

// Two kept values (as bits) and their places for kNR columns of one group of four k. Plain arrays
// of one word size: the loops over columns become vector instructions.
struct Group {
  alignas(64) uint32_t v0[kNR], v1[kNR], i0[kNR], i1[kNR];

  // The value at place k, or zero.
  FOLDSCAN_INLINE uint32_t at(int64_t i, uint32_t k) const {
    return (i0[i] == k ? v0[i] : 0u) | (i1[i] == k ? v1[i] : 0u);
  }
};

template <class T>
FOLDSCAN_INLINE void load_bits(const T* row, uint32_t* bits) {
  if constexpr (sizeof(T) == 4) {
    std::memcpy(bits, row, kNR * 4);
  } else {
    for (int64_t i = 0; i < kNR; ++i) bits[i] = row[i].bits;
  }
}

static_assert(kPanel % kNR == 0 && kKC % kPiece<float> == 0 && kKC % kPiece<bf16> == 0);

// Where the columns from n on (a multiple of kNR) of a compressed weight lie.
template <class W>
struct Columns {
  const W* values;
  const uint8_t* codes;

  FOLDSCAN_INLINE Columns(const void* all_values, const uint8_t* all_codes, int64_t K, int64_t n)
      : values(static_cast<const W*>(all_values) + n / kPanel * (K / 2) * kPanel + n % kPanel),
        codes(all_codes + n / kPanel * ceil_div(K, 8) * kPanel + n % kPanel) {}
};

template <class T, class W>
FOLDSCAN_INLINE void load_group(const Columns<W>& from, int64_t group, Group& g) {
  alignas(64) T row[kNR];
  copy_row(from.values + 2 * group * kPanel, kNR, row, kNR);
  load_bits(row, g.v0);
  copy_row(from.values + (2 * group + 1) * kPanel, kNR, row, kNR);
  load_bits(row, g.v1);
  const uint8_t* code = from.codes + group / 2 * kPanel;
  const int shift = group % 2 ? 4 : 0;
  for (int64_t i = 0; i < kNR; ++i) {
    const uint32_t c = static_cast<uint32_t>(code[i]) >> shift;
    g.i0[i] = c & 3;
    g.i1[i] = c >> 2 & 3;
  }
}

// K rows [k, k + count) (multiples of 4) of kNR columns, packed as pack_b does.
template <class T, class W>
void expand_panel(const Columns<W>& from, int64_t k, int64_t count, T* dst) {
  Group g;
  uint32_t* __restrict to = reinterpret_cast<uint32_t*>(dst);
  for (int64_t j = 0; j < count; j += 4) {
    load_group<T>(from, (k + j) / 4, g);
    if constexpr (sizeof(T) == 4) {
      for (uint32_t r = 0; r < 4; ++r, to += kNR)
        for (int64_t i = 0; i < kNR; ++i) to[i] = g.at(i, r);
    } else {
      for (uint32_t r = 0; r < 4; r += 2, to += kNR)
        for (int64_t i = 0; i < kNR; ++i) to[i] = g.at(i, r) | g.at(i, r + 1) << 16;
    }
  }
}

template <class X, class W>
void run_linear(const Linear24& p) {
  const int64_t mb = ceil_div(p.M, kRows), columns = mb == 1 ? kNR : kColumns, nb = ceil_div(p.N, columns);
  const StridedRows<X, X> load_a{static_cast<const X*>(p.x), p.x_row, 1};
  parallel_for(mb * nb, grain_for(imin(p.M, kRows) * columns * p.K / 16), [&](int64_t task) {
    const int64_t m0 = task % mb * kRows, n0 = task / mb * columns;
    const int64_t rows = imin(kRows, p.M - m0), cols = imin(columns, p.N - n0);
    Scratch scratch;
    X* a = scratch.get<X>(kRows * (kPiece<X> + 2));
    X* b = scratch.get<X>(kPiece<X> * kNR);
    float* run = scratch.get<float>(kRows * kColumns);
    float* c = scratch.get<float>(kRows * kColumns);
    constexpr int64_t lda = kPiece<X> + 2;
    for (int64_t k = 0; k < p.K || k == 0; k += kPiece<X>) {
      const int64_t count = imin(kPiece<X>, p.K - k);
      load_a(m0, rows, k, count, a, lda);
      float* to = k < kKC ? c : run;
      for (int64_t n = 0; n < cols; n += kNR) {
        const int64_t width = imin(kNR, cols - n);
        expand_panel(Columns<W>(p.values, p.codes, p.K, n0 + n), k, count, b);
        gemm_block<X>(rows, width, count, a, lda, kK<X>, b, kNR * kK<X>, 0, to + n, kColumns, k % kKC != 0);
      }
      if (k >= kKC && ((k + count) % kKC == 0 || k + count == p.K)) add_run(run, rows, cols, c);
    }
    X* out = static_cast<X*>(p.out) + m0 * p.N + n0;
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t n = 0; n < cols; n += kLanes) {
        VF v = load_upto(c + m * kColumns + n, cols - n);
        if (p.bias) v = v + load_upto(p.bias + n0 + n, cols - n);
        store_upto(v, out + m * p.N + n, cols - n);
      }
  });
}

// dx (M, K) = dout (M, N) W: the weight is expanded to dense (K, N) once and packed along K.
template <class X, class W>
void run_backward(const Linear24Backward& p) {
  const X* dout = static_cast<const X*>(p.dout);
  if (p.dx) {
    Scratch scratch;
    X* dense = scratch.get<X>(p.K * p.N);
    parallel_for(p.K / 4, grain_for(p.N * 4), [&](int64_t group) {
      Group g;
      for (int64_t n = 0; n < p.N; n += kNR) {
        const int64_t width = imin(kNR, p.N - n);
        load_group<X>(Columns<W>(p.values, p.codes, p.K, n), group, g);
        for (uint32_t r = 0; r < 4; ++r)
          for (int64_t i = 0; i < width; ++i) {
            const uint32_t u = g.at(i, r);
            std::memcpy(dense + (4 * group + r) * p.N + n + i, &u, sizeof(X));
          }
      }
    });
    X* packed = scratch.get<X>(b_packed_size<X>(p.N, p.K));
    pack_b_parallel(dense, 1, p.N, p.N, p.K, packed);
    X* dx = static_cast<X*>(p.dx);
    matmul<X>(
        p.M, p.K, p.N, StridedRows<X, X>{dout, p.N, 1}, packed,
        [&](int64_t m, int64_t k, const float* row, int64_t count) { copy_row(row, count, dx + m * p.K + k, count); });
  }
  if (p.dbias) column_sums(dout, p.M, p.N, p.dbias);
}

template <class T>
void run_mask(const Mask24& p) {
  const T* scores = static_cast<const T*>(p.scores);
  parallel_for(p.rows, grain_for(p.cols * 4), [&](int64_t r) {
    for (int64_t c = 0; c < p.cols; c += 4) {
      float s[4];
      for (int i = 0; i < 4; ++i) {
        s[i] = to_float(scores[r * p.cols + c + i]);
        if (p.magnitude && s[i] < 0) s[i] = -s[i];
      }
      int first = 0;
      for (int i = 1; i < 4; ++i)
        if (s[i] > s[first]) first = i;
      int second = first == 0 ? 1 : 0;
      for (int i = second + 1; i < 4; ++i)
        if (i != first && s[i] > s[second]) second = i;
      for (int i = 0; i < 4; ++i) p.mask[r * p.cols + c + i] = i == first || i == second;
    }
  });
}

template <class T>
void run_compress(const Compress24& p) {
  const T* weight = static_cast<const T*>(p.weight);
  T* values = static_cast<T*>(p.values);
  // A task takes the groups of a few cache lines of every row.
  constexpr int64_t kGroups = 16;
  const int64_t pieces = ceil_div(p.K / 4, kGroups), code_rows = ceil_div(p.K, 8);
  parallel_for(ceil_div(p.N, kPanel) * pieces, grain_for(kPanel * kGroups * 8), [&](int64_t task) {
    const int64_t panel = task / pieces, begin = task % pieces * kGroups, end = imin(p.K / 4, begin + kGroups);
    for (int64_t i = 0; i < kPanel; ++i) {
      const int64_t n = panel * kPanel + i;
      for (int64_t g = begin; g < end; ++g) {
        T* to = values + (panel * (p.K / 2) + 2 * g) * kPanel + i;
        uint8_t& byte = p.codes[(panel * code_rows + g / 2) * kPanel + i];
        int place[2] = {0, 1}, found = 0;
        to[0] = to[kPanel] = from_float<T>(0.0f);
        if (n < p.N) {
          for (int c = 0; c < 4; ++c)
            if (p.mask[n * p.K + 4 * g + c] && found < 2) place[found++] = c;
          for (int c = 0; c < 2; ++c) to[c * kPanel] = weight[n * p.K + 4 * g + place[c]];
        }
        const uint8_t code = static_cast<uint8_t>(place[0] + 4 * place[1]);
        byte = static_cast<uint8_t>(g % 2 ? byte | code << 4 : code);
      }
    }
  });
}

}  // namespace

void linear_2_4(const Linear24& p) {
  if (p.x_type == DType::kF32) {
    run_linear<float, float>(p);
  } else if (p.value_type == DType::kF32) {
    run_linear<bf16, float>(p);
  } else {
    run_linear<bf16, bf16>(p);
  }
}

void linear_2_4_backward(const Linear24Backward& p) {
  if (p.x_type == DType::kF32) {
    run_backward<float, float>(p);
  } else if (p.value_type == DType::kF32) {
    run_backward<bf16, float>(p);
  } else {
    run_backward<bf16, bf16>(p);
  }
}

void mask_2_4(const Mask24& p) {
  if (p.type == DType::kF32) {
    run_mask<float>(p);
  } else {
    run_mask<bf16>(p);
  }
}

void compress_2_4(const Compress24& p) {
  if (p.type == DType::kF32) {
    run_compress<float>(p);
  } else {
    run_compress<bf16>(p);
  }
}

}  // namespace foldscan::FOLDSCAN_ISA::pruning
