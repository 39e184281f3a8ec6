// The kernels of kernels.cuh, and their launches.
#include <algorithm>

#include "kernels.cuh"
#include "launch.h"

namespace awq::cuda {
namespace {

template <class Read, class Write>
__global__ void __launch_bounds__(kThreads) convert_kernel(Read read, Write write, SquareTiles tiles) {
  __shared__ std::uint8_t shared[kTile * kTileStride];
  convert_body(read, write, tiles, shared);
}

template <DType kType>
__global__ void __launch_bounds__(kThreads) quantize_kernel(core::QuantizeArgs args) {
  quantize_body<kType>(args);
}

template <DType kScale, DType kOut, bool kWhole>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(core::DequantizeArgs args) {
  dequantize_body<kScale, kOut, kWhole>(args);
}

template <DType kScale, DType kOut, bool kWhole>
__global__ void __launch_bounds__(kThreads) dequantize_fragments_kernel(core::DequantizeArgs args) {
  dequantize_fragments_body<kScale, kOut, kWhole>(args);
}

/// Starts a block for each piece of work, or as many as a grid can have: kernels stride by the grid.
template <class Kernel, class... Args>
cudaError_t launch(Kernel kernel, std::int64_t pieces, cudaStream_t stream, const Args&... args) {
  if (pieces == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(std::min<std::int64_t>(pieces, std::numeric_limits<int>::max()));
  kernel<<<blocks, kThreads, 0, stream>>>(args...);
  return cudaGetLastError();
}

template <class Read, class Write>
cudaError_t convert(const Read& read, const Write& write, std::int64_t n, std::int64_t k, cudaStream_t stream) {
  const SquareTiles tiles{{n, k}};
  return launch(convert_kernel<Read, Write>, tiles.count(), stream, read, write, tiles);
}

/// body.operator()<type>() with the run-time type as a template argument.
template <class Body>
cudaError_t with_type(DType type, const Body& body) {
  switch (type) {
    case DType::f32: return body.template operator()<DType::f32>();
    case DType::f16: return body.template operator()<DType::f16>();
    case DType::bf16: return body.template operator()<DType::bf16>();
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t pack(const core::Codes& to, const std::uint8_t* q, void* words, std::int64_t n, std::int64_t k,
                 cudaStream_t stream) {
  return convert(ReadCodes{q}, WriteWords{to, words}, n, k, stream);
}

cudaError_t unpack(const core::Codes& from, const void* words, std::uint8_t* q, std::int64_t n, std::int64_t k,
                   cudaStream_t stream) {
  return convert(ReadWords{from, words}, WriteCodes{q}, n, k, stream);
}

cudaError_t repack(const core::Codes& from, const core::Codes& to, const void* source, void* target, std::int64_t n,
                   std::int64_t k, cudaStream_t stream) {
  return convert(ReadWords{from, source}, WriteWords{to, target}, n, k, stream);
}

cudaError_t quantize(const core::QuantizeArgs& args, cudaStream_t stream) {
  const std::int64_t blocks = (args.n * (args.k / args.group) + kWarps - 1) / kWarps;
  return with_type(args.w_type, [&]<DType kType>() { return launch(quantize_kernel<kType>, blocks, stream, args); });
}

cudaError_t dequantize(const core::DequantizeArgs& args, cudaStream_t stream) {
  const bool fragments = args.order == core::Order::fragments;
  if (!fragments && args.order != core::Order::awq) return cudaErrorInvalidValue;
  const std::int64_t blocks =
      fragments ? FragmentTiles{{args.n, args.k}}.count() : BlockTiles{{args.n, args.k}}.count();
  return with_type(args.scale_type, [&]<DType kScale>() {
    return with_type(args.w_type, [&]<DType kOut>() {
      const auto kernel =
          has_whole_blocks(args)
              ? (fragments ? dequantize_fragments_kernel<kScale, kOut, true> : dequantize_kernel<kScale, kOut, true>)
              : (fragments ? dequantize_fragments_kernel<kScale, kOut, false> : dequantize_kernel<kScale, kOut, false>);
      return launch(kernel, blocks, stream, args);
    });
  });
}

}  // namespace awq::cuda
