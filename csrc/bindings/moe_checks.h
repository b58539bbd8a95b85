// What the bindings of both halves of the Mixture of Experts check.
#pragma once

#include "bindings/common.h"

namespace foldscan::bindings {

inline void check_dense(const Tensor& t, int64_t dims) {
  check(t.dim() == dims && t.is_contiguous(), "moe: an argument has the wrong dimensions or is not contiguous");
}

inline void check_experts(const int64_t* experts, int64_t n, int64_t E) {
  for (int64_t i = 0; i < n; ++i) check(experts[i] >= -1 && experts[i] < E, "experts: an index is out of range");
}

}  // namespace foldscan::bindings
