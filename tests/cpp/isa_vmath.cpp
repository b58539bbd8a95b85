// The error bounds stated in core/vmath.h, over dense sweeps, against fp64.
#include "core/vmath.h"

#include <cmath>

#include "check.h"

// The vector functions are force-inlined, so they cannot be passed by address.
#define FN(f) [](VF x) { return f(x); }

namespace foldscan::FOLDSCAN_ISA {
namespace {

double ulp(double x) { return std::ldexp(1.0, std::max(-149, std::ilogb(std::fabs(x)) - 23)); }

template <class F, class G>
double worst_ulp(F f, G exact, double lo, double hi, int steps, double floor = 0) {
  double worst = 0;
  for (int i = 0; i <= steps; ++i) {
    const float x = static_cast<float>(lo + (hi - lo) * i / steps);
    float y[kLanes];
    f(VF::set(x)).store(y);
    const double want = exact(static_cast<double>(x));
    if (std::fabs(want) < 1.2e-38) continue;
    worst = std::fmax(worst, std::fabs(y[0] - want) / std::fmax(ulp(want), floor * std::fabs(want)));
  }
  return worst;
}

template <class F>
float at(F f, float x) {
  float y[kLanes];
  f(VF::set(x)).store(y);
  return y[0];
}

double softplus(double x) { return std::fmax(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }
double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

template <class F, class G>
void check(const char* name, F f, G exact, double lo, double hi, double limit, double floor = 0) {
  const double worst = worst_ulp(f, exact, lo, hi, 100000, floor);
  CHECK(worst <= limit, "%s on [%g, %g]: %.2f, limit %.2f", name, lo, hi, worst, limit);
}

}  // namespace
}  // namespace foldscan::FOLDSCAN_ISA

void run_vmath_tests() {
  using namespace foldscan::FOLDSCAN_ISA;
  check("vexp", FN(vexp), [](double x) { return std::exp(x); }, -87.3, 88.7, 2);
  check("vexp_neg", FN(vexp_neg), [](double x) { return std::exp(x); }, -87.3, 0, 2);
  check("vlog", FN(vlog), [](double x) { return std::log(x); }, 1e-30, 1e-3, 2);
  check("vlog", FN(vlog), [](double x) { return std::log(x); }, 0.5, 2, 2);
  check("vlog", FN(vlog), [](double x) { return std::log(x); }, 2, 1e30, 2);
  check("vlog1p01", FN(vlog1p01), [](double x) { return std::log1p(x); }, 0, 1, 2);
  check("vlog1p01", FN(vlog1p01), [](double x) { return std::log1p(x); }, 0, 1e-6, 2);
  check("vsoftplus", FN(vsoftplus), softplus, -87, 40, 3);
  check("vsoftplus", FN(vsoftplus), softplus, 40, 1e30, 3);
  check("vsigmoid", FN(vsigmoid), sigmoid, -87, 60, 4);
  check("vsigmoid for bf16", FN(vsigmoid_for<foldscan::bf16>), sigmoid, -80, 60, 1, 7e-6);
  check("vsigmoid for bf16 near 0", FN(vsigmoid_for<foldscan::bf16>), sigmoid, -2, 2, 1, 4e-6);
  check("vtanh", FN(vtanh), [](double x) { return std::tanh(x); }, -10, 10, 4);
  check("vtanh", FN(vtanh), [](double x) { return std::tanh(x); }, -1e-3, 1e-3, 4);
  check("verfc", FN(verfc), [](double x) { return std::erfc(x); }, -1, 1, 6);
  check("verfc", FN(verfc), [](double x) { return std::erfc(x); }, 1, 9.2, 1, 2e-5);

  CHECK(at(FN(vexp), -INFINITY) == 0 && at(FN(vexp), INFINITY) == INFINITY && std::isnan(at(FN(vexp), NAN)),
        "vexp limits");
  CHECK(at(FN(vexp_neg), 0) == 1 && at(FN(vexp_neg), -INFINITY) == 0, "vexp_neg limits");
  CHECK(at(FN(vlog), 0) == -INFINITY && at(FN(vlog), INFINITY) == INFINITY, "vlog limits");
  CHECK(std::fabs(at(FN(vsoftplus), -20) / softplus(-20) - 1) < 3e-7 && at(FN(vsoftplus), 30) == 30, "softplus tails");
  CHECK(at(FN(vsigmoid), -INFINITY) == 0 && at(FN(vsigmoid), INFINITY) == 1, "sigmoid limits");
}
