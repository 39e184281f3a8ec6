// The searches, one body per kernel, in the order in which they run. Rounding is core's own, so that every candidate
// has the codes that it has on a CPU; of the sums only the order differs.
//
// Nothing here can raise. What a CPU refuses gives NaN: a candidate, a loss or a range that quantize then refuses.
#pragma once
#include <cmath>
#include <limits>

#include "device_code.h"
#include "ptx.cuh"
#include "search.h"

namespace awq::cuda {

inline constexpr int kWarps = kThreads / kWarp;

/// Calls visit(item) for each item of 0 .. count - 1: one thread, or one warp with all its lanes, for each.
template <class Visit>
AWQ_DEVICE void for_threads(std::int64_t count, const Visit& visit) {
  for (std::int64_t i = ptx::block_x() * kThreads + ptx::thread(); i < count; i += ptx::grid_x() * kThreads) visit(i);
}
template <class Visit>
AWQ_DEVICE void for_warps(std::int64_t count, const Visit& visit) {
  for (std::int64_t i = ptx::block_x() * kWarps + ptx::thread() / kWarp; i < count; i += ptx::grid_x() * kWarps)
    visit(i);
}

/// 0 of a finite number, else NaN.
AWQ_DEVICE float poison_of(float x) { return x * 0.0f; }

/// What all lanes saw together. The order does not matter, see GroupRange.
AWQ_DEVICE GroupRange all_lanes(GroupRange range) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    range.merge({ptx::shuffle_xor(range.lo, distance), ptx::shuffle_xor(range.hi, distance),
                 ptx::shuffle_xor(range.poison, distance)});
  return range;
}

/// value, combined over all threads of the block, the same in each: add(a, b) over neighbours, then over warps in
/// order.
template <class Add>
AWQ_DEVICE double all_threads(double value, const Add& add) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value = add(value, ptx::shuffle_xor(value, distance));
  const ptx::Shared place = ptx::dynamic_shared();
  ptx::sync_threads();  // everybody has read what an earlier call left here
  if (ptx::thread() % kWarp == 0) ptx::store_shared(place + 8u * static_cast<unsigned>(ptx::thread() / kWarp), value);
  ptx::sync_threads();
  value = ptx::load_shared<double>(place);
  for (unsigned warp = 1; warp < kWarps; ++warp) value = add(value, ptx::load_shared<double>(place + 8u * warp));
  return value;
}

inline constexpr int kTotalsShared = 8 * kWarps;  // bytes that all_threads needs

// --- candidates -----------------------------------------------------------------------------------------------------

AWQ_DEVICE void mean_inverse_body(const MeanArgs& a) {
  for_warps(a.n * (a.k / a.group), [&](std::int64_t group) {
    GroupRange magnitudes;
    for (std::int64_t i = ptx::thread() % kWarp; i < a.group; i += kWarp)
      magnitudes.add(std::fabs(ptx::load(a.w + group * a.group + i)));
    const float largest = all_lanes(magnitudes).hi;
    if (ptx::thread() % kWarp == 0) ptx::store(a.inverse + group, 1.0f / (largest + 1e-6f));
  });
}

/// A thread sums one column over the rows of one chunk.
AWQ_DEVICE void mean_sums_body(const MeanArgs& a) {
  for_threads(mean_chunks(a.n) * a.k, [&](std::int64_t item) {
    const std::int64_t column = item % a.k, group = column / a.group, groups = a.k / a.group;
    const std::int64_t first = item / a.k * kMeanRows;
    double sum = 0.0;
    for (std::int64_t row = first; row < smaller(first + kMeanRows, a.n); ++row)
      sum += std::fabs(ptx::load(a.w + row * a.k + column)) * ptx::load(a.inverse + row * groups + group);
    ptx::store(a.sums + item, sum);
  });
}

AWQ_DEVICE void mean_body(const MeanArgs& a) {
  for_threads(a.k, [&](std::int64_t column) {
    double sum = 0.0;
    for (std::int64_t chunk = 0; chunk < mean_chunks(a.n); ++chunk) sum += ptx::load(a.sums + chunk * a.k + column);
    ptx::store(a.w_mean + column, static_cast<float>(sum / static_cast<double>(a.n > 1 ? a.n : 1)));
  });
}

/// The scale of one channel in one candidate, before ties and normalisation. Candidate 0 is the identity.
AWQ_DEVICE void raw_scales_body(const CandidateArgs& a) {
  for_threads(a.count * a.k, [&](std::int64_t item) {
    const std::int64_t candidate = item / a.k, channel = item % a.k;
    const float x_mean = ptx::load(a.x_mean + channel), w_mean = ptx::load(a.w_mean + channel);
    double scale = 1.0;
    if (candidate > 0) {
      const std::int64_t step = (candidate - 1) % a.grid + 1;
      const double ratio = static_cast<double>(step) / static_cast<double>(a.grid);
      const double x = std::pow(static_cast<double>(x_mean), ratio);
      const double w = candidate > a.grid ? std::pow(static_cast<double>(w_mean), 1.0 - ratio) + 1e-4 : 1.0;
      scale = x / w < 1e-4 ? 1e-4 : x / w;
    }
    ptx::store(a.scales + item, a.tie == nullptr ? scale : std::log(scale));
  });
}

/// One scale for all channels with the same tie number: the geometric mean, logarithms added in the order of channels.
AWQ_DEVICE void tied_scales_body(const CandidateArgs& a) {
  for_threads(a.count * a.k, [&](std::int64_t item) {
    const double* logarithms = a.scales + item / a.k * a.k;
    const std::int64_t number = ptx::load(a.tie + item % a.k);
    double sum = 0.0;
    std::int64_t channels = 0;
    for (std::int64_t i = 0; i < a.k; ++i)
      if (ptx::load(a.tie + i) == number) {
        sum += ptx::load(logarithms + i);
        ++channels;
      }
    ptx::store(a.tied + item, std::exp(sum / static_cast<double>(channels)));
  });
}

/// A block divides the scales of one candidate by sqrt(smallest) * sqrt(largest). 1 where that gives no scale, as where
/// a weight is not finite: its loss will tell.
AWQ_DEVICE void candidates_body(const CandidateArgs& a) {
  for (std::int64_t candidate = ptx::block_x(); candidate < a.count; candidate += ptx::grid_x()) {
    const double* scales = (a.tie == nullptr ? a.scales : a.tied) + candidate * a.k;
    float* out = a.candidates + candidate * a.k;
    double least = std::numeric_limits<double>::infinity(), most = 0.0, poison = 0.0;
    for (std::int64_t i = ptx::thread(); i < a.k; i += kThreads) {
      const double scale = ptx::load(scales + i);
      least = scale < least ? scale : least;
      most = scale > most ? scale : most;
      const float x_mean = ptx::load(a.x_mean + i);
      poison += x_mean >= 0.0f ? poison_of(x_mean) : std::numeric_limits<float>::quiet_NaN();
    }
    least = all_threads(least, [](double x, double y) { return x < y ? x : y; });
    most = all_threads(most, [](double x, double y) { return x > y ? x : y; });
    poison = all_threads(poison, [](double x, double y) { return x + y; });
    const double middle = std::sqrt(least) * std::sqrt(most);
    for (std::int64_t i = ptx::thread(); i < a.k; i += kThreads) {
      const auto value = static_cast<float>(ptx::load(scales + i) / middle);
      const bool usable = value > 0.0f && poison_of(value) == 0.0f;
      ptx::store(out + i, poison == 0.0 ? (usable ? value : 1.0f) : std::numeric_limits<float>::quiet_NaN());
    }
  }
}

// --- losses of candidates -------------------------------------------------------------------------------------------

/// core's quantization_error for one item, by one warp.
AWQ_DEVICE void scale_error_body(const ScaleErrorArgs& a) {
  for_warps(a.items, [&](std::int64_t item) {
    const int lane = ptx::thread() % kWarp;
    const float* w = a.w + (a.first + item) % a.n * a.k;
    const float* scales = a.candidates + (a.first + item) / a.n * a.k;
    float* d = a.d + item * a.k;
    float verdict = 0.0f;
    bool valid = true;
    for (std::int64_t g = 0; g < a.k; g += a.group) {
      GroupRange range;
      for (std::int64_t i = g + lane; i < g + a.group; i += kWarp) {
        const float scale = ptx::load(scales + i);
        valid &= scale > 0.0f && poison_of(scale) == 0.0f;
        range.add(ptx::load(w + i) * scale);
      }
      range = all_lanes(range);
      const core::GroupParameters p = core::group_parameters(range.lo + range.poison, range.hi + range.poison, a.to);
      if (poison_of(p.scale) != 0.0f) verdict = std::numeric_limits<float>::infinity();
      for (std::int64_t i = g + lane; i < g + a.group; i += kWarp) {
        const float weight = ptx::load(w + i), scale = ptx::load(scales + i);
        const float rounded = core::dequantize_code(core::round_code(weight * scale, p), p);
        ptx::store(d + i, rounded * (1.0f / scale) - weight);
      }
    }
    if (ptx::ballot(!valid) != 0) verdict = std::numeric_limits<float>::quiet_NaN();
    if (lane == 0) ptx::store(a.verdict + item, verdict);
  });
}

AWQ_DEVICE void store_loss(const LossArgs& a, std::int64_t item, double loss) {
  const float verdict = a.verdict == nullptr ? 0.0f : ptx::load(a.verdict + item);
  ptx::store(a.loss + item, verdict == 0.0f ? loss : static_cast<double>(verdict));
}

/// The loss of each row of d, from the parts that loss_body left.
AWQ_DEVICE void row_loss_body(const LossArgs& a) {
  for_threads(a.batches * a.rows, [&](std::int64_t item) {
    const double* partial = a.partial + item / a.rows * product_tiles(a.k) * a.rows + item % a.rows;
    double loss = 0.0;
    for (std::int64_t tile = 0; tile < product_tiles(a.k); ++tile) loss += ptx::load(partial + tile * a.rows);
    store_loss(a, item, loss);
  });
}

/// The loss of each row of d where G is its diagonal, by one warp.
AWQ_DEVICE void diagonal_loss_body(const LossArgs& a) {
  for_warps(a.batches * a.rows, [&](std::int64_t item) {
    const float* d = a.d + item * a.k;
    const float* diagonal = a.gram + item / a.rows * a.k;
    double loss = 0.0;
    for (std::int64_t i = ptx::thread() % kWarp; i < a.k; i += kWarp)
      loss += static_cast<double>(ptx::load(d + i) * ptx::load(diagonal + i)) * ptx::load(d + i);
    for (int distance = kWarp / 2; distance > 0; distance /= 2) loss += ptx::shuffle_xor(loss, distance);
    if (ptx::thread() % kWarp == 0) store_loss(a, item, loss);
  });
}

/// A block adds up the rows of one candidate. Rows that do not count may have any loss.
AWQ_DEVICE void total_body(const TotalArgs& a) {
  for (std::int64_t candidate = ptx::block_x(); candidate < a.count; candidate += ptx::grid_x()) {
    double total = 0.0;
    for (std::int64_t row = ptx::thread(); row < a.n; row += kThreads) {
      const float weight = a.row_weight == nullptr ? 1.0f : ptx::load(a.row_weight + row);
      if (!(weight >= 0.0f) || poison_of(weight) != 0.0f) total += std::numeric_limits<double>::quiet_NaN();
      if (weight > 0.0f) total += static_cast<double>(weight) * ptx::load(a.row_loss + candidate * a.n + row);
    }
    total = all_threads(total, [](double x, double y) { return x + y; });
    if (ptx::thread() == 0) ptx::store(a.losses + candidate, total);
  }
}

/// The candidate with the smallest loss, the first among equals; NaN if no loss is finite.
AWQ_DEVICE void choose_scale_body(const TotalArgs& a) {
  double least = std::numeric_limits<double>::infinity();
  std::int64_t best = -1;
  for (std::int64_t candidate = 0; candidate < a.count; ++candidate) {
    const double loss = ptx::load(a.losses + candidate);
    if (loss < least) least = loss, best = candidate;
  }
  for_threads(a.k, [&](std::int64_t i) {
    ptx::store(a.scale + i,
               best < 0 ? std::numeric_limits<float>::quiet_NaN() : ptx::load(a.candidates + best * a.k + i));
  });
}

// --- ranges ---------------------------------------------------------------------------------------------------------

AWQ_DEVICE void clip_poison_body(const ClipArgs& a) {
  for_warps(a.k, [&](std::int64_t i) {
    float poison = 0.0f;
    for (std::int64_t j = i + ptx::thread() % kWarp; j < (i / a.group + 1) * a.group; j += kWarp)
      poison += poison_of(ptx::load(a.gram + i * a.gram_stride + j));
    for (int distance = kWarp / 2; distance > 0; distance /= 2) poison += ptx::shuffle_xor(poison, distance);
    if (ptx::thread() % kWarp == 0) ptx::store(a.poison + i, poison);
  });
}

/// A warp starts the search of one group with the group's own range. NaN stays: no loss is ever below infinity then.
AWQ_DEVICE void clip_start_body(const ClipArgs& a) {
  for_warps(a.n * a.groups(), [&](std::int64_t group) {
    GroupRange range;
    for (std::int64_t i = ptx::thread() % kWarp; i < a.group; i += kWarp) {
      range.add(ptx::load(a.w + group * a.group + i));
      range.poison += ptx::load(a.poison + group % a.groups() * a.group + i);
    }
    range = all_lanes(range);
    if (ptx::thread() % kWarp != 0) return;
    ptx::store(a.range + 2 * group, (range.lo < 0.0f ? range.lo : 0.0f) + range.poison);
    ptx::store(a.range + 2 * group + 1, (range.hi > 0.0f ? range.hi : 0.0f) + range.poison);
    ptx::store(a.best + group, std::numeric_limits<double>::infinity());
  });
}

AWQ_DEVICE float shrunk(float end, double by) { return static_cast<float>(static_cast<double>(end) * (1.0 - by)); }

/// core's rounding_error for one item, by one warp: one group of one row within one of its ranges.
AWQ_DEVICE void clip_error_body(const ClipArgs& a) {
  for_warps(a.items(), [&](std::int64_t item) {
    const double step = static_cast<double>(item % a.candidates);
    const std::int64_t row = a.row + item / a.candidates % a.rows, g = item / a.candidates / a.rows;
    const std::int64_t group = row * a.groups() + g;
    const float* ends = a.range + 2 * group;
    const core::GroupParameters p = core::group_parameters(shrunk(ptx::load(ends), step * a.lo_step),
                                                           shrunk(ptx::load(ends + 1), step * a.hi_step), a.to);
    for (std::int64_t i = ptx::thread() % kWarp; i < a.group; i += kWarp) {
      const float w = ptx::load(a.w + group * a.group + i);
      ptx::store(a.d + item * a.group + i, core::dequantize_code(core::round_code(w, p), p) - w);
    }
  });
}

/// A thread keeps the best range of one group; the first among equals, and what is there already before all others.
AWQ_DEVICE void clip_choose_body(const ClipArgs& a) {
  for_threads(a.rows * a.groups(), [&](std::int64_t pair) {
    const std::int64_t local = pair / a.groups(), g = pair % a.groups();
    const std::int64_t group = (a.row + local) * a.groups() + g;
    const double* loss = a.loss + (g * a.rows + local) * a.candidates;
    double least = ptx::load(a.best + group);
    std::int64_t best = -1;
    for (std::int64_t t = 0; t < a.candidates; ++t)
      if (ptx::load(loss + t) < least) least = ptx::load(loss + t), best = t;
    if (best < 0) return;
    const auto step = static_cast<double>(best);
    float* ends = a.range + 2 * group;
    ptx::store(a.best + group, least);
    ptx::store(ends, shrunk(ptx::load(ends), step * a.lo_step));
    ptx::store(ends + 1, shrunk(ptx::load(ends + 1), step * a.hi_step));
  });
}

}  // namespace awq::cuda
