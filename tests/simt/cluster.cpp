// What blocks of a cluster do together, and what a launch has to do with its neighbours.
#include <cstring>

#include "machine.h"

namespace simt {
namespace {

/// All of the cluster have arrived, and the warp has waited for it.
void pass(Warp& w) {
  w.cluster_waits = w.cluster_arrivals;
  for (Thread* t : w.lanes) t->knowledge.learn(machine.cluster.known);
}

}  // namespace

void cluster_arrive(Where where) {
  together({"cluster_arrive", where}, nullptr, [](Warp& w) {
    ClusterBarrier& barrier = machine.cluster;
    if (w.cluster_waits != w.cluster_arrivals) fail(w.site.where, "cluster_arrive twice without cluster_wait");
    barrier.gathering.start(machine.parties);
    for (Thread* t : w.lanes) t->tell(barrier.gathering);
    ++w.cluster_arrivals;
    barrier.arrived += kLanes;
    if (barrier.arrived < machine.launch.threads * machine.launch.cluster) return true;
    barrier.arrived = 0;
    ++barrier.phase;
    barrier.known = barrier.gathering.take();
    for (Warp* waiting : barrier.waiting) {
      pass(*waiting);
      machine.ready(*waiting);
    }
    barrier.waiting.clear();
    return true;
  });
}

void cluster_wait(Where where) {
  together({"cluster_wait", where}, nullptr, [](Warp& w) {
    ClusterBarrier& barrier = machine.cluster;
    if (w.cluster_arrivals > barrier.phase) {
      barrier.waiting.push_back(&w);
      return false;
    }
    if (w.cluster_waits == w.cluster_arrivals) fail(w.site.where, "cluster_wait without cluster_arrive");
    pass(w);
    return true;
  });
}

Block& block_of_cluster(int rank, const char* what, Where where) {
  if (rank < 0 || rank >= machine.launch.cluster)
    fail(where, std::string(what) + ": rank " + std::to_string(rank) + " of a cluster of " +
                    std::to_string(machine.launch.cluster));
  return *machine.blocks[static_cast<std::size_t>(rank)];
}

void note_remote(Block& block, const char* what, Where where) {
  if (block.ended == machine.launch.threads)
    fail(where, std::string(what) + ": the block of rank " + std::to_string(block.rank) + " has ended");
  for (Access& access : block.remote)
    if (access.epoch.who == current->who) {
      access = {current->epoch(), where};
      return;
    }
  block.remote.push_back({current->epoch(), where});
}

void read_cluster(std::uint32_t a, void* to, std::uint32_t bytes, int rank, Where where) {
  Block& block = block_of_cluster(rank, "load_cluster", where);
  block.shared.check(a, bytes, bytes, "load_cluster", where);
  if (&block != current->block) note_remote(block, "load_cluster", where);
  note_read(block.shared, a, bytes, "load_cluster", where);
  std::memcpy(to, block.shared.data(a), bytes);
}

void wait_for_earlier_kernels() {
  if (!machine.launch.early) return;
  static Clock waited;
  static std::uint32_t parties = 0;
  if (parties != machine.parties) {
    parties = machine.parties;
    waited = Clock(parties);
    waited.raise(kEarlierKernels, 1);
  }
  current->knowledge.seen = join(current->knowledge.seen, waited);
}

}  // namespace simt
