// What a thread loads at once.
#pragma once
#include <cstdint>

namespace awq::cuda {

/// Sixteen bytes, the most.
struct alignas(16) Vector {
  std::uint32_t word[4];
};

}  // namespace awq::cuda
