#include "memory.h"

#include <algorithm>
#include <cstring>

#include "machine.h"

namespace simt {

std::string hex(std::uint64_t value) {
  std::string digits;
  for (; value != 0 || digits.empty(); value /= 16) digits.insert(digits.begin(), "0123456789abcdef"[value % 16]);
  return "0x" + digits;
}

namespace {

std::string by(const Access& access) { return machine.describe(access.epoch.who) + " at " + place(access.where); }

}  // namespace

void SharedMemory::start(std::uint32_t bytes) {
  if (bytes != size_ || bytes_ == nullptr) bytes_ = std::make_unique<unsigned char[]>(bytes);
  size_ = bytes;
  std::memset(bytes_.get(), kPoison, bytes);
  units_.clear();
  units_.resize((bytes + kUnit - 1) / kUnit);
  barriers = 0;
}

void SharedMemory::split(Unit& unit) {
  unit.parts = std::make_unique<std::array<Cell, kUnit / kPart>>();
  unit.parts->fill(unit.whole);
}

void SharedMemory::check(Address a, std::uint32_t bytes, std::uint32_t alignment, const char* what, Where where) const {
  if (a % alignment != 0)
    fail(where, std::string(what) + " of shared memory at " + hex(a) + ", which is not " + std::to_string(alignment) +
                    "-byte aligned");
  if (a < kStart || bytes > size_ || a - kStart > size_ - bytes)
    fail(where, std::string(what) + " out of bounds: shared bytes " + hex(a) + " .. " + hex(a + bytes - 1) +
                    " of a window of " + std::to_string(size_) + " from " + hex(kStart));
}

void note_read(SharedMemory& memory, std::uint32_t a, std::uint32_t bytes, const char* what, Where where) {
  Thread& self = *current;
  memory.cells(a, bytes, [&](Cell& cell, std::uint32_t at) {
    if (cell.barrier) fail(where, std::string(what) + " of shared byte " + hex(at) + ", which is part of a barrier");
    if (cell.arriving)
      fail(where, std::string(what) + " of shared byte " + hex(at) +
                      ", for which a copy is under way and has not been waited for: " + by(cell.write));
    if (cell.write.epoch.who == 0)
      fail(where, std::string(what) + " of shared byte " + hex(at) + ": uninitialised, nobody has written it");
    if (!self.knows(cell.write.epoch))
      fail(where, std::string(what) + " of shared byte " + hex(at) +
                      (cell.asynchronous ? ", for which this thread has not waited: " : ": race with a write by ") +
                      by(cell.write));
    if (cell.barriers != memory.barriers) {  // what this block read before is known to all since
      std::erase_if(cell.reads, [&](const Access& read) { return self.knows(read.epoch); });
      cell.barriers = memory.barriers;
    }
    for (Access& read : cell.reads)
      if (read.epoch.who == self.who) {
        read = {self.epoch(), where};
        return;
      }
    cell.reads.push_back({self.epoch(), where});
  });
}

namespace {

void check_overwrite(const Cell& cell, std::uint32_t at, const char* what, Where where) {
  const Thread& self = *current;
  if (cell.barrier) fail(where, std::string(what) + " to shared byte " + hex(at) + ", which is part of a barrier");
  if (cell.arriving)
    fail(where, std::string(what) + " to shared byte " + hex(at) +
                    ", for which a copy is under way and has not been waited for: " + by(cell.write));
  if (cell.in_use != 0)
    fail(where, std::string(what) + " to shared byte " + hex(at) + ", which a wgmma that was not waited for reads");
  if (!self.knows(cell.write.epoch))
    fail(where, std::string(what) + " to shared byte " + hex(at) + ": race with a write by " + by(cell.write));
  for (const Access& read : cell.reads)
    if (!self.knows(read.epoch))
      fail(where, std::string(what) + " to shared byte " + hex(at) + ": race with a read by " + by(read));
}

}  // namespace

void note_write(SharedMemory& memory, std::uint32_t a, std::uint32_t bytes, const char* what, Where where) {
  Thread& self = *current;
  memory.cells(a, bytes, [&](Cell& cell, std::uint32_t at) {
    check_overwrite(cell, at, what, where);
    cell.write = {self.epoch(), where};
    cell.reads.clear();
    cell.asynchronous = false;
  });
  memory.merge(a, bytes);
}

void note_async_write(SharedMemory& memory, std::uint32_t a, std::uint32_t bytes, Epoch epoch, const char* what,
                      Where where) {
  const Thread& self = *current;
  memory.cells(a, bytes, [&](Cell& cell, std::uint32_t at) {
    check_overwrite(cell, at, what, where);
    if (!cell.asynchronous && cell.write.epoch.who != 0 && !self.has_fenced(cell.write.epoch))
      fail(where,
           std::string(what) + " to shared byte " + hex(at) + ": no fence_async after the write by " + by(cell.write));
    cell.write = {epoch, where};
    cell.reads.clear();
    cell.asynchronous = true;
  });
  memory.merge(a, bytes);
}

void read_shared(std::uint32_t a, void* to, std::uint32_t bytes, Where where) {
  SharedMemory& memory = current->block->shared;
  memory.check(a, bytes, bytes, "load", where);
  note_read(memory, a, bytes, "load", where);
  std::memcpy(to, memory.data(a), bytes);
}

void write_shared(std::uint32_t a, const void* from, std::uint32_t bytes, Where where) {
  SharedMemory& memory = current->block->shared;
  memory.check(a, bytes, bytes, "store", where);
  note_write(memory, a, bytes, "store", where);
  std::memcpy(memory.data(a), from, bytes);
}

}  // namespace simt
