#include "async.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "cuda/ptx.cuh"
#include "global.h"
#include "machine.h"

namespace simt {

// --- copies of 16 bytes that a thread waits for itself
// ---------------------------------------------------------------- Nobody may look at the place to which a copy goes
// before its wait, so that it cannot be seen when the copy ends: it does at the wait, as late as possible.

void copy_async(std::uint32_t to, const void* from, int bytes, Where where) {
  if (bytes < 0 || bytes > 16) fail(where, "copy_async of " + std::to_string(bytes) + " bytes: 0 .. 16");
  SharedMemory& memory = current->block->shared;
  memory.check(to, 16, 16, "copy_async", where);
  if (reinterpret_cast<std::uintptr_t>(from) % 16 != 0) fail(where, "copy_async: the source is not 16-byte aligned");
  if (bytes != 0) check_global_read(from, static_cast<std::size_t>(bytes), 1, Cached::no, where);
  note_write(memory, to, 16, "copy_async", where);
  memory.cells(to, 16, [](Cell& cell, std::uint32_t) { cell.arriving = true; });
  std::memset(memory.data(to), kPoison, 16);
  ThreadCopy copy{current->copy_groups, to, from, bytes, {}, where};
  if (bytes != 0) std::memcpy(copy.data, from, static_cast<std::size_t>(bytes));
  current->copies.push_back(copy);
}

void copy_async_commit() { ++current->copy_groups; }

void copy_async_wait(int pending, Where where) {
  Thread& self = *current;
  std::size_t done = 0;
  for (; done < self.copies.size() && self.copies[done].group + pending < self.copy_groups; ++done) {
    const ThreadCopy& copy = self.copies[done];
    if (std::memcmp(copy.data, copy.from, static_cast<std::size_t>(copy.bytes)) != 0)
      fail(where, "the source of copy_async at " + place(copy.where) + " was changed while the copy was under way");
    SharedMemory& memory = self.block->shared;
    std::memcpy(memory.data(copy.to), copy.data, 16);
    memory.cells(copy.to, 16, [&](Cell& cell, std::uint32_t) {
      cell.write = {self.epoch(), copy.where};
      cell.arriving = false;
    });
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<std::ptrdiff_t>(done));
}

// --- bulk copies, which a barrier waits for -------------------------------------------------------------------------

namespace {

/// Sends a copy on its way. The pieces' places are checked, and noted as written by the copy in this phase: only who
/// has waited for the phase may use them.
void send(Flight flight, const char* what) {
  MemoryBarrier& barrier = *flight.barrier;
  SharedMemory& memory = barrier.block->shared;
  std::int64_t total = 0;
  for (const Flight::Piece& piece : flight.pieces) {
    note_async_write(memory, piece.to, piece.bytes, {barrier.who, static_cast<std::uint32_t>(barrier.phase + 1)}, what,
                     flight.where);
    std::memset(memory.data(piece.to), kPoison, piece.bytes);
    const auto start = flight.data.size();
    flight.data.resize(start + piece.bytes);
    if (piece.from != nullptr) std::memcpy(flight.data.data() + start, piece.from, piece.bytes);
    total += piece.bytes;
  }
  if (barrier.bytes - total < -(std::int64_t{1} << 20))
    fail(flight.where, std::string(what) + ": " + barrier.name() + " is ahead by more than 2^20 bytes");
  ++barrier.under_way;
  machine.send(std::move(flight));
}

/// What encode leaves in a TensorMap.
struct Matrix {
  static constexpr std::uint64_t kMark = 0x7369'6d74'6d61'7000u;

  std::uint64_t mark;
  const unsigned char* data;
  std::int64_t rows, cols, row_stride;  // stride in bytes
  std::int32_t element, box_rows, box_cols, swizzle;
};
static_assert(sizeof(Matrix) <= sizeof(awq::cuda::TensorMap));

Matrix decode(const awq::cuda::TensorMap* map, Where where) {
  if (reinterpret_cast<std::uintptr_t>(map) % 64 != 0) fail(where, "a TensorMap must be 64-byte aligned");
  Matrix m;
  std::memcpy(&m, map, sizeof(m));
  if (m.mark != Matrix::kMark) fail(where, "this TensorMap was not made by encode");
  return m;
}

}  // namespace

void land(const Flight& flight) {
  SharedMemory& memory = flight.barrier->block->shared;
  std::size_t start = 0;
  for (const Flight::Piece& piece : flight.pieces) {
    if (piece.from != nullptr && std::memcmp(flight.data.data() + start, piece.from, piece.bytes) != 0)
      throw Error("the source of the copy at " + place(flight.where) + " was changed while the copy was under way");
    std::memcpy(memory.data(piece.to), flight.data.data() + start, piece.bytes);
    start += piece.bytes;
  }
  barrier_bytes(*flight.barrier, static_cast<std::int64_t>(start));
}

void copy_bulk(std::uint32_t to, const void* from, std::uint32_t bytes, std::uint32_t barrier, Where where) {
  if (bytes == 0 || bytes % 16 != 0)
    fail(where, "copy_bulk of " + std::to_string(bytes) + " bytes: must be a multiple of 16");
  Block& block = *current->block;
  block.shared.check(to, bytes, 16, "copy_bulk", where);
  check_global_read(from, bytes, 16, Cached::no, where);
  send({{{to, from, bytes}}, {}, &find_barrier(block, barrier, true, "copy_bulk", where), where}, "copy_bulk");
}

void copy_tensor(std::uint32_t to, const awq::cuda::TensorMap* map, int row, int col, std::uint32_t barrier,
                 std::uint32_t blocks, const char* what, Where where) {
  const Matrix m = decode(map, where);
  const auto box_row_bytes = static_cast<std::uint32_t>(m.box_cols * m.element);
  const std::int64_t first = std::max<std::int64_t>(col, 0), last = std::min(m.cols, std::int64_t{col} + m.box_cols);
  if (blocks == 0 || blocks >> machine.blocks.size() != 0)
    fail(where,
         std::string(what) + ": blocks " + hex(blocks) + " of a cluster of " + std::to_string(machine.blocks.size()));
  for (; blocks != 0; blocks &= blocks - 1) {
    Block& block = *machine.blocks[static_cast<std::size_t>(std::countr_zero(blocks))];
    block.shared.check(to, static_cast<std::uint32_t>(m.box_rows) * box_row_bytes, 128, what, where);
    if (&block != current->block) note_remote(block, what, where);
    Flight flight{{}, {}, &find_barrier(block, barrier, true, what, where), where};
    for (int i = 0; i < m.box_rows; ++i) {
      // one row of the box, as it lies in the matrix, then cut into its pieces of 16 bytes
      const std::int64_t from_row = std::int64_t{row} + i;
      const unsigned char* source = nullptr;
      if (from_row >= 0 && from_row < m.rows && first < last) {
        source = m.data + from_row * m.row_stride;
        check_global_read(source + first * m.element, static_cast<std::size_t>((last - first) * m.element), 1,
                          Cached::no, where);
      }
      for (std::uint32_t piece = 0; piece < box_row_bytes; piece += 16) {
        const std::uint32_t linear = to + static_cast<std::uint32_t>(i) * box_row_bytes + piece;
        const std::uint32_t target = m.swizzle != 0 ? swizzle128(linear) : linear;
        // of its elements from column c on, [begin, end) lie in the matrix
        const std::int64_t c = col + static_cast<std::int64_t>(piece) / m.element, count = 16 / m.element;
        const std::int64_t begin = source == nullptr ? count : std::clamp<std::int64_t>(-c, 0, count);
        const std::int64_t end = std::clamp(m.cols - c, begin, count);
        const auto add = [&](std::int64_t from, std::int64_t until, bool zeros) {
          if (from == until) return;
          flight.pieces.push_back({target + static_cast<std::uint32_t>(from * m.element),
                                   zeros ? nullptr : source + (c + from) * m.element,
                                   static_cast<std::uint32_t>((until - from) * m.element)});
        };
        add(0, begin, true);
        add(begin, end, false);
        add(end, count, true);
      }
    }
    send(std::move(flight), what);
  }
}

void check_tensor_map(const awq::cuda::TensorMap* map, Where where) { decode(map, where); }

void encode(awq::cuda::TensorMap& map, const void* data, int element_bytes, std::int64_t rows, std::int64_t cols,
            std::int64_t row_stride_bytes, int box_rows, int box_cols, bool swizzled) {
  const auto require = [](bool ok, const char* what) {
    if (!ok) throw Error(std::string("encode: ") + what);
  };
  constexpr std::int64_t kMost = std::int64_t{1} << 32;
  const int box_bytes = box_cols * element_bytes;
  require(element_bytes == 1 || element_bytes == 2 || element_bytes == 4, "elements of 1, 2 or 4 bytes");
  require(reinterpret_cast<std::uintptr_t>(data) % 16 == 0, "the matrix must be 16-byte aligned");
  require(rows > 0 && rows <= kMost && cols > 0 && cols <= kMost, "1 .. 2^32 rows and columns");
  require(row_stride_bytes % 16 == 0 && row_stride_bytes >= cols * element_bytes &&
              row_stride_bytes < std::int64_t{1} << 40,
          "the row stride must be a multiple of 16 bytes, and no less than a row");
  require(box_rows > 0 && box_rows <= 256 && box_cols > 0 && box_cols <= 256, "1 .. 256 rows and columns in a box");
  require(box_bytes % 16 == 0, "a row of a box must be a multiple of 16 bytes");
  require(!swizzled || box_bytes == 128, "with the 128-byte swizzle a row of a box is played with 128 bytes only");
  const Matrix m{Matrix::kMark,
                 static_cast<const unsigned char*>(data),
                 rows,
                 cols,
                 row_stride_bytes,
                 element_bytes,
                 box_rows,
                 box_cols,
                 swizzled};
  std::memcpy(&map, &m, sizeof(m));
}

}  // namespace simt
