#include <algorithm>
#include <cstring>
#include <iostream>
#include <string>

#include "catch.hpp"
#include "core/cpu.h"
#include "core/kernels.h"
#include "core/plan.h"
#include "data.h"

using namespace awq::core;

TEST_CASE("every shape gets a kernel whose tiles cover the columns exactly once") {
  for (const Kernels* const* level = all_kernels(); *level != nullptr; ++level)
    for (const DType type : {DType::f64, DType::f32, DType::f16, DType::bf16})
      for (const std::int64_t m : {0, 1, 2, 4, 5, 64, 65, 4096, 1 << 20})
        for (const std::int64_t n : {0, 8, 24, 64, 72, 136, 4096, 151936})
          for (const std::int64_t k : {0, 1, 32, 4096, 1 << 17}) {
            CAPTURE((*level)->name, int(type), m, n, k);
            const LinearPlan plan = plan_linear(m, n, k, type, **level);
            const LinearPlan again = plan_linear(m, n, k, type, **level);
            REQUIRE(plan.tile > 0);
            REQUIRE(plan.tile % 8 == 0);
            REQUIRE(plan.tiles * plan.tile >= n);
            REQUIRE((plan.tiles == 0 || (plan.tiles - 1) * plan.tile < n));
            REQUIRE(plan.grain >= 1);
            const bool reference = plan.kernel == LinearKernel::reference;
            REQUIRE(reference == (type == DType::f64));
            REQUIRE((reference || plan.tile == (*level)->strip));
            const char* const names[] = {"reference", "decode", "gemm"};
            REQUIRE(std::string(plan.name) == names[static_cast<int>(plan.kernel)]);
            REQUIRE(std::strlen(plan.why) > 0);
            REQUIRE((plan.kernel == again.kernel && plan.tiles == again.tiles && plan.tile == again.tile &&
                     plan.grain == again.grain));
          }
}

TEST_CASE("one row is decoded, many rows are multiplied, whatever the shape of the weight") {
  for (const Kernels* const* level = all_kernels(); *level != nullptr; ++level)
    for (const std::int64_t n : {8, 4096})
      for (const std::int64_t k : {32, 11008}) {
        CHECK(plan_linear(1, n, k, DType::f16, **level).kernel == LinearKernel::decode);
        CHECK(plan_linear(512, n, k, DType::f16, **level).kernel == LinearKernel::gemm);
      }
}

TEST_CASE("strips: little is prepared by each thread, much or for few columns by all together") {
  const auto apart = [](std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t threads) {
    const LinearPlan plan = plan_strips(m, n, k, 128, DType::bf16, Activation::exact, portable_kernels());
    return prepare_apart(plan, m, n, k, threads);
  };
  CHECK(apart(1, 4096, 4096, 2));
  CHECK(apart(16, 4096, 4096, 2));
  CHECK(apart(32, 1024, 1024, 2));
  CHECK_FALSE(apart(17, 4096, 4096, 2));
  CHECK(apart(65, 4096, 128, 2));
  CHECK_FALSE(apart(1, 1024, 4096, 8));
  CHECK_FALSE(apart(512, 4096, 4096, 2));
}

TEST_CASE("a small call is not cut into pieces smaller than a thread is worth") {
  const Kernels& kernels = portable_kernels();
  const LinearPlan small = plan_linear(1, 4096, 32, DType::f32, kernels);
  CHECK(small.grain > 1);
  CHECK(plan_linear(64, 4096, 4096, DType::f32, kernels).grain == 1);
}

TEST_CASE("the levels of this CPU: best first, portable last, well formed") {
  const Kernels* const* levels = all_kernels();
  REQUIRE(levels[0] != nullptr);
  bool best_listed = false;
  for (; *levels != nullptr; ++levels) {
    best_listed |= *levels == &best_kernels();
    std::cout << "level: " << (*levels)->name << std::endl;  // so that a log says what ran
    CHECK((*levels)->strip % 8 == 0);
    CHECK((*levels)->strip % (*levels)->panel == 0);
    CHECK((*levels)->gram_block > 0);
    if (levels[1] == nullptr) {
      CHECK(*levels == &portable_kernels());
    }
  }
  CHECK(best_listed);
}
