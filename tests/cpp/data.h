// Test data: reproducible random values, and typed arrays of exactly the size asked for, one allocation each, so that
// a sanitizer sees the first element read or written beyond the end.
#pragma once
#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/layout.h"
#include "core/pack.h"
#include "core/types.h"

namespace awq::test {

using core::DType;

inline constexpr DType kFloatTypes[] = {DType::f32, DType::f16, DType::bf16};

/// Half the distance between one and the next number of the type: its largest relative rounding error.
constexpr double unit_roundoff(DType type) {
  switch (type) {
    case DType::f64: return 0x1p-53;
    case DType::f32: return 0x1p-24;
    case DType::f16: return 0x1p-11;
    default: return 0x1p-8;
  }
}

/// Half the distance between neighbours in the type's subnormal range: its largest absolute rounding error there.
constexpr double subnormal_roundoff(DType type) {
  switch (type) {
    case DType::f64: return 0.0;
    case DType::f16: return 0x1p-25;
    default: return 0x1p-134;
  }
}

/// std::mt19937 gives the same numbers everywhere; the standard distributions do not, so they are made by hand.
class Random {
 public:
  explicit Random(std::uint32_t seed) : engine_(seed) {}

  std::uint32_t bits() { return static_cast<std::uint32_t>(engine_()); }
  std::uint8_t code() { return static_cast<std::uint8_t>(bits() >> 28); }
  double uniform(double lo, double hi) { return lo + (hi - lo) * (bits() * 0x1p-32); }

  std::vector<std::uint8_t> codes(std::int64_t count) {
    std::vector<std::uint8_t> q(static_cast<std::size_t>(count));
    for (auto& code_ : q) code_ = code();
    return q;
  }
  std::vector<float> floats(std::int64_t count, double lo, double hi) {
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& value : values) value = static_cast<float>(uniform(lo, hi));
    return values;
  }

 private:
  std::mt19937 engine_;
};

/// `size` numbers of one element type.
class Array {
 public:
  Array(DType type, std::int64_t size)
      : type_(type), size_(size), bytes_(static_cast<std::size_t>(size * core::size_of(type))) {}
  Array(DType type, std::int64_t size, Random& random, double lo, double hi) : Array(type, size) {
    for (std::int64_t i = 0; i < size; ++i) set(i, random.uniform(lo, hi));
  }

  DType type() const { return type_; }
  std::int64_t size() const { return size_; }
  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }
  double operator[](std::int64_t i) const { return core::load_as<double>(bytes_.data(), type_, i); }
  void set(std::int64_t i, double value) { core::store_as(bytes_.data(), type_, i, value); }
  bool operator==(const Array& other) const { return type_ == other.type_ && bytes_ == other.bytes_; }

 private:
  DType type_;
  std::int64_t size_;
  std::vector<std::uint8_t> bytes_;
};

/// All of q [n, k] in words of the layout.
/// Words of any width, as bytes.
inline std::vector<std::uint8_t> pack_bytes(const core::Codes& codes, const std::vector<std::uint8_t>& q,
                                            std::int64_t n, std::int64_t k) {
  const core::WordShape shape = core::word_shape(codes, n, k);
  std::vector<std::uint8_t> words(static_cast<std::size_t>(shape.rows * shape.cols * codes.word_bits / 8), 0xa5);
  core::pack_blocks(codes, q.data(), words.data(), n, k, 0, core::block_count(codes.outer, n, k));
  return words;
}

/// Words of 32 bits.
inline std::vector<std::uint32_t> pack(const core::Codes& codes, const std::vector<std::uint8_t>& q, std::int64_t n,
                                       std::int64_t k) {
  const core::WordShape shape = core::word_shape(codes, n, k);
  std::vector<std::uint32_t> words(static_cast<std::size_t>(shape.rows * shape.cols));
  core::pack_blocks(codes, q.data(), words.data(), n, k, 0, core::block_count(codes.outer, n, k));
  return words;
}

/// Everything that find_codes knows, once each, with its name.
inline std::vector<std::pair<std::string, core::Codes>> every_codes() {
  std::vector<std::pair<std::string, core::Codes>> all;
  for (const core::Layout& layout : core::kLayouts)
    for (const std::string suffix : {"", ".zeros"})
      if (const core::Codes* codes = core::find_codes(std::string(layout.name) + suffix))
        all.emplace_back(std::string(layout.name) + suffix, *codes);
  return all;
}

inline const core::Codes& gemm_layout() { return core::find_layout("gemm")->weight; }

}  // namespace awq::test
