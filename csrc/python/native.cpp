// awq_ext._native: what has no tensor in it and must answer with or without torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "../core/cpu.h"
#include "../core/layout.h"
#include "../core/pack.h"
#include "../core/plan.h"
#include "../cuda/plan.h"

namespace py = pybind11;

namespace {

py::dict cpu_features() {
  const awq::core::CpuFeatures& f = awq::core::cpu_features();
  py::dict features;
  features["avx2"] = f.avx2;
  features["avx_vnni"] = f.avx_vnni;
  features["avx512"] = f.avx512;
  features["avx512_vnni"] = f.avx512_vnni;
  features["avx512_bf16"] = f.avx512_bf16;
  features["amx_int8"] = f.amx_int8;
  features["neon_dotprod"] = f.neon_dotprod;
  features["neon_i8mm"] = f.neon_i8mm;
  return features;
}

py::dict build_info() {
  py::dict info;
  info["version"] = AWQ_VERSION;
  info["compiler"] = __VERSION__;
  info["torch_target"] = "2.10";
  info["cuda_architectures"] = AWQ_CUDA_ARCHS;
  info["cpu_kernels"] = awq::core::best_kernels().name;
  return info;
}

using awq::core::Codes;
using awq::core::Layout;

const char* axis_name(awq::core::Axis axis) { return axis == awq::core::Axis::n ? "out_features" : "in_features"; }

py::dict describe(const Codes& codes) {
  py::list order;
  for (int place = 0; place < codes.tile_codes(); ++place) {
    const awq::core::CodeShape code = awq::core::code_in_tile(codes, place);
    order.append(py::make_tuple(code.n, code.k));
  }
  py::dict entry;
  entry["tile"] = py::make_tuple(codes.tile_n, codes.tile_k);
  entry["order"] = order;
  entry["outer"] = axis_name(codes.outer);
  entry["word_bits"] = codes.word_bits;
  entry["padded"] = codes.padded;
  return entry;
}

py::list layouts() {
  constexpr const char* zeros[] = {"none", "words", "words_less_one", "scaled"};
  constexpr const char* orders[] = {"natural", "marlin", "strips", "fragments"};
  py::list list;
  for (const Layout& layout : awq::core::kLayouts) {
    py::dict entry;
    entry["name"] = layout.name;
    entry["weight"] = describe(layout.weight);
    entry["zeros"] = zeros[static_cast<int>(layout.zeros)];
    entry["zero_words"] = awq::core::find_codes(std::string(layout.name) + ".zeros") == nullptr
                              ? py::object(py::none())
                              : describe(layout.zero_words);
    entry["zeros_optional"] = layout.zeros_optional;
    entry["scales_outer"] = axis_name(layout.scales_outer);
    entry["groups_padded"] = layout.groups_padded;
    entry["scales_order"] = orders[static_cast<int>(layout.scales_order)];
    entry["weight_name"] = layout.weight_name;
    entry["zeros_name"] = layout.zeros_name;
    entry["scales_name"] = layout.scales_name;
    entry["extra_name"] = layout.extra_name;
    entry["source"] = layout.source;
    list.append(entry);
  }
  return list;
}

std::vector<std::int64_t> marlin_scales(std::int64_t n, bool one_group) {
  std::vector<std::int64_t> channels;
  for (std::int64_t column = 0; column < n; ++column) channels.push_back(awq::core::marlin_scale(column, one_group));
  return channels;
}

const Codes& codes_of(const std::string& name) {
  const Codes* codes = awq::core::find_codes(name);
  if (codes == nullptr) throw py::value_error("unknown layout '" + name + "'");
  return *codes;
}

void repack(const py::buffer& source, const py::buffer& target, const std::string& src, const std::string& dst,
            std::int64_t n, std::int64_t k, std::int64_t begin, std::int64_t end) {
  const Codes &from = codes_of(src), &to = codes_of(dst);
  // Below 2^31 on either side, no size can overflow.
  constexpr std::int64_t most = std::int64_t{1} << 31;
  if (n < 0 || k < 0 || n > most || k > most) throw py::value_error("n and k must be 0 .. 2^31");
  for (const auto& [codes, name] : {std::pair{from, src}, std::pair{to, dst}})
    if (!awq::core::can_hold(codes, n, k))
      throw py::value_error("layout '" + name + "' cannot hold codes [" + std::to_string(n) + ", " + std::to_string(k) +
                            "]");
  const std::int64_t blocks = awq::core::block_count(to.outer, n, k);
  if (end < 0) end = blocks;
  if (begin < 0 || begin > end || end > blocks)
    throw py::value_error("begin and end must be within the " + std::to_string(blocks) + " blocks");

  const auto bytes = [](const py::buffer_info& info, const char* name) {
    if (!PyBuffer_IsContiguous(info.view(), 'C')) throw py::value_error(std::string(name) + " must be contiguous");
    return static_cast<std::int64_t>(info.view()->len);
  };
  const py::buffer_info in = source.request(), out = target.request(true);
  const auto size = [&](const Codes& codes) {
    const awq::core::WordShape shape = awq::core::word_shape(codes, n, k);
    return shape.rows * shape.cols * codes.word_bits / 8;
  };
  // The target holds the words of the blocks alone: rows of words, from the first that block `begin` has.
  const std::int64_t outer = to.outer == awq::core::Axis::n ? n : k;
  const int tile = to.outer == awq::core::Axis::n ? to.tile_n : to.tile_k;
  const awq::core::WordShape shape = awq::core::word_shape(to, n, k);
  const std::int64_t row_bytes = shape.cols * to.word_bits / 8;
  const auto first_row = [&](std::int64_t block) {
    return awq::core::ceil_div(std::min(block * awq::core::kBlock, outer), tile);
  };
  const std::int64_t wanted = (first_row(end) - first_row(begin)) * row_bytes;
  if (bytes(in, "source") != size(from))
    throw py::value_error("source must be " + std::to_string(size(from)) + " bytes, got " +
                          std::to_string(bytes(in, "source")));
  if (bytes(out, "target") != wanted)
    throw py::value_error("target must be " + std::to_string(wanted) + " bytes, got " +
                          std::to_string(bytes(out, "target")));
  // repack_blocks counts words from the matrix's first, which need not be in memory: the address is only a base.
  auto* base = reinterpret_cast<char*>(reinterpret_cast<std::uintptr_t>(out.ptr) -
                                       static_cast<std::uintptr_t>(first_row(begin) * row_bytes));
  const py::gil_scoped_release unlocked;
  awq::core::repack_blocks(from, to, in.ptr, base, n, k, begin, end);
}

awq::core::DType dtype_of(const std::string& name) {
  if (name == "float32") return awq::core::DType::f32;
  if (name == "float16") return awq::core::DType::f16;
  if (name == "bfloat16") return awq::core::DType::bf16;
  if (name == "float64") return awq::core::DType::f64;
  throw py::value_error("dtype must be float32, float16, bfloat16 or float64, got " + name);
}

py::dict plan_linear(std::int64_t m, std::int64_t n, std::int64_t k, const std::string& dtype,
                     const std::string& layout, const std::string& activation, std::int64_t group) {
  if (m < 0 || n < 0 || k < 0) throw py::value_error("m, n and k must not be negative");
  if (group < 1) throw py::value_error("group_size must be positive");
  if (layout != "gemm" && layout != "strips") throw py::value_error("layout must be gemm or strips, got " + layout);
  const auto rounding = awq::core::find_activation(activation);
  if (!rounding) throw py::value_error("activation must be exact, int16 or int8, got " + activation);
  const awq::core::Kernels& kernels = awq::core::best_kernels();
  const awq::core::LinearPlan plan = layout == "gemm"
                                         ? awq::core::plan_linear(m, n, k, dtype_of(dtype), kernels)
                                         : awq::core::plan_strips(m, n, k, group, dtype_of(dtype), *rounding, kernels);
  py::dict result;
  result["kernel"] = plan.name;
  result["level"] = awq::core::best_kernels().name;
  result["why"] = plan.why;
  result["tiles"] = plan.tiles;
  result["tile"] = plan.tile;
  if (plan.kernel == awq::core::LinearKernel::strips) {
    result["digits"] = plan.digits;
    result["rows"] = plan.rows;
    result["tile_rows"] = plan.tile_rows;
  }
  return result;
}

py::dict plan_cuda(std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t group, const std::string& dtype,
                   const std::string& scale_dtype, int arch, int sms, int shared_bytes) {
  if (m < 0 || n < 0 || k < 0) throw py::value_error("m, n and k must not be negative");
  if (group < 1 || k % group != 0) throw py::value_error("k must be a multiple of group_size");
  awq::cuda::Gpu gpu{arch, sms, shared_bytes};
  if (sms <= 0 || shared_bytes <= 0) {
    const awq::cuda::Gpu* known = awq::cuda::find_gpu(arch);
    if (known == nullptr)
      throw py::value_error("sms and shared_bytes must be given for the unknown architecture " + std::to_string(arch));
    if (sms <= 0) gpu.sms = known->sms;
    if (shared_bytes <= 0) gpu.shared_bytes = known->shared_bytes;
  }
  const awq::cuda::CudaPlan plan = awq::cuda::plan_cuda(m, n, k, group, dtype_of(dtype), dtype_of(scale_dtype), gpu);
  py::dict result;
  result["kernel"] = plan.name;
  result["why"] = plan.why;
  result["tile"] = py::make_tuple(plan.tile_n, plan.tile_m);
  result["cluster"] = plan.cluster;
  result["splits"] = plan.splits;
  result["stages"] = plan.stages;
  result["grid"] = py::make_tuple(plan.grid_x, plan.grid_y);
  result["threads"] = plan.threads;
  result["shared_bytes"] = plan.shared_bytes;
  result["workspace_bytes"] = plan.workspace_bytes;
  return result;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Facts about this build and this CPU, the layout table, and the choice of kernels; no torch inside.";
  m.def("cpu_features", &cpu_features, "Instruction sets of this CPU that kernels exist for: name -> bool.");
  m.def("build_info", &build_info, "Version, compiler, least torch, CUDA architectures, CPU kernel level in use.");
  m.def(
      "layouts", &layouts,
      "The layout table of csrc/core/layout.h: one dict a layout, its fields under their names there; an order is the "
      "list of (n, k) in a tile.");
  m.def("marlin_scales", &marlin_scales, py::arg("n"), py::arg("one_group"),
        "The output channel whose scale stands in each of the n columns of a marlin layout's scales.");
  m.def("padded_groups", &awq::core::padded_groups, py::arg("groups"), py::arg("group_size"),
        "The groups that scales and zeros have room for where a layout pads them; 0 for a group_size below 32.");
  m.attr("BLOCK") = awq::core::kBlock;
  m.def("repack", &repack, py::arg("source"), py::arg("target"), py::arg("src"), py::arg("dst"), py::arg("n"),
        py::arg("k"), py::arg("begin") = 0, py::arg("end") = -1,
        "Words of layout src for codes [n, k] -> words of layout dst, between contiguous buffers (bytes, mmap, numpy, "
        "...). The target takes the blocks [begin, end) only, BLOCK codes each along dst's outer axis (end -1: all). "
        "Raises ValueError for an unknown layout, codes that a layout cannot hold, and buffers of another size. Needs "
        "no torch, and lets other threads run.");
  m.def("plan_linear", &plan_linear, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("dtype") = "float32",
        py::arg("layout") = "gemm", py::arg("activation") = "exact", py::arg("group_size") = 128,
        "Which CPU kernel awq_ext::linear takes for m rows and an [n, k] weight, and why.");
  m.def("fragments_can_have", &awq::cuda::fragments_can_have, py::arg("k"), py::arg("group_size"),
        "Whether CUDA kernels exist for such groups; layout fragments can hold any.");
  m.def(
      "plan_cuda", &plan_cuda, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("group_size"),
      py::arg("dtype") = "float16", py::arg("scale_dtype") = "float16", py::arg("arch") = 90, py::arg("sms") = 0,
      py::arg("shared_bytes") = 0,
      "Which CUDA kernel it takes for layout fragments on a GPU of compute capability arch (90: 9.0), how it is "
      "launched, and why; 'dequantize' means that torch multiplies. sms (multiprocessors) and shared_bytes (the most "
      "that a block may have) 0: of a GPU of that architecture, for 75, 80, 86, 89, 90, 100 and 120. No GPU is asked.");
}
