// Micro-kernel speed on one thread, against the multiply-add peak that the same program measures.
// Prints JSON lines: {"op", "isa", "dtype", "shape", "gflops", "peak_gflops", "fraction"}. Median of interleaved
// rounds.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

#include "core/gemm.h"
#include "core/peak.h"

// The copy of this instruction set, not the one that dispatch would pick.
namespace foldscan::FOLDSCAN_ISA::probe {
void peak(const ::foldscan::probe::Peak&);
}

#define FOLDSCAN_STRING2(x) #x
#define FOLDSCAN_STRING(x) FOLDSCAN_STRING2(x)

namespace foldscan::FOLDSCAN_ISA {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double peak_once(DType type) {
  double flops = 0;
  const double t = now();
  foldscan::FOLDSCAN_ISA::probe::peak({.type = type, .iterations = 200000, .flops = &flops});
  return flops / (now() - t) * 1e-9;
}

template <class T>
double gemm_once(int64_t M, int64_t N, int64_t K, const T* a, const T* b, float* c) {
  const int64_t reps = std::max<int64_t>(1, 100000000 / (M * N * K));
  const double t = now();
  for (int64_t r = 0; r < reps; ++r) {
    gemm_packed<T>(M, N, K, a, K, b, c, N, false);
    asm volatile("" ::: "memory");
  }
  return 2.0 * static_cast<double>(M * N * K * reps) / (now() - t) * 1e-9;
}

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

template <class T>
void run(const char* dtype) {
  const int64_t shapes[][3] = {{64, 64, 64}, {64, 128, 64}, {96, 128, 128}, {192, 256, 256}, {1, 64, 64}};
  for (const auto& s : shapes) {
    const int64_t M = s[0], N = s[1], K = s[2];
    std::vector<T> a(static_cast<size_t>(M * K), from_float<T>(0.5f));
    std::vector<T> b(static_cast<size_t>(b_packed_size<T>(K, N)), from_float<T>(0.25f));
    std::vector<float> c(static_cast<size_t>(M * N));
    std::vector<double> gemm, peak;
    for (int round = 0; round < 15; ++round) {
      peak.push_back(peak_once(sizeof(T) == 4 ? DType::kF32 : DType::kBF16));
      gemm.push_back(gemm_once<T>(M, N, K, a.data(), b.data(), c.data()));
    }
    std::printf(
        "{\"op\": \"gemm_packed\", \"isa\": \"%s\", \"dtype\": \"%s\", \"shape\": [%ld, %ld, %ld], \"gflops\": %.1f, "
        "\"peak_gflops\": %.1f, \"fraction\": %.3f}\n",
        FOLDSCAN_STRING(FOLDSCAN_ISA), dtype, long(M), long(N), long(K), median(gemm), median(peak),
        median(gemm) / median(peak));
  }
}

}  // namespace
}  // namespace foldscan::FOLDSCAN_ISA

int main() {
  foldscan::FOLDSCAN_ISA::run<float>("fp32");
  foldscan::FOLDSCAN_ISA::run<foldscan::bf16>("bf16");
}
