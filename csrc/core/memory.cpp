#include "core/memory.h"

#include <cstdlib>
#include <deque>
#include <mutex>
#include <new>
#include <unordered_map>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace foldscan {
namespace {

constexpr int64_t kLargePage = int64_t{2} << 20;

#ifdef __linux__
// The mapping is cut to begin at a large page.
void* map_block(int64_t size) {
  const auto whole = static_cast<size_t>(size + kLargePage);
  void* p = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  char* const start = static_cast<char*>(p);
  const auto address = reinterpret_cast<uintptr_t>(p);
  const auto head = static_cast<size_t>((address + kLargePage - 1) / kLargePage * kLargePage - address);
  const size_t tail = whole - head - static_cast<size_t>(size);
  if (head) munmap(start, head);
  if (tail) munmap(start + head + size, tail);
  advise_large_pages(start + head, size);
  return start + head;
}
void unmap_block(void* p, int64_t size) { munmap(p, static_cast<size_t>(size)); }
#else
void* map_block(int64_t size) {
  return ::operator new(static_cast<size_t>(size), std::align_val_t{static_cast<size_t>(kLargePage)});
}
void unmap_block(void* p, int64_t) { ::operator delete(p, std::align_val_t{static_cast<size_t>(kLargePage)}); }
#endif

class BlockPool {
 public:
  void* take(int64_t bytes) {
    const int64_t size = (bytes + kLargePage - 1) / kLargePage * kLargePage;
    const std::lock_guard lock(mutex_);
    // The tightest fit that wastes at most a quarter.
    auto best = kept_.end();
    for (auto it = kept_.begin(); it != kept_.end(); ++it)
      if (it->size >= size && it->size <= size + size / 4 && (best == kept_.end() || it->size < best->size)) best = it;
    Block block{nullptr, size};
    if (best != kept_.end()) {
      block = *best;
      kept_bytes_ -= block.size;
      kept_.erase(best);
    } else {
      block.data = map_block(size);
    }
    taken_.emplace(block.data, block.size);
    return block.data;
  }

  void give(void* data) {
    const std::lock_guard lock(mutex_);
    const auto it = taken_.find(data);
    const Block block{data, it->second};
    taken_.erase(it);
    kept_.push_back(block);
    kept_bytes_ += block.size;
    while (kept_bytes_ > block_limit()) {
      unmap_block(kept_.front().data, kept_.front().size);
      kept_bytes_ -= kept_.front().size;
      kept_.pop_front();
    }
  }

 private:
  struct Block {
    void* data;
    int64_t size;
  };
  std::mutex mutex_;
  std::deque<Block> kept_;  // oldest first
  int64_t kept_bytes_ = 0;
  std::unordered_map<void*, int64_t> taken_;
};

// Never destroyed: tensors may die after static objects.
BlockPool& pool() {
  static auto* p = new BlockPool;
  return *p;
}

}  // namespace

void advise_large_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr auto kPage = static_cast<uintptr_t>(kLargePage);
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const auto end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kPage - 1);
  // Advice only: a kernel without large pages refuses it, and small pages do as well.
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

void* take_block(int64_t bytes) { return pool().take(bytes); }
void give_block(void* block) { pool().give(block); }

int64_t block_limit() {
  static const int64_t limit = [] {
    const char* mb = std::getenv("FOLDSCAN_KEEP_MB");
    const int64_t n = mb && *mb ? std::strtoll(mb, nullptr, 10) : 512;
    return (n < 0 ? 0 : n) << 20;
  }();
  return limit;
}

}  // namespace foldscan
