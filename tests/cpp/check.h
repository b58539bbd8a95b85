// The few lines that the C++ tests need of a test framework: CHECK counts, prints where it failed, and goes on.
#pragma once

#include <cstdio>

namespace foldscan::test {

inline int passed = 0, failed = 0;

}  // namespace foldscan::test

#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (condition) {                                              \
      ++foldscan::test::passed;                                   \
    } else {                                                      \
      ++foldscan::test::failed;                                   \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
    }                                                             \
  } while (0)

// Defined once per instruction set by the isa_*.cpp files.
void run_gemm_tests();
void run_tile_tests();
void emulate_tiles();
void run_vmath_tests();
