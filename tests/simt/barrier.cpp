#include "barrier.h"

#include "machine.h"

namespace simt {
namespace {

constexpr int kMostArrivals = (1 << 20) - 1;        // PTX ISA, "Contents of the mbarrier object"
constexpr std::int64_t kMostBytes = (1 << 20) - 1;  // the same

/// Ends the phase if nothing is missing.
void end_phase(MemoryBarrier& b) {
  if (b.missing != 0 || b.bytes != 0) return;
  if (b.under_way != 0)
    throw Error(b.name() + ": phase " + std::to_string(b.phase) + " ends while copies that report to it are under way" +
                ": fewer bytes were expected than come");
  ++b.phase;
  b.missing = b.expected;
  b.gathering.start(machine.parties);
  b.gathering.raise({b.who, static_cast<std::uint32_t>(b.phase)});
  b.known.learn(b.gathering.take());
  for (Thread* t : b.waiting) {
    t->knowledge.learn(b.known);
    machine.ready(*t);
  }
  b.waiting.clear();
}

}  // namespace

std::string MemoryBarrier::name() const {
  return "barrier " + hex(address) + " of block (" + std::to_string(block->x) + ", " + std::to_string(block->y) + ")";
}

std::string MemoryBarrier::state() const {
  return name() + ": phase " + std::to_string(phase) + " lacks " + std::to_string(missing) + " of " +
         std::to_string(expected) + " arrivals and " + std::to_string(bytes) + " bytes";
}

MemoryBarrier& find_barrier(Block& block, std::uint32_t address, bool remote, const char* what, Where where) {
  block.shared.check(address, 8, 8, what, where);
  for (const auto& b : block.memory_barriers)
    if (b->address == address) {
      if (!current->knows(b->init.epoch))
        fail(where, std::string(what) + ": race with the barrier_init at " + place(b->init.where) + " of " + b->name());
      if (remote && !b->fenced)
        fail(where,
             std::string(what) + ": " + b->name() +
                 " needs fence_barriers (or fence_async) after its barrier_init before copies or other blocks use it");
      return *b;
    }
  fail(where, std::string(what) + ": " + hex(address) + " is not an initialised barrier");
}

void barrier_init(std::uint32_t address, int arrivals, Where where) {
  Block& block = *current->block;
  block.shared.check(address, 8, 8, "barrier_init", where);
  if (arrivals < 1 || arrivals > kMostArrivals)
    fail(where, "barrier_init for " + std::to_string(arrivals) + " arrivals: 1 .. 2^20 - 1");
  note_write(block.shared, address, 8, "barrier_init", where);
  block.shared.cells(address, 8, [](Cell& cell, std::uint32_t) { cell.barrier = true; });
  if (block.memory_barriers.size() == kMostBarriers)
    fail(where, "more than " + std::to_string(kMostBarriers) + " barriers in a block");
  auto b = std::make_unique<MemoryBarrier>();
  b->block = &block;
  b->address = address;
  b->init = {current->epoch(), where};
  b->expected = b->missing = arrivals;
  b->who = block.first_barrier + static_cast<std::uint32_t>(block.memory_barriers.size());
  block.memory_barriers.push_back(std::move(b));
}

void fence_barriers() {
  for (const auto& b : current->block->memory_barriers)
    if (b->init.epoch.who == current->who) b->fenced = true;
}

/// All that the thread has done or knows of may now be used by copies and wgmma.
void fence_async() {
  fence_barriers();
  Thread& self = *current;
  self.knowledge.fenced = join(self.knowledge.fenced, self.knowledge.seen);
  self.fenced = self.now++;
}

void barrier_arrive(Block& block, std::uint32_t address, std::int64_t bytes, const char* what, Where where) {
  Thread& self = *current;
  const bool remote = &block != self.block;
  MemoryBarrier& b = find_barrier(block, address, remote, what, where);
  if (remote) note_remote(block, what, where);
  if (b.missing == 0)
    fail(where, std::string(what) + ": too many arrivals: " + b.name() + " has had all " + std::to_string(b.expected) +
                    " of phase " + std::to_string(b.phase));
  b.bytes += bytes;
  if (b.bytes > kMostBytes) fail(where, std::string(what) + ": a phase can expect at most 2^20 - 1 bytes");
  --b.missing;
  b.gathering.start(machine.parties);
  self.tell(b.gathering);
  end_phase(b);
}

void barrier_wait(std::uint32_t address, int parity, Where where) {
  if (parity != 0 && parity != 1) fail(where, "barrier_wait for parity " + std::to_string(parity) + ": 0 or 1");
  MemoryBarrier& b = find_barrier(*current->block, address, false, "barrier_wait", where);
  if ((b.phase & 1) == parity) {
    b.waiting.push_back(current);
    machine.wait({"barrier_wait", where, (std::int64_t{address} << 1) + parity});
  } else {
    current->knowledge.learn(b.known);
  }
}

void barrier_bytes(MemoryBarrier& barrier, std::int64_t bytes) {
  barrier.bytes -= bytes;
  --barrier.under_way;
  end_phase(barrier);
}

}  // namespace simt
