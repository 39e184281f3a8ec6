// The quantized matrix products of ggml (llama.cpp) or, with AWQ_IK, of ik_llama.cpp's older ggml, as a driver
// (turns.h). TYPE is a name of a ggml type. Answers seconds (0 where 0 were asked for), the error (rms, relative, of
// the first and the last row against float64 on the same weights), the bytes of one W and the layout it is in.
//
// As in a model: graphs of many products, float32 rows, and weights where a loader of models would put them, which for
// some types is memory that rearranges them at run time. The copies of W, 512 MiB of them, take turns.
#include "ggml.h"

#include <strings.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "ggml-backend.h"
#ifndef AWQ_IK
#include "ggml-cpu.h"
#endif
#include "turns.h"

#ifdef AWQ_IK  // its attention, which is left out, is referred to all the same
extern "C" void iqk_flash_attn_noalibi() { std::abort(); }
extern "C" void iqk_fa_work_buffer_size() { std::abort(); }
#endif

namespace {

using Context = std::unique_ptr<ggml_context, decltype(&ggml_free)>;
using Buffer = std::unique_ptr<ggml_backend_buffer, decltype(&ggml_backend_buffer_free)>;

constexpr std::int64_t kRotate = std::int64_t{512} << 20;
constexpr std::int64_t kRows = 64;        // of W that differ; the others repeat them
constexpr std::int64_t kGraph = 1 << 28;  // about so many multiply-adds are one graph

Context context(std::size_t bytes) { return Context(ggml_init({bytes, nullptr, true}), ggml_free); }

ggml_type find(const std::string& name) {
  for (int t = 0; t < GGML_TYPE_COUNT; ++t) {
    const char* known = ggml_type_name(ggml_type(t));
    if (known && !strcasecmp(known, name.c_str())) return ggml_type(t);
  }
  std::fprintf(stderr, "no type is called %s\n", name.c_str());
  std::exit(2);
}

std::vector<float> gauss(std::int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

#ifdef AWQ_IK
auto traits(ggml_type type) { return ggml_internal_get_type_traits(type); }
ggml_cplan plan(ggml_cgraph* graph, int threads) { return ggml_graph_plan(graph, threads); }
// This library has types of their own for what is rearranged.
ggml_backend_buffer_type_t memory_for(ggml_context*, ggml_tensor*) { return ggml_backend_cpu_buffer_type(); }
#else
auto traits(ggml_type type) { return *ggml_get_type_traits(type); }
ggml_cplan plan(ggml_cgraph* graph, int threads) { return ggml_graph_plan(graph, threads, nullptr); }
// The first of the CPU's special memories in which it can multiply w; a loader asks the same way.
ggml_backend_buffer_type_t memory_for(ggml_context* tensors, ggml_tensor* w) {
  ggml_log_set([](ggml_log_level, const char*, void*) {}, nullptr);  // a line for each copy of W
  ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  void* extra =
      ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu), "ggml_backend_dev_get_extra_bufts");
  ggml_tensor* y = ggml_mul_mat(tensors, w, ggml_new_tensor_2d(tensors, GGML_TYPE_F32, w->ne[0], 1));
  auto* types = extra ? reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(extra)(cpu) : nullptr;
  for (; types && *types; ++types) {
    const Buffer empty(ggml_backend_buft_alloc_buffer(*types, 0), ggml_backend_buffer_free);
    w->buffer = empty.get();
    const bool can = ggml_backend_dev_supports_op(cpu, y);
    w->buffer = nullptr;
    if (can) return *types;
  }
  return ggml_backend_cpu_buffer_type();
}
#endif

// The copies of a W [n, k] and their products with m rows, in graphs.
struct Case {
  const std::int64_t n, k;
  std::int64_t m = 0;
  std::size_t bytes;
  const char* layout;
  std::vector<float> exact, x, y;
  std::vector<std::uint8_t> work;
  Context tensors{nullptr, ggml_free}, products{nullptr, ggml_free};
  Buffer memory{nullptr, ggml_backend_buffer_free};
  std::vector<ggml_tensor*> copies;
  std::vector<std::pair<ggml_cgraph*, int>> graphs;  // and how many products each has
  std::size_t next = 0;

  Case(ggml_type type, std::int64_t n, std::int64_t k)
      : n(n), k(k), bytes(ggml_row_size(type, k) * n), exact(kRows * k) {
    const std::int64_t count = std::max<std::int64_t>(3, (kRotate + bytes - 1) / bytes);
    tensors = context(ggml_tensor_overhead() * (count + 8));
    for (int i = 0; i < count; ++i) copies.push_back(ggml_new_tensor_2d(tensors.get(), type, k, n));
    const Context scratch = context(ggml_tensor_overhead() * 8);
    const ggml_backend_buffer_type_t where = memory_for(scratch.get(), copies[0]);
    layout = ggml_backend_buft_name(where);
    memory.reset(ggml_backend_alloc_ctx_tensors_from_buft(tensors.get(), where));

    const std::size_t row = bytes / n;
    std::vector<char> words(bytes);
    const std::vector<float> normal = gauss(kRows * k, 1);
    const int together =
        std::string(ggml_type_name(type)).find("_r4") == std::string::npos ? 8 : 4;  // interleaved rows
    for (int r = 0; r < kRows; r += together) {
      traits(type).from_float_ref(&normal[r * k], &words[r * row], together * k);
      traits(type).to_float(&words[r * row], &exact[r * k], together * k);
    }
    for (std::size_t at = kRows * row; at < bytes; ++at) words[at] = words[at - kRows * row];
    for (ggml_tensor* w : copies) ggml_backend_tensor_set(w, words.data(), 0, bytes);
  }

  void rows(std::int64_t count) {
    m = count;
    x = gauss(m * k, 2);
    y.resize(m * n);
    const int each = std::clamp<std::int64_t>(kGraph / (n * k * m), 1, copies.size());
    const std::size_t graph_bytes = ggml_graph_overhead_custom(2 * each + 8, false);
    products = context((copies.size() / each + 1) * graph_bytes + ggml_tensor_overhead() * (copies.size() + 8));
    ggml_tensor* rows = ggml_new_tensor_2d(products.get(), GGML_TYPE_F32, k, m);
    rows->data = x.data();
    graphs.clear();
    for (ggml_tensor* w : copies) {
      if (graphs.empty() || graphs.back().second == each) {
        graphs.push_back({ggml_new_graph_custom(products.get(), 2 * each + 8, false), 0});
      }
      ggml_tensor* product = ggml_mul_mat(products.get(), w, rows);
      product->data = y.data();  // as in a model, whose graphs use memory again
      ggml_build_forward_expand(graphs.back().first, product);
      ++graphs.back().second;
    }
  }

  // Runs the next graph; returns how many products it has.
  int run(int threads) {
    const auto [graph, count] = graphs[next++ % graphs.size()];
    ggml_cplan p = plan(graph, threads);
    work.resize(std::max(work.size(), p.work_size));
    p.work_data = work.data();
    ggml_graph_compute(graph, &p);
    return count;
  }

  double error(int threads) {
    run(threads);
    double difference = 0, size = 0;
    for (const std::int64_t row : {std::int64_t{0}, m - 1}) {
      std::vector<double> want(kRows);
      for (std::int64_t i = 0; i < kRows * k; ++i) want[i / k] += double(exact[i]) * x[row * k + i % k];
      for (std::int64_t j = 0; j < n; ++j) {
        const double off = y[row * n + j] - want[j % kRows];
        difference += off * off, size += want[j % kRows] * want[j % kRows];
      }
    }
    return std::sqrt(difference / size);
  }
};

}  // namespace

int main() {
  std::map<std::string, std::unique_ptr<Case>> cases;  // of each type the last shape asked for
  return awq::turns::serve(ABOUT, [&](const awq::turns::Request& r) {
    std::unique_ptr<Case>& c = cases[r.type];
    if (!c || c->n != r.n || c->k != r.k) {
      c.reset();  // its memory first
      c = std::make_unique<Case>(find(r.type), r.n, r.k);
    }
    if (c->m != r.m) c->rows(r.m);
    const double seconds = r.seconds > 0 ? 1 / awq::turns::rate(r.seconds, [&] { return c->run(r.threads); }) : 0;
    const double error = r.seconds > 0 ? 0 : c->error(r.threads);
    std::printf("%.9g %.9g %zu %s\n", seconds, error, c->bytes, c->layout);
  });
}
