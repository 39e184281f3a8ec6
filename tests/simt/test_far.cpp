// Calls of which every array has more elements than an int counts: their last blocks, played in reserved addresses,
// where only what is touched takes memory.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <list>
#include <new>
#include <vector>

#include "core/quantize.h"
#include "cpp/catch.hpp"
#include "cpp/data.h"
#include "cuda/decode.h"
#include "cuda/device_code.h"
#include "cuda/gemm_sm80.h"
#include "cuda/gemm_sm90.h"
#include "play.h"

using namespace awq;
using core::DType;
using cuda::CudaPlan;
using cuda::CudaProblem;

namespace {

constexpr cuda::Gpu kHopper = *cuda::find_gpu(90), kAda = *cuda::find_gpu(89);

/// Zeros, until they are written.
template <class T>
class Far {
 public:
  explicit Far(std::int64_t count) : bytes_(static_cast<std::size_t>(count) * sizeof(T)) {
    void* const p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<T*>(p);
  }
  Far(const Far&) = delete;
  ~Far() { munmap(data_, bytes_); }

  T* data() { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  std::size_t bytes_;
  T* data_;
};

/// The last blocks of the call write their tile of y, and nothing else, as float64 has it.
void check_last(const CudaProblem& p, std::int64_t x_stride, const CudaPlan& plan) {
  const auto [m, n, k, group, x_type, scale_type] = p;
  CAPTURE(m, n, k, group, x_stride, plan.name, plan.splits, plan.cluster);
  REQUIRE((x_type == DType::f16 && scale_type == DType::f16 && n % plan.tile_n == 0));
  const std::int64_t groups = k / group, first_n = n - plan.tile_n;
  const std::int64_t first_m = (m - 1) / plan.tile_m * plan.tile_m;
  const core::WordShape of_words = core::word_shape(core::kFragments, n, k);
  const core::WordShape of_zeros = core::word_shape(core::kFragmentZeros, n, groups);
  Far<std::uint16_t> x((m - 1) * x_stride + k), scales(groups * n), y(m * n);
  Far<std::uint32_t> words(of_words.rows * of_words.cols), zeros(of_zeros.rows * of_zeros.cols);
  Far<float> bias(n), workspace(plan.workspace_bytes / 4 + 1);

  test::Random random(9);
  for (std::int64_t row = first_m; row < m; ++row)
    for (std::int64_t i = 0; i < k; ++i)
      core::store_as(x.data(), DType::f16, row * x_stride + i, static_cast<float>(random.uniform(-1, 1)));
  // The last two panels of the weight are a weight of 128 columns.
  std::uint32_t* const last_words = words.data() + (of_words.rows - 2) * of_words.cols;
  std::uint32_t* const last_zeros = zeros.data() + (of_zeros.rows - 2) * of_zeros.cols;
  std::uint16_t* const last_scales = scales.data() + groups * (n - 128);
  for (std::int64_t i = 0; i < 2 * of_words.cols; ++i) last_words[i] = random.bits();
  for (std::int64_t i = 0; i < 2 * of_zeros.cols; ++i) last_zeros[i] = random.bits();
  for (std::int64_t i = 0; i < 128 * groups; ++i)
    core::store_as(last_scales, DType::f16, i, static_cast<float>(random.uniform(0.01, 0.1)));
  for (std::int64_t i = first_n; i < n; ++i) bias.data()[i] = static_cast<float>(random.uniform(-1, 1));

  core::LinearArgs a{};
  a.m = m, a.n = n, a.k = k, a.group = group, a.x_stride = x_stride;
  a.x_type = x_type, a.scale_type = scale_type, a.bias_type = DType::f32;
  a.x = x.data(), a.qweight = words.data(), a.qzeros = zeros.data(), a.scales = scales.data(), a.bias = bias.data();
  a.y = y.data();
  std::list<simt::Global> allowed;
  allowed.emplace_back(x.data(), x.bytes(), false, "x");
  allowed.emplace_back(words.data(), words.bytes(), false, "qweight");
  allowed.emplace_back(zeros.data(), zeros.bytes(), false, "qzeros");
  allowed.emplace_back(scales.data(), scales.bytes(), false, "scales");
  allowed.emplace_back(bias.data(), bias.bytes(), false, "bias");
  for (std::int64_t row = first_m; row < m; ++row) {
    allowed.emplace_back(y.data() + row * n + first_n, static_cast<std::size_t>(plan.tile_n) * 2, true, "y");
    allowed.back().uninitialised();
    for (int split = 0; split < plan.splits && plan.workspace_bytes > 0; ++split) {
      // The last block of the kernel that adds has more columns than that of the kernel before it.
      const std::int64_t columns = std::max<std::int64_t>(plan.tile_n, 512);
      allowed.emplace_back(workspace.data() + (split * m + row) * n + n - columns,
                           static_cast<std::size_t>(columns) * 4, true, "workspace");
    }
  }
  if (plan.workspace_bytes > 0)
    for (std::int64_t row = first_m; row < m; ++row)
      allowed.emplace_back(y.data() + row * n + n - 512, static_cast<std::size_t>(512 - plan.tile_n) * 2, true, "y");
  simt::play(a, plan, workspace.data(), {.seed = 3}, simt::Blocks::last_tile);

  std::vector<float> w(static_cast<std::size_t>(128 * k));
  core::dequantize_rows(
      {last_words, last_zeros, last_scales, w.data(), 128, k, group, scale_type, DType::f32, core::Order::fragments}, 0,
      128);
  for (std::int64_t row = first_m; row < m; ++row)
    for (std::int64_t col = first_n; col < n; ++col) {
      double sum = bias.data()[col], terms = std::fabs(sum);
      for (std::int64_t i = 0; i < k; ++i) {
        const double term = core::load_as<double>(x.data(), DType::f16, row * x_stride + i) *
                            w[static_cast<std::size_t>((col - n + 128) * k + i)];
        sum += term, terms += std::fabs(term);
      }
      const double value = core::load_as<double>(y.data(), DType::f16, row * n + col);
      CAPTURE(row, col, value, sum);
      REQUIRE(std::fabs(value - sum) <= 0x1p-11 * std::fabs(sum) + 2.0 * static_cast<double>(k) * 0x1p-24 * terms);
    }
}

constexpr std::int64_t kWide = std::int64_t{3} << 27, kTall = std::int64_t{1} << 20;

}  // namespace

TEST_CASE("offsets beyond 2^31: every array of a linear call") {
  const auto wide = [](std::int64_t m) { return CudaProblem{m, kWide, 128, 16, DType::f16, DType::f16}; };
  check_last(wide(16), kWide, cuda::decode_plan(wide(16), kHopper, 3, 2));
  check_last(wide(9), kWide, cuda::decode_plan(wide(9), kAda, 2, 2));
  check_last(wide(17), kWide, cuda::gemm_sm80_plan(wide(17), 32, 1));
  check_last(wide(17), kWide, cuda::gemm_sm80_plan(wide(17), 32, 2));
  const auto in_tiles = [](const CudaProblem& p, int tokens, int cluster) {
    CudaPlan plan = cuda::sm90_plan(p, kHopper, tokens, cluster);
    plan.grid_x = core::ceil_div(p.n, plan.tile_n) * core::ceil_div(p.m, tokens) * cluster;
    return plan;
  };
  check_last(wide(33), kWide, in_tiles(wide(33), 64, 1));
  const CudaProblem tall{kTall - 5, 4096, 128, 64, DType::f16, DType::f16};
  check_last(tall, 4096, cuda::gemm_sm80_plan(tall, 64, 1));
  check_last(tall, 4096, in_tiles(tall, 32, 2));
}

TEST_CASE("offsets beyond 2^31: weights that are dequantized and converted") {
  constexpr std::int64_t n = kWide, k = 128, group = 16, groups = k / group, first = n - 64;
  test::Random random(10);
  const auto fill = [&](const core::Codes& codes, std::int64_t width, std::uint32_t* words) {
    const auto q = random.codes(64 * width);
    for (std::int64_t i = 0; i < 64 * width; ++i) {
      const core::CodePlace at = core::locate(codes, n, width, first + i / width, i % width);
      words[at.word] |= std::uint32_t{q[static_cast<std::size_t>(i)]} << 4 * at.nibble;
    }
    return q;
  };
  for (const bool fragments : {false, true}) {
    CAPTURE(fragments);
    const core::Codes& codes = fragments ? core::kFragments : core::kAlongN;
    Far<std::uint32_t> words(n * k / 8), zeros(n * groups / 8);
    Far<float> scales(groups * n);
    Far<std::uint16_t> w(n * k);
    const auto q = fill(codes, k, words.data());
    const auto z = fill(fragments ? core::kFragmentZeros : core::kAlongN, groups, zeros.data());
    const auto scale_of = [&](std::int64_t row, std::int64_t g) -> float& {
      return scales.data()[fragments ? core::fragment_scale(n, groups, g, row) : g * n + row];
    };
    for (std::int64_t i = 0; i < 64 * groups; ++i)
      scale_of(first + i / groups, i % groups) = static_cast<float>(random.uniform(0.01, 0.1));
    const core::DequantizeArgs args{words.data(),
                                    zeros.data(),
                                    scales.data(),
                                    w.data(),
                                    n,
                                    k,
                                    group,
                                    DType::f32,
                                    DType::f16,
                                    fragments ? core::Order::fragments : core::Order::awq};
    // A tile of gemm has 256 rows and 64 along k, one of fragments 64 and 128.
    for (int i = 1; i <= (fragments ? 1 : 2); ++i)
      for (int thread = 0; thread < cuda::kThreads; ++thread)
        if (fragments)
          cuda::dequantize_fragments<DType::f32, DType::f16, true>(args, cuda::FragmentTiles{{n, k}}.count() - i,
                                                                   thread);
        else
          cuda::dequantize_block<DType::f32, DType::f16, true>(args, cuda::BlockTiles{{n, k}}.count() - i, thread);
    Far<std::uint8_t> unpacked(n * k);
    Far<std::uint32_t> packed(n * k / 8);
    const cuda::SquareTiles tiles{{n, k}};
    std::vector<std::uint8_t> shared(cuda::kTile * cuda::kTileStride);
    const auto every_thread = [&](const auto& part, std::int64_t tile) {
      for (int thread = 0; thread < cuda::kThreads; ++thread) part(shared.data(), tiles, tile, thread);
    };
    for (int i = 1; i <= 2; ++i) {
      every_thread(cuda::ReadWords{codes, words.data()}, tiles.count() - i);
      every_thread(cuda::WriteCodes{unpacked.data()}, tiles.count() - i);
      every_thread(cuda::ReadCodes{unpacked.data()}, tiles.count() - i);
      every_thread(cuda::WriteWords{codes, packed.data()}, tiles.count() - i);
    }
    for (std::int64_t i = 0; i < 64 * k; ++i) {
      const std::int64_t row = first + i / k, col = i % k, g = col / group;
      const int code = q[static_cast<std::size_t>(i)], zero = z[static_cast<std::size_t>(i / k * groups + g)];
      const float weight = static_cast<float>(code - zero) * scale_of(row, g);
      REQUIRE(w.data()[row * k + col] == core::float_to_half(weight));
      REQUIRE(unpacked.data()[row * k + col] == code);
      const std::int64_t word = core::locate(codes, n, k, row, col).word;
      REQUIRE(packed.data()[word] == words.data()[word]);
    }
  }
}
