// Parallel loops over independent items.
//
// Every item is computed by one thread and written to its own place, so results cannot depend on the number of threads;
// a kernel that reduces over items does so afterwards, in item order. The threads come from a settable backend: a small
// pool of our own by default, PyTorch's pool when the binding is loaded, so that two pools never fight for the cores.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace foldscan {

using RangeFn = void (*)(void* ctx, int64_t begin, int64_t end);

struct ParallelBackend {
  // Calls fn on disjoint ranges that cover [0, workers), each on its own thread where one is free.
  void (*run)(int64_t workers, RangeFn fn, void* ctx);
  int (*threads)();
};

void set_parallel_backend(ParallelBackend backend);
int num_threads();
// Size of the default pool (no effect once another backend is set). 0 means one per core.
void set_pool_threads(int n);

// Runs fn over [0, n) in runs of `grain` items taken dynamically by the threads.
void run_items(int64_t n, int64_t grain, RangeFn fn, void* ctx);

// f(i) for each i in [0, n). `grain`: how many items are worth a hand-over between threads (about 10^4 FLOPs or more);
// n <= grain runs on the calling thread.
template <class F>
FOLDSCAN_INLINE void parallel_for(int64_t n, int64_t grain, const F& f) {
  run_items(
      n, grain,
      [](void* ctx, int64_t begin, int64_t end) {
        const F& body = *static_cast<const F*>(ctx);
        for (int64_t i = begin; i < end; ++i) body(i);
      },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// f runs once, on this thread, when it leaves the loop that it is in: for hardware state of a thread that a kernel sets
// up and nobody else may find there. Outside of loops it waits for the end of the next one.
void on_loop_exit(void (*f)());

// Grain such that a run of items costs about 32k elementary operations.
FOLDSCAN_INLINE int64_t grain_for(int64_t cost_per_item) { return imax(1, 32768 / imax(1, cost_per_item)); }

// Thread-local bump allocator for kernel scratch. Memory obtained from a Scratch lives until that Scratch is destroyed
// and is reused by the next one on the same thread (up to 64 MiB are kept); 64-byte aligned, contents undefined.
class Scratch {
 public:
  Scratch();
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* bytes(int64_t n);
  template <class T>
  FOLDSCAN_INLINE T* get(int64_t n) {
    return static_cast<T*>(bytes(n * static_cast<int64_t>(sizeof(T))));
  }

 private:
  int64_t block_;
  int64_t used_;
};

}  // namespace foldscan
