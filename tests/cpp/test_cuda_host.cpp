// Plays every thread of every CUDA kernel on the host and compares, bit for bit, with what core computes. This covers
// indices, masks and arithmetic; what it cannot cover (barriers, shuffles, the device's own rounding) is in
// tests/test_cuda.py, which needs a GPU.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "catch.hpp"
#include "cuda/device_code.h"
#include "data.h"

using namespace awq;
using core::DType;
using test::Array;
using test::kFloatTypes;
using test::Random;

namespace {

/// A buffer of `size` elements between two guards; the fill tells an element that was never written.
template <class T>
class Guarded {
 public:
  explicit Guarded(std::int64_t size, T fill = T(0xa5))
      : size_(static_cast<std::size_t>(size)), all_(size_ + 2 * kGuard, fill), fill_(fill) {}

  T* data() { return all_.data() + kGuard; }
  std::vector<T> values() const { return {all_.begin() + kGuard, all_.end() - kGuard}; }
  bool guards_hold() const {
    const auto kept = [&](T value) { return value == fill_; };
    return std::all_of(all_.begin(), all_.begin() + kGuard, kept) && std::all_of(all_.end() - kGuard, all_.end(), kept);
  }

 private:
  static constexpr std::ptrdiff_t kGuard = 64;
  std::size_t size_;
  std::vector<T> all_;
  T fill_;
};

template <class Read, class Write>
void play_convert(const Read& read, const Write& write, std::int64_t n, std::int64_t k) {
  const cuda::SquareTiles tiles{{n, k}};
  std::vector<std::uint8_t> shared(cuda::kTile * cuda::kTileStride);
  for (std::int64_t tile = 0; tile < tiles.count(); ++tile) {
    for (int thread = 0; thread < cuda::kThreads; ++thread) read(shared.data(), tiles, tile, thread);
    for (int thread = 0; thread < cuda::kThreads; ++thread) write(shared.data(), tiles, tile, thread);
  }
}

template <DType kType>
void play_quantize(const core::QuantizeArgs& args) {
  for (std::int64_t group = 0; group < args.n * (args.k / args.group); ++group) {
    cuda::GroupRange range;
    for (int lane = cuda::kWarp; lane-- > 0;) range.merge(cuda::lane_range<kType>(args, group, lane));
    const core::GroupParameters p = cuda::parameters(args, group, range);
    for (int lane = 0; lane < cuda::kWarp; ++lane) cuda::write_group<kType>(args, group, p, lane);
  }
}

template <DType kScale, DType kOut>
void play_dequantize(const core::DequantizeArgs& args) {
  const cuda::BlockTiles tiles{{args.n, args.k}};
  for (std::int64_t tile = 0; tile < tiles.count(); ++tile)
    for (int thread = 0; thread < cuda::kThreads; ++thread)
      if (cuda::has_whole_blocks(args))
        cuda::dequantize_block<kScale, kOut, true>(args, tile, thread);
      else
        cuda::dequantize_block<kScale, kOut, false>(args, tile, thread);
}

template <DType kScale, DType kOut>
void play_dequantize_fragments(const core::DequantizeArgs& args) {
  const cuda::FragmentTiles tiles{{args.n, args.k}};
  for (std::int64_t tile = 0; tile < tiles.count(); ++tile)
    for (int thread = 0; thread < cuda::kThreads; ++thread)
      if (cuda::has_whole_blocks(args))
        cuda::dequantize_fragments<kScale, kOut, true>(args, tile, thread);
      else
        cuda::dequantize_fragments<kScale, kOut, false>(args, tile, thread);
}

/// body.operator()<type>() with the run-time type as a template argument.
template <class Body>
void with_type(DType type, const Body& body) {
  switch (type) {
    case DType::f32: return body.template operator()<DType::f32>();
    case DType::f16: return body.template operator()<DType::f16>();
    default: return body.template operator()<DType::bf16>();
  }
}

}  // namespace

TEST_CASE("a tile of the CUDA conversion kernels is laid out as core::locate says") {
  for (const auto& [name, codes] : test::every_codes()) {
    CAPTURE(name);
    const auto cols = core::word_shape(codes, cuda::kTile, cuda::kTile).cols;
    for (int row = 0; row < cuda::kTile; ++row)
      for (int col = 0; col < cuda::kTile; ++col) {
        const core::CodePlace place = core::locate(codes, cuda::kTile, cuda::kTile, row, col);
        const core::CodeShape code = cuda::code_of_word(codes, static_cast<int>(place.word / cols),
                                                        static_cast<int>(place.word % cols), place.nibble);
        REQUIRE((code.n == row && code.k == col));
      }
  }
}

TEST_CASE("CUDA pack, unpack and repack equal core's") {
  const std::vector<std::pair<std::int64_t, std::int64_t>> shapes = {
      {8, 8}, {64, 64}, {8, 200}, {200, 8}, {136, 72}, {128, 1}, {72, 131}, {1, 64}, {131, 72}, {128, 192}};
  for (const auto& [n, k] : shapes) {
    const auto q = Random(1).codes(n * k);
    auto dirty = q;
    for (auto& code : dirty) code |= 0x70;
    for (const auto& [from_name, from] : test::every_codes()) {
      if (!core::can_hold(from, n, k)) continue;
      CAPTURE(n, k, from_name);
      const auto words = test::pack_bytes(from, q, n, k);
      const auto size = static_cast<std::int64_t>(words.size());

      Guarded<std::uint8_t> packed(size), masked(size);
      play_convert(cuda::ReadCodes{q.data()}, cuda::WriteWords{from, packed.data()}, n, k);
      CHECK((packed.values() == words && packed.guards_hold()));
      play_convert(cuda::ReadCodes{dirty.data()}, cuda::WriteWords{from, masked.data()}, n, k);
      CHECK(masked.values() == words);

      Guarded<std::uint8_t> codes(n * k);
      play_convert(cuda::ReadWords{from, words.data()}, cuda::WriteCodes{codes.data()}, n, k);
      CHECK((codes.values() == q && codes.guards_hold()));

      for (const auto& [to_name, to] : test::every_codes()) {
        if (!core::can_hold(to, n, k)) continue;
        CAPTURE(to_name);
        const auto expected = test::pack_bytes(to, q, n, k);
        Guarded<std::uint8_t> target(static_cast<std::int64_t>(expected.size()));
        play_convert(cuda::ReadWords{from, words.data()}, cuda::WriteWords{to, target.data()}, n, k);
        CHECK((target.values() == expected && target.guards_hold()));
      }
    }
  }
}

TEST_CASE("CUDA quantize equals core's") {
  struct Case {
    std::int64_t n, k, group, stride;
    float scale;
  };
  for (const Case& c :
       {Case{3, 256, 128, 256, 1.0f}, Case{5, 96, 32, 100, 0.01f}, Case{4, 33, 11, 33, 1.0f},
        Case{2, 70, 70, 70, 100.0f}, Case{7, 8, 1, 8, 1.0f}, Case{2, 64, 32, 64, 1e-7f}, Case{2, 64, 32, 64, 1e-44f}})
    for (const DType w_type : kFloatTypes)
      for (const DType scale_type : kFloatTypes)
        for (const bool zero_point : {true, false})
          for (const bool with_range : {false, true}) {
            const core::Rounding to{zero_point, scale_type, core::last_code(1 + c.n)};
            CAPTURE(c.n, c.k, c.group, int(w_type), int(scale_type), zero_point, with_range, to.last);
            Random random(2);
            Array w(w_type, c.n * c.stride, random, -4.0 * c.scale, 4.0 * c.scale);
            for (std::int64_t i = 0; i < c.group; ++i) w.set(i, 0.0);  // an empty group
            const std::int64_t groups = c.k / c.group;
            std::vector<float> range;
            for (std::int64_t i = 0; i < c.n * groups; ++i) {
              range.push_back(c.scale * (i % 3 == 0 ? 0.5f : -1.0f));
              range.push_back(c.scale * (i % 5 == 0 ? -0.25f : 2.0f));
            }
            const std::int64_t size = core::size_of(scale_type);
            Guarded<std::uint8_t> q(c.n * c.k), scales(c.n * groups * size), zeros(c.n * groups);
            std::vector<std::uint8_t> core_q(q.values()), core_scales(scales.values()), core_zeros(zeros.values());
            core::QuantizeArgs args{w.data(),
                                    with_range ? range.data() : nullptr,
                                    core_q.data(),
                                    core_scales.data(),
                                    core_zeros.data(),
                                    c.n,
                                    c.k,
                                    c.group,
                                    c.stride,
                                    w_type,
                                    to};
            REQUIRE(core::quantize_rows(args, 0, c.n) == -1);
            args.q = q.data(), args.scales = scales.data(), args.zeros = zeros.data();
            with_type(w_type, [&]<DType kType>() { play_quantize<kType>(args); });
            CHECK(q.values() == core_q);
            CHECK(scales.values() == core_scales);
            CHECK(zeros.values() == core_zeros);
            CHECK((q.guards_hold() && scales.guards_hold() && zeros.guards_hold()));
          }
}

TEST_CASE("CUDA quantize marks a group that cannot be represented and leaves the others alone") {
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (const float bad : {nan, infinity, -infinity, 1e38f})  // the last one is finite, its scale in float16 is not
    for (const bool zero_point : {true, false}) {
      CAPTURE(bad, zero_point);
      const std::int64_t n = 2, k = 128, group = 64;
      std::vector<float> w(n * k, 0.25f);
      w[64 + 40] = bad;  // group 1
      Guarded<std::uint8_t> q(n * k), scales(n * 2 * 2), zeros(n * 2);
      play_quantize<DType::f32>({w.data(),
                                 nullptr,
                                 q.data(),
                                 scales.data(),
                                 zeros.data(),
                                 n,
                                 k,
                                 group,
                                 k,
                                 DType::f32,
                                 {zero_point, DType::f16}});
      const std::uint8_t zero = zero_point ? 0 : 8;
      for (std::int64_t g = 0; g < 4; ++g) {
        const float scale = core::load_as<float>(scales.data(), DType::f16, g);
        CHECK(std::isnan(scale) == (g == 1));
        CHECK(zeros.values()[static_cast<std::size_t>(g)] == zero);
        CHECK(q.values()[static_cast<std::size_t>(g * group)] == (g == 1 ? zero : 15));
      }
    }
}

TEST_CASE("CUDA dequantize equals core's") {
  struct Case {
    std::int64_t n, k, group;
    bool whole;
  };
  for (const Case& c : {Case{8, 8, 8, true}, Case{264, 128, 32, true}, Case{520, 72, 72, true}, Case{24, 576, 64, true},
                        Case{72, 200, 8, true}, Case{8, 7, 7, false}, Case{64, 96, 12, false}, Case{272, 70, 35, false},
                        Case{8, 40, 1, false}})
    for (const DType scale_type : kFloatTypes)
      for (const DType w_type : kFloatTypes)
        for (const bool with_zeros : {true, false})
          for (const float magnitude : {0.01f, 1e-6f, 5000.0f}) {
            CAPTURE(c.n, c.k, c.group, int(scale_type), int(w_type), with_zeros, magnitude);
            const std::int64_t groups = c.k / c.group;
            Random random(3);
            const auto q = random.codes(c.n * c.k), z = random.codes(c.n * groups);
            const auto qweight = test::pack(test::gemm_layout(), q, c.n, c.k);
            const auto qzeros = test::pack(test::gemm_layout(), z, c.n, groups);
            const Array scales(scale_type, groups * c.n, random, 0.0, 4.0 * magnitude);
            const std::int64_t words = (c.n * c.k * core::size_of(w_type) + 15) / 16 * 4;  // whole 16-byte pieces
            // The guard of 64 words keeps the alignment that the allocator gave.
            Guarded<std::uint32_t> w(words);
            std::vector<std::uint32_t> expected(w.values());
            core::DequantizeArgs args{qweight.data(),
                                      with_zeros ? qzeros.data() : nullptr,
                                      scales.data(),
                                      expected.data(),
                                      c.n,
                                      c.k,
                                      c.group,
                                      scale_type,
                                      w_type};
            core::dequantize_rows(args, 0, c.n);
            args.w = w.data();
            REQUIRE(cuda::has_whole_blocks(args) == c.whole);
            with_type(scale_type, [&]<DType kScale>() {
              with_type(w_type, [&]<DType kOut>() { play_dequantize<kScale, kOut>(args); });
            });
            CHECK(w.values() == expected);
            CHECK(w.guards_hold());

            const auto fragments = test::pack(core::kFragments, q, c.n, c.k);
            const auto fragment_zeros = test::pack(core::kFragmentZeros, z, c.n, groups);
            Array ordered(scale_type, groups * c.n);
            for (std::int64_t g = 0; g < groups; ++g)
              for (std::int64_t row = 0; row < c.n; ++row)
                ordered.set(core::fragment_scale(c.n, groups, g, row), scales[g * c.n + row]);
            Guarded<std::uint32_t> same(words);
            args.qweight = fragments.data(), args.qzeros = with_zeros ? fragment_zeros.data() : nullptr;
            args.scales = ordered.data(), args.w = same.data(), args.order = core::Order::fragments;
            with_type(scale_type, [&]<DType kScale>() {
              with_type(w_type, [&]<DType kOut>() { play_dequantize_fragments<kScale, kOut>(args); });
            });
            CHECK(same.values() == expected);
            CHECK(same.guards_hold());
          }
}

TEST_CASE("every 8 x 8 block of a weight belongs to exactly one CUDA thread") {
  const cuda::BlockTiles tiles{{528, 200}};
  std::vector<int> visits(528 / 8 * 200 / 8);
  for (std::int64_t tile = 0; tile < tiles.count(); ++tile)
    for (int thread = 0; thread < cuda::kThreads; ++thread) {
      const core::CodeShape first = cuda::thread_block(tiles, tile, thread);
      if (first.n < 528 && first.k < 200) ++visits[static_cast<std::size_t>(first.n / 8 * (200 / 8) + first.k / 8)];
    }
  CHECK(std::all_of(visits.begin(), visits.end(), [](int count) { return count == 1; }));
}
