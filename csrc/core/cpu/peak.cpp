#include "core/peak.h"

#include "core/matmul.h"

// "v" is any vector register, "x" only the sixteen that exist without AVX-512.
#ifdef __AVX512F__
#define FOLDSCAN_OPAQUE(v) asm volatile("" : "+v"(v))
#elif defined(__x86_64__)
#define FOLDSCAN_OPAQUE(v) asm volatile("" : "+x"(v))
#else
#define FOLDSCAN_OPAQUE(v) asm volatile("" : "+w"(v))
#endif

namespace foldscan::FOLDSCAN_ISA::probe {
namespace {

using namespace foldscan::probe;

template <class T>
void run_peak(const Peak& p) {
  constexpr int kAcc = kLanes == 16 ? 24 : 12;
  alignas(64) T ones[64];
  for (auto& o : ones) o = from_float<T>(1.0f);
  auto x = Tile<T>::broadcast(ones);
  auto y = Tile<T>::load(ones);
  FOLDSCAN_OPAQUE(x.v);
  FOLDSCAN_OPAQUE(y.v);
  // Different starting values keep the compiler from merging the chains.
  VF acc[kAcc];
  for (int j = 0; j < kAcc; ++j) acc[j] = VF::set(static_cast<float>(j));
  for (int64_t i = 0; i < p.iterations; ++i) {
#pragma GCC unroll 24
    for (int j = 0; j < kAcc; ++j) {
#if defined(__x86_64__) && !defined(__FMA__)
      FOLDSCAN_OPAQUE(x.v);  // multiply and add are two instructions here: keep the compiler from multiplying once
#endif
      acc[j] = Tile<T>::mul_add(x, y, acc[j]);
    }
  }
  for (auto& a : acc) FOLDSCAN_OPAQUE(a.v);
  *p.flops = 2.0 * static_cast<double>(p.iterations) * kAcc * kLanes * kK<T>;
}

#ifdef __AMX_BF16__
// A round is one product of tiles; four accumulators cover its latency.
template <>
void run_peak<bf16>(const Peak& p) {
  need_tile_shapes({kMRPairs, 0});
  for (int64_t i = 0; i < p.iterations; i += kNV)
    each_tile<kNV>([](auto tile) FOLDSCAN_LAMBDA { Tiles::dot<tile.value, kTileA, kTileB>(); });
  release_tiles();
  *p.flops = 2.0 * static_cast<double>(round_up(p.iterations, kNV)) * kMRPairs * kLanes * kPairsAtOnce * 2;
}
#endif

template <class T>
void run_gemm(const Gemm& p) {
  Scratch scratch;
  T* packed = scratch.get<T>(b_packed_size<T>(p.K, p.N));
  pack_b_parallel(p.b, p.N, 1, p.K, p.N, packed);
  matmul<T>(
      p.M, p.N, p.K, StridedRows<float, T>{p.a, p.K, 1}, packed,
      [&](int64_t m, int64_t n, const float* row, int64_t count) { copy_row(row, count, p.c + m * p.N + n, count); });
}

}  // namespace

void peak(const Peak& p) {
  if (p.type == DType::kF32) {
    run_peak<float>(p);
  } else {
    run_peak<bf16>(p);
  }
}

void gemm(const Gemm& p) {
  if (p.type == DType::kF32) {
    run_gemm<float>(p);
  } else {
    run_gemm<bf16>(p);
  }
}

}  // namespace foldscan::FOLDSCAN_ISA::probe
