// The pool of large blocks: alignment, reuse, the limit, threads.
#include "core/memory.h"

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "check.h"

using namespace foldscan;

int main() {
  setenv("FOLDSCAN_KEEP_MB", "64", 1);
  CHECK(block_limit() == int64_t{64} << 20, "limit from the environment");
  constexpr int64_t kMiB = int64_t{1} << 20;

  char* a = static_cast<char*>(take_block(10 * kMiB + 1));
  CHECK(reinterpret_cast<uintptr_t>(a) % (2 * kMiB) == 0, "alignment");
  std::memset(a, 1, 10 * kMiB + 1);
  void* b = take_block(10 * kMiB);
  CHECK(b != a, "a block in use is not given twice");
  give_block(a);
  CHECK(take_block(9 * kMiB + 5) == a, "a block that fits is used again");
  give_block(a);
  void* small = take_block(4 * kMiB);
  CHECK(small != a, "a block more than a quarter too large is not");
  give_block(small);
  give_block(b);

  // 12 + 10 + 4 MiB are kept; 50 more go beyond the limit, and the oldest leave.
  void* large = take_block(50 * kMiB);
  give_block(large);
  CHECK(take_block(50 * kMiB) == large, "the newest block is kept");
  give_block(large);
  give_block(take_block(100 * kMiB));  // never kept: larger than the limit

  std::atomic<int> shared{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([t, &shared] {
      for (int i = 0; i < 50; ++i) {
        const int64_t size = (4 + (t + i) % 5 * 3) * kMiB;
        char* p = static_cast<char*>(take_block(size));
        for (int64_t at = 0; at < size; at += 1 << 16) p[at] = static_cast<char>(t);
        for (int64_t at = 0; at < size; at += 1 << 16) shared += p[at] != static_cast<char>(t);
        give_block(p);
      }
    });
  for (auto& thread : threads) thread.join();
  CHECK(shared == 0, "two threads got one block");
  std::printf("%d passed, %d failed\n", test::passed, test::failed);
  return test::failed == 0 ? 0 : 1;
}
