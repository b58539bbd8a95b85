// The SIMD layer: one vector of floats (VF), one vector of bf16 pairs (VP), masks (VM), and what kernels do with them.
//
// A kernel is written once against these names, in namespace foldscan::FOLDSCAN_ISA, and compiled once per instruction
// set. Fused multiply-adds are explicit (fma) and contraction is off, so that the order and the rounding of a sum are
// what the source says in every specialisation of a template; bits may differ between instruction sets, never within
// one.
//
//   VF::load(p) / load(p, n)      kLanes floats (or bf16, widened) / the first n, rest zero; store likewise
//   fma(a, b, c)                  a * b + c
//   dot2(acc, a, b)               acc + a.lo * b.lo + a.hi * b.hi per lane of bf16 pairs, fp32 accumulation
//   VP::narrow(a, b) / zip(a, b)  rounded to bf16: all of a, then all of b / pairs (a[i], b[i])
//   vreciprocal(a)                1 / a within 2 ulp, for normal a and 1 / a
//   select(m, a, b)               m ? a : b
//   transpose(r)                  kLanes x kLanes transpose in registers
//   VC::load(p, shift).in(set)    codes of four bits, (p[i] >> shift) & 15: which are in the set, a mask of 16 bits
#pragma once

#include "core/types.h"

#ifndef FOLDSCAN_ISA
#error "compile kernel files with FOLDSCAN_ISA set to the namespace of the instruction set"
#endif

#if defined(__AVX512F__)
#include "core/simd_avx512.h"
#elif defined(__AVX2__)
#include "core/simd_avx2.h"
#else
#include "core/simd_portable.h"
#endif

namespace foldscan::FOLDSCAN_ISA {

// Any n >= 0: lanes beyond n are zero / untouched, n >= kLanes is a full vector.
template <class T>
FOLDSCAN_INLINE VF load_upto(const T* p, int64_t n) {
  return n >= kLanes ? VF::load(p) : VF::load(p, static_cast<int>(imax(n, 0)));
}
template <class T>
FOLDSCAN_INLINE void store_upto(VF v, T* p, int64_t n) {
  if (n >= kLanes) {
    v.store(p);
  } else if (n > 0) {
    v.store(p, static_cast<int>(n));
  }
}

}  // namespace foldscan::FOLDSCAN_ISA
