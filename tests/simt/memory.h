// Shared memory of a block, with what is known of each of its bytes.
#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "clock.h"

namespace simt {

/// A place in the source. As a default argument, current() is where the function was called. (std::source_location,
/// for compilers that lack it.)
struct Where {
  const char* file = "";
  int line = 0;

  static constexpr Where current(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

struct Thread;

/// Memory that was not written holds this: not a number in every type, and no small count.
inline constexpr unsigned char kPoison = 0xff;

struct Access {
  Epoch epoch;
  Where where;
};

/// What is known of some bytes that are always used together.
struct Cell {
  Access write;                // the last one; who 0: none yet
  std::vector<Access> reads;   // since then, one of each party
  std::uint32_t barriers = 0;  // how many sync_threads had passed at the last read
  std::uint32_t in_use = 0;    // warps whose wgmma still read here
  bool arriving = false;       // `write` is that of an asynchronous copy which has not been waited for
  bool asynchronous = false;   // `write` is that of a bulk copy: who knows it has waited for the copy's barrier
  bool barrier = false;        // part of an mbarrier
};

class SharedMemory {
 public:
  using Address = std::uint32_t;
  /// The window does not begin at 0, as it does not where the system keeps some for itself.
  static constexpr Address kStart = 1024;
  static constexpr Address kMost = 227 * 1024;

  void start(std::uint32_t bytes);
  unsigned char* data(Address a) { return bytes_.get() + (a - kStart); }

  /// Throws unless [a, a + bytes) is in the window and a is a multiple of `alignment`.
  void check(Address a, std::uint32_t bytes, std::uint32_t alignment, const char* what, Where where) const;

  /// visit(Cell&, Address) for the cells of [a, a + bytes). Sixteen bytes that nobody has used in pieces are one cell.
  template <class Visit>
  void cells(Address a, std::uint32_t bytes, Visit visit) {
    for (Address end = a + bytes; a < end;) {
      Unit& unit = units_[(a - kStart) / kUnit];
      const Address next = a / kUnit * kUnit + kUnit;
      if (unit.parts == nullptr && a % kUnit == 0 && next <= end) {
        visit(unit.whole, a);
        a = next;
        continue;
      }
      if (unit.parts == nullptr) split(unit);
      for (; a < next && a < end; a += kPart) visit((*unit.parts)[a % kUnit / kPart], a);
    }
  }
  /// Pieces that were written together need not be looked at one by one.
  void merge(Address a, std::uint32_t bytes) {
    for (Address end = a + bytes; a + kUnit <= end; a += kUnit)
      if (Unit& unit = units_[(a - kStart) / kUnit]; unit.parts != nullptr) {
        unit.whole = std::move((*unit.parts)[0]);
        unit.parts.reset();
      }
  }

  std::uint32_t barriers = 0;  // sync_threads of all threads so far

 private:
  static constexpr Address kUnit = 16, kPart = 2;
  struct Unit {
    Cell whole;
    std::unique_ptr<std::array<Cell, kUnit / kPart>> parts;
  };
  static void split(Unit& unit);

  std::uint32_t size_ = 0;
  std::unique_ptr<unsigned char[]> bytes_;
  std::vector<Unit> units_;
};

/// What a thread does to cells of shared memory, checked and noted. `what` completes "thread 3 ... shared bytes".
void note_read(SharedMemory& memory, std::uint32_t a, std::uint32_t bytes, const char* what, Where where);
void note_write(SharedMemory& memory, std::uint32_t a, std::uint32_t bytes, const char* what, Where where);

/// What a bulk copy that the current thread starts will write, as `epoch`.
void note_async_write(SharedMemory& memory, std::uint32_t a, std::uint32_t bytes, Epoch epoch, const char* what,
                      Where where);

/// Where the 128-byte swizzle puts what belongs at an address: within 1024 bytes, which are eight rows of eight pieces
/// of 16 bytes, piece c of row r lies at piece c ^ r.
inline std::uint32_t swizzle128(std::uint32_t a) { return a ^ (a >> 7 & 7u) << 4; }

/// Ordinary loads and stores of the current thread.
void read_shared(std::uint32_t a, void* to, std::uint32_t bytes, Where where);
void write_shared(std::uint32_t a, const void* from, std::uint32_t bytes, Where where);

std::string hex(std::uint64_t value);

}  // namespace simt
