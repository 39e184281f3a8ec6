#include "global.h"

#include <algorithm>
#include <cstring>

#include "machine.h"

namespace simt {

struct Global::Record {
  std::uintptr_t begin, end;
  bool writable, weights = false;
  std::string name;
  std::vector<bool> written;  // since uninitialised(); empty: all is initialised

  /// Who stored, in which cluster.
  struct Writer {
    std::int64_t x = -1, y = -1;  // of the first block of the cluster
    Epoch epoch;
  };
  std::uint64_t launch = 0;            // to which the following belongs
  std::vector<Writer> writings;        // in this launch; the first stands for none
  std::vector<std::uint32_t> writers;  // of each byte: a place in `writings`
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
  std::memset(reinterpret_cast<void*>(record_->begin), kPoison, record_->end - record_->begin);
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
  const auto& writer = r.writings[place_of_writer];
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
    r.writings.assign(1, {});
  }
  const Block& first = *machine.blocks[0];
  const Global::Record::Writer self{first.x, first.y, current->epoch()};
  const auto& last = r.writings.back();
  if (last.x != self.x || last.y != self.y || last.epoch.who != self.epoch.who || last.epoch.when != self.epoch.when)
    r.writings.push_back(self);
  for (std::uintptr_t at = a; at < a + bytes; ++at) {
    check_writer(r, at, "store", where);
    writer_of(r, at) = static_cast<std::uint32_t>(r.writings.size() - 1);
    if (!r.written.empty()) r.written[at - r.begin] = true;
  }
}

}  // namespace simt
