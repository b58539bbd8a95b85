// Grouped matrix multiplication: the shell around the micro-kernels that grouped_mm and the expert layer share.
//
// for_tiles cuts the rows of every group and the columns of the result into independent tasks; a task packs the columns
// of B that it needs into its own cache (or finds them packed) and runs all its rows over them, so that every weight is
// packed once a call, groups without rows cost nothing, and one row in one group still occupies every thread.
// outer_product is the weight gradient of one group: both operands are packed by rows, and a packed panel serves as the
// A operand without a transpose (gemm.h: row stride one element or pair, k stride one panel row).
//
// Every element of a product is one chain over K, in order, on one thread: a row's bits do not depend on the other
// rows, nor on the number of threads. A weight gradient sums the rows of its group in runs of kRowGroup, run after run:
// long chains lose digits.
#pragma once

#include "core/matmul.h"

namespace foldscan::FOLDSCAN_ISA::moe {

constexpr int64_t kTaskRows = 8 * kTileRows;  // rows that share one packing of B
constexpr int64_t kTaskCols = kTileCols / 2;  // most columns of a task: two matrices' tiles fit matmul's C
static_assert(kTaskCols % kNR == 0);
constexpr int64_t kRowGroup = 512;

// B of every group: B_g[k][n] = p[g * group + k * k_stride + n * n_stride], or packed ahead of time.
template <class T>
struct Operand {
  const void* p;
  DType type;
  int64_t group, k_stride, n_stride;
  const T* packed;

  // Columns [n, n + cols) of group g as panels; scratch holds them when they have to be packed.
  const T* panels(int64_t g, int64_t n, int64_t cols, int64_t K, int64_t N, Scratch& scratch) const {
    if (packed) return packed + g * b_packed_size<T>(K, N) + n / kNR * b_panel_size<T>(K);
    T* own = scratch.get<T>(b_packed_size<T>(K, cols));
    const int64_t at = g * group + n * n_stride;
    if (type == DType::kF32) {
      pack_b(static_cast<const float*>(p) + at, k_stride, n_stride, K, cols, own);
    } else {
      // fp32 activations never meet bf16 weights, so this copy is not needed there.
      if constexpr (sizeof(T) == 2) pack_b(static_cast<const bf16*>(p) + at, k_stride, n_stride, K, cols, own);
    }
    return own;
  }
};

// body(g, first row, rows, first column, columns) over all tiles; offs[g] .. offs[g + 1] are the rows of group g. Tiles
// have at most `rows` rows and `cols` columns, fewer columns where there would be few tiles, and one panel where all
// groups have few rows: then memory is what counts, and it is read best in one stream. Tiles of the same columns of a
// group follow one another.
template <class Body>
void for_tiles(const int64_t* offs, int64_t G, int64_t N, int64_t K, int64_t rows, int64_t cols, const Body& body) {
  Scratch scratch;
  int64_t* first = scratch.get<int64_t>(G + 1);
  int64_t blocks = 0, most = 0;
  for (int64_t g = 0; g < G; ++g) {
    blocks += ceil_div(offs[g + 1] - offs[g], rows);
    most = imax(most, offs[g + 1] - offs[g]);
  }
  cols = most <= kMR ? kNR : imax(kNR, imin(cols, blocks * N / 32 / kNR * kNR));
  const int64_t across = ceil_div(N, cols);
  first[0] = 0;
  for (int64_t g = 0; g < G; ++g) first[g + 1] = first[g] + ceil_div(offs[g + 1] - offs[g], rows) * across;
  parallel_for(first[G], grain_for(cols * K / 2), [&](int64_t task) {
    int64_t lo = 0, hi = G;  // first[lo] <= task < first[hi]
    while (hi - lo > 1) {
      const int64_t mid = (lo + hi) / 2;
      if (first[mid] <= task) {
        lo = mid;
      } else {
        hi = mid;
      }
    }
    const int64_t count = offs[lo + 1] - offs[lo], down = ceil_div(count, rows), local = task - first[lo];
    const int64_t step = round_up(ceil_div(count, down), kLoadRows);  // even shares
    const int64_t r = imin(count, local % down * step), n = local / down * cols;
    if (r < count) body(lo, offs[lo] + r, imin(step, count - r), n, imin(cols, N - n));
  });
}

// Panels of NB matrices in turn: panel j of what matmul_tile sees is panel j / NB of matrix j % NB.
template <class T, int NB>
struct InTurn {
  const T* b[NB];
  int64_t panel;
  FOLDSCAN_INLINE const T* run(int64_t n, int64_t k) const { return b[n / kNR % NB] + n / kNR / NB * panel + k * kNR; }
  FOLDSCAN_INLINE void prepare(int64_t, int64_t, int64_t, int64_t) const {}
};

// Two products one after the other, as one over 2 K: panels of the first matrix, then of the second.
template <class T>
struct AfterAnother {
  const T *first, *second;
  int64_t K, panel;
  FOLDSCAN_INLINE const T* run(int64_t n, int64_t k) const {
    return (k < K ? first + k * kNR : second + (k - K) * kNR) + n / kNR * panel;
  }
  FOLDSCAN_INLINE void prepare(int64_t, int64_t, int64_t, int64_t) const {}
};

// load_a for rows found through row(r, k), which points at element k of row r.
template <class T, class Row>
struct GatheredRows {
  Row row;
  FOLDSCAN_INLINE void operator()(int64_t r, int64_t rows, int64_t k, int64_t kc, T* dst, int64_t ld) const {
    for (int64_t i = 0; i < rows; ++i) copy_row(row(r + i, k), kc, dst + i * ld, round_up(kc, kK<T>));
  }
  FOLDSCAN_INLINE void ahead(int64_t r, int64_t rows, int64_t k, int64_t count) const {
    for (int64_t i = 0; i < rows; ++i) fetch_ahead(row(r + i, k), count * static_cast<int64_t>(sizeof(T)));
  }
};
template <class T, class Row>
GatheredRows<T, Row> gathered_rows(const Row& row) {
  return {row};
}

// The product of every group's rows with NB matrices (G, K, N) of its own. make_b(g, n, cols, scratch): the B of
// columns n .. n + cols, packed ahead of time or into scratch. store(g, r, n, count, values): values[i] are row r's
// fp32 results of matrix i in columns n .. n + count, within one panel. No run of K crosses a multiple of `segment`.
template <class T, int NB, class LoadA, class MakeB, class Store>
void multiply_groups(const int64_t* offs, int64_t G, int64_t N, int64_t K, int64_t segment, bool packed,
                     const LoadA& load_a, const MakeB& make_b, const Store& store) {
  // Where B is packed already, a task need not make up for packing it by many rows, nor hold it beside its C.
  const int64_t most_rows = packed ? kTileRows : kTaskRows, most_cols = packed && NB == 1 ? kTileCols : kTaskCols;
  for_tiles(offs, G, N, NB * K, most_rows, most_cols,
            [&](int64_t g, int64_t r0, int64_t rows, int64_t n0, int64_t cols) {
              Scratch scratch;
              const auto b = make_b(g, n0, cols, scratch);
              T* a = scratch.get<T>(kTileRows * (kKC + 2));
              float* c = scratch.get<float>(kTileRows * kTileCols);
              // Of several matrices the last panels are taken whole: their padding is multiplied, too, and not stored.
              const int64_t seen = NB == 1 ? cols : NB * round_up(cols, kNR);
              const auto put = [&](int64_t r, int64_t at, const float* last, int64_t) {
                if (at / kNR % NB != NB - 1) return;
                const float* values[NB];
                for (int i = 0; i < NB; ++i) values[i] = last - (NB - 1 - i) * kNR;
                const int64_t n = at / kNR / NB * kNR;
                store(g, r, n0 + n, imin(kNR, cols - n), values);
              };
              for (int64_t r = r0; r < r0 + rows; r += kTileRows) {
                const bool more = r + kTileRows < r0 + rows;
                matmul_tile<T, (NB > 1)>(r, imin(kTileRows, r0 + rows - r), 0, seen, K, segment, load_a, b, a, c,
                                         more     ? b.run(0, 0)
                                         : packed ? b.run(round_up(seen, kNR), 0)
                                                  : nullptr,
                                         put);
              }
            });
}

// Columns [n, min(n + kNR, N)) of the rows row(0) .. row(K - 1) as one panel (the layout of pack_b_rows).
template <class T, class Row>
void pack_panel(const Row& row, int64_t K, int64_t n, int64_t N, T* d) {
  const int64_t width = imin(kNR, N - n);
  if constexpr (sizeof(T) == 4) {
    for (int64_t k = 0; k < K; ++k, d += kNR) copy_row(row(k) + n, width, d, kNR);
  } else {
    for (int64_t k = 0; k < K; k += 2, d += 2 * kNR) {
      const T* p = row(k) + n;
      const T* q = k + 1 < K ? row(k + 1) + n : nullptr;
      for (int64_t i = 0; i < kNR; i += kLanes) {
        const int w = static_cast<int>(imax(0, imin(kLanes, width - i)));
        const int64_t at = w ? i : 0;
        VP::interleave(p + at, q ? q + at : nullptr, w).store(d + 2 * i);
      }
    }
  }
}

// out[m][n] = sum over k of A[k][m] B[k][n], both packed by pack_rows with K rows, rows [m, m + kNR) and columns
// [n, n + kTaskCols) of an (M, N) matrix of type `type`.
template <class T>
void outer_product_tile(int64_t K, int64_t M, int64_t N, int64_t m, int64_t n, const T* a, const T* b, void* out,
                        DType type) {
  const int64_t panel = b_panel_size<T>(K), rows = imin(kNR, M - m), cols = imin(kTaskCols, N - n);
  const T* pa = a + m / kNR * panel;
  const T* pb = b + n / kNR * panel;
  Scratch scratch;
  float* c = scratch.get<float>(kNR * kTaskCols);
  int64_t k = 0;
  do {
    const int64_t kc = imin(kRowGroup, K - k);
    gemm_run<T>(rows, cols, kc, pa + k * kNR, kK<T>, kNR * kK<T>, pb + k * kNR, panel, c, kTaskCols,
                k > 0 ? Into::kAdd : Into::kSet, k + kc < K ? pb + (k + kc) * kNR : nullptr);
    k += kc;
  } while (k < K);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = (m + i) * N + n;
    if (type == DType::kF32) {
      copy_row(c + i * kTaskCols, cols, static_cast<float*>(out) + at, cols);
    } else {
      copy_row(c + i * kTaskCols, cols, static_cast<bf16*>(out) + at, cols);
    }
  }
}

// Weight gradients of all groups: out_g (M, N) = A_g^T B_g, a row of either found through row(r). The groups go in
// waves whose packed rows fit kWaveBytes; a group without rows gets zeros.
constexpr int64_t kWaveBytes = int64_t{24} << 20;

template <class T, class RowA, class RowB>
void outer_products(const int64_t* offs, int64_t G, int64_t M, int64_t N, const RowA& row_a, const RowB& row_b,
                    void* out, DType type) {
  const int64_t pa = ceil_div(M, kNR), pb = ceil_div(N, kNR), nb = ceil_div(N, kTaskCols);
  const auto packed = [&](int64_t g) { return (pa + pb) * b_panel_size<T>(offs[g + 1] - offs[g]); };
  char* bytes = static_cast<char*>(out);
  const int64_t group_bytes = M * N * element_size(type);
  int64_t end = 0;
  for (int64_t g0 = 0; g0 < G; g0 = end) {
    Scratch scratch;
    int64_t* at = scratch.get<int64_t>(G + 1);
    int64_t size = 0, rows = 0;
    for (end = g0; end < G && (end == g0 || (size + packed(end)) * static_cast<int64_t>(sizeof(T)) <= kWaveBytes);
         ++end) {
      at[end] = size;
      size += packed(end);
      rows += offs[end + 1] - offs[end];
    }
    T* panels = scratch.get<T>(size);
    const int64_t waves = end - g0;
    parallel_for(waves * (pa + pb), grain_for(rows / imax(1, waves) * kNR / 4), [&](int64_t i) {
      const int64_t g = g0 + i / (pa + pb), j = i % (pa + pb), n = offs[g + 1] - offs[g], first = offs[g];
      T* to = panels + at[g] + j * b_panel_size<T>(n);
      if (j < pa) {
        pack_panel<T>([&](int64_t r) { return row_a(first + r); }, n, j * kNR, M, to);
      } else {
        pack_panel<T>([&](int64_t r) { return row_b(first + r); }, n, (j - pa) * kNR, N, to);
      }
    });
    parallel_for(waves * pa * nb, grain_for(kNR * kTaskCols * imax(1, rows / imax(1, waves)) / 16), [&](int64_t i) {
      const int64_t g = g0 + i / (pa * nb), tile = i % (pa * nb), n = offs[g + 1] - offs[g];
      const T* a = panels + at[g];
      outer_product_tile<T>(n, M, N, tile / nb * kNR, tile % nb * kTaskCols, a, a + pa * b_panel_size<T>(n),
                            bytes + g * group_bytes, type);
    });
  }
}

}  // namespace foldscan::FOLDSCAN_ISA::moe
