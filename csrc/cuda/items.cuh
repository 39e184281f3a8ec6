// Work that is cut into items of which any thread, or warp, can take any.
#pragma once
#include "device_code.h"
#include "ptx.cuh"

namespace awq::cuda {

inline constexpr int kWarps = kThreads / kWarp;

/// Calls visit(item) for each item of 0 .. count - 1: one thread, one warp with all its lanes, or one block with all
/// its threads, for each.
template <class Visit>
AWQ_DEVICE void for_threads(std::int64_t count, const Visit& visit) {
  for (std::int64_t i = ptx::block_x() * kThreads + ptx::thread(); i < count; i += ptx::grid_x() * kThreads) visit(i);
}
template <class Visit>
AWQ_DEVICE void for_warps(std::int64_t count, const Visit& visit) {
  for (std::int64_t i = ptx::block_x() * kWarps + ptx::thread() / kWarp; i < count; i += ptx::grid_x() * kWarps)
    visit(i);
}
template <class Visit>
AWQ_DEVICE void for_blocks(std::int64_t count, const Visit& visit) {
  for (std::int64_t i = ptx::block_x(); i < count; i += ptx::grid_x()) visit(i);
}

/// What all lanes saw together. The order does not matter, see GroupRange.
AWQ_DEVICE GroupRange all_lanes(GroupRange range) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    range.merge({ptx::shuffle_xor(range.lo, distance), ptx::shuffle_xor(range.hi, distance),
                 ptx::shuffle_xor(range.poison, distance)});
  return range;
}

}  // namespace awq::cuda
