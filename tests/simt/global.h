// Global memory: what was registered, and who has written it in this launch. Reads are not noted, so that a store over
// what another thread may not have read yet goes unseen.
#pragma once
#include <cstddef>

#include "memory.h"

namespace simt {

enum class Cached { no, yes };  // yes: by a path that does not see this launch's writes
void check_global_read(const void* p, std::size_t bytes, std::size_t alignment, Cached cached, Where where);
void check_global_write(const void* p, std::size_t bytes, std::size_t alignment, Where where);
/// Begins a launch: what earlier ones wrote is there for all.
void start_globals();
}  // namespace simt
