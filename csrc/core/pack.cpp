#include "pack.h"

#include "cpu.h"

namespace awq::core {

bool pack_blocks(const Codes& to, const std::uint8_t* q, void* words, std::int64_t n, std::int64_t k,
                 std::int64_t begin, std::int64_t end) noexcept {
  return best_kernels().pack_blocks(to, q, words, n, k, begin, end);
}

void unpack_blocks(const Codes& from, const void* words, std::uint8_t* q, std::int64_t n, std::int64_t k,
                   std::int64_t begin, std::int64_t end) noexcept {
  best_kernels().unpack_blocks(from, words, q, n, k, begin, end);
}

void repack_blocks(const Codes& from, const Codes& to, const void* source, void* target, std::int64_t n, std::int64_t k,
                   std::int64_t begin, std::int64_t end) noexcept {
  best_kernels().repack_blocks(from, to, source, target, n, k, begin, end);
}

void dequantize_rows(const DequantizeArgs& args, std::int64_t begin, std::int64_t end) noexcept {
  (args.order == Order::awq ? best_kernels().dequantize_rows : best_kernels().dequantize_tiles)(args, begin, end);
}

}  // namespace awq::core
