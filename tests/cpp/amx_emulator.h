// The instructions of AMX on a CPU without them: each one traps (SIGILL), is decoded and done by the software unit of
// core/tile_unit.h. So the machine code of the copy avx512_amx runs wherever AVX-512 BF16 does; what stays unproven is
// that the hardware computes as documented.
#pragma once

#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstring>

#include "core/tile_unit.h"

namespace foldscan::FOLDSCAN_ISA {

// Registers of the trapped code by their numbers in instructions.
inline long long& trapped_register(ucontext_t& context, int number) {
  constexpr int kOrder[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                            REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return context.uc_mcontext.gregs[kOrder[number]];
}

[[noreturn]] inline void not_emulated() {
  constexpr char kText[] = "an instruction that is not of AMX, or addressed in a way that is not emulated\n";
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, kText, sizeof(kText) - 1);
  _exit(1);
}

inline void emulate_instruction(int, siginfo_t*, void* trapped) {
  ucontext_t& context = *static_cast<ucontext_t*>(trapped);
  const auto* code = reinterpret_cast<const unsigned char*>(context.uc_mcontext.gregs[REG_RIP]);
  // VEX, three bytes: C4, then R X B (inverted) and the map, W vvvv (inverted) L and the prefix; opcode; ModRM.
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0) not_emulated();
  const int x = ~code[1] >> 3 & 8, b = ~code[1] >> 2 & 8, second = ~code[2] >> 3 & 15, prefix = code[2] & 3;
  const int opcode = code[3], mod = code[4] >> 6, reg = code[4] >> 3 & 7, rm = code[4] & 7;
  const unsigned char* next = code + 5;
  char* address = nullptr;
  long long index = 0;
  if (mod != 3) {
    int base = rm;
    if (rm == 4) {
      const int sib = *next++, number = (sib >> 3 & 7) | x;
      base = sib & 7;
      if (number != 4) index = trapped_register(context, number) << (sib >> 6);
    }
    if (mod == 0 && base == 5) not_emulated();
    int32_t displacement = 0;
    if (mod == 1) displacement = static_cast<signed char>(*next++);
    if (mod == 2) {
      std::memcpy(&displacement, next, 4);
      next += 4;
    }
    address = reinterpret_cast<char*>(trapped_register(context, base | b)) + displacement;
  }
  constexpr int kNone = 0, kF3 = 2, kF2 = 3;  // prefixes
  if (opcode == 0x49 && prefix == kNone && mod != 3) {
    SoftwareTiles::configure(*reinterpret_cast<const TileConfig*>(address + index));
  } else if (opcode == 0x49 && prefix == kNone) {
    SoftwareTiles::release();
  } else if (opcode == 0x49 && prefix == kF2 && mod == 3) {
    SoftwareTiles::zero(reg);
  } else if (opcode == 0x4b && prefix == kF2 && mod != 3) {
    SoftwareTiles::load(reg, address, index);
  } else if (opcode == 0x4b && prefix == kF3 && mod != 3) {
    SoftwareTiles::store(reg, address, index);
  } else if (opcode == 0x5c && prefix == kF3 && mod == 3) {
    SoftwareTiles::dot(reg, rm, second);
  } else {
    not_emulated();
  }
  context.uc_mcontext.gregs[REG_RIP] = reinterpret_cast<long long>(next);
}

inline void install_amx_emulator() {
  struct sigaction action{};
  action.sa_sigaction = emulate_instruction;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace foldscan::FOLDSCAN_ISA
