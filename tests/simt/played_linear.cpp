// The CUDA operators of csrc/ops/cuda.cpp, as they are, with kernels that are played: awq_played::linear and so on, for
// tensors on a CPU, on a GPU that a test names. What this tests beyond the kernels' own tests is the operators: that
// they give each kernel what it can take, and the rest to torch.
#include <utility>

#include "cuda/device_code.h"
#include "cuda/gpu.h"
#include "cuda/launch.h"
#include "ops/check.h"
#include "ops/cuda.h"
#include "simt/play.h"

namespace {

using namespace awq;
using core::DType;

cuda::Gpu gpu = *cuda::find_gpu(90);
const char* last = "";
std::uint64_t seed = 0;

/// Lets the kernel touch what the call is about: of x its rows and nothing between them, of y every element, which must
/// be written, and the workspace, of which nothing is read before it is written.
cudaError_t play(const char* name, const core::LinearArgs& a, const cuda::CudaPlan& plan, void* workspace) {
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
  simt::play(a, plan, workspace, {.seed = seed++ % 5});
  if (!y.all_written()) throw simt::Error("not all of y is written");
  return cudaSuccess;
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
  return play("decode", a, plan, workspace);
}
cudaError_t gemm_sm80(const core::LinearArgs& a, const CudaPlan& plan, void* workspace, cudaStream_t) {
  return play("gemm_sm80", a, plan, workspace);
}
cudaError_t gemm_sm90(const core::LinearArgs& a, const CudaPlan& plan, void* workspace, cudaStream_t) {
  return play("gemm_sm90", a, plan, workspace);
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
