// Parallel matrix multiplication with caller-supplied rows and store: the shell around the micro-kernels that linear
// layers, expert layers and losses share.
//
//   load_a(m, rows, k, kc, dst, ld)   writes rows [m, m + rows) x columns [k, k + kc) of A, row-major with ld, into dst
//                                     (type T; for bf16 an odd kc is followed by a zero)
//   store(m, n, row, count)           takes the finished fp32 values C[m][n .. n + count)
//
// Tiles of kTileRows x kTileCols are independent tasks. K falls into runs of kKC: a run is one chain of multiply-adds
// in the order of k, and the runs are added in order. Long sums (weight gradients over all tokens) keep their digits
// that way, and a value still depends on nothing but its own row, column and K.
//
// A run of 512 stays in registers, its panel of B (64 to 128 KB) in L2: L2 delivers several times what a register tile
// reads. What is further away is not left to chance: the next panel and the next rows of A are fetched while the
// current ones are multiplied.
#pragma once

#include "core/gemm.h"
#include "core/parallel.h"

namespace foldscan::FOLDSCAN_ISA {

constexpr int64_t kKC = 512;                 // length of a run of K
constexpr int64_t kMC = 96;                  // rows of a block of A, for kernels with blocks of their own
constexpr int64_t kKL1 = 32768 / (kNR * 4);  // K steps of a panel of B that fits L1, for the same

// Rows and columns of a task of matmul: its C (fp32) and a run of its A stay in L2, so that a panel of B, which may
// come from memory, is used for many rows; the panels after it are fetched ahead meanwhile.
constexpr int64_t kTileRows = 144;
constexpr int64_t kTileCols = 8 * kNR;
constexpr int64_t kLoadRows = 48;  // rows of A that are copied at a time: a multiple of the register tiles' rows
static_assert(kLoadRows % kTileMR<float> == 0 && kLoadRows % kTileMR<bf16> == 0);
static_assert(kKC % kWholeSteps<bf16> == 0 && kKL1 * kK<bf16> % kWholeSteps<bf16> == 0);

// C (rows x cols) = or += A B over one run of K: all row tiles of a panel before the next panel, and meanwhile the
// panel after it is fetched, `next` after the last. panel_at(n): the panel of columns n .. n + kNR. before(n, m) is
// called before a register tile at (m, n), after(n, m, rows, cols, values) when its values are in C. With `one_tile`, c
// holds one register tile, which after() has to take away.
template <class T, class PanelAt, class Before, class After>
FOLDSCAN_INLINE void gemm_run(int64_t rows, int64_t cols, int64_t kc, const T* a, int64_t lda, int64_t ak,
                              const PanelAt& panel_at, float* c, int64_t ldc, bool one_tile, Into into, const T* next,
                              const Before& before, const After& after) {
  constexpr int MR = kTileMR<T>;
  constexpr int64_t line = 64 / sizeof(T), near = 4096 / sizeof(T);
  const int64_t steps = ceil_div(kc, kK<T>), fetches = steps / kAheadSteps;
  const int64_t lines = fetches ? ceil_div(steps * kK<T> * kNR / line, ceil_div(rows, MR) * fetches) : 0;
  for (int64_t n = 0; n < cols; n += kNR) {
    const T* b = panel_at(n);
    const int64_t width = imin(kNR, cols - n);
    const int nv = static_cast<int>(ceil_div(width, kLanes)), tail = static_cast<int>(width - (nv - 1) * kLanes);
    // A single row tile reads B at the speed of memory: stay close. Otherwise every row tile fetches its part.
    const T* then = rows <= MR ? b + near : n + kNR < cols ? panel_at(n + kNR) : next;
    Ahead ahead{reinterpret_cast<const char*>(then), then ? lines : 0};
    for (int64_t m = 0; m < rows; m += MR) {
      const int count = static_cast<int>(imin(MR, rows - m));
      float* to = one_tile ? c : c + m * ldc + n;
      before(n, m);
      micro_for<T>(count, nv)(steps, a + m * lda, lda, ak, b, kNR * kK<T>, to, ldc, tail, into, ahead);
      ahead.p += fetches * lines * 64;
      after(n, m, count, width, to);
    }
  }
}

template <class T>
FOLDSCAN_INLINE void gemm_run(int64_t rows, int64_t cols, int64_t kc, const T* a, int64_t lda, int64_t ak, const T* b,
                              int64_t panel, float* c, int64_t ldc, Into into, const T* next) {
  gemm_run<T>(
      rows, cols, kc, a, lda, ak, [&](int64_t n) { return b + n / kNR * panel; }, c, ldc, false, into, next,
      [](int64_t, int64_t) {}, [](int64_t, int64_t, int64_t, int64_t, const float*) {});
}

// B in panels, packed ahead of time.
template <class T>
struct PackedB {
  const T* p;
  int64_t panel;  // elements from a panel to the next
  FOLDSCAN_INLINE const T* run(int64_t n, int64_t k) const { return p + n / kNR * panel + k * kNR; }
  FOLDSCAN_INLINE void prepare(int64_t, int64_t, int64_t, int64_t) const {}
};

// B[k][n] = p[k * k_stride + n * n_stride], a run of a panel packed when it is needed: for few rows, which would not
// pay for writing the packed form to memory and reading it again. `own`: b_panel_size<T>(kKC).
template <class S, class T>
struct RawB {
  const S* p;
  int64_t k_stride, n_stride;
  T* own = nullptr;
  FOLDSCAN_INLINE const T* run(int64_t, int64_t) const { return own; }
  FOLDSCAN_INLINE void prepare(int64_t n, int64_t width, int64_t k, int64_t kc) const {
    pack_b(p + k * k_stride + n * n_stride, k_stride, n_stride, kc, width, own);
  }
};

// One task: C[m0.. m0+rows, n0.. n0+cols), cols <= kTileCols. a: kTileRows * (kKC + 2), c: kTileRows * kTileCols; next:
// the panels that this thread will probably read after this task.
// load_a(m, rows, k, count, dst, ld) copies a block of A, load_a.ahead(m, rows, k, count) asks for one; b.prepare(n,
// cols, k, count) is called before b.run(n, k), the panel of columns n from k on, is read. store(m, n, values, count)
// gets a row of one panel; the rows of the panel before it stand kNR to the left of them in C if kWhole. No run crosses
// a multiple of `segment`, so that K may be several products after one another.
template <class T, bool kWhole = false, class LoadA, class B, class Store>
FOLDSCAN_INLINE void matmul_tile(int64_t m0, int64_t rows, int64_t n0, int64_t cols, int64_t K, int64_t segment,
                                 const LoadA& load_a, const B& b, T* a, float* c, const T* next, const Store& store) {
  constexpr int64_t lda = kKC + 2;
  const bool one_tile = !kWhole && K <= imin(kKC, segment);
  const int64_t panels = ceil_div(cols, kNR), ldc = one_tile ? kNR : kTileCols;
  int64_t k = 0;
  do {
    const int64_t kc = imin(imin(kKC, K - k), segment - (k ? k % segment : 0)), part = ceil_div(kKC, panels);
    const bool last = k + kc == K;
    gemm_run<T>(
        rows, cols, kc, a, lda, kK<T>, [&](int64_t n) { return b.run(n0 + n, k); }, c, ldc, one_tile,
        k > 0 ? Into::kAdd : Into::kSet, last ? next : b.run(n0, k + kc),
        [&](int64_t n, int64_t m) {
          if (m == 0) b.prepare(n0 + n, imin(kNR, cols - n), k, kc);
          if (n == 0 && m % kLoadRows == 0) load_a(m0 + m, imin(kLoadRows, rows - m), k, kc, a + m * lda, lda);
          // While a panel is multiplied, a part of the next run of A comes nearer.
          const int64_t at = k + kc + n / kNR * part;
          if (at < K) load_a.ahead(m0 + m, imin(kTileMR<T>, rows - m), at, imin(part, K - at));
        },
        [&](int64_t n, int64_t m, int64_t count, int64_t width, const float* values) {
          if (!last) return;
          for (int64_t i = 0; i < count; ++i) store(m0 + m + i, n0 + n, values + i * ldc, width);
        });
    k += kc;
  } while (k < K);
}

// Calls task(first row, rows, first column, columns) for equal tiles, narrower where there would be few of them.
template <class T, class Task>
void matmul_tasks(int64_t M, int64_t N, int64_t K, const Task& task) {
  const int64_t mb = ceil_div(M, kTileRows), mc = round_up(ceil_div(M, imax(mb, 1)), kTileMR<T>);
  const int64_t nc = M <= kTileMR<T> ? kNR : imax(kNR, imin(kTileCols, mb * N / 32 / kNR * kNR)), nb = ceil_div(N, nc);
  parallel_for(mb * nb, grain_for(imin(M, mc) * nc * K / 16), [&](int64_t i) {
    const int64_t m0 = i % mb * mc, n0 = i / mb * nc;
    Scratch scratch;
    task(m0, imin(mc, M - m0), n0, imin(nc, N - n0), scratch.get<T>(kTileRows * (kKC + 2)),
         scratch.get<float>(kTileRows * kTileCols));
  });
}

template <class T, class LoadA, class Store>
void matmul(int64_t M, int64_t N, int64_t K, const LoadA& load_a, const T* packed_b, const Store& store) {
  const PackedB<T> b{packed_b, b_panel_size<T>(K)};
  matmul_tasks<T>(M, N, K, [&](int64_t m0, int64_t rows, int64_t n0, int64_t cols, T* a, float* c) {
    const int64_t then = rows < M ? n0 : n0 + round_up(cols, kNR);
    matmul_tile<T>(m0, rows, n0, cols, K, K, load_a, b, a, c, then < N ? b.run(then, 0) : nullptr, store);
  });
}

// pack_b with the panels spread over the threads.
template <class S, class T>
void pack_b_parallel(const S* src, int64_t k_stride, int64_t n_stride, int64_t K, int64_t N, T* dst) {
  parallel_for(ceil_div(N, kNR), grain_for(K * kNR / 4), [&](int64_t j) {
    pack_b(src + j * kNR * n_stride, k_stride, n_stride, K, imin(kNR, N - j * kNR), dst + j * b_panel_size<T>(K));
  });
}

template <class T, class LoadA, class S, class Store>
void matmul(int64_t M, int64_t N, int64_t K, const LoadA& load_a, const RawB<S, T>& b, const Store& store) {
  Scratch scratch;
  if (M > kTileRows) {
    T* packed = scratch.get<T>(b_packed_size<T>(K, N));
    pack_b_parallel(b.p, b.k_stride, b.n_stride, K, N, packed);
    return matmul<T>(M, N, K, load_a, static_cast<const T*>(packed), store);
  }
  matmul_tasks<T>(M, N, K, [&](int64_t m0, int64_t rows, int64_t n0, int64_t cols, T* a, float* c) {
    Scratch mine;
    const RawB<S, T> own{b.p, b.k_stride, b.n_stride, mine.get<T>(b_panel_size<T>(kKC))};
    matmul_tile<T>(m0, rows, n0, cols, K, K, load_a, own, a, c, nullptr, store);
  });
}

// out[n] = sum over m of rows[m * N + n], in the order of m: the gradient of a bias.
template <class T>
void column_sums(const T* rows, int64_t M, int64_t N, float* out) {
  parallel_for(ceil_div(N, kLanes), grain_for(M), [&](int64_t i) {
    const int64_t n = i * kLanes;
    VF sum = VF::zero();
    for (int64_t m = 0; m < M; ++m) sum = sum + load_upto(rows + m * N + n, N - n);
    store_upto(sum, out + n, N - n);
  });
}

FOLDSCAN_INLINE void fetch_ahead(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
}

// load_a for a row-major matrix (k_stride 1) or a transposed one (m_stride 1).
template <class S, class T>
struct StridedRows {
  const S* p;
  int64_t m_stride, k_stride;
  FOLDSCAN_INLINE void operator()(int64_t m, int64_t rows, int64_t k, int64_t kc, T* dst, int64_t ld) const {
    const int64_t padded = round_up(kc, kK<T>);
    if (k_stride == 1) {
      for (int64_t i = 0; i < rows; ++i) copy_row(p + (m + i) * m_stride + k, kc, dst + i * ld, padded);
    } else {
      transpose_copy(p + k * k_stride + m, k_stride, kc, rows, dst, ld);
      if (padded != kc)
        for (int64_t i = 0; i < rows; ++i) dst[i * ld + kc] = from_float<T>(0.0f);
    }
  }
  FOLDSCAN_INLINE void ahead(int64_t m, int64_t rows, int64_t k, int64_t count) const {
    if (k_stride != 1) return;
    for (int64_t i = 0; i < rows; ++i) fetch_ahead(p + (m + i) * m_stride + k, count * static_cast<int64_t>(sizeof(S)));
  }
};

}  // namespace foldscan::FOLDSCAN_ISA
