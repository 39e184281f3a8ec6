// awq_ext._native: what has no tensor in it and must answer with or without torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "../core/cpu.h"
#include "../core/layout.h"
#include "../core/plan.h"

namespace py = pybind11;

namespace {

py::dict cpu_features() {
  const awq::core::CpuFeatures& f = awq::core::cpu_features();
  py::dict features;
  features["avx2"] = f.avx2;
  features["avx512"] = f.avx512;
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

py::list layouts() {
  py::list list;
  for (const awq::core::Layout& layout : awq::core::kLayouts) {
    py::dict entry;
    entry["name"] = std::string(layout.name);
    entry["packed_axis"] = layout.packed == awq::core::Axis::n ? "out_features" : "in_features";
    entry["words_by_row"] = layout.words_by_row;
    py::list order;
    for (const auto column : layout.order) order.append(static_cast<int>(column));
    entry["order"] = order;
    entry["source"] = std::string(layout.source);
    list.append(entry);
  }
  return list;
}

awq::core::DType dtype_of(const std::string& name) {
  if (name == "float32") return awq::core::DType::f32;
  if (name == "float16") return awq::core::DType::f16;
  if (name == "bfloat16") return awq::core::DType::bf16;
  if (name == "float64") return awq::core::DType::f64;
  throw py::value_error("dtype must be float32, float16, bfloat16 or float64, got " + name);
}

py::dict plan_linear(std::int64_t m, std::int64_t n, std::int64_t k, const std::string& dtype) {
  if (m < 0 || n < 0 || k < 0) throw py::value_error("m, n and k must not be negative");
  const awq::core::LinearPlan plan = awq::core::plan_linear(m, n, k, dtype_of(dtype), awq::core::best_kernels());
  py::dict result;
  result["kernel"] = plan.name;
  result["level"] = awq::core::best_kernels().name;
  result["why"] = plan.why;
  result["tiles"] = plan.tiles;
  result["tile"] = plan.tile;
  return result;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Facts about this build and this CPU, the layout table, and the choice of kernels; no torch inside.";
  m.def("cpu_features", &cpu_features, "Instruction sets of this CPU that kernels exist for: name -> bool.");
  m.def("build_info", &build_info, "Version, compiler, least torch, CUDA architectures, CPU kernel level in use.");
  m.def("layouts", &layouts, "The layout table: one dict per layout (name, packed_axis, words_by_row, order, source).");
  m.def("plan_linear", &plan_linear, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("dtype") = "float32",
        "Which CPU kernel awq_ext::linear takes for m rows and an [n, k] weight, and why.");
}
