// Attention, backward.
//
// Algorithm (FlashAttention-2, arXiv:2307.08691, algorithm 2): P is recomputed from the saved log-sum-exp,
//     P = e^(S - lse),  delta_i = dout_i . out_i - dlse_i,  dS = P (dout V^T - delta),
//     dV = P^T dout,  dK = scale dS^T Q,  dQ = scale dS K,  dsink_h = -sum_i e^(sink_h - lse_i) delta_i,
//   with dS times 1 - tanh^2 under a softcap. A task owns a block of kBlockKeys keys of one (sequence, key head) pair:
//   it keeps dK and dV, walks the rows that see the block and writes its share of dQ into a buffer of its own. The
//   shares of a row are added in block order.
// Work: blocks of keys, in batches whose dQ shares fit kShareFloats (or one block a thread): one head of one sequence
//   still occupies all threads.
// FLOPs: 6 D + 4 Dv per visible (query, key) and head. Bytes: q, out, dout once per block of keys, the shares of dQ
//   written and read once.
// Numerics: fp32 scores and accumulators over the whole length, rounded once at the end; P and dS are rounded to bf16
// as
//   GEMM operands when the inputs are bf16.
// Determinism: dK and dV are chains over rows in order, dQ a sum over blocks in order; nothing depends on the threads.
#include <new>

#include "attention/cpu/tiles.h"

namespace foldscan::FOLDSCAN_ISA::attention {
namespace {

constexpr int64_t kBlockKeys = 128;
constexpr int64_t kTileRows = 96;
constexpr int64_t kShareFloats = 8 << 20;

// Memory too large to keep in a thread's scratch after the call.
class Buffer {
 public:
  explicit Buffer(int64_t floats)
      : p_(static_cast<float*>(::operator new(static_cast<size_t>(imax(floats, 1)) * 4, std::align_val_t{64}))) {}
  ~Buffer() { ::operator delete(p_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* get() const { return p_; }

 private:
  float* p_;
};

// One block of keys of one pair, and the query positions [i0, i1) that see some of it.
struct Item {
  Pair pair;
  int64_t block, keys;
  int64_t i0, i1;
  int64_t rows() const { return (i1 - i0) * pair.group; }
};

Item item_of(const Problem& p, const Pair& pair, int64_t block) {
  Item t{pair, block, imin(kBlockKeys, pair.Lk - block), 0, pair.Lq};
  const int64_t shift = pair.Lk - pair.Lq;
  if (p.window_right >= 0) t.i0 = imin(pair.Lq, imax(0, block - p.window_right - shift));
  if (p.window_left >= 0) t.i1 = imax(t.i0, imin(pair.Lq, block + t.keys + p.window_left - shift));
  return t;
}

// A matrix of P or dS that GEMMs read by rows and by columns. fp32: one row-major array serves both. bf16 wants pairs
// along the summed index, so the transposed reader has its own array of pairs of rows.
template <class T>
struct Operand {
  T* rows;     // (kTileRows, kBlockKeys); fp32 only: also columns
  T* columns;  // bf16: (kTileRows / 2, kBlockKeys) pairs

  static Operand make(Scratch& scratch, float* fp32, bool by_rows) {
    if constexpr (sizeof(T) == 2)
      return {by_rows ? scratch.get<T>(kTileRows * kBlockKeys) : nullptr, scratch.get<T>(kTileRows * kBlockKeys)};
    else
      return {fp32, fp32};
  }
};

// c (keys x cols) += operand^T (keys x rows) times b (rows x cols, packed); keys from column `first`.
template <class T>
FOLDSCAN_INLINE void multiply_transposed(const Operand<T>& a, int64_t keys, int64_t cols, int64_t rows, const T* b,
                                         float* c, int64_t ldc) {
  constexpr int64_t along = kK<T>;  // elements from key to key
  gemm_block<T>(keys, cols, rows, a.columns, along, kBlockKeys * along, b, kNR * along, b_panel_size<T>(rows), c, ldc,
                true);
}

// One row: P and dS at keys [lo, hi), zero elsewhere up to `padded`. p_out may be s, ds_out may be dp.
struct RowConstants {
  VF c, lse, delta, cap_in, cap_out;
};

template <class Out>
FOLDSCAN_INLINE void gradient_row(const Problem& p, const RowConstants& k, const float* s, const float* dp, int64_t lo,
                                  int64_t hi, int64_t padded, const Out& out) {
  const int64_t first = lo < hi ? lo / kLanes * kLanes : padded, last = lo < hi ? round_up(hi, kLanes) : padded;
  for (int64_t j = 0; j < first; j += kLanes) out(j, VF::zero(), VF::zero());
  for (int64_t j = first; j < last; j += kLanes) {
    VF x = VF::load(s + j), slope = VF::set(1.0f);
    if (p.softcap > 0.0f) {
      x = vtanh(x * k.cap_in);
      slope = slope - x * x;
      x = x * k.cap_out;
    }
    // The logarithm of a probability: above 0 by rounding only.
    VF e = exp2_neg<float>(vmin(VF::zero(), x * k.c - k.lse));
    VF ds = e * (VF::load(dp + j) - k.delta) * slope;
    if (j < lo || j + kLanes > hi) {
      const VM seen = lanes_in(j, lo, hi);
      e = select(seen, e, VF::zero());
      ds = select(seen, ds, VF::zero());
    }
    out(j, e, ds);
  }
  for (int64_t j = last; j < padded; j += kLanes) out(j, VF::zero(), VF::zero());
}

// P and dS of a tile from its scores s and dP.
template <class T>
void gradient_tile(const Backward& g, const Pair& pair, const float* delta, int64_t first_row, int64_t rows,
                   int64_t origin, int64_t width, float* s, float* dp, const Operand<T>& prob, const Operand<T>& ds) {
  const Problem& p = g.p;
  const int64_t total_q = p.cu_q[p.n], padded = round_up(width, kLanes);
  RowConstants k;
  k.c = VF::set(p.softcap > 0.0f ? kLog2E : p.scale * kLog2E);
  k.cap_in = VF::set(p.softcap > 0.0f ? p.scale / p.softcap : 0.0f);
  k.cap_out = VF::set(p.softcap);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t r = first_row + i, position = r / pair.group;
    const int64_t at = (pair.head * pair.group + r % pair.group) * total_q + pair.q0 + position;
    k.lse = VF::set(g.lse[at] * kLog2E);
    k.delta = VF::set(delta[at]);
    const Keys seen = visible(p, position, pair.Lq, pair.Lk);
    const int64_t lo = imax(seen.lo - origin, 0), hi = imin(seen.hi - origin, width);
    float *si = s + i * kBlockKeys, *di = dp + i * kBlockKeys;
    if constexpr (sizeof(T) == 4) {
      gradient_row(p, k, si, di, lo, hi, padded, [&](int64_t j, VF e, VF d) {
        e.store(prob.rows + i * kBlockKeys + j);
        d.store(ds.rows + i * kBlockKeys + j);
      });
    } else {
      // The even row of a pair waits (P in the memory of its scores) until the odd one comes.
      T *pe = reinterpret_cast<T*>(si), *de = ds.rows + i * kBlockKeys;
      gradient_row(p, k, si, di, lo, hi, padded, [&](int64_t j, VF e, VF d) {
        e.store(pe + j);
        d.store(de + j);
      });
      if (i % 2 == 1 || i + 1 == rows) {
        const bool odd = i % 2 == 1;
        const int64_t even = odd ? i - 1 : i;
        const T* p0 = reinterpret_cast<const T*>(s + even * kBlockKeys);
        const T* d0 = ds.rows + even * kBlockKeys;
        T *pc = prob.columns + even * kBlockKeys, *dc = ds.columns + even * kBlockKeys;
        for (int64_t j = 0; j < padded; j += kLanes) {
          VP::interleave(p0 + j, odd ? pe + j : nullptr, kLanes).store(pc + 2 * j);
          VP::interleave(d0 + j, odd ? de + j : nullptr, kLanes).store(dc + 2 * j);
        }
      }
    }
  }
}

// A block of keys: its dK and dV, and its share of dQ, rows (i0 .. i1) x group of the pair.
template <class T>
void run_item(const Backward& g, const float* delta, const Item& t, float* share) {
  const Problem& p = g.p;
  const Pair& pair = t.pair;
  Scratch scratch;
  T* k_cols = scratch.get<T>(b_packed_size<T>(p.D, t.keys));
  T* v_cols = scratch.get<T>(b_packed_size<T>(p.Dv, t.keys));
  T* k_rows = scratch.get<T>(b_packed_size<T>(t.keys, p.D));
  const Rows<T> k = key_rows<T>(p, pair, false, t.block, t.keys, nullptr);
  const Rows<T> v = key_rows<T>(p, pair, true, t.block, t.keys, nullptr);
  pack_b_cols(k.p, k.stride, p.D, t.keys, k_cols);
  pack_b_cols(v.p, v.stride, p.Dv, t.keys, v_cols);
  pack_b_rows(k.p, k.stride, t.keys, p.D, k_rows);
  const int64_t k_panel = b_panel_size<T>(p.D), v_panel = b_panel_size<T>(p.Dv);

  float* dk = scratch.get<float>(t.keys * p.D);
  float* dv = scratch.get<float>(t.keys * p.Dv);
  std::memset(dk, 0, static_cast<size_t>(t.keys * p.D) * 4);
  std::memset(dv, 0, static_cast<size_t>(t.keys * p.Dv) * 4);

  const int64_t ldq = round_up(p.D, kK<T>), ldo = round_up(p.Dv, kK<T>);
  T* q = scratch.get<T>(kTileRows * ldq);
  T* dout = scratch.get<T>(kTileRows * ldo);
  T* q_packed = scratch.get<T>(b_packed_size<T>(kTileRows, p.D));
  T* dout_packed = scratch.get<T>(b_packed_size<T>(kTileRows, p.Dv));
  float* s = scratch.get<float>(kTileRows * kBlockKeys);
  float* dp = scratch.get<float>(kTileRows * kBlockKeys);
  const Operand<T> prob = Operand<T>::make(scratch, s, false), ds = Operand<T>::make(scratch, dp, true);

  const int64_t begin = t.i0 * pair.group, end = t.i1 * pair.group;
  for (int64_t first = begin; first < end; first += kTileRows) {
    const int64_t rows = imin(kTileRows, end - first);
    const Keys keys = keys_in_block(p, pair, first, rows, t.block, t.keys);
    float* to = share + (first - begin) * p.D;
    if (keys.hi <= keys.lo) {
      std::memset(to, 0, static_cast<size_t>(rows * p.D) * 4);
      continue;
    }
    const int64_t width = keys.hi - keys.lo;
    load_rows(static_cast<const T*>(p.q), p.q_row, p.q_head, pair, first, rows, p.D, q, ldq);
    load_rows(static_cast<const T*>(g.dout), p.Hq * p.Dv, p.Dv, pair, first, rows, p.Dv, dout, ldo);
    pack_b_rows(q, ldq, rows, p.D, q_packed);
    pack_b_rows(dout, ldo, rows, p.Dv, dout_packed);
    multiply<T>(rows, width, p.D, q, ldq, k_cols + keys.lo / kNR * k_panel, k_panel, s, kBlockKeys);
    multiply<T>(rows, width, p.Dv, dout, ldo, v_cols + keys.lo / kNR * v_panel, v_panel, dp, kBlockKeys);
    gradient_tile<T>(g, pair, delta, first, rows, t.block + keys.lo, width, s, dp, prob, ds);
    multiply_transposed<T>(prob, width, p.Dv, rows, dout_packed, dv + keys.lo * p.Dv, p.Dv);
    multiply_transposed<T>(ds, width, p.D, rows, q_packed, dk + keys.lo * p.D, p.D);
    multiply<T>(rows, p.D, width, ds.rows, kBlockKeys, k_rows + keys.lo * kNR, b_panel_size<T>(t.keys), to, p.D);
  }

  const VF scale = VF::set(p.scale);
  for (int64_t j = 0; j < t.keys; ++j) {
    const int64_t key = (pair.k0 + t.block + j) * p.Hkv + pair.head;
    T* to = static_cast<T*>(g.dk) + key * p.D;
    for (int64_t d = 0; d < p.D; d += kLanes) store_upto(load_upto(dk + j * p.D + d, p.D - d) * scale, to + d, p.D - d);
    copy_row(dv + j * p.Dv, p.Dv, static_cast<T*>(g.dv) + key * p.Dv, p.Dv);
  }
}

// delta (Hq, total_q) and its products with the sinks' probabilities.
template <class T>
void run_delta(const Backward& g, float* delta) {
  const Problem& p = g.p;
  const int64_t total_q = p.cu_q[p.n];
  parallel_for(total_q, grain_for(p.Hq * p.Dv / 4), [&](int64_t i) {
    for (int64_t h = 0; h < p.Hq; ++h) {
      const int64_t row = (i * p.Hq + h) * p.Dv, at = h * total_q + i;
      const T *o = static_cast<const T*>(g.out) + row, *d = static_cast<const T*>(g.dout) + row;
      VF sum = VF::zero();
      for (int64_t j = 0; j < p.Dv; j += kLanes) sum = fma(load_upto(o + j, p.Dv - j), load_upto(d + j, p.Dv - j), sum);
      delta[at] = reduce_add(sum) - (g.dlse ? g.dlse[at] : 0.0f);
    }
  });
  if (!g.dsinks) return;
  parallel_for(p.Hq, grain_for(total_q * 2), [&](int64_t h) {
    const float *lse = g.lse + h * total_q, *d = delta + h * total_q;
    const VF sink = VF::set(p.sinks[h]), none = VF::set(-kInf);
    VF sum = VF::zero();
    for (int64_t i = 0; i < total_q; i += kLanes) {
      const VF x = load_upto(lse + i, total_q - i);
      const VF w = select(x == none, VF::zero(), vexp_neg(vmin(VF::zero(), sink - x)));
      sum = fnma(w, load_upto(d + i, total_q - i), sum);
    }
    g.dsinks[h] = reduce_add(sum);
  });
}

// The shares of a batch of blocks, added in order to the rows of dq (fp32). items[first ..] of one pair.
void add_shares(const Problem& p, const Item* items, const int64_t* offsets, int64_t count, const float* shares,
                float* dq) {
  constexpr int64_t kPositions = 16;
  const Pair& pair = items[0].pair;
  const int64_t width = pair.group * p.D;
  parallel_for(ceil_div(pair.Lq, kPositions), grain_for(kPositions * count * width / 8), [&](int64_t chunk) {
    for (int64_t n = 0; n < count; ++n) {
      const int64_t i0 = imax(items[n].i0, chunk * kPositions), i1 = imin(items[n].i1, (chunk + 1) * kPositions);
      for (int64_t i = i0; i < i1; ++i) {
        const float* from = shares + offsets[n] + (i - items[n].i0) * width;
        float* to = dq + ((pair.q0 + i) * p.Hq + pair.head * pair.group) * p.D;
        for (int64_t d = 0; d < width; d += kLanes)
          store_upto(load_upto(to + d, width - d) + load_upto(from + d, width - d), to + d, width - d);
      }
    }
  });
}

template <class T>
void run(const Backward& g) {
  const Problem& p = g.p;
  const int64_t total_q = p.cu_q[p.n], count = total_q * p.Hq * p.D;
  Buffer delta(total_q * p.Hq);
  run_delta<T>(g, delta.get());

  Buffer own_dq(sizeof(T) == 4 ? 0 : count);
  float* dq = sizeof(T) == 4 ? static_cast<float*>(g.dq) : own_dq.get();
  constexpr int64_t kChunk = 4096;
  parallel_for(ceil_div(count, kChunk), 8, [&](int64_t i) {
    std::memset(dq + i * kChunk, 0, static_cast<size_t>(imin(kChunk, count - i * kChunk)) * 4);
  });

  Scratch scratch;
  int64_t total_items = 0, largest = 0;
  for (int64_t s = 0; s < p.n; ++s) {
    const Pair pair = pair_of(p, s, 0);
    total_items += ceil_div(pair.Lk, kBlockKeys) * p.Hkv;
    if (pair.Lk > 0) largest = imax(largest, pair.Lq * pair.group * p.D);
  }
  Item* items = scratch.get<Item>(total_items);
  int64_t* offsets = scratch.get<int64_t>(total_items + 1);
  int64_t n = 0, all_floats = 0;
  for (int64_t s = 0; s < p.n; ++s)
    for (int64_t h = 0; h < p.Hkv; ++h) {
      const Pair pair = pair_of(p, s, h);
      for (int64_t block = 0; block < pair.Lk; block += kBlockKeys) {
        items[n] = item_of(p, pair, block);
        all_floats += items[n++].rows() * p.D;
      }
    }
  const int64_t capacity = imin(all_floats, imax(kShareFloats, num_threads() * largest));
  Buffer shares(capacity);
  for (int64_t first = 0; first < total_items;) {
    int64_t end = first;
    offsets[first] = 0;
    do {
      offsets[end + 1] = offsets[end] + items[end].rows() * p.D;
      ++end;
    } while (end < total_items && offsets[end] + items[end].rows() * p.D <= capacity);
    parallel_for(end - first, 1,
                 [&](int64_t i) { run_item<T>(g, delta.get(), items[first + i], shares.get() + offsets[first + i]); });
    while (first < end) {
      int64_t next = first + 1;
      const Pair& pair = items[first].pair;
      while (next < end && items[next].pair.seq == pair.seq && items[next].pair.head == pair.head) ++next;
      add_shares(p, items + first, offsets + first, next - first, shares.get(), dq);
      first = next;
    }
  }

  T* out = static_cast<T*>(g.dq);
  parallel_for(ceil_div(count, kChunk), 8, [&](int64_t c) {
    const int64_t end = imin(count, (c + 1) * kChunk);
    for (int64_t i = c * kChunk; i < end; i += kLanes)
      store_upto(load_upto(dq + i, end - i) * VF::set(p.scale), out + i, end - i);
  });
}

}  // namespace

void backward(const Backward& g) {
  if (g.p.type == DType::kF32) {
    run<float>(g);
  } else {
    run<bf16>(g);
  }
}

}  // namespace foldscan::FOLDSCAN_ISA::attention
