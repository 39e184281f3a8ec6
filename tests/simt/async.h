// What goes on beside the threads: copies that end some time later.
#pragma once
#include <cstdint>
#include <vector>

#include "barrier.h"
#include "memory.h"

namespace awq::cuda {
struct TensorMap;
}

namespace simt {

struct Block;

// copies of 16 bytes that a thread waits for itself
void copy_async(std::uint32_t to, const void* from, int bytes, Where where);
void copy_async_commit();
void copy_async_wait(int pending, Where where);

/// A bulk copy on its way to one block.
struct Flight {
  struct Piece {
    std::uint32_t to;
    const void* from;  // nullptr: zeros
    std::uint32_t bytes;
  };
  std::vector<Piece> pieces;
  std::vector<unsigned char> data;  // of the source when it began
  MemoryBarrier* barrier;
  Where where;
};

// bulk copies, which a barrier waits for
void copy_bulk(std::uint32_t to, const void* from, std::uint32_t bytes, std::uint32_t barrier, Where where);
void copy_tensor(std::uint32_t to, const awq::cuda::TensorMap* map, int row, int col, std::uint32_t barrier,
                 std::uint32_t blocks, const char* what, Where where);
void check_tensor_map(const awq::cuda::TensorMap* map, Where where);
/// The end of a copy: its bytes are there.
void land(const Flight& flight);

}  // namespace simt
