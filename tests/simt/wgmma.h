// The matrix unit of a warp group, which works while the threads go on, and the registers of a warp group.
#pragma once
#include <array>
#include <bitset>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/types.h"
#include "memory.h"

namespace simt {

struct Thread;
struct Warp;
struct WarpGroup;

/// Bytes of a thread's stack as they were: its arrays, which are what registers are on a GPU.
struct Image {
  const char* start = nullptr;
  std::vector<char> bytes;

  void take(const char* from, const char* end);  // multiples of 8
  bool holds(const void* p, std::size_t size) const;
  /// Whether these bytes have been written since, with something else. False if they were not seen.
  bool differs(const void* p, std::size_t size) const;
  void update(const void* p, std::size_t size);
};

/// d, of all threads of a warp group, from the first wgmma on until wgmma_settle. Meanwhile the threads' own arrays
/// hold poison: a compiler for a GPU could use them before the wait, too, if nothing but the wait came before their
/// use.
struct Sum {
  std::array<float*, 128> d{};
  int columns = 0;
  std::vector<float> value;     // [64][columns]
  std::array<bool, 4> ended{};  // of each warp: all its wgmma
  std::bitset<128> settled;     // of each thread
};

/// A wgmma under way.
struct Product {
  awq::core::DType type;
  std::array<const std::uint32_t*, 128> a{};
  std::array<std::array<std::uint32_t, 4>, 128> a_was{};
  std::vector<std::uint32_t> b;  // the addresses of the 16-byte pieces that it reads
  std::shared_ptr<Sum> sum;
  std::array<std::int64_t, 4> group{};  // of each warp
  std::array<bool, 4> done{};
  Where where;
};

void wgmma(awq::core::DType type, int columns, float* d, const std::uint32_t* a, std::uint64_t b, bool accumulate,
           Where where);
void wgmma_fence(Where where);
void wgmma_commit(Where where);
void wgmma_wait(int pending, Where where);
/// The thread's d gets its values.
void wgmma_settle(float* d, Where where);
/// The thread may write a from now on: throws if it is still read.
void wgmma_settle_a(const std::uint32_t* a, Where where);
/// Throws if the thread has not waited for all of its wgmma.
void end_products(const Thread& t);

void change_registers(int count, bool take, Where where);

}  // namespace simt
