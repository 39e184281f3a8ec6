// The CUDA operators of csrc/ops/cuda.cpp, as they are, with kernels that are played: awq_played::linear and so on, for
// tensors on a CPU, on a GPU that a test names. What this tests beyond the kernels' own tests is the operators: that
// they give each kernel what it can take, and the rest to torch.
#include <utility>

#include "cuda/decode.cuh"
#include "cuda/device_code.h"
#include "cuda/gemm_sm80.cuh"
#include "cuda/gemm_sm90.cuh"
#include "cuda/gpu.h"
#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "ops/check.h"
#include "ops/cuda.h"
#include "simt/simt.h"

namespace {

using namespace awq;
using core::DType;

cuda::Gpu gpu = *cuda::find_gpu(90);
const char* last = "";
std::uint64_t seed = 0;

simt::Launch launch_of(const cuda::CudaPlan& plan) {
  simt::Launch launch;
  launch.grid_x = plan.grid_x, launch.grid_y = plan.grid_y, launch.threads = plan.threads;
  launch.cluster = plan.cluster, launch.shared_bytes = static_cast<std::uint32_t>(plan.shared_bytes);
  launch.early = plan.early;
  if (plan.kernel == cuda::CudaKernel::gemm_sm90) launch.registers = cuda::sm90_blocks(plan.tile_m) == 2 ? 80 : 168;
  return launch;
}

/// Lets kernels touch what the call is about while play() runs: of x its rows and nothing between them, of y every
/// element, which must be written, and the workspace, of which nothing is read before it is written.
template <class Play>
cudaError_t watched(const char* name, const core::LinearArgs& a, const cuda::CudaPlan& plan, void* workspace,
                    const Play& play) {
  last = name;
  const auto bytes = [](std::int64_t count, std::int64_t size) { return static_cast<std::size_t>(count * size); };
  const std::int64_t panels = core::ceil_div(a.n, 64), groups = a.k / a.group;
  simt::Global x(a.x, bytes((a.m - 1) * a.x_stride + a.k, 2), false, "x");
  simt::Global words(a.qweight, bytes(panels * core::ceil_div(a.k, 64), 2048), false, "qweight");
  simt::Global scales(a.scales, bytes(groups * a.n, core::size_of(a.scale_type)), false, "scales");
  simt::Global zeros(a.qzeros, a.qzeros == nullptr ? 0 : bytes(panels * groups, 32), false, "qzeros");
  simt::Global bias(a.bias, a.bias == nullptr ? 0 : bytes(a.n, core::size_of(a.bias_type)), false, "bias");
  simt::Global y(a.y, bytes(a.m * a.n, 2), true, "y");
  simt::Global room(workspace, static_cast<std::size_t>(plan.workspace_bytes), true, "workspace");
  y.uninitialised(), room.uninitialised();
  words.weights(), scales.weights(), zeros.weights(), bias.weights();
  play(simt::Options{.seed = seed++ % 5});
  if (!y.all_written()) throw simt::Error("not all of y is written");
  return cudaSuccess;
}

template <DType kType>
void play_reduce(const core::LinearArgs& a, const float* partials, int splits, const simt::Options& options) {
  simt::run({.grid_x = core::ceil_div(a.n, cuda::kReduceColumns), .grid_y = a.m, .threads = cuda::kReduceThreads},
            options, [&] { cuda::reduce_body<kType>(a, partials, splits); });
}

/// Every thread of a kernel of device_code.h, which has no barrier but between two halves.
template <class Tiles, class Thread>
void for_threads(const Tiles& tiles, const Thread& thread) {
  for (std::int64_t tile = 0; tile < tiles.count(); ++tile)
    for (int i = 0; i < cuda::kThreads; ++i) thread(tile, i);
}

template <class Body>
void with_float(DType type, const Body& body) {
  type == DType::f32 ? body.template operator()<DType::f32>() : cuda::with_x_type(type, body);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void awq_played_gpu(int arch, int sms) {
  gpu = *cuda::find_gpu(arch);
  if (sms > 0) gpu.sms = sms;
}
/// The kernel that has been played since the last question, or "".
extern "C" __attribute__((visibility("default"))) const char* awq_played_kernel() { return std::exchange(last, ""); }

namespace awq::cuda {

cudaError_t gpu_of(int, Gpu& answer) {
  answer = gpu;
  return cudaSuccess;
}

cudaError_t decode(const core::LinearArgs& a, const CudaPlan& plan, void* workspace, cudaStream_t) {
  return watched("decode", a, plan, workspace, [&](const simt::Options& options) {
    const DecodeCut cut = decode_cut(plan, a.k, a.group);
    auto* const partials = static_cast<float*>(workspace);
    with_decode(plan, a.x_type, decode_unit(a.k, a.group), [&]<DType kType, int kTiles, int kUnit>() {
      simt::run(launch_of(plan), options, [&] { decode_body<kType, kTiles, kUnit>(a, cut, partials); });
      if (partials != nullptr) play_reduce<kType>(a, partials, plan.splits, options);
    });
  });
}

cudaError_t gemm_sm80(const core::LinearArgs& a, const CudaPlan& plan, void* workspace, cudaStream_t) {
  return watched("gemm_sm80", a, plan, workspace, [&](const simt::Options& options) {
    auto* const partials = static_cast<float*>(workspace);
    const bool small = gemm_sm80_small_groups(a.k, a.group);
    with_gemm_sm80(plan, a.x_type, small, [&]<DType kType, int kTokens, bool kSmall>() {
      simt::run(launch_of(plan), options, [&] { gemm_sm80_body<kType, kTokens, kSmall>(a, partials); });
      if (partials != nullptr) play_reduce<kType>(a, partials, plan.splits, options);
    });
  });
}

cudaError_t gemm_sm90(const core::LinearArgs& a, const CudaPlan& plan, void* workspace, cudaStream_t) {
  return watched("gemm_sm90", a, plan, workspace, [&](const simt::Options& options) {
    const bool found = with_gemm_sm90(plan.tile_m, a.x_type, [&]<DType kType, int kTokens>() {
      const Sm90Cut cut({a.m, a.n, a.k, a.group, a.x_type, a.scale_type}, kTokens, plan.stages, plan.cluster);
      TensorMap map;
      simt::encode(map, a.x, 2, a.m, a.k, a.x_stride * 2, kTokens, kSm90Slice, true);
      simt::run(launch_of(plan), options, [&] { gemm_sm90_body<kType, kTokens>(a, cut, &map); });
    });
    if (!found) throw simt::Error("no such tile");
  });
}

cudaError_t dequantize(const core::DequantizeArgs& a, cudaStream_t) {
  last = "dequantize";
  with_float(a.scale_type, [&]<DType kScale>() {
    with_float(a.w_type, [&]<DType kOut>() {
      const auto play = [&]<bool kWhole>() {
        if (a.order == core::Order::fragments)
          for_threads(FragmentTiles{{a.n, a.k}}, [&](std::int64_t tile, int thread) {
            dequantize_fragments<kScale, kOut, kWhole>(a, tile, thread);
          });
        else
          for_threads(BlockTiles{{a.n, a.k}},
                      [&](std::int64_t tile, int thread) { dequantize_block<kScale, kOut, kWhole>(a, tile, thread); });
      };
      has_whole_blocks(a) ? play.template operator()<true>() : play.template operator()<false>();
    });
  });
  return cudaSuccess;
}

template <class Read, class Write>
cudaError_t convert(const Read& read, const Write& write, std::int64_t n, std::int64_t k) {
  const SquareTiles tiles{{n, k}};
  std::uint8_t shared[kTile * kTileStride] = {};
  for (std::int64_t tile = 0; tile < tiles.count(); ++tile) {
    for (int thread = 0; thread < kThreads; ++thread) read(shared, tiles, tile, thread);
    for (int thread = 0; thread < kThreads; ++thread) write(shared, tiles, tile, thread);
  }
  return cudaSuccess;
}

cudaError_t pack(const core::Codes& to, const std::uint8_t* q, void* words, std::int64_t n, std::int64_t k,
                 cudaStream_t) {
  return convert(ReadCodes{q}, WriteWords{to, words}, n, k);
}
cudaError_t unpack(const core::Codes& from, const void* words, std::uint8_t* q, std::int64_t n, std::int64_t k,
                   cudaStream_t) {
  return convert(ReadWords{from, words}, WriteCodes{q}, n, k);
}
cudaError_t repack(const core::Codes& from, const core::Codes& to, const void* source, void* target, std::int64_t n,
                   std::int64_t k, cudaStream_t) {
  return convert(ReadWords{from, source}, WriteWords{to, target}, n, k);
}

cudaError_t quantize(const core::QuantizeArgs& a, cudaStream_t) {
  with_float(a.w_type, [&]<DType kType>() {
    for (std::int64_t group = 0; group < a.n * (a.k / a.group); ++group) {
      GroupRange range;
      for (int lane = 0; lane < kWarp; ++lane) range.merge(lane_range<kType>(a, group, lane));
      const core::GroupParameters p = parameters(a, group, range);
      for (int lane = 0; lane < kWarp; ++lane) write_group<kType>(a, group, p, lane);
    }
  });
  return cudaSuccess;
}

}  // namespace awq::cuda

// --- the operators --------------------------------------------------------------------------------------------------

#define awq_ext awq_played
#define CUDA CPU
#include "ops/cuda.cpp"
