// The players: threads in warps in blocks in a cluster, what each waits for, and who is next.
#pragma once
#include <array>
#include <bit>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "async.h"
#include "barrier.h"
#include "fiber.h"
#include "memory.h"
#include "simt.h"
#include "wgmma.h"

namespace simt {

inline constexpr int kLanes = 32;
inline constexpr std::uint32_t kAll = ~0u;
inline constexpr std::size_t kMostBarriers = 64;     // mbarriers of a block; an arbitrary number
inline constexpr std::uint32_t kEarlierKernels = 1;  // as a party; who has waited for them knows its time 1

struct Block;
struct Warp;

/// An instruction at a place in the source. `number` tells instructions apart that differ in it.
struct Site {
  const char* what = nullptr;
  Where where = {};
  std::int64_t number = 0;

  bool operator==(const Site& other) const;
  std::string text() const;
};

/// A copy_async on its way.
struct ThreadCopy {
  std::int64_t group;
  std::uint32_t to;
  const void* from;
  int bytes;
  unsigned char data[16];  // of the source when it began; zeros after it
  Where where;
};

struct Thread {
  int index = 0;  // in its block
  Block* block = nullptr;
  Warp* warp = nullptr;
  Fiber fiber;
  bool ended = false;
  Site site;             // where it waits, or waited last
  void* slot = nullptr;  // its part in a warp's common instruction

  // what it knows of the others
  std::uint32_t who = 0, now = 1, fenced = 0;
  Knowledge knowledge;

  bool wgmma_fenced = false;
  Image image;  // of its stack at the last wgmma_fence

  std::vector<ThreadCopy> copies;  // in order
  std::int64_t copy_groups = 0;    // committed

  int lane() const { return index % kLanes; }
  Epoch epoch() const { return {who, now}; }
  bool knows(Epoch e) const { return e.who == who || knowledge.seen.knows(e); }
  bool has_fenced(Epoch e) const { return (e.who == who && fenced >= e.when) || knowledge.fenced.knows(e); }
  /// Hands on what it has done so far; what it does from now on is new.
  void tell(Gathering& gathering) {
    gathering.add(knowledge, epoch(), fenced);
    ++now;
  }
};

struct Warp {
  Block* block = nullptr;
  int index = 0;
  std::array<Thread*, kLanes> lanes{};
  std::uint32_t ready = 0;  // lanes that can run
  bool queued = false;
  std::uint32_t ended = 0;    // lanes
  std::uint32_t arrived = 0;  // lanes at the common instruction `site`
  Site site;
  std::uint32_t who = 0;              // the warp's matrix unit
  std::int64_t cluster_arrivals = 0;  // at the cluster's barrier
  std::int64_t cluster_waits = 0;
  std::int64_t products = 0;  // groups of wgmma committed

  template <class Slot>
  Slot& slot(int lane) {
    return *static_cast<Slot*>(lanes[static_cast<std::size_t>(lane)]->slot);
  }
};

/// Four warps that use the matrix unit together.
struct WarpGroup {
  std::array<Warp*, 4> warps{};
  std::vector<Warp*> arrived;  // at the common instruction `site`
  Site site;
  int registers = 0;                               // of a thread
  std::vector<std::unique_ptr<Product>> products;  // under way
  std::vector<std::shared_ptr<Sum>> sums;          // not settled
};

/// A hardware barrier: 0 is sync_threads.
struct NamedBarrier {
  int expected = 0, arrived = 0;
  Site site;
  std::vector<Warp*> waiting;
  Gathering gathering;
};

struct Block {
  std::int64_t x = 0, y = 0;
  int rank = 0;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  std::vector<WarpGroup> groups;
  SharedMemory shared;
  std::array<NamedBarrier, 16> barriers;
  std::vector<std::unique_ptr<MemoryBarrier>> memory_barriers;
  std::uint32_t first_barrier = 0;  // as a party
  int ended = 0;
  Gathering end;               // what its threads knew when they ended
  std::vector<Access> remote;  // the last use of its shared memory by each thread of other blocks
  int registers = 0;           // that nobody has
  std::vector<WarpGroup*> short_of_registers;
};

/// Of a cluster's blocks.
struct ClusterBarrier {
  int arrived = 0;
  std::int64_t phase = 0;
  std::vector<Warp*> waiting;
  Gathering gathering;
  Knowledge known;
};

class Machine {
 public:
  void run(const Launch& launch, const Options& options, const std::function<void()>& body);

  Launch launch;
  Options options;
  std::vector<std::unique_ptr<Block>> blocks;  // of the cluster
  std::uint32_t parties = 0;                   // in clocks

  void ready(Thread& t);
  void ready(Warp& w);
  /// Lets others run until somebody says that the current thread is ready.
  void wait(const Site& site);
  std::uint64_t random(std::uint64_t below);
  /// A copy begins; it lands at a moment of the options' choice.
  void send(Flight flight);

  ClusterBarrier cluster;
  std::string describe(std::uint32_t who) const;

 private:
  Thread* pick();
  /// One of the copies under way lands.
  void land_one();
  Fiber* play(Thread& t, const std::function<void()>& body);
  void start_cluster(std::int64_t x, std::int64_t y);
  void run_cluster(const std::function<void()>& body);
  void end(Thread& t);
  [[noreturn]] void deadlock();

  std::vector<Flight> flights_;
  std::vector<Warp*> queue_;
  Warp* turn_ = nullptr;  // the warp whose lanes run now
  Fiber host_;
  std::exception_ptr error_;
  bool abandoning_ = false;
  std::uint64_t state_ = 0;
  Completion timing_ = Completion::early;
};

inline Machine machine;
inline Thread* current = nullptr;

/// Throws an Error that begins with the current thread and the place.
[[noreturn]] void fail(Where where, const std::string& what);
std::string place(Where where);

/// An instruction of all 32 lanes of a warp: the last one to come does it for all. `slot` is what `action` finds of a
/// lane; it returns whether the lanes go on.
void together(const Site& site, void* slot, bool (*action)(Warp&));

/// The same of the four warps of a warp group; `action` sees them when all lanes of all have come.
void together4(const Site& site, void* slot, bool (*action)(WarpGroup&));

void sync_block(int id, int threads, bool wait, Where where);
void sync_lanes(Where where);

void cluster_arrive(Where where);
void cluster_wait(Where where);
void read_cluster(std::uint32_t a, void* to, std::uint32_t bytes, int rank, Where where);
Block& block_of_cluster(int rank, const char* what, Where where);
/// The current thread uses shared memory of a block that is not its own, which must not end before that.
void note_remote(Block& block, const char* what, Where where);
void wait_for_earlier_kernels();

}  // namespace simt
