// What forward and backward share: which keys a query sees, rows of queries and blocks of keys as GEMM operands, and
// the exponential in base 2.
//
// Rows: the query heads that share a key head are stacked, position by position: row r of a (sequence, key head) pair
// is position r / group, head r % group of the group. A block of keys is thus packed once for the whole group.
#pragma once

#include "attention/attention.h"
#include "core/gemm.h"
#include "core/parallel.h"
#include "core/vmath.h"

namespace foldscan::FOLDSCAN_ISA::attention {
namespace {

using namespace foldscan::attention;

constexpr float kLog2E = 1.44269504088896f;
constexpr float kLn2 = 0.693147180559945f;
constexpr float kInf = __builtin_inff();

// 2^x for x <= 0, exactly 0 from -126.5 down: relative error 2e-7 for bf16 (whose results are rounded to 8 bits), 8e-8
// for fp32. Minimax polynomials on [-1/2, 1/2] with p(0) = 1. At n = -127 exp2_int is 0, so no select is needed.
template <class T>
FOLDSCAN_INLINE VF exp2_neg(VF x) {
  const VF t = vmax(VF::set(-127.0f), x);
  const VF n = vround(t);
  const VF r = t - n;
  VF p;
  if constexpr (sizeof(T) == 2) {
    p = fma(VF::set(0.001326472731307149f), r, VF::set(0.009671512991189957f));
    p = fma(p, r, VF::set(0.05550733581185341f));
    p = fma(p, r, VF::set(0.24022242426872253f));
    p = fma(p, r, VF::set(0.6931470036506653f));
  } else {
    p = fma(VF::set(0.00015353361959569156f), r, VF::set(0.0013398875016719103f));
    p = fma(p, r, VF::set(0.00961843691766262f));
    p = fma(p, r, VF::set(0.055503323674201965f));
    p = fma(p, r, VF::set(0.24022647738456726f));
    p = fma(p, r, VF::set(0.6931471824645996f));
  }
  return fma(p, r, VF::set(1.0f)) * n.exp2_int();
}

// Keys [lo, hi) of a sequence; both ends grow with the query's position.
struct Keys {
  int64_t lo, hi;
};

FOLDSCAN_INLINE Keys visible(const Problem& p, int64_t i, int64_t Lq, int64_t Lk) {
  const int64_t diagonal = i + Lk - Lq;
  const int64_t lo = p.window_left < 0 ? 0 : imin(Lk, imax(0, diagonal - p.window_left));
  const int64_t hi = p.window_right < 0 ? Lk : imax(0, imin(Lk, diagonal + p.window_right + 1));
  return {lo, hi};
}

// A (sequence, key head) pair.
struct Pair {
  int64_t seq, head, group;
  int64_t q0, Lq, k0, Lk;
};

FOLDSCAN_INLINE Pair pair_of(const Problem& p, int64_t seq, int64_t head) {
  const int64_t q0 = p.cu_q[seq], k0 = p.cu_k[seq];
  return {seq, head, p.Hq / p.Hkv, q0, p.cu_q[seq + 1] - q0, k0, p.cu_k[seq + 1] - k0};
}

// Sequence whose units contain `unit`: starts is (n + 1), ascending, and starts[n] > unit.
FOLDSCAN_INLINE int64_t find_sequence(const int64_t* starts, int64_t n, int64_t unit) {
  int64_t lo = 0, hi = n;
  while (hi - lo > 1) {
    const int64_t mid = (lo + hi) / 2;
    if (starts[mid] <= unit) {
      lo = mid;
    } else {
      hi = mid;
    }
  }
  return lo;
}

// Rows with a stride: part of the caller's tensor, or a copy where the rows of a block lie on several pages.
template <class T>
struct Rows {
  const T* p;
  int64_t stride;
};

// The row of a key, or of its value, and how many rows from there on lie at the same stride.
template <class T>
FOLDSCAN_INLINE const T* key_row(const Problem& p, const Pair& pair, bool values, int64_t key, int64_t& run) {
  const T* base = static_cast<const T*>(values ? p.v : p.k) + pair.head * (values ? p.v_head : p.k_head);
  const int64_t row = values ? p.v_row : p.k_row;
  if (!p.block_table) {
    run = pair.Lk - key;
    return base + (pair.k0 + key) * row;
  }
  const int64_t page = key / p.page_size, slot = key % p.page_size;
  run = p.page_size - slot;
  return base + p.block_table[pair.seq * p.table_stride + page] * (values ? p.v_page : p.k_page) + slot * row;
}

template <class T>
Rows<T> key_rows(const Problem& p, const Pair& pair, bool values, int64_t first, int64_t count, T* gather) {
  const int64_t dim = values ? p.Dv : p.D;
  int64_t run;
  const T* rows = key_row<T>(p, pair, values, first, run);
  if (count <= run) return {rows, values ? p.v_row : p.k_row};
  for (int64_t j = 0; j < count; ++j)
    std::memcpy(gather + j * dim, key_row<T>(p, pair, values, first + j, run), static_cast<size_t>(dim) * sizeof(T));
  return {gather, dim};
}

// Rows [first, first + count) of a tensor (total, Hq, dim) into dst, `ld` apart, zero up to kK<T>.
template <class T>
FOLDSCAN_INLINE void load_rows(const T* src, int64_t row_stride, int64_t head_stride, const Pair& pair, int64_t first,
                               int64_t count, int64_t dim, T* dst, int64_t ld) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t r = first + i;
    const T* row =
        src + (pair.q0 + r / pair.group) * row_stride + (pair.head * pair.group + r % pair.group) * head_stride;
    copy_row(row, dim, dst + i * ld, round_up(dim, kK<T>));
  }
}

// The range of keys that rows [first, first + count) see within [block, block + block_keys), counted from `block`, the
// lower end rounded down to a GEMM panel: vectors of keys and bf16 pairs of keys then start at the same keys of the
// sequence whatever the rows.
FOLDSCAN_INLINE Keys keys_in_block(const Problem& p, const Pair& pair, int64_t first, int64_t count, int64_t block,
                                   int64_t block_keys) {
  const int64_t lo = visible(p, first / pair.group, pair.Lq, pair.Lk).lo - block;
  const int64_t hi = visible(p, (first + count - 1) / pair.group, pair.Lq, pair.Lk).hi - block;
  return {imax(lo, 0) / kNR * kNR, imin(hi, block_keys)};
}

// c (rows x cols) = a (rows x K, row-major) times packed b, K cut so that a panel of b stays in L1. `panel`: elements
// from panel to panel, which differs from b_panel_size(K) where only a part of the packed K is used.
template <class T>
FOLDSCAN_INLINE void multiply(int64_t rows, int64_t cols, int64_t K, const T* a, int64_t lda, const T* b, int64_t panel,
                              float* c, int64_t ldc) {
  constexpr int64_t kc = 32768 / (kNR * 4) * kK<T>;
  for (int64_t k = 0; k < K; k += kc)
    gemm_block<T>(rows, cols, imin(kc, K - k), a + k, lda, kK<T>, b + k * kNR, kNR * kK<T>, panel, c, ldc, k > 0);
}

// Lanes of the vector of keys at j that lie in [lo, hi).
FOLDSCAN_INLINE VM lanes_in(int64_t j, int64_t lo, int64_t hi) {
  const VF index = VF::iota() + VF::set(static_cast<float>(j));
  return (VF::set(static_cast<float>(lo)) <= index) & (index < VF::set(static_cast<float>(hi)));
}

}  // namespace
}  // namespace foldscan::FOLDSCAN_ISA::attention
