// The tile unit in software against its definition, bit for bit; the unit of the kernels against the software.
#include <cfenv>
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "core/gemm.h"

#ifdef __AMX_BF16__
#include "amx_emulator.h"

namespace foldscan::FOLDSCAN_ISA {
namespace {

constexpr int kRows = 16, kCols = 16;

struct Operands {
  bf16 a[kRows][32];      // pairs along rows
  bf16 b[16][2 * kCols];  // pair rows
  float c[kRows][kCols];
};

Operands random_operands(unsigned seed, double low, double high) {
  std::mt19937 gen(seed);
  std::uniform_real_distribution<double> exponent(low, high), sign(-1, 1);
  const auto value = [&] { return static_cast<float>(std::copysign(std::exp2(exponent(gen)), sign(gen))); };
  Operands o;
  for (auto& row : o.a)
    for (auto& x : row) x = to_bf16(value());
  for (auto& row : o.b)
    for (auto& x : row) x = to_bf16(value());
  for (auto& row : o.c)
    for (auto& x : row) x = value();
  return o;
}

TileConfig shapes(int rows, int pairs) {
  TileConfig config{};
  config.palette = 1;
  const int tile_rows[] = {rows, rows, pairs}, columns[] = {kCols, pairs, kCols};
  for (int t = 0; t < 3; ++t) {
    config.rows[t] = static_cast<uint8_t>(tile_rows[t]);
    config.row_bytes[t] = static_cast<uint16_t>(4 * columns[t]);
  }
  return config;
}

// c of the operands after one product of tiles, the rest of c as it was.
template <class Unit>
void product(const Operands& o, int rows, int pairs, float (&c)[kRows][kCols]) {
  alignas(64) const TileConfig config = shapes(rows, pairs);
  std::memcpy(c, o.c, sizeof(c));
  Unit::configure(config);
  Unit::template load<0>(o.c, sizeof(o.c[0]));
  Unit::template load<1>(o.a, sizeof(o.a[0]));
  Unit::template load<2>(o.b, sizeof(o.b[0]));
  Unit::template dot<0, 1, 2>();
  Unit::template store<0>(c, sizeof(c[0]));
  Unit::release();
}

// The definition, without denormals: those have cases of their own.
float element(const Operands& o, int m, int n, int pairs) {
  float first = 0, second = 0;
  for (int k = 0; k < pairs; ++k) {
    first = std::fma(to_float(o.a[m][2 * k]), to_float(o.b[k][2 * n]), first);
    second = std::fma(to_float(o.a[m][2 * k + 1]), to_float(o.b[k][2 * n + 1]), second);
  }
  return o.c[m][n] + (first + second);
}

void check_definition(int rows, int pairs, unsigned seed) {
  const Operands o = random_operands(seed, -6, 6);
  float c[kRows][kCols];
  product<SoftwareTiles>(o, rows, pairs, c);
  int wrong = 0, rounded = 0;
  for (int m = 0; m < kRows; ++m)
    for (int n = 0; n < kCols; ++n) {
      const float want = m < rows ? element(o, m, n, pairs) : o.c[m][n];
      wrong += std::memcmp(&want, &c[m][n], 4) != 0;
      double sum = o.c[m][n];
      for (int k = 0; k < 2 * pairs; ++k) sum += double(to_float(o.a[m][k])) * to_float(o.b[k / 2][2 * n + k % 2]);
      wrong += m < rows && !(std::fabs(sum - c[m][n]) < 1e-2);
      rounded += m < rows && static_cast<float>(sum) != c[m][n];
    }
  CHECK(wrong == 0, "%d rows, %d pairs: %d wrong values", rows, pairs, wrong);
  CHECK(rows * pairs < 128 || rounded > 0, "%d rows, %d pairs: sums so short that no order shows", rows, pairs);
}

// One element of C, everything else zero.
float single(float a0, float b0, float a1, float b1, float c) {
  Operands o{};
  o.a[0][0] = to_bf16(a0);
  o.b[0][0] = to_bf16(b0);
  o.a[0][1] = to_bf16(a1);
  o.b[0][1] = to_bf16(b1);
  o.c[0][0] = c;
  float out[kRows][kCols];
  product<Tiles>(o, 1, 1, out);
  return out[0][0];
}

void check_denormals_and_specials() {
  const float tiny = std::ldexp(1.0f, -130), least = std::ldexp(1.0f, -126);
  CHECK(single(tiny, 1024, 0, 0, 0) == 0, "a denormal of A counts");
  CHECK(single(1024, tiny, 0, 0, 0) == 0, "a denormal of B counts");
  CHECK(single(0, 0, 0, 0, tiny) == 0, "a denormal of C counts");
  CHECK(single(1, 1.5f * least, 1, -least, 0) == 0, "a denormal sum of the halves counts");
  CHECK(single(std::ldexp(1.0f, -70), std::ldexp(1.0f, -70), 0, 0, 0) == 0, "a denormal product counts");
  CHECK(single(1, least, 0, 0, 0) == least, "the least normal number is flushed");
  CHECK(single(3e38f, 3e38f, 1, 1, 0) == INFINITY, "overflow");
  CHECK(std::isnan(single(INFINITY, 0, 1, 1, 0)), "infinity times zero");
  CHECK(std::isnan(single(INFINITY, 1, -INFINITY, 1, 0)), "infinity minus infinity");
  CHECK(std::isnan(single(NAN, 1, 1, 1, 1)), "NaN is lost");
}

// Rounding and exception flags of the thread neither matter nor change.
void check_environment() {
  const Operands o = random_operands(11, -6, 6);
  float want[kRows][kCols], c[kRows][kCols];
  product<Tiles>(o, 16, 16, want);
  const unsigned before = _mm_getcsr(), unusual = (before & ~0xffc0u) | 0x4000u;  // upward, exceptions unmasked
  _mm_setcsr(unusual & ~0x3fu);
  product<Tiles>(o, 16, 16, c);
  const unsigned after = _mm_getcsr();
  _mm_setcsr(before);
  CHECK(after == (unusual & ~0x3fu), "MXCSR is %x, was %x", after, unusual);
  CHECK(std::memcmp(c, want, sizeof(c)) == 0, "the rounding mode of the thread shows");
}

void check_unit_of_the_kernels(int rows, int pairs, unsigned seed) {
  // Exponents over the whole range: overflow, denormals and NaN, whose bits are free.
  const Operands o = random_operands(seed, seed % 2 ? -75 : -10, seed % 2 ? 70 : 10);
  float want[kRows][kCols], got[kRows][kCols];
  product<SoftwareTiles>(o, rows, pairs, want);
  product<Tiles>(o, rows, pairs, got);
  int wrong = 0;
  for (int m = 0; m < kRows; ++m)
    for (int n = 0; n < kCols; ++n)
      wrong += std::memcmp(&want[m][n], &got[m][n], 4) != 0 && !(std::isnan(want[m][n]) && std::isnan(got[m][n]));
  CHECK(wrong == 0, "%d rows, %d pairs, seed %u: %d values differ from the software", rows, pairs, seed, wrong);
}

// The micro-kernel against links of 16 pairs, each the sum of `element`: the partition of K that callers rely on.
void check_links(int M, int steps, Into into) {
  const int N = 64, lda = 2 * steps + 2, ldc = N + 5;
  std::mt19937 gen(static_cast<unsigned>(M * 1000 + steps));
  std::normal_distribution<float> normal;
  std::vector<bf16> a(static_cast<size_t>(M * lda)), b(static_cast<size_t>(steps * 2 * N));
  std::vector<float> c(static_cast<size_t>(M * ldc)), start;
  for (auto& x : a) x = to_bf16(normal(gen));
  for (auto& x : b) x = to_bf16(normal(gen));
  for (auto& x : c) x = normal(gen);
  start = c;
  micro_for<bf16>(M, 4)(steps, a.data(), lda, 2, b.data(), 2 * N, c.data(), ldc, kLanes, into, {});
  release_tiles();
  int wrong = 0;
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      const float old = start[static_cast<size_t>(m * ldc + n)];
      float sum = into == Into::kContinue ? old : 0.0f;
      for (int k = 0; k < steps; k += 16) {
        float half[2] = {0, 0};
        for (int i = k; i < std::min(k + 16, steps); ++i)
          for (int h = 0; h < 2; ++h)
            half[h] = std::fma(to_float(a[static_cast<size_t>(m * lda + 2 * i + h)]),
                               to_float(b[static_cast<size_t>(2 * (i * N + n) + h)]), half[h]);
        sum += half[0] + half[1];
      }
      if (into == Into::kAdd) sum = old + sum;
      wrong += std::memcmp(&sum, &c[static_cast<size_t>(m * ldc + n)], 4) != 0;
    }
  CHECK(wrong == 0, "%d rows, %d pairs, into %d: %d wrong values", M, steps, static_cast<int>(into), wrong);
}

// Tiles belong to the loop: nobody finds them on the thread afterwards.
void check_release() {
  set_pool_threads(2);
  int used[8], left[8];
  parallel_for(8, 1, [&](int64_t i) {
    need_tile_shapes({static_cast<int>(i) + 1, 0});
    used[i] = tile_shapes.rows;
  });
  parallel_for(8, 1, [&](int64_t i) { left[i] = tile_shapes.rows; });
  int wrong = 0;
  for (int i = 0; i < 8; ++i) wrong += used[i] != i + 1 || left[i] != 0;
  CHECK(wrong == 0, "%d items found wrong tiles", wrong);
  CHECK(tile_shapes.rows == 0, "the calling thread keeps tiles");
  parallel_for(1, 1, [&](int64_t) {
    need_tile_shapes({4, 3});
    parallel_for(1, 1, [&](int64_t) { need_tile_shapes({5, 0}); });
    used[0] = tile_shapes.rows;
    need_tile_shapes({6, 0});
  });
  CHECK(used[0] == 0 && tile_shapes.rows == 0, "tiles after nested loops: %d, %d", used[0], tile_shapes.rows);
}

}  // namespace
}  // namespace foldscan::FOLDSCAN_ISA

void run_tile_tests() {
  using namespace foldscan::FOLDSCAN_ISA;
  for (int rows : {1, 7, 15, 16})
    for (int pairs : {1, 2, 9, 15, 16}) {
      check_definition(rows, pairs, static_cast<unsigned>(rows * 100 + pairs));
      for (unsigned seed = 0; seed < 20; ++seed) check_unit_of_the_kernels(rows, pairs, seed);
    }
  check_denormals_and_specials();
  check_environment();
  for (int M : {1, 5, 16})
    for (int steps : {1, 15, 16, 17, 32, 45})
      for (Into into : {Into::kSet, Into::kContinue, Into::kAdd}) check_links(M, steps, into);
  check_release();
}
void emulate_tiles() { foldscan::FOLDSCAN_ISA::install_amx_emulator(); }
#else
void run_tile_tests() {}
void emulate_tiles() {}
#endif
