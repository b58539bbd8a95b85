// Large buffers on large pages.
#pragma once

#include <cstdint>

namespace foldscan {

// Asks the system to back fresh memory with 2 MiB pages. The first touch of a 4 KiB page costs a fault of about a
// microsecond, 4 GB/s for a thread, which is several times what writing the page costs; a fresh output of tens of MiB
// would spend most of a bandwidth-bound kernel's time there. Only whole large pages inside the range are advised, so no
// memory is added. Does nothing for small ranges and on systems without such advice.
void advise_large_pages(void* data, int64_t bytes);

}  // namespace foldscan
