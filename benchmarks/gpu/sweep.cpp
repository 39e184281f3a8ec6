// Every way in which a kernel can cut a call up, timed: whether its plan chose well, and where one kernel should take
// over from another.
//
//     awq_gpu_sweep decode|gemm_sm80|gemm_sm90 [--bf16] [--check] [NxK ...]
//
// One line of JSON for each plan. Weights are random words, in so many copies that no cache holds them; a time is the
// median over replays of a graph with one launch for each copy; a sample of outputs is compared with float64 first.
// With --check small and odd shapes run once each, for compute-sanitizer.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/decode.h"
#include "cuda/gemm_sm80.h"
#include "cuda/gemm_sm90.h"
#include "cuda/launch.h"

namespace {

using awq::core::DType;
using awq::core::LinearArgs;
using awq::cuda::CudaKernel;
using awq::cuda::CudaPlan;
using awq::cuda::CudaProblem;
using awq::cuda::Gpu;

constexpr std::size_t kRotate = std::size_t{180} << 20;
constexpr int kRepeats = 50, kSamples = 64;

[[noreturn]] void fail(const std::string& why, int status = 1) {
  std::printf("%s\n", why.c_str());
  std::exit(status);
}

void check(cudaError_t e, const char* what) {
  if (e != cudaSuccess)
    fail(std::string(what) + ": " + cudaGetErrorString(e),
         e == cudaErrorNoDevice || e == cudaErrorInsufficientDriver ? 3 : 1);
}

/// An array on the device, `copies` times, with the first copy on the host too.
template <class T>
struct Array {
  std::vector<T> host;
  T* device = nullptr;
  std::size_t copies;

  Array(std::vector<T> values, std::size_t copies_) : host(std::move(values)), copies(copies_) {
    check(cudaMalloc(reinterpret_cast<void**>(&device), std::max<std::size_t>(16, bytes() * copies)), "memory");
    for (std::size_t i = 0; i < copies; ++i)
      check(cudaMemcpy(copy(i), host.data(), bytes(), cudaMemcpyHostToDevice), "copy");
  }
  Array(const Array&) = delete;
  ~Array() { cudaFree(device); }

  std::size_t bytes() const { return host.size() * sizeof(T); }
  T* copy(std::size_t i) const { return device + i % copies * host.size(); }
};

/// W in fragments, x and the place of y; groups of `group`.
struct Case {
  CudaProblem p;
  std::size_t copies;
  Array<std::uint32_t> words, zeros;
  Array<std::uint16_t> scales, x, y;

  static std::vector<std::uint32_t> codes(const awq::core::Codes& of, std::int64_t n, std::int64_t k, unsigned seed) {
    const awq::core::WordShape shape = awq::core::word_shape(of, n, k);
    std::vector<std::uint32_t> words(static_cast<std::size_t>(shape.rows * shape.cols));
    std::mt19937 random(seed);
    if (n % of.tile_n == 0 && k % of.tile_k == 0) {
      for (auto& word : words) word = static_cast<std::uint32_t>(random());
      return words;
    }
    for (std::int64_t row = 0; row < n; ++row)  // what lies beyond is zeros
      for (std::int64_t col = 0; col < k; ++col) {
        const awq::core::CodePlace at = awq::core::locate(of, n, k, row, col);
        words[static_cast<std::size_t>(at.word)] |= static_cast<std::uint32_t>(random() % 16) << 4 * at.nibble;
      }
    return words;
  }

  static std::vector<std::uint16_t> floats(std::int64_t count, DType type, float low, float high, unsigned seed) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<float> draw(low, high);
    std::vector<std::uint16_t> values(static_cast<std::size_t>(count));
    for (std::size_t i = 0; i < values.size(); ++i) awq::core::store_as(values.data(), type, i, draw(random));
    return values;
  }

  Case(const CudaProblem& p_, bool rotate)
      : p(p_),
        copies(rotate ? kRotate / static_cast<std::size_t>(p.n * p.k / 2) + 2 : 1),
        words(codes(awq::core::kFragments, p.n, p.k, 1), copies),
        zeros(codes(awq::core::kFragmentZeros, p.n, p.k / p.group, 2), copies),
        scales(floats(p.n * (p.k / p.group), p.scale_type, 0.001f, 0.011f, 3), copies),
        x(floats(p.m * p.k, p.x_type, -1, 1, 4), 1),
        y(std::vector<std::uint16_t>(static_cast<std::size_t>(p.m * p.n)), 1) {
    draw();
  }

  LinearArgs args(std::size_t i) const {
    LinearArgs a{};
    a.x = x.device, a.qweight = words.copy(i), a.scales = scales.copy(i), a.qzeros = zeros.copy(i), a.y = y.device;
    a.m = p.m, a.n = p.n, a.k = p.k, a.group = p.group, a.x_stride = p.k;
    a.x_type = p.x_type, a.scale_type = p.scale_type, a.bias_type = p.x_type;
    return a;
  }

  /// An output and what float64 makes of it.
  struct Sample {
    std::int64_t at;
    double value;
  };
  std::vector<Sample> samples;

  /// A sample that has the first and the last output in it.
  void draw() {
    // `locate` searches its tile: once for each code of a tile is enough.
    const awq::core::Codes& of = awq::core::kFragments;
    std::vector<awq::core::CodePlace> places;
    for (int n = 0; n < of.tile_n; ++n)
      for (int k = 0; k < of.tile_k; ++k) places.push_back(awq::core::locate(of, of.tile_n, of.tile_k, n, k));
    const auto nibble = [](std::uint32_t word, int i) { return static_cast<int>(word >> 4 * i & 15); };
    std::mt19937 random(5);
    const std::int64_t outputs = p.m * p.n, groups = p.k / p.group;
    for (int i = 0; i < kSamples; ++i) {
      const std::int64_t at = i == 0 ? 0 : i == 1 ? outputs - 1 : static_cast<std::int64_t>(random()) % outputs;
      const std::int64_t row = at / p.n, n = at % p.n;
      double sum = 0;
      for (std::int64_t k = 0; k < p.k; ++k) {
        const std::int64_t g = k / p.group, tile = awq::core::tile_word(of, p.n, p.k, n, k);
        const auto place = places[static_cast<std::size_t>(n % of.tile_n * of.tile_k + k % of.tile_k)];
        const auto zero = awq::core::locate(awq::core::kFragmentZeros, p.n, groups, n, g);
        const int q = nibble(words.host[static_cast<std::size_t>(tile + place.word)], place.nibble);
        const int z = nibble(zeros.host[static_cast<std::size_t>(zero.word)], zero.nibble);
        const auto scale = awq::core::fragment_scale(p.n, groups, g, n);
        const double s = awq::core::load_as<double>(scales.host.data(), p.scale_type, scale);
        sum += awq::core::load_as<double>(x.host.data(), p.x_type, row * p.k + k) * (q - z) * s;
      }
      samples.push_back({at, sum});
    }
  }

  /// ||y - reference|| / ||reference|| over the sample.
  double error() const {
    std::vector<std::uint16_t> got(y.host.size());
    check(cudaMemcpy(got.data(), y.device, y.bytes(), cudaMemcpyDeviceToHost), "copy");
    double off = 0, all = 0;
    for (const Sample& sample : samples) {
      const double difference = awq::core::load_as<double>(got.data(), p.x_type, sample.at) - sample.value;
      off += difference * difference, all += sample.value * sample.value;
    }
    return std::sqrt(off / all);
  }
};

cudaError_t launch(const LinearArgs& args, const CudaPlan& plan, void* workspace, cudaStream_t stream) {
  switch (plan.kernel) {
    case CudaKernel::decode: return awq::cuda::decode(args, plan, workspace, stream);
    case CudaKernel::gemm_sm80: return awq::cuda::gemm_sm80(args, plan, workspace, stream);
    case CudaKernel::gemm_sm90: return awq::cuda::gemm_sm90(args, plan, workspace, stream);
    default: return cudaErrorInvalidValue;
  }
}

/// The plan that the kernel's own header chooses first, then all others it can have.
std::vector<CudaPlan> plans(CudaKernel kernel, const CudaProblem& p, const Gpu& gpu) {
  std::vector<CudaPlan> found;
  if (kernel == CudaKernel::decode) {
    if (!awq::cuda::decode_can(p, gpu)) return found;
    found.push_back(awq::cuda::decode_plan(p, gpu));
    for (int strips_log = 0; strips_log <= 3; ++strips_log)
      for (int splits = 1; splits <= 8 && splits * awq::cuda::kDecodeStep <= p.k; splits *= 2)
        if (const CudaPlan plan = awq::cuda::decode_plan(p, gpu, strips_log, splits);
            plan.shared_bytes <= gpu.shared_bytes)
          found.push_back(plan);
  } else if (kernel == CudaKernel::gemm_sm80) {
    if (!awq::cuda::gemm_sm80_can(p, gpu)) return found;
    found.push_back(awq::cuda::gemm_sm80_plan(p, gpu));
    for (const int tokens : {32, 64})
      for (int splits = 1; splits <= 8 && splits * 2 * awq::cuda::GemmSm80::kStep <= p.k; splits *= 2)
        found.push_back(awq::cuda::gemm_sm80_plan(p, tokens, splits));
  } else {
    if (!awq::cuda::gemm_sm90_can(p, gpu)) return found;
    found.push_back(awq::cuda::gemm_sm90_plan(p, gpu));
    for (const int tokens : awq::cuda::kSm90Tokens)
      for (const int cluster : awq::cuda::kSm90Clusters)
        if ((tokens < 2 * p.m || tokens == awq::cuda::kSm90Tokens[0]) && (p.m <= 8 * tokens || tokens >= 128))
          found.push_back(awq::cuda::sm90_plan(p, gpu, tokens, cluster));
  }
  return found;
}

/// Median seconds of a launch.
double seconds(const Case& c, const CudaPlan& plan, void* workspace, cudaStream_t stream) {
  cudaGraph_t graph;
  cudaGraphExec_t play;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (std::size_t i = 0; i < c.copies; ++i) check(launch(c.args(i), plan, workspace, stream), "launch");
  check(cudaStreamEndCapture(stream, &graph), "capture");
  check(cudaGraphInstantiate(&play, graph, 0), "graph");
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "event"), check(cudaEventCreate(&end), "event");
  std::vector<double> times;
  for (int i = 0; i < kRepeats + 3; ++i) {
    check(cudaEventRecord(begin, stream), "record");
    check(cudaGraphLaunch(play, stream), "replay");
    check(cudaEventRecord(end, stream), "record");
    check(cudaEventSynchronize(end), "kernel");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "time");
    if (i >= 3) times.push_back(ms / 1e3 / static_cast<double>(c.copies));
  }
  cudaEventDestroy(begin), cudaEventDestroy(end), cudaGraphExecDestroy(play), cudaGraphDestroy(graph);
  std::nth_element(times.begin(), times.begin() + kRepeats / 2, times.end());
  return times[kRepeats / 2];
}

void sweep(CudaKernel kernel, const CudaProblem& p, const Gpu& gpu, bool timed, cudaStream_t stream) {
  const Case c(p, timed);
  bool own = true;
  for (const CudaPlan& plan : plans(kernel, p, gpu)) {
    void* workspace = nullptr;
    if (plan.workspace_bytes > 0)
      check(cudaMalloc(&workspace, static_cast<std::size_t>(plan.workspace_bytes)), "memory");
    check(cudaMemset(c.y.device, 0xff, c.y.bytes()), "poison");  // a NaN for each output
    check(launch(c.args(0), plan, workspace, stream), "launch");
    check(cudaStreamSynchronize(stream), plan.name);
    const double error = c.error(), limit = p.x_type == DType::f16 ? 1e-3 : 8e-3;
    const double time = timed && error <= limit ? seconds(c, plan, workspace, stream) : 0;
    const double bytes = static_cast<double>(c.words.bytes() + c.zeros.bytes() + c.scales.bytes());
    std::printf(
        "{\"name\": \"%s\", \"m\": %lld, \"n\": %lld, \"k\": %lld, \"group\": %lld, \"dtype\": \"%s\", "
        "\"own_choice\": %s, \"tile_n\": %d, \"tile_m\": %d, \"cluster\": %d, \"splits\": %d, \"stages\": %d, "
        "\"blocks\": %lld, \"shared_bytes\": %d, \"copies\": %zu, \"error\": %.3e, \"seconds\": %.9f, "
        "\"bytes_per_second\": %.6e}\n",
        plan.name, static_cast<long long>(p.m), static_cast<long long>(p.n), static_cast<long long>(p.k),
        static_cast<long long>(p.group), p.x_type == DType::f16 ? "float16" : "bfloat16", own ? "true" : "false",
        plan.tile_n, plan.tile_m, plan.cluster, plan.splits, plan.stages,
        static_cast<long long>(plan.grid_x * std::max<std::int64_t>(1, plan.grid_y)), plan.shared_bytes, c.copies,
        error, time, time > 0 ? bytes / time : 0.0);
    std::fflush(stdout);
    cudaFree(workspace);
    if (!(error <= limit)) fail(std::string(plan.name) + ": error above its limit");
    own = false;
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  if (name != "decode" && name != "gemm_sm80" && name != "gemm_sm90")
    fail("awq_gpu_sweep decode|gemm_sm80|gemm_sm90 [--bf16] [--check] [NxK ...]", 2);
  DType type = DType::f16;
  bool timed = true;
  std::vector<std::pair<std::int64_t, std::int64_t>> shapes;
  for (int i = 2; i < argc; ++i) {
    long long n = 0, k = 0;
    if (!std::strcmp(argv[i], "--bf16"))
      type = DType::bf16;
    else if (!std::strcmp(argv[i], "--check"))
      timed = false;
    else if (std::sscanf(argv[i], "%lldx%lld", &n, &k) == 2)
      shapes.emplace_back(n, k);
    else
      fail(std::string("what is ") + argv[i], 2);
  }
  check(cudaSetDevice(0), "no CUDA device");
  int major = 0, minor = 0;
  Gpu gpu{};
  const auto ask = [](int* value, cudaDeviceAttr what) { check(cudaDeviceGetAttribute(value, what, 0), "device"); };
  ask(&major, cudaDevAttrComputeCapabilityMajor), ask(&minor, cudaDevAttrComputeCapabilityMinor);
  ask(&gpu.sms, cudaDevAttrMultiProcessorCount), ask(&gpu.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  gpu.arch = 10 * major + minor;
  const CudaKernel kernel = name == "decode"      ? CudaKernel::decode
                            : name == "gemm_sm80" ? CudaKernel::gemm_sm80
                                                  : CudaKernel::gemm_sm90;
  if (kernel == CudaKernel::gemm_sm90 ? gpu.arch != 90 : kernel == CudaKernel::gemm_sm80 && gpu.arch < 80)
    fail(name + " does not run on this GPU", 3);
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");

  if (!timed) {
    const std::vector<std::int64_t> rows =
        kernel == CudaKernel::decode ? std::vector<std::int64_t>{1, 3, 16} : std::vector<std::int64_t>{17, 70};
    for (const std::int64_t m : rows)
      for (const std::int64_t group : {32, 64, 320})
        sweep(kernel, {m, 200, 320, group, type, type}, gpu, false, stream);
    return 0;
  }
  if (shapes.empty()) shapes = {{4096, 4096}, {6144, 4096}, {28672, 4096}, {4096, 14336}, {8192, 8192}, {57344, 8192}};
  const std::vector<std::int64_t> rows =
      kernel == CudaKernel::decode ? std::vector<std::int64_t>{1, 2, 4, 8, 16}
                                   : std::vector<std::int64_t>{8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096};
  for (const auto& [n, k] : shapes)
    for (const std::int64_t m : rows) sweep(kernel, {m, n, k, 128, type, type}, gpu, true, stream);
  return 0;
}
