// The names of csrc/cuda/ptx.cuh, played on the host. What each one does is said there; here it is also watched.
#pragma once
#include <array>
#include <cstdint>

#include "simt/async.h"
#include "simt/global.h"
#include "simt/machine.h"
#include "simt/matrix.h"

#define AWQ_DEVICE inline

namespace awq::cuda::ptx {

using simt::Where;

// --- threads --------------------------------------------------------------------------------------------------------

AWQ_DEVICE int thread() { return simt::current->index; }
AWQ_DEVICE std::int64_t block_x() { return simt::current->block->x; }
AWQ_DEVICE std::int64_t block_y() { return simt::current->block->y; }
AWQ_DEVICE std::int64_t grid_x() { return simt::machine.launch.grid_x; }
AWQ_DEVICE std::int64_t grid_y() { return simt::machine.launch.grid_y; }

AWQ_DEVICE void sync_threads(Where where = Where::current()) {
  simt::sync_block(0, simt::machine.launch.threads, true, where);
}
AWQ_DEVICE void sync_warp(Where where = Where::current()) { simt::sync_lanes(where); }
AWQ_DEVICE void sync_some(int id, int threads, Where where = Where::current()) {
  simt::sync_block(id, threads, true, where);
}
AWQ_DEVICE void arrive_some(int id, int threads, Where where = Where::current()) {
  simt::sync_block(id, threads, false, where);
}

template <class T>
struct Exchange {
  T value;
  int lane;
  T result;
};

template <class T>
AWQ_DEVICE T exchange(const char* what, T value, int lane, Where where) {
  Exchange<T> mine{value, lane & 31, value};
  simt::together({what, where}, &mine, [](simt::Warp& w) {
    for (int lane = 0; lane < simt::kLanes; ++lane) {
      auto& to = w.slot<Exchange<T>>(lane);
      to.result = w.slot<Exchange<T>>(to.lane).value;
    }
    return true;
  });
  return mine.result;
}

template <class T>
AWQ_DEVICE T shuffle(T value, int lane, Where where = Where::current()) {
  return exchange("shuffle", value, lane, where);
}
template <class T>
AWQ_DEVICE T shuffle_xor(T value, int mask, Where where = Where::current()) {
  return exchange("shuffle_xor", value, simt::current->lane() ^ mask, where);
}
AWQ_DEVICE std::uint32_t ballot(bool vote, Where where = Where::current()) {
  Exchange<std::uint32_t> mine{vote, 0, 0};
  simt::together({"ballot", where}, &mine, [](simt::Warp& w) {
    std::uint32_t votes = 0;
    for (int lane = 0; lane < simt::kLanes; ++lane) votes |= w.slot<Exchange<std::uint32_t>>(lane).value << lane;
    for (int lane = 0; lane < simt::kLanes; ++lane) w.slot<Exchange<std::uint32_t>>(lane).result = votes;
    return true;
  });
  return mine.result;
}

// --- global memory --------------------------------------------------------------------------------------------------

template <class T>
AWQ_DEVICE T load_once(const T* p, Where where = Where::current()) {
  static_assert(sizeof(T) == 16 || sizeof(T) == 4);
  simt::check_global_read(p, sizeof(T), sizeof(T), simt::Cached::yes, where);
  return *p;
}
template <class T>
AWQ_DEVICE T load_constant(const T* p, Where where = Where::current()) {
  simt::check_global_read(p, sizeof(T), sizeof(T), simt::Cached::yes, where);
  return *p;
}
template <class T>
AWQ_DEVICE T load(const T* p, Where where = Where::current()) {
  simt::check_global_read(p, sizeof(T), sizeof(T), simt::Cached::no, where);
  return *p;
}
template <class T>
AWQ_DEVICE void store(T* p, T value, Where where = Where::current()) {
  simt::check_global_write(p, sizeof(T), sizeof(T), where);
  *p = value;
}

// --- shared memory --------------------------------------------------------------------------------------------------

AWQ_DEVICE Shared dynamic_shared() { return simt::SharedMemory::kStart; }

template <class T>
AWQ_DEVICE T load_shared(Shared a, Where where = Where::current()) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  std::array<unsigned char, sizeof(T)> bytes;
  simt::read_shared(a, bytes.data(), sizeof(T), where);
  return std::bit_cast<T>(bytes);
}
template <class T>
AWQ_DEVICE void store_shared(Shared a, T value, Where where = Where::current()) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  simt::write_shared(a, &value, sizeof(T), where);
}

AWQ_DEVICE void load_matrices(std::uint32_t (&r)[4], Shared row, Where where = Where::current()) {
  simt::load_matrices(r, 4, row, where);
}
AWQ_DEVICE void load_matrices(std::uint32_t (&r)[2], Shared row, Where where = Where::current()) {
  simt::load_matrices(r, 2, row, where);
}

// --- asynchronous copies of 16 bytes --------------------------------------------------------------------------------

AWQ_DEVICE void copy_async(Shared to, const void* from, int bytes, Where where = Where::current()) {
  simt::copy_async(to, from, bytes, where);
}
AWQ_DEVICE void copy_async_commit() { simt::copy_async_commit(); }
template <int kPending>
AWQ_DEVICE void copy_async_wait(Where where = Where::current()) {
  static_assert(kPending >= 0);
  simt::copy_async_wait(kPending, where);
}

// --- barriers in shared memory, bulk copies -------------------------------------------------------------------------

AWQ_DEVICE void barrier_init(Shared barrier, int arrivals, Where where = Where::current()) {
  simt::barrier_init(barrier, arrivals, where);
}
AWQ_DEVICE void fence_barriers() { simt::fence_barriers(); }
AWQ_DEVICE void barrier_arrive(Shared barrier, Where where = Where::current()) {
  simt::barrier_arrive(*simt::current->block, barrier, 0, "barrier_arrive", where);
}
AWQ_DEVICE void barrier_arrive_at(Shared barrier, int rank, Where where = Where::current()) {
  simt::barrier_arrive(simt::block_of_cluster(rank, "barrier_arrive_at", where), barrier, 0, "barrier_arrive_at",
                       where);
}
AWQ_DEVICE void barrier_expect(Shared barrier, std::uint32_t bytes, Where where = Where::current()) {
  simt::barrier_arrive(*simt::current->block, barrier, bytes, "barrier_expect", where);
}
AWQ_DEVICE void barrier_wait(Shared barrier, int parity, Where where = Where::current()) {
  simt::barrier_wait(barrier, parity, where);
}
AWQ_DEVICE void copy_bulk(Shared to, const void* from, std::uint32_t bytes, Shared barrier,
                          Where where = Where::current()) {
  simt::copy_bulk(to, from, bytes, barrier, where);
}
AWQ_DEVICE void copy_tensor(Shared to, const TensorMap* map, int row, int col, Shared barrier,
                            Where where = Where::current()) {
  simt::copy_tensor(to, map, row, col, barrier, 1u << simt::current->block->rank, "copy_tensor", where);
}
AWQ_DEVICE void copy_tensor_multicast(Shared to, const TensorMap* map, int row, int col, Shared barrier,
                                      std::uint16_t blocks, Where where = Where::current()) {
  simt::copy_tensor(to, map, row, col, barrier, blocks, "copy_tensor_multicast", where);
}
AWQ_DEVICE void prefetch_tensor_map(const TensorMap* map, Where where = Where::current()) {
  simt::check_tensor_map(map, where);
}
AWQ_DEVICE void fence_async() { simt::fence_async(); }

// --- clusters of blocks, the grid and its neighbours, registers -----------------------------------------------------

AWQ_DEVICE int cluster_rank() { return simt::current->block->rank; }
AWQ_DEVICE void cluster_arrive(Where where = Where::current()) { simt::cluster_arrive(where); }
AWQ_DEVICE void cluster_wait(Where where = Where::current()) { simt::cluster_wait(where); }
template <class T>
AWQ_DEVICE T load_cluster(Shared a, int rank, Where where = Where::current()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 16);
  std::array<unsigned char, sizeof(T)> bytes;
  simt::read_cluster(a, bytes.data(), sizeof(T), rank, where);
  return std::bit_cast<T>(bytes);
}

AWQ_DEVICE void wait_for_earlier_kernels() { simt::wait_for_earlier_kernels(); }
AWQ_DEVICE void let_next_kernel_start() {}

template <int kCount>
AWQ_DEVICE void give_registers(Where where = Where::current()) {
  simt::change_registers(kCount, false, where);
}
template <int kCount>
AWQ_DEVICE void take_registers(Where where = Where::current()) {
  simt::change_registers(kCount, true, where);
}

// --- bits -----------------------------------------------------------------------------------------------------------

AWQ_DEVICE std::uint32_t select_or(std::uint32_t bits, std::uint32_t mask, std::uint32_t with) {
  return (bits & mask) | with;
}

// --- arithmetic on pairs of 16-bit floats in a word -----------------------------------------------------------------

template <DType kType>
AWQ_DEVICE float to_float(std::uint16_t bits) {
  if constexpr (kType == DType::f16)
    return core::half_to_float(bits);
  else
    return core::bfloat_to_float(bits);
}
template <DType kType>
AWQ_DEVICE std::uint32_t round_pair(float low, float high) {
  static_assert(kType == DType::f16 || kType == DType::bf16);
  if constexpr (kType == DType::f16)
    return core::float_to_half(low) | static_cast<std::uint32_t>(core::float_to_half(high)) << 16;
  else
    return core::float_to_bfloat(low) | static_cast<std::uint32_t>(core::float_to_bfloat(high)) << 16;
}
template <DType kType>
AWQ_DEVICE std::uint32_t sub_pair(std::uint32_t a, std::uint32_t b) {
  return simt::each_half<kType>(a, b, [](double x, double y) { return x - y; });
}
template <DType kType>
AWQ_DEVICE std::uint32_t mul_pair(std::uint32_t a, std::uint32_t b) {
  return simt::each_half<kType>(a, b, [](double x, double y) { return x * y; });
}

// --- matrix units ---------------------------------------------------------------------------------------------------

template <DType kType>
AWQ_DEVICE void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                    Where where = Where::current()) {
  static_assert(kType == DType::f16 || kType == DType::bf16);
  simt::mma(kType, d, a, b, where);
}

// --- matrix units for a warp group ----------------------------------------------------------------------------------

AWQ_DEVICE void wgmma_fence(Where where = Where::current()) { simt::wgmma_fence(where); }
AWQ_DEVICE void wgmma_commit(Where where = Where::current()) { simt::wgmma_commit(where); }
template <int kPending>
AWQ_DEVICE void wgmma_wait(Where where = Where::current()) {
  static_assert(kPending >= 0 && kPending < 8);
  simt::wgmma_wait(kPending, where);
}
template <DType kType, int kColumns>
AWQ_DEVICE void wgmma(float (&d)[kColumns / 2], const std::uint32_t (&a)[4], std::uint64_t b, bool accumulate,
                      Where where = Where::current()) {
  static_assert(kType == DType::f16 || kType == DType::bf16);
  static_assert(kColumns % 8 == 0 && kColumns >= 8 && kColumns <= 256);
  simt::wgmma(kType, kColumns, d, a, b, accumulate, where);
}
template <int kCount>
AWQ_DEVICE void wgmma_settle(float (&d)[kCount], Where where = Where::current()) {
  simt::wgmma_settle(d, where);
}
AWQ_DEVICE void wgmma_settle(const std::uint32_t (&a)[4], Shared, Where where = Where::current()) {
  simt::wgmma_settle_a(a, where);
}

}  // namespace awq::cuda::ptx
