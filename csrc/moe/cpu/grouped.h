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

constexpr int64_t kTaskRows = 8 * kTileRows;           // rows that share one packing of B
constexpr int64_t kTaskCols = kNR >= 256 ? kNR : 256;  // most columns of a task, a multiple of kNR on every ISA
static_assert(kTaskCols % kNR == 0);
constexpr int64_t kRowGroup = 512;

// B of every group: B_g[k][n] = p[g * group + k * k_stride + n * n_stride], or packed ahead of time.
template <class T>
struct Operand {
  const void* p;
  DType type;
  int64_t group, k_stride, n_stride;
  const T* packed;

  // Columns [n, n + cols) of group g as panels; `own` holds them when they have to be packed.
  const T* panels(int64_t g, int64_t n, int64_t cols, int64_t K, int64_t N, T* own) const {
    if (packed) return packed + g * b_packed_size<T>(K, N) + n / kNR * b_panel_size<T>(K);
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

// body(g, first row, rows, first column, columns) over all tiles; offs[g] .. offs[g + 1] are the rows of group g. Tasks
// have at most `cols` columns, one panel where all groups have few rows: then memory is what counts, and it is read
// best in one stream.
template <class Body>
void for_tiles(const int64_t* offs, int64_t G, int64_t N, int64_t K, int64_t cols, const Body& body) {
  Scratch scratch;
  int64_t* first = scratch.get<int64_t>(G + 1);
  int64_t hit = 0, most = 0;
  for (int64_t g = 0; g < G; ++g) {
    hit += offs[g + 1] > offs[g];
    most = imax(most, offs[g + 1] - offs[g]);
  }
  cols = most <= kMR ? kNR : imax(kNR, imin(cols, hit * N / 32 / kNR * kNR));
  const int64_t blocks = ceil_div(N, cols);
  first[0] = 0;
  for (int64_t g = 0; g < G; ++g) first[g + 1] = first[g] + ceil_div(offs[g + 1] - offs[g], kTaskRows) * blocks;
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
    const int64_t local = task - first[lo];
    const int64_t r = offs[lo] + local / blocks * kTaskRows, n = local % blocks * cols;
    body(lo, r, imin(kTaskRows, offs[lo + 1] - r), n, imin(cols, N - n));
  });
}

// c[i] (+)= A b[i], rows <= kTileRows. A comes from load_a once for all i. a: kTileRows * (kKC + 2), c[i]: kTileRows *
// kTaskCols.
template <class T, int NB, class LoadA>
void multiply_tile(int64_t r, int64_t rows, int64_t cols, int64_t K, const LoadA& load_a, const T* const (&b)[NB], T* a,
                   float* const (&c)[NB], bool accumulate) {
  constexpr int64_t lda = kKC + 2;
  const int64_t panel = b_panel_size<T>(K);
  int64_t k = 0;
  do {
    const int64_t kc = imin(kKC, K - k);
    load_a(r, rows, k, kc, a, lda);
    for (int i = 0; i < NB; ++i)
      gemm_run<T>(rows, cols, kc, a, lda, kK<T>, b[i] + k * kNR, panel, c[i], kTaskCols,
                  accumulate || k > 0 ? Into::kContinue : Into::kSet,
                  i + 1 < NB ? b[i + 1] + k * kNR : b[0] + (k + kc < K ? (k + kc) * kNR : ceil_div(cols, kNR) * panel));
    k += kc;
  } while (k < K);
}

// load_a for rows found through row(r).
template <class T, class Row>
struct GatheredRows {
  Row row;
  FOLDSCAN_INLINE void operator()(int64_t r, int64_t rows, int64_t k, int64_t kc, T* dst, int64_t ld) const {
    for (int64_t i = 0; i < rows; ++i) copy_row(row(r + i) + k, kc, dst + i * ld, round_up(kc, kK<T>));
  }
};
template <class T, class Row>
GatheredRows<T, Row> gathered_rows(const Row& row) {
  return {row};
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
