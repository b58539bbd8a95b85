#include "core/parallel.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "core/memory.h"

namespace foldscan {
namespace {

// Workers sleep on a condition variable between loops; a loop publishes one job and waits until every worker is done.
class Pool {
 public:
  ~Pool() { stop(); }

  int size() {
    if (wanted_ == 0) {
      const char* env = std::getenv("FOLDSCAN_NUM_THREADS");
      const int n = env ? std::atoi(env) : static_cast<int>(std::thread::hardware_concurrency());
      wanted_ = n > 0 ? n : 1;
    }
    return wanted_;
  }

  void resize(int n) {
    std::lock_guard<std::mutex> run(run_mutex_);
    stop();
    wanted_ = n;
  }

  void run(int64_t workers, RangeFn fn, void* ctx) {
    std::unique_lock<std::mutex> run(run_mutex_, std::try_to_lock);
    // A nested or concurrent loop does its work on the calling thread.
    if (!run.owns_lock() || workers <= 1) return fn(ctx, 0, workers);
    start();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      fn_ = fn;
      ctx_ = ctx;
      next_ = 1;
      last_ = workers;
      pending_ = static_cast<int64_t>(threads_.size());
      ++generation_;
    }
    wake_.notify_all();
    fn(ctx, 0, 1);
    drain();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
  }

 private:
  void start() {
    if (!threads_.empty()) return;
    stopping_ = false;
    for (int i = 1; i < size(); ++i) {
      threads_.emplace_back([this, seen = generation_]() mutable {
        for (;;) {
          {
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return stopping_ || generation_ != seen; });
            if (stopping_) return;
            seen = generation_;
          }
          drain();
          std::lock_guard<std::mutex> lock(mutex_);
          if (--pending_ == 0) done_.notify_one();
        }
      });
    }
  }

  void drain() {
    for (;;) {
      const int64_t i = next_.fetch_add(1);
      if (i >= last_) return;
      fn_(ctx_, i, i + 1);
    }
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (auto& t : threads_) t.join();
    threads_.clear();
  }

  std::mutex run_mutex_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  std::atomic<int64_t> next_{0};
  int64_t last_ = 0, pending_ = 0, generation_ = 0;
  RangeFn fn_ = nullptr;
  void* ctx_ = nullptr;
  int wanted_ = 0;
  bool stopping_ = false;
};

Pool& pool() {
  static Pool p;
  return p;
}

ParallelBackend g_backend{[](int64_t workers, RangeFn fn, void* ctx) { pool().run(workers, fn, ctx); },
                          [] { return pool().size(); }};

thread_local void (*t_on_exit)() = nullptr;

void leave_loop() {
  if (!t_on_exit) return;
  t_on_exit();
  t_on_exit = nullptr;
}

struct Items {
  RangeFn fn;
  void* ctx;
  int64_t n, grain;
  std::atomic<int64_t> next{0};
};

void take_items(void* ctx, int64_t, int64_t) {
  Items& items = *static_cast<Items*>(ctx);
  for (;;) {
    const int64_t begin = items.next.fetch_add(items.grain);
    if (begin >= items.n) return leave_loop();
    items.fn(items.ctx, begin, imin(begin + items.grain, items.n));
  }
}

constexpr int64_t kAlign = 64;
constexpr int64_t kFirstBlock = int64_t{1} << 20;
constexpr int64_t kKeep = int64_t{64} << 20;  // scratch that a thread holds on to between kernels

struct Arena {
  struct Block {
    char* data;
    int64_t size;
  };
  std::vector<Block> blocks;
  int64_t block = 0, used = 0, depth = 0;

  ~Arena() { free_all(); }
  void free_all() {
    for (auto& b : blocks) ::operator delete(b.data, std::align_val_t{kAlign});
    blocks.clear();
  }
  void add(int64_t size) {
    blocks.push_back({static_cast<char*>(::operator new(static_cast<size_t>(size), std::align_val_t{kAlign})), size});
    advise_large_pages(blocks.back().data, size);
  }
};

Arena& arena() {
  thread_local Arena a;
  return a;
}

}  // namespace

void set_parallel_backend(ParallelBackend backend) { g_backend = backend; }
int num_threads() { return g_backend.threads(); }
void on_loop_exit(void (*f)()) { t_on_exit = f; }
void set_pool_threads(int n) { pool().resize(n); }

void run_items(int64_t n, int64_t grain, RangeFn fn, void* ctx) {
  if (n <= 0) return;
  grain = imax(1, grain);
  const int64_t workers = imin(num_threads(), ceil_div(n, grain));
  if (workers <= 1) {
    fn(ctx, 0, n);
    return leave_loop();
  }
  Items items{fn, ctx, n, grain};
  g_backend.run(workers, take_items, &items);
}

Scratch::Scratch() : block_(arena().block), used_(arena().used) { ++arena().depth; }

Scratch::~Scratch() {
  Arena& a = arena();
  a.block = block_;
  a.used = used_;
  // The outermost scope merges what it grew into one block, so that the next kernel finds contiguous memory; what only
  // an unusually large problem needed goes back to the system.
  if (--a.depth > 0) return;
  int64_t total = 0;
  for (auto& b : a.blocks) total += b.size;
  if (a.blocks.size() <= 1 && total <= kKeep) return;
  a.free_all();
  if (total <= kKeep) a.add(total);
  a.block = a.used = 0;
}

void* Scratch::bytes(int64_t n) {
  Arena& a = arena();
  n = round_up(imax(n, 1), kAlign);
  while (a.block < static_cast<int64_t>(a.blocks.size()) && a.used + n > a.blocks[a.block].size) {
    ++a.block;
    a.used = 0;
  }
  if (a.block == static_cast<int64_t>(a.blocks.size())) a.add(imax(n, kFirstBlock));
  void* p = a.blocks[a.block].data + a.used;
  a.used += n;
  return p;
}

}  // namespace foldscan
