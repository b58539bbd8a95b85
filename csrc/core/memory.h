// Memory of large tensors and scratch: large pages, and blocks that are used again.
//
// The first touch of a fresh 4 KiB page costs a fault of about a microsecond, 4 GB/s for a thread, several times what
// writing the page costs; malloc gives blocks beyond 32 MiB back to the system at once and so pays for every one of
// them. A kernel that is bound by bandwidth would spend most of its time there.
#pragma once

#include <cstdint>

namespace foldscan {

// Asks the system to back fresh memory with 2 MiB pages: 512 times fewer faults. Only whole large pages inside the
// range are advised, so no memory is added. Does nothing for small ranges and on systems without such advice.
void advise_large_pages(void* data, int64_t bytes);

// Blocks at least this large come from the pool below; malloc serves smaller ones well.
constexpr int64_t kPooledBytes = int64_t{4} << 20;

// A block of at least `bytes`, uninitialised, aligned to 2 MiB: one that was given back, or fresh memory on large
// pages. Throws std::bad_alloc. Thread-safe.
void* take_block(int64_t bytes);

// Keeps a block of take_block for later, and the oldest ones go back to the system once more than the limit is kept.
void give_block(void* block);

// Bytes that the pool may keep: $FOLDSCAN_KEEP_MB MiB, 512 without it; 0 keeps nothing.
int64_t block_limit();

}  // namespace foldscan
