// Every instruction-set level that this CPU can run.
#pragma once
#include "catch.hpp"
#include "core/cpu.h"
#include "core/kernels.h"

namespace awq::test {

/// Calls body(kernels) for every level.
template <class Body>
void for_levels(Body body) {
  for (const core::Kernels* const* level = core::all_kernels(); *level != nullptr; ++level) {
    CAPTURE((*level)->name);
    body(**level);
  }
}

}  // namespace awq::test
