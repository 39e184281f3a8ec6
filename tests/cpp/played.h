// Instructions on CPUs that lack them: a signal handler carries out those of AVX-VNNI and AMX that kernels use.
#pragma once
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <ucontext.h>

#include <csignal>
#include <cstdint>
#include <cstring>

#include "core/cpu.h"

namespace awq::test {

/// While one lives, these do what Intel's manual (SDM volume 2) says, if the CPU does not know them:
/// VPDPBUSD with 256-bit operands in VEX encoding; LDTILECFG, TILERELEASE, TILEZERO, TILELOADD, TILESTORED, TDPBSUD.
/// What the manual forbids of shapes, and any other unknown instruction, ends the process, as on a CPU.
class Played {
 public:
  Played() {
    struct sigaction action {};
    action.sa_sigaction = &Played::illegal;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, &before_);
  }
  ~Played() { sigaction(SIGILL, &before_, nullptr); }
  /// Whether what uses tiles can be run here, played or not: a CPU that has tiles, but may not use them, would shape
  /// its own.
  static bool can_have_tiles(const core::CpuFeatures& features) {
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool has = __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & 1u << 24) != 0;
    return features.avx512_bf16 && (features.amx_int8 || !has);
  }

  Played(const Played&) = delete;
  Played& operator=(const Played&) = delete;

 private:
  /// An instruction in VEX encoding of the map 0F38, all of which have W0 and no immediate byte:
  /// C4, [~R ~X ~B 00010], [0 ~vvvv L pp], opcode, ModRM, what addresses need.
  struct Instruction {
    bool known = false;
    int opcode = 0, wide = 0, prefix = 0;          // prefix: 0 none, 1 66, 2 F3, 3 F2
    int reg = 0, first = 0, rm = 0;                // registers in ModRM.reg, VEX.vvvv, ModRM.rm
    bool memory = false;                           // instead of rm
    std::uint8_t *base = nullptr, *end = nullptr;  // of the operand, without its index; behind the instruction
    std::int64_t index = 0;                        // scaled

    Instruction(const mcontext_t& machine) {
      auto* at = reinterpret_cast<std::uint8_t*>(machine.gregs[REG_RIP]);
      if (at[0] != 0xc4 || (at[1] & 0x1f) != 2 || (at[2] & 0x80) != 0) return;
      known = true;
      const int vex = at[1], modrm = at[4];
      opcode = at[3], wide = at[2] >> 2 & 1, prefix = at[2] & 3, first = ~at[2] >> 3 & 15;
      reg = (modrm >> 3 & 7) | (vex & 0x80 ? 0 : 8), rm = (modrm & 7) | (vex & 0x20 ? 0 : 8);
      memory = modrm >> 6 != 3;
      end = at + 5;
      if (memory) address(machine, vex, modrm);
    }

    /// SDM volume 2, 2.1.5.
    void address(const mcontext_t& machine, int vex, int modrm) {
      constexpr int kOrder[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
      const auto value = [&](int i) { return machine.gregs[kOrder[i]]; };
      const int mode = modrm >> 6, high = vex & 0x20 ? 0 : 8;
      int low = modrm & 7;
      greg_t sum = 0;
      bool has_base = true, relative = false;
      if (low == 4) {
        const int sib = *end++, i = (sib >> 3 & 7) | (vex & 0x40 ? 0 : 8);
        low = sib & 7;
        has_base = low != 5 || mode != 0;
        if (i != 4) index = value(i) * (std::int64_t{1} << (sib >> 6));
      } else if (low == 5 && mode == 0) {
        has_base = false, relative = true;
      }
      if (has_base) sum += value(low | high);
      if (mode == 1) {
        sum += static_cast<std::int8_t>(*end++);
      } else if (mode == 2 || !has_base) {
        std::int32_t displacement;
        std::memcpy(&displacement, end, sizeof displacement);
        end += sizeof displacement;
        sum += displacement;
      }
      if (relative) sum += reinterpret_cast<greg_t>(end);
      base = reinterpret_cast<std::uint8_t*>(sum);
    }
  };

  static void illegal(int, siginfo_t*, void* context) {
    auto& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
    const Instruction i(machine);
    if (!i.known || !(i.wide != 0 ? vnni(i, reinterpret_cast<std::uint8_t*>(machine.fpregs)) : amx(i))) {
      signal(SIGILL, SIG_DFL);  // the instruction is tried again, and ends the process
      return;
    }
    machine.gregs[REG_RIP] = reinterpret_cast<greg_t>(i.end);
  }

  // --- AVX-VNNI -----------------------------------------------------------------------------------------------------

  // The state of the signal frame (XSAVE, standard format): lower halves of the registers, which parts are valid, upper
  // halves. Intel SDM volume 1, 13.4.
  static constexpr int kLower = 160, kValid = 512, kUpper = 576, kMagicAt = 464;
  static constexpr std::uint32_t kMagic = 0x46505853;
  static constexpr std::uint64_t kUpperValid = 4;

  static bool vnni(const Instruction& i, std::uint8_t* state) {
    std::uint32_t magic;
    std::memcpy(&magic, state + kMagicAt, sizeof magic);
    if (magic != kMagic || i.opcode != 0x50 || i.prefix != 1) return false;
    std::uint64_t valid;
    std::memcpy(&valid, state + kValid, sizeof valid);
    if ((valid & kUpperValid) == 0) std::memset(state + kUpper, 0, std::size_t{16} * 16);
    valid |= kUpperValid;
    std::memcpy(state + kValid, &valid, sizeof valid);
    std::int8_t x[32];
    std::uint8_t codes[32];
    std::int32_t sum[8];
    if (i.memory)
      std::memcpy(x, i.base + i.index, sizeof x);
    else
      read(state, i.rm, x);
    read(state, i.first, codes);
    read(state, i.reg, sum);
    for (int at = 0; at < 32; ++at) sum[at / 4] += codes[at] * x[at];
    std::memcpy(state + kLower + 16 * i.reg, sum, 16);
    std::memcpy(state + kUpper + 16 * i.reg, sum + 4, 16);
    return true;
  }

  static void read(const std::uint8_t* state, int i, void* bytes) {
    std::memcpy(bytes, state + kLower + 16 * i, 16);
    std::memcpy(static_cast<std::uint8_t*>(bytes) + 16, state + kUpper + 16 * i, 16);
  }

  // --- AMX ----------------------------------------------------------------------------------------------------------

  struct Tile {
    int rows, row_bytes;  // 0 without a shape
    std::uint8_t bytes[16][64];
  };
  struct Tiles {
    Tile tile[8];
  };
  static Tiles& tiles() {
    static thread_local Tiles of_thread{};
    return of_thread;
  }

  static bool amx(const Instruction& i) {
    Tile* const tile = tiles().tile;
    if (i.opcode == 0x49 && i.prefix == 0 && i.memory && i.reg == 0) return shape(i.base + i.index);
    if (i.opcode == 0x49 && i.prefix == 0 && !i.memory && i.reg == 0 && i.rm == 0) {  // TILERELEASE
      tiles() = {};
      return true;
    }
    if (i.reg > 7 || tile[i.reg].rows == 0) return false;
    Tile& target = tile[i.reg];
    if (i.opcode == 0x49 && i.prefix == 3 && !i.memory && i.rm == 0) {  // TILEZERO
      std::memset(target.bytes, 0, sizeof target.bytes);
      return true;
    }
    if (i.opcode == 0x4b && i.memory && (i.prefix == 3 || i.prefix == 2)) {  // TILELOADD, TILESTORED
      if (i.prefix == 3) std::memset(target.bytes, 0, sizeof target.bytes);
      for (int row = 0; row < target.rows; ++row) {
        std::uint8_t* const memory = i.base + row * i.index;
        if (i.prefix == 3)
          std::memcpy(target.bytes[row], memory, static_cast<std::size_t>(target.row_bytes));
        else
          std::memcpy(memory, target.bytes[row], static_cast<std::size_t>(target.row_bytes));
      }
      return true;
    }
    if (i.opcode == 0x5e && i.prefix == 2 && !i.memory && i.rm < 8 && i.first < 8)
      return multiply(target, tile[i.rm], tile[i.first]);
    return false;
  }

  /// LDTILECFG
  static bool shape(const std::uint8_t* from) {
    tiles() = {};
    if (from[0] != 1) return false;
    for (int at = 1; at < 16; ++at)
      if (from[at] != 0) return false;
    for (int i = 0; i < 16; ++i) {
      std::uint16_t row_bytes;
      std::memcpy(&row_bytes, from + 16 + 2 * i, sizeof row_bytes);
      const int rows = from[48 + i];
      if (rows > 16 || row_bytes > 64 || (rows == 0) != (row_bytes == 0) || (i > 7 && rows > 0)) return false;
      if (i < 8) tiles().tile[i] = {rows, row_bytes, {}};
    }
    return true;
  }

  /// TDPBSUD: sums [m][n] += x [m][k] of signed bytes times codes [k / 4][n][4] of unsigned ones.
  static bool multiply(Tile& sums, const Tile& x, const Tile& codes) {
    if (&sums == &x || &sums == &codes || &x == &codes) return false;
    if (x.rows == 0 || x.rows != sums.rows || x.row_bytes != 4 * codes.rows || codes.row_bytes != sums.row_bytes ||
        x.row_bytes % 4 != 0 || sums.row_bytes % 4 != 0)
      return false;
    for (int m = 0; m < sums.rows; ++m)
      for (int n = 0; n < sums.row_bytes / 4; ++n) {
        std::int32_t sum;
        std::memcpy(&sum, sums.bytes[m] + 4 * n, sizeof sum);
        for (int k = 0; k < x.row_bytes; ++k)
          sum += static_cast<std::int8_t>(x.bytes[m][k]) * codes.bytes[k / 4][4 * n + k % 4];
        std::memcpy(sums.bytes[m] + 4 * n, &sum, sizeof sum);
      }
    return true;
  }

  struct sigaction before_ {};
};

}  // namespace awq::test
#endif
