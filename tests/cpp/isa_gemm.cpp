// GEMM, packing and matmul against a double loop; row invariance bit for bit.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "core/matmul.h"

namespace foldscan::FOLDSCAN_ISA {
namespace {

template <class T>
std::vector<T> random_values(int64_t n, unsigned seed) {
  std::mt19937 gen(seed);
  std::normal_distribution<float> normal;
  std::vector<T> v(static_cast<size_t>(n));
  for (auto& x : v) x = from_float<T>(normal(gen));
  return v;
}

// Each layout of B (rows or columns contiguous), each layout of A, against fp64; then the last row alone.
template <class T>
void check_matmul(int64_t M, int64_t N, int64_t K, bool b_cols, bool a_cols) {
  const auto a = random_values<T>(M * K, 1), b = random_values<T>(K * N, 2);
  std::vector<T> packed(static_cast<size_t>(b_packed_size<T>(K, N)));
  pack_b_parallel(b.data(), b_cols ? 1 : N, b_cols ? K : 1, K, N, packed.data());
  std::vector<float> c(static_cast<size_t>(M * N), -1.0f), row(static_cast<size_t>(N), -1.0f);
  const StridedRows<T, T> rows{a.data(), a_cols ? 1 : K, a_cols ? M : 1};
  matmul<T>(M, N, K, rows, packed.data(), [&](int64_t m, int64_t n, const float* r, int64_t count) {
    for (int64_t i = 0; i < count; ++i) c[static_cast<size_t>(m * N + n + i)] = r[i];
  });
  double worst = 0;
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0, scale = 1e-30;
      for (int64_t k = 0; k < K; ++k) {
        const double x = to_float(a[static_cast<size_t>(a_cols ? k * M + m : m * K + k)]);
        const double y = to_float(b[static_cast<size_t>(b_cols ? n * K + k : k * N + n)]);
        sum += x * y;
        scale += std::fabs(x * y);
      }
      worst = std::fmax(worst, std::fabs(sum - c[static_cast<size_t>(m * N + n)]) / scale);
    }
  CHECK(worst < 2e-6, "M %ld N %ld K %ld b_cols %d a_cols %d: error %g", long(M), long(N), long(K), b_cols, a_cols,
        worst);

  const int64_t last = M - 1;
  const StridedRows<T, T> one{a.data() + (a_cols ? last : last * K), a_cols ? 1 : K, a_cols ? M : 1};
  matmul<T>(1, N, K, one, packed.data(), [&](int64_t, int64_t n, const float* r, int64_t count) {
    for (int64_t i = 0; i < count; ++i) row[static_cast<size_t>(n + i)] = r[i];
  });
  CHECK(std::memcmp(row.data(), c.data() + last * N, static_cast<size_t>(N) * 4) == 0,
        "M %ld N %ld K %ld: the last row alone has other bits", long(M), long(N), long(K));
}

template <class T>
void check_shapes() {
  const int64_t shapes[][3] = {{1, 1, 1},  {1, 64, 64},   {7, 13, 1},    {6, 64, 127},
                               {5, 65, 2}, {97, 33, 515}, {13, 257, 64}, {100, 130, 1031}};
  for (const auto& s : shapes)
    for (int layout = 0; layout < 4; ++layout) check_matmul<T>(s[0], s[1], s[2], layout & 1, layout & 2);
}

// A block writes its own M x N values and nothing beside them, adds where it is told to.
template <class T>
void check_block_edges(int64_t M, int64_t N) {
  constexpr int64_t K = 4;
  const int64_t ldc = N + 3;
  const std::vector<T> a(static_cast<size_t>(M * K), from_float<T>(1.0f)),
      b(static_cast<size_t>(K * N), from_float<T>(2.0f));
  std::vector<T> packed(static_cast<size_t>(b_packed_size<T>(K, N)));
  pack_b(b.data(), N, 1, K, N, packed.data());
  std::vector<float> c(static_cast<size_t>((M + 1) * ldc), -1.0f);
  int wrong = 0;
  for (int pass = 1; pass <= 2; ++pass) {
    gemm_packed<T>(M, N, K, a.data(), K, packed.data(), c.data(), ldc, pass == 2);
    for (int64_t m = 0; m <= M; ++m)
      for (int64_t n = 0; n < ldc; ++n)
        wrong += c[static_cast<size_t>(m * ldc + n)] != (m < M && n < N ? 8.0f * static_cast<float>(pass) : -1.0f);
  }
  CHECK(wrong == 0, "M %ld N %ld: %d wrong values", long(M), long(N), wrong);
}

template <class T>
std::vector<float> block(int64_t M, int64_t N, int64_t K, const T* a, int64_t lda, int64_t ak,
                         const std::vector<T>& packed, int64_t piece) {
  std::vector<float> c(static_cast<size_t>(M * N), -1.0f);
  for (int64_t k = 0; k < K; k += piece)
    gemm_block<T>(M, N, imin(piece, K - k), a + k / kK<T> * ak, lda, ak, packed.data() + k * kNR, kNR * kK<T>,
                  b_panel_size<T>(K), c.data(), N, k > 0);
  return c;
}

// A by rows, A by columns (of pairs), and K cut and continued at whole steps: the same bits.
template <class T>
void check_same_chains(int64_t M, int64_t N, int64_t K) {
  const int64_t steps = ceil_div(K, kK<T>), lda = steps * kK<T>;
  auto a = random_values<T>(M * lda, 3);
  const auto b = random_values<T>(K * N, 4);
  std::vector<T> packed(static_cast<size_t>(b_packed_size<T>(K, N))), columns(a.size());
  pack_b(b.data(), N, 1, K, N, packed.data());
  for (int64_t m = 0; m < M; ++m) {
    if (lda > K) a[static_cast<size_t>(m * lda + K)] = from_float<T>(0.0f);
    for (int64_t k = 0; k < lda; ++k)
      columns[static_cast<size_t>((k / kK<T> * M + m) * kK<T> + k % kK<T>)] = a[static_cast<size_t>(m * lda + k)];
  }
  const auto want = block<T>(M, N, K, a.data(), lda, kK<T>, packed, K);
  const auto by_columns = block<T>(M, N, K, columns.data(), kK<T>, M * kK<T>, packed, K);
  const auto pieces = block<T>(M, N, K, a.data(), lda, kK<T>, packed, imax(kWholeSteps<T>, 2));
  const size_t bytes = want.size() * 4;
  CHECK(std::memcmp(want.data(), by_columns.data(), bytes) == 0, "M %ld N %ld K %ld: A by columns has other bits",
        long(M), long(N), long(K));
  CHECK(std::memcmp(want.data(), pieces.data(), bytes) == 0, "M %ld N %ld K %ld: pieces of K have other bits", long(M),
        long(N), long(K));
}

// Operands that end where readable memory ends.
template <class T>
void check_reads(int64_t M, int64_t N, int64_t K) {
  const int64_t lda = round_up(K, kK<T>), page = sysconf(_SC_PAGESIZE);
  struct Guarded {
    char* base;
    int64_t size;
    int64_t page;
    Guarded(int64_t bytes, int64_t p) : size(round_up(bytes, p)), page(p) {
      base = static_cast<char*>(
          mmap(nullptr, static_cast<size_t>(size + page), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
      mprotect(base + size, static_cast<size_t>(page), PROT_NONE);
    }
    ~Guarded() { munmap(base, static_cast<size_t>(size + page)); }
    void* end(int64_t bytes) const { return base + size - bytes; }
  };
  const int64_t a_bytes = M * lda * int64_t{sizeof(T)}, c_bytes = M * N * 4;
  const int64_t b_bytes = b_packed_size<T>(K, N) * int64_t{sizeof(T)};
  const Guarded a(a_bytes, page), b(b_bytes, page), c(c_bytes, page);
  T* pa = static_cast<T*>(a.end(a_bytes));
  T* pb = static_cast<T*>(b.end(b_bytes));
  float* pc = static_cast<float*>(c.end(c_bytes));
  for (int64_t i = 0; i < M * lda; ++i) pa[i] = from_float<T>(i % lda < K ? 1.0f : 0.0f);
  for (int64_t i = 0; i < b_packed_size<T>(K, N); ++i) pb[i] = from_float<T>(2.0f);
  int wrong = 0;
  for (int pass = 1; pass <= 2; ++pass) {
    gemm_block<T>(M, N, K, pa, lda, kK<T>, pb, kNR * kK<T>, b_panel_size<T>(K), pc, N, pass == 2);
    for (int64_t i = 0; i < M * N; ++i) wrong += pc[i] != 2.0f * static_cast<float>(K * pass);
  }
  CHECK(wrong == 0, "M %ld N %ld K %ld: %d wrong values", long(M), long(N), long(K), wrong);
}

void check_transpose() {
  VF r[kLanes];
  for (int i = 0; i < kLanes; ++i) r[i] = VF::iota() + VF::set(static_cast<float>(100 * i));
  transpose(r);
  int wrong = 0;
  for (int i = 0; i < kLanes; ++i) {
    float row[kLanes];
    r[i].store(row);
    for (int j = 0; j < kLanes; ++j) wrong += row[j] != static_cast<float>(100 * j + i);
  }
  CHECK(wrong == 0, "%d wrong elements", wrong);
}

void check_bf16_rounding() {
  // Ties to even, overflow to infinity, NaN stays NaN: the vector and the scalar conversion agree.
  const float cases[] = {1.0f, 1.00390625f, 1.01171875f, -1.00390625f, 3.4e38f, -3.4e38f, INFINITY, NAN, 0.0f, 1e-3f};
  for (float x : cases) {
    bf16 v[kLanes];
    VF::set(x).store(v);
    const bf16 s = to_bf16(x);
    const bool same = v[0].bits == s.bits || (std::isnan(to_float(v[0])) && std::isnan(x));
    CHECK(same, "%g: %04x, scalar %04x", double(x), v[0].bits, s.bits);
  }
}

}  // namespace
}  // namespace foldscan::FOLDSCAN_ISA

void run_gemm_tests() {
  using namespace foldscan::FOLDSCAN_ISA;
  check_transpose();
  check_bf16_rounding();
  for (int64_t M : {1, 2, 3, 5, 6, 7, 13, 16, 17, 35})
    for (int64_t N : {1, 15, 16, 17, 63, 64, 65, 130}) {
      check_block_edges<float>(M, N);
      check_block_edges<foldscan::bf16>(M, N);
    }
  for (int64_t M : {1, 4, 16, 23})
    for (int64_t N : {1, 16, 60, 70})
      for (int64_t K : {1, 2, 31, 32, 33, 100}) {
        check_same_chains<float>(M, N, K);
        check_same_chains<foldscan::bf16>(M, N, K);
        check_reads<float>(M, N, K);
        check_reads<foldscan::bf16>(M, N, K);
      }
  check_shapes<float>();
  check_shapes<foldscan::bf16>();
}
