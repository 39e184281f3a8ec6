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

// --- shared ----------------------------------------------------------------------------------------------------------

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

// --- global ----------------------------------------------------------------------------------------------------------

struct Global::Record {
  std::uintptr_t begin, end;
  bool writable, weights = false;
  std::string name;
  std::vector<bool> written;  // since uninitialised(); empty: all is initialised
  std::uint64_t launch = 0;   // of `writers`
  struct Writer {
    std::int64_t x = -1, y = -1;  // of the first block of the cluster
    Epoch epoch;
  };
  std::vector<std::uint32_t> writers;  // of each byte in this launch: a place in `kinds`, 0 for none
  std::vector<Writer> kinds;
};

namespace {

std::vector<Global::Record*>& globals() {
  static std::vector<Global::Record*> all;  // in order of addresses
  return all;
}
std::uint64_t launches = 0;
Global::Record* latest = nullptr;

/// The registered memory that [p, p + bytes) lies in.
Global::Record& find_global(const void* p, std::size_t bytes, std::size_t alignment, const char* what, Where where) {
  const auto a = reinterpret_cast<std::uintptr_t>(p);
  if (a % alignment != 0)
    fail(where, std::string(what) + " of global memory at " + hex(a) + ", which is not " + std::to_string(alignment) +
                    "-byte aligned");
  const auto within = [&](const Global::Record& r) { return a >= r.begin && a <= r.end && bytes <= r.end - a; };
  if (latest != nullptr && within(*latest)) return *latest;
  const auto& all = globals();
  auto next = std::upper_bound(all.begin(), all.end(), a,
                               [](std::uintptr_t at, const Global::Record* r) { return at < r->begin; });
  if (next != all.begin() && within(**(next - 1))) return *(latest = *(next - 1));
  std::string text =
      std::string(what) + " out of bounds: " + std::to_string(bytes) + " bytes of global memory at " + hex(a);
  if (next != all.begin()) {
    const Global::Record& r = **(next - 1);
    text += ", " + std::to_string(a - r.begin) + " bytes from the start of " + r.name + ", which has " +
            std::to_string(r.end - r.begin);
  }
  if (next != all.end()) text += ", " + std::to_string((*next)->begin - a) + " bytes before " + (*next)->name;
  fail(where, text);
}

}  // namespace

Global::Global(const void* data, std::size_t bytes, bool writable, std::string name) : record_(new Record) {
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  record_->begin = begin;
  record_->end = begin + bytes;
  record_->writable = writable;
  record_->name = name.empty() ? "a buffer" : std::move(name);
  auto& all = globals();
  auto next =
      std::upper_bound(all.begin(), all.end(), begin, [](std::uintptr_t at, const Record* r) { return at < r->begin; });
  if ((next != all.end() && (*next)->begin < record_->end) || (next != all.begin() && (*(next - 1))->end > begin)) {
    delete record_;
    throw Error("two registered pieces of global memory overlap");
  }
  all.insert(next, record_);
}

Global::~Global() {
  auto& all = globals();
  all.erase(std::find(all.begin(), all.end(), record_));
  if (latest == record_) latest = nullptr;
  delete record_;
}

Global& Global::weights() {
  record_->weights = true;
  return *this;
}

Global& Global::uninitialised() {
  record_->written.assign(record_->end - record_->begin, false);
  return *this;
}

bool Global::all_written() const {
  return std::all_of(record_->written.begin(), record_->written.end(), [](bool b) { return b; });
}

void start_globals() { ++launches; }

namespace {

void check_early(const Global::Record& r, const char* what, Where where) {
  if (machine.launch.early && !r.weights && !current->knows({kEarlierKernels, 1}))
    fail(where, std::string(what) + " of " + r.name + " before wait_for_earlier_kernels");
}

std::uint32_t& writer_of(Global::Record& r, std::uintptr_t at) { return r.writers[at - r.begin]; }

/// Throws if the byte was written in this launch by a thread of which the current one knows nothing.
void check_writer(Global::Record& r, std::uintptr_t at, const char* what, Where where) {
  if (r.launch != launches) return;
  const std::uint32_t place_of_writer = writer_of(r, at);
  if (place_of_writer == 0) return;
  const auto& writer = r.kinds[place_of_writer];
  const Block& first = *machine.blocks[0];
  if (writer.x == first.x && writer.y == first.y && current->knows(writer.epoch)) return;
  fail(where, std::string(what) + " of byte " + std::to_string(at - r.begin) + " of " + r.name +
                  ": race with a write by " +
                  (writer.x == first.x && writer.y == first.y
                       ? machine.describe(writer.epoch.who)
                       : "a thread of the cluster at block (" + std::to_string(writer.x) + ", " +
                             std::to_string(writer.y) + ")"));
}

}  // namespace

void check_global_read(const void* p, std::size_t bytes, std::size_t alignment, Cached cached, Where where) {
  Global::Record& r = find_global(p, bytes, alignment, "load", where);
  const auto a = reinterpret_cast<std::uintptr_t>(p);
  check_early(r, "load", where);
  if (r.launch != launches && r.written.empty()) return;
  for (std::uintptr_t at = a; at < a + bytes; ++at) {
    check_writer(r, at, "load", where);
    if (cached == Cached::yes && r.launch == launches && writer_of(r, at) != 0)
      fail(where, "load of " + r.name + " by a path that is only for memory which no kernel in flight writes");
    if (!r.written.empty() && !r.written[at - r.begin])
      fail(where, "load of byte " + std::to_string(at - r.begin) + " of " + r.name + ": uninitialised");
  }
}

void check_global_write(const void* p, std::size_t bytes, std::size_t alignment, Where where) {
  Global::Record& r = find_global(p, bytes, alignment, "store", where);
  const auto a = reinterpret_cast<std::uintptr_t>(p);
  if (!r.writable || r.weights) fail(where, "store to " + r.name + ", which is only to be read");
  check_early(r, "store", where);
  if (r.launch != launches) {
    r.launch = launches;
    r.writers.assign(r.end - r.begin, 0);
    r.kinds.assign(1, {});
  }
  const Block& first = *machine.blocks[0];
  const Global::Record::Writer self{first.x, first.y, current->epoch()};
  const auto& last = r.kinds.back();
  if (last.x != self.x || last.y != self.y || last.epoch.who != self.epoch.who || last.epoch.when != self.epoch.when)
    r.kinds.push_back(self);
  for (std::uintptr_t at = a; at < a + bytes; ++at) {
    check_writer(r, at, "store", where);
    writer_of(r, at) = static_cast<std::uint32_t>(r.kinds.size() - 1);
    if (!r.written.empty()) r.written[at - r.begin] = true;
  }
}

}  // namespace simt
