// What an x86 machine can do, as a driver (turns.h): c++ -O3 -march=native -pthread machine.cpp
//   "read N K M ...": seconds to read N K M bytes of memory that no cache holds
//   "dot N K M ...":  seconds of N K M multiply-adds of 8-bit integers in registers, by the best instruction there is
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <thread>
#include <vector>

#include "turns.h"

namespace {

using awq::turns::rate;
using awq::turns::Request;

typedef std::int64_t Line __attribute__((vector_size(64)));

constexpr std::size_t kLines = (std::size_t{512} << 20) / sizeof(Line);
constexpr std::size_t kChunk = 16384;

// Reads the next kChunk of these lines; returns bytes.
double read(const Line* lines, std::size_t count, std::size_t& at) {
  if (at + kChunk > count) at = 0;
  Line seen[8] = {};
  for (std::size_t end = at + kChunk; at < end; at += 8) {
    for (std::size_t i = 0; i < 8; ++i) seen[i] |= lines[at + i];
  }
  asm volatile("" : : "r"(seen) : "memory");  // all of it is wanted
  return kChunk * sizeof(Line);
}

// A step is inline assembly, so that no compiler drops it, hoists it or keeps sums in memory.
#if defined(__AVX512VNNI__)
constexpr char kDot[] = "vpdpbusd-512";
constexpr int kBytes = 64;
#define AWQ_DOT "vpdpbusd %1, %1, %0"
#elif defined(__AVXVNNI__)
constexpr char kDot[] = "vpdpbusd-256";
constexpr int kBytes = 32;
#define AWQ_DOT "%{vex%} vpdpbusd %1, %1, %0"
#else
constexpr char kDot[] = "vpmaddubsw-256";
constexpr int kBytes = 32;
#define AWQ_DOT "vpmaddubsw %1, %1, %%ymm15\n vpmaddwd %1, %%ymm15, %%ymm15\n vpaddd %%ymm15, %0, %0"
#endif
typedef std::int64_t Sum __attribute__((vector_size(kBytes)));
inline void step(Sum& sum, Sum x) { asm volatile(AWQ_DOT : "+v"(sum) : "v"(x) : "xmm15"); }

double dot() {
  Sum x = {}, a = x, b = x, c = x, d = x, e = x, f = x, g = x, h = x, i = x, j = x, k = x, l = x;
  for (int times = 0; times < 20000; ++times) {
    step(a, x), step(b, x), step(c, x), step(d, x), step(e, x), step(f, x);
    step(g, x), step(h, x), step(i, x), step(j, x), step(k, x), step(l, x);
  }
  return 20000.0 * 12 * sizeof(Sum);
}

}  // namespace

int main() {
  // In large pages: with small ones a core waits for translations, and at each end of a page for the prefetcher.
  Line* memory = static_cast<Line*>(std::aligned_alloc(std::size_t{2} << 20, kLines * sizeof(Line)));
  madvise(memory, kLines * sizeof(Line), MADV_HUGEPAGE);
  std::fill_n(memory, kLines, Line{1, 2, 3, 4, 5, 6, 7, 8});
  const std::string about = std::string("machine ") + kDot + " " + __VERSION__;
  return awq::turns::serve(about.c_str(), [&](const Request& r) {
    std::vector<double> rates(r.threads);
    std::vector<std::thread> threads;
    for (int t = 0; t < r.threads; ++t) {
      threads.emplace_back([&, t] {
        const std::size_t lines = kLines / r.threads;
        std::size_t at = 0;
        rates[t] = r.type == "dot" ? rate(r.seconds, dot)
                                   : rate(r.seconds, [&] { return read(memory + t * lines, lines, at); });
      });
    }
    double sum = 0;
    for (int t = 0; t < r.threads; ++t) threads[t].join(), sum += rates[t];
    std::printf("%.9g 0 0 %s\n", double(r.n) * double(r.k) * double(r.m) / sum, r.type == "dot" ? kDot : "memory");
  });
}
