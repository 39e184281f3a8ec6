// Runs a fuzz target on files, or on `count` random inputs: random_inputs COUNT | FILE...
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

int main(int argc, char** argv) {
  char* end = nullptr;
  const long count = argc == 2 ? std::strtol(argv[1], &end, 10) : 0;
  if (end != nullptr && *end == '\0') {
    std::mt19937_64 random(count);
    std::vector<std::uint8_t> input;
    for (long i = 0; i < count; ++i) {
      input.resize(random() % 200);
      for (auto& byte : input) byte = static_cast<std::uint8_t>(random());
      LLVMFuzzerTestOneInput(input.data(), input.size());
    }
    std::printf("%ld inputs\n", count);
    return 0;
  }
  for (int i = 1; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
    std::printf("%s: no finding\n", argv[i]);
  }
  return 0;
}
