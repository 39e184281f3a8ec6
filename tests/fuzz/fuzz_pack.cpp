// A fuzz target: any two layouts, any shape up to 400 x 400, any words. Under AddressSanitizer, buffers of the exact
// size show every access outside; the checks show every code that goes astray.
//
// With clang, -DAWQ_FUZZ=ON links libFuzzer, which looks for inputs that reach new code. Without it,
// random_inputs.cpp runs the target on random bytes.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "core/layout.h"
#include "core/pack.h"

using namespace awq::core;

namespace {

/// The input, read front to back; 0 when it is used up.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  std::uint32_t below(std::uint32_t limit) {
    std::uint32_t value = 0;
    for (std::uint32_t most = limit - 1; most != 0; most >>= 8) value = value << 8 | next();
    return value % limit;
  }

  /// The rest of the input over and over, so that a short one still fills a large matrix with something.
  std::vector<std::uint8_t> bytes(std::size_t count) {
    std::vector<std::uint8_t> filled(count);
    const std::size_t rest = size_ - at_;
    for (std::size_t i = 0; i < count && rest != 0; ++i)
      filled[i] = static_cast<std::uint8_t>(data_[at_ + i % rest] + i / rest * 31);
    return filled;
  }

 private:
  std::uint8_t next() { return at_ < size_ ? data_[at_++] : std::uint8_t{0}; }

  const std::uint8_t* data_;
  std::size_t size_, at_ = 0;
};

std::vector<Codes> every_codes() {
  std::vector<Codes> all;
  for (const Layout& layout : kLayouts) {
    all.push_back(layout.weight);
    if (layout.zeros == Zeros::words || layout.zeros == Zeros::words_less_one) all.push_back(layout.zero_words);
  }
  return all;
}

std::size_t word_bytes(const Codes& codes, std::int64_t n, std::int64_t k) {
  const WordShape shape = word_shape(codes, n, k);
  return static_cast<std::size_t>(shape.rows * shape.cols * codes.word_bits / 8);
}

/// Memory of exactly that size, so that the sanitizer sees its end; one byte further at an odd address.
class Exact {
 public:
  Exact(std::size_t size, bool odd) : all_(new std::uint8_t[size + odd]), odd_(odd), size_(size) {
    std::memset(all_.get(), 0xa5, size + odd);
  }
  std::uint8_t* data() { return all_.get() + odd_; }
  bool operator==(const Exact& other) const {
    return size_ == other.size_ &&
           std::equal(all_.get() + odd_, all_.get() + odd_ + size_, other.all_.get() + other.odd_);
  }

 private:
  std::unique_ptr<std::uint8_t[]> all_;
  std::size_t odd_, size_;
};

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "fuzz_pack: %s\n", what);
  std::abort();
}

void conversions(Input& input) {
  static const std::vector<Codes> all = every_codes();
  const auto count = static_cast<std::uint32_t>(all.size());
  const Codes from = all[input.below(count)], to = all[input.below(count)];
  // A multiple of both tiles, or with padding any number: half the inputs would be refused otherwise.
  const auto extent = [&](int a, int b, std::uint32_t most) -> std::int64_t {
    const std::uint32_t unit = static_cast<std::uint32_t>(std::max(from.padded ? 1 : a, to.padded ? 1 : b));
    return std::int64_t{input.below(most / unit + 1)} * unit;
  };
  const std::int64_t n = extent(from.tile_n, to.tile_n, 400), k = extent(from.tile_k, to.tile_k, 400);
  if (!can_hold(from, n, k) || !can_hold(to, n, k)) return;
  const bool odd = input.below(2) != 0;
  const std::int64_t split = input.below(4), row = input.below(400), col = input.below(400);

  Exact source(word_bytes(from, n, k), odd);
  const auto words = input.bytes(word_bytes(from, n, k));
  std::copy(words.begin(), words.end(), source.data());
  Exact q(static_cast<std::size_t>(n * k), odd);
  unpack_blocks(from, source.data(), q.data(), n, k, 0, block_count(Axis::n, n, k));
  for (std::int64_t i = 0; i < n * k; ++i) require(q.data()[i] <= 15, "unpack gives a code above 15");
  if (row < n && col < k) {
    const CodePlace place = locate(from, n, k, row, col);
    const std::int64_t nibble = place.word * from.codes_per_word() + place.nibble;
    require(q.data()[row * k + col] == (source.data()[nibble / 2] >> (nibble % 2 * 4) & 15),
            "unpack disagrees with locate");
  }

  Exact packed(word_bytes(to, n, k), false), repacked(word_bytes(to, n, k), odd);
  const std::int64_t blocks = block_count(to.outer, n, k), middle = std::min(split, blocks);
  require(pack_blocks(to, q.data(), packed.data(), n, k, 0, middle), "pack finds a code above 15");
  require(pack_blocks(to, q.data(), packed.data(), n, k, middle, blocks), "pack finds a code above 15");
  repack_blocks(from, to, source.data(), repacked.data(), n, k, middle, blocks);
  repack_blocks(from, to, source.data(), repacked.data(), n, k, 0, middle);
  require(packed == repacked, "repack is not unpack and pack");
  Exact back(static_cast<std::size_t>(n * k), false);
  unpack_blocks(to, packed.data(), back.data(), n, k, 0, block_count(Axis::n, n, k));
  require(back == q, "unpack is not the inverse of pack");
}

void dequantization(Input& input) {
  constexpr DType types[] = {DType::f32, DType::f16, DType::bf16};
  const std::int64_t group = 1 + input.below(70), groups = input.below(5), n = 8 * input.below(20);
  const std::int64_t k = group * groups;
  const DType scale_type = types[input.below(3)], w_type = types[input.below(3)];
  const bool with_zeros = input.below(2) != 0;
  const auto fill = [&](std::int64_t size) {
    Exact memory(static_cast<std::size_t>(size), false);
    const auto bytes = input.bytes(static_cast<std::size_t>(size));
    std::copy(bytes.begin(), bytes.end(), memory.data());
    return memory;
  };
  Exact words = fill(k * n / 2), zeros = fill(groups * n / 2), scales = fill(groups * n * size_of(scale_type));
  Exact w(static_cast<std::size_t>(n * k * size_of(w_type)), false);
  const DequantizeArgs args{reinterpret_cast<const std::uint32_t*>(words.data()),
                            with_zeros ? reinterpret_cast<const std::uint32_t*>(zeros.data()) : nullptr,
                            scales.data(),
                            w.data(),
                            n,
                            k,
                            group,
                            scale_type,
                            w_type};
  dequantize_rows(args, 0, n);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input input(data, size);
  input.below(8) == 0 ? dequantization(input) : conversions(input);
  return 0;
}
