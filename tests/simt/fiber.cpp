#include "fiber.h"

#include <sys/mman.h>

#include <new>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kStackBytes = 512 * 1024;  // its frames are several times as large
#else
constexpr std::size_t kStackBytes = 128 * 1024;
#endif
constexpr std::size_t kGuardBytes = 4096;

Fiber* leaving = nullptr;  // who switched last

/// Tells AddressSanitizer that another stack is about to be used. `fake` is where it keeps what it knows of this one;
/// nullptr if this one is done with.
void before_switch([[maybe_unused]] void** fake, [[maybe_unused]] const void* stack,
                   [[maybe_unused]] std::size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake, stack, bytes);
#endif
}
void after_switch([[maybe_unused]] void* fake, [[maybe_unused]] void** old_stack,
                  [[maybe_unused]] std::size_t* old_bytes) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  __sanitizer_finish_switch_fiber(fake, &bottom, old_bytes);
  *old_stack = const_cast<void*>(bottom);
#endif
}

std::vector<void*>& free_stacks() {
  static std::vector<void*> stacks;
  return stacks;
}

}  // namespace

/// Stacks outlive fibers: a launch has many blocks, and a page that was touched once is cheap to touch again. Below
/// each is a page that nobody may touch.
struct Fiber::Stacks {
  boost::context::stack_context allocate() {
    auto& pool = free_stacks();
    if (pool.empty()) {
      constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
      void* p = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, kFlags, -1, 0);
      if (p == MAP_FAILED || mprotect(p, kGuardBytes, PROT_NONE) != 0) throw std::bad_alloc();
      pool.push_back(p);
    }
    void* p = pool.back();
    pool.pop_back();
    boost::context::stack_context stack;
    stack.size = kStackBytes;
    stack.sp = static_cast<char*>(p) + kGuardBytes + kStackBytes;
    return stack;
  }
  void deallocate(boost::context::stack_context& stack) noexcept {
    free_stacks().push_back(static_cast<char*>(stack.sp) - kStackBytes - kGuardBytes);
  }
};

/// The other side of every switch: whoever left keeps the place where it stopped.
void Fiber::arrived(boost::context::fiber&& from) {
  after_switch(fake_stack_, &leaving->stack_, &leaving->stack_bytes_);
  leaving->context_ = std::move(from);
}

void Fiber::switch_to(Fiber& next) {
  leaving = this;
  before_switch(&fake_stack_, next.stack_, next.stack_bytes_);
  boost::context::fiber from = std::move(next.context_).resume();
  arrived(std::move(from));
}

void Fiber::start(std::function<Fiber*()> body) {
  Stacks stacks;
  boost::context::stack_context stack = stacks.allocate();
  stack_ = static_cast<char*>(stack.sp) - stack.size;
  stack_bytes_ = stack.size;
  fake_stack_ = nullptr;
  context_ = boost::context::fiber(std::allocator_arg, boost::context::preallocated(stack.sp, stack.size, stack),
                                   stacks, [this, body = std::move(body)](boost::context::fiber&& from) {
                                     arrived(std::move(from));
                                     Fiber* next = body();
                                     leaving = this;
                                     before_switch(nullptr, next->stack_, next->stack_bytes_);
                                     return std::move(next->context_);
                                   });
}

}  // namespace simt
