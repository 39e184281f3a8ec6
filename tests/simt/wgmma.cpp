#include "wgmma.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <tuple>
#include <utility>

#include "machine.h"
#include "matrix.h"

namespace simt {

// --- what a thread's arrays held ------------------------------------------------------------------------------------

/// Reads between arrays, too, where AddressSanitizer lets nobody look; volatile, so that this does not become memcpy.
__attribute__((no_sanitize("address"))) void Image::take(const char* from, const char* end) {
  start = from;
  bytes.resize(static_cast<std::size_t>(end - from));
  char* to = bytes.data();
  for (; from < end; from += sizeof(std::uint64_t), to += sizeof(std::uint64_t)) {
    const std::uint64_t word = *reinterpret_cast<const volatile std::uint64_t*>(from);
    std::memcpy(to, &word, sizeof(word));
  }
}

bool Image::holds(const void* p, std::size_t size) const {
  const auto* at = static_cast<const char*>(p);
  return at >= start && at + size <= start + bytes.size();
}

bool Image::differs(const void* p, std::size_t size) const {
  return holds(p, size) && std::memcmp(bytes.data() + (static_cast<const char*>(p) - start), p, size) != 0;
}

void Image::update(const void* p, std::size_t size) {
  if (holds(p, size)) std::memcpy(bytes.data() + (static_cast<const char*>(p) - start), p, size);
}

// --- wgmma ----------------------------------------------------------------------------------------------------------

namespace {

constexpr std::uint32_t kPoisonWord = 0xffffffffu;

struct Part {
  awq::core::DType type;
  int columns;
  float* d;
  const std::uint32_t* a;
  std::uint64_t b;
  bool accumulate;
  Where where;
};

Thread& thread_of(const WarpGroup& g, int i) {
  return *g.warps[static_cast<std::size_t>(i) / kLanes]->lanes[static_cast<std::size_t>(i) % kLanes];
}

Part& part_of(const WarpGroup& g, int i) { return *static_cast<Part*>(thread_of(g, i).slot); }

/// Throws as if it were that thread whose turn it is.
[[noreturn]] void fail_for(Thread& t, Where where, const std::string& what) {
  current = &t;
  fail(where, what);
}

/// The addresses of the pieces of b, two for each column, from its descriptor. PTX ISA, "Matrix Descriptor Format".
std::vector<std::uint32_t> pieces_of(std::uint64_t descriptor, int columns, Where where) {
  const auto start = static_cast<std::uint32_t>(descriptor & 0x3fff) << 4;
  const auto stride = static_cast<std::uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) fail(where, "wgmma: the descriptor must ask for the 128-byte swizzle");
  if ((descriptor >> 49 & 7) != 0) fail(where, "wgmma: a base offset is not played");
  if (start % 1024 > 96 || start % 32 != 0)
    fail(where, "wgmma: b starts at " + hex(start) + ", which is not a multiple of 1024 plus 0, 32, 64 or 96");
  if (stride % 1024 != 0) fail(where, "wgmma: eight columns must be a multiple of 1024 bytes from the next eight");
  std::vector<std::uint32_t> pieces;
  for (int j = 0; j < columns; ++j) {
    const std::uint32_t column =
        start + static_cast<std::uint32_t>(j) / 8 * stride + static_cast<std::uint32_t>(j) % 8 * 128;
    pieces.push_back(swizzle128(column));
    pieces.push_back(swizzle128(column + 16));
  }
  return pieces;
}

/// Throws unless all threads of the group may read b, and what is there is visible to the matrix unit.
void check_b(const WarpGroup& g, const std::vector<std::uint32_t>& pieces, Where where) {
  SharedMemory& memory = g.warps[0]->block->shared;
  std::vector<const Knowledge*> kinds;  // threads mostly share what they know
  for (int i = 0; i < 128; ++i) {
    const Knowledge& k = thread_of(g, i).knowledge;
    if (std::none_of(kinds.begin(), kinds.end(),
                     [&](const Knowledge* other) { return other->seen == k.seen && other->fenced == k.fenced; }))
      kinds.push_back(&k);
  }
  for (const std::uint32_t a : pieces) {
    memory.check(a, 16, 16, "wgmma", where);
    memory.cells(a, 16, [&](Cell& cell, std::uint32_t at) {
      const Epoch write = cell.write.epoch;
      const auto name = [&] { return "wgmma reads shared byte " + hex(at); };
      if (cell.barrier) fail(where, name() + ", which is part of a barrier");
      if (cell.arriving) fail(where, name() + ", for which a copy is under way and has not been waited for");
      if (write.who == 0) fail(where, name() + ": uninitialised, nobody has written it");
      if (std::all_of(kinds.begin(), kinds.end(), [&](const Knowledge* k) {
            return k->seen.knows(write) && (cell.asynchronous || k->fenced.knows(write));
          }))
        return;
      for (int i = 0; i < 128; ++i) {
        Thread& t = thread_of(g, i);
        const std::string by = machine.describe(write.who) + " at " + place(cell.write.where);
        if (!t.knows(write))
          fail_for(t, where,
                   name() +
                       (cell.asynchronous ? ", for which this thread has not waited: " : ": race with a write by ") +
                       by);
        if (!cell.asynchronous && !t.has_fenced(write))
          fail_for(t, where, name() + ": no fence_async after the write by " + by);
      }
    });
  }
}

/// Throws if a thread has written its d.
void check_poison(Thread& t, const float* d, int columns, Where where) {
  for (int i = 0; i < columns / 2; ++i)
    if (std::bit_cast<std::uint32_t>(d[i]) != kPoisonWord)
      fail_for(t, where, "wgmma: d was written before it was waited for and settled");
}

/// The sum that d belongs to, and whether it begins here.
std::pair<std::shared_ptr<Sum>, bool> sum_of(WarpGroup& g, Where where) {
  const Part& first = part_of(g, 0);
  for (const auto& sum : g.sums) {
    if (sum->d[0] != first.d) continue;
    bool same = sum->columns == first.columns && sum->settled.none();
    for (int i = 0; i < 128; ++i) same = same && sum->d[static_cast<std::size_t>(i)] == part_of(g, i).d;
    if (!same) fail(where, "wgmma: d is that of an earlier wgmma, but not in all threads of the warp group alike");
    for (int i = 0; i < 128; ++i)
      if (first.accumulate) check_poison(thread_of(g, i), part_of(g, i).d, first.columns, where);
    return {sum, false};
  }
  auto sum = std::make_shared<Sum>();
  sum->columns = first.columns;
  sum->value.resize(static_cast<std::size_t>(64 * first.columns));
  for (int i = 0; i < 128; ++i) {
    const Part& part = part_of(g, i);
    Thread& t = thread_of(g, i);
    sum->d[static_cast<std::size_t>(i)] = part.d;
    if (part.accumulate && t.image.differs(part.d, static_cast<std::size_t>(part.columns / 2) * sizeof(float)))
      fail_for(t, where, "wgmma: d was written after the last wgmma_fence");
  }
  g.sums.push_back(sum);
  return {sum, true};
}

/// visit(i, row, column) for each element d[i] of a thread of a warp group.
template <class Visit>
void each_element(int thread, int columns, Visit visit) {
  const int row = thread / kLanes * 16 + thread % kLanes / 4, t = thread % 4;
  for (int i = 0; i < columns / 2; ++i) visit(i, row + i % 4 / 2 * 8, i / 4 * 8 + 2 * t + i % 2);
}

bool start_product(WarpGroup& g) {
  const Part& first = part_of(g, 0);
  const Where where = first.where;
  for (int i = 0; i < 128; ++i) {
    const Part& part = part_of(g, i);
    Thread& t = thread_of(g, i);
    if (part.b != first.b || part.accumulate != first.accumulate || part.columns != first.columns ||
        part.type != first.type)
      fail_for(t, where, "wgmma: divergent: not the same b and accumulate as thread 0 of the warp group");
    if (!t.wgmma_fenced) fail_for(t, where, "wgmma without a wgmma_fence before it");
    if (t.image.differs(part.a, 16)) fail_for(t, where, "wgmma: a was written after the last wgmma_fence");
  }
  auto product = std::make_unique<Product>();
  product->type = first.type;
  product->where = where;
  product->b = pieces_of(first.b, first.columns, where);
  check_b(g, product->b, where);
  bool fresh;
  std::tie(product->sum, fresh) = sum_of(g, where);
  Sum& sum = *product->sum;
  sum.ended = {};
  const int columns = first.columns;
  for (std::size_t w = 0; w < 4; ++w) product->group[w] = g.warps[w]->products;

  std::vector<std::uint16_t> a(64 * 16);
  for (int i = 0; i < 128; ++i) {
    const Part& part = part_of(g, i);
    const auto at = static_cast<std::size_t>(i);
    product->a[at] = part.a;
    std::memcpy(product->a_was[at].data(), part.a, 16);
    const int row = i / kLanes * 16 + i % kLanes / 4, t = i % 4;
    for (int j = 0; j < 4; ++j)
      std::memcpy(&a[static_cast<std::size_t>((row + j % 2 * 8) * 16 + j / 2 * 8 + 2 * t)], &part.a[j], 4);
    each_element(i, columns, [&](int j, int r, int c) {
      float& value = sum.value[static_cast<std::size_t>(r * columns + c)];
      if (!first.accumulate)
        value = 0.0f;
      else if (fresh)
        value = part.d[j];
    });
    const auto bytes = static_cast<std::size_t>(columns / 2) * sizeof(float);
    std::memset(part.d, 0xff, bytes);
    thread_of(g, i).image.update(part.d, bytes);
  }
  SharedMemory& memory = g.warps[0]->block->shared;
  std::vector<std::uint16_t> b(static_cast<std::size_t>(columns) * 16);
  for (std::size_t i = 0; i < product->b.size(); ++i) {
    std::memcpy(&b[8 * i], memory.data(product->b[i]), 16);
    memory.cells(product->b[i], 16, [](Cell& cell, std::uint32_t) { cell.in_use += 4; });
  }
  multiply(first.type, 64, columns, sum.value.data(), a.data(), b.data());
  g.products.push_back(std::move(product));
  return true;
}

/// A warp's part of a product has ended: its a may be written from now on, b too once all warps' have.
void end_part(WarpGroup& g, Product& product, std::size_t w, Epoch epoch) {
  SharedMemory& memory = g.warps[0]->block->shared;
  for (const std::uint32_t a : product.b)
    memory.cells(a, 16, [&](Cell& cell, std::uint32_t) {
      --cell.in_use;
      std::erase_if(cell.reads, [&](const Access& read) { return read.epoch.who == epoch.who; });
      cell.reads.push_back({epoch, product.where});
    });
  for (std::size_t i = w * kLanes; i < (w + 1) * kLanes; ++i)
    if (std::memcmp(product.a[i], product.a_was[i].data(), 16) != 0)
      fail_for(thread_of(g, static_cast<int>(i)), product.where,
               "wgmma: a was written before the wgmma that reads it had been waited for");
  product.done[w] = true;
}

WarpGroup& group_of(Warp& w) {
  if (static_cast<std::size_t>(w.index) / 4 >= w.block->groups.size())
    fail(w.site.where, w.site.text() + ": this warp is not one of a whole warp group of four");
  return w.block->groups[static_cast<std::size_t>(w.index) / 4];
}

bool wait_warp(Warp& warp) {
  WarpGroup& g = group_of(warp);
  const auto w = static_cast<std::size_t>(warp.index) % 4;
  const std::int64_t pending = warp.site.number;
  Thread* const self = current;
  const Epoch epoch{warp.who, static_cast<std::uint32_t>(warp.products + 1)};
  const auto under_way = [&](const Product& p) { return !p.done[w]; };
  bool any = false;
  for (std::size_t i = 0; i < g.products.size(); ++i) {
    Product& product = *g.products[i];
    if (!under_way(product) || product.group[w] + pending >= warp.products) continue;
    end_part(g, product, w, epoch);
    any = true;
    const bool more = std::any_of(g.products.begin(), g.products.end(),
                                  [&](const auto& other) { return other->sum == product.sum && under_way(*other); });
    product.sum->ended[w] = !more;
  }
  std::erase_if(g.products, [](const auto& p) { return p->done[0] && p->done[1] && p->done[2] && p->done[3]; });
  current = self;
  if (!any) return true;
  Clock ended(machine.parties);
  ended.raise(epoch.who, epoch.when);
  for (Thread* t : warp.lanes) t->knowledge.seen = join(t->knowledge.seen, ended);
  return true;
}

}  // namespace

void wgmma(awq::core::DType type, int columns, float* d, const std::uint32_t* a, std::uint64_t b, bool accumulate,
           Where where) {
  Part part{type, columns, d, a, b, accumulate, where};
  together4({"wgmma", where, columns}, &part, start_product);
}

void wgmma_fence(Where where) {
  Thread& self = *current;
  self.wgmma_fenced = true;
  const auto* start = static_cast<const char*>(__builtin_frame_address(0));
  self.image.take(start, static_cast<const char*>(self.fiber.stack_top()));
  together({"wgmma_fence", where}, nullptr, [](Warp&) { return true; });
}

void wgmma_commit(Where where) {
  together({"wgmma_commit", where}, nullptr, [](Warp& w) {
    ++w.products;
    return true;
  });
}

void wgmma_wait(int pending, Where where) { together({"wgmma_wait", where, pending}, nullptr, wait_warp); }

void wgmma_settle(float* d, Where where) {
  Thread& self = *current;
  const auto w = static_cast<std::size_t>(self.warp->index), i = static_cast<std::size_t>(self.index) % 128;
  if (w / 4 >= self.block->groups.size()) return;
  auto& sums = self.block->groups[w / 4].sums;
  const auto found =
      std::find_if(sums.begin(), sums.end(), [&](const auto& sum) { return sum->d[i] == d && !sum->settled.test(i); });
  if (found == sums.end()) return;
  Sum& sum = **found;
  if (!sum.ended[w % 4]) fail(where, "wgmma_settle of what a wgmma that was not waited for still computes");
  check_poison(self, d, sum.columns, where);
  each_element(static_cast<int>(i), sum.columns,
               [&](int j, int r, int c) { d[j] = sum.value[static_cast<std::size_t>(r * sum.columns + c)]; });
  self.image.update(d, static_cast<std::size_t>(sum.columns / 2) * sizeof(float));
  sum.settled.set(i);
  if (sum.settled.all()) sums.erase(found);
}

void wgmma_settle_a(const std::uint32_t* a, Where where) {
  const Thread& self = *current;
  const auto w = static_cast<std::size_t>(self.warp->index), i = static_cast<std::size_t>(self.index) % 128;
  if (w / 4 >= self.block->groups.size()) return;
  for (const auto& product : self.block->groups[w / 4].products)
    if (!product->done[w % 4] && product->a[i] == a)
      fail(where, "wgmma_settle of an a which a wgmma that was not waited for still reads: " + place(product->where));
}

void end_products(const Thread& t) {
  const auto w = static_cast<std::size_t>(t.warp->index);
  if (w / 4 >= t.block->groups.size()) return;
  for (const auto& product : t.block->groups[w / 4].products)
    if (!product->done[w % 4]) fail(product->where, "the thread ends before it has waited for this wgmma");
}

// --- registers ------------------------------------------------------------------------------------------------------

namespace {

/// Gives registers to groups that wait for them, first come first served.
void serve(Block& b) {
  while (!b.short_of_registers.empty()) {
    WarpGroup& g = *b.short_of_registers.front();
    const int more = (static_cast<int>(g.site.number) - g.registers) * 128;
    if (more > b.registers) return;
    b.registers -= more;
    g.registers = static_cast<int>(g.site.number);
    b.short_of_registers.erase(b.short_of_registers.begin());
    for (Warp* w : g.warps) machine.ready(*w);
  }
}

}  // namespace

void change_registers(int count, bool take, Where where) {
  const char* what = take ? "take_registers" : "give_registers";
  if (count < 24 || count > 256 || count % 8 != 0)
    fail(where, std::string(what) + "<" + std::to_string(count) + ">: 24 .. 256, a multiple of 8");
  if (!take) {
    together4({what, where, count}, nullptr, [](WarpGroup& g) {
      Block& b = *g.warps[0]->block;
      const int fewer = g.registers - static_cast<int>(g.site.number);
      if (fewer < 0)
        fail(g.site.where, "give_registers, but the threads have " + std::to_string(g.registers) + " only");
      b.registers += 128 * fewer;
      g.registers -= fewer;
      serve(b);
      return true;
    });
  } else {
    together4({what, where, count}, nullptr, [](WarpGroup& g) {
      if (static_cast<int>(g.site.number) < g.registers)
        fail(g.site.where, "take_registers, but the threads have " + std::to_string(g.registers) + " already");
      g.warps[0]->block->short_of_registers.push_back(&g);
      serve(*g.warps[0]->block);
      return false;
    });
  }
}

}  // namespace simt
