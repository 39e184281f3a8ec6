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

namespace {

using awq::turns::Request;
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
void quantize(ggml_type type, const float* from, void* to, std::int64_t rows, std::int64_t k) {
  ggml_quantize_chunk(type, from, to, 0, rows, k, nullptr, nullptr);
}
auto dequantizer(ggml_type type) { return ggml_internal_get_type_traits(type).to_float; }
ggml_cplan plan(ggml_cgraph* graph, int threads) { return ggml_graph_plan(graph, threads); }

// This library has types of their own for what is rearranged.
ggml_backend_buffer_type_t memory_for(ggml_context*, ggml_tensor*) { return ggml_backend_cpu_buffer_type(); }
#else
void quantize(ggml_type type, const float* from, void* to, std::int64_t rows, std::int64_t k) {
  ggml_quantize_chunk(type, from, to, 0, rows, k, nullptr);
}
auto dequantizer(ggml_type type) { return ggml_get_type_traits(type)->to_float; }
ggml_cplan plan(ggml_cgraph* graph, int threads) { return ggml_graph_plan(graph, threads, nullptr); }

// The first of the CPU's special memories in which it can multiply w; a loader asks the same way.
ggml_backend_buffer_type_t memory_for(ggml_context* tensors, ggml_tensor* w) {
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

// The copies of a W [n, k], and the products with m rows, a graph after a graph.
class Case {
 public:
  Case(ggml_type type, std::int64_t n, std::int64_t k) : n(n), k(k), bytes_(ggml_row_size(type, k) * n) {
    const std::vector<float> normal = gauss(kRows * k, 1);
    std::vector<char> words(bytes_);
    const std::size_t part = ggml_row_size(type, k) * kRows;
    quantize(type, normal.data(), words.data(), kRows, k);
    for (std::size_t at = part; at < bytes_; at += part)
      std::copy_n(&words[0], std::min(part, bytes_ - at), &words[at]);
    exact_.resize(kRows * k);
    // Eight rows at a time: some types interleave so many.
    for (int r = 0; r < kRows; r += 8) dequantizer(type)(&words[part / kRows * r], &exact_[r * k], 8 * k);

    const std::int64_t copies = std::max<std::int64_t>(3, (kRotate + bytes_ - 1) / bytes_);
    tensors_ = context(ggml_tensor_overhead() * (copies + 8));
    for (int i = 0; i < copies; ++i) copies_.push_back(ggml_new_tensor_2d(tensors_.get(), type, k, n));
    const Context scratch = context(ggml_tensor_overhead() * 8);
    const ggml_backend_buffer_type_t memory = memory_for(scratch.get(), copies_[0]);
    layout_ = ggml_backend_buft_name(memory);
    weights_.reset(ggml_backend_alloc_ctx_tensors_from_buft(tensors_.get(), memory));
    for (ggml_tensor* w : copies_) ggml_backend_tensor_set(w, words.data(), 0, bytes_);
  }

  void rows(std::int64_t rows) {
    m = rows;
    x_ = gauss(m * k, 2);
    y_.resize(m * n);
    const std::int64_t count = copies_.size(), each = std::clamp<std::int64_t>(kGraph / (n * k * m), 1, count);
    const std::size_t graph_bytes = ggml_graph_overhead_custom(2 * each + 8, false);
    products_ = context((count / each + 1) * graph_bytes + ggml_tensor_overhead() * (count + 8));
    ggml_tensor* x = ggml_new_tensor_2d(products_.get(), GGML_TYPE_F32, k, m);
    x->data = x_.data();
    graphs_.clear();
    for (std::int64_t i = 0; i < count; ++i) {
      if (i % each == 0) graphs_.push_back({ggml_new_graph_custom(products_.get(), 2 * each + 8, false), 0});
      ggml_tensor* y = ggml_mul_mat(products_.get(), copies_[i], x);
      y->data = y_.data();  // as in a model, whose graphs use memory again
      ggml_build_forward_expand(graphs_.back().graph, y);
      ++graphs_.back().products;
    }
    next_ = 0;
  }

  // Runs the next graph; returns how many products it has.
  int run(int threads) {
    const Graph& g = graphs_[next_++ % graphs_.size()];
    ggml_cplan p = plan(g.graph, threads);
    if (p.work_size > work_.size()) work_.resize(p.work_size);
    p.work_data = work_.data();
    ggml_graph_compute(g.graph, &p);
    return g.products;
  }

  double error(int threads) {
    run(threads);
    double difference = 0, size = 0;
    for (const std::int64_t row : {std::int64_t{0}, m - 1}) {
      std::vector<double> want(kRows);
      for (std::int64_t i = 0; i < kRows * k; ++i) want[i / k] += double(exact_[i]) * x_[row * k + i % k];
      for (std::int64_t j = 0; j < n; ++j) {
        const double off = y_[row * n + j] - want[j % kRows];
        difference += off * off, size += want[j % kRows] * want[j % kRows];
      }
    }
    return std::sqrt(difference / size);
  }

  const std::int64_t n, k;
  std::int64_t m = 0;
  std::size_t bytes() const { return bytes_; }
  const char* layout() const { return layout_; }

 private:
  struct Graph {
    ggml_cgraph* graph;
    int products;
  };
  std::size_t bytes_;
  const char* layout_ = nullptr;
  std::vector<float> exact_, x_, y_;
  std::vector<std::uint8_t> work_;
  Context tensors_{nullptr, ggml_free}, products_{nullptr, ggml_free};
  Buffer weights_{nullptr, ggml_backend_buffer_free};
  std::vector<ggml_tensor*> copies_;
  std::vector<Graph> graphs_;
  std::size_t next_ = 0;
};

}  // namespace

int main() {
  std::map<std::string, std::unique_ptr<Case>> cases;  // of each type the last shape asked for
  ggml_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  return awq::turns::serve(ABOUT, [&](const Request& r) {
    std::unique_ptr<Case>& c = cases[r.type];
    if (!c || c->n != r.n || c->k != r.k) {
      c.reset();  // its memory first
      c = std::make_unique<Case>(find(r.type), r.n, r.k);
    }
    if (c->m != r.m) c->rows(r.m);
    const double seconds = r.seconds > 0 ? 1 / awq::turns::rate(r.seconds, [&] { return c->run(r.threads); }) : 0;
    const double error = r.seconds > 0 ? 0 : c->error(r.threads);
    std::printf("%.9g %.9g %zu %s\n", seconds, error, c->bytes(), c->layout());
  });
}
