#include "machine.h"

#include <algorithm>
#include <map>
#include <string_view>

#include "global.h"

namespace simt {
namespace {

struct Abandoned {};  // unwinds a thread that cannot go on because of another's error

bool same_place(const Where& a, const Where& b) {
  return a.line == b.line && (a.file == b.file || std::string_view(a.file) == b.file);
}

std::string block_name(const Block& b) { return "block (" + std::to_string(b.x) + ", " + std::to_string(b.y) + ")"; }

}  // namespace

std::string place(Where where) {
  const std::string_view path = where.file;
  return std::string(path.substr(path.rfind('/') + 1)) + ":" + std::to_string(where.line);
}

void fail(Where where, const std::string& what) {
  std::string text;
  if (current != nullptr) text = block_name(*current->block) + ", thread " + std::to_string(current->index) + ", ";
  throw Error(text + place(where) + ": " + what);
}

bool Site::operator==(const Site& other) const {
  return number == other.number && same_place(where, other.where) &&
         (what == other.what || std::string_view(what) == other.what);
}

std::string Site::text() const { return std::string(what) + " (" + place(where) + ")"; }

std::uint64_t Machine::random(std::uint64_t below) {
  // splitmix64
  std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return (z ^ (z >> 31)) % below;
}

// --- who runs -------------------------------------------------------------------------------------------------------

void Machine::ready(Thread& t) {
  Warp& w = *t.warp;
  w.ready |= 1u << t.lane();
  if (w.queued || &w == turn_) return;
  w.queued = true;
  queue_.push_back(&w);
}

void Machine::ready(Warp& w) {
  for (Thread* t : w.lanes) ready(*t);
}

void Machine::send(Flight flight) {
  if (timing_ == Completion::early) return land(flight);
  flights_.push_back(std::move(flight));
}

void Machine::land_one() {
  const auto i = static_cast<std::ptrdiff_t>(random(flights_.size()));
  const Flight flight = std::move(flights_[static_cast<std::size_t>(i)]);
  flights_.erase(flights_.begin() + i);
  try {
    land(flight);
  } catch (...) {
    error_ = std::current_exception();
    abandoning_ = true;
  }
}

/// A lane of the warp whose turn it is, else of another warp; nullptr if nobody can run.
Thread* Machine::pick() {
  if (abandoning_) return nullptr;
  while (turn_ == nullptr || turn_->ready == 0) {
    turn_ = nullptr;
    if (timing_ == Completion::random && !flights_.empty() && random(4) == 0) land_one();
    if (abandoning_ || queue_.empty()) return nullptr;
    const std::size_t i = options.seed == 0 ? 0 : static_cast<std::size_t>(random(queue_.size()));
    turn_ = queue_[i];
    turn_->queued = false;
    if (options.seed == 0) {
      queue_.erase(queue_.begin());
    } else {
      queue_[i] = queue_.back();
      queue_.pop_back();
    }
  }
  const int first = options.seed == 0 ? 0 : static_cast<int>(random(kLanes));
  const int lane = (std::countr_zero(std::rotr(turn_->ready, first)) + first) % kLanes;
  turn_->ready &= ~(1u << lane);
  return turn_->lanes[static_cast<std::size_t>(lane)];
}

void Machine::wait(const Site& site) {
  Thread& self = *current;
  self.site = site;
  Thread* next = pick();
  if (next != &self) self.fiber.switch_to(next == nullptr ? host_ : next->fiber);
  current = &self;
  if (abandoning_) throw Abandoned();
}

/// The life of a thread; returns who is next.
Fiber* Machine::play(Thread& t, const std::function<void()>& body) {
  current = &t;
  if (!abandoning_) {
    try {
      body();
      end(t);
    } catch (const Abandoned&) {
    } catch (...) {
      if (error_ == nullptr) error_ = std::current_exception();
      abandoning_ = true;
    }
  }
  t.ended = true;
  Thread* next = pick();
  return next == nullptr ? &host_ : &next->fiber;
}

void Machine::end(Thread& t) {
  t.site = {"its end"};
  Warp& w = *t.warp;
  if (w.arrived != 0)
    fail(w.site.where, "divergent: the thread ends while lanes of its warp wait for it at " + w.site.text());
  if (!t.copies.empty()) fail(t.copies[0].where, "the thread ends before it has waited for this copy_async");
  w.ended |= 1u << t.lane();
  end_products(t);
  Block& b = *t.block;
  b.end.start(parties);
  t.tell(b.end);
  if (++b.ended < launch.threads) return;
  const Knowledge sum = b.end.take();
  for (const Access& access : b.remote)
    if (!sum.seen.knows(access.epoch))
      fail(access.where, "the block ends, and nothing says that " + describe(access.epoch.who) +
                             " has already done this to its shared memory");
  for (const Flight& flight : flights_)
    if (flight.barrier->block == &b) fail(flight.where, "the block ends while this copy to it is under way");
}

std::string Machine::describe(std::uint32_t who) const {
  for (const auto& block : blocks) {
    for (const auto& t : block->threads)
      if (t->who == who) return "thread " + std::to_string(t->index) + " of " + block_name(*block);
    for (const Warp& w : block->warps)
      if (w.who == who) return "wgmma of warp " + std::to_string(w.index) + " of " + block_name(*block);
  }
  for (const auto& block : blocks)
    for (const auto& b : block->memory_barriers)
      if (b->who == who) return "an asynchronous copy that reports to " + b->name();
  return "nobody";
}

void Machine::deadlock() {
  std::string text = "deadlock:";
  for (const auto& block : blocks) {
    for (std::size_t i = 0; i < block->threads.size();) {
      const Thread& t = *block->threads[i];
      std::size_t end = i + 1;
      while (end < block->threads.size() && block->threads[end]->ended == t.ended &&
             block->threads[end]->site == t.site)
        ++end;
      text += "\n  " + block_name(*block) + ", threads " + std::to_string(i) + ".." + std::to_string(end - 1) +
              (t.ended ? ": ended" : ": at " + t.site.text());
      i = end;
    }
    for (const auto& b : block->memory_barriers)
      if (!b->waiting.empty()) text += "\n  " + b->state();
  }
  throw Error(text);
}

// --- a launch -------------------------------------------------------------------------------------------------------

void Machine::start_cluster(std::int64_t x, std::int64_t y) {
  const auto threads = static_cast<std::size_t>(launch.threads), warps = threads / kLanes;
  parties = kEarlierKernels + 1;
  cluster = {};
  flights_.clear();
  for (int rank = 0; rank < launch.cluster; ++rank) {
    if (blocks.size() <= static_cast<std::size_t>(rank)) blocks.push_back(std::make_unique<Block>());
    Block& b = *blocks[static_cast<std::size_t>(rank)];
    b.x = x + rank;
    b.y = y;
    b.rank = rank;
    b.ended = 0;
    b.shared.start(launch.shared_bytes);
    b.barriers = {};
    b.warps.assign(warps, Warp());
    b.groups.clear();
    b.groups.resize(warps / 4);
    b.memory_barriers.clear();
    b.end = {};
    b.remote.clear();
    b.registers = 0;
    b.short_of_registers.clear();
    b.threads.resize(threads);
    for (std::size_t i = 0; i < threads; ++i) {
      b.threads[i] = std::make_unique<Thread>();
      Thread& t = *b.threads[i];
      t.index = static_cast<int>(i);
      t.block = &b;
      t.warp = &b.warps[i / kLanes];
      t.who = parties++;
      t.warp->lanes[i % kLanes] = &t;
    }
    for (std::size_t i = 0; i < warps; ++i) {
      b.warps[i].block = &b;
      b.warps[i].index = static_cast<int>(i);
      b.warps[i].who = parties++;
      if (i / 4 < b.groups.size()) b.groups[i / 4].warps[i % 4] = &b.warps[i];
    }
    for (WarpGroup& g : b.groups)
      g.registers = launch.registers != 0 ? launch.registers : std::min(65536 / launch.threads, 256) / 8 * 8;
    b.first_barrier = parties;
    parties += kMostBarriers;
  }
  const Clock nothing(parties);
  for (const auto& b : blocks)
    for (const auto& t : b->threads) t->knowledge.seen = nothing;
}

void Machine::run_cluster(const std::function<void()>& body) {
  queue_.clear();
  turn_ = nullptr;
  for (const auto& b : blocks)
    for (const auto& t : b->threads) {
      t->fiber.start([this, &body, thread = t.get()] { return play(*thread, body); });
      ready(*t);
    }
  while (true) {
    if (Thread* next = pick()) host_.switch_to(next->fiber);
    current = nullptr;
    if (abandoning_) break;
    if (!flights_.empty()) {
      land_one();
      if (abandoning_) break;
      continue;
    }
    bool all = true;
    for (const auto& b : blocks) all = all && b->ended == launch.threads;
    if (all) return;
    try {
      deadlock();
    } catch (...) {
      error_ = std::current_exception();
      abandoning_ = true;
    }
    break;
  }
  for (const auto& b : blocks)
    for (const auto& t : b->threads)
      if (!t->ended) host_.switch_to(t->fiber);
  current = nullptr;
}

void Machine::run(const Launch& l, const Options& o, const std::function<void()>& body) {
  launch = l;
  options = o;
  state_ = o.seed;
  timing_ = o.completion;
  if (timing_ == Completion::by_seed)
    timing_ = o.seed == 0 ? Completion::early : o.seed == 1 ? Completion::late : Completion::random;
  const auto require = [](bool ok, const char* what) {
    if (!ok) throw Error(std::string("launch: ") + what);
  };
  require(l.threads > 0 && l.threads <= 1024 && l.threads % kLanes == 0, "threads: 32, 64 .. 1024");
  require(l.cluster > 0 && l.cluster <= 8, "a cluster has 1 .. 8 blocks");
  require(l.grid_x > 0 && l.grid_x < std::int64_t{1} << 31, "grid_x: 1 .. 2^31 - 1");
  require(l.grid_y > 0 && l.grid_y < 65536, "grid_y: 1 .. 65535");
  require(l.grid_x % l.cluster == 0, "grid_x must be a multiple of the cluster");
  require(l.first_x >= 0 && l.first_x < l.grid_x && l.first_x % l.cluster == 0, "first_x begins a cluster");
  require(l.shared_bytes <= SharedMemory::kMost, "a block has at most 227 KiB of shared memory");
  start_globals();
  blocks.clear();
  error_ = nullptr;
  abandoning_ = false;
  for (std::int64_t y = 0; y < l.grid_y; ++y)
    for (std::int64_t x = l.first_x; x < l.grid_x; x += l.cluster) {
      start_cluster(x, y);
      run_cluster(body);
      if (error_ != nullptr) std::rethrow_exception(std::exchange(error_, nullptr));
    }
}

void run(const Launch& launch, const Options& options, const std::function<void()>& body) {
  machine.run(launch, options, body);
}

// --- what threads do together ---------------------------------------------------------------------------------------

void together(const Site& site, void* slot, bool (*action)(Warp&)) {
  Thread& self = *current;
  Warp& w = *self.warp;
  if (w.ended != 0)
    fail(site.where, "divergent: lane " + std::to_string(std::countr_zero(w.ended)) + " of the warp has ended before " +
                         site.text());
  if (w.arrived == 0) w.site = site;
  if (w.arrived != 0 && !(w.site == site))
    fail(site.where, "divergent: this lane is at " + site.text() + ", others of its warp are at " + w.site.text());
  self.slot = slot;
  w.arrived |= 1u << self.lane();
  if (w.arrived != kAll) return machine.wait(site);
  w.arrived = 0;
  if (!action(w)) return machine.wait(site);
  for (Thread* t : w.lanes)
    if (t != &self) machine.ready(*t);
}

void together4(const Site& site, void* slot, bool (*action)(WarpGroup&)) {
  struct Part {
    void* slot;
    bool (*action)(WarpGroup&);
  };
  Part part{slot, action};
  together(site, &part, [](Warp& w) {
    Block& b = *w.block;
    if (static_cast<std::size_t>(w.index) / 4 >= b.groups.size())
      fail(w.site.where, w.site.text() + ": this warp is not one of a whole warp group of four");
    WarpGroup& g = b.groups[static_cast<std::size_t>(w.index) / 4];
    const auto act = w.slot<Part>(0).action;
    for (Thread* t : w.lanes) t->slot = static_cast<Part*>(t->slot)->slot;
    if (!g.arrived.empty() && !(g.site == w.site))
      fail(w.site.where,
           "divergent: this warp is at " + w.site.text() + ", others of its warp group at " + g.site.text());
    g.site = w.site;
    g.arrived.push_back(&w);
    if (g.arrived.size() < 4) return false;
    g.arrived.clear();
    if (!act(g)) return false;
    for (Warp* other : g.warps)
      if (other != &w) machine.ready(*other);
    return true;
  });
}

void sync_lanes(Where where) {
  together({"sync_warp", where}, nullptr, [](Warp& w) {
    Gathering gathering;
    gathering.start(machine.parties);
    for (Thread* t : w.lanes) t->tell(gathering);
    const Knowledge sum = gathering.take();
    for (Thread* t : w.lanes) t->knowledge = sum;
    return true;
  });
}

namespace {

struct Arrival {
  int id, threads;
  bool wait;
  Where where;
};

/// All lanes of a warp have come to a barrier of their block; returns whether they go on.
bool arrive_at_block(Warp& w) {
  const auto& [id, threads, wait, where] = w.slot<Arrival>(0);
  Block& b = *w.block;
  NamedBarrier& barrier = b.barriers[static_cast<std::size_t>(id)];
  if (threads <= 0 || threads % kLanes != 0 || threads > machine.launch.threads)
    fail(where,
         w.site.text() + ": " + std::to_string(threads) + " threads: must be warps, and not more than there are");
  if (barrier.arrived != 0 && barrier.expected != threads)
    fail(where, w.site.text() + " counts " + std::to_string(threads) + " threads, " + barrier.site.text() +
                    " of the same barrier counts " + std::to_string(barrier.expected));
  if (std::find(barrier.waiting.begin(), barrier.waiting.end(), &w) != barrier.waiting.end())
    fail(where, w.site.text() + ": this warp waits there already");
  if (id == 0 && b.ended != 0) fail(where, "sync_threads, but some threads of the block have ended");
  barrier.expected = threads;
  barrier.site = w.site;
  barrier.gathering.start(machine.parties);
  for (Thread* t : w.lanes) t->tell(barrier.gathering);
  barrier.arrived += kLanes;
  if (wait) barrier.waiting.push_back(&w);
  if (barrier.arrived < barrier.expected) return !wait;
  const Knowledge sum = barrier.gathering.take();
  for (Warp* waiting : barrier.waiting)
    for (Thread* t : waiting->lanes) t->knowledge = sum;
  if (static_cast<int>(barrier.waiting.size()) * kLanes == machine.launch.threads) ++b.shared.barriers;
  for (Warp* waiting : barrier.waiting)
    if (waiting != &w) machine.ready(*waiting);
  barrier.waiting.clear();
  barrier.arrived = 0;
  return true;
}

}  // namespace

void sync_block(int id, int threads, bool wait, Where where) {
  if (id < 0 || id > 15) fail(where, "barrier " + std::to_string(id) + ": there are 0 .. 15");
  Arrival arrival{id, threads, wait, where};
  const char* what = id == 0 ? "sync_threads" : wait ? "sync_some" : "arrive_some";
  together({what, where, (std::int64_t{id} << 32) + threads}, &arrival, arrive_at_block);
}

}  // namespace simt
