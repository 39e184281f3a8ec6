// Packing, rounding and dequantizing on CUDA, as launches: barriers, shuffles and the division of the work. What each
// thread does is in tests/cpp/test_cuda_host.cpp, on more shapes and under AddressSanitizer. Memory is not watched
// here, but threads run in any order.
#include <array>
#include <functional>
#include <vector>

#include "cpp/catch.hpp"
#include "cpp/data.h"
#include "cuda/kernels.cuh"
#include "simt/simt.h"

using namespace awq;
using core::DType;
using test::Array;
using test::kFloatTypes;
using test::Random;

namespace {

constexpr std::uint64_t kSeeds[] = {0, 1, 2, 3};

/// In fewer blocks than there are pieces of work, so that each takes several.
void play(std::uint64_t seed, const std::function<void()>& body) {
  simt::run({.grid_x = 2, .threads = cuda::kThreads}, {.seed = seed}, body);
}

template <class Read, class Write>
void convert(std::uint64_t seed, const Read& read, const Write& write, std::int64_t n, std::int64_t k) {
  std::vector<std::uint8_t> shared[2];
  for (auto& of_block : shared) of_block.resize(cuda::kTile * cuda::kTileStride);
  play(seed, [&] {
    cuda::convert_body(read, write, {{n, k}}, shared[static_cast<std::size_t>(cuda::ptx::block_x())].data());
  });
}

template <class Body>
void with_type(DType type, const Body& body) {
  type == DType::f32   ? body.template operator()<DType::f32>()
  : type == DType::f16 ? body.template operator()<DType::f16>()
                       : body.template operator()<DType::bf16>();
}

}  // namespace

TEST_CASE("kernels: pack, unpack and repack equal core's under every schedule") {
  constexpr std::int64_t n = 192, k = 192;  // nine tiles, which every layout can hold
  const auto q = Random(1).codes(n * k);
  const auto gemm = test::pack_bytes(core::kAlongN, q, n, k);
  for (const auto& [name, codes] : test::every_codes()) {
    CAPTURE(name);
    const auto words = test::pack_bytes(codes, q, n, k);
    for (const std::uint64_t seed : kSeeds) {
      CAPTURE(seed);
      std::vector<std::uint8_t> packed(words.size()), repacked(words.size()), unpacked(q.size());
      convert(seed, cuda::ReadCodes{q.data()}, cuda::WriteWords{codes, packed.data()}, n, k);
      CHECK(packed == words);
      convert(seed, cuda::ReadWords{core::kAlongN, gemm.data()}, cuda::WriteWords{codes, repacked.data()}, n, k);
      CHECK(repacked == words);
      convert(seed, cuda::ReadWords{codes, words.data()}, cuda::WriteCodes{unpacked.data()}, n, k);
      CHECK(unpacked == q);
    }
  }
}

TEST_CASE("kernels: quantize equals core's under every schedule") {
  for (const DType w_type : kFloatTypes)
    for (const auto& [n, k, group] : {std::array<std::int64_t, 3>{5, 128, 32}, {3, 70, 35}, {1, 100, 100}, {40, 9, 1}})
      for (const std::uint64_t seed : kSeeds) {
        CAPTURE(int(w_type), n, k, group, seed);
        Random random(2);
        const Array w(w_type, n * k, random, -4.0, 4.0);
        const std::int64_t groups = n * (k / group);
        const auto count = [](std::int64_t size) { return std::vector<std::uint8_t>(static_cast<std::size_t>(size)); };
        std::vector<std::uint8_t> q[2] = {count(n * k), count(n * k)}, zeros[2] = {count(groups), count(groups)};
        Array scales[2] = {{DType::f16, groups}, {DType::f16, groups}};
        const auto args = [&](int i) {
          return core::QuantizeArgs{w.data(), nullptr, q[i].data(), scales[i].data(), zeros[i].data(),   n,
                                    k,        group,   k,           w_type,           {true, DType::f16}};
        };
        REQUIRE(core::quantize_rows(args(0), 0, n) == -1);
        with_type(w_type, [&]<DType kType>() { play(seed, [&] { cuda::quantize_body<kType>(args(1)); }); });
        CHECK((q[0] == q[1] && scales[0] == scales[1] && zeros[0] == zeros[1]));
      }
}

TEST_CASE("kernels: dequantize equals core's in every instance") {
  for (const DType scale_type : kFloatTypes)
    for (const DType w_type : kFloatTypes)
      for (const auto& [n, k, group] : {std::array<std::int64_t, 3>{264, 200, 40}, {72, 150, 50}})
        for (const bool fragments : {false, true}) {
          const bool whole = k % 8 == 0;
          CAPTURE(int(scale_type), int(w_type), whole, fragments);
          const std::int64_t groups = k / group;
          Random random(3);
          const auto words = test::pack(fragments ? core::kFragments : core::kAlongN, random.codes(n * k), n, k);
          const auto zeros =
              test::pack(fragments ? core::kFragmentZeros : core::kAlongN, random.codes(n * groups), n, groups);
          const Array scales(scale_type, groups * n, random, 0.0, 1.0);
          Array expected(w_type, n * k), got(w_type, n * k);
          core::DequantizeArgs args{words.data(),
                                    zeros.data(),
                                    scales.data(),
                                    expected.data(),
                                    n,
                                    k,
                                    group,
                                    scale_type,
                                    w_type,
                                    fragments ? core::Order::fragments : core::Order::awq};
          core::dequantize_rows(args, 0, n);
          args.w = got.data();
          REQUIRE(cuda::has_whole_blocks(args) == whole);
          const auto run = [&]<DType kScale, DType kOut, bool kWhole>() {
            play(1, [&] {
              if (fragments)
                cuda::dequantize_fragments_body<kScale, kOut, kWhole>(args);
              else
                cuda::dequantize_body<kScale, kOut, kWhole>(args);
            });
          };
          with_type(scale_type, [&]<DType kScale>() {
            with_type(w_type, [&]<DType kOut>() {
              whole ? run.template operator()<kScale, kOut, true>() : run.template operator()<kScale, kOut, false>();
            });
          });
          CHECK(got == expected);
        }
}
