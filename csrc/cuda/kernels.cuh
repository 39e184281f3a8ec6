// The kernels of device_code.h: who of a launch does which part of the work, and when.
#pragma once
#include "items.cuh"

namespace awq::cuda {

/// `shared`: of the block, kTile * kTileStride bytes.
template <class Read, class Write>
AWQ_DEVICE void convert_body(const Read& read, const Write& write, SquareTiles tiles, std::uint8_t* shared) {
  for_blocks(tiles.count(), [&](std::int64_t tile) {
    read(shared, tiles, tile, ptx::thread());
    ptx::sync_threads();
    write(shared, tiles, tile, ptx::thread());
    ptx::sync_threads();
  });
}

template <DType kType>
AWQ_DEVICE void quantize_body(const core::QuantizeArgs& args) {
  const int lane = ptx::thread() % kWarp;
  for_warps(args.n * (args.k / args.group), [&](std::int64_t group) {
    const GroupRange range = all_lanes(lane_range<kType>(args, group, lane));
    write_group<kType>(args, group, parameters(args, group, range), lane);
  });
}

template <DType kScale, DType kOut, bool kWhole>
AWQ_DEVICE void dequantize_body(const core::DequantizeArgs& args) {
  for_blocks(BlockTiles{{args.n, args.k}}.count(),
             [&](std::int64_t tile) { dequantize_block<kScale, kOut, kWhole>(args, tile, ptx::thread()); });
}

template <DType kScale, DType kOut, bool kWhole>
AWQ_DEVICE void dequantize_fragments_body(const core::DequantizeArgs& args) {
  for_blocks(FragmentTiles{{args.n, args.k}}.count(),
             [&](std::int64_t tile) { dequantize_fragments<kScale, kOut, kWhole>(args, tile, ptx::thread()); });
}

}  // namespace awq::cuda
