// Barriers in shared memory (mbarrier): phases that end when so many arrivals and bytes have come.
#pragma once
#include <cstdint>
#include <vector>

#include "memory.h"

namespace simt {

struct Block;

struct MemoryBarrier {
  Block* block = nullptr;
  std::uint32_t address = 0;
  Access init;                    // by whom
  bool fenced = false;            // others than threads of this block may use it
  int expected = 0, missing = 0;  // arrivals of a phase
  std::int64_t bytes = 0;         // still to come in this phase
  std::int64_t phase = 0;
  int under_way = 0;      // copies that report here
  std::uint32_t who = 0;  // the copies that report here, as a party: its time is the phase that brings them
  std::vector<Thread*> waiting;
  Gathering gathering;  // of this phase
  Knowledge known;      // by those who have seen a phase end

  std::string name() const;
  /// What the phase still needs.
  std::string state() const;
};

void barrier_init(std::uint32_t address, int arrivals, Where where);
void fence_barriers();
/// An arrival at a barrier of block `rank`, after which `bytes` more are expected to come.
void barrier_arrive(Block& block, std::uint32_t address, std::int64_t bytes, const char* what, Where where);
void barrier_wait(std::uint32_t address, int parity, Where where);
void fence_async();

/// Throws unless there is a barrier that the current thread knows of; `remote`: and that more than threads of its block
/// may use.
MemoryBarrier& find_barrier(Block& block, std::uint32_t address, bool remote, const char* what, Where where);
/// Bytes that a copy has brought.
void barrier_bytes(MemoryBarrier& barrier, std::int64_t bytes);

}  // namespace simt
