// The pool: every item once, nested loops, several sizes; scratch memory is reused and survives nesting.
#include <atomic>
#include <vector>

#include "check.h"
#include "core/parallel.h"

using namespace foldscan;

namespace {

void check_items(int threads, int64_t n, int64_t grain) {
  set_pool_threads(threads);
  std::vector<std::atomic<int>> seen(static_cast<size_t>(n));
  parallel_for(n, grain, [&](int64_t i) { seen[static_cast<size_t>(i)].fetch_add(1); });
  int wrong = 0;
  for (auto& s : seen) wrong += s.load() != 1;
  CHECK(wrong == 0, "%d threads, %ld items, grain %ld: %d items not run exactly once", threads, long(n), long(grain),
        wrong);
}

void check_nested() {
  set_pool_threads(3);
  std::atomic<int> total{0};
  parallel_for(7, 1, [&](int64_t) { parallel_for(5, 1, [&](int64_t) { total.fetch_add(1); }); });
  CHECK(total == 35, "%d inner items", total.load());
}

// What a thread asks for when it enters a loop happens once, on that thread, before the loop returns.
void check_exit() {
  for (int threads : {1, 3}) {
    set_pool_threads(threads);
    static std::atomic<int> asked, left;
    static thread_local int here;
    asked = left = 0;
    for (int round = 0; round < 3; ++round) {
      parallel_for(100, 1, [](int64_t) {
        if (here++ > 0) return;
        asked.fetch_add(1);
        on_loop_exit([] {
          here = 0;
          left.fetch_add(1);
        });
      });
      CHECK(asked > round && asked == left, "%d threads: %d asked, %d left", threads, asked.load(), left.load());
    }
    parallel_for(100, 1, [](int64_t) {});
    CHECK(asked == left, "%d threads: %d left later than they asked", threads, left.load());
  }
}

void check_scratch() {
  char* first;
  {
    Scratch outer;
    first = outer.get<char>(100);
    {
      Scratch inner;
      char* second = inner.get<char>(100);
      CHECK(second != first, "an inner scope got the outer scope's memory");
    }
    char* third = outer.get<char>(5 << 20);
    third[(5 << 20) - 1] = 1;
    CHECK(reinterpret_cast<uintptr_t>(third) % 64 == 0, "scratch is not aligned");
  }
  Scratch again;
  char* a = again.get<char>(3 << 20);
  char* b = again.get<char>(2 << 20);
  CHECK(b == a + (3 << 20), "after growing, scratch should be one block");
}

}  // namespace

int main() {
  for (int threads : {1, 2, 5})
    for (int64_t n : {0, 1, 2, 1000})
      for (int64_t grain : {1, 3, 5000}) check_items(threads, n, grain);
  for (int i = 0; i < 2000; ++i) check_items(2, 8, 1);
  check_nested();
  check_exit();
  check_scratch();
  std::printf("%d passed, %d failed\n", test::passed, test::failed);
  return test::failed == 0 ? 0 : 1;
}
