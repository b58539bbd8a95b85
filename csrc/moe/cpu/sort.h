// Stable counting sort of assignments by expert, with capacity. One thread: its cost, a few nanoseconds an assignment,
// is far below that of the row it moves.
#pragma once

#include "core/parallel.h"
#include "moe/moe.h"

namespace foldscan::FOLDSCAN_ISA::moe {

// Whether assignment a is kept before b: more probable first, of equals the lower id; NaN last.
FOLDSCAN_INLINE bool kept_before(const float* probs, int64_t a, int64_t b) {
  const float x = probs[a], y = probs[b];
  const bool nx = !(x == x), ny = !(y == y);
  if (nx || ny) return nx == ny ? a < b : ny;
  return x > y || (x == y && a < b);
}

// The last of ids[0 .. n) that a capacity of c < n keeps, c > 0: a heap of the c best with the worst on top.
inline int64_t last_kept(const float* probs, const int64_t* ids, int64_t n, int64_t c, int64_t* heap) {
  const auto sift_down = [&](int64_t at, int64_t id) {
    for (int64_t child; (child = 2 * at + 1) < c; at = child) {
      if (child + 1 < c && kept_before(probs, heap[child], heap[child + 1])) ++child;
      if (kept_before(probs, heap[child], id)) break;
      heap[at] = heap[child];
    }
    heap[at] = id;
  };
  for (int64_t i = 0; i < c; ++i) heap[i] = ids[i];
  for (int64_t i = c / 2; i-- > 0;) sift_down(i, heap[i]);
  for (int64_t i = c; i < n; ++i)
    if (kept_before(probs, ids[i], heap[0])) sift_down(0, ids[i]);
  return heap[0];
}

inline void sort_assignments(const foldscan::moe::Sort& p) {
  Scratch scratch;
  int64_t* begin = scratch.get<int64_t>(p.E + 1);
  int64_t* next = scratch.get<int64_t>(p.E + 1);
  int64_t* ids = scratch.get<int64_t>(p.n);
  for (int64_t e = 0; e <= p.E; ++e) begin[e] = 0;
  for (int64_t i = 0; i < p.n; ++i)
    if (p.experts[i] >= 0) ++begin[p.experts[i] + 1];
  for (int64_t e = 0; e < p.E; ++e) begin[e + 1] += begin[e];
  for (int64_t e = 0; e < p.E; ++e) next[e] = begin[e];
  for (int64_t i = 0; i < p.n; ++i)
    if (p.experts[i] >= 0) ids[next[p.experts[i]]++] = i;

  for (int64_t r = 0; r < p.R; ++r) p.rows[r] = -1;
  for (int64_t i = 0; i < p.n; ++i) p.inverse[i] = -1;
  int64_t row = 0;
  for (int64_t e = 0; e < p.E; ++e) {
    const int64_t n = begin[e + 1] - begin[e];
    const int64_t* mine = ids + begin[e];
    const bool full = p.capacity >= 0 && n > p.capacity;
    int64_t last = -1;
    if (full && !p.by_position && p.capacity > 0) {
      Scratch heap;
      last = last_kept(p.probs, mine, n, p.capacity, heap.get<int64_t>(p.capacity));
    }
    const int64_t first_row = row;
    for (int64_t i = 0; i < n; ++i) {
      const bool drop =
          full && (p.by_position || p.capacity == 0 ? i >= p.capacity
                                                    : mine[i] != last && !kept_before(p.probs, mine[i], last));
      if (drop) continue;
      p.rows[row] = mine[i];
      p.inverse[mine[i]] = row++;
    }
    p.counts[e] = row - first_row;
    if (p.pad) row = first_row + p.capacity;
    p.offs[e] = static_cast<int32_t>(row);
  }
}

}  // namespace foldscan::FOLDSCAN_ISA::moe
