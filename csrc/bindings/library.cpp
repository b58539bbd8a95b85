// The operator library: nothing but its load-time set-up. Each family's file registers its own schemas and kernels.
#include "bindings/common.h"
#include "core/parallel.h"

namespace {

// PyTorch's pool runs our loops, so that one process never has two.
const bool kUseTorchThreads = [] {
  foldscan::set_parallel_backend({[](int64_t workers, foldscan::RangeFn fn, void* ctx) {
                                    torch::stable::parallel_for(
                                        0, workers, 1, [&](int64_t begin, int64_t end) { fn(ctx, begin, end); });
                                  },
                                  [] { return static_cast<int>(torch::stable::get_num_threads()); }});
  return true;
}();

}  // namespace
