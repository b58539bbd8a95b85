// The bf16 micro-kernel on a tile unit (AMX): up to 16 rows by 64 columns of C in four tiles, one tile of A, one of B.
//
// A panel of B is what the unit wants as it lies: 16 pair rows of 64 bytes, one row of the panel apart. A step of 16
// pairs loads one tile of A and four of B for four products; a product keeps the unit busy for 16 cycles, a load from
// L1 takes 8 (Intel's figures), so the products are the bound.
//
// Numerics: a chain is cut into links of 16 pairs, counted from its start (tile_unit.h: a link is summed apart, then
// added to C). The last link is shorter; pairs that are zero in A change nothing (but the sign of a zero), so a
// caller may give a row more of them.
//
// The shapes of the tiles (rows of A and C, pairs of the last link) are state of the thread, set anew only when they
// change, and given up when the thread leaves its parallel loop: another library may set up tiles of its own on the
// same thread, and a thread without tiles has 8 KiB less to save at a switch. A loop is long (10^4 multiply-adds and
// more) beside the setting.
#pragma once

#include "core/micro_kernel.h"
#include "core/parallel.h"
#include "core/tile_unit.h"

namespace foldscan::FOLDSCAN_ISA {

// Tiles 0 .. 3 are C. The last link of a chain has tiles of its own: setting shapes anew would clear C.
constexpr int kTileA = 4, kTileB = 5, kLastA = 6, kLastB = 7;
constexpr int kTileBytes = kLanes * 4;

struct TileShapes {
  int rows = 0;   // of A and C, 0: no tiles
  int pairs = 0;  // of the last link, 0: all links are whole
};
inline constinit thread_local TileShapes tile_shapes;

inline void release_tiles() {
  if (tile_shapes.rows == 0) return;
  Tiles::release();
  tile_shapes = {};
}

inline __attribute__((noinline)) void set_tile_shapes(TileShapes s) {
  if (tile_shapes.rows == 0) on_loop_exit(release_tiles);
  tile_shapes = s;
  alignas(64) TileConfig config{};
  config.palette = 1;
  const auto tile = [&](int t, int rows, int pairs) {
    config.rows[t] = static_cast<uint8_t>(rows);
    config.row_bytes[t] = static_cast<uint16_t>(4 * pairs);
  };
  for (int t = 0; t < kNV; ++t) tile(t, s.rows, kLanes);
  tile(kTileA, s.rows, kPairsAtOnce);
  tile(kTileB, kPairsAtOnce, kLanes);
  if (s.pairs > 0) {
    tile(kLastA, s.rows, s.pairs);
    tile(kLastB, s.pairs, kLanes);
  }
  Tiles::configure(config);
}

FOLDSCAN_INLINE void need_tile_shapes(TileShapes s) {
  if (s.rows != tile_shapes.rows || s.pairs != tile_shapes.pairs) set_tile_shapes(s);
}

template <int I>
struct TileNumber {
  static constexpr int value = I;
};
// f(TileNumber<0>), .. f(TileNumber<N - 1>).
template <int N, class F>
FOLDSCAN_INLINE void each_tile(const F& f) {
  if constexpr (N > 1) each_tile<N - 1>(f);
  f(TileNumber<N - 1>{});
}

// `pairs` pairs of the rows of A into tile T.
template <int T>
FOLDSCAN_INLINE void load_tile_a(int rows, int64_t pairs, const bf16* a, int64_t lda, int64_t ak) {
  if (ak == 2) return Tiles::load<T>(a, 2 * lda);
  // Pairs by columns: transposed on the way.
  VF columns[kLanes];
  for (int64_t k = 0; k < kLanes; ++k)
    columns[k] = k < pairs ? VF::load(reinterpret_cast<const float*>(a + k * ak), rows) : VF::zero();
  transpose(columns);
  alignas(64) float staged[kLanes * kLanes];
  for (int m = 0; m < kLanes; ++m) columns[m].store(staged + m * kLanes);
  Tiles::load<T>(staged, kTileBytes);
}

template <int NV>
void tile_kernel(int rows, int64_t steps, const bf16* a, int64_t lda, int64_t ak, const bf16* b, int64_t ldb, float* c,
                 int64_t ldc, int tail, Into into, Ahead ahead) {
  const int last = static_cast<int>(steps % kPairsAtOnce);
  need_tile_shapes({rows, last});
  // Columns that are not all there, and values that are added to C, go through memory of their own.
  alignas(64) float staged[kMRPairs * kLanes];
  const auto lanes = [&](int n) { return n == NV - 1 ? tail : kLanes; };
  each_tile<NV>([&](auto tile) FOLDSCAN_LAMBDA {
    constexpr int n = tile.value;
    const float* from = c + n * kLanes;
    if (into != Into::kContinue) return Tiles::zero<n>();
    if (lanes(n) == kLanes) return Tiles::load<n>(from, 4 * ldc);
    for (int m = 0; m < rows; ++m) VF::load(from + m * ldc, lanes(n)).store(staged + m * kLanes);
    Tiles::load<n>(staged, kTileBytes);
  });
  const auto fetch = [&](int64_t pairs) FOLDSCAN_LAMBDA {
    for (int64_t i = pairs / kAheadSteps * ahead.lines; i > 0; --i, ahead.p += 64) __builtin_prefetch(ahead.p, 0, 2);
  };
  for (int64_t k = 0; k + kPairsAtOnce <= steps; k += kPairsAtOnce) {
    fetch(kPairsAtOnce);
    load_tile_a<kTileA>(rows, kPairsAtOnce, a, lda, ak);
    each_tile<NV>([&](auto tile) FOLDSCAN_LAMBDA {
      Tiles::load<kTileB>(b + tile.value * 2 * kLanes, 2 * ldb);
      Tiles::dot<tile.value, kTileA, kTileB>();
    });
    a += kPairsAtOnce * ak;
    b += kPairsAtOnce * ldb;
  }
  if (last > 0) {
    fetch(last);
    load_tile_a<kLastA>(rows, last, a, lda, ak);
    each_tile<NV>([&](auto tile) FOLDSCAN_LAMBDA {
      Tiles::load<kLastB>(b + tile.value * 2 * kLanes, 2 * ldb);
      Tiles::dot<tile.value, kLastA, kLastB>();
    });
  }
  each_tile<NV>([&](auto tile) FOLDSCAN_LAMBDA {
    constexpr int n = tile.value;
    float* to = c + n * kLanes;
    if (into != Into::kAdd && lanes(n) == kLanes) return Tiles::store<n>(to, 4 * ldc);
    Tiles::store<n>(staged, kTileBytes);
    for (int m = 0; m < rows; ++m) {
      VF v = VF::load(staged + m * kLanes);
      if (into == Into::kAdd) v = VF::load(to + m * ldc, lanes(n)) + v;
      v.store(to + m * ldc, lanes(n));
    }
  });
}

struct TileKernel {
  int rows, vectors;
  FOLDSCAN_INLINE void operator()(int64_t steps, const bf16* a, int64_t lda, int64_t ak, const bf16* b, int64_t ldb,
                                  float* c, int64_t ldc, int tail, Into into, Ahead ahead) const {
    switch (vectors) {
      case 1:
        return tile_kernel<1>(rows, steps, a, lda, ak, b, ldb, c, ldc, tail, into, ahead);
      case 2:
        return tile_kernel<2>(rows, steps, a, lda, ak, b, ldb, c, ldc, tail, into, ahead);
      case 3:
        return tile_kernel<3>(rows, steps, a, lda, ak, b, ldb, c, ldc, tail, into, ahead);
      default:
        return tile_kernel<4>(rows, steps, a, lda, ak, b, ldb, c, ldc, tail, into, ahead);
    }
  }
};

// Every product of bf16 pairs goes through the tiles, of one row too: its bits do not depend on how many there are.
template <>
struct MicroKernels<bf16> {
  static FOLDSCAN_INLINE TileKernel get(int mr, int nv) { return {mr, nv}; }
};

}  // namespace foldscan::FOLDSCAN_ISA
