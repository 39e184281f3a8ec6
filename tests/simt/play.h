// The linear kernels, played as their launchers (csrc/cuda/*.cu) would run them.
#pragma once
#include "core/linear.h"
#include "cuda/plan.h"
#include "simt.h"

namespace simt {

enum class Blocks { all, last_tile };  // last_tile: of each launch those of the tile that is last along x

/// y by the plan's kernel, and by the one that adds, if blocks leave their sums in `workspace`, plan.workspace_bytes.
void play(const awq::core::LinearArgs& args, const awq::cuda::CudaPlan& plan, void* workspace, const Options& options,
          Blocks blocks = Blocks::all);

}  // namespace simt
