// What goes on beside the threads: copies that end some time later.
#pragma once
#include <cstdint>

#include "memory.h"

namespace simt {

// copies of 16 bytes that a thread waits for itself
void copy_async(std::uint32_t to, const void* from, int bytes, Where where);
void copy_async_commit();
void copy_async_wait(int pending, Where where);

}  // namespace simt
