// Attention, forward.
//
// Algorithm: keys come in blocks of kBlockKeys, anchored at the first key of the sequence. A block is computed on its
//   own: its maximum m_b, P = 2^(S - m_b) (scores carry the factor log2 e), l_b = sum P, O_b = P V; the states
//   (m, l, O) are merged in block order (FlashAttention-2, arXiv:2307.08691, section 3.1, with the block's own maximum
//   instead of the running one). K^T and V of a block are packed once for a unit of several tiles of query rows.
// Work: units of rows; where these are too few for the threads (decoding), each (unit, block) is a task of its own and
//   the states are merged afterwards, in the same order.
// FLOPs: 2 (D + Dv) per visible (query, key) and head. Bytes: q and out once; k and v once per unit.
// Numerics: fp32 scores, sums and states; P is rounded to bf16 for P V when v is bf16, its sum is not.
// Determinism: a row's bits depend on its query and its keys only. O_b is one chain over the keys of the block in order
//   (pairs for bf16, anchored at even keys), l_b a fixed lane pattern; a masked key adds exactly 0, a block without
//   visible keys is an exact identity. So the same bits come out in prefill, in pieces, one token at a time, from
//   pages, alone or in a batch, with any number of threads.
#include "attention/cpu/tiles.h"

namespace foldscan::FOLDSCAN_ISA::attention {
namespace {

constexpr int64_t kBlockKeys = 256;
constexpr int64_t kTileRows = 96;
constexpr int64_t kUnitTiles = 4;  // tiles of a unit at most: 384 rows amortise the packing of a block
constexpr int64_t kSplitFloats = 2 << 20;

// The keys and values of a block as operands of the two products. Several tiles of rows share a packed copy. A tile
// that is alone (decoding) reads the rows where they lie, a slab at a time: K is transposed and bf16 V paired into a
// slab that stays in L1, fp32 V is an operand as it is. Either way the operands are the same numbers in the same order.
template <class T>
struct Block {
  Rows<T> k, v;
  int64_t lo, count;  // first key, counted from the block's start, and number of keys
  T *k_packed, *v_packed;
  int64_t k_panel, v_panel;  // 0: not packed
};

constexpr int64_t kSlabKeys = 32;  // of V; K comes in panels
constexpr int64_t kAhead = 32;  // rows between reading and prefetching

template <class T>
Block<T> new_block(const Problem& p, bool shared, Scratch& scratch) {
  return {{}, {}, 0, 0, scratch.get<T>(b_packed_size<T>(p.D, shared ? kBlockKeys : kNR)),
          scratch.get<T>(b_packed_size<T>(shared ? kBlockKeys : kSlabKeys, p.Dv)), 0, 0};
}

// Rows of one head are too far apart for the hardware's prefetcher to know where the next one is.
template <class T>
FOLDSCAN_INLINE void prefetch(const Rows<T>& rows, int64_t first, int64_t end, int64_t dim) {
  for (int64_t j = first; j < end; ++j)
    for (int64_t d = 0; d < dim; d += 64 / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(rows.p + j * rows.stride + d);
}

template <class T>
void open_block(const Problem& p, const Pair& pair, int64_t block, Keys keys, bool shared, T* gather_k, T* gather_v,
                Block<T>& to) {
  to.lo = keys.lo;
  to.count = keys.hi - keys.lo;
  to.k = key_rows(p, pair, false, block + keys.lo, to.count, gather_k);
  to.v = key_rows(p, pair, true, block + keys.lo, to.count, gather_v);
  if (!shared) return;
  to.k_panel = b_panel_size<T>(p.D);
  to.v_panel = b_panel_size<T>(to.count);
  pack_b_cols(to.k.p, to.k.stride, p.D, to.count, to.k_packed);
  pack_b_rows(to.v.p, to.v.stride, to.count, p.Dv, to.v_packed);
}

// s (rows x width) = q K^T for the keys [first, first + width) of the block.
template <class T>
FOLDSCAN_INLINE void scores(const Problem& p, int64_t rows, const T* q, int64_t ldq, int64_t first, int64_t width,
                            const Block<T>& kv, float* s) {
  if (kv.k_panel)
    return multiply<T>(rows, width, p.D, q, ldq, kv.k_packed + first / kNR * kv.k_panel, kv.k_panel, s, kBlockKeys);
  for (int64_t n = 0; n < width; n += kNR) {
    const int64_t count = imin(kNR, width - n);
    for (int64_t i = 0; i < kNR; i += kLanes) {
      const int64_t row = first + n + i;
      prefetch(kv.k, imin(row + kAhead, kv.count), imin(row + kAhead + kLanes, kv.count), p.D);
      if (row + kAhead >= kv.count) prefetch(kv.v, imin(row + kAhead, kv.count) - kv.count + 0*first, imin(row + kAhead + kLanes - kv.count, kv.count), p.Dv);
      pack_b_col_vector(kv.k.p + row * kv.k.stride, kv.k.stride, p.D, imax(0, imin(kLanes, count - i)),
                        kv.k_packed + i * kK<T>);
    }
    multiply<T>(rows, count, p.D, q, ldq, kv.k_packed, b_panel_size<T>(p.D), s + n, kBlockKeys);
  }
}

// o (rows x Dv) = P V, P (rows x width).
template <class T>
FOLDSCAN_INLINE void mix(const Problem& p, int64_t rows, const T* prob, int64_t first, int64_t width,
                         const Block<T>& kv, float* o) {
  if (kv.v_panel)
    return multiply<T>(rows, p.Dv, width, prob, kBlockKeys, kv.v_packed + first * kNR, kv.v_panel, o, p.Dv);
  for (int64_t j = 0; j < width; j += kSlabKeys) {
    const int64_t count = imin(kSlabKeys, width - j);
    const T* v = kv.v.p + (first + j) * kv.v.stride;
    prefetch(kv.v, imin(first + j + kAhead, kv.count), imin(first + j + kAhead + kSlabKeys, kv.count), p.Dv);
    if (sizeof(T) == 4 && p.Dv % kLanes == 0) {
      gemm_block<T>(rows, p.Dv, count, prob + j, kBlockKeys, kK<T>, v, kv.v.stride, kNR, o, p.Dv, j > 0);
    } else {
      pack_b_rows(v, kv.v.stride, count, p.Dv, kv.v_packed);
      gemm_block<T>(rows, p.Dv, count, prob + j, kBlockKeys, kK<T>, kv.v_packed, kNR * kK<T>, b_panel_size<T>(count), o,
                    p.Dv, j > 0);
    }
  }
}

// One row of scores, keys [lo, hi) of `width` visible: probabilities relative to the row's maximum (in units of log2),
// zero elsewhere up to a full vector. s and prob may be the same memory.
template <class T>
FOLDSCAN_INLINE void softmax_row(const Problem& p, float* s, int64_t lo, int64_t hi, int64_t width, T* prob, float& m,
                                 float& l) {
  const int64_t padded = round_up(width, kLanes);
  if (lo >= hi) {
    for (int64_t j = 0; j < padded; j += kLanes) VF::zero().store(prob + j);
    m = -kInf;
    l = 0.0f;
    return;
  }
  const int64_t first = lo / kLanes * kLanes, last = round_up(hi, kLanes);
  const bool cut_first = first < lo, cut_last = hi < last;
  VF c = VF::set(p.scale * kLog2E);
  if (p.softcap > 0.0f) {
    const VF in = VF::set(p.scale / p.softcap), out = VF::set(p.softcap);
    for (int64_t j = first; j < last; j += kLanes) (vtanh(VF::load(s + j) * in) * out).store(s + j);
    c = VF::set(kLog2E);
  }
  const VF lowest = VF::set(-kInf);
  VF top = lowest;
  for (int64_t j = first; j < last; j += kLanes) {
    VF x = VF::load(s + j) * c;
    if ((cut_first && j == first) || (cut_last && j + kLanes == last)) x = select(lanes_in(j, lo, hi), x, lowest);
    top = vmax(top, x);
  }
  m = reduce_max(top);
  top = VF::set(m);
  VF sum = VF::zero();
  for (int64_t j = 0; j < first; j += kLanes) VF::zero().store(prob + j);
  for (int64_t j = first; j < last; j += kLanes) {
    VF e = exp2_neg<T>(VF::load(s + j) * c - top);
    if ((cut_first && j == first) || (cut_last && j + kLanes == last)) e = select(lanes_in(j, lo, hi), e, VF::zero());
    sum = sum + e;
    e.store(prob + j);
  }
  for (int64_t j = last; j < padded; j += kLanes) VF::zero().store(prob + j);
  l = reduce_add(sum);
}

// Running or block state of a tile of at most `capacity` rows.
struct State {
  float *m, *l, *o;  // (capacity), (capacity), (capacity, Dv)
};

FOLDSCAN_INLINE State state_at(float* memory, int64_t capacity) {
  return {memory, memory + capacity, memory + 2 * capacity};
}
FOLDSCAN_INLINE int64_t state_floats(const Problem& p, int64_t capacity) { return capacity * (p.Dv + 2); }

template <class T>
struct TileScratch {
  float* s;
  T* prob;
};

template <class T>
TileScratch<T> new_tile(Scratch& scratch) {
  TileScratch<T> t{scratch.get<float>(kTileRows * kBlockKeys), nullptr};
  if constexpr (sizeof(T) == 2) {
    t.prob = scratch.get<T>(kTileRows * kBlockKeys);
  } else {
    t.prob = t.s;
  }
  return t;
}

// State of `rows` rows (q, kTileRows at most) against the keys `keys` of one block.
template <class T>
void block_state(const Problem& p, const Pair& pair, int64_t first_row, int64_t rows, const T* q, int64_t ldq,
                 int64_t block, Keys keys, const Block<T>& kv, const TileScratch<T>& t, const State& out) {
  const int64_t width = keys.hi - keys.lo;
  scores<T>(p, rows, q, ldq, keys.lo - kv.lo, width, kv, t.s);
  const int64_t origin = block + keys.lo;
  Keys seen{};
  for (int64_t i = 0; i < rows; ++i) {
    if (i == 0 || (first_row + i) % pair.group == 0) seen = visible(p, (first_row + i) / pair.group, pair.Lq, pair.Lk);
    softmax_row(p, t.s + i * kBlockKeys, imax(seen.lo - origin, 0), imin(seen.hi - origin, width), width,
                t.prob + i * kBlockKeys, out.m[i], out.l[i]);
  }
  mix<T>(p, rows, t.prob, keys.lo - kv.lo, width, kv, out.o);
}

// Adds the state of the next block. Weights are computed for vectors of rows, lane by lane.
template <class T>
void merge_state(const Problem& p, int64_t rows, const State& a, const State& b) {
  float wa[kTileRows + kLanes], wb[kTileRows + kLanes];
  for (int64_t i = 0; i < rows; i += kLanes) {
    const int64_t n = rows - i;
    const VF ma = load_upto(a.m + i, n), mb = load_upto(b.m + i, n);
    const VF m = vmax(ma, mb);
    const VF base = select(m == VF::set(-kInf), VF::zero(), m);
    const VF xa = exp2_neg<float>(ma - base), xb = exp2_neg<float>(mb - base);
    xa.store(wa + i);
    xb.store(wb + i);
    store_upto(m, a.m + i, n);
    store_upto(fma(load_upto(b.l + i, n), xb, load_upto(a.l + i, n) * xa), a.l + i, n);
  }
  for (int64_t i = 0; i < rows; ++i) {
    if (b.m[i] == -kInf) continue;  // weights 1 and 0: nothing changes
    const VF xa = VF::set(wa[i]), xb = VF::set(wb[i]);
    float* o = a.o + i * p.Dv;
    const float* x = b.o + i * p.Dv;
    int64_t d = 0;
    for (; d + kLanes <= p.Dv; d += kLanes) fma(VF::load(x + d), xb, VF::load(o + d) * xa).store(o + d);
    if (d < p.Dv) {
      const int64_t n = p.Dv - d;
      store_upto(fma(load_upto(x + d, n), xb, load_upto(o + d, n) * xa), o + d, n);
    }
  }
}

FOLDSCAN_INLINE void clear_state(const Problem& p, int64_t rows, const State& a) {
  for (int64_t i = 0; i < rows; ++i) {
    a.m[i] = -kInf;
    a.l[i] = 0.0f;
  }
  std::memset(a.o, 0, static_cast<size_t>(rows * p.Dv) * sizeof(float));
}

// Sinks, division by the denominator, logarithm; the rows go to their places in out and lse.
template <class T>
void finish(const Forward& f, const Pair& pair, int64_t first_row, int64_t rows, const State& a) {
  const Problem& p = f.p;
  const int64_t total_q = p.cu_q[p.n];
  T* out = static_cast<T*>(f.out);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t r = first_row + i, token = pair.q0 + r / pair.group;
    const int64_t head = pair.head * pair.group + r % pair.group;
    float m = a.m[i], l = a.l[i], scale = 1.0f;
    if (p.sinks) {
      const float sink = p.sinks[head] * kLog2E, top = m > sink ? m : sink;
      float w[2 * kLanes];
      const VF base = VF::set(top == -kInf ? 0.0f : top);
      exp2_neg<float>(VF::set(m) - base).store(w);
      exp2_neg<float>(VF::set(sink) - base).store(w + kLanes);
      scale = w[0];
      l = l * w[0] + w[kLanes];
      m = top;
    }
    float log_l[kLanes];
    vlog(VF::set(l)).store(log_l);
    f.lse[head * total_q + token] = l == 0.0f ? -kInf : m * kLn2 + log_l[0];
    const VF factor = VF::set(l == 0.0f ? 0.0f : scale / l);
    const float* o = a.o + i * p.Dv;
    T* to = out + (token * p.Hq + head) * p.Dv;
    for (int64_t d = 0; d < p.Dv; d += kLanes) store_upto(load_upto(o + d, p.Dv - d) * factor, to + d, p.Dv - d);
  }
}

// Rows of all (sequence, key head) pairs cut into units; a unit never spans two pairs.
struct Units {
  const Problem& p;
  int64_t rows;           // of a unit
  const int64_t* starts;  // (n + 1): first unit of a sequence
  int64_t count;

  struct Unit {
    Pair pair;
    int64_t first, rows;
    int64_t block0, block1;  // blocks of keys that some row sees
  };

  FOLDSCAN_INLINE Unit operator[](int64_t i) const {
    const int64_t seq = find_sequence(starts, p.n, i), local = i - starts[seq];
    const int64_t per_head = (starts[seq + 1] - starts[seq]) / p.Hkv;
    Unit u;
    u.pair = pair_of(p, seq, local / per_head);
    u.first = local % per_head * rows;
    u.rows = imin(rows, u.pair.Lq * u.pair.group - u.first);
    const int64_t last = (u.first + u.rows - 1) / u.pair.group;
    u.block0 = visible(p, u.first / u.pair.group, u.pair.Lq, u.pair.Lk).lo / kBlockKeys;
    u.block1 = imax(u.block0, ceil_div(visible(p, last, u.pair.Lq, u.pair.Lk).hi, kBlockKeys));
    return u;
  }
};

Units make_units(const Problem& p, int64_t rows, int64_t* starts) {
  starts[0] = 0;
  for (int64_t s = 0; s < p.n; ++s) {
    const int64_t total = static_cast<int64_t>(p.cu_q[s + 1] - p.cu_q[s]) * (p.Hq / p.Hkv);
    starts[s + 1] = starts[s] + ceil_div(total, rows) * p.Hkv;
  }
  return {p, rows, starts, starts[p.n]};
}

template <class T>
void load_queries(const Problem& p, const Units::Unit& u, T* q, int64_t ldq) {
  load_rows(static_cast<const T*>(p.q), p.q_row, p.q_head, u.pair, u.first, u.rows, p.D, q, ldq);
}

template <class T>
void run_unit(const Forward& f, const Units::Unit& u) {
  const Problem& p = f.p;
  Scratch scratch;
  const int64_t ldq = round_up(p.D, kK<T>), tiles = ceil_div(u.rows, kTileRows), floats = state_floats(p, kTileRows);
  T* q = scratch.get<T>(u.rows * ldq);
  load_queries(p, u, q, ldq);
  float* states = scratch.get<float>(tiles * floats);
  for (int64_t t = 0; t < tiles; ++t)
    clear_state(p, imin(kTileRows, u.rows - t * kTileRows), state_at(states + t * floats, kTileRows));
  const State fresh = state_at(scratch.get<float>(floats), kTileRows);
  const TileScratch<T> tile = new_tile<T>(scratch);
  const bool shared = tiles > 1;
  Block<T> kv = new_block<T>(p, shared, scratch);
  T* gather_k = p.block_table ? scratch.get<T>(kBlockKeys * p.D) : nullptr;
  T* gather_v = p.block_table ? scratch.get<T>(kBlockKeys * p.Dv) : nullptr;
  for (int64_t b = u.block0; b < u.block1; ++b) {
    const int64_t block = b * kBlockKeys;
    const Keys all = keys_in_block(p, u.pair, u.first, u.rows, block, kBlockKeys);
    if (all.hi <= all.lo) continue;
    open_block(p, u.pair, block, all, shared, gather_k, gather_v, kv);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = u.first + t * kTileRows, rows = imin(kTileRows, u.first + u.rows - first);
      const Keys keys = keys_in_block(p, u.pair, first, rows, block, kBlockKeys);
      if (keys.hi <= keys.lo) continue;
      block_state(p, u.pair, first, rows, q + t * kTileRows * ldq, ldq, block, keys, kv, tile, fresh);
      merge_state<T>(p, rows, state_at(states + t * floats, kTileRows), fresh);
    }
  }
  for (int64_t t = 0; t < tiles; ++t)
    finish<T>(f, u.pair, u.first + t * kTileRows, imin(kTileRows, u.rows - t * kTileRows),
              state_at(states + t * floats, kTileRows));
}

// Units of one tile; first all (unit, block) states, then the merges.
template <class T>
void run_split(const Forward& f, const Units& units, int64_t capacity, const int64_t* first_state, float* states) {
  const Problem& p = f.p;
  const int64_t floats = state_floats(p, capacity);
  parallel_for(first_state[units.count], grain_for(capacity * kBlockKeys * p.D / 8), [&](int64_t task) {
    const int64_t index = find_sequence(first_state, units.count, task);
    const Units::Unit u = units[index];
    const int64_t block = (u.block0 + task - first_state[index]) * kBlockKeys;
    const State out = state_at(states + task * floats, capacity);
    const Keys keys = keys_in_block(p, u.pair, u.first, u.rows, block, kBlockKeys);
    if (keys.hi <= keys.lo) return clear_state(p, u.rows, out);
    Scratch scratch;
    const int64_t ldq = round_up(p.D, kK<T>);
    T* q = scratch.get<T>(u.rows * ldq);
    load_queries(p, u, q, ldq);
    Block<T> kv = new_block<T>(p, false, scratch);
    T* gather_k = p.block_table ? scratch.get<T>(kBlockKeys * p.D) : nullptr;
    T* gather_v = p.block_table ? scratch.get<T>(kBlockKeys * p.Dv) : nullptr;
    open_block(p, u.pair, block, keys, false, gather_k, gather_v, kv);
    block_state(p, u.pair, u.first, u.rows, q, ldq, block, keys, kv, new_tile<T>(scratch), out);
  });
  parallel_for(units.count, grain_for(p.Dv * units.rows), [&](int64_t i) {
    const Units::Unit u = units[i];
    Scratch scratch;
    const State sum = state_at(scratch.get<float>(floats), capacity);
    clear_state(p, u.rows, sum);
    for (int64_t task = first_state[i]; task < first_state[i + 1]; ++task)
      merge_state<T>(p, u.rows, sum, state_at(states + task * floats, capacity));
    finish<T>(f, u.pair, u.first, u.rows, sum);
  });
}

template <class T>
void run(const Forward& f) {
  const Problem& p = f.p;
  Scratch scratch;
  int64_t* starts = scratch.get<int64_t>(p.n + 1);
  const Units units = make_units(p, kTileRows, starts);
  const int64_t threads = num_threads();
  if (threads > 1 && units.count < 2 * threads) {
    int64_t* first_state = scratch.get<int64_t>(units.count + 1);
    first_state[0] = 0;
    int64_t capacity = 0;
    for (int64_t i = 0; i < units.count; ++i) {
      const Units::Unit u = units[i];
      first_state[i + 1] = first_state[i] + u.block1 - u.block0;
      capacity = imax(capacity, u.rows);
    }
    const int64_t total = first_state[units.count], floats = total * state_floats(p, capacity);
    if (total > units.count && floats <= kSplitFloats)
      return run_split<T>(f, units, capacity, first_state, scratch.get<float>(floats));
  }
  const int64_t tiles = imax(1, imin(kUnitTiles, units.count / (4 * threads)));
  const Units larger = make_units(p, tiles * kTileRows, starts);
  // The last units of a causal problem are the longest: they go first.
  const int64_t keys = p.n ? p.cu_k[p.n] / p.n : 0;
  parallel_for(larger.count, grain_for(imin(larger.rows, p.cu_q[p.n] * p.Hq / p.Hkv) * keys * p.D / 8),
               [&](int64_t i) { run_unit<T>(f, larger[larger.count - 1 - i]); });
}

}  // namespace

void forward(const Forward& f) {
  if (f.p.type == DType::kF32) {
    run<float>(f);
  } else {
    run<bf16>(f);
  }
}

}  // namespace foldscan::FOLDSCAN_ISA::attention
