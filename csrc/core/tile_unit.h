// A tile unit: eight registers of up to 16 rows of 64 bytes, and a product of two of them into a third. One
// implementation on AMX, one in plain C++ that does the same bit for bit.
//
//   configure(config)         shapes of the eight tiles; clears them
//   zero<T>() load<T> store<T>(p, stride)    tile T; rows `stride` bytes apart; only the bytes of its shape are touched
//   dot<C, A, B>()            C (rows x n, fp32) += A (rows x k pairs of bf16) times B (k x n pairs)
//   release()                 no tiles: their state need not be saved when the system switches threads
//
// dot, exactly (Intel SDM volume 2, TDPBF16PS, "Operation"): for every element of C the products of the first halves of
// the pairs are one chain of fused multiply-adds from zero over k = 0, 1, .., those of the second halves another; then
// C
// += first + second, each addition rounded. Round to nearest even, denormals read and written as zero, MXCSR neither
// consulted nor changed, no exceptions. Only the bits of a NaN are not specified.
//
// FOLDSCAN_SOFTWARE_TILES makes the software the unit of the kernels: the instruction set avx512_amx then runs, slowly,
// on any machine with AVX-512 and its bf16 dot product, so that all tests can run on it.
#pragma once

#include <immintrin.h>

#include "core/types.h"

namespace foldscan::FOLDSCAN_ISA {

// What LDTILECFG reads.
struct TileConfig {
  uint8_t palette;  // 1: eight tiles of 1 KiB; 0: none
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

#ifdef __AMX_TILE__
// Assembly rather than intrinsics: those of GCC do not say that a load reads memory, and take tile numbers as text.
struct HardwareTiles {
  static FOLDSCAN_INLINE void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
  static FOLDSCAN_INLINE void release() { asm volatile("tilerelease"); }
  template <int T>
  static FOLDSCAN_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  template <int T>
  static FOLDSCAN_INLINE void load(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  static FOLDSCAN_INLINE void store(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
  }
  template <int C, int A, int B>
  static FOLDSCAN_INLINE void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};
#endif

struct SoftwareTiles {
  static FOLDSCAN_INLINE void configure(const TileConfig& config) {
    for (int t = 0; t < 16; ++t)
      check(config.rows[t] <= (t < 8 ? kRows : 0) && config.row_bytes[t] <= (t < 8 ? kRowBytes : 0) &&
            (config.rows[t] == 0) == (config.row_bytes[t] == 0));
    check(config.palette == 1);
    unit = Unit{};
    unit.config = config;
  }
  static FOLDSCAN_INLINE void release() { unit = Unit{}; }
  static FOLDSCAN_INLINE void zero(int t) {
    check(unit.config.rows[t] > 0);
    unit.tiles[t] = Tile{};
  }
  static FOLDSCAN_INLINE void load(int t, const void* p, int64_t stride) {
    zero(t);
    for (int r = 0; r < unit.config.rows[t]; ++r)
      std::memcpy(unit.tiles[t].bytes[r], static_cast<const char*>(p) + r * stride, unit.config.row_bytes[t]);
  }
  static FOLDSCAN_INLINE void store(int t, void* p, int64_t stride) {
    check(unit.config.rows[t] > 0);
    for (int r = 0; r < unit.config.rows[t]; ++r)
      std::memcpy(static_cast<char*>(p) + r * stride, unit.tiles[t].bytes[r], unit.config.row_bytes[t]);
  }
  static FOLDSCAN_INLINE void dot(int c, int a, int b) {
    const TileConfig& s = unit.config;
    check(c != a && c != b && a != b && s.rows[c] > 0 && s.rows[a] == s.rows[c] && s.row_bytes[b] == s.row_bytes[c] &&
          s.rows[b] * 4 == s.row_bytes[a] && s.row_bytes[c] % 4 == 0);
    constexpr unsigned kNearestFlushNoExceptions = 0x9fc0;
    const unsigned mxcsr = _mm_getcsr();
    _mm_setcsr(kNearestFlushNoExceptions);
    multiply(unit.tiles[c], unit.tiles[a], unit.tiles[b], s.rows[c], s.rows[b]);
    _mm_setcsr(mxcsr);
  }

  // The same with the numbers of the tiles as the hardware wants them, in the instruction.
  template <int T>
  static FOLDSCAN_INLINE void zero() {
    zero(T);
  }
  template <int T>
  static FOLDSCAN_INLINE void load(const void* p, int64_t stride) {
    load(T, p, stride);
  }
  template <int T>
  static FOLDSCAN_INLINE void store(void* p, int64_t stride) {
    store(T, p, stride);
  }
  template <int C, int A, int B>
  static FOLDSCAN_INLINE void dot() {
    dot(C, A, B);
  }

 private:
  static constexpr int kRows = 16, kRowBytes = 64, kWords = kRowBytes / 4;
  struct Tile {
    alignas(64) char bytes[kRows][kRowBytes];
  };
  struct Unit {
    TileConfig config;
    Tile tiles[8];
  };
  static inline constinit thread_local Unit unit{};

  // What the hardware answers with an exception (#UD, #GP) ends the program here as well.
  static FOLDSCAN_INLINE void check(bool allowed) {
    if (!allowed) __builtin_trap();
  }
  static FOLDSCAN_INLINE void halves(const char (&row)[kRowBytes], float (&first)[kWords], float (&second)[kWords]) {
    uint32_t pairs[kWords];
    std::memcpy(pairs, row, kRowBytes);
    for (int i = 0; i < kWords; ++i) {
      first[i] = __builtin_bit_cast(float, pairs[i] << 16);
      second[i] = __builtin_bit_cast(float, pairs[i] & 0xffff0000u);
    }
  }
  // Not inlined: nothing of it may move across the changes of MXCSR. Columns beyond the shape are zeros and stay so.
  static __attribute__((noinline)) void multiply(Tile& c, const Tile& a, const Tile& b, int rows, int pairs) {
    float b_first[kRows][kWords], b_second[kRows][kWords];
    for (int k = 0; k < pairs; ++k) halves(b.bytes[k], b_first[k], b_second[k]);
    for (int m = 0; m < rows; ++m) {
      float a_first[kWords], a_second[kWords], first[kWords] = {}, second[kWords] = {}, sum[kWords];
      halves(a.bytes[m], a_first, a_second);
      for (int k = 0; k < pairs; ++k)
        for (int n = 0; n < kWords; ++n) {
          first[n] = __builtin_fmaf(a_first[k], b_first[k][n], first[n]);
          second[n] = __builtin_fmaf(a_second[k], b_second[k][n], second[n]);
        }
      std::memcpy(sum, c.bytes[m], kRowBytes);
      for (int n = 0; n < kWords; ++n) sum[n] = sum[n] + (first[n] + second[n]);
      std::memcpy(c.bytes[m], sum, kRowBytes);
    }
  }
};

#if defined(FOLDSCAN_SOFTWARE_TILES)
using Tiles = SoftwareTiles;
#elif defined(__AMX_TILE__)
using Tiles = HardwareTiles;
#endif

}  // namespace foldscan::FOLDSCAN_ISA
