// The interpreter: barriers in shared memory, bulk and tensor copies, clusters, wgmma. What is right runs under every
// schedule; of each thing that can be left out, the Error names what is missing.
#include <cstring>
#include <string>
#include <vector>

#include "cpp/catch.hpp"
#include "cpp/data.h"
#include "cuda/ptx.cuh"
#include "simt/planted.h"
#include "simt/simt.h"

using namespace awq::cuda;
using namespace simt::test;
using awq::core::DType;

namespace {

std::uint32_t u(int i) { return static_cast<std::uint32_t>(i); }

/// What a planted error leaves out, or does.
enum class Fault {
  none,
  no_fence_barriers,
  no_sync_after_init,
  no_wait,
  no_free,  // the ring's place is filled again before all have read it
  wrong_parity,
  too_few_bytes,
  too_many_bytes,
  too_many_arrivals,
};

// A ring of two places: thread 0 of warp 1 fills it, warp 0 reads it.
void ring(const std::uint32_t* x, float* y, int steps, Fault fault) {
  const ptx::Shared full = ptx::dynamic_shared(), free = full + 16, data = full + 128;
  const int thread = ptx::thread();
  if (thread == 0) {
    for (int i = 0; i < 2; ++i) {
      ptx::barrier_init(full + 8 * u(i), 1);
      ptx::barrier_init(free + 8 * u(i), 32);
    }
    if (fault != Fault::no_fence_barriers) ptx::fence_barriers();
  }
  if (fault != Fault::no_sync_after_init) ptx::sync_threads();
  if (thread == 32) {
    for (int step = 0; step < steps; ++step) {
      const ptx::Shared place = u(step % 2);
      if (fault != Fault::no_free) ptx::barrier_wait(free + 8 * place, step / 2 % 2 ^ 1);
      const std::uint32_t more = fault == Fault::too_few_bytes ? -64 : fault == Fault::too_many_bytes ? 64 : 0;
      ptx::barrier_expect(full + 8 * place, 512 + more);
      ptx::copy_bulk(data + 512 * place, x + 128 * step, 512, full + 8 * place);
      if (fault == Fault::too_many_arrivals) ptx::barrier_arrive(full + 8 * place);
    }
  } else if (thread < 32) {
    float sum = 0.0f;
    for (int step = 0; step < steps; ++step) {
      const ptx::Shared place = u(step % 2);
      const int parity = step / 2 % 2;
      if (fault != Fault::no_wait) ptx::barrier_wait(full + 8 * place, fault == Fault::wrong_parity ? 1 : parity);
      const auto v = ptx::load_shared<Vector>(data + 512 * place + 16 * u(thread));
      for (const std::uint32_t word : v.word) sum += static_cast<float>(word);
      ptx::barrier_arrive(free + 8 * place);
    }
    ptx::store(y + thread, sum);
  }
}

constexpr simt::Launch kRing{.threads = 64, .shared_bytes = 128 + 1024};

}  // namespace

TEST_CASE("simt: a ring of bulk copies, and what can be wrong with one") {
  constexpr int kSteps = 7;
  simt::Buffer<std::uint32_t> x(128 * kSteps, "x");
  simt::Buffer<float> y(32, "y");
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = u(static_cast<int>(i % 1000));
  const auto play = [&](Fault fault) { return [&x, &y, fault] { ring(x.data(), y.data(), kSteps, fault); }; };
  y.global().uninitialised();
  run_seeds(kRing, play(Fault::none));
  REQUIRE(y.global().all_written());
  for (std::size_t lane = 0; lane < 32; ++lane) {
    float sum = 0.0f;
    for (std::size_t step = 0; step < kSteps; ++step)
      for (std::size_t i = 0; i < 4; ++i) sum += static_cast<float>(x[128 * step + 4 * lane + i]);
    REQUIRE(y[lane] == sum);
  }
  const auto error = [&](Fault fault) { return error_of(kRing, play(fault)); };
  REQUIRE(contains(error(Fault::no_fence_barriers), "needs fence_barriers"));
  REQUIRE(contains(error(Fault::no_wait), "shared byte"));
  error(
      Fault::no_free);  // a second arrival in the phase, or a copy over what is still read: it depends on the schedule
  REQUIRE(contains(error(Fault::wrong_parity), "shared byte"));
  REQUIRE(contains(error(Fault::too_few_bytes), "lacks 0 of 1 arrivals and -64 bytes"));
  REQUIRE(contains(error(Fault::too_many_bytes), "deadlock"));
  REQUIRE(contains(error(Fault::too_many_bytes), "lacks 0 of 1 arrivals and 64 bytes"));
  REQUIRE(contains(error(Fault::too_many_arrivals), "arrivals"));
  REQUIRE(contains(error(Fault::no_sync_after_init), "barrier"));
}

TEST_CASE("simt: a phase that ends before all of its copies have") {
  simt::Buffer<std::uint32_t> x(8, "x");
  const auto body = [&](std::uint32_t bytes) {
    const ptx::Shared s = ptx::dynamic_shared();
    if (ptx::thread() != 0) return;
    ptx::barrier_init(s, 1);
    ptx::fence_barriers();
    for (std::uint32_t i = 0; i < 2; ++i) ptx::copy_bulk(s + 16 + 16 * i, x.data() + 4 * i, 16, s);
    ptx::barrier_expect(s, bytes);
    ptx::barrier_wait(s, 0);
  };
  constexpr simt::Launch kLaunch{.shared_bytes = 64};
  run_seeds(kLaunch, [&] { body(32); });
  error_of(kLaunch, [&] { body(16); });
  try {
    simt::run(kLaunch, {.seed = 1}, [&] { body(16); });
    FAIL("no error");
  } catch (const simt::Error& error) {
    REQUIRE(contains(error.what(), "fewer bytes were expected"));
  }
}

TEST_CASE("simt: barriers are what their bytes hold") {
  const ptx::Shared s = ptx::dynamic_shared();
  const auto one = [](auto body) {
    return error_of({.shared_bytes = 64}, [body] {
      if (ptx::thread() == 0) body();
    });
  };
  REQUIRE(contains(one([=] { ptx::barrier_arrive(s); }), "not an initialised barrier"));
  REQUIRE(contains(one([=] { ptx::barrier_init(s + 4, 1); }), "8-byte aligned"));
  REQUIRE(contains(one([=] { ptx::barrier_init(s + 64, 1); }), "out of bounds"));
  REQUIRE(contains(one([=] { ptx::barrier_init(s, 0); }), "arrivals"));
  REQUIRE(contains(one([=] {
                     ptx::barrier_init(s, 1);
                     ptx::load_shared<std::uint32_t>(s + 4);
                   }),
                   "part of a barrier"));
  REQUIRE(contains(one([=] {
                     ptx::barrier_init(s, 1);
                     ptx::barrier_init(s, 1);
                   }),
                   "part of a barrier"));
  REQUIRE(contains(one([=] {
                     ptx::barrier_init(s, 2);
                     ptx::barrier_arrive(s);
                     ptx::barrier_wait(s, 0);
                   }),
                   "lacks 1 of 2 arrivals"));
}

TEST_CASE("simt: ordinary accesses and bulk copies need fence_async between them") {
  simt::Buffer<std::uint32_t> x(4, "x");
  const auto body = [&](bool fence, bool changed, bool early_end) {
    const ptx::Shared s = ptx::dynamic_shared();
    if (ptx::thread() == 0) {
      ptx::barrier_init(s, 1);
      ptx::fence_barriers();
      ptx::store_shared(s + 16, 1.0f);
      if (fence) ptx::fence_async();
      ptx::barrier_expect(s, 16);
      ptx::copy_bulk(s + 16, x.data(), 16, s);
      if (changed) ptx::store(x.data() + 1, ptx::load(x.data() + 1) + 1);
      if (!early_end) ptx::barrier_wait(s, 0);
    }
  };
  constexpr simt::Launch kLaunch{.shared_bytes = 32};
  run_seeds(kLaunch, [&] { body(true, false, false); });
  REQUIRE(contains(error_of(kLaunch, [&] { body(false, false, false); }), "no fence_async"));
  bool changed = false, ended = false;  // neither can be seen if the copy ends at once
  try {
    simt::run(kLaunch, {.seed = 1}, [&] { body(true, true, false); });
  } catch (const simt::Error& error) {
    changed = contains(error.what(), "was changed while the copy was under way");
  }
  try {
    simt::run(kLaunch, {.seed = 1}, [&] { body(true, false, true); });
  } catch (const simt::Error& error) {
    ended = contains(error.what(), "the block ends while this copy");
  }
  REQUIRE((changed && ended));
}

TEST_CASE("simt: tensor copies cut out boxes, swizzled, with zeros outside") {
  constexpr int kRows = 21, kCols = 100, kStride = 104, kBoxRows = 16;
  simt::Buffer<std::uint16_t> x(kRows * kStride, "x");
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<std::uint16_t>(i + 1);
  simt::Buffer<std::uint16_t> y(kBoxRows * 64, "y");
  for (const bool swizzled : {false, true})
    for (const int row : {-3, 0, 8, 16})
      for (const int col : {-8, -5, 0, 64, 77}) {
        TensorMap map;
        simt::encode(map, x.data(), 2, kRows, kCols, 2 * kStride, kBoxRows, 64, swizzled);
        run_seeds({.shared_bytes = 3072}, [&] {
          const ptx::Shared barrier = ptx::dynamic_shared(), data = barrier + 1024;
          if (ptx::thread() == 0) {
            ptx::prefetch_tensor_map(&map);
            ptx::barrier_init(barrier, 1);
            ptx::fence_barriers();
            ptx::barrier_expect(barrier, kBoxRows * 128);
            ptx::copy_tensor(data, &map, row, col, barrier);
          }
          ptx::sync_warp();
          ptx::barrier_wait(barrier, 0);
          for (int i = ptx::thread(); i < kBoxRows * 64; i += 32)
            ptx::store(y.data() + i, ptx::load_shared<std::uint16_t>(data + 2 * u(i)));
        });
        for (int i = 0; i < kBoxRows; ++i)
          for (int j = 0; j < 64; ++j) {
            const int r = row + i, c = col + j;
            const bool inside = r >= 0 && r < kRows && c >= 0 && c < kCols;
            const int at = swizzled ? i * 64 + (j / 8 ^ i % 8) * 8 + j % 8 : i * 64 + j;
            REQUIRE(y[u(at)] == (inside ? x[u(r * kStride + c)] : 0));
          }
      }
  TensorMap map;
  REQUIRE_THROWS_AS(simt::encode(map, x.data() + 1, 2, kRows, kCols, 208, 16, 64, true), simt::Error);
  REQUIRE_THROWS_AS(simt::encode(map, x.data(), 2, kRows, kCols, 202, 16, 64, true), simt::Error);
  REQUIRE_THROWS_AS(simt::encode(map, x.data(), 2, kRows, kCols, 192, 16, 64, true), simt::Error);
  REQUIRE_THROWS_AS(simt::encode(map, x.data(), 2, kRows, kCols, 208, 257, 64, true), simt::Error);
  REQUIRE_THROWS_AS(simt::encode(map, x.data(), 2, kRows, kCols, 208, 16, 128, true), simt::Error);
}

namespace {

enum class ClusterFault { none, no_sync, leaves, no_arrival };

/// Every block sends a value to all and reads one of each; `rank` 0 copies a row of x to all.
void exchange_in_cluster(const TensorMap* map, std::uint32_t* y, ClusterFault fault) {
  const ptx::Shared barrier = ptx::dynamic_shared(), mine = barrier + 16, row = barrier + 1024;
  const int rank = ptx::cluster_rank();
  if (ptx::thread() == 0) {
    ptx::barrier_init(barrier, 1);
    ptx::fence_barriers();
    ptx::barrier_expect(barrier, 128);
    ptx::store_shared(mine, u(100 + rank));
  }
  if (fault != ClusterFault::no_sync) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  if (rank == 0 && ptx::thread() == 0) ptx::copy_tensor_multicast(row, map, 1, 0, barrier, 0xf);
  std::uint32_t sum = 0;
  for (int other = 0; other < 4; ++other) sum += ptx::load_cluster<std::uint32_t>(mine, other);
  ptx::barrier_wait(barrier, 0);
  sum += ptx::load_shared<std::uint32_t>(row + 4 * u(ptx::thread()));
  ptx::store(y + 32 * ptx::block_x() + ptx::thread(), sum);
  if (fault == ClusterFault::leaves) return;
  if (fault != ClusterFault::no_arrival || rank != 2) ptx::cluster_arrive();
  ptx::cluster_wait();
}

}  // namespace

TEST_CASE("simt: clusters read each other's memory, and nobody leaves early") {
  simt::Buffer<std::uint32_t> x(3 * 32, "x"), y(8 * 32, "y");
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = u(static_cast<int>(7 * i));
  TensorMap map;
  simt::encode(map, x.data(), 4, 3, 32, 128, 1, 32, false);
  constexpr simt::Launch kLaunch{.grid_x = 8, .cluster = 4, .shared_bytes = 2048};
  const auto play = [&](ClusterFault fault) { return [&, fault] { exchange_in_cluster(&map, y.data(), fault); }; };
  run_seeds(kLaunch, play(ClusterFault::none));
  for (std::size_t i = 0; i < y.size(); ++i) REQUIRE(y[i] == 406 + x[32 + i % 32]);
  REQUIRE(contains(error_of(kLaunch, play(ClusterFault::leaves)), "end"));
  REQUIRE(contains(error_of(kLaunch, play(ClusterFault::no_arrival)), "cluster_wait without cluster_arrive"));
  error_of(kLaunch, play(ClusterFault::no_sync));
  REQUIRE(contains(error_of({.grid_x = 2, .cluster = 2, .shared_bytes = 64},
                            [] {
                              const ptx::Shared s = ptx::dynamic_shared();
                              if (ptx::cluster_rank() == 0) ptx::store_shared(s + 4 * u(ptx::thread()), 1u);
                              ptx::cluster_arrive();
                              if (ptx::cluster_rank() == 1 && ptx::thread() > 90) ptx::load_cluster<float>(s, 0);
                              if (ptx::cluster_rank() == 1) ptx::cluster_wait();
                              if (ptx::cluster_rank() == 1) ptx::load_cluster<float>(s, 0);
                            }),
                   "out of bounds"));
}

TEST_CASE("simt: a block that ends while another may still read it") {
  const auto text = error_of({.grid_x = 2, .cluster = 2, .shared_bytes = 128}, [] {
    const ptx::Shared s = ptx::dynamic_shared() + 4 * u(ptx::thread());
    ptx::store_shared(s, 1.0f);
    ptx::cluster_arrive();
    ptx::cluster_wait();
    if (ptx::cluster_rank() == 1) ptx::load_cluster<float>(s, 0);
  });
  REQUIRE(contains(text, "ended"));
}

TEST_CASE("simt: an early launch waits before it uses what earlier kernels make") {
  simt::Buffer<float> w(32, "w"), x(32, "x"), y(32, "y");
  w.global().weights();
  const auto body = [&](bool wait) {
    const int i = ptx::thread();
    const float weight = ptx::load_once(w.data() + i);
    if (wait) ptx::wait_for_earlier_kernels();
    ptx::store(y.data() + i, weight * ptx::load(x.data() + i));
    ptx::let_next_kernel_start();
  };
  run_seeds({.early = true}, [&] { body(true); });
  run_seeds({}, [&] { body(false); });
  REQUIRE(contains(error_of({.early = true}, [&] { body(false); }), "before wait_for_earlier_kernels"));
}

namespace {

enum class ProductFault {
  none,
  no_fence,              // before the first wgmma
  no_fence_after_write,  // of a, the second time
  early_write,           // of a, before the wait
  early_read,            // of d
  early_change,          // of d
  no_settle,
  early_settle,  // of a
  no_commit,
  no_wait,
  divergent_b,
  overwrite_b,
  no_fence_async,
};

/// d [64 x kColumns] of a warp group += a [64 x 128] b [128 x kColumns], b as columns of 64 in two places.
template <DType kType, int kColumns>
void product(const std::uint32_t* a, const std::uint32_t* b, float* y, ProductFault fault) {
  const int thread = ptx::thread(), warp = thread / 32, r = thread % 32 / 4, t = thread % 4;
  const ptx::Shared start = ptx::dynamic_shared();
  for (int i = thread; i < kColumns * 64; i += 128) {
    const int column = i / 64, pair = i % 64, k = pair % 32 * 2;
    const ptx::Shared place =
        start + u(pair / 32 * kColumns * 128 + column * 128 + (k / 8 ^ column % 8) * 16 + k % 8 * 2);
    ptx::store_shared(place, ptx::load(b + i));
  }
  if (fault != ProductFault::no_fence_async) ptx::fence_async();
  ptx::sync_threads();
  float d[kColumns / 2];
  std::uint32_t fragments[2][4];
  const auto load_a = [&](int step) {
    for (int j = 0; j < 4; ++j)
      fragments[step % 2][j] = ptx::load(a + (16 * warp + r + j % 2 * 8) * 64 + step * 8 + j / 2 * 4 + t);
  };
  load_a(0);
  for (int step = 0; step < 8; ++step) {
    if (fault != ProductFault::no_fence && (fault != ProductFault::no_fence_after_write || step == 0))
      ptx::wgmma_fence();
    const ptx::Shared from = start + u(step / 4 * kColumns * 128 + step % 4 * 32) +
                             (fault == ProductFault::divergent_b && warp == 3 ? 32 : 0);
    ptx::wgmma<kType, kColumns>(d, fragments[step % 2], ptx::wgmma_descriptor(from), step != 0);
    if (fault != ProductFault::no_commit) ptx::wgmma_commit();
    if (fault == ProductFault::early_read) ptx::wgmma_settle(d);
    if (fault == ProductFault::early_settle) ptx::wgmma_settle(fragments[step % 2], start);
    if (step == 7) break;
    if (fault == ProductFault::early_write) load_a(step + 2 < 8 ? step + 2 : 0);
    ptx::wgmma_wait<1>();
    load_a(step + 1);
  }
  if (fault == ProductFault::early_change && thread == 77) d[kColumns / 2 - 1] = 0.0f;
  if (fault == ProductFault::overwrite_b && thread == 127) ptx::store_shared(start + kColumns * 128 + 96, 1u);
  if (fault != ProductFault::no_wait) ptx::wgmma_wait<0>();
  if (fault == ProductFault::no_wait) return;
  if (fault != ProductFault::no_settle) ptx::wgmma_settle(d);
  if (fault == ProductFault::no_settle) expect(!(d[1] == d[1]));
  for (int i = 0; i < kColumns / 2; ++i)
    ptx::store(y + (16 * warp + r + i % 4 / 2 * 8) * kColumns + i / 4 * 8 + 2 * t + i % 2, d[i]);
}

template <DType kType, int kColumns>
void check_product() {
  awq::test::Random random(3);
  const awq::test::Array a(kType, 64 * 128, random, -2.0, 2.0), b(kType, kColumns * 128, random, -2.0, 2.0);
  simt::Buffer<std::uint32_t> words_a(64 * 64, "a"), words_b(kColumns * 64, "b");
  std::memcpy(words_a.data(), a.data(), 64 * 256);
  std::memcpy(words_b.data(), b.data(), kColumns * 256);
  simt::Buffer<float> y(64 * kColumns, "y");
  constexpr simt::Launch kLaunch{.threads = 128, .shared_bytes = kColumns * 256};
  const auto play = [&](ProductFault fault) {
    return [&, fault] { product<kType, kColumns>(words_a.data(), words_b.data(), y.data(), fault); };
  };
  run_seeds(kLaunch, play(ProductFault::none));
  bool right = true;
  for (int row = 0; row < 64; ++row)
    for (int col = 0; col < kColumns; ++col) {
      float sum = 0.0f;
      for (int k = 0; k < 128; ++k) sum += static_cast<float>(a[row * 128 + k]) * static_cast<float>(b[col * 128 + k]);
      right = right && y[u(row * kColumns + col)] == sum;
    }
  REQUIRE(right);
  const auto error = [&](ProductFault fault) { return error_of(kLaunch, play(fault)); };
  REQUIRE(contains(error(ProductFault::no_fence), "without a wgmma_fence"));
  REQUIRE(contains(error(ProductFault::no_fence_after_write), "a was written after the last wgmma_fence"));
  REQUIRE(contains(error(ProductFault::early_write), "a was written before the wgmma that reads it"));
  REQUIRE(contains(error(ProductFault::early_read), "wgmma_settle"));
  REQUIRE(contains(error(ProductFault::early_settle), "still reads"));
  run_seeds(kLaunch, play(ProductFault::no_settle));  // what it stores is not a number
  REQUIRE(contains(error(ProductFault::early_change), "thread 77"));
  REQUIRE(contains(error(ProductFault::early_change), "d was written before it was waited for"));
  REQUIRE(contains(error(ProductFault::no_commit), "wgmma"));
  REQUIRE(contains(error(ProductFault::no_wait), "ends before it has waited for this wgmma"));
  REQUIRE(contains(error(ProductFault::divergent_b), "divergent"));
  REQUIRE(contains(error(ProductFault::overwrite_b), "shared byte"));
  REQUIRE(contains(error(ProductFault::no_fence_async), "no fence_async"));
}

}  // namespace

TEST_CASE("simt: wgmma with a in registers, and what can be wrong around it") {
  check_product<DType::f16, 16>();
  check_product<DType::bf16, 64>();
  check_product<DType::f16, 8>();
}

namespace {

enum class ChainFault { none, no_wait, no_fence_after_change, misaligned, divergent_place };

/// y [64 x 16] = 2 (1 + a b) + a b, where a is all ones and b [64 x 16] comes by copy_tensor.
void chain(const TensorMap* map, float* y, ChainFault fault) {
  const ptx::Shared barrier = ptx::dynamic_shared(), b = barrier + 1024;
  const int thread = ptx::thread(), r = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
  if (thread == 0) {
    ptx::barrier_init(barrier, 1);
    ptx::fence_barriers();
    ptx::barrier_expect(barrier, 2048);
    ptx::copy_tensor(b, map, 0, 0, barrier);
  }
  ptx::sync_threads();
  if (fault != ChainFault::no_wait || thread != 100) ptx::barrier_wait(barrier, 0);
  const std::uint32_t a[4] = {0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00};
  float d[8];
  for (float& value : d) value = 1.0f;
  ptx::wgmma_fence();
  const auto add = [&] {
    for (ptx::Shared k = 0; k < 128; k += 32)
      ptx::wgmma<DType::f16, 16>(d, a, ptx::wgmma_descriptor(b + k + (fault == ChainFault::misaligned ? 512 : 0)),
                                 true);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::wgmma_settle(d);
  };
  add();
  for (float& value : d) value *= 2.0f;
  if (fault != ChainFault::no_fence_after_change) ptx::wgmma_fence();
  if (fault == ChainFault::divergent_place && thread / 32 == 2) ptx::wgmma_fence();
  if (fault == ChainFault::divergent_place && thread / 32 == 1)
    ptx::wgmma<DType::f16, 16>(d, a, ptx::wgmma_descriptor(b), true);
  add();
  for (int i = 0; i < 8; ++i) ptx::store(y + (r + i % 4 / 2 * 8) * 16 + i / 4 * 8 + 2 * t + i % 2, d[i]);
}

}  // namespace

TEST_CASE("simt: wgmma goes on from the d that it finds, and reads what copies bring") {
  simt::Buffer<std::uint16_t> b(16 * 64, "b");
  simt::Buffer<float> y(64 * 16, "y");
  float sums[16] = {};
  for (int col = 0; col < 16; ++col)
    for (int k = 0; k < 64; ++k) {
      const auto value = static_cast<float>((7 * col + 3 * k) % 11 - 5);
      b[u(col * 64 + k)] = awq::core::float_to_half(value);
      sums[col] += value;
    }
  TensorMap map;
  simt::encode(map, b.data(), 2, 16, 64, 128, 16, 64, true);
  constexpr simt::Launch kLaunch{.threads = 128, .shared_bytes = 1024 + 2048};
  const auto play = [&](ChainFault fault) { return [&, fault] { chain(&map, y.data(), fault); }; };
  y.global().uninitialised();
  run_seeds(kLaunch, play(ChainFault::none));
  for (std::size_t i = 0; i < y.size(); ++i) REQUIRE(y[i] == 2.0f * (1.0f + sums[i % 16]) + sums[i % 16]);
  const auto text = error_of(kLaunch, play(ChainFault::no_wait));
  REQUIRE(contains(text, "thread 100"));
  REQUIRE(contains(text, "for which this thread has not waited"));
  REQUIRE(contains(error_of(kLaunch, play(ChainFault::no_fence_after_change)), "d was written after the last"));
  REQUIRE(contains(error_of(kLaunch, play(ChainFault::misaligned)), "multiple of 1024 plus"));
  REQUIRE(contains(error_of(kLaunch, play(ChainFault::divergent_place)), "divergent"));
}

TEST_CASE("simt: the end of wgmma in one warp says nothing of another") {
  // Warp 0 waits for its own part and lets b be overwritten; the other warps' parts may still read it.
  const auto text = error_of({.threads = 160, .shared_bytes = 1024}, [] {
    const ptx::Shared start = ptx::dynamic_shared();
    const int thread = ptx::thread();
    for (int i = thread; i < 256; i += 160) ptx::store_shared(start + 4 * u(i), 0u);
    ptx::fence_async();
    ptx::sync_threads();
    if (thread < 128) {
      float d[4];
      const std::uint32_t a[4] = {0, 0, 0, 0};
      ptx::wgmma_fence();
      ptx::wgmma<DType::f16, 8>(d, a, ptx::wgmma_descriptor(start), false);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
    }
    if (thread < 32) ptx::arrive_some(1, 64);
    if (thread >= 128) {
      ptx::sync_some(1, 64);
      ptx::store_shared(start, 1u);
    }
  });
  REQUIRE(contains(text, "wgmma"));
}

TEST_CASE("simt: registers move between warp groups") {
  const simt::Launch launch{.threads = 384, .registers = 168};
  const auto body = [](bool give) {
    if (ptx::thread() < 128) {
      if (give) ptx::give_registers<24>();
    } else {
      ptx::take_registers<240>();
    }
  };
  run_seeds(launch, [&] { body(true); });
  REQUIRE(contains(error_of(launch, [&] { body(false); }), "take_registers"));
  REQUIRE(contains(error_of(launch, [] { ptx::give_registers<176>(); }), "have 168 only"));
  REQUIRE(contains(error_of(launch,
                            [] {
                              if (ptx::thread() < 32) ptx::give_registers<24>();
                            }),
                   "deadlock"));
}
