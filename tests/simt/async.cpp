#include "async.h"

#include <cstring>

#include "machine.h"

namespace simt {

// --- copies of 16 bytes that a thread waits for itself
// ---------------------------------------------------------------- Nobody may look at the place to which a copy goes
// before its wait, so that it cannot be seen when the copy ends: it does at the wait, as late as possible.

void copy_async(std::uint32_t to, const void* from, int bytes, Where where) {
  if (bytes < 0 || bytes > 16) fail(where, "copy_async of " + std::to_string(bytes) + " bytes: 0 .. 16");
  SharedMemory& memory = current->block->shared;
  memory.check(to, 16, 16, "copy_async", where);
  if (reinterpret_cast<std::uintptr_t>(from) % 16 != 0) fail(where, "copy_async: the source is not 16-byte aligned");
  if (bytes != 0) check_global_read(from, static_cast<std::size_t>(bytes), 1, Cached::no, where);
  note_write(memory, to, 16, "copy_async", where);
  memory.cells(to, 16, [](Cell& cell, std::uint32_t) { cell.arriving = true; });
  std::memset(memory.data(to), kPoison, 16);
  ThreadCopy copy{current->copy_groups, to, from, bytes, {}, where};
  if (bytes != 0) std::memcpy(copy.data, from, static_cast<std::size_t>(bytes));
  current->copies.push_back(copy);
}

void copy_async_commit() { ++current->copy_groups; }

void copy_async_wait(int pending, Where where) {
  Thread& self = *current;
  std::size_t done = 0;
  for (; done < self.copies.size() && self.copies[done].group + pending < self.copy_groups; ++done) {
    const ThreadCopy& copy = self.copies[done];
    if (std::memcmp(copy.data, copy.from, static_cast<std::size_t>(copy.bytes)) != 0)
      fail(where, "the source of copy_async at " + place(copy.where) + " was changed while the copy was under way");
    SharedMemory& memory = self.block->shared;
    std::memcpy(memory.data(copy.to), copy.data, 16);
    memory.cells(copy.to, 16, [&](Cell& cell, std::uint32_t) {
      cell.write = {self.epoch(), copy.where};
      cell.arriving = false;
    });
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace simt
