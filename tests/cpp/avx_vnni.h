// AVX-VNNI on CPUs that lack it: a signal handler carries out the one instruction of it that kernels use.
#pragma once
#if defined(__x86_64__) && defined(__linux__)
#include <ucontext.h>

#include <csignal>
#include <cstdint>
#include <cstring>

namespace awq::test {

/// While one lives, VPDPBUSD with 256-bit operands in VEX encoding does what Intel's manual says, wherever it faults.
/// Other instructions that the CPU does not know end the process, as ever.
class AvxVnni {
 public:
  AvxVnni() {
    struct sigaction action {};
    action.sa_sigaction = &AvxVnni::illegal;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, &before_);
  }
  ~AvxVnni() { sigaction(SIGILL, &before_, nullptr); }
  AvxVnni(const AvxVnni&) = delete;
  AvxVnni& operator=(const AvxVnni&) = delete;

 private:
  // The state of the signal frame (XSAVE, standard format): lower halves of the registers, which parts are valid, upper
  // halves. Intel SDM volume 1, 13.4.
  static constexpr int kLower = 160, kValid = 512, kUpper = 576, kMagicAt = 464;
  static constexpr std::uint32_t kMagic = 0x46505853;
  static constexpr std::uint64_t kUpperValid = 4;

  static void illegal(int, siginfo_t*, void* context) {
    auto& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
    auto* const state = reinterpret_cast<std::uint8_t*>(machine.fpregs);
    const auto* at = reinterpret_cast<const std::uint8_t*>(machine.gregs[REG_RIP]);
    std::uint32_t magic;
    std::memcpy(&magic, state + kMagicAt, sizeof magic);
    // C4, [~R ~X ~B 00010], [0 ~vvvv 1 01], 50, ModRM: VEX.256.66.0F38.W0 50 /r. Intel SDM volume 2, VPDPBUSD.
    if (magic != kMagic || at[0] != 0xc4 || (at[1] & 0x1f) != 2 || (at[2] & 0x87) != 5 || at[3] != 0x50) {
      signal(SIGILL, SIG_DFL);  // the instruction is tried again, and ends the process
      return;
    }
    std::uint64_t valid;
    std::memcpy(&valid, state + kValid, sizeof valid);
    if ((valid & kUpperValid) == 0) std::memset(state + kUpper, 0, std::size_t{16} * 16);
    valid |= kUpperValid;
    std::memcpy(state + kValid, &valid, sizeof valid);

    const int modrm = at[4], target = (modrm >> 3 & 7) | (at[1] & 0x80 ? 0 : 8), first = ~at[2] >> 3 & 15;
    const std::uint8_t* next = at + 5;
    std::int8_t x[32];
    if (modrm >> 6 == 3) {
      read(state, (modrm & 7) | (at[1] & 0x20 ? 0 : 8), x);
    } else {
      std::memcpy(x, address(machine, at[1], modrm, next), sizeof x);
    }
    std::uint8_t codes[32];
    std::int32_t sum[8];
    read(state, first, codes);
    read(state, target, sum);
    for (int i = 0; i < 32; ++i) sum[i / 4] += codes[i] * x[i];
    std::memcpy(state + kLower + 16 * target, sum, 16);
    std::memcpy(state + kUpper + 16 * target, sum + 4, 16);
    machine.gregs[REG_RIP] = reinterpret_cast<greg_t>(next);
  }

  static void read(const std::uint8_t* state, int i, void* bytes) {
    std::memcpy(bytes, state + kLower + 16 * i, 16);
    std::memcpy(static_cast<std::uint8_t*>(bytes) + 16, state + kUpper + 16 * i, 16);
  }

  /// Of a memory operand, whose bytes begin at `next`; next is then behind the instruction, which ends with it.
  static const void* address(const mcontext_t& machine, int vex, int modrm, const std::uint8_t*& next) {
    constexpr int kOrder[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    const auto reg = [&](int i) { return machine.gregs[kOrder[i]]; };
    const int mode = modrm >> 6, high = vex & 0x20 ? 0 : 8;
    int base = modrm & 7;
    greg_t sum = 0;
    bool has_base = true, relative = false;
    if (base == 4) {
      const int sib = *next++, index = (sib >> 3 & 7) | (vex & 0x40 ? 0 : 8);
      base = sib & 7;
      has_base = base != 5 || mode != 0;
      if (index != 4) sum += reg(index) << (sib >> 6);
    } else if (base == 5 && mode == 0) {
      has_base = false, relative = true;
    }
    if (has_base) sum += reg(base | high);
    if (mode == 1) {
      sum += static_cast<std::int8_t>(*next++);
    } else if (mode == 2 || !has_base) {
      std::int32_t displacement;
      std::memcpy(&displacement, next, sizeof displacement);
      next += sizeof displacement;
      sum += displacement;
    }
    if (relative) sum += reinterpret_cast<greg_t>(next);
    return reinterpret_cast<const void*>(sum);
  }

  struct sigaction before_ {};
};

}  // namespace awq::test
#endif
