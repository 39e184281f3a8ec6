// The searches' CUDA kernels, played on the host, against core's: rounding errors bit for bit, sums within the bound of
// their rounding errors, choices that are the same or lose as little.
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "core/kernels.h"
#include "core/search.h"
#include "cpp/catch.hpp"
#include "cpp/data.h"
#include "cpp/search_problem.h"
#include "cuda/product.cuh"
#include "cuda/search.cuh"
#include "simt/simt.h"

using namespace awq;
using namespace awq::cuda;
using core::DType;
using core::Rounding;
using test::Random;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// Plays a body on so few blocks that they have to stride, or on so many that some have nothing to do.
template <class Args>
void play(void (*body)(const Args&), const Args& args, std::uint32_t shared_bytes = 0, std::int64_t blocks = 3) {
  static std::uint64_t seed = 0;
  simt::run({.grid_x = blocks, .threads = kThreads, .shared_bytes = shared_bytes}, {.seed = seed++ % 5},
            [&] { body(args); });
}

/// Numbers that kernels only read.
template <class T>
class Given {
 public:
  explicit Given(std::vector<T> values)
      : values_(std::move(values)), global_(values_.data(), values_.size() * sizeof(T), false) {}
  operator const T*() const { return values_.data(); }
  const T& operator[](std::int64_t i) const { return values_[static_cast<std::size_t>(i)]; }

 private:
  std::vector<T> values_;
  simt::Global global_;
};

/// Numbers that kernels write, each of them before it is read.
template <class T>
class Made {
 public:
  explicit Made(std::int64_t size) : buffer_(static_cast<std::size_t>(size)) { buffer_.global().uninitialised(); }
  operator T*() { return buffer_.data(); }
  const T& operator[](std::int64_t i) const { return buffer_[static_cast<std::size_t>(i)]; }
  bool whole() const { return const_cast<simt::Buffer<T>&>(buffer_).global().all_written(); }

 private:
  simt::Buffer<T> buffer_;
};

template <class T>
bool same_bits(const T* a, const T* b, std::int64_t count) {
  return std::memcmp(a, b, static_cast<std::size_t>(count) * sizeof(T)) == 0;
}

void play_losses(const LossArgs& args) {
  play(loss_body, args, kProductShared);
  play(row_loss_body, args);
}

std::vector<double> played_losses(const float* d, const float* gram, std::int64_t batches, std::int64_t rows,
                                  std::int64_t k, std::int64_t stride, const float* verdict = nullptr) {
  Made<double> partial(batches * product_tiles(k) * rows), loss(batches * rows);
  play_losses({d, gram, batches, rows, k, stride, partial, verdict, loss});
  REQUIRE(partial.whole());
  REQUIRE(loss.whole());
  return {static_cast<double*>(loss), static_cast<double*>(loss) + batches * rows};
}

/// core's range of each group.
std::vector<float> clip_on_cpu(const float* w, const float* gram, std::int64_t n, std::int64_t k, std::int64_t group,
                               Rounding to, std::int64_t grid, double max_shrink) {
  const core::Kernels& kernels = core::portable_kernels();
  const core::SearchArgs args{w, n, k, group, to, &kernels};
  const std::int64_t groups = k / group, size = core::triangle_size(group, kernels.panel);
  std::vector<float> triangles(static_cast<std::size_t>(groups * size)),
      scratch(static_cast<std::size_t>(core::clip_scratch_size(args, grid))),
      range(static_cast<std::size_t>(n * groups * 2));
  for (std::int64_t g = 0; g < groups; ++g)
    core::pack_triangle(gram + g * group * (k + 1), k, group, kernels.panel, triangles.data() + g * size);
  core::clip_rows(args, triangles.data(), grid, max_shrink, 0, n, scratch.data(), range.data());
  return range;
}

/// The same by the kernels, `most` rows at a time.
std::vector<float> clip_played(const float* w, const float* gram, std::int64_t n, std::int64_t k, std::int64_t group,
                               Rounding to, std::int64_t grid, double max_shrink, std::int64_t most) {
  const std::int64_t groups = k / group, tries = grid + 1;
  Made<float> poison(k), range(n * groups * 2), d(most * tries * k);
  Made<double> best(n * groups), partial(groups * product_tiles(group) * most * tries), loss(groups * most * tries);
  ClipArgs a{};
  a.w = w, a.gram = gram, a.n = n, a.k = k, a.group = group, a.gram_stride = k, a.to = to, a.candidates = tries;
  a.poison = poison, a.range = range, a.best = best, a.d = d, a.loss = loss;
  play(clip_poison_body, a);
  play(clip_start_body, a);
  for_clip_tries(
      a, {a.d, a.gram, groups, most * tries, group, k, partial, nullptr, loss}, most,
      max_shrink / static_cast<double>(grid), [](const ClipArgs& part) { play(clip_error_body, part); }, play_losses,
      [](const ClipArgs& part) { play(clip_choose_body, part); });
  REQUIRE(range.whole());
  return {static_cast<float*>(range), static_cast<float*>(range) + n * groups * 2};
}

double clip_loss(const float* w, const float* block, std::int64_t k, std::int64_t group, const float* range,
                 Rounding to, double& bound) {
  const core::GroupParameters p = core::group_parameters(range[0], range[1], to);
  std::vector<float> d;
  for (std::int64_t i = 0; i < group; ++i) d.push_back(core::dequantize_code(core::round_code(w[i], p), p) - w[i]);
  const test::Loss loss = test::exact_loss(d.data(), block, k, group);
  bound = test::rounding_bound(loss, group);
  return loss.value;
}

}  // namespace

TEST_CASE("search: w_mean is that of core but for the order of its sums") {
  Random random(80);
  struct Shape {
    std::int64_t n, k, group;
  };
  for (const Shape& s : {Shape{1, 8, 8}, {65, 12, 4}, {130, 66, 33}, {3, 300, 100}, {0, 40, 8}, {64, 7, 1}}) {
    const auto [n, k, group] = s;
    CAPTURE(n, k, group);
    const Given<float> w(random.floats(n * k + 1, -2.0, 2.0));
    Made<float> inverse(n * (k / group)), w_mean(k);
    Made<double> sums(mean_chunks(n) * k);
    const MeanArgs args{w, n, k, group, inverse, sums, w_mean};
    play(mean_inverse_body, args);
    play(mean_sums_body, args);
    play(mean_body, args, 0, 1 + k / 100);
    REQUIRE(w_mean.whole());
    std::vector<float> expected(static_cast<std::size_t>(k));
    core::weight_means({w, n, k, group, {}, nullptr}, 0, k / group, expected.data());
    for (std::int64_t i = 0; i < k; ++i) {
      const float want = expected[static_cast<std::size_t>(i)];
      CHECK(std::fabs(w_mean[i] - want) <= 0x1p-23f * want);  // a neighbour, where the sums fall between two floats
    }
  }
}

TEST_CASE("search: candidates are those of core") {
  Random random(81);
  for (const std::int64_t k : {1, 30, 600})
    for (const std::int64_t grid : {1, 5})
      for (const bool duo : {true, false})
        for (const bool with_tie : {false, true}) {
          CAPTURE(k, grid, duo, with_tie);
          const std::int64_t count = core::candidate_count(grid, duo);
          std::vector<float> means = random.floats(k, 0.0, 3.0), weights = random.floats(k, 0.0, 1.0);
          for (std::int64_t i = 0; i < k; i += 7) means[static_cast<std::size_t>(i)] = 0.0f;
          for (std::int64_t i = 0; i < k; i += 11) weights[static_cast<std::size_t>(i)] = 0.0f;
          if (k == 600) means[5] = 3e38f, means[6] = 1e-45f;
          std::vector<std::int64_t> numbers;
          for (std::int64_t i = 0; i < k; ++i) numbers.push_back(random.bits() % (k / 3 + 1));
          const Given<float> x_mean(means), w_mean(weights);
          const Given<std::int64_t> tie(numbers);
          Made<double> scales(count * k), tied(count * k);
          Made<float> candidates(count * k);
          const std::int64_t* ties = with_tie ? static_cast<const std::int64_t*>(tie) : nullptr;
          const CandidateArgs args{x_mean, w_mean, ties, k, grid, count, scales, tied, candidates};
          play(raw_scales_body, args);
          if (with_tie) play(tied_scales_body, args);
          play(candidates_body, args, kTotalsShared);
          REQUIRE(candidates.whole());
          std::vector<float> expected(static_cast<std::size_t>(count * k));
          core::scale_candidates(x_mean, w_mean, ties, k, grid, duo, expected.data());
          CHECK(same_bits<float>(candidates, expected.data(), count * k));
        }
}

TEST_CASE("search: an x_mean that a CPU refuses gives no candidate; a weight that is not finite gives 1") {
  constexpr std::int64_t k = 40, grid = 3, count = 7;
  for (const float bad : {kNan, kInfinity, -1.0f, 0.0f}) {
    CAPTURE(bad);
    std::vector<float> means(k, 1.5f), weights(k, 0.5f);
    means[33] = bad, weights[2] = kNan, weights[3] = kInfinity;
    const Given<float> x_mean(means), w_mean(weights);
    Made<double> scales(count * k);
    Made<float> candidates(count * k);
    const CandidateArgs args{x_mean, w_mean, nullptr, k, grid, count, scales, nullptr, candidates};
    play(raw_scales_body, args);
    play(candidates_body, args, kTotalsShared);
    int finite = 0;
    for (std::int64_t i = 0; i < count * k; ++i) finite += candidates[i] > 0.0f && candidates[i] < kInfinity;
    CHECK(finite == (bad == 0.0f ? count * k : 0));
    if (bad == 0.0f) CHECK(candidates[(grid + 1) * k + 2] == 1.0f);
  }
}

TEST_CASE("search: errors of candidates have core's bits, whatever part of the items is asked for") {
  Random random(82);
  struct Shape {
    std::int64_t n, k, group;
  };
  for (const Shape& s : {Shape{3, 64, 32}, {5, 66, 33}, {2, 300, 300}, {7, 24, 8}, {2, 128, 64}, {4, 12, 1}})
    for (const std::int64_t bits : {2, 3, 4, 8})
      for (const bool zero_point : {true, false}) {
        const auto [n, k, group] = s;
        const DType type = test::kFloatTypes[random.bits() % 3];
        const Rounding to{zero_point, type, core::last_code(bits)};
        CAPTURE(n, k, group, bits, zero_point, int(type));
        constexpr std::int64_t count = 3;
        const Given<float> w(random.floats(n * k, -0.7, 1.0)), candidates(random.floats(count * k, 0.25, 4.0));
        const std::int64_t first = n / 2, items = count * n - first - 1;
        Made<float> d(items * k), verdict(items);
        play(scale_error_body, ScaleErrorArgs{w, candidates, n, k, group, first, items, to, d, verdict});
        REQUIRE(d.whole());
        REQUIRE(verdict.whole());
        for (std::int64_t item = 0; item < items; ++item) {
          const float* scale = candidates + (first + item) / n * k;
          std::vector<float> inverse, expected(static_cast<std::size_t>(k));
          for (std::int64_t i = 0; i < k; ++i) inverse.push_back(1.0f / scale[i]);
          REQUIRE(core::portable_kernels().quantization_error(w + (first + item) % n * k, scale, inverse.data(),
                                                              expected.data(), k, group, to));
          REQUIRE(same_bits(d + item * k, expected.data(), k));
          REQUIRE(verdict[item] == 0.0f);
        }
      }
}

TEST_CASE("search: a row that no scale holds has the loss infinity, a candidate that is none NaN, others their own") {
  constexpr std::int64_t n = 4, k = 64, count = 4;
  Random random(83);
  for (const float bad : {kNan, kInfinity, -kInfinity, 1e7f}) {
    CAPTURE(bad);
    std::vector<float> weights = random.floats(n * k, -1.0, 1.0), scales(count * k, 1.0f);
    weights[2 * k + 40] = bad;  // 1e7: its scale overflows float16
    scales[1 * k + 3] = 0.0f, scales[2 * k + 50] = kInfinity, scales[3 * k + 7] = kNan;
    const Given<float> w(weights), candidates(scales), gram(test::gram_matrix(k, 100, random));
    Made<float> d(count * n * k), verdict(count * n);
    play(scale_error_body, ScaleErrorArgs{w, candidates, n, k, 32, 0, count * n, {true, DType::f16}, d, verdict});
    const std::vector<double> loss = played_losses(d, gram, 1, count * n, k, k, verdict);
    for (std::int64_t row = 0; row < count * n; ++row) {
      const double got = loss[static_cast<std::size_t>(row)];
      CAPTURE(row, got);
      if (row >= n)
        CHECK(std::isnan(got));
      else if (row == 2)
        CHECK(got == kInfinity);
      else
        CHECK((got > 0.0 && got < 1.0));
    }
  }
}

TEST_CASE("search: losses are d G d^T, of the upper triangle alone, batch by batch") {
  Random random(84);
  struct Shape {
    std::int64_t batches, rows, k;
  };
  for (const Shape& s :
       {Shape{1, 1, 1}, {1, 130, 20}, {3, 5, 33}, {1, 3, 260}, {2, 129, 8}, {1, 7, 128}, {1, 2, 129}}) {
    const auto [batches, rows, k] = s;
    CAPTURE(batches, rows, k);
    const std::int64_t size = batches * k, stride = size;
    std::vector<float> symmetric = test::gram_matrix(size, 20, random), upper = symmetric;
    for (std::int64_t i = 0; i < size; ++i)
      for (std::int64_t j = 0; j < size; ++j)
        if (j < i || i / k != j / k) upper[static_cast<std::size_t>(i * size + j)] = kNan;  // nobody reads it
    const Given<float> gram(upper), d(random.floats(batches * rows * k, -0.1, 0.1));
    const std::vector<double> loss = played_losses(d, gram, batches, rows, k, stride);
    for (std::int64_t row = 0; row < batches * rows; ++row) {
      const float* block = symmetric.data() + row / rows * k * (stride + 1);
      const test::Loss expected = test::exact_loss(d + row * k, block, stride, k);
      CAPTURE(row, expected.value);
      REQUIRE(std::fabs(loss[static_cast<std::size_t>(row)] - expected.value) <= test::rounding_bound(expected, k));
    }
  }
}

TEST_CASE("search: where G is its diagonal, losses are sums of squares, and a verdict takes their place") {
  Random random(90);
  for (const std::int64_t k : {1, 31, 64, 200})
    for (const std::int64_t batches : {1, 3}) {
      constexpr std::int64_t rows = 11;
      const Given<float> d(random.floats(batches * rows * k, -0.1, 0.1)),
          diagonal(random.floats(batches * k, 0.0, 3.0));
      std::vector<float> verdicts(static_cast<std::size_t>(batches * rows));
      verdicts[2] = kInfinity;
      const Given<float> verdict(verdicts);
      Made<double> loss(batches * rows);
      play(diagonal_loss_body, LossArgs{d, diagonal, batches, rows, k, 0, nullptr, verdict, loss});
      REQUIRE(loss.whole());
      for (std::int64_t row = 0; row < batches * rows; ++row) {
        double expected = verdicts[static_cast<std::size_t>(row)];
        for (std::int64_t i = 0; i < k; ++i)
          expected += static_cast<double>(d[row * k + i]) * d[row * k + i] * diagonal[row / rows * k + i];
        CAPTURE(k, batches, row, expected);
        REQUIRE((loss[row] == expected || std::fabs(loss[row] - expected) <= 1e-6 * expected));
      }
    }
}

TEST_CASE("search: losses of all items are those of core, however many are worked on at a time") {
  constexpr std::int64_t n = 5, k = 150, group = 50, count = 3, items = n * count;
  Random random(89);
  const Rounding to{true, DType::bf16, core::last_code(3)};
  const core::Kernels& kernels = core::portable_kernels();
  const Given<float> w(random.floats(n * k, -0.7, 1.0)), candidates(random.floats(count * k, 0.25, 4.0));
  const Given<float> gram(test::gram_matrix(k, 2 * k, random));
  const core::SearchArgs args{w, n, k, group, to, &kernels};
  std::vector<float> triangle(static_cast<std::size_t>(core::triangle_size(k, kernels.panel))), inverse,
      scratch(static_cast<std::size_t>(core::scale_scratch_size(args)));
  core::pack_triangle(gram, k, k, kernels.panel, triangle.data());
  std::vector<double> expected(items);
  for (std::int64_t i = 0; i < count * k; ++i) inverse.push_back(1.0f / candidates[i]);
  for (std::int64_t c = 0; c < count; ++c)
    core::scale_losses(args, triangle.data(), candidates + c * k, inverse.data() + c * k, 0, n, scratch.data(),
                       expected.data() + c * n);
  for (const std::int64_t most : {1, 4, 7, 15}) {
    Made<float> d(most * k), verdict(most);
    Made<double> partial(product_tiles(k) * most), loss(items);
    for_scale_items(
        {w, candidates, n, k, group, 0, items, to, d, verdict}, {d, gram, 1, most, k, k, partial, verdict, loss}, most,
        [](const ScaleErrorArgs& part) { play(scale_error_body, part); }, play_losses);
    REQUIRE(loss.whole());
    for (std::int64_t item = 0; item < items; ++item) {
      const double want = expected[static_cast<std::size_t>(item)];
      CAPTURE(most, item, want);
      CHECK(std::fabs(loss[item] - want) <= 1e-4 * want);
    }
  }
}

TEST_CASE("search: totals count rows by their weights, and the first of the smallest wins") {
  Random random(85);
  for (const std::int64_t n : {0, 1, 300, 1000}) {
    constexpr std::int64_t count = 6, k = 70;
    std::vector<double> losses(static_cast<std::size_t>(count * n + 1));
    std::vector<float> importance(static_cast<std::size_t>(n + 1));
    for (double& loss : losses) loss = random.uniform(1.0, 2.0);
    for (float& weight : importance) weight = random.bits() % 3 == 0 ? 0.0f : static_cast<float>(random.uniform(0, 2));
    for (std::int64_t row = 0; row < n; ++row) {
      losses[static_cast<std::size_t>(4 * n + row)] = losses[static_cast<std::size_t>(2 * n + row)] *= 0.5;
      if (importance[static_cast<std::size_t>(row)] == 0.0f) losses[static_cast<std::size_t>(row)] = kInfinity;
    }
    for (const bool weighted : {true, false}) {
      CAPTURE(n, weighted);
      const Given<double> row_loss(losses);
      const Given<float> row_weight(importance), candidates(random.floats(count * k, 0.1, 3.0));
      Made<double> total(count);
      Made<float> scale(k);
      const TotalArgs args{
          row_loss, weighted ? static_cast<const float*>(row_weight) : nullptr, candidates, count, n, k, total, scale};
      play(total_body, args, kTotalsShared);
      play(choose_scale_body, args);
      for (std::int64_t c = 0; c < count; ++c) {
        double want = 0.0;
        for (std::int64_t row = 0; row < n; ++row)
          if (const double weight = weighted ? row_weight[row] : 1.0; weight > 0.0)
            want += weight * row_loss[c * n + row];
        CAPTURE(c, want);
        CHECK((total[c] == want || std::fabs(total[c] - want) <= 1e-12 * want));
      }
      CHECK(same_bits<float>(scale, candidates + (n > 0 ? 2 : 0) * k, k));
    }
  }
}

TEST_CASE("search: no finite loss, no scale; a weight that is none makes every loss NaN") {
  constexpr std::int64_t count = 3, n = 2, k = 5;
  const Given<float> candidates(std::vector<float>(count * k, 1.0f));
  for (const float weight : {1.0f, kNan, -1.0f, kInfinity}) {
    const double lost = weight == 1.0f ? kInfinity : 1.0;
    const Given<double> row_loss({lost, 1.0, 1.0, lost, kNan, 1.0});
    const Given<float> row_weight({weight, 1.0f});
    Made<double> total(count);
    Made<float> scale(k);
    const TotalArgs args{row_loss, row_weight, candidates, count, n, k, total, scale};
    play(total_body, args, kTotalsShared);
    play(choose_scale_body, args);
    CAPTURE(weight, total[0]);
    CHECK((weight == 1.0f ? total[0] == kInfinity : std::isnan(total[0])));
    for (std::int64_t i = 0; i < k; ++i) CHECK(std::isnan(scale[i]));
  }
}

TEST_CASE("search: ranges are core's, or lose as little") {
  Random random(86);
  struct Shape {
    std::int64_t n, k, group, most;
  };
  int groups = 0, others = 0;
  for (const Shape& s : {Shape{3, 64, 32, 2}, {2, 66, 33, 2}, {1, 140, 140, 1}, {5, 24, 8, 4}, {4, 6, 1, 4}})
    for (const std::int64_t bits : {2, 3, 4, 8})
      for (const bool zero_point : {true, false}) {
        const auto [n, k, group, most] = s;
        const Rounding to{zero_point, test::kFloatTypes[random.bits() % 3], core::last_code(bits)};
        CAPTURE(n, k, group, bits, zero_point);
        std::vector<float> weights = random.floats(n * k, -0.4, 0.6);
        for (std::int64_t i = 0; i < n * k; i += 13) weights[static_cast<std::size_t>(i)] *= 3.0f;
        std::fill_n(weights.begin(), group, 0.0f);
        const Given<float> w(weights), gram(test::gram_matrix(k, 2 * k, random));
        const std::int64_t grid = 1 + random.bits() % 12;
        const auto want = clip_on_cpu(w, gram, n, k, group, to, grid, 0.6);
        const auto got = clip_played(w, gram, n, k, group, to, grid, 0.6, most);
        for (std::int64_t i = 0; i < n * (k / group); ++i, ++groups) {
          const float *theirs = &want[static_cast<std::size_t>(2 * i)], *ours = &got[static_cast<std::size_t>(2 * i)];
          if (theirs[0] == ours[0] && theirs[1] == ours[1]) continue;
          ++others;
          double bound = 0.0, other_bound = 0.0;
          const float* block = gram + i % (k / group) * group * (k + 1);
          const double loss = clip_loss(w + i * group, block, k, group, ours, to, bound);
          const double least = clip_loss(w + i * group, block, k, group, theirs, to, other_bound);
          CHECK(std::fabs(loss - least) <= bound + other_bound);
        }
      }
  CAPTURE(groups, others);
  CHECK(others * 20 <= groups);  // ties are rare
}

TEST_CASE("search: a group that is not finite gets no range, and its neighbours theirs") {
  constexpr std::int64_t n = 2, k = 24, group = 8, groups = 3;
  Random random(87);
  const Rounding to{true, DType::f16};
  const auto weights = random.floats(n * k, -1.0, 1.0), moments = test::gram_matrix(k, 50, random);
  const auto want = clip_on_cpu(weights.data(), moments.data(), n, k, group, to, 5, 0.5);
  for (const float bad : {kNan, kInfinity, -kInfinity})
    for (const bool in_gram : {false, true}) {
      auto w_values = weights, gram_values = moments;
      (in_gram ? gram_values[9 * k + 12] : w_values[k + 12]) = bad;
      gram_values[2 * k + 20] = bad;  // of two groups: nobody reads it
      const Given<float> w(w_values), gram(gram_values);
      const auto got = clip_played(w, gram, n, k, group, to, 5, 0.5, n);
      for (std::int64_t i = 0; i < n * groups * 2; ++i) {
        const bool lost = i / 2 % groups == 1 && (in_gram || i / 2 / groups == 1);
        const float value = got[static_cast<std::size_t>(i)];
        CAPTURE(bad, in_gram, i, value);
        CHECK((lost ? std::isnan(value) : value == want[static_cast<std::size_t>(i)]));
      }
    }
  // Finite, but no scale holds it: its own range stays, as on a CPU, for quantize to refuse.
  auto large = weights;
  large[12] = 1e7f;
  const Given<float> w(large), gram(moments);
  const auto kept = clip_on_cpu(w, gram, n, k, group, to, 5, 0.1),
             got = clip_played(w, gram, n, k, group, to, 5, 0.1, n);
  CHECK(kept == got);
  CHECK(got[3] == 1e7f);
}

TEST_CASE("search: sums of x^T x, on and right of the diagonal, whatever the strides") {
  Random random(88);
  constexpr std::int64_t gap = 3;
  for (const auto& [t, k] :
       {std::pair<std::int64_t, std::int64_t>{0, 5}, {1, 1}, {3, 7}, {300, 20}, {9, 130}, {513, 3}})
    for (const bool bfloat16 : {false, true}) {
      CAPTURE(t, k, bfloat16);
      std::vector<float> values = random.floats(t * (k + gap) + 1, -2.0, 2.0);
      for (std::int64_t row = 0; row < t; ++row)
        for (std::int64_t i = 0; i < gap; ++i) values[static_cast<std::size_t>(row * (k + gap) + k + i)] = kNan;
      const Given<float> x(values);
      simt::Buffer<float> sums(static_cast<std::size_t>(k * k));
      std::vector<float> before = random.floats(k * k, -100.0, 100.0);
      for (std::int64_t i = 0; i < k; ++i)
        for (std::int64_t j = 0; j < i; ++j) before[static_cast<std::size_t>(i * k + j)] = kNan;
      std::copy(before.begin(), before.end(), sums.begin());
      core::GramArgs args{};
      args.x = x, args.sums = sums.data(), args.t = t, args.k = k, args.x_stride = k + gap, args.bfloat16 = bfloat16;
      for_gram_rows(args, [](const core::GramArgs& rows) { play(gram_body, rows, kProductShared); });
      const auto factor = [&, k = k](std::int64_t row, std::int64_t i) {
        const float value = x[row * (k + gap) + i];
        return double{bfloat16 ? core::bfloat_to_float(core::float_to_bfloat(value)) : value};
      };
      int wrong = 0;
      for (std::int64_t i = 0; i < k; ++i)
        for (std::int64_t j = 0; j < k; ++j) {
          const auto at = static_cast<std::size_t>(i * k + j);
          if (j < i) {
            wrong += !std::isnan(sums[at]);
            continue;
          }
          double want = before[at], size = std::fabs(want);
          for (std::int64_t row = 0; row < t; ++row)
            want += factor(row, i) * factor(row, j), size += std::fabs(factor(row, i) * factor(row, j));
          wrong += !(std::fabs(sums[at] - want) <= static_cast<double>(t + 1) * 0x1p-23 * size);
        }
      CHECK(wrong == 0);
    }
}
