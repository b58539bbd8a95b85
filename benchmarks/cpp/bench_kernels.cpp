// The core's kernels without PyTorch, on one thread: milliseconds of the best of several calls, or with --once NAME a
// single call, for tools that count instructions. The instruction set is the dispatcher's (FOLDSCAN_ISA).
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "core/parallel.h"
#include "linear/linear.h"
#include "ssm/ssm.h"

using namespace foldscan;

namespace {

// Numbers between -1 and 1 that look random and are the same everywhere.
std::vector<float> values(int64_t n, uint32_t seed) {
  std::vector<float> v(static_cast<size_t>(n));
  for (auto& x : v) {
    seed = seed * 1664525u + 1013904223u;
    x = static_cast<float>(seed >> 8) / static_cast<float>(1 << 23) - 1.0f;
  }
  return v;
}

using Call = std::function<void()>;

Call linear_call(int64_t M, int64_t N, int64_t K) {
  auto x = values(M * K, 1), w = values(N * K, 2), out = values(M * N, 3);
  return [=]() mutable {
    linear::Forward p{};
    p.x = x.data(), p.weight = w.data(), p.out = out.data();
    p.M = M, p.N = N, p.K = K, p.x_stride = K, p.weight_stride = K;
    linear::cpu::forward(p);
  };
}

Call conv_call(int64_t T, int64_t D) {
  auto x = values(T * D, 1), w = values(4 * D, 2), b = values(D, 3), out = values(T * D, 4);
  return [=]() mutable {
    ssm::Conv p{};
    p.x = x.data(), p.weight = w.data(), p.bias = b.data(), p.out = out.data();
    p.seqs = {1, T, nullptr, nullptr, 0};
    p.D = D, p.W = 4, p.silu = true;
    p.x_strides[0] = p.out_strides[0] = T * D, p.x_strides[1] = p.out_strides[1] = 1;
    p.x_strides[2] = p.out_strides[2] = D;
    ssm::cpu::conv_forward(p);
  };
}

Call norm_call(int64_t M, int64_t D) {
  auto x = values(M * D, 1), z = values(M * D, 2), w = values(D, 3), out = values(M * D, 4), rstd = values(M * 8, 5);
  return [=]() mutable {
    ssm::RmsNorm p{};
    p.x = x.data(), p.z = z.data(), p.weight = w.data(), p.out = out.data(), p.rstd = rstd.data();
    p.M = M, p.D = D, p.group = D / 8, p.x_stride = p.z_stride = D, p.eps = 1e-5f;
    ssm::cpu::rmsnorm_forward(p);
  };
}

Call scan_call(int64_t T, int64_t H, int64_t P, int64_t N, bool backward) {
  auto x = values(T * H * P, 1), B = values(T * N, 2), C = values(T * N, 3), dt = values(T * H, 4);
  std::vector<float> A(static_cast<size_t>(H), -0.5f), out(x.size()), dB(B.size()), dC(C.size()), ddt(dt.size()), dA(A),
      dbias(A);
  auto dout = values(T * H * P, 5);
  return [=]() mutable {
    ssm::ScanInputs in{};
    in.x = x.data(), in.B = B.data(), in.C = C.data(), in.dt = dt.data(), in.A = A.data();
    in.x_stride = H * P, in.B_stride = in.C_stride = N;
    in.softplus = true, in.dt_max = INFINITY;
    in.H = H, in.P = P, in.G = 1, in.N = N;
    const ssm::Sequences seqs{1, T, nullptr, nullptr, 0};
    if (!backward) return ssm::cpu::scan_forward({in, seqs, nullptr, nullptr, out.data()});
    ssm::ScanBackward p{};
    p.in = in, p.seqs = seqs, p.dout = dout.data(), p.dx = out.data(), p.ddt = ddt.data(), p.dB = dB.data();
    p.dC = dC.data(), p.dA = dA.data(), p.ddt_bias = dbias.data();
    ssm::cpu::scan_backward(p);
  };
}

Call attention_call(int64_t T, int64_t Hq, int64_t Hkv, int64_t D) {
  auto q = values(T * Hq * D, 1), k = values(T * Hkv * D, 2), v = values(T * Hkv * D, 3);
  std::vector<float> out(q.size()), lse(static_cast<size_t>(T * Hq));
  return [=]() mutable {
    const int32_t cu[2] = {0, static_cast<int32_t>(T)};
    attention::Forward f{};
    auto& p = f.p;
    p.q = q.data(), p.k = k.data(), p.v = v.data(), p.cu_q = p.cu_k = cu;
    p.n = 1, p.Hq = Hq, p.Hkv = Hkv, p.D = p.Dv = D;
    p.q_row = Hq * D, p.k_row = p.v_row = Hkv * D, p.q_head = p.k_head = p.v_head = D;
    p.window_left = -1, p.window_right = 0;
    p.scale = 1.0f / std::sqrt(static_cast<float>(D));
    f.out = out.data(), f.lse = lse.data();
    attention::cpu::forward(f);
  };
}

}  // namespace

int main(int argc, char** argv) {
  set_pool_threads(1);
  const std::map<std::string, std::function<Call()>> kernels{
      {"linear_64x512x512", [] { return linear_call(64, 512, 512); }},
      {"conv_256x512", [] { return conv_call(256, 512); }},
      {"norm_256x1024", [] { return norm_call(256, 1024); }},
      {"scan_256x8x64x64", [] { return scan_call(256, 8, 64, 64, false); }},
      {"scan_backward_256x8x64x64", [] { return scan_call(256, 8, 64, 64, true); }},
      {"attention_256x4x2x64", [] { return attention_call(256, 4, 2, 64); }},
  };
  if (argc == 3 && !std::strcmp(argv[1], "--once")) {
    const auto it = kernels.find(argv[2]);
    if (it == kernels.end()) return std::fprintf(stderr, "no kernel %s\n", argv[2]), 2;
    it->second()();
    return 0;
  }
  for (const auto& [name, make] : kernels) {
    if (argc == 2 && !std::strcmp(argv[1], "--list")) {
      std::printf("%s\n", name.c_str());
      continue;
    }
    const Call call = make();
    double best = INFINITY;
    for (int i = 0; i < 20; ++i) {
      const auto start = std::chrono::steady_clock::now();
      call();
      best = std::fmin(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    std::printf("%-28s %8.3f ms\n", name.c_str(), best * 1e3);
  }
  return 0;
}
