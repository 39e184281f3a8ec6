// How fast the device's memory is read, by how many bytes each multiprocessor has asked for and not got: the limit of
// kernels that read every weight once, and how many bytes they must have under way to come near it. Two ways to read:
// loads of 16 bytes into registers, and bulk copies into a ring in shared memory (9.0 and later). One line of JSON
// each.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/ptx.cuh"

namespace {

using awq::cuda::Vector;
namespace ptx = awq::cuda::ptx;

constexpr int kThreads = 256, kRepeats = 50;
constexpr std::size_t kBytes = std::size_t{1} << 30;  // many times any cache

void check(cudaError_t e, const char* what) {
  if (e == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(e));
  std::exit(e == cudaErrorNoDevice || e == cudaErrorInsufficientDriver ? 3 : 1);
}

/// Words that no compression makes smaller.
__global__ void fill(std::uint32_t* words, std::size_t count) {
  const std::size_t step = std::size_t{gridDim.x} * blockDim.x;
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < count; i += step) {
    std::uint32_t h = static_cast<std::uint32_t>(i) * 0x9e3779b9u;
    h = (h ^ h >> 16) * 0x85ebca6bu;
    words[i] = (h ^ h >> 13) * 0xc2b2ae35u;
  }
}

/// Each thread asks for kLoads pieces of 16 bytes, then looks at them, and so on through its block's share.
template <int kLoads>
__global__ void __launch_bounds__(kThreads) read_loads(const Vector* data, std::size_t count, std::uint32_t* sink) {
  std::uint32_t seen = 0;
  const std::size_t step = std::size_t{gridDim.x} * kThreads * kLoads;
  for (std::size_t first = (std::size_t{blockIdx.x} * kLoads) * kThreads + threadIdx.x; first < count; first += step) {
    Vector v[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) v[i] = ptx::load_once(data + first + i * std::size_t{kThreads});
#pragma unroll
    for (int i = 0; i < kLoads; ++i) seen ^= v[i].word[0] ^ v[i].word[1] ^ v[i].word[2] ^ v[i].word[3];
  }
  if (seen == 0x12345678u) *sink = seen;  // so that the loads are needed
}

/// One thread keeps `stages` copies of `piece` bytes under way.
__global__ void read_bulk(const unsigned char* data, std::size_t count, int stages, int piece) {
  const ptx::Shared ring = ptx::dynamic_shared(), barriers = ring + stages * piece;
  if (threadIdx.x != 0) return;
  for (int i = 0; i < stages; ++i) ptx::barrier_init(barriers + 8 * i, 1);
  ptx::fence_barriers();
  const std::size_t step = std::size_t{gridDim.x} * piece;
  std::size_t next = std::size_t{blockIdx.x} * piece, done = next;
  const auto ask = [&](int stage) {
    ptx::barrier_expect(barriers + 8 * stage, piece);
    ptx::copy_bulk(ring + stage * piece, data + next, piece, barriers + 8 * stage);
    next += step;
  };
  for (int i = 0; i < stages && next < count; ++i) ask(i);
  for (int stage = 0, parity = 0; done < count; done += step) {
    ptx::barrier_wait(barriers + 8 * stage, parity);
    if (next < count) ask(stage);
    if (++stage == stages) stage = 0, parity ^= 1;
  }
}

/// Median seconds of a launch.
template <class Launch>
double median(const Launch& launch) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "event"), check(cudaEventCreate(&end), "event");
  std::vector<double> times;
  for (int i = 0; i < kRepeats + 3; ++i) {
    check(cudaEventRecord(begin), "record");
    launch();
    check(cudaGetLastError(), "launch");
    check(cudaEventRecord(end), "record");
    check(cudaEventSynchronize(end), "kernel");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "time");
    if (i >= 3) times.push_back(ms / 1e3);
  }
  std::nth_element(times.begin(), times.begin() + kRepeats / 2, times.end());
  return times[kRepeats / 2];
}

void print(const char* how, int each, int blocks, int in_flight, double seconds) {
  std::printf(
      "{\"name\": \"bandwidth\", \"how\": \"%s\", \"of_each\": %d, \"blocks_per_sm\": %d, "
      "\"bytes_in_flight_per_sm\": %d, \"seconds\": %.9f, \"bytes_per_second\": %.6e}\n",
      how, each, blocks, in_flight, seconds, kBytes / seconds);
  std::fflush(stdout);
}

struct Device {
  int sms, shared_of_sm, shared_of_block, major;
};

template <int kLoads>
void loads(const Device& device, const Vector* data, std::uint32_t* sink) {
  check(cudaFuncSetAttribute(read_loads<kLoads>, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_of_block),
        "shared memory");
  for (const int blocks : {1, 2, 4, 8}) {
    // Shared memory that nobody uses keeps more blocks away.
    const int shared = std::min(device.shared_of_block, device.shared_of_sm / blocks - 1024);
    int fit = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, read_loads<kLoads>, kThreads, shared), "occupancy");
    if (fit != blocks) continue;
    const double seconds = median(
        [&] { read_loads<kLoads><<<device.sms * blocks, kThreads, shared>>>(data, kBytes / sizeof(Vector), sink); });
    print("loads", kLoads, blocks, kLoads * 16 * kThreads * blocks, seconds);
  }
}

}  // namespace

int main() {
  Device device{};
  const auto ask = [](int* value, cudaDeviceAttr what) { check(cudaDeviceGetAttribute(value, what, 0), "device"); };
  check(cudaSetDevice(0), "no CUDA device");
  ask(&device.sms, cudaDevAttrMultiProcessorCount);
  ask(&device.shared_of_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  ask(&device.shared_of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(&device.major, cudaDevAttrComputeCapabilityMajor);
  void* data = nullptr;
  std::uint32_t* sink = nullptr;
  check(cudaMalloc(&data, kBytes), "memory"), check(cudaMalloc(reinterpret_cast<void**>(&sink), 4), "memory");
  fill<<<device.sms * 8, kThreads>>>(static_cast<std::uint32_t*>(data), kBytes / 4);
  check(cudaDeviceSynchronize(), "fill");

  const auto* vectors = static_cast<const Vector*>(data);
  loads<1>(device, vectors, sink), loads<2>(device, vectors, sink), loads<4>(device, vectors, sink);
  loads<8>(device, vectors, sink), loads<16>(device, vectors, sink);
  if (device.major < 9) return 0;
  check(cudaFuncSetAttribute(read_bulk, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_of_block),
        "shared memory");
  for (const int piece : {2048, 4096, 8192, 16384})
    for (const int kib : {8, 16, 32, 64, 96, 128, 192}) {
      const int stages = kib * 1024 / piece, shared = stages * (piece + 8);
      if (stages < 2 || shared > device.shared_of_block) continue;
      // More than half of the multiprocessor's, so that there is one block.
      const int alone = std::max(shared, device.shared_of_sm / 2);
      const double seconds = median([&] {
        read_bulk<<<device.sms, 32, alone>>>(static_cast<const unsigned char*>(data), kBytes, stages, piece);
      });
      print("bulk", piece, 1, stages * piece, seconds);
    }
  return 0;
}
