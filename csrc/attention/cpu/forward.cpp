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
#include "attention/cpu/blocks.h"

namespace foldscan::FOLDSCAN_ISA::attention {
namespace {

constexpr int64_t kTileRows = 96;
constexpr int64_t kUnitTiles = 4;           // tiles of a unit at most: 384 rows amortise the packing of a block
constexpr int64_t kWaveFloats = 2 << 20;    // states of the sequences that are split at a time: they stay in L3
constexpr int64_t kSplitFloats = 16 << 20;  // states of one sequence at most

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

// State of `rows` rows (q, kTileRows at most) against the keys `keys` of the block, of which kv holds those from lo on.
template <class T>
void block_state(const Problem& p, const Pair& pair, int64_t first_row, int64_t rows, const T* q, int64_t ldq,
                 int64_t block, Keys keys, int64_t lo, Block<T>& kv, const TileScratch<T>& t, const State& out) {
  const int64_t width = keys.hi - keys.lo;
  kv.scores(rows, keys.lo - lo, width, q, ldq, t.s);
  const int64_t origin = block + keys.lo;
  Keys seen{};
  for (int64_t i = 0; i < rows; ++i) {
    if (i == 0 || (first_row + i) % pair.group == 0) seen = visible(p, (first_row + i) / pair.group, pair.Lq, pair.Lk);
    softmax_row(p, t.s + i * kBlockKeys, imax(seen.lo - origin, 0), imin(seen.hi - origin, width), width,
                t.prob + i * kBlockKeys, out.m[i], out.l[i]);
  }
  kv.mix(rows, keys.lo - lo, width, t.prob, out.o);
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
  Block<T> kv(p, u.pair, u.rows, scratch);
  for (int64_t b = u.block0; b < u.block1; ++b) {
    const int64_t block = b * kBlockKeys;
    const Keys all = keys_in_block(p, u.pair, u.first, u.rows, block, kBlockKeys);
    if (all.hi <= all.lo) continue;
    kv.open(block + all.lo, all.hi - all.lo, {u.pair, block + all.hi});
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = u.first + t * kTileRows, rows = imin(kTileRows, u.first + u.rows - first);
      const Keys keys = keys_in_block(p, u.pair, first, rows, block, kBlockKeys);
      if (keys.hi <= keys.lo) continue;
      block_state(p, u.pair, first, rows, q + t * kTileRows * ldq, ldq, block, keys, all.lo, kv, tile, fresh);
      merge_state<T>(p, rows, state_at(states + t * floats, kTileRows), fresh);
    }
  }
  for (int64_t t = 0; t < tiles; ++t)
    finish<T>(f, u.pair, u.first + t * kTileRows, imin(kTileRows, u.rows - t * kTileRows),
              state_at(states + t * floats, kTileRows));
}

// Rows of a unit against one block of keys.
struct Task {
  int64_t unit, block;
};

// Sequences [s0, s1), units of one tile: first all (unit, block) states, then the merges. All heads of a block come one
// after another: together their keys lie without gaps, which spares page walks.
template <class T>
void run_split(const Forward& f, const Units& units, int64_t s0, int64_t s1, int64_t capacity, int64_t total) {
  const Problem& p = f.p;
  const int64_t floats = state_floats(p, capacity), u0 = units.starts[s0], u1 = units.starts[s1];
  Scratch shared;
  float* states = shared.get<float>(total * floats);
  Task* tasks = shared.get<Task>(total);
  int64_t* first_state = shared.get<int64_t>(u1 - u0 + 1);
  first_state[0] = 0;
  for (int64_t u = u0; u < u1; ++u) first_state[u - u0 + 1] = first_state[u - u0] + units[u].block1 - units[u].block0;
  for (int64_t s = s0, n = 0; s < s1; ++s)
    for (int64_t b = 0, left = 1; left > 0; ++b) {
      left = 0;
      for (int64_t u = units.starts[s]; u < units.starts[s + 1]; ++u) {
        const Units::Unit unit = units[u];
        left += imax(0, unit.block1 - 1 - b);
        if (b >= unit.block0 && b < unit.block1) tasks[n++] = {u, b};
      }
    }
  parallel_for(total, imax(1, imin(p.Hkv, total / (4 * num_threads()))), [&](int64_t i) {
    const Task task = tasks[i];
    const Units::Unit u = units[task.unit];
    const int64_t block = task.block * kBlockKeys;
    const State out = state_at(states + (first_state[task.unit - u0] + task.block - u.block0) * floats, capacity);
    const Keys keys = keys_in_block(p, u.pair, u.first, u.rows, block, kBlockKeys);
    if (keys.hi <= keys.lo) return clear_state(p, u.rows, out);
    const Task next = tasks[imin(i + 1, total - 1)];
    Scratch scratch;
    const int64_t ldq = round_up(p.D, kK<T>);
    T* q = scratch.get<T>(u.rows * ldq);
    load_queries(p, u, q, ldq);
    Block<T> kv(p, u.pair, u.rows, scratch);
    kv.open(block + keys.lo, keys.hi - keys.lo, {units[next.unit].pair, next.block * kBlockKeys});
    block_state(p, u.pair, u.first, u.rows, q, ldq, block, keys, keys.lo, kv, new_tile<T>(scratch), out);
  });
  parallel_for(u1 - u0, grain_for(total / (u1 - u0) * floats / 8), [&](int64_t i) {
    const Units::Unit u = units[u0 + i];
    Scratch scratch;
    const State sum = state_at(scratch.get<float>(floats), capacity);
    clear_state(p, u.rows, sum);
    for (int64_t t = first_state[i]; t < first_state[i + 1]; ++t)
      merge_state<T>(p, u.rows, sum, state_at(states + t * floats, capacity));
    finish<T>(f, u.pair, u.first, u.rows, sum);
  });
}

// Splits the keys where that pays: few rows against many keys. False where it does not.
template <class T>
bool split(const Forward& f, const Units& units) {
  const Problem& p = f.p;
  Scratch scratch;
  int64_t* blocks = scratch.get<int64_t>(p.n);  // of all units of a sequence
  int64_t capacity = 0, total = 0, most = 0;
  for (int64_t s = 0; s < p.n; ++s) {
    blocks[s] = 0;
    for (int64_t i = units.starts[s]; i < units.starts[s + 1]; ++i) {
      const Units::Unit u = units[i];
      blocks[s] += u.block1 - u.block0;
      capacity = imax(capacity, u.rows);
    }
    total += blocks[s];
    most = imax(most, blocks[s]);
  }
  const int64_t floats = state_floats(p, capacity);
  const bool decoding = p.cu_q[p.n] * p.Hq <= kFewRows * units.count, idle = units.count < 2 * num_threads();
  if (!(decoding || (idle && num_threads() > 1)) || total == units.count || most * floats > kSplitFloats) return false;
  for (int64_t s = 0; s < p.n;) {
    int64_t end = s, sum = 0;
    while (end < p.n && (end == s || (sum + blocks[end]) * floats <= kWaveFloats)) sum += blocks[end++];
    run_split<T>(f, units, s, end, capacity, sum);
    s = end;
  }
  return true;
}

template <class T>
void run(const Forward& f) {
  const Problem& p = f.p;
  Scratch scratch;
  int64_t* starts = scratch.get<int64_t>(p.n + 1);
  const Units units = make_units(p, kTileRows, starts);
  if (split<T>(f, units)) return;
  const int64_t tiles = imax(1, imin(kUnitTiles, units.count / (4 * num_threads())));
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
