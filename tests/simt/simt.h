// Plays a kernel's body on the host, thread by thread, and throws an Error at the first thing it does that a GPU need
// not forgive: what is checked is said in CONTRIBUTING.md, "Kernels without a GPU".
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace awq::cuda {
struct TensorMap;
}

namespace simt {

/// A misuse: which thread of which block, where in the source, and what.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Launch {
  std::int64_t grid_x = 1, grid_y = 1;
  int threads = 32;                // of a block: a multiple of 32
  int cluster = 1;                 // blocks along x that run together
  std::int64_t first_x = 0;        // those before it are not played: a slice of the grid
  std::uint32_t shared_bytes = 0;  // dynamic shared memory of a block
  int registers = 0;               // of a thread as compiled; 0: as many as the block's threads leave each other
  bool early = false;              // starts before the kernels before it have ended: see Global::weights
};

/// When asynchronous copies end: at once, as late as their waits allow, at random moments; by_seed: seed 0 early, seed
/// 1 late, others at random.
enum class Completion { by_seed, early, late, random };

struct Options {
  std::uint64_t seed = 0;  // of the order in which threads run; 0: in order of their numbers
  Completion completion = Completion::by_seed;
};

/// Plays body() in every thread of the launch. Not re-entrant: one launch at a time in a process.
void run(const Launch& launch, const Options& options, const std::function<void()>& body);

/// Global memory that kernels may touch while this object lives. All else is out of bounds.
class Global {
 public:
  Global(const void* data, std::size_t bytes, bool writable, std::string name = "");
  ~Global();
  Global(const Global&) = delete;
  Global& operator=(const Global&) = delete;

  /// No kernel writes it: may be read before wait_for_earlier_kernels in an early launch.
  Global& weights();
  /// Forgets what is there: bytes that no kernel has written are an error to read.
  Global& uninitialised();
  /// Whether kernels have written every byte since uninitialised().
  bool all_written() const;

  struct Record;

 private:
  Record* record_;
};

/// `count` values of T that kernels may touch; aligned as cudaMalloc aligns.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::size_t count, std::string name = "")
      : bytes_(count * sizeof(T) + kAlignment),
        data_(reinterpret_cast<T*>((reinterpret_cast<std::uintptr_t>(bytes_.data()) + kAlignment - 1) / kAlignment *
                                   kAlignment)),
        count_(count),
        global_(data_, count * sizeof(T), true, std::move(name)) {}

  T* data() { return data_; }
  const T* data() const { return data_; }
  std::size_t size() const { return count_; }
  T& operator[](std::size_t i) { return data_[i]; }
  const T& operator[](std::size_t i) const { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + count_; }
  Global& global() { return global_; }

 private:
  static constexpr std::uintptr_t kAlignment = 256;
  std::vector<unsigned char> bytes_;
  T* data_;
  std::size_t count_;
  Global global_;
};

/// What cuTensorMapEncodeTiled writes for a matrix of 16-bit (element_bytes 2) or other elements, rows row_stride_bytes
/// apart, copied in boxes of box_rows x box_cols, zeros outside. With swizzle128 a row of the box is 128 bytes at most.
/// Throws an Error for what the driver refuses.
void encode(awq::cuda::TensorMap& map, const void* data, int element_bytes, std::int64_t rows, std::int64_t cols,
            std::int64_t row_stride_bytes, int box_rows, int box_cols, bool swizzle128);

}  // namespace simt
