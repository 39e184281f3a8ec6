// One name for each instruction by which kernels reach what C++ has no word for: memory spaces, asynchronous copies,
// barriers, matrix units. A kernel's body uses these and plain C++ only, so that the tests can play it without a GPU:
// compiled with AWQ_SIMT, the same names come from tests/simt, which also watches how they are used.
//
// Shared memory is addressed by bytes from the start of the block's window (Shared), as the instructions do.
// Reference: NVIDIA, Parallel Thread Execution ISA; the section is named where a rule is not obvious.
#pragma once
#include <bit>
#include <cstdint>

#include "../core/types.h"
#include "vector.h"

namespace awq::cuda {

/// What the tensor copy engine needs to know of a matrix in global memory: a CUtensorMap, made on the host.
struct alignas(128) TensorMap {
  std::uint64_t opaque[16];
};

}  // namespace awq::cuda

namespace awq::cuda::ptx {

using core::DType;
using Shared = std::uint32_t;

/// Describes b to wgmma: kColumns columns (tokens) of 64 16-bit values each, every column 128 bytes, in the 128-byte
/// swizzle of the tensor copy engine: the 16-byte piece c of column j lies at piece c ^ (j % 8). `start` is a multiple
/// of 1024, plus 32 bytes for each step of 16 along k.
/// Fields: start / 16 in bits 0-13; 1 in bits 16-29 (not used in this form); 1024 / 16, from eight columns to the next
/// eight, in bits 32-45; 1 (128-byte swizzle) in bits 62-63. PTX ISA, "Matrix Descriptor Format".
AWQ_HOST_DEVICE inline std::uint64_t wgmma_descriptor(Shared start) {
  return static_cast<std::uint64_t>((start & 0x3ffffu) >> 4) | std::uint64_t{1} << 16 | std::uint64_t{64} << 32 |
         std::uint64_t{1} << 62;
}

}  // namespace awq::cuda::ptx

#ifdef AWQ_SIMT
#include "simt/ptx.h"
#else

#define AWQ_DEVICE __device__ __forceinline__

namespace awq::cuda::ptx {

// --- threads --------------------------------------------------------------------------------------------------------

AWQ_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
AWQ_DEVICE std::int64_t block_x() { return blockIdx.x; }
AWQ_DEVICE std::int64_t block_y() { return blockIdx.y; }
AWQ_DEVICE std::int64_t grid_x() { return gridDim.x; }
AWQ_DEVICE std::int64_t grid_y() { return gridDim.y; }

AWQ_DEVICE void sync_threads() { __syncthreads(); }
AWQ_DEVICE void sync_warp() { __syncwarp(); }
/// Of the `threads` threads (a multiple of 32) of barrier `id` (1 .. 15; 0 is sync_threads): wait for all; or only say
/// that one has come.
AWQ_DEVICE void sync_some(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
AWQ_DEVICE void arrive_some(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// All 32 lanes of a warp take part.
template <class T>
AWQ_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(~0u, value, lane);
}
template <class T>
AWQ_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(~0u, value, mask);
}
AWQ_DEVICE std::uint32_t ballot(bool vote) { return __ballot_sync(~0u, vote); }

// --- global memory: T of 1, 2, 4, 8 or 16 bytes, aligned to its size ------------------------------------------------

/// Read by nobody else and not again: leaves no trace in the first cache. Memory that no kernel in flight writes.
template <class T>
AWQ_DEVICE T load_once(const T* p) {
  static_assert(sizeof(T) == 16 || sizeof(T) == 4);
  if constexpr (sizeof(T) == 16) {
    Vector v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(p));
    return std::bit_cast<T>(v);
  } else {
    std::uint32_t v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return std::bit_cast<T>(v);
  }
}

/// Cached. Memory that no kernel in flight writes.
template <class T>
AWQ_DEVICE T load_constant(const T* p) {
  if constexpr (sizeof(T) == 16) {
    return std::bit_cast<T>(__ldg(reinterpret_cast<const uint4*>(p)));
  } else {
    return __ldg(p);
  }
}

template <class T>
AWQ_DEVICE T load(const T* p) {
  return *p;
}
template <class T>
AWQ_DEVICE void store(T* p, T value) {
  *p = value;
}

// --- shared memory: T of 2, 4, 8 or 16 bytes, aligned to its size ---------------------------------------------------

/// Start of the block's dynamic shared memory, a multiple of 1024.
AWQ_DEVICE Shared dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char awq_dynamic_shared[];
  return static_cast<Shared>(__cvta_generic_to_shared(awq_dynamic_shared));
}

template <class T>
AWQ_DEVICE T load_shared(Shared a) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  if constexpr (sizeof(T) == 16) {
    Vector v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "r"(a)
                 : "memory");
    return std::bit_cast<T>(v);
  } else if constexpr (sizeof(T) == 8) {
    std::uint64_t v;
    asm volatile("ld.shared.u64 %0, [%1];" : "=l"(v) : "r"(a) : "memory");
    return std::bit_cast<T>(v);
  } else if constexpr (sizeof(T) == 4) {
    std::uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(a) : "memory");
    return std::bit_cast<T>(v);
  } else {
    std::uint16_t v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(a) : "memory");
    return std::bit_cast<T>(v);
  }
}

template <class T>
AWQ_DEVICE void store_shared(Shared a, T value) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  if constexpr (sizeof(T) == 16) {
    const auto v = std::bit_cast<Vector>(value);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(a), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]),
                 "r"(v.word[3])
                 : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.shared.u64 [%0], %1;" ::"r"(a), "l"(std::bit_cast<std::uint64_t>(value)) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(a), "r"(std::bit_cast<std::uint32_t>(value)) : "memory");
  } else {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(a), "h"(std::bit_cast<std::uint16_t>(value)) : "memory");
  }
}

// --- matrices of 8 x 8 halves in shared memory ----------------------------------------------------------------------

/// Lane i gives the address of row i % 8 of matrix i / 8 (16 bytes, aligned; lanes beyond the last matrix: anything
/// valid), and gets of each matrix the pair of elements 2 (lane % 4) of row lane / 4. sm_75.
AWQ_DEVICE void load_matrices(std::uint32_t (&r)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
AWQ_DEVICE void load_matrices(std::uint32_t (&r)[2], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(row)
               : "memory");
}

// --- asynchronous copies of 16 bytes, sm_80 -------------------------------------------------------------------------

/// Copies `bytes` (0 .. 16) and fills the rest of the 16 with zeros. `from` is 16-byte aligned even if bytes is 0.
/// Before sm_80: at once.
AWQ_DEVICE void copy_async(Shared to, const void* from, int bytes) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
#else
  Vector v{};
  if (bytes == 16)
    v = load(static_cast<const Vector*>(from));
  else
    for (int i = 0; i < 16; ++i)
      if (i < bytes) v.word[i / 4] |= std::uint32_t{load(static_cast<const std::uint8_t*>(from) + i)} << (i % 4 * 8);
  store_shared(to, v);
#endif
}
AWQ_DEVICE void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
/// Until all but the newest kPending groups of this thread are there. Others see them after a barrier.
template <int kPending>
AWQ_DEVICE void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// --- barriers in shared memory (mbarrier) and bulk copies, sm_90 ----------------------------------------------------

/// A barrier is 8 bytes, aligned. One thread initialises it; fence_barriers and a barrier of all threads (cluster_sync,
/// if other blocks or copies touch it) come before its first use.
AWQ_DEVICE void barrier_init(Shared barrier, int arrivals) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
#endif
}
AWQ_DEVICE void fence_barriers() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
AWQ_DEVICE void barrier_arrive(Shared barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}
/// Arrives at the barrier at the same place of block `rank` of the cluster.
AWQ_DEVICE void barrier_arrive_at(Shared barrier, int rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
#endif
}
/// Arrives, and says that copies will bring so many bytes in this phase.
AWQ_DEVICE void barrier_expect(Shared barrier, std::uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}
/// Until the phase of that parity (0, 1, 0, 1, ...) has ended: all have arrived and all bytes are there. Copies' bytes
/// are seen, and what threads of this block did before they arrived; of other blocks only that they have arrived. (A
/// wider scope would empty the first cache each time.)
AWQ_DEVICE void barrier_wait(Shared barrier, int parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred done;\nwaiting:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra ready;\nbra waiting;\nready:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}

/// One thread copies `bytes` (a multiple of 16; both addresses too) and lets the barrier know. Weights: they are the
/// first to leave the second cache.
AWQ_DEVICE void copy_bulk(Shared to, const void* from, std::uint32_t bytes, Shared barrier) {
#if __CUDA_ARCH__ >= 900
  std::uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
#endif
}
/// One thread copies the box whose first element is (row, col) of the matrix; what lies outside is zeros, and counts.
AWQ_DEVICE void copy_tensor(Shared to, const TensorMap* map, int row, int col, Shared barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          to),
      "l"(map), "r"(barrier), "r"(col), "r"(row)
      : "memory");
#endif
}
/// The same to every block of the cluster whose bit is set in `blocks`, at the same place and barrier in each.
AWQ_DEVICE void copy_tensor_multicast(Shared to, const TensorMap* map, int row, int col, Shared barrier,
                                      std::uint16_t blocks) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(col), "r"(row), "h"(blocks)
      : "memory");
#endif
}
AWQ_DEVICE void prefetch_tensor_map(const TensorMap* map) {
#if __CUDA_ARCH__ >= 900
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}
/// Orders this thread's ordinary accesses to shared memory with those of copies and wgmma that come after.
AWQ_DEVICE void fence_async() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// --- clusters of blocks, sm_90 --------------------------------------------------------------------------------------

AWQ_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}
AWQ_DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
AWQ_DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
/// Of shared memory at the same place of block `rank` of the cluster. A block must not end while others read it.
template <class T>
AWQ_DEVICE T load_cluster(Shared a, int rank) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 16);
  Vector v{};
#if __CUDA_ARCH__ >= 900
  if constexpr (sizeof(T) == 16)
    asm volatile(
        "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %4, %5;\n"
        "ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [remote];\n}"
        : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
        : "r"(a), "r"(rank)
        : "memory");
  else
    asm volatile(
        "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %1, %2;\nld.shared::cluster.u32 %0, [remote];\n}"
        : "=r"(v.word[0])
        : "r"(a), "r"(rank)
        : "memory");
#endif
  if constexpr (sizeof(T) == 16)
    return std::bit_cast<T>(v);
  else
    return std::bit_cast<T>(v.word[0]);
}

// --- the grid and its neighbours in the stream, sm_90 ---------------------------------------------------------------

/// Until the kernels before this one in the stream have ended, and their writes are seen. Nothing to do if the launch
/// did not ask to start before that.
AWQ_DEVICE void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
AWQ_DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// --- registers ------------------------------------------------------------------------------------------------------

/// All warps of a warp group (four) give up registers above, or take registers up to, kCount (24 .. 256, of eights).
template <int kCount>
AWQ_DEVICE void give_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}
template <int kCount>
AWQ_DEVICE void take_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

// --- bits -----------------------------------------------------------------------------------------------------------

/// (bits & mask) | with: one instruction (lop3 with the table of that function), where a compiler may take two.
AWQ_DEVICE std::uint32_t select_or(std::uint32_t bits, std::uint32_t mask, std::uint32_t with) {
  std::uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(bits), "r"(mask), "r"(with));
  return d;
}

// --- arithmetic on pairs of 16-bit floats in a word -----------------------------------------------------------------

template <DType kType>
AWQ_DEVICE std::uint32_t sub_pair(std::uint32_t a, std::uint32_t b) {
  static_assert(kType == DType::f16 || kType == DType::bf16);
  std::uint32_t d;
  if constexpr (kType == DType::f16) {
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  } else {
#if __CUDA_ARCH__ >= 900
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#else  // a - b = b * -1 + a, rounded once
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(b), "r"(0xbf80bf80u), "r"(a));
#endif
  }
  return d;
}
template <DType kType>
AWQ_DEVICE std::uint32_t mul_pair(std::uint32_t a, std::uint32_t b) {
  static_assert(kType == DType::f16 || kType == DType::bf16);
  std::uint32_t d;
  if constexpr (kType == DType::f16) {
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  } else {
#if __CUDA_ARCH__ >= 900
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#else  // a * b + -0 keeps the sign of a zero
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
#endif
  }
  return d;
}
/// Two floats, each rounded to nearest, ties to even: `low` in the lower half of the word.
template <DType kType>
AWQ_DEVICE std::uint32_t round_pair(float low, float high) {
  static_assert(kType == DType::f16 || kType == DType::bf16);
  std::uint32_t d;
  if constexpr (kType == DType::f16)
    asm("{\n.reg .b16 l, h;\ncvt.rn.f16.f32 l, %1;\ncvt.rn.f16.f32 h, %2;\nmov.b32 %0, {l, h};\n}"
        : "=r"(d)
        : "f"(low), "f"(high));
  else
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#else
    d = core::float_to_bfloat(low) | static_cast<std::uint32_t>(core::float_to_bfloat(high)) << 16;
#endif
  return d;
}
template <DType kType>
AWQ_DEVICE float to_float(std::uint16_t bits) {
  if constexpr (kType == DType::f16) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
  } else {
    return core::bfloat_to_float(bits);
  }
}

// --- matrix units ---------------------------------------------------------------------------------------------------

/// d += a b, by the 32 lanes of a warp: a 16 x 16, b 16 x 8, d 16 x 8 float. With r = lane / 4, t = lane % 4: a[0..3]
/// are the pairs (r, 2t), (r + 8, 2t), (r, 2t + 8), (r + 8, 2t + 8) of rows of a; b[0..1] the pairs of rows 2t, 2t + 8
/// of column r of b; d (r, 2t), (r, 2t + 1), (r + 8, 2t), (r + 8, 2t + 1). sm_80; sm_75 has float16 in two halves.
template <DType kType>
AWQ_DEVICE void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  static_assert(kType == DType::f16 || kType == DType::bf16);
#if __CUDA_ARCH__ >= 800
  if constexpr (kType == DType::f16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif __CUDA_ARCH__ >= 750
  if constexpr (kType == DType::f16)
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%8}, {%0, %1, %2, %3};\n"
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%6, %7}, {%9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// --- matrix units for a warp group of four warps, sm_90a ------------------------------------------------------------

/// Before the first wgmma, and wherever registers that one reads have been written since: a and d are ready.
AWQ_DEVICE void wgmma_fence() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
AWQ_DEVICE void wgmma_commit() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
/// Until all but the newest kPending groups have ended; only then may their a be written, their d be read, or what
/// their b points to be overwritten.
template <int kPending>
AWQ_DEVICE void wgmma_wait() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace awq::cuda::ptx

#include "wgmma.cuh"
#endif
