// Vector elementary functions on VF, and some on VW (four in step), V being either. Errors are in units in the last
// place (ulp) of fp32, measured against fp64 over the stated range by tests/cpp/test_vmath.cpp, which fails when one is
// exceeded.
//
//   vexp        2 ulp on [-87.3, 88.7]; 0 below (also for -inf), +inf above; NaN stays NaN
//   vexp_neg    the same for x <= 0 only, without the overflow branch: exact 1 at 0, exact 0 at -inf
//   vlog        2 ulp on normal positives; log(0) = -inf
//   vlog1p01    2 ulp on [0, 1]
//   vsoftplus   3 ulp everywhere in [-87, 1e30]: no log(1 + exp(x)), which loses everything below x = -16
//   vsigmoid    4 ulp on [-87, 1e30]
//   vsigmoid_for, vsilu_for, vsilu_grad_for   for a result of type T: as above in fp32; for bf16 a relative error of
//               7e-6 (half a unit of bf16 is 2e-3), at half the price
//   vtanh       4 ulp
//   verfc       relative error 2e-5 down to the underflow at x = 9.3, 6 ulp on [-1, 1]
#pragma once

#include "core/wide.h"

namespace foldscan::FOLDSCAN_ISA {

// exp(r) for |r| <= ln(2)/2: the Taylor polynomial of degree 7, whose remainder is 5e-9.
template <class V>
FOLDSCAN_INLINE V exp_reduced(V r) {
  V p = V::set(1.0f / 5040);
  p = fma(p, r, V::set(1.0f / 720));
  p = fma(p, r, V::set(1.0f / 120));
  p = fma(p, r, V::set(1.0f / 24));
  p = fma(p, r, V::set(1.0f / 6));
  p = fma(p, r, V::set(0.5f));
  p = fma(p, r, V::set(1.0f));
  return fma(p, r, V::set(1.0f));
}

// x = n ln2 + r, with ln2 split in a 12-bit head (n * head is exact) and the rest.
template <class V>
FOLDSCAN_INLINE V exp_reduce(V x, V& n) {
  n = vround(x * V::set(1.44269504089f));
  const V r = fnma(n, V::set(0.693359375f), x);
  return fnma(n, V::set(-2.12194440e-4f), r);
}

constexpr float kExpMin = -87.3365448f;  // below, the result would be denormal
constexpr float kExpMax = 88.7228394f;

template <class V>
FOLDSCAN_INLINE V vexp_neg(V x) {
  V n;
  const V r = exp_reduce(vmax(V::set(kExpMin), x), n);
  const V y = exp_reduced(r).times_exp2(n);
  return select(x < V::set(kExpMin), V::zero(), y);
}

FOLDSCAN_INLINE VF vexp(VF x) {
  VF n;
  const VF r = exp_reduce(vmin(VF::set(kExpMax), vmax(VF::set(kExpMin), x)), n);
  // 2^128 does not exist: scale in two steps.
  const VF half = vround(n * VF::set(0.5f));
  VF y = exp_reduced(r) * half.exp2_int() * (n - half).exp2_int();
  y = select(VF::set(kExpMax) < x, VF::set(__builtin_inff()), y);
  return select(x < VF::set(kExpMin), VF::zero(), y);
}

// 2 atanh(s) / s - 2, for s^2 <= 1/9.
FOLDSCAN_INLINE VF atanh_series(VF s2) {
  VF p = VF::set(2.0f / 17);
  p = fma(p, s2, VF::set(2.0f / 15));
  p = fma(p, s2, VF::set(2.0f / 13));
  p = fma(p, s2, VF::set(2.0f / 11));
  p = fma(p, s2, VF::set(2.0f / 9));
  p = fma(p, s2, VF::set(2.0f / 7));
  p = fma(p, s2, VF::set(2.0f / 5));
  p = fma(p, s2, VF::set(2.0f / 3));
  return p * s2;
}

FOLDSCAN_INLINE VF vlog(VF x) {
  VF e = x.exponent();
  VF m = x.mantissa();
  const VM big = VF::set(1.41421356f) < m;
  m = select(big, m * VF::set(0.5f), m);
  e = select(big, e + VF::set(1.0f), e);
  const VF f = m - VF::set(1.0f);
  const VF s = f / (m + VF::set(1.0f));
  // 2s + s * series: 2s is written as f - s*f, which keeps the leading term exact.
  const VF series = atanh_series(s * s);
  VF y = f - s * (f - series);
  y = fma(e, VF::set(-2.12194440e-4f), y);
  y = fma(e, VF::set(0.693359375f), y);
  const VF inf = VF::set(__builtin_inff());
  y = select(x == inf, inf, y);
  return select(x == VF::zero(), -inf, y);
}

FOLDSCAN_INLINE VF vlog1p01(VF u) {
  const VF s = u / (u + VF::set(2.0f));
  return u - s * (u - atanh_series(s * s));
}

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|).
FOLDSCAN_INLINE VF vsoftplus(VF x) { return vmax(VF::zero(), x) + vlog1p01(vexp_neg(-vabs(x))); }

// 1 / (1 + e^-x) keeps its relative precision at both ends, for nothing cancels in 1 + e^-x; beyond 60 it is lost
// beside 1. The clamps let a NaN through.
template <class V>
FOLDSCAN_INLINE V vsigmoid(V x) {
  const V lowest = V::set(kExpMin), one = V::set(1.0f);
  V n;
  const V r = exp_reduce(-vmin(V::set(60.0f), vmax(lowest, x)), n);
  return select(x < lowest, V::zero(), one / (one + exp_reduced(r).times_exp2(n)));
}

template <class T, class V>
FOLDSCAN_INLINE V vsigmoid_for(V x) {
  if constexpr (sizeof(T) == 4) {
    return vsigmoid(x);
  } else {
    // 2^y with y = n + f: the polynomial is a fit to 2^f for |f| <= 1/2 by relative error, 2.6e-6.
    const V y = vmin(V::set(127.0f), vmax(V::set(-126.0f), x * V::set(-1.44269504089f)));
    const V n = vround(y), f = y - n;
    V p = V::set(0.0095701013f);
    p = fma(p, f, V::set(0.055917863f));
    p = fma(p, f, V::set(0.240247443f));
    p = fma(p, f, V::set(0.693121791f));
    p = fma(p, f, V::set(0.999999285f));
    return vreciprocal(V::set(1.0f) + p.times_exp2(n));
  }
}

template <class T, class V>
FOLDSCAN_INLINE V vsilu_for(V x) {
  return x * vsigmoid_for<T>(x);
}

// d silu / dx = sigmoid(x) (1 + x (1 - sigmoid(x))).
template <class T, class V>
FOLDSCAN_INLINE V vsilu_grad_for(V x) {
  const V s = vsigmoid_for<T>(x);
  return s * fma(x, V::set(1.0f) - s, V::set(1.0f));
}

template <class V>
FOLDSCAN_INLINE V vsilu(V x) {
  return vsilu_for<float>(x);
}
template <class V>
FOLDSCAN_INLINE V vsilu_grad(V x) {
  return vsilu_grad_for<float>(x);
}

// Below 0.6 a truncation of Lambert's continued fraction (error 1e-10 there), above it the exponential form.
FOLDSCAN_INLINE VF vtanh(VF x) {
  const VF a = vabs(x), x2 = x * x;
  VF num = x2 + VF::set(378.0f);
  num = fma(num, x2, VF::set(17325.0f));
  num = fma(num, x2, VF::set(135135.0f));
  VF den = fma(VF::set(28.0f), x2, VF::set(3150.0f));
  den = fma(den, x2, VF::set(62370.0f));
  den = fma(den, x2, VF::set(135135.0f));
  const VF small = x * (num / den);
  const VF e = vexp_neg(a * VF::set(-2.0f));
  const VF large = (VF::set(1.0f) - e) / (VF::set(1.0f) + e);
  return select(a < VF::set(0.6f), small, select(x < VF::zero(), -large, large));
}

// erfc(x) = e^{-x^2} t p(t) with t = 1 / (1 + x/2) for x >= 0: p is a Chebyshev fit of degree 10, error 2e-9.
FOLDSCAN_INLINE VF verfc(VF x) {
  const VF a = vabs(x);
  const VF t = VF::set(1.0f) / fma(a, VF::set(0.5f), VF::set(1.0f));
  VF p = VF::set(0.0323986522f);
  p = fma(p, t, VF::set(-0.171628901f));
  p = fma(p, t, VF::set(0.332568661f));
  p = fma(p, t, VF::set(-0.218993285f));
  p = fma(p, t, VF::set(-0.086649442f));
  p = fma(p, t, VF::set(0.0745679474f));
  p = fma(p, t, VF::set(0.0390575179f));
  p = fma(p, t, VF::set(0.189795469f));
  p = fma(p, t, VF::set(0.244479109f));
  p = fma(p, t, VF::set(0.282318428f));
  p = fma(p, t, VF::set(0.282085846f));
  const VF y = p * t * vexp_neg(-(a * a));
  return select(x < VF::zero(), VF::set(2.0f) - y, y);
}

}  // namespace foldscan::FOLDSCAN_ISA
